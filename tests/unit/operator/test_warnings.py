"""Which warnings about a pod still hold."""

from __future__ import annotations

import pytest

from finetune_operator.api import JSON
from finetune_operator.facts import parse_warnings


def event(second: int, reason: str, *, warning: bool = False) -> JSON:
    time = f"2026-11-22T12:00:{second:02}Z"
    return {"lastTimestamp": time, "type": "Warning" if warning else "Normal", "reason": reason, "message": "said"}


SCHEDULED = {"metadata": {}, "eventTime": "2026-11-22T12:00:01.123456Z", "type": "Normal", "reason": "Scheduled"}
FAILED = event(1, "FailedMount", warning=True)


@pytest.mark.parametrize(
    ("events", "warnings"),
    [
        pytest.param([SCHEDULED, FAILED], ("FailedMount: said",), id="a mount that fails is told"),
        pytest.param([SCHEDULED, FAILED, event(2, "Pulling")], (), id="a mount that failed once is overcome"),
        pytest.param([FAILED, event(1, "Pulling")], (), id="also within a second"),
        pytest.param(
            [event(9, "FailedMount", warning=True), event(5, "FailedAttachVolume", warning=True)],
            ("FailedMount: said", "FailedAttachVolume: said"),
            id="the newest first",
        ),
        pytest.param(
            [event(5, "FailedCreatePodSandBox", warning=True), event(5, "SandboxChanged")],
            ("FailedCreatePodSandBox: said",),
            id="another try at a sandbox overcomes nothing",
        ),
    ],
)
def test_a_warning_holds_until_the_image_is_pulled(events: list[JSON], warnings: tuple[str, ...]) -> None:
    assert parse_warnings(events) == warnings
