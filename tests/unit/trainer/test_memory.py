"""A GPU that runs out of memory is told with rank, place and figures, whoever worded it; a drill takes the same way."""

from __future__ import annotations

import errno
import subprocess
import sys
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from finetune_trainer import quantize
from finetune_trainer.config import DRILL_OUT_OF_MEMORY_VARIABLE as VARIABLE
from finetune_trainer.progress import ExitCode, LastWord, Reason
from finetune_trainer.runtime import errors, memory
from finetune_trainer.runtime.rendezvous import Failed
from finetune_trainer.training.drill import Drill, read_drill
from tests.unit.trainer.gang import PATIENCE_SECONDS, ROOT, environment, free_port
from tests.unit.trainer.runs import SETTINGS, replace_settings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.trainer.conftest import Desk

ALONE = (
    "CUDA out of memory. Tried to allocate 7.50 GiB. GPU 0 has a total capacity of 23.64 GiB of which 117.25 MiB is "
    "free. Including non-PyTorch memory, this process has 23.52 GiB memory in use. Of the allocated memory 22.90 GiB "
    "is allocated by PyTorch, and 240.11 MiB is reserved by PyTorch but unallocated. If reserved but unallocated "
    "memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)
SHARED = (
    "CUDA out of memory. Tried to allocate 512.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 300.00 MiB is "
    "free. Process 4242 has 60.00 GiB memory in use. Including non-PyTorch memory, this process has 18.81 GiB memory "
    "in use. Of the allocated memory 18.00 GiB is allocated by PyTorch, and 1.00 MiB is reserved but unallocated."
)
OTHER_PIDS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 24.00 GiB of which 1.00 GiB is free."
    " Process 77 has 23.00 GiB memory in use. Of the allocated memory 22.00 GiB is allocated by PyTorch."
)
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 2 'out of memory'"
)
CPU_ALLOCATOR = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
SHM = "Error while creating shared memory segment /dev/shm/nccl-x (size 9637888), error: No space left on device (28)"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param(
            ALONE, "needs at least 31.0 GiB, has 23.6 GiB: 23.5 GiB in use, 7.5 GiB asked for", id="torch, alone on it"
        ),
        pytest.param(
            SHARED,
            "needs at least 19.3 GiB, has 79.1 GiB: 78.8 GiB in use, 0.50 GiB asked for; 60.0 GiB of it used by other "
            "processes",
            id="torch, others on it",
        ),
        pytest.param(
            OTHER_PIDS,
            "needs at least 25.0 GiB, has 24.0 GiB: 23.0 GiB in use, 2.0 GiB asked for",
            id="torch in a container, where it does not know itself",
        ),
        pytest.param("CUDA error: out of memory\nCUDA kernel errors", "CUDA error: out of memory", id="no figures"),
        pytest.param("", "no details given", id="not a word"),
    ],
)
def test_what_was_needed_is_told_as_far_as_it_is_known(text: str, told: str) -> None:
    assert memory.needs(text) == told


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        pytest.param(torch.OutOfMemoryError(ALONE), errors.OutOfMemory, id="torch"),
        pytest.param(
            torch.AcceleratorError("CUDA error: out of memory\nSearch for"), errors.OutOfMemory, id="a kernel"
        ),
        pytest.param(RuntimeError("CUDA driver error: out of memory"), errors.OutOfMemory, id="the driver"),
        pytest.param(
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            errors.OutOfMemory,
            id="cuBLAS",
        ),
        pytest.param(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), errors.OutOfMemory, id="cuDNN"),
        pytest.param(RuntimeError("Triton Error [CUDA]: out of memory"), errors.OutOfMemory, id="Triton"),
        pytest.param(torch.distributed.DistBackendError(NCCL), errors.OutOfMemory, id="NCCL"),
        pytest.param(RuntimeError(CPU_ALLOCATOR), errors.OutOfHostMemory, id="torch's CPU allocator"),
        pytest.param(MemoryError("Unable to allocate 7.28 TiB"), errors.OutOfHostMemory, id="numpy"),
        pytest.param(OSError(errno.ENOMEM, "Cannot allocate memory"), errors.OutOfHostMemory, id="the system"),
        pytest.param(RuntimeError("std::bad_alloc"), errors.OutOfHostMemory, id="C++"),
        pytest.param(RuntimeError(SHM), errors.VolumeFull, id="shared memory"),
        pytest.param(RuntimeError("CUDA error: an illegal memory access was encountered"), type(None), id="a bug"),
        pytest.param(ValueError("out of memory"), type(None), id="nobody's memory"),
    ],
)
def test_memory_is_recognised_in_all_its_wordings(raised: Exception, kind: type) -> None:
    assert type(errors.translate(raised)) is kind


def test_full_shared_memory_does_not_blame_the_claim() -> None:
    assert "claim" not in str(errors.translate(RuntimeError(SHM)))


def test_a_quantized_model_that_does_not_fit_is_not_called_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any) -> None:
        raise torch.OutOfMemoryError(ALONE)

    monkeypatch.setattr(quantize, "load_tokenizer", lambda _: SimpleNamespace(bos_token_id=0, eos_token_id=1))
    monkeypatch.setattr("finetune_trainer.training.samples.generate", no_room)
    context: Any = SimpleNamespace(work=SimpleNamespace(tokenizer=None), polled=None)
    with pytest.raises(torch.OutOfMemoryError):
        quantize._write_answer(None, [], context)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("Rank 1 ran out of GPU memory.", "Rank 1 ran out of GPU memory."),
        ("No room on the volume.", "Rank 1: No room on the volume."),
    ],
)
def test_the_other_ranks_name_the_rank_once(message: str, told: str) -> None:
    error = Failed(1, Reason.OUT_OF_MEMORY, message).error()
    assert (type(error), str(error)) == (errors.OutOfMemory, told)


