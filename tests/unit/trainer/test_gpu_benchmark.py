"""The benchmark beside TRL and PEFT trains the same model on the same rows by both (benchmarks/gpu)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaConfig

from benchmarks.gpu.__main__ import main, speed_table, task_table, utilization
from benchmarks.gpu.drawn import load_drawn
from benchmarks.gpu.process import OURS, TRL, Figures, Run
from benchmarks.gpu.task import Task
from benchmarks.gpu.training import make_drawn_subject, parameters_in_products, train
from benchmarks.gpu.works import SHAPES, TINY, WORKS, make_batches, merged
from finetune_trainer.models.loading import set_up_torch
from tests.tiny import make_instructions, make_jsonl

if TYPE_CHECKING:
    from pathlib import Path

CPU = {"": torch.device("cpu")}
FIGURES = Figures(
    device="NVIDIA H100 80GB HBM3",
    parameters=7_500_000_000,
    step_tokens=8_000,
    step_seconds=[1.0, 0.8, 3.0],
    first_loss=12.0,
    last_loss=11.0,
    peak_bytes=2**33,
    reserved_bytes=2**34,
)


@pytest.fixture(autouse=True)
def _torch_set_up() -> None:
    set_up_torch()


def run(by: str, work: str, profile: str = "") -> Run:
    return Run(by=by, device="cpu", seed=3, steps=2, work=work, shape="tiny", profile=profile)


@pytest.mark.parametrize("work", ["qlora-8x512", "lora-8x512-whole", "packed"])
def test_both_begin_with_the_same_loss_on_the_same_tokens(work: str) -> None:
    ours, theirs = train(run(OURS, work)), train(run(TRL, work))
    assert ours.first_loss == pytest.approx(theirs.first_loss, abs=0.005)
    assert ours.step_tokens == theirs.step_tokens
    assert len(ours.step_seconds) == len(theirs.step_seconds) == 1


def test_a_step_of_ours_is_profiled(tmp_path: Path) -> None:
    train(run(OURS, "qlora-8x512", profile=str(tmp_path / "profile.txt")))
    told = (tmp_path / "profile.txt").read_text()
    assert "0.0 ms of CPU" not in told
    assert "aten::mm" in told


def test_ours_takes_fields_of_a_spec(tmp_path: Path) -> None:
    spec = {"method": {"lora": {"r": 4}}}
    subject = make_drawn_subject(Run(OURS, "cpu", 0, 1, "qlora-8x512", "tiny", spec=spec), tmp_path)
    assert subject.resolved.lora is not None
    assert (subject.resolved.lora.r, subject.resolved.lora.alpha) == (4, 32)
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_a_drawn_model_is_the_same_in_every_process_and_quantized_as_a_checkpoint_is(tmp_path: Path) -> None:
    LlamaConfig(**TINY | {"tie_word_embeddings": True}).save_pretrained(tmp_path)
    one, again, other = (load_drawn(seed, tmp_path, torch.bfloat16, CPU) for seed in (1, 1, 2))
    name = "model.layers.1.mlp.up_proj.weight"
    assert all(torch.equal(weight, again.state_dict()[key]) for key, weight in one.state_dict().items())
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])
    assert one.lm_head.weight is one.model.embed_tokens.weight
    assert one.state_dict()[name].std().item() == pytest.approx(0.02, rel=0.05)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_use_double_quant=True)  # type: ignore[no-untyped-call]
    quantized = load_drawn(1, tmp_path, torch.bfloat16, CPU, quantization_config=nf4)
    assert quantized.is_loaded_in_4bit
    assert quantized.model.layers[1].mlp.up_proj.weight.quant_state.nested


def test_each_step_packs_its_own_rows() -> None:
    batches = make_batches(WORKS["packed"], SHAPES["8b"], 3, 0)
    assert batches.sequences is not None
    assert len(batches.rows) == 3 * 64
    for step in range(3):
        packed = batches.sequences[step * batches.step_sequences : (step + 1) * batches.step_sequences]
        rows = batches.rows[step * 64 : (step + 1) * 64]
        assert sorted(row for sequence in packed for row in sequence) == sorted(rows)
        assert all(sum(map(len, sequence)) <= 8192 for sequence in packed)
    assert max(map(len, batches.rows)) <= 1601


@pytest.mark.parametrize(("shape", "parameters"), [("8b", 8_030_261_248 - 128_256 * 4096), ("1b", 1_235_814_400)])
def test_utilization_counts_the_parameters_of_products(shape: str, parameters: int, tmp_path: Path) -> None:
    subject = make_drawn_subject(Run(OURS, "cpu", 0, 1, "long-16k", shape), tmp_path)
    assert parameters_in_products(subject.facts) == parameters
    assert utilization(FIGURES) == pytest.approx(8_000 * 4 * 7.5e9 / 989e12)


def test_a_row_that_failed_says_why_and_leaves_the_others() -> None:
    table = speed_table({("packed", OURS): [FIGURES, "late"], ("packed", TRL): [FIGURES], ("long", TRL): ["no memory"]})
    assert "| packed | ours | 8,000 | 1: 8,000 to 8,000 | 0.243 | 8.00 | 16.00 | 12.0000 | 1.00 | 1.00 |" in table
    assert "| long | TRL + PEFT | failed: no memory |" in table


def test_losses_are_compared_seed_by_seed() -> None:
    table = task_table({OURS: [1.0, 2.0, None], TRL: [1.1, 2.3, 3.0]})
    assert "| ours | 2 | 1.5000 | -0.2000 | 0.1000 |" in table


def test_the_command_runs_each_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    spec = '{"training": {"noSuchField": 1}}'
    main(["--shape", "tiny", "--device", "cpu", "--work", "qlora-8x512", "--by", "ours", "trl", "--spec", spec])
    told = capsys.readouterr().out
    assert "InvalidConfig: training.noSuchField" in told
    assert "qlora-8x512, TRL + PEFT: failed" not in told
    assert "| qlora-8x512 | TRL + PEFT | " in told
    assert told.count("failed") == 2


def test_a_task_measures_both_on_the_same_held_out_rows(tmp_path: Path, tiny_model: Path) -> None:
    data = make_jsonl(tmp_path / "data" / "rows.jsonl", make_instructions(40))
    task = Task(tmp_path / "task")
    task.prepare(tiny_model, data, "LoRA", "cpu", 2)
    ours, theirs = (train(Run(by=by, device="cpu", seed=1, steps=2, task=str(task.root))) for by in (OURS, TRL))
    assert ours.first_loss == pytest.approx(theirs.first_loss, abs=0.005)
    assert ours.held_out_loss is not None
    assert ours.held_out_loss == pytest.approx(theirs.held_out_loss, abs=0.005)
