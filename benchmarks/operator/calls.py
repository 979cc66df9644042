"""What the operators asked of the API server, from its own audit log: every call, by user, verb and resource."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

OURS, PLAIN = "finetune-operator", "plain-operator"
AUDITED = (OURS, PLAIN)
"""Users whose calls are written down."""

WRITES = frozenset({"create", "update", "patch", "delete"})


@dataclass(frozen=True)
class Call:
    """One call that the API server has answered."""

    verb: str
    resource: str
    """With its part, if it has one: finetunejobs/status."""
    at: float
    """When the API server received it, seconds since 1970."""
    code: int
    """HTTP status."""

    @classmethod
    def parse(cls, line: str) -> tuple[str, Call] | None:
        """User and call; None for a watch that has only begun, and for what is about no object."""
        event: dict[str, Any] = json.loads(line)
        about = event.get("objectRef")
        if about is None or event["stage"] != "ResponseComplete":
            return None
        resource = "/".join(part for part in (about.get("resource"), about.get("subresource")) if part)
        at = datetime.fromisoformat(event["requestReceivedTimestamp"]).timestamp()
        return event["user"]["username"], cls(event["verb"], resource, at, event["responseStatus"]["code"])

    @property
    def writes(self) -> bool:
        """Whether it is to change something, Events and the Lease not counted."""
        return self.verb in WRITES and self.resource not in ("events", "leases")


class Calls:
    """The audit log, read from where one was before."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def mark(self) -> int:
        """Where the log ends now."""
        return self.file.stat().st_size if self.file.exists() else 0

    def since(self, mark: int, user: str) -> list[Call]:
        """All calls of a user after the mark, watches left out."""
        with self.file.open("rb") as log:
            log.seek(max(0, mark - 1))
            whole = log.read().rpartition(b"\n")[0]  # the last line is being written, at times
            lines = (whole.partition(b"\n")[2] if mark else whole).decode().splitlines()
        found = (Call.parse(line) for line in lines)
        return [
            call for told in found if told is not None for by, call in [told] if by == user and call.verb != "watch"
        ]


def count(calls: Iterable[Call]) -> str:
    """So many of each kind, the most frequent first: '1,000 create jobs, 500 get finetunejobs'."""
    kinds = Counter(f"{call.verb} {call.resource}{'' if call.code < 400 else f' ({call.code})'}" for call in calls)  # noqa: PLR2004 - refused
    return ", ".join(f"{number:,} {kind}" for kind, number in kinds.most_common())
