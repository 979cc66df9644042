"""The one error that this package shows to a person: what happened, and the way out."""

from __future__ import annotations


class ClusterError(Exception):
    """Printed as one or two sentences without a stack trace; anything else that escapes is a bug."""

    def __init__(self, message: str, remedy: str = "") -> None:
        """Join what happened and what to do about it."""
        super().__init__(f"{message} {remedy}".strip())
