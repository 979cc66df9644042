"""Files brought onto the disk from wherever they are: once, in prepare, verified and resumable.

hub, modelscope, s3, oci   what is there, and the bytes of a file from any offset
choose, splits             which files a model, an adapter or a dataset needs
download                   the bytes on the disk, proven
http, base                 what those are made of
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_trainer.config import (
    DOCKER_CONFIG_FILE,
    S3_CREDENTIALS,
    TOKEN_FILE,
    BaseModelSource,
    DatasetSource,
    HuggingFaceDataset,
    HuggingFaceSource,
    ModelScopeDataset,
    ModelScopeSource,
    OciSource,
    S3Source,
    VolumeSource,
)
from finetune_trainer.runtime.errors import NotFound
from finetune_trainer.runtime.work import read_credential, read_secret, resolve_volume
from finetune_trainer.sources import choose, splits
from finetune_trainer.sources.base import Changed
from finetune_trainer.sources.download import check_names, discard, download_files, read_pin, write_pin

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from finetune_trainer.config import Source
    from finetune_trainer.runtime.context import Context
    from finetune_trainer.sources.base import Listing, Remote, RemoteFile, RepoType
    from finetune_trainer.sources.s3 import Credentials

log = logging.getLogger(__name__)

ADAPTER_SLOT = "adapter"


@dataclass(frozen=True)
class Fetched:
    """Where the files of a source are now."""

    path: Path
    """A file or a folder: to be read, never changed."""
    where: str
    """Field and place, for messages: "model: 'owner/name'"."""
    revision: str | None = None
    """Commit or digest it was pinned to; None for a volume."""
    downloaded: bool = True
    """Whether the files are the job's own; those of a volume are somebody else's."""


def fetch_source(slot: str, field: str, source: Source, context: Context) -> Fetched:
    """The files of a source, complete and verified. `slot` names its folders of downloads and secrets.

    A download that was broken off goes on with the files that were listed when it began. NotFound, AccessDenied,
    InvalidConfig, InvalidModel, InvalidDataset, VolumeFull, VerificationFailed; anything else is worth another try.
    """
    if isinstance(volume := source.kind, VolumeSource):
        path = resolve_volume(context.sources, volume, field)
        return Fetched(path, f"{field}: '{volume.path}' (claim '{volume.claim_name}')", downloaded=False)
    errand = _Errand(slot, field, source, build_remote(slot, field, source, context), context)
    listing, path = errand.run()
    only = isinstance(source, DatasetSource) and len(listing.files) == 1
    return Fetched(path / listing.files[0].name if only else path, errand.remote.where, listing.revision)


def fetch_file(slot: str, field: str, source: Source, name: str, context: Context) -> Path:
    """One small file of a source. NotFound if there is none of that name."""
    if isinstance(volume := source.kind, VolumeSource):
        path, where = resolve_volume(context.sources, volume, field) / name, f"{field}: '{volume.path}'"
    else:
        remote = build_remote(slot, field, source, context)
        listing = remote.look_up(lambda files: [file for file in files if file.name == name])
        path, where = download_files(remote, listing.files, context.work.downloads / slot, context) / name, remote.where
    if not path.is_file():
        msg = f"{where} has no {name}. Correct the source."
        raise NotFound(msg)
    return path


def forget(context: Context) -> None:
    """Remove what was downloaded: prepare has made its artifacts of it."""
    discard(context.work.downloads)


def build_remote(slot: str, field: str, source: Source, context: Context) -> Remote:
    """The place that a source names, with the credentials of its slot. AccessDenied, InvalidConfig, NotFound."""
    from finetune_trainer.sources import hub, modelscope, oci, s3  # noqa: PLC0415 - their clients are slow to load

    repo_type: RepoType = "dataset" if isinstance(source, DatasetSource) else "model"
    match source.kind:
        case HuggingFaceSource() as kind:
            return hub.Hub(kind, repo_type, field, read_token(slot, f"{field}.huggingFace", kind, context))
        case ModelScopeSource() as kind:
            return modelscope.ModelScope(kind, repo_type, field, read_token(slot, f"{field}.modelScope", kind, context))
        case S3Source() as kind:
            return s3.S3(kind, field, read_keys(slot, f"{field}.s3", kind, context))
        case OciSource() as kind:
            return oci.Oci(kind, field, read_login(slot, f"{field}.oci", kind, context))
        case VolumeSource():
            msg = "a volume is read in place"
            raise AssertionError(msg)


def read_token(slot: str, field: str, hub: HuggingFaceSource | ModelScopeSource, context: Context) -> str | None:
    """The token for a hub. InvalidConfig; NotFound if there is none and there should be."""
    token = read_credential(context.secrets, slot, TOKEN_FILE, f"{field}.tokenSecretRef")
    _require(token, hub.token_secret_ref, f"{field}.tokenSecretRef", context.secrets / slot)
    return token


def read_keys(slot: str, field: str, bucket: S3Source, context: Context) -> Credentials | None:
    """The keys for a bucket. InvalidConfig; NotFound if there are none and there should be."""
    from finetune_trainer.sources.s3 import read_credentials  # noqa: PLC0415 - its client is slow to load

    where = f"{field}.credentialsSecretRef"
    keys = {name: read_credential(context.secrets, slot, name, where) for name in S3_CREDENTIALS}
    credentials = read_credentials(keys, bucket.region, field)
    _require(credentials, bucket.credentials_secret_ref, where, context.secrets / slot)
    return credentials


def read_login(slot: str, field: str, artifact: OciSource, context: Context) -> tuple[str, str] | None:
    """User and password for a registry. InvalidConfig; NotFound if there are none and there should be."""
    from finetune_trainer.sources.oci import read_docker_config  # noqa: PLC0415 - its client is slow to load

    text = read_secret(context.secrets, slot, DOCKER_CONFIG_FILE)
    _require(text, artifact.credentials_secret_ref, f"{field}.credentialsSecretRef", context.secrets / slot)
    return read_docker_config(text, artifact.reference, field) if text else None


def _require(found: object, reference: object, field: str, folder: Path) -> None:
    """NotFound if the config names a secret and there is nothing of it."""
    if found is None and reference is not None:
        msg = f"{field}: the secret is empty or not mounted. Give the Secret the keys that are needed; "
        raise NotFound(msg + f"on a workstation, put each into a file of its name in {folder}.")


@dataclass(frozen=True)
class _Errand:
    """One source on its way to the disk."""

    slot: str
    field: str
    source: Source
    remote: Remote
    context: Context

    def run(self) -> tuple[Listing, Path]:
        """What was fetched, and the folder it is in."""
        listing = read_pin(self._folder, self.source) or self._look_up()
        try:
            return listing, download_files(self.remote, listing.files, self._folder, self.context)
        except Changed as error:
            log.warning("%s Looking it up again.", error)
            listing = self._look_up()
            return listing, download_files(self.remote, listing.files, self._folder, self.context)

    @property
    def _folder(self) -> Path:
        return self.context.work.downloads / self.slot

    def _look_up(self) -> Listing:
        """What is there now, remembered for the attempts to come."""
        self.context.report.begin(f"looking up {self.remote.where}")
        listing = self.remote.look_up(self._choose)
        write_pin(self._folder, self.source, listing)
        return listing

    def _choose(self, files: Sequence[RemoteFile]) -> list[RemoteFile]:
        """The files that are needed; their names are safe."""
        names = set(self._names({file.name: file for file in files}))
        chosen = [file for file in files if file.name in names]
        check_names([file.name for file in chosen], self.remote.where)
        return chosen

    def _names(self, there: dict[str, RemoteFile]) -> list[str]:
        kind, where = self.source.kind, self.remote.where
        if isinstance(kind, HuggingFaceDataset | ModelScopeDataset):
            return splits.split_names(kind, there, self._read(there.get(splits.CARD)), where, self.field)
        if isinstance(self.source, DatasetSource):
            return choose.data_names(there, where)
        if self.slot == ADAPTER_SLOT:
            return choose.adapter_names(there, where)
        code = isinstance(self.source, BaseModelSource) and bool(self.source.trust_remote_code)
        return choose.model_names(there, where, code=code)

    def _read(self, file: RemoteFile | None) -> bytes:
        """The bytes of a small file that says which others are wanted."""
        if file is None:
            return b""
        return (download_files(self.remote, [file], self._folder / "card", self.context) / file.name).read_bytes()
