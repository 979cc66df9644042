"""What prepare says of a GPU's memory: told in the status, corrected by the training, an end where nothing fits."""

from __future__ import annotations

import json

import pytest

from finetune_operator.api import FineTuneJob
from finetune_operator.figures import estimate_status, with_measured
from finetune_operator.manifests import build_config_map
from finetune_operator.names import CONFIG_FILE
from finetune_trainer.progress import Estimate, LastWord, Progress, Reason, Stage
from finetune_trainer.runtime.farewell import fitted
from finetune_trainer.runtime.parsing import parse_config
from tests.unit.operator.builders import SPEC, Cluster, a_job, play, word

NEEDED = Estimate(
    **{name: 7 for name, field in Estimate.model_fields.items() if field.annotation is int},
    gradient_checkpointing="Full",
    gpu_memory_bytes=24 * 2**30,
)


def trained_a_while(job: FineTuneJob) -> tuple[int | None, int | None]:
    """The estimate's peak, and what became of it."""
    told = job.status.estimate
    return (None, None) if told is None else (told.peak_bytes, told.measured_peak_bytes)


def test_the_estimate_is_told_and_corrected_by_what_the_first_steps_took() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.say(estimate=NEEDED)
    cluster.settle()
    assert trained_a_while(cluster.job) == (7, None)
    cluster.run_pod()
    cluster.progress = Progress(stage=Stage.TRAIN, attempt=1, activity="training", done=2, total=40)
    cluster.settle()
    assert trained_a_while(cluster.job) == (7, None)
    cluster.progress = cluster.progress.model_copy(update={"measured_peak_bytes": 9})
    cluster.settle()
    assert trained_a_while(cluster.job) == (7, 9)
    cluster.progress = None
    play(cluster)
    assert cluster.job.status.phase == "Succeeded"
    assert trained_a_while(cluster.job) == (7, 9)


def test_what_the_first_steps_took_is_told_by_an_operator_that_was_away_while_they_ran() -> None:
    cluster = Cluster()
    cluster.settle()
    cluster.say(estimate=NEEDED)
    cluster.settle()
    cluster.say(progress=Progress(stage=Stage.TRAIN, attempt=1, activity="saving", measured_peak_bytes=9))
    cluster.settle()
    assert trained_a_while(cluster.job) == (7, 9)


def test_what_is_measured_without_an_estimate_is_not_told() -> None:
    told = Progress(stage=Stage.TRAIN, attempt=1, activity="training", measured_peak_bytes=9)
    assert with_measured(None, told) is None
    assert with_measured(estimate_status(NEEDED), told.model_copy(update={"measured_peak_bytes": None})) == (
        estimate_status(NEEDED)
    )


def test_a_job_that_no_setting_fits_into_a_gpu_ends_before_it_holds_one() -> None:
    cluster = Cluster(spec=SPEC | {"pod": {"gpuMemory": "8Gi"}})
    cluster.settle()
    said = "Training needs about 18.6 GiB of a GPU even with micro-batch 1. What would fit: method.type QLoRA."
    cluster.say(reason=Reason.OUT_OF_MEMORY, message=said)
    cluster.settle()
    assert (cluster.job.status.phase, cluster.job.status.reason) == ("Failed", "OutOfMemory")
    assert cluster.job.status.message == said
    assert cluster.created == ["demo-prepare-1"]


def test_the_trainer_is_told_how_much_memory_a_gpu_has_and_nothing_else_of_pods() -> None:
    spec = SPEC | {"parallelism": {"gpusPerNode": 1}}
    told = build_config_map(a_job(spec | {"pod": {"gpuMemory": "24Gi", "nodeSelector": {"gpu": "l4"}}}))
    assert '"pod":{"gpuMemory":"24Gi"}' in told["data"][CONFIG_FILE]
    without = build_config_map(a_job(spec | {"pod": {"nodeSelector": {"gpu": "l4"}}}))["data"][CONFIG_FILE]
    assert '"pod"' not in without
    on_gpu = parse_config(json.loads(told["data"][CONFIG_FILE]))
    assert on_gpu.gpu_memory_bytes == 24 * 2**30


@pytest.mark.parametrize(
    ("written", "size_bytes"), [("1.5Gi", 3 * 2**29), ("81559Mi", 81559 * 2**20), ("24G", 24_000_000_000)]
)
def test_memory_is_read_as_kubernetes_writes_it(written: str, size_bytes: int) -> None:
    spec = SPEC | {"parallelism": {"gpusPerNode": 1}, "pod": {"gpuMemory": written}}
    assert parse_config(spec).gpu_memory_bytes == size_bytes
    assert parse_config(spec | {"parallelism": {"gpusPerNode": 0}}).gpu_memory_bytes is None


def test_a_last_word_that_is_too_long_keeps_the_settings_that_healing_needs() -> None:
    told = word("prepare", 1, estimate=NEEDED)
    settings = told.resolved
    assert settings is not None
    grown = (settings.model_copy(update={"added_tokens": tuple(range(count))}) for count in range(300, 1000, 20))
    kept = [LastWord.model_validate_json(fitted(told.model_copy(update={"resolved": each}))) for each in grown]
    first = next(each for each in kept if each.estimate is None)
    assert first.resolved is not None
