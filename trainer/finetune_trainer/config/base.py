"""What every record of the contract is made of: closed, frozen, camelCase outside, snake_case inside."""

from __future__ import annotations

import re
from typing import Annotated, Any, get_args
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

NAME_PATTERN = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
"""A DNS label: safe as a Kubernetes name and as a folder name."""

SUBDOMAIN_PATTERN = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"
"""A DNS subdomain: what Kubernetes allows as a name of most things."""

RELATIVE_PATH_PATTERN = r"^[^/\x00].*$"

HOST = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?|[0-9a-f:.]*:[0-9a-f:.]*", re.ASCII)
"""A name, or an address of IPv4 or IPv6."""

STEPS_LIMIT = 100_000_000
SEED_LIMIT = 2**32 - 1
DEFAULT_SEED = 42


class Model(BaseModel):
    """A closed, frozen record: a typo in a field is an error."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - any field's
        """Pydantic takes true for 1."""
        if isinstance(value, bool) and _is_number(cls.model_fields[info.field_name or ""].annotation):
            raise PydanticCustomError("number_type", "Input should be a number")
        return value

    def to_json(self) -> str:
        """The record as JSON with its public names, unset fields left out, the same bytes for the same record."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


def _is_number(annotation: Any) -> bool:  # noqa: ANN401 - any type expression
    return not {int, float}.isdisjoint((annotation, *get_args(annotation)))


ClaimName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=253,
        pattern=SUBDOMAIN_PATTERN,
        description="Name of a PersistentVolumeClaim in the namespace of the job.",
    ),
]
ShortName = Annotated[str, Field(min_length=1, max_length=40, pattern=NAME_PATTERN)]
RelativePath = Annotated[str, Field(min_length=1, max_length=1024, pattern=RELATIVE_PATH_PATTERN)]
SecretName = Annotated[str, Field(min_length=1, max_length=253, pattern=SUBDOMAIN_PATTERN)]


def refuse_unreachable(url: str) -> str:
    """The URL of a service, if it can be one. It is not repeated where it is refused: it may have a password in it."""
    if "@" in url:
        raise PydanticCustomError("address", "Names and passwords belong in a Secret, not in an address")
    try:
        parts = urlsplit(url)
        known = parts.port != 0 and HOST.fullmatch(parts.hostname or "") is not None
    except ValueError:  # of a port that is no number, of brackets that hold no IPv6 address
        known = False
    if not known or parts.query or parts.fragment:
        raise PydanticCustomError("address", "It must be http(s)://host, maybe with :port (1 to 65535) and /path")
    return url


Url = Annotated[
    str, Field(min_length=8, max_length=1024, pattern=r"^https?://[^\s]+$"), AfterValidator(refuse_unreachable)
]


class SecretKeyRef(Model):
    """One key of a Secret in the job's namespace."""

    name: SecretName = Field(description="Name of the Secret.")
    key: str = Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$", description="Key within the Secret.")


class SecretRef(Model):
    """A Secret in the job's namespace."""

    name: SecretName = Field(description="Name of the Secret.")
