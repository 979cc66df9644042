"""What a training that ran out of GPU memory changes, until nothing is left to change."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api import JSON, Overrides
from finetune_operator.healing import relieve
from finetune_trainer.progress import Reason
from tests.unit.operator.builders import SPEC, Cluster, play, resolved
from tests.unit.operator.test_life import training


def settings(micro: int, accumulation: int, checkpointing: str = "Off") -> JSON:
    batch = {"microBatchSize": micro, "gradientAccumulationSteps": accumulation}
    return batch | {"globalBatchSize": micro * accumulation, "gradientCheckpointing": checkpointing}


def ladder(start: JSON) -> list[tuple[Any, ...]]:
    """All the ways down."""
    tried, last = [], relieve(start, None)
    while last is not None:
        tried.append((last.micro_batch_size, last.gradient_accumulation_steps, last.gradient_checkpointing))
        last = relieve(start, last)
    return tried


@pytest.mark.parametrize(
    ("start", "tried"),
    [
        (settings(8, 2), [(4, 4, None), (2, 8, None), (1, 16, None), (1, 16, "Full")]),
        (settings(6, 1), [(3, 2, None), (2, 3, None), (1, 6, None), (1, 6, "Full")]),
        (settings(5, 3), [(3, 5, None), (1, 15, None), (1, 15, "Full")]),
        (settings(1, 7), [(1, 7, "Full")]),
        (settings(2, 1, "Selective"), [(1, 2, None), (1, 2, "Full")]),
        (settings(2, 1, "Full"), [(1, 2, None)]),
        (settings(1, 1, "Full"), []),
        (settings(4, 2) | {"dpo": {"lossType": "Aot"}}, [(4, 2, "Full")]),
        (settings(2, 1) | {"dpo": {"lossType": "Sigmoid"}}, [(1, 2, None), (1, 2, "Full")]),
    ],
)
def test_micro_batches_are_divisors_of_the_ranks_batch_then_checkpointing(start: JSON, tried: list[Any]) -> None:
    assert ladder(start) == tried


def test_without_resolved_settings_there_is_nothing_to_change() -> None:
    assert relieve(None, None) is None


def run_out(cluster: Cluster) -> None:
    cluster.say(reason=Reason.OUT_OF_MEMORY, message="Rank 0 ran out of GPU memory at step 12 (needs 31 GiB, has 24).")
    cluster.settle()


def arguments(cluster: Cluster) -> list[str]:
    found: list[str] = cluster.jobs[cluster.live]["spec"]["template"]["spec"]["containers"][0]["args"]
    return found


def test_each_attempt_trains_with_less_at_once_and_counts_against_nothing() -> None:
    cluster = training(SPEC | {"runPolicy": {"maxRetries": 0}})
    assert resolved().micro_batch_size == 4
    assert "--micro-batch" not in arguments(cluster)
    run_out(cluster)
    assert arguments(cluster)[-2:] == ["--micro-batch", "2"]
    first, second = (a for a in cluster.job.status.attempts or () if a.stage == "train")
    assert (first.reason, first.retry, first.overrides) == ("OutOfMemory", "Free", None)
    assert "Restarting with micro-batch 2 and the same global batch of 8." in (first.message or "")
    assert second.overrides == Overrides(micro_batch_size=2, gradient_accumulation_steps=4)
    run_out(cluster)
    run_out(cluster)
    assert arguments(cluster)[-4:] == ["--micro-batch", "1", "--gradient-checkpointing", "Full"]
    assert cluster.job.status.retries == 0
    play(cluster)
    assert cluster.job.status.phase == "Succeeded"
    assert (cluster.job.status.resolved or {})["microBatchSize"] == 4


def test_when_nothing_is_left_the_job_ends_with_the_way_out() -> None:
    cluster = training()
    for _ in range(4):
        run_out(cluster)
    status = cluster.job.status
    assert (status.phase, status.reason) == ("Failed", "OutOfMemory")
    assert "needs 31 GiB, has 24" in (status.message or "")
    assert "larger GPU" in (status.message or "")


def test_what_helped_is_kept_when_the_next_attempt_fails_for_another_reason() -> None:
    cluster = training()
    run_out(cluster)
    cluster.end_pod(137, "", "Error")
    cluster.settle()
    cluster.later(400)
    cluster.settle()
    assert cluster.live == "demo-train-3"
    assert arguments(cluster)[-2:] == ["--micro-batch", "2"]


def test_overrides_are_known_though_the_status_that_told_them_was_lost() -> None:
    cluster = training()
    cluster.say(reason=Reason.OUT_OF_MEMORY, message="Rank 0 ran out of GPU memory.")
    cluster.lose_status = True
    cluster.step()
    del cluster.pods["demo-train-1"]  # nothing tells any more why it ended
    cluster.settle()
    assert (cluster.job.status.attempts or ())[-1].overrides == Overrides(
        micro_batch_size=2, gradient_accumulation_steps=4
    )


def test_a_merge_that_runs_out_of_gpu_memory_is_not_run_again() -> None:
    cluster = training()
    cluster.say()
    cluster.settle()
    run_out(cluster)
    assert (cluster.job.status.phase, cluster.job.status.reason) == ("Failed", "OutOfMemory")
