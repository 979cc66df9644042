"""The Hugging Face hub: all files in one commit.

`huggingface_hub` uploads and commits. Large files go first, over HTTP: its other way (hf_xet) neither tells how far it
is nor stops when it is asked to. The hub keeps what was uploaded, so that the next attempt sends the rest; nobody
sees any of it before the commit.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING

from finetune_trainer.publishing.base import accounted_for
from finetune_trainer.runtime.errors import AccessDenied, NotFound, VerificationFailed
from finetune_trainer.sources.base import Algorithm
from finetune_trainer.sources.hub import Hub

if TYPE_CHECKING:
    from collections.abc import Iterator

    from huggingface_hub import CommitOperationAdd

    from finetune_trainer.config import HuggingFaceTarget
    from finetune_trainer.publishing.base import Feed, Outgoing, Parcel
    from finetune_trainer.sources.base import RemoteFile

DEFAULT_BRANCH = "main"


class HubSink:
    """A branch of a repository."""

    def __init__(self, target: HuggingFaceTarget, field: str, token: str | None) -> None:
        from huggingface_hub import constants  # noqa: PLC0415 - slow

        constants.HF_HUB_DISABLE_XET = True
        self._hub = Hub(target, "model", field, token, "write")
        self._target, self._field = target, f"{field}.huggingFace"
        self.where = self._hub.where
        self._there: dict[str, RemoteFile] = {}
        self._commit: str | None = None
        """The newest, which the next one follows: None as long as nobody looked."""
        self._leaving: list[str] = []
        self._additions: dict[str, CommitOperationAdd] = {}

    def prepare(self, parcel: Parcel) -> None:
        """Make the repository and the branch, unless they are there."""
        try:
            self._look()
        except NotFound:
            self._make()
            self._look()
        self._refuse_public()
        names = {file.name for file in parcel.everything}
        self._leaving = sorted(accounted_for(self._hub, self._there) - names)

    def has(self, file: Outgoing, feed: Feed) -> bool:  # noqa: ARG002 - what is hashed is small
        """By the SHA-256 of what is in LFS, and git's own hash of what is not."""
        return self._is_there(file)

    def send(self, file: Outgoing, feed: Feed) -> None:
        """Upload a large file; small ones go with the commit."""
        addition = self._addition(file)
        addition.path_or_fileobj = feed
        with self._hub.told_apart(), self._unwrapped(file):
            self._hub.api.preupload_lfs_files(
                self._target.repo, [addition], revision=self._target.revision, free_memory=False
            )
        addition.path_or_fileobj = str(file.path)
        self._additions[file.name] = addition

    @contextmanager
    def _unwrapped(self, file: Outgoing) -> Iterator[None]:
        """What stopped an upload, out of what the library makes of it. AccessDenied for what the hub does not take."""
        try:
            yield
        except RuntimeError as error:
            raise error.__cause__ or error from None
        except json.JSONDecodeError:
            raise
        except ValueError as error:
            msg = f"{self.where}: the hub does not take {file.name}: {' '.join(str(error).split())[:300]}. "
            raise AccessDenied(msg + "See the quota of its owner.") from error

    def commit(self, parcel: Parcel) -> str:
        """Commit what is new, if anything is, and look whether the commit has all of it."""
        self._look()  # an answer may have been lost: what is there is not committed again
        new = [file for file in parcel.everything if not self._is_there(file)]
        changes = [self._additions.get(file.name) or self._addition(file) for file in new]
        self._push(changes, [name for name in self._leaving if name in self._there], parcel.title)
        self._look()
        for file in parcel.everything:
            if not self._is_there(file):
                msg = (
                    f"{self.where}: {file.name} is not in the commit as it was sent. Take it out of .gitignore there, "
                )
                raise VerificationFailed(msg + "or see who else commits to this branch; then run publish again.")
        return f"{self._hub.page}/tree/{self._commit}"

    def _is_there(self, file: Outgoing) -> bool:
        found = self._there.get(file.name)
        if found is None or found.digest is None or found.size != file.entry.size:
            return False
        if found.digest.algorithm is Algorithm.SHA256:
            return found.digest.value == file.entry.sha256
        hasher = found.digest.hasher(found.size)
        hasher.update(file.path.read_bytes())
        return hasher.hexdigest() == found.digest.value

    def _look(self) -> None:
        listing = self._hub.look_up(list)
        self._there, self._commit = {file.name: file for file in listing.files}, listing.revision

    def _make(self) -> None:
        repo, branch = self._target.repo, self._target.revision
        private = self._target.private is not False
        with self._hub.told_apart():
            self._hub.api.create_repo(repo, private=private, exist_ok=True)
            if branch != DEFAULT_BRANCH:
                self._hub.api.create_branch(repo, branch=branch, exist_ok=True)

    def _refuse_public(self) -> None:
        """AccessDenied where everybody would see what is meant to be private."""
        if self._target.private is False:
            return
        with self._hub.told_apart():
            found = self._hub.api.model_info(self._target.repo)
        if not found.private:
            msg = f"{self.where} is public. Set {self._field}.private to false if all may see the model, "
            raise AccessDenied(msg + "or use a private repository.")

    def _push(self, additions: list[CommitOperationAdd], leaving: list[str], title: str) -> None:
        from huggingface_hub import CommitOperationDelete  # noqa: PLC0415 - slow

        deletions = [CommitOperationDelete(name) for name in leaving]
        if not additions and not deletions:
            return
        with self._hub.told_apart():
            self._hub.api.create_commit(
                self._target.repo,
                [*additions, *deletions],
                commit_message=title,
                revision=self._target.revision,
                parent_commit=self._commit,
            )

    def _addition(self, file: Outgoing) -> CommitOperationAdd:
        """The file as the library takes it, with the hash that is known."""
        from huggingface_hub import CommitOperationAdd  # noqa: PLC0415 - slow

        addition = CommitOperationAdd(file.name, file.path)
        addition.upload_info.sha256 = bytes.fromhex(file.entry.sha256)
        return addition
