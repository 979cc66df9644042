"""Configuration files, written only where they change: some components end themselves when their file is touched."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path


def write_text(file: Path, text: str) -> Path:
    """Bring the file to the text and return it."""
    if not file.exists() or file.read_text() != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return file


def write_json(file: Path, content: dict[str, Any]) -> Path:
    """Bring the file to the content and return it."""
    return write_text(file, json.dumps(content, indent=2) + "\n")
