"""The Hugging Face hub: models and datasets, pinned to a commit.

`huggingface_hub` looks repositories up and tells its refusals apart; the bytes come by `download`, from the addresses
that the library names. Files in LFS are proven by their SHA-256, the small ones by git's own hash.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from finetune_trainer.runtime.errors import AccessDenied, NotFound, TrainerError, Unavailable
from finetune_trainer.sources.base import Algorithm, Body, Changed, Digest, Listing, RemoteFile
from finetune_trainer.sources.http import (
    CONFLICT,
    FORBIDDEN,
    PAYMENT_REQUIRED,
    PRECONDITION_FAILED,
    UNAUTHORIZED,
    build_client,
    is_passing,
    open_range,
    reaching,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoSibling

    from finetune_trainer.config import HuggingFaceSource
    from finetune_trainer.sources.base import Choose, RepoType

ENDPOINT_VARIABLE = "HF_ENDPOINT"
PUBLIC_ENDPOINT = "https://huggingface.co"
LOOK_UP_SECONDS = 60.0


class Hub:
    """One repository."""

    def __init__(
        self,
        source: HuggingFaceSource,
        repo_type: RepoType,
        field: str,
        token: str | None,
        verb: Literal["read", "write"] = "read",
    ) -> None:
        """`verb`: what the token must allow, for messages."""
        self._verb = verb
        self.where = f"{field}: '{source.repo}'"
        self._source, self._repo_type, self._field = source, repo_type, f"{field}.huggingFace"
        self._token: str | Literal[False] = token or False  # never one that lies about on the machine
        self._endpoint = (os.environ.get(ENDPOINT_VARIABLE) or PUBLIC_ENDPOINT).rstrip("/")
        self._client = build_client()

    @cached_property
    def api(self) -> HfApi:
        """The library's calls, with this token at this endpoint."""
        from huggingface_hub import HfApi  # noqa: PLC0415 - slow

        return HfApi(endpoint=self._endpoint, token=self._token)

    @property
    def page(self) -> str:
        """Where people look at the repository."""
        return f"{self._endpoint}/{'datasets/' if self._repo_type == 'dataset' else ''}{self._source.repo}"

    def look_up(self, choose: Choose) -> Listing:
        """The files chosen, at the commit that the revision means now."""
        with self.told_apart():
            look_up = self.api.dataset_info if self._repo_type == "dataset" else self.api.model_info
            found = look_up(
                self._source.repo, revision=self._source.revision, files_metadata=True, timeout=LOOK_UP_SECONDS
            )
        if found.sha is None:
            msg = f"{self.where}: the hub names no commit of '{self._source.revision}'. Try again later."
            raise Unavailable(msg)
        commit = found.sha
        files = [_remote_file(sibling, commit) for sibling in found.siblings or []]
        return Listing(revision=commit, files=tuple(choose(files)))

    @contextmanager
    def open(self, file: RemoteFile, start: int) -> Iterator[Body]:
        """The bytes of a file at the pinned commit."""
        from huggingface_hub import hf_hub_url  # noqa: PLC0415 - slow

        url = hf_hub_url(
            self._source.repo,
            file.name,
            repo_type=self._repo_type,
            revision=file.address,
            endpoint=self._endpoint,
        )
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        with self.told_apart(), open_range(self._client, url, start, _library_error, headers) as body:
            yield body

    @contextmanager
    def told_apart(self) -> Iterator[None]:
        """The hub's refusals, each with what the user can do."""
        from huggingface_hub import errors  # noqa: PLC0415 - slow

        remedy = f"Check network, proxy and {ENDPOINT_VARIABLE}{self._way_around}."
        with reaching(self.where, f"the hub at {self._endpoint}", remedy):
            try:
                yield
            except json.JSONDecodeError as error:  # a page of a proxy, or of a server that is going down
                msg = f"{self.where}: {self._endpoint} does not answer as a hub does ({error}). {remedy}"
                raise Unavailable(msg) from error
            except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as error:
                raise self._refusal(error) from error

    @property
    def _way_around(self) -> str:
        return ", or use a volume source" if self._verb == "read" else ""

    def _refusal(self, error: Exception) -> TrainerError:  # noqa: PLR0911 - a word for each refusal
        from huggingface_hub import errors  # noqa: PLC0415 - slow

        status = getattr(getattr(error, "response", None), "status_code", 0)
        token = f"{self._field}.tokenSecretRef"
        if isinstance(error, errors.OfflineModeIsEnabled):
            return Unavailable(f"{self.where}: HF_HUB_OFFLINE is set. Unset it{self._way_around}.")
        if isinstance(error, errors.GatedRepoError):
            return AccessDenied(
                f"{self.where} is gated. Accept its terms on its page ({self.page}), and give the token of that "
                f"account in {token}."
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return NotFound(f"{self.where} has no revision '{self._source.revision}'. Correct {self._field}.revision.")
        if isinstance(error, errors.RepositoryNotFoundError) and status == UNAUTHORIZED:
            return AccessDenied(
                f"{self.where} is private or not there (the hub answers 401). Correct {self._field}.repo, or give a "
                f"token that may {self._verb} it in {token}."
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return NotFound(
                f"{self.where} is not on the hub as a {self._repo_type}. Correct {self._field}.repo; a private one "
                f"needs {token}."
            )
        if isinstance(error, errors.EntryNotFoundError):
            return Changed(f"{self.where}: a file that was listed is not there any more. Run the job again.")
        if status in {UNAUTHORIZED, PAYMENT_REQUIRED, FORBIDDEN}:
            return AccessDenied(
                f"{self.where}: the hub refuses the token ({status}). Give one that may {self._verb} it in {token}."
                f"{_own_words(error)}"
            )
        if status in {CONFLICT, PRECONDITION_FAILED}:
            return Unavailable(f"{self.where}: somebody else writes to it ({status}). It is worth another try.")
        if is_passing(status):
            return Unavailable(f"{self.where}: the hub answers {status}. It is worth another try later.")
        return TrainerError(f"{self.where}: the hub answers {status}: {str(error).splitlines()[0]}{_own_words(error)}")


def _own_words(error: Exception) -> str:
    """What the hub says of a refusal besides its number: a quota, for one."""
    words = getattr(error, "server_message", None)
    return f" The hub says: {words}" if words else ""


def _remote_file(sibling: RepoSibling, commit: str) -> RemoteFile:
    digest = None
    if sibling.lfs is not None:
        digest = Digest(algorithm=Algorithm.SHA256, value=sibling.lfs.sha256)
    elif sibling.blob_id is not None:
        digest = Digest(algorithm=Algorithm.GIT, value=sibling.blob_id)
    return RemoteFile(name=sibling.rfilename, size=sibling.size or 0, digest=digest, address=commit, version=commit)


def _library_error(response: httpx2.Response) -> TrainerError:
    """Raise what the library makes of a refusal; `Hub.told_apart` puts it into words."""
    from huggingface_hub.utils import hf_raise_for_status  # type: ignore[attr-defined]  # noqa: PLC0415 - slow

    hf_raise_for_status(response)
    return Unavailable(f"{response.url.host} answers {response.status_code} to a download. Try again later.")
