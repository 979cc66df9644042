"""Stand-ins for hubs that cannot be on this machine: they speak the calls that the trainer makes of them."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.unit.trainer.sources.servers import Answer, Site

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEXT_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
LFS_BYTES = 100_000
"""Larger files are in LFS."""


@dataclass
class StandInHub:
    """One repository, owner/tiny, of models or datasets: its files by commit, and how it is to answer."""

    files: dict[str, bytes]
    kind: str = "models"
    token: str | None = None
    refusal: tuple[int, str] | None = None
    refuses_files: bool = False
    """Whether the refusal is for files alone: a gated repository shows what it has."""
    head: str = COMMIT
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    lies: dict[str, bytes] = field(default_factory=dict)
    """Files given with other bytes than listed."""

    private: bool = True

    def __post_init__(self) -> None:
        self.commits.setdefault(COMMIT, self.files)
        self.site = Site(self.answer, self.take)

    def take(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:  # noqa: ARG002 - a hub to read from
        return refused(403, "Forbidden")

    @property
    def url(self) -> str:
        return self.site.url

    @property
    def asked(self) -> list[str]:
        return self.site.asked

    def answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        api = path.startswith(f"/api/{self.kind}/owner/tiny")
        if self.token is not None and headers.get("Authorization") != f"Bearer {self.token}":
            return refused(401, "RepoNotFound")
        if self.refusal is not None and not (api and self.refuses_files):
            return refused(*self.refusal)
        return self._listing(path) if api else self._file(unquote(urlsplit(path).path))

    def _listing(self, path: str) -> Answer:
        asked = unquote(urlsplit(path).path.partition("/revision/")[2]) or "main"
        commit = self.head if asked in {"main", "refs/convert/parquet"} else asked
        if commit not in self.commits:
            return refused(404, "RevisionNotFound")
        siblings = [_sibling(name, body) for name, body in self.commits[commit].items()]
        told = {"id": "owner/tiny", "sha": commit, "siblings": siblings, "private": self.private}
        return Answer(json.dumps(told).encode())

    def _file(self, path: str) -> Answer:
        prefix = "/datasets/owner/tiny/resolve/" if self.kind == "datasets" else "/owner/tiny/resolve/"
        if not path.startswith(prefix):
            return refused(404, "RepoNotFound")
        commit, _, name = path.removeprefix(prefix).partition("/")
        if name not in self.commits.get(commit, {}):
            return refused(404, "EntryNotFound")
        return Answer(self.lies.get(name, self.commits[commit][name]), headers={"X-Repo-Commit": commit})


@dataclass
class StandInWritableHub(StandInHub):
    """The same, to be published to: what huggingface_hub 2.4 asks when it uploads over HTTP and commits."""

    made: bool = True
    """Whether the repository is there."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by their SHA-256, whether a commit names them or not."""
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    ignored: tuple[str, ...] = ()
    """Files that a .gitignore there keeps out."""
    full: bool = False
    """Whether the quota of its owner is used up."""

    def answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        if not self.made:
            return refused(404, "RepoNotFound")
        revision = unquote(urlsplit(path).path.partition("/revision/")[2]) or "main"
        self.head = self.branches.get(revision, self.branches["main"])
        if path.startswith("/api/") and revision in self.branches:
            return super().answer("/api/models/owner/tiny", headers)
        return super().answer(path, headers)

    def take(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        call = unquote(urlsplit(path).path)
        if call.startswith("/lfs/"):
            return self._store(call.removeprefix("/lfs/"), body)
        if self.token is not None and headers.get("Authorization") != f"Bearer {self.token}":
            return refused(403, "Forbidden")
        if call == "/owner/tiny.git/info/lfs/objects/batch":
            return self._batch(json.loads(body)["objects"], headers["Host"])
        if call == "/api/repos/create":
            self.made, self.private = True, json.loads(body)["visibility"] == "private"
            return Answer(json.dumps({"url": f"{self.url}/owner/tiny"}).encode())
        if call == "/api/validate-yaml":
            return Answer(b'{"errors": [], "warnings": []}')
        what, _, branch = call.removeprefix("/api/models/owner/tiny/").partition("/")
        return self._change(what, branch, body)

    def _change(self, what: str, branch: str, body: bytes) -> Answer:
        if what == "branch":
            self.branches[branch] = self.branches["main"]
            return Answer(b"{}")
        if what == "preupload":
            return Answer(json.dumps({"files": [self._mode(file) for file in json.loads(body)["files"]]}).encode())
        lines = [json.loads(line) for line in body.splitlines()]
        return self._commit(branch, lines[0]["value"], lines[1:])

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["size"] > LFS_BYTES else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": file["path"] in self.ignored}

    def _batch(self, objects: list[dict[str, Any]], host: str) -> Answer:
        told = []
        for each in objects:
            entry: dict[str, Any] = {"oid": each["oid"], "size": each["size"]}
            if self.full:
                entry["error"] = {"code": 413, "message": "Private storage limit reached"}
            elif each["oid"] not in self.stored:
                entry["actions"] = {"upload": {"href": f"http://{host}/lfs/{each['oid']}"}}
            told.append(entry)
        return Answer(json.dumps({"objects": told, "transfer": "basic"}).encode())

    def _store(self, oid: str, body: bytes) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return refused(400, "BadDigest")
        self.stored[oid] = body
        return Answer()

    def _commit(self, branch: str, header: dict[str, Any], changes: list[dict[str, Any]]) -> Answer:
        if header.get("parentCommit", self.branches[branch]) != self.branches[branch]:
            return refused(412, "Conflict")
        files = dict(self.commits[self.branches[branch]])
        for change in changes:
            value, kind = change["value"], change["key"]
            if kind == "deletedFile":
                del files[value["path"]]
            else:
                files[value["path"]] = (
                    self.stored[value["oid"]] if kind == "lfsFile" else base64.b64decode(value["content"])
                )
        oid = hashlib.sha1(repr((self.branches[branch], sorted(files.items()))).encode()).hexdigest()  # noqa: S324 - git's
        self.commits[oid] = files
        self.branches[branch] = oid
        return Answer(json.dumps({"commitUrl": f"{self.url}/owner/tiny/commit/{oid}", "commitOid": oid}).encode())


def refused(status: int, code: str) -> Answer:
    return Answer(b"{}", status, {"X-Error-Code": code, "X-Error-Message": "no"})


def _sibling(name: str, body: bytes) -> dict[str, Any]:
    told: dict[str, Any] = {"rfilename": name, "size": len(body), "blobId": git_hash(body)}
    if len(body) > LFS_BYTES:
        sha256 = hashlib.sha256(body).hexdigest()
        told |= {"blobId": git_hash(b"pointer"), "lfs": {"sha256": sha256, "size": len(body), "pointerSize": 100}}
    return told


def git_hash(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()  # noqa: S324 - git's


@dataclass
class StandInModelScope:
    """One repository, owner/tiny, on ModelScope: as its API answers (modelscope-hub 0.5.1 and listings seen in use)."""

    files: dict[str, bytes]
    kind: str = "models"
    token: str | None = None
    commits: dict[str, str] = field(default_factory=dict)
    """The commit that last changed a file, where it is not the newest."""
    lies: dict[str, bytes] = field(default_factory=dict)
    page_files: int = 200

    def __post_init__(self) -> None:
        self.site = Site(self.answer)

    def answer(self, path: str, headers: Mapping[str, str]) -> Answer:
        parts, asked = urlsplit(path), {name: values[0] for name, values in parse_qs(urlsplit(path).query).items()}
        if self.token is not None and (
            headers.get("Authorization") != f"Bearer {self.token}"
            or f"m_session_id={self.token}" not in headers["Cookie"]
        ):
            return Answer(b'{"Code": 10010205002, "Message": "no permission"}', 403)
        base = f"/api/v1/{self.kind}/owner/tiny/repo"
        if parts.path == base:
            return self._file(asked["FilePath"], asked["Revision"])
        if parts.path == f"{base}/{'files' if self.kind == 'models' else 'tree'}":
            return self._listing(asked)
        return Answer(b'{"Code": 10010205001, "Message": "not found", "Success": false}', 404)

    def _listing(self, asked: dict[str, str]) -> Answer:
        known = asked["Revision"] in {"master", COMMIT}
        entries = [self._entry(name, body) for name, body in self.files.items()]
        if "PageNumber" in asked:
            first = (int(asked["PageNumber"]) - 1) * int(asked["PageSize"])
            entries = entries[first : first + int(asked["PageSize"])]
        folder = {"Path": "folder", "Type": "tree", "Size": 0}
        data = {
            "Files": ([folder, *entries] if "PageNumber" not in asked else entries) if known else None,
            "LatestCommitter": {"Id": "", "ShortId": COMMIT[:8]} if known else None,
        }
        return Answer(json.dumps({"Code": 200, "Success": True, "Data": data}).encode())

    def _entry(self, name: str, body: bytes) -> dict[str, Any]:
        return {
            "Path": name,
            "Name": name.rpartition("/")[2],
            "Type": "blob",
            "Size": len(body),
            "Sha256": hashlib.sha256(body).hexdigest(),
            "Revision": self.commits.get(name, COMMIT),
        }

    def _file(self, name: str, revision: str) -> Answer:
        if name not in self.files or revision != self.commits.get(name, COMMIT):
            return Answer(b'{"Code": 10990101004, "Message": "not found"}', 404)
        return Answer(self.lies.get(name, self.files[name]))
