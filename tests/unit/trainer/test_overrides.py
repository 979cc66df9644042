"""What the operator passes after a GPU ran out of memory changes how a step is computed, and nothing of what it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.progress import ExitCode, ResolvedDpo
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.runtime.overrides import Overrides
from tests.unit.trainer.runs import SETTINGS, CrashAfter, CrashError, Run, replace_settings, same_bits

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.unit.trainer.conftest import Desk

DPO = {"dpo": ResolvedDpo(beta=0.1, loss_type="Sigmoid", label_smoothing=0.0), "learning_rate": 0.001}
FULL = {"method": "Full", "base_format": "FP32", "lora": None, "learning_rate": 0.003}
EXACT: dict[str, Any] = {"lora": {"dropout": 0.0}}
NOISE = 1e-5


class StepsSpy:
    """What each step was computed on: the rows of its micro-batches, without their padding."""

    def __init__(self, trainer: Any) -> None:
        self.rows: dict[int, list[tuple[int, ...]]] = {}
        self.largest = 0
        take = trainer.training_step

        def spied(model: Any, inputs: Any, *rest: Any) -> Any:
            step = self.rows.setdefault(trainer.state.global_step + 1, [])
            step.extend(tuple(row[: int((row != 0).sum())].tolist()) for row in inputs["input_ids"])
            self.largest = max(self.largest, len(inputs["input_ids"]))
            return take(model, inputs, *rest)

        trainer.training_step = spied

    def sets(self) -> dict[int, list[tuple[int, ...]]]:
        return {step: sorted(rows) for step, rows in self.rows.items()}


def spied(run: Run, *callbacks: Any) -> tuple[StepsSpy, dict[str, Any]]:
    """An attempt, what its steps were computed on, and its weights; as `Run.go`."""
    spies: list[StepsSpy] = []
    build = run.build

    def built() -> Any:
        trainer, loop = build()
        spies.append(StepsSpy(trainer))
        return trainer, loop

    run.build = built  # type: ignore[method-assign]
    weights: dict[str, Any] = {}
    try:
        weights = run.go(*callbacks)
    except CrashError:
        pass
    finally:
        run.build = build  # type: ignore[method-assign]
    return spies[0], weights


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in run.loop._course.lines if "loss" in line]


@pytest.mark.parametrize("micro_batch", [1, 4])
@pytest.mark.parametrize(
    "settings",
    [EXACT, {**EXACT, "packing": True}, {**EXACT, **DPO}, FULL],
    ids=["SFT", "packed", "DPO", "all weights"],
)
def test_a_run_goes_on_from_a_checkpoint_of_another_micro_batch(
    tiny_model: Path, tmp_path: Path, settings: dict[str, Any], micro_batch: int
) -> None:
    whole, run = (Run(tiny_model, tmp_path / name).change(**settings) for name in ("whole", "broken"))
    unbroken, weights = spied(whole)
    spied(run, CrashAfter(5))
    run.settings = Overrides(micro_batch).applied(run.settings)
    resumed, healed = spied(run)
    factor = 2 if "dpo" in settings else 1  # the better and the other answer of each pair
    assert (unbroken.largest, resumed.largest) == (2 * factor, micro_batch * factor)
    assert run.settings.gradient_accumulation_steps * micro_batch == run.settings.global_batch_size
    assert resumed.sets() == {step: rows for step, rows in unbroken.sets().items() if step > 4}
    assert losses(run) == pytest.approx(losses(whole), rel=NOISE)
    assert all((healed[name] - weights[name]).abs().max() < 1e-4 for name in weights)


def test_a_run_goes_on_exactly_with_activations_computed_again(tiny_model: Path, tmp_path: Path) -> None:
    whole, run = (Run(tiny_model, tmp_path / name) for name in ("whole", "broken"))
    unbroken = whole.go()
    with pytest.raises(CrashError):
        run.go(CrashAfter(5))
    run.settings = Overrides(gradient_checkpointing="Full").applied(run.settings)
    healed = run.go()
    model: Any = run.loop._trainer.model
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert same_bits(healed, unbroken)
    assert run.loop.facts() == whole.loop.facts()


AOT = replace_settings(SETTINGS, dpo=ResolvedDpo(beta=0.1, loss_type="Aot", label_smoothing=0.0))


@pytest.mark.parametrize(
    ("micro_batch", "settings", "said"),
    [
        pytest.param(
            3,
            SETTINGS,
            r"--micro-batch 3 does not divide .*globalBatchSize 4 \(4 rows\). Pass one of 1, 2, 4.",
            id="does not divide",
        ),
        pytest.param(8, SETTINGS, "--micro-batch 8 .* Pass one of 1, 2, 4.", id="more than the batch"),
        pytest.param(0, SETTINGS, "--micro-batch 0 .* Pass one of 1, 2, 4.", id="none"),
        pytest.param(1, AOT, "lossType Aot compares the pairs .* --gradient-checkpointing Full", id="another loss"),
    ],
)
def test_what_would_be_another_training_is_refused(micro_batch: int, settings: Any, said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        Overrides(micro_batch).applied(settings)


def test_a_loss_over_a_micro_batch_may_keep_its_own() -> None:
    assert Overrides(2, "Full").applied(AOT).gradient_checkpointing == "Full"


# The command

TRAINING = {"globalBatchSize": 8, "perDeviceTrainBatchSize": 4, "maxSteps": 3, "learningRate": 0.01}


def trained(desk: Desk, config: dict[str, Any], *options: str) -> Any:
    code, word = desk.run("train", config, *options)
    assert code == ExitCode.COMPLETED, word
    return manifest.read(desk.work / "adapter")


def test_an_overridden_run_proves_the_same_training(
    desk: Desk, config: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config["training"] = TRAINING
    assert desk.run("prepare", config)[0] == 0
    prepared = manifest.read(desk.work / "data")
    healed = trained(desk, config, "--micro-batch", "2", "--gradient-checkpointing", "Full")
    told = capsys.readouterr().err
    assert "this run: micro batch size 2 instead of 4" in told
    assert "this run: gradient checkpointing Full instead of Off" in told
    assert manifest.read(desk.work / "data") == prepared
    assert prepared.result.resolved is not None
    assert prepared.result.resolved.micro_batch_size == 4
    again, word = desk.run("train", config, "--attempt", "2")
    assert (again, word and word.manifest_digest) == (0, healed.digest), "the artifact is that of the same target"
    (desk.work / "adapter").rename(desk.root / "healed")
    (desk.work / "checkpoints").rename(desk.root / "checkpoints")
    plain = trained(desk, config, "--attempt", "3")
    assert (plain.config_digest, plain.inputs) == (healed.config_digest, healed.inputs)
    assert names(plain.files) == names(healed.files)
    assert {**facts(plain), "loss": None} == {**facts(healed), "loss": None}
    assert facts(healed)["loss"] == pytest.approx(facts(plain)["loss"], rel=1e-4)


def names(files: Sequence[manifest.FileEntry]) -> list[str]:
    return [entry.path for entry in files]


def facts(found: manifest.Manifest) -> dict[str, Any]:
    assert found.result.training is not None
    return found.result.training.model_dump(exclude={"best_eval_loss"})


def test_the_command_refuses_a_micro_batch_before_it_reads_a_weight(desk: Desk, config: dict[str, Any]) -> None:
    config["training"] = TRAINING
    assert desk.run("prepare", config)[0] == 0
    (desk.work / "model" / "model.safetensors").unlink()
    code, word = desk.run("train", config, "--micro-batch", "3")
    assert code == ExitCode.INVALID_CONFIG
    assert word is not None
    assert "--micro-batch 3" in word.message
