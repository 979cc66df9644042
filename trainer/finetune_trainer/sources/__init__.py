"""Files brought onto the disk from wherever they are: once, in prepare, verified and resumable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_trainer.config import VolumeSource
from finetune_trainer.errors import InvalidConfig
from finetune_trainer.work import resolve_volume

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_trainer.config import Source
    from finetune_trainer.context import Context


@dataclass(frozen=True)
class Fetched:
    """Where the files of a source are now."""

    path: Path
    """A file or a folder: to be read, never changed."""
    revision: str | None = None
    """Commit or digest it was pinned to; None for a volume."""


def fetch_source(slot: str, field: str, source: Source, context: Context) -> Fetched:
    """The files of a source, complete and verified. `slot` names its folders of downloads and secrets.

    NotFound, AccessDenied, InvalidConfig, VolumeFull; anything else is worth another try.
    """
    if isinstance(source.kind, VolumeSource):
        return Fetched(resolve_volume(context.sources, source.kind, field))
    msg = f"{field}: {slot} is not a volume"
    raise InvalidConfig(msg)
