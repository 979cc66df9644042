"""One stored resource, parsed. What another version of the operator stored never makes a pass fail."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_operator.api.spec import OPERATOR, Spec
from finetune_operator.api.status import Status
from finetune_operator.api.words import JSON, NAME_LIMIT_CHARACTERS, parse_time


class InvalidJobError(Exception):
    """A stored resource that this operator cannot understand, in a sentence."""


@dataclass(frozen=True)
class FineTuneJob:
    """One resource, parsed. `problem` is set, and `spec` is not, where the stored spec makes no sense here."""

    name: str
    namespace: str
    uid: str
    resource_version: str
    generation: int
    created: datetime
    labels: Mapping[str, str]
    deleting: bool
    status: Status
    stored_status: JSON
    spec: Spec | None
    problem: str | None = None

    @classmethod
    def parse(cls, body: Mapping[str, Any]) -> FineTuneJob:
        """The resource as the API server gave it. Never fails on its spec or status."""
        metadata = body["metadata"]
        spec, problem = _parse_spec(body.get("spec") or {})
        if problem is None:
            problem = _name_problem(metadata["name"])
        stored = dict(body.get("status") or {})
        return cls(
            name=metadata["name"],
            namespace=metadata["namespace"],
            uid=metadata["uid"],
            resource_version=metadata["resourceVersion"],
            generation=metadata.get("generation", 1),
            created=parse_time(metadata["creationTimestamp"]),
            labels=metadata.get("labels") or {},
            deleting="deletionTimestamp" in metadata,
            status=_parse_status(stored),
            stored_status=stored,
            spec=spec if problem is None else None,
            problem=problem,
        )

    @property
    def managed_elsewhere(self) -> bool:
        """Whether the spec says that somebody else reconciles the job."""
        return self.spec is not None and self.spec.managed_by not in (None, OPERATOR)

    @property
    def valid_spec(self) -> Spec:
        """The spec, where there is one to act on."""
        if self.spec is None:
            raise InvalidJobError(self.problem)
        return self.spec


def _parse_spec(spec: JSON) -> tuple[Spec | None, str | None]:
    try:
        return Spec.model_validate(spec), None
    except ValidationError as error:
        return None, sentence(error)


def _name_problem(name: str) -> str | None:
    if len(name) <= NAME_LIMIT_CHARACTERS and "." not in name:
        return None
    return (
        f"metadata.name: at most {NAME_LIMIT_CHARACTERS} characters without dots, so that stages can be named after it."
    )


Path = tuple[int | str, ...]


def _parse_status(stored: JSON) -> Status:
    """The stored status; what an older or newer operator wrote in another shape is dropped, as little as can be."""
    known = {name: field.alias or name for name, field in Status.model_fields.items()}
    kept: JSON = {alias: copy.deepcopy(stored[alias]) for alias in known.values() if alias in stored}
    while True:
        try:
            return Status.model_validate(kept)
        except ValidationError as error:
            unreadable = {_unreadable(problem["loc"], problem["type"]) for problem in error.errors()}
        for path in sorted(unreadable, reverse=True):  # from the end, so that a list's indexes hold
            _drop(kept, path)


def _unreadable(where: Path, problem: str) -> Path:
    """What to take out: an unknown field alone, else the entry of a list, else the whole field."""
    if problem == "extra_forbidden":
        return where
    in_list = len(where) > 1 and isinstance(where[1], int)
    return where[:2] if in_list else where[:1]


def _drop(kept: Any, path: Path) -> None:  # noqa: ANN401 - JSON
    for part in path[:-1]:
        kept = kept[part]
    del kept[path[-1]]


def sentence(error: ValidationError) -> str:
    """What is wrong with a spec, field by field, at most three of them."""
    problems = error.errors(include_url=False, include_context=False)
    parts = []
    for problem in problems[:3]:
        where = ".".join(str(part) for part in problem["loc"])
        what = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            what = "unknown to this version of the operator"
        parts.append(f"spec.{where}: {what}" if where else what)
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""  # noqa: PLR2004 - as many as shown
    return "; ".join(parts) + more + "."
