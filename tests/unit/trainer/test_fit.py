"""A GPU is filled and not burst; where nothing fits, the job ends before one is held, with what would fit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from finetune_trainer.__main__ import main
from finetune_trainer.models.folder import ModelFacts, describe_config
from finetune_trainer.progress import DataFacts, Estimate, ExitCode, Reason, Resolved, Stage
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.context import Context
from finetune_trainer.runtime.errors import OutOfMemory
from finetune_trainer.runtime.parsing import parse_config
from finetune_trainer.runtime.report import Report
from finetune_trainer.runtime.work import WorkFolder
from finetune_trainer.settings.activations import Batch
from finetune_trainer.settings.fit import Job, fit, with_pass
from finetune_trainer.settings.resolve import SourceFacts, resolve
from finetune_trainer.training.exact import batch_seen
from finetune_trainer.training.memory import MEMORY_NAME, MemoryWatch, check_first_steps, correct
from tests.tiny import make_config, make_tiny_model
from tests.unit.trainer.test_estimate import LLAMA_8B, PLAIN, write_config

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.trainer.conftest import Desk

GPU = {"gpusPerNode": 1}


@pytest.fixture(scope="session")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return describe_config(write_config(tmp_path_factory.mktemp("fit-8b"), LLAMA_8B))


def rows_of(length: int) -> DataFacts:
    return DataFacts(
        train_rows=16_000, eval_rows=10, dropped_rows=0, train_tokens=16_000 * length, loss_tokens=1,
        length_p50=length, length_p95=length, length_p99=length, length_max=length,
    )  # fmt: skip


def fitted(
    model: ModelFacts, memory: str | None, length: int = 512, method: str = "QLoRA", *, fp8: bool = False, **fields: Any
) -> tuple[Resolved, Estimate | None]:
    pod = {} if memory is None else {"pod": {"gpuMemory": memory}}
    job = make_config(**{"parallelism": GPU, "method": {"type": method, "fp8Products": fp8}, **pod, **fields})
    config, data = parse_config(job), rows_of(length)
    return fit(Job(config, model, data), resolve(config, SourceFacts("m", None, "d"), model, data))


# The choice


@pytest.mark.parametrize(
    ("memory", "length", "path", "chosen"),
    [
        ("10Gi", 512, "Off", (8, "Full")),
        ("12Gi", 512, "Off", (16, "Full")),
        ("79Gi", 512, "Off", (16, "Off")),
        ("24Gi", 2048, "Off", (8, "Full")),
        ("40Gi", 2048, "Off", (2, "Off")),
        ("79Gi", 2048, "Off", (4, "Off")),
        ("10Gi", 512, "Auto", (16, "Full")),
        ("24Gi", 2048, "Auto", (2, "Off")),
        ("40Gi", 2048, "Auto", (4, "Off")),
        ("79Gi", 2048, "Auto", (8, "Off")),
    ],
)
def test_an_8b_qlora_fills_the_gpu(
    memory: str, length: int, path: str, chosen: tuple[int, str], llama_8b: ModelFacts
) -> None:
    resolved, needed = fitted(llama_8b, memory, length, training={"fastPath": path})
    assert needed is not None
    assert (resolved.micro_batch_size, resolved.gradient_checkpointing) == chosen
    assert needed.total_bytes <= (needed.gpu_memory_bytes or 0)
    assert resolved.micro_batch_size * resolved.gradient_accumulation_steps == resolved.global_batch_size


def test_a_larger_gpu_is_never_filled_with_slower_settings(llama_8b: ModelFacts) -> None:
    job = Job(parse_config(make_config(parallelism=GPU)), llama_8b, rows_of(1024))
    slowness = [job.slowness(fitted(llama_8b, f"{memory}Gi", 1024)[0]) for memory in range(10, 80, 20)]
    assert slowness == sorted(slowness, reverse=True)


def test_what_a_user_has_set_stays(llama_8b: ModelFacts) -> None:
    both = {"perDeviceTrainBatchSize": 2, "gradientCheckpointing": "Selective"}
    resolved, _ = fitted(llama_8b, "79Gi", training=both)
    assert (resolved.micro_batch_size, resolved.gradient_checkpointing) == (2, "Selective")
    resolved, _ = fitted(llama_8b, "79Gi", training={"gradientCheckpointing": "Full"})
    assert (resolved.micro_batch_size, resolved.gradient_checkpointing) == (16, "Full")


EIGHT_ROWS = {"perDeviceTrainBatchSize": 8}


@pytest.mark.parametrize(
    ("memory", "length", "training", "chosen"),
    [
        ("10Gi", 512, EIGHT_ROWS, (8, "Full", False)),
        ("9.4Gi", 512, EIGHT_ROWS, (8, "Full", True)),
        ("9.4Gi", 512, EIGHT_ROWS | {"offload": "Off"}, (8, "Full", False)),
        ("9.4Gi", 512, {"offload": "Off"}, (4, "Full", False)),
        ("9.4Gi", 512, {}, (16, "Full", True)),
        ("12Gi", 512, {}, (16, "Full", False)),
        ("79Gi", 512, {}, (16, "Off", False)),
        ("79Gi", 512, {"offload": "On"}, (16, "Full", True)),
        ("79Gi", 512, {"offload": "On", "gradientCheckpointing": "Selective"}, (16, "Selective", True)),
        ("24Gi", 2048, {"fastPath": "Off"}, (8, "Full", False)),
        ("12Gi", 2048, {"fastPath": "Off"}, (4, "Full", False)),
    ],
)
def test_host_memory_is_used_only_where_the_gpus_would_not_do(
    memory: str, length: int, training: dict[str, Any], chosen: tuple[int, str, bool], llama_8b: ModelFacts
) -> None:
    resolved, needed = fitted(llama_8b, memory, length, training=training)
    assert needed is not None
    assert (resolved.micro_batch_size, resolved.gradient_checkpointing, resolved.offloads) == chosen
    assert (needed.host_bytes is not None) == resolved.offloads


def test_host_memory_is_never_used_where_the_gpus_is_not_known(llama_8b: ModelFacts) -> None:
    assert not fitted(llama_8b, None)[0].offloads
    assert fitted(llama_8b, None, training={"offload": "On"})[0].offloads


def test_a_loss_that_compares_the_pairs_of_a_micro_batch_keeps_its_size(llama_8b: ModelFacts) -> None:
    aot = {"type": "DPO", "dpo": {"lossType": "Aot"}}
    resolved, _ = fitted(llama_8b, "79Gi", objective=aot)
    assert resolved.micro_batch_size == 4


def test_settings_stay_as_they_were_where_the_memory_is_not_known(llama_8b: ModelFacts) -> None:
    resolved, needed = fitted(llama_8b, None)
    assert (resolved.micro_batch_size, resolved.gradient_checkpointing) == (4, "Full")
    assert needed is not None
    assert needed.gpu_memory_bytes is None


def test_nothing_is_estimated_of_a_job_without_a_gpu(llama_8b: ModelFacts) -> None:
    assert fitted(llama_8b, "24Gi", parallelism={"gpusPerNode": 0})[1] is None


def test_a_setting_that_seems_too_much_is_left_where_healing_may_help(llama_8b: ModelFacts) -> None:
    asked = {"perDeviceTrainBatchSize": 16, "gradientCheckpointing": "Off"}
    resolved, needed = fitted(llama_8b, "12Gi", training=asked)
    assert needed is not None
    assert needed.total_bytes > (needed.gpu_memory_bytes or 0)
    assert resolved.micro_batch_size == 16


def test_the_least_is_taken_where_measuring_alone_is_too_much(llama_8b: ModelFacts) -> None:
    many_words = replace(llama_8b, vocabulary=512_000)
    resolved, needed = fitted(many_words, "30Gi", 8192, training={"maxLength": 8192})
    assert needed is not None
    assert needed.measuring_bytes > (needed.gpu_memory_bytes or 0) > needed.peak_bytes
    assert (resolved.micro_batch_size, resolved.gradient_checkpointing) == (1, "Full")


def test_nothing_is_chosen_and_nobody_refused_where_the_blocks_are_not_known(llama_8b: ModelFacts) -> None:
    unknown = replace(llama_8b, architecture="Other8BForCausalLM")
    for memory in ("1Gi", "79Gi", None):
        resolved, needed = fitted(unknown, memory)
        assert (resolved.micro_batch_size, resolved.gradient_checkpointing, needed) == (4, "Full", None)


# Where nothing fits


@pytest.mark.parametrize(
    ("memory", "method", "said"),
    [
        ("12Gi", "LoRA", "What would fit: method.baseWeights.format FP8 (about 1"),
        ("12Gi", "LoRA", "; method.type QLoRA (about"),
        ("79Gi", "Full", "parallelism.gpusPerNode 4 (about"),
        ("4Gi", "QLoRA", "No setting alone would do: use a GPU with"),
    ],
)
def test_what_would_fit_is_told(memory: str, method: str, said: str, llama_8b: ModelFacts) -> None:
    with pytest.raises(OutOfMemory, match="even with micro-batch 1 and full checkpointing") as refusal:
        fitted(llama_8b, memory, method=method, training=PLAIN)
    assert said in str(refusal.value)
    assert len(str(refusal.value)) < 600


def test_a_base_in_fp8_is_told_to_who_multiplies_in_fp8(llama_8b: ModelFacts) -> None:
    with pytest.raises(OutOfMemory, match=r"What would fit: method\.baseWeights\.format FP8 \(about"):
        fitted(llama_8b, "12Gi", method="LoRA", fp8=True)


def test_shorter_rows_are_told_where_they_would_do(llama_8b: ModelFacts) -> None:
    with pytest.raises(OutOfMemory, match=r"training\.maxLength \d+ \(about"):
        fitted(llama_8b, "8.8Gi", 8192, training={"maxLength": 8192, **PLAIN})


def peak_gib(model: ModelFacts, **fields: Any) -> float:
    """Of a step with micro-batch 1 and full checkpointing."""
    training = {"perDeviceTrainBatchSize": 1, "gradientCheckpointing": "Full", **fields.pop("training", {})}
    _, needed = fitted(model, None, training=training, **fields)
    assert needed is not None
    return needed.peak_bytes / 2**30


@pytest.mark.parametrize(
    ("share", "fields"),
    [
        (0.9, {"training": {"fastPath": "Off"}}),
        (0.9, {"training": {"offload": "Off"}}),
        (0.9, {"training": {"offload": "On"}}),
        (0.7, {"objective": {"type": "DPO"}}),
        (0.7, {"parallelism": {"gpusPerNode": 2}}),
    ],
    ids=["measured: plain path", "measured: fast path", "offload", "derived: pairs", "derived: several GPUs"],
)
def test_a_job_is_refused_only_if_a_step_cannot_fit_whatever_the_estimate_is_off(
    share: float, fields: dict[str, Any], llama_8b: ModelFacts
) -> None:
    peak = peak_gib(llama_8b, **fields)
    fitted(llama_8b, f"{peak * (share + 0.01):.3f}Gi", **fields)
    with pytest.raises(OutOfMemory):
        fitted(llama_8b, f"{peak * (share - 0.01):.3f}Gi", **fields)


def test_what_is_told_to_fit_fits(llama_8b: ModelFacts) -> None:
    with pytest.raises(OutOfMemory, match=r"method\.type QLoRA"):
        fitted(llama_8b, "12Gi", method="LoRA", training=PLAIN)
    _, needed = fitted(llama_8b, "12Gi", method="QLoRA", training=PLAIN)
    assert needed is not None
    assert needed.total_bytes <= (needed.gpu_memory_bytes or 0)


# By the real stage: prepare holds no GPU, so a pretended one will do


def test_prepare_ends_a_job_that_no_setting_fits_into_a_pretended_gpu(desk: Desk, config: dict[str, Any]) -> None:
    code, word = desk.run("prepare", config | {"parallelism": GPU, "pod": {"gpuMemory": "40Mi"}})
    assert code == ExitCode.OUT_OF_MEMORY
    assert word is not None
    assert word.reason is Reason.OUT_OF_MEMORY
    assert "pod.gpuMemory is 0.04 GiB" in word.message
    assert not desk.work.joinpath("data").exists()


def test_prepare_fills_a_pretended_gpu_and_says_what_it_takes(desk: Desk, config: dict[str, Any]) -> None:
    code, word = desk.run("prepare", config | {"parallelism": GPU, "pod": {"gpuMemory": "8Gi"}})
    assert code == ExitCode.COMPLETED
    assert word is not None
    assert word.resolved is not None
    assert word.estimate is not None
    assert (word.resolved.micro_batch_size, word.resolved.gradient_checkpointing) == (16, "Off")
    assert (word.estimate.micro_batch_size, word.estimate.gpu_memory_bytes) == (16, 8 * 2**30)
    assert "of 8.0 GiB: micro-batch 16, checkpointing off." in word.message
    page = desk.work.joinpath("report", "index.html").read_text()
    assert "GPU memory" in page


# The command


def test_the_command_prints_what_a_gpu_must_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path / "8b", LLAMA_8B)
    training = {"optimizer": "PagedAdamW", "maxLength": 512, "perDeviceTrainBatchSize": 8, "packing": "Off"}
    method = {"type": "Full", "baseWeights": {"format": "BF16"}}
    code, told = command(tmp_path, capsys, folder / "config.json", method=method, training=training)
    assert code == ExitCode.COMPLETED
    figures = dict(line.split()[:2] for line in told.splitlines() if " GiB   " in line)
    assert float(figures["weights"]) == pytest.approx(14.96, rel=0.02)
    assert float(figures["optimizer"]) == pytest.approx(59.83, rel=0.02)


def test_the_command_finds_the_config_in_the_source_and_marks_the_choice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(tmp_path / "models" / "tiny", LLAMA_8B)
    code, told = command(tmp_path, capsys, None, pod={"gpuMemory": "24Gi"})
    assert code == ExitCode.COMPLETED
    assert told.count(" *") == 1
    assert " -" in told
    assert "\nhost " not in told
    code, told = command(tmp_path, capsys, None, pod={"gpuMemory": "9Gi"})
    assert code == ExitCode.COMPLETED
    assert told.count(" *") == 1
    assert "Full, offload" in told
    assert "\nhost " in told


def test_the_command_says_what_would_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_config(tmp_path / "8b", LLAMA_8B)
    code, _ = command(tmp_path, capsys, folder, method={"type": "LoRA"}, pod={"gpuMemory": "10Gi"})
    assert code == ExitCode.OUT_OF_MEMORY
    assert command(tmp_path, capsys, tmp_path)[0] == ExitCode.NOT_FOUND
    assert command(tmp_path, capsys, folder, parallelism={"gpusPerNode": 0})[0] == ExitCode.INVALID_CONFIG
    dora = {"type": "LoRA", "lora": {"useDora": True}}
    assert command(tmp_path, capsys, folder, method=dora)[0] == ExitCode.INVALID_CONFIG


def command(root: Path, capsys: pytest.CaptureFixture[str], model: Path | None, **fields: Any) -> tuple[int, str]:
    """Its exit code and what it prints."""
    (root / "job.json").write_text(json.dumps(make_config(**{"parallelism": GPU, **fields})))
    named = [] if model is None else ["--model", str(model)]
    code = main(["estimate", "--config", str(root / "job.json"), "--sources", str(root), *named])
    return code, capsys.readouterr().out


# The first steps


def test_longer_rows_to_come_add_what_the_estimate_says() -> None:
    assert correct(expected_bytes=100, measured_bytes=110, largest_bytes=150).peak_bytes == 160
    assert correct(expected_bytes=100, measured_bytes=90, largest_bytes=100).peak_bytes == 90
    assert correct(expected_bytes=100, measured_bytes=90, largest_bytes=80).peak_bytes == 90


PADDED, WHOLE = torch.tensor([[1, 1, 1], [1, 1, 0]]), torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("beside", "masked"),
    [
        ({"attention_mask": PADDED}, True),
        ({"attention_mask": WHOLE}, False),
        ({"position_ids": WHOLE}, True),
        ({"position_ids": WHOLE, "cu_seq_lens_q": torch.tensor([0, 3, 6])}, False),
    ],
    ids=["padded", "rows of one length", "packed", "packed, by their lengths"],
)
def test_a_micro_batch_is_told_as_attention_sees_it(beside: dict[str, torch.Tensor], masked: bool) -> None:
    assert batch_seen({"input_ids": WHOLE, **beside}) == Batch(2, 3, masked)


def prepared(desk: Desk, config: dict[str, Any]) -> Context:
    """A prepared job for a GPU, and what its train stage is given."""
    code, _ = desk.run("prepare", config | {"parallelism": GPU})
    assert code == ExitCode.COMPLETED
    return Context(WorkFolder(desk.work), desk.sources, desk.root, 1, Report(Stage.TRAIN, 1, bar=False))


def test_the_first_steps_of_a_simulated_gpu_correct_the_estimate(
    desk: Desk, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    context = prepared(desk, config)
    told = manifest.read(desk.work / "data").result.estimate
    assert told is not None
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 2**29))
    watch, seen = MemoryWatch(context, torch.device("cuda", 0), fast=True), Batch(1, 8, masked=False)
    for _ in range(3):
        watch.begin_step()
        watch.end_step(seen)
    found = check_first_steps(context, seen, 2**30, fast=True)
    by_autograd = check_first_steps(context, seen, 2**30)
    assert found is not None
    assert by_autograd is not None
    assert by_autograd.expected_bytes != found.expected_bytes, "a machine without the fast path holds other things"
    assert context.report.current.measured_peak_bytes == found.peak_bytes
    assert found.peak_bytes == 2**30 + told.peak_bytes - found.expected_bytes
    assert json.loads((desk.work / "report" / MEMORY_NAME).read_text())["peakBytes"] == found.peak_bytes
    assert capsys.readouterr().err.count("GPU memory of the first steps: 1.0 GiB") == 1


def test_rows_to_come_that_may_not_fit_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    found = correct(expected_bytes=1, measured_bytes=3 * 2**30, largest_bytes=1)
    with caplog.at_level("INFO"):
        found.tell(4 * 2**30)
        found.tell(2 * 2**30)
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]


def test_nothing_is_told_of_first_steps_that_were_not_estimated(desk: Desk, config: dict[str, Any]) -> None:
    context = prepared(desk, config | {"method": {"type": "LoRA", "lora": {"useDora": True}}})
    assert "There is no estimate of GPU memory: what DoRA keeps is not known." in told_by_prepare(desk)
    assert check_first_steps(context, Batch(1, 8, masked=False), 2**30) is None


def told_by_prepare(desk: Desk) -> str:
    return manifest.read(desk.work / "data").result.message


def test_nothing_is_told_of_steps_on_cpu(desk: Desk, config: dict[str, Any]) -> None:
    context = prepared(desk, config)
    watch = MemoryWatch(context, torch.device("cpu"))
    for _ in range(3):
        watch.begin_step()
        watch.end_step(Batch(1, 8, masked=False))
    assert context.report.current.measured_peak_bytes is None


def test_another_micro_batch_makes_the_same_steps(tmp_path: Path) -> None:
    facts = describe_config(make_tiny_model(tmp_path / "tiny"))
    config = parse_config(make_config(parallelism=GPU))
    resolved = resolve(config, SourceFacts("m", None, "d"), facts, rows_of(64))
    changed = with_pass(resolved, 16, "Off")
    same = {"micro_batch_size", "gradient_accumulation_steps", "gradient_checkpointing"}
    assert changed.model_dump(exclude=same) == resolved.model_dump(exclude=same)
    assert changed.gradient_accumulation_steps == 1
