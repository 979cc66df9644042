"""Where things are: the work folder of a job, the mounted sources, the mounted secrets."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_trainer.runtime.errors import AccessDenied, InvalidConfig, NotFound, VolumeFull
from finetune_trainer.runtime.wording import first_of

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_trainer.config import VolumeSource

SPARE_BYTES = 64 << 20
"""Kept free beside what is written, for the rows and the manifests."""


@dataclass(frozen=True)
class WorkFolder:
    """`model/ original/ data/ checkpoints/ adapter/ merged/ quantized/<name>/ published/<name>/ report/` of one job."""

    root: Path

    @property
    def model(self) -> Path:
        """The base model: config, tokenizer, safetensors, manifest."""
        return self.root / "model"

    @property
    def original(self) -> Path:
        """The model that the adapter is merged into, where it is another one than the base."""
        return self.root / "original"

    @property
    def downloads(self) -> Path:
        """What sources brought, a folder a slot; prepare removes it when it is done."""
        return self.root / ".downloads"

    @property
    def data(self) -> Path:
        """Tokenized rows, and the manifest that is prepare's proof."""
        return self.root / "data"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer as trained with: chat template, pad and end token, added tokens."""
        return self.data / "tokenizer"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints of the training, each with a manifest."""
        return self.root / "checkpoints"

    @property
    def adapter(self) -> Path:
        """The trained adapter."""
        return self.root / "adapter"

    @property
    def merged(self) -> Path:
        """The finished 16-bit model: merged, or trained whole."""
        return self.root / "merged"

    def quantized(self, name: str) -> Path:
        """One quantized form."""
        return self.root / "quantized" / name

    def published(self, name: str) -> Path:
        """What was written for one entry of output.publish, and the proof that all of it is there."""
        return self.root / "published" / name

    @property
    def kernels(self) -> Path:
        """What was compiled for the GPU: a cache, no artifact."""
        return self.root / ".kernels"

    @property
    def report(self) -> Path:
        """What is for people: the preview, logs."""
        return self.root / "report"


def resolve_volume(sources: Path, source: VolumeSource, what: str) -> Path:
    """The file or folder of a volume source, inside `<sources>/<claimName>`.

    `what` names the field for messages, e.g. "dataset 'dolly'". Links may point anywhere inside the claim, not out of
    it. NotFound, InvalidConfig (leaves the claim) or AccessDenied.
    """
    claim = sources / source.claim_name
    try:
        return _resolve_inside(claim, source.path, f"{what}: claim '{source.claim_name}'")
    except PermissionError as error:
        where = f"{error.filename} (claim '{source.claim_name}')"
        msg = f"{what}: no permission to read {where}: make it readable for the job."
        raise AccessDenied(msg) from error


def _resolve_inside(claim: Path, relative: str, where: str) -> Path:
    if not claim.is_dir():
        msg = f"{where} is not mounted: no folder {claim}. On a workstation, --sources DIR has one folder a claim name."
        raise NotFound(msg)
    root = claim.resolve()
    try:
        path = (root / relative).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a NUL byte, a name too long
        msg = f"{where}, path '{relative}' cannot be followed ({error}). Set volume.path to a path inside the claim."
        raise InvalidConfig(msg) from error
    if path != root and root not in path.parents:
        msg = f"{where}, path '{relative}' leads out of the claim. Set volume.path to a file or folder inside it."
        raise InvalidConfig(msg)
    if not path.exists():
        raise NotFound(f"{where} has no '{relative}'" + _what_is_there(root, path))
    return path


def _what_is_there(root: Path, path: Path) -> str:
    """The nearest folder that exists, and what is in it."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    inside = "." if folder == root else folder.relative_to(root).as_posix()
    names = sorted(child.name + ("/" if child.is_dir() else "") for child in folder.iterdir())
    if not names:
        return f" (folder '{inside}' is empty). Copy the files there, or correct volume.path."
    return f" (folder '{inside}' has {first_of(names)}). Correct volume.path."


def write_report(path: Path, text: str) -> None:
    """Leave a file for people, whole, for any user to read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    aside.chmod(0o644)
    aside.replace(path)


def read_secret(secrets: Path, slot: str, name: str) -> str | None:
    """The text of `<secrets>/<slot>/<name>`, without white space around it; None if there is none.

    AccessDenied, InvalidConfig (no text).
    """
    path = secrets / slot / name
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        msg = f"No permission to read the secret {path}: make it readable for the user the trainer runs as."
        raise AccessDenied(msg) from error
    except UnicodeDecodeError as error:
        msg = f"The secret {path} is not text: put the token or key, as it is, into the Secret."
        raise InvalidConfig(msg) from error


def read_credential(secrets: Path, slot: str, name: str, field: str) -> str | None:
    """The token, key or password in `<secrets>/<slot>/<name>`, fit for a header; None as of `read_secret`.

    InvalidConfig, which does not repeat it, besides what `read_secret` raises.
    """
    text = read_secret(secrets, slot, name)
    if text is not None and not (text.isascii() and text.isprintable()):
        msg = f"{field}: {name} is not one line of ASCII, as tokens and keys are. Put it alone, as it is, "
        raise InvalidConfig(msg + "into the Secret.")
    return text


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """VolumeFull before anything is written that will not fit."""
    free = shutil.disk_usage(folder).free
    if needed_bytes + SPARE_BYTES > free:
        msg = f"{what} needs {_gib(needed_bytes + SPARE_BYTES)} free in the work folder, there are {_gib(free)}. "
        raise VolumeFull(msg + "Make the job's claim larger, or free space on it.")


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB ({count:,} bytes)"
