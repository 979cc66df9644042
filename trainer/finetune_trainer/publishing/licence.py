"""The licence of the base model: what its card says, else what its LICENSE file is known by."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_trainer.models.finished import LICENCES

if TYPE_CHECKING:
    from pathlib import Path

CARD = "README.md"
OTHER = "other"
"""The hub's word for a licence that it has no short name for: it wants a name and a link, then."""
KNOWN = (
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"MIT License|Permission is hereby granted, free of charge", "mit"),
    (r"LLAMA 3\.3 COMMUNITY LICENSE", "llama3.3"),
    (r"LLAMA 3\.2 COMMUNITY LICENSE", "llama3.2"),
    (r"LLAMA 3\.1 COMMUNITY LICENSE", "llama3.1"),
    (r"META LLAMA 3 COMMUNITY LICENSE", "llama3"),
    (r"LLAMA 2 COMMUNITY LICENSE", "llama2"),
    (r"Gemma Terms of Use", "gemma"),
    (r"BSD 3-Clause", "bsd-3-clause"),
)
"""How a text begins, and the hub's name for it."""
BEGIN_CHARACTERS = 2000
FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*(\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Licence:
    """What is known of a licence."""

    files: tuple[Path, ...] = ()
    """Its texts, with the notices that go with them."""
    identifier: str | None = None
    """The hub's short name, or other; None where nothing is known."""
    name: str | None = None
    link: str | None = None


def find_licence(base: Path) -> Licence:
    """The licence of the model in a folder."""
    files = tuple(path for pattern in LICENCES for path in sorted(base.glob(pattern)))
    told = read_front_matter(base / CARD)
    if isinstance(identifier := told.get("license"), str):
        return Licence(files, identifier, _text(told.get("license_name")), _text(told.get("license_link")))
    if not files:
        return Licence()
    begin = files[0].read_text(encoding="utf-8", errors="replace")[:BEGIN_CHARACTERS]
    found = next((name for pattern, name in KNOWN if re.search(pattern, begin, re.IGNORECASE)), None)
    return Licence(files, found) if found else Licence(files, OTHER, "the-license-of-the-base", files[0].name)


def read_front_matter(card: Path) -> dict[str, Any]:
    """The YAML at the begin of a model card; empty where there is none."""
    import yaml  # noqa: PLC0415 - only here

    try:
        found = FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
        told = yaml.safe_load(found[1]) if found else None
    except (OSError, yaml.YAMLError):
        return {}
    return told if isinstance(told, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
