"""Several processes train as one would: the same rows, the same weights up to rounding, one result, one end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.runtime.overrides import Overrides
from tests.unit.trainer.gang import PATIENCE_SECONDS, ROOT, Gang, environment, free_port
from tests.unit.trainer.runs import SETTINGS, CrashAfter, CrashError, Run, replace_settings, same_bits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune_trainer.progress import Resolved

HERE = "tests.unit.trainer.test_distributed"
FSDP = {"strategy": "FSDP", "sharding": "Full", "world_size": 2}
GRAD_OP = {**FSDP, "sharding": "GradOp"}
DDP = {"strategy": "DDP", "world_size": 2}
FULL = {"method": "Full", "base_format": "FP32", "lora": None, "double_quantization": False, "learning_rate": 0.003}
LORA = {"method": "LoRA", "base_format": "FP32", "double_quantization": False}
FP8 = {**LORA, "base_format": "FP8"}
EXACT: dict[str, Any] = {"lora": {"dropout": 0.0}}
NOISE = 2e-3


def settings(*changes: dict[str, Any]) -> Resolved:
    found = SETTINGS
    for change in changes:
        found = replace_settings(found, **change)
    return found


# What the ranks are asked to do


def train(
    model: str,
    root: str,
    changes: list[dict[str, Any]],
    attempt: int = 1,
    crash_after: int | None = None,
    micro_batch: int | None = None,
    checkpointing: str | None = None,
) -> dict[str, Any]:
    """Train to the end, or to a crash; whole weights, losses and what kind of tensors they were held as."""
    from finetune_trainer.training.state import trained  # noqa: PLC0415 - in a rank

    run = Run(Path(model), Path(root), Overrides(micro_batch, checkpointing).applied(settings(*changes)))
    run.attempt = attempt - 1
    try:
        run.go(*([] if crash_after is None else [CrashAfter(crash_after)]))
    except CrashError:
        return {"checkpoint": sorted(path.name for path in run.checkpoints._all()[-1].iterdir())}
    found: Any = run.loop._trainer.model
    whole = {name: getattr(value, "full_tensor", value.clone)() for name, value in trained(found)}
    kinds = {type(value.data).__name__ for value in found.parameters()}
    course = run.loop._course
    return {
        "weights": {name: tensor.detach() for name, tensor in whole.items()},
        "losses": [line["loss"] for line in course.lines if "loss" in line],
        "held_out": [line["eval_loss"] for line in course.measurements],
        "kinds": kinds,
    }


def train_unsharded(model: str, root: str, changes: list[dict[str, Any]]) -> None:
    """Train with a base of which one weight is whole, as where a library falls back to DDP without a word."""
    from finetune_trainer.models import sharding  # noqa: PLC0415 - in a rank

    check = sharding.check_sharded

    def spoil(model: Any) -> None:
        norm = model.model.norm
        norm.weight = torch.nn.Parameter(norm.weight.full_tensor())
        check(model)

    sharding.check_sharded = spoil
    try:
        train(model, root, changes)
    finally:
        sharding.check_sharded = check


# The tests


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gang]:
    gang = Gang(2, tmp_path_factory.mktemp("pair")).start()
    yield gang
    gang.stop()


def alone(model: Path, root: Path, *changes: dict[str, Any]) -> dict[str, Any]:
    return train(str(model), str(root), list(changes))


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of all weights together, as a share of their length. AdamW makes of a rounded gradient near 0 a whole step."""
    assert one.keys() == other.keys()
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return float((apart / sum(float(tensor.square().sum()) for tensor in other.values())) ** 0.5)


@pytest.mark.parametrize(
    ("method", "sharing"),
    [
        *(
            pytest.param(method, sharing, id=f"{name}, {way}")
            for name, method in (("QLoRA", EXACT), ("LoRA", {**LORA, **EXACT}), ("Full", FULL))
            for way, sharing in (("DDP", DDP), ("FSDP", FSDP), ("FSDP GradOp", GRAD_OP))
        ),
        pytest.param({**FP8, **EXACT}, DDP, id="LoRA on FP8, DDP"),
    ],
)
def test_two_processes_end_with_the_weights_of_one(
    pair: Gang, tiny_model: Path, tmp_path: Path, method: dict[str, Any], sharing: dict[str, Any]
) -> None:
    one = alone(tiny_model, tmp_path / "one", method)
    arguments: dict[str, Any] = {
        "model": str(tiny_model),
        "root": str(tmp_path / "two"),
        "changes": [method, {"parallelism": sharing}],
    }
    first, second = pair.call(f"{HERE}:train", **arguments)
    assert first["losses"] == second["losses"]
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert first["held_out"] == pytest.approx(one["held_out"], rel=1e-4)
    assert distance(first["weights"], one["weights"]) < NOISE
    assert first["losses"][-1] < first["losses"][0]
    assert ("DTensor" in first["kinds"]) == (sharing is not DDP)


