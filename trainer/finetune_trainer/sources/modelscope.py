"""ModelScope: models and datasets, pinned to what was listed.

By its HTTP calls: the library (modelscope-hub 0.5) keeps tokens as pickled cookies in the home folder, and brings
requests and a download machinery of its own that cannot be stopped or watched from outside. The calls are those that it
makes. Two habits of the server to know: an unknown revision is answered with 200 and no files, and of a revision's
commit only the first digits are sure to be told (`LatestCommitter.ShortId`), so that each file is fetched at the commit
that last changed it, which every listing names in full.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx2

from finetune_trainer.runtime.errors import AccessDenied, NotFound, TrainerError, Unavailable
from finetune_trainer.sources import http
from finetune_trainer.sources.base import Algorithm, Body, Changed, Digest, Listing, RemoteFile

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune_trainer.config import ModelScopeSource
    from finetune_trainer.sources.base import Choose, RepoType

ENDPOINT_VARIABLE, DOMAIN_VARIABLE = "MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"
PUBLIC_ENDPOINT = "https://modelscope.cn"
PAGE_FILES = 200
PAGES = 500
TREE = "tree"


def endpoint() -> str:
    """The server's address: an address or a bare domain in the environment, else the public one."""
    given = os.environ.get(ENDPOINT_VARIABLE) or os.environ.get(DOMAIN_VARIABLE) or PUBLIC_ENDPOINT
    return (given if "://" in given else f"https://{given}").rstrip("/")


class ModelScope:
    """One repository."""

    def __init__(self, source: ModelScopeSource, repo_type: RepoType, field: str, token: str | None) -> None:
        self.where = f"{field}: '{source.repo}'"
        self._source, self._is_dataset, self._field = source, repo_type == "dataset", f"{field}.modelScope"
        self._endpoint = endpoint()
        self._base = f"{self._endpoint}/api/v1/{repo_type}s/{source.repo}"
        self._client = http.build_client()
        if token is not None:  # older calls know the cookie, newer ones the header
            self._client.headers["Authorization"] = f"Bearer {token}"
            self._client.cookies.set("m_session_id", token, domain=urlsplit(self._endpoint).hostname or "")

    def look_up(self, choose: Choose) -> Listing:
        """The files chosen, as the revision has them now."""
        entries, head = self._list()
        files = [_remote_file(entry, self._source.revision) for entry in entries if entry.get("Type") != TREE]
        if not files:
            msg = f"{self.where} has no files at revision '{self._source.revision}'. Correct {self._field}.revision."
            raise NotFound(msg)
        return Listing(revision=_commit(entries, head), files=tuple(choose(files)))

    @contextmanager
    def open(self, file: RemoteFile, start: int) -> Iterator[Body]:
        """The bytes of a file, at the commit that last changed it."""
        url = httpx2.URL(f"{self._base}/repo", params={"Revision": file.address, "FilePath": file.name})
        with self._reaching(), http.open_range(self._client, str(url), start, self._file_refusal) as body:
            yield body

    def _list(self) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """All entries of the repository's tree, and what is told of the newest commit. Datasets come in pages."""
        if not self._is_dataset:
            data = self._ask("repo/files", {})
            return data.get("Files") or [], data.get("LatestCommitter") or {}
        entries: list[dict[str, Any]] = []
        for page in range(1, PAGES + 1):
            data = self._ask("repo/tree", {"PageNumber": page, "PageSize": PAGE_FILES})
            found = data.get("Files") or []
            entries += found
            if len(found) < PAGE_FILES:
                break
        return entries, data.get("LatestCommitter") or {}

    def _ask(self, path: str, further: dict[str, int]) -> dict[str, Any]:
        params: dict[str, str | int] = {"Revision": self._source.revision, "Recursive": "True", **further}
        with self._reaching():
            response = self._client.get(f"{self._base}/{path}", params=params)
        if response.status_code != http.OK:
            raise self._refusal(response)
        try:
            data = response.json()["Data"]
        except (ValueError, KeyError, TypeError) as error:
            msg = f"{self.where}: {self._endpoint} does not answer as ModelScope does. Check {ENDPOINT_VARIABLE}."
            raise Unavailable(msg) from error
        return data if isinstance(data, dict) else {"Files": data}

    def _refusal(self, response: httpx2.Response) -> TrainerError:
        status, token = response.status_code, f"{self._field}.tokenSecretRef"
        if status in {http.UNAUTHORIZED, http.FORBIDDEN}:
            return AccessDenied(
                f"{self.where}: ModelScope refuses to show it ({status}). Give a token that may read it in {token}."
            )
        if status == http.NOT_FOUND:
            return NotFound(
                f"{self.where} is not on ModelScope. Correct {self._field}.repo; a private one needs {token}."
            )
        if http.is_passing(status):
            return Unavailable(f"{self.where}: ModelScope answers {status}. It is worth another try later.")
        return TrainerError(f"{self.where}: ModelScope answers {status}: {response.text[:200]}")

    def _file_refusal(self, response: httpx2.Response) -> TrainerError:
        if response.status_code == http.NOT_FOUND:
            return Changed(f"{self.where}: a file that was listed is not there any more. Run the job again.")
        return self._refusal(response)

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        remedy = f"Check network, proxy and {ENDPOINT_VARIABLE}, or use a volume source."
        with http.reaching(self.where, f"ModelScope at {self._endpoint}", remedy):
            yield


def _remote_file(entry: dict[str, Any], revision: str) -> RemoteFile:
    sha256, commit = entry.get("Sha256"), str(entry.get("Revision") or "")
    return RemoteFile(
        name=str(entry.get("Path") or entry.get("Name") or ""),
        size=int(entry.get("Size") or 0),
        digest=Digest(algorithm=Algorithm.SHA256, value=str(sha256)) if sha256 else None,
        address=commit or revision,
        version=commit,
    )


def _commit(entries: list[dict[str, Any]], head: dict[str, Any]) -> str | None:
    """The commit of the listing: in full where it is told or changed one of the files, else its first digits."""
    if head.get("Id"):
        return str(head["Id"])
    short = str(head.get("ShortId") or "")
    changed = {str(entry.get("Revision") or "") for entry in entries}
    return next((commit for commit in sorted(changed) if short and commit.startswith(short)), short or None)
