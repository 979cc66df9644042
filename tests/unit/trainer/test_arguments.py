"""The settings in the terms of the library that trains."""

from pathlib import Path

import pytest
import torch

from finetune_trainer.training.arguments import build_arguments
from tests.unit.trainer.runs import SETTINGS


def test_a_process_trains_on_one_gpu_even_if_it_sees_several(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    arguments = build_arguments(SETTINGS, torch.float32, torch.device("cuda"), tmp_path)
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, SETTINGS.micro_batch_size)


def test_on_cpu_there_is_no_gpu(tmp_path: Path) -> None:
    assert build_arguments(SETTINGS, torch.float32, torch.device("cpu"), tmp_path).n_gpu == 0
