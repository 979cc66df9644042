"""What becomes of recorded passes where memory does not suffice; that they have the same bits, tests/gpu has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from finetune_trainer.fast.record import CHANCES, Recorder

if TYPE_CHECKING:
    from collections.abc import Callable


def failing(times: int) -> Callable[[], str]:
    """Work that lacks memory so many times."""
    left = [torch.OutOfMemoryError("CUDA out of memory")] * times

    def work() -> str:
        if left:
            raise left.pop()
        return "done"

    return work


def recorder_with_a_recording() -> Recorder:
    recorder = Recorder([], on=True)
    recorder._recorded["a shape"] = None  # type: ignore[assignment]
    return recorder


def test_work_that_lacks_memory_is_begun_anew_without_recordings_simulated_without_a_gpu() -> None:
    recorder = recorder_with_a_recording()
    assert recorder.beside(failing(0)) == "done"
    assert recorder._recorded
    assert recorder.beside(failing(1)) == "done"
    assert not recorder._recorded
    assert recorder._on


def test_recordings_that_are_often_in_the_way_are_not_made_again_simulated_without_a_gpu() -> None:
    recorder = recorder_with_a_recording()
    for _ in range(CHANCES):
        assert recorder._on
        recorder._recorded["a shape"] = None  # type: ignore[assignment]
        recorder.beside(failing(1))
    assert not recorder._on


def test_memory_that_lacks_without_recordings_is_told_simulated_without_a_gpu() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Recorder([], on=True).beside(failing(1))
    with pytest.raises(torch.OutOfMemoryError):
        recorder_with_a_recording().beside(failing(2))