@pytest.mark.parametrize(
    ("method", "sharing"),
    [({}, DDP), ({**LORA, "packing": True}, FSDP), (FULL, FSDP)],
    ids=["QLoRA with dropout, DDP", "LoRA with dropout on packed rows, FSDP", "Full, FSDP"],
)
def test_as_many_processes_go_on_exactly(
    pair: Gang, tiny_model: Path, tmp_path: Path, method: dict[str, Any], sharing: dict[str, Any]
) -> None:
    changes = [method, {"parallelism": sharing, "eval_steps": 2}]  # saved right after it was measured
    whole, broken = ({"model": str(tiny_model), "root": str(tmp_path / name), "changes": changes} for name in "ab")
    unbroken, _ = pair.call(f"{HERE}:train", **whole)
    left, _ = pair.call(f"{HERE}:train", **broken, crash_after=5)
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= set(left["checkpoint"])
    resumed, other = pair.call(f"{HERE}:train", **broken, attempt=2)
    assert same_bits(resumed["weights"], unbroken["weights"])
    assert same_bits(resumed["weights"], other["weights"])
    assert resumed["losses"] == unbroken["losses"]


@pytest.mark.parametrize(("method", "sharing"), [(FULL, FSDP), (EXACT, DDP)], ids=["Full, FSDP", "QLoRA, DDP"])
def test_processes_go_on_with_a_smaller_micro_batch_and_activations_computed_again(
    pair: Gang, tiny_model: Path, tmp_path: Path, method: dict[str, Any], sharing: dict[str, Any]
) -> None:
    changes = [method, {"parallelism": sharing}]
    whole, broken = ({"model": str(tiny_model), "root": str(tmp_path / name), "changes": changes} for name in "ab")
    unbroken, _ = pair.call(f"{HERE}:train", **whole)
    pair.call(f"{HERE}:train", **broken, crash_after=5)
    healed, other = pair.call(f"{HERE}:train", **broken, attempt=2, micro_batch=1, checkpointing="Full")
    assert same_bits(healed["weights"], other["weights"])
    assert healed["losses"] == pytest.approx(unbroken["losses"], rel=1e-4)
    assert distance(healed["weights"], unbroken["weights"]) < NOISE


@pytest.mark.parametrize(("method", "sharing"), [(FULL, FSDP), (EXACT, DDP)], ids=["Full, FSDP", "QLoRA, DDP"])
@pytest.mark.parametrize("first", ["one", "two"])
def test_another_number_of_processes_goes_on_with_the_same_rows(
    pair: Gang, tiny_model: Path, tmp_path: Path, method: dict[str, Any], sharing: dict[str, Any], first: str
) -> None:
    unbroken = alone(tiny_model, tmp_path / "unbroken", method)
    one: dict[str, Any] = {"model": str(tiny_model), "root": str(tmp_path / "work"), "changes": [method]}
    two = {**one, "changes": [method, {"parallelism": sharing}]}
    if first == "one":
        train(**one, crash_after=5)
        resumed, _ = pair.call(f"{HERE}:train", **two, attempt=2)
    else:
        pair.call(f"{HERE}:train", **two, crash_after=5)
        resumed = train(**one, attempt=2)
    assert resumed["losses"] == pytest.approx(unbroken["losses"], rel=1e-4)
    assert distance(resumed["weights"], unbroken["weights"]) < NOISE


def test_a_base_that_is_not_sharded_is_not_trained_as_if_it_were(pair: Gang, tiny_model: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "model": str(tiny_model),
        "root": str(tmp_path),
        "changes": [FULL, {"parallelism": FSDP}],
    }
    for error in pair.call(f"{HERE}:train_unsharded", **arguments):
        assert str(error) == "parallelism.strategy is FSDP, but model.norm.weight is not sharded"


def test_a_batch_that_the_processes_do_not_share_evenly_is_refused(
    pair: Gang, tiny_model: Path, tmp_path: Path
) -> None:
    changes = [{"parallelism": DDP, "global_batch_size": 6}]
    for error in pair.call(f"{HERE}:train", model=str(tiny_model), root=str(tmp_path), changes=changes):
        assert isinstance(error, InvalidConfig)
        assert "globalBatchSize is 6, which 2 processes with perDeviceTrainBatchSize 2" in str(error)


# Failing together

FAIL = """
import os, sys, threading
from finetune_trainer.runtime import distributed
from finetune_trainer.runtime.errors import TrainerError, VolumeFull

def leave(error):
    print("LEFT", error.reason, error, flush=True)
    os._exit(0)

try:
    with distributed.joined("cpu", 1, threading.Event(), leave):
        if distributed.rank() == 1:
            raise VolumeFull("No room.")
        {waits}
except TrainerError as error:
    print("RAISED", error.reason, error, flush=True)
"""


@pytest.mark.parametrize(
    ("waits", "told"),
    [
        ("distributed.barrier()", "VolumeFull Rank 1: No room."),
        ("threading.Event().wait()", "LEFT VolumeFull Rank 1: No room."),
    ],
    ids=["in an exchange", "where nothing tells"],
)
def test_what_one_rank_fails_for_ends_the_others_with_its_reason(waits: str, told: str) -> None:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", FAIL.format(waits=waits)],
            cwd=ROOT,
            env=environment(rank, 2, port),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=PATIENCE_SECONDS)[0] for rank in ranks]
    assert told in said[0]
    assert "RAISED VolumeFull No room." in said[1]
