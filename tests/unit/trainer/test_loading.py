"""Where models are put, and whose fault it is if they cannot be loaded."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune_trainer.models.loading import GPU_SLACK_BYTES, load_finished, working_device
from finetune_trainer.runtime.errors import InvalidModel
from tests.unit.trainer.runs import CPU

if TYPE_CHECKING:
    from pathlib import Path

GIB = 2**30


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        pytest.param(ValueError("unknown type"), InvalidModel, id="files that are not understood"),
        pytest.param(KeyError("layer"), InvalidModel, id="a missing name"),
        pytest.param(OSError("no file named model.safetensors"), InvalidModel, id="transformers' own OSError"),
        pytest.param(OSError(errno.EIO, "Input/output error"), OSError, id="a bad disk"),
        pytest.param(RuntimeError("CUDA error: an illegal memory access"), RuntimeError, id="a bad GPU"),
        pytest.param(torch.OutOfMemoryError("CUDA out of memory."), torch.OutOfMemoryError, id="a small GPU"),
        pytest.param(MemoryError(), MemoryError, id="a small host"),
    ],
)
def test_only_a_model_that_is_at_fault_is_invalid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, seen: type[Exception]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise raised

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(seen) as found:
        load_finished(tmp_path, CPU, torch.float32)
    assert type(found.value) is seen


@pytest.mark.parametrize(
    ("free", "device"),
    [
        pytest.param(24 * GIB + GPU_SLACK_BYTES, "cuda:0", id="room enough"),
        pytest.param(24 * GIB + GPU_SLACK_BYTES - 1, "cpu", id="a byte short"),
    ],
)
def test_a_gpu_is_used_only_if_the_work_fits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: int, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (free, 80 * GIB))
    with caplog.at_level("INFO"):
        assert str(working_device(24 * GIB)) == device
    assert ("working on the CPU" in caplog.text) == (device == "cpu")


def test_without_a_gpu_the_work_is_done_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert working_device(0) == CPU
