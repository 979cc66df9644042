"""What a user can get wrong that only a pod or a claim can tell: each ends with its own word and the way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.target import Target
from tests.e2e.conftest import quick_operator, remove_jobs
from tests.e2e.jobs import Jobs, eventually

BAD: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "missing-file": (
        {"datasets": [{"volume": {"claimName": "datasets", "path": "absent.jsonl"}}]},
        "NotFound",
        ("absent.jsonl", "datasets"),
    ),
    "wrong-column": (
        {"datasets": [{"name": "faq", "volume": {"claimName": "datasets", "path": "wrong-column.jsonl"}}]},
        "InvalidDataset",
        ("faq", "wrong-column.jsonl", "line 1", "question", "columns"),
    ),
    "empty-dataset": (
        {"datasets": [{"volume": {"claimName": "datasets", "path": "empty.jsonl"}}]},
        "InvalidDataset",
        ("empty.jsonl",),
    ),
    "row-no-json": (
        {"datasets": [{"volume": {"claimName": "datasets", "path": "no-json.jsonl"}}]},
        "InvalidDataset",
        ("no-json.jsonl", "line 3"),
    ),
    "no-model": (
        {"model": {"volume": {"claimName": "models", "path": "no-model"}}},
        "InvalidModel",
        ("no-model", "config.json"),
    ),
    "host-memory": (
        {"pod": {"resources": {"requests": {"memory": "48Mi"}, "limits": {"memory": "48Mi"}}}},
        "OutOfHostMemory",
        ("pod.resources.limits.memory",),
    ),
    "missing-claim": (
        {"model": {"volume": {"claimName": "nowhere", "path": "tiny"}}},
        "VolumeUnbound",
        ("PersistentVolumeClaim 'nowhere' is not there", "claimName"),
    ),
}


@pytest.fixture(scope="module")
def bad_jobs(operator: Target, staged: str) -> Iterator[Jobs]:
    """All of them at once: they wait for their pods side by side."""
    remove_jobs(operator, staged)
    jobs = Jobs(operator, staged)
    for name, (spec, _, _) in BAD.items():
        jobs.apply(name, **spec)
    yield jobs
    remove_jobs(operator, staged)


@pytest.mark.parametrize("name", BAD)
def test_the_message_names_what_is_wrong_and_the_way_out(bad_jobs: Jobs, name: str) -> None:
    _, reason, words = BAD[name]
    status = bad_jobs.finish(name)
    assert status["phase"] == "Failed", bad_jobs.tell(name)
    assert bad_jobs.condition(name, "Succeeded")["reason"] == reason, bad_jobs.tell(name)
    for word in words:
        assert word in status["message"]
    assert "Traceback" not in status["message"]
    assert status["attemptCount"] == 1, "the user's fault is not tried again"
    assert set(bad_jobs.stage_jobs(name)) <= {f"{name}-prepare-1"}, "a Job whose pod never began is deleted"


def test_an_image_that_cannot_be_pulled_is_told_and_ends_after_the_start_deadline(
    operator: Target, staged: str
) -> None:
    jobs = Jobs(operator, staged)
    repository = operator.trainer_image.rsplit(":", 1)[0]
    quick_operator(operator, **{"trainer.image.tag": "no-such-tag"})
    try:
        jobs.apply("no-image")
        eventually("the message names the image", lambda: "no-such-tag" in jobs.status("no-image").get("message", ""))
        status = jobs.finish("no-image")
    finally:
        quick_operator(operator)
    assert jobs.condition("no-image", "Succeeded")["reason"] == "ImagePullFailed"
    assert f"{repository}:no-such-tag" in status["message"]
    assert status["attemptCount"] == 1