# The drill


@pytest.mark.parametrize(
    ("asked", "drill"),
    [
        ("step=3,micro-batch=2", Drill(3, 2, full_fits=False)),
        ("step=1,micro-batch=0,checkpointing=Full", Drill(1, 0, full_fits=True)),
    ],
)
def test_a_drill_is_read(monkeypatch: pytest.MonkeyPatch, asked: str, drill: Drill) -> None:
    monkeypatch.setenv(VARIABLE, asked)
    assert read_drill() == drill
    monkeypatch.delenv(VARIABLE)
    assert read_drill() is None


@pytest.mark.parametrize("asked", ["", "1", "step=0,micro-batch=2", "step=3", "step=3,micro-batch=2,", "micro-batch=2"])
def test_a_drill_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    monkeypatch.setenv(VARIABLE, asked)
    with pytest.raises(errors.InvalidConfig, match="Set it to step=N,micro-batch=M"):
        read_drill()


@pytest.mark.parametrize(
    ("step", "micro_batch", "checkpointing", "fails"),
    [(2, 4, "Off", False), (3, 4, "Off", True), (9, 4, "Off", True), (3, 2, "Off", False), (3, 4, "Full", False)],
)
def test_a_drill_strikes_where_it_says(step: int, micro_batch: int, checkpointing: str, fails: bool) -> None:
    resolved = replace_settings(SETTINGS, micro_batch_size=micro_batch, gradient_checkpointing=checkpointing)
    assert Drill(3, 2, full_fits=True).fails(step, resolved) is fails
    assert Drill(3, 2, full_fits=False).fails(step, resolved) is (step >= 3 and micro_batch > 2)


TRAINING = {
    "globalBatchSize": 8,
    "perDeviceTrainBatchSize": 4,
    "maxSteps": 4,
    "learningRate": 0.01,
    "checkpoint": {"everySteps": 1},
}


def test_simulated_out_of_memory_is_told_and_healed_as_a_real_one(
    desk: Desk, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config["training"] = TRAINING
    assert desk.run("prepare", config)[0] == 0
    monkeypatch.setenv(VARIABLE, "step=3,micro-batch=1,checkpointing=Full")
    for attempt, options in enumerate(([], ["--micro-batch", "2"]), start=1):
        code, word = desk.run("train", config, "--attempt", str(attempt), *options)
        assert code == ExitCode.OUT_OF_MEMORY
        assert word is not None
        assert word.reason is Reason.OUT_OF_MEMORY
        assert word.message == (
            f"Rank 0 ran out of GPU memory at step 3 with micro-batch {4 // attempt} "
            f"(CUDA out of memory. Simulated by {VARIABLE})."
        )
    assert "FIRE DRILL" in capsys.readouterr().err
    code, word = desk.run("train", config, "--attempt", "3", "--micro-batch", "2", "--gradient-checkpointing", "Full")
    assert code == ExitCode.COMPLETED
    assert word is not None
    assert word.training is not None
    assert word.training.steps == 4
    assert word.progress is not None
    assert word.progress.resumed_from_step == 2, "for an operator that was away meanwhile"
    assert "going on from step 2" in capsys.readouterr().err


def test_memory_that_does_not_suffice_elsewhere_is_told_with_what_was_being_done(
    desk: Desk, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config["training"] = TRAINING
    assert desk.run("prepare", config)[0] == 0

    def no_room(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(ALONE)

    monkeypatch.setattr("finetune_trainer.train.load_base", no_room)
    _, word = desk.run("train", config)
    assert word is not None
    assert word.message.startswith("Rank 0 ran out of GPU memory while loading the base model (needs at least 31.0 GiB")


def test_simulated_out_of_memory_of_one_rank_ends_the_others(desk: Desk, config: dict[str, Any]) -> None:
    config |= {"training": TRAINING, "parallelism": {"numNodes": 2, "gpusPerNode": 0}}
    config["training"] = {**TRAINING, "perDeviceTrainBatchSize": 2}
    assert desk.run("prepare", config)[0] == 0
    port, words = free_port(), [desk.root / f"word-{index}" for index in range(2)]
    nodes = [start(desk, index, port, words[index]) for index in range(2)]
    codes = [node.wait(timeout=PATIENCE_SECONDS) for node in nodes]
    assert codes[0] == ExitCode.OUT_OF_MEMORY
    assert codes[1] in {ExitCode.OUT_OF_MEMORY, ExitCode.PEER_LOST}, "rank 0 may be gone before the other has heard"
    message = LastWord.model_validate_json(words[0].read_bytes()).message
    assert message.startswith("Rank 0 ran out of GPU memory at step 2 with micro-batch 2 (")


def start(desk: Desk, index: int, port: int, word: Path) -> subprocess.Popen[bytes]:
    """One node's parent process, which starts its one rank."""
    own = {name: value for name, value in environment(index, 2, port).items() if name not in {"RANK", "WORLD_SIZE"}}
    drill = {VARIABLE: "step=2,micro-batch=1"}
    where = {"FINETUNE_RENDEZVOUS": f"localhost:{port}", "JOB_COMPLETION_INDEX": str(index)}
    options = ["--config", str(desk.root / "job.json"), "--work", str(desk.work), "--termination-log", str(word)]
    command = [sys.executable, "-m", "finetune_trainer", "train", *options]
    return subprocess.Popen(command, cwd=ROOT, env={**own, **where, **drill})
