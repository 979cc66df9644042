"""Where the fast path is taken on a machine, and what the log says where it is not. The GPU is a pretence."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from finetune_trainer.fast import build
from finetune_trainer.runtime.errors import InvalidConfig
from tests.unit.trainer.fast.test_model import adapt, make_base
from tests.unit.trainer.runs import SETTINGS, replace_settings

if TYPE_CHECKING:
    from collections.abc import Callable

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FAST = replace_settings(SETTINGS, fast_path=True)


@pytest.fixture(autouse=True)
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100 with all that is needed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name == "gcc" else None)
    monkeypatch.setattr(build, "find_spec", lambda name: name)


def test_a_gpu_with_a_compiler_takes_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert build.is_fast(FAST, GPU, torch.bfloat16)
    assert "the fast way" in caplog.text


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda patch: patch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5)), "older than"),
        (lambda patch: patch.setattr(torch.version, "hip", "6.4"), "another maker's"),
        (lambda patch: patch.setattr(build, "find_spec", lambda _: None), "no Triton"),
        (lambda patch: patch.setattr(shutil, "which", lambda _: None), "no C compiler"),
    ],
    ids=["old", "AMD", "no Triton", "no compiler"],
)
def test_what_a_machine_lacks_is_told(
    change: Callable[[pytest.MonkeyPatch], None],
    word: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    change(monkeypatch)
    with caplog.at_level(logging.INFO):
        assert not build.is_fast(FAST, GPU, torch.bfloat16)
    assert word in caplog.text


def test_without_a_gpu_and_in_another_dtype_it_is_not_taken() -> None:
    assert build.why_not_here(CPU, torch.bfloat16) == "there is no GPU"
    assert build.why_not_here(GPU, torch.float16) == "products are computed in float16"


def test_what_prepare_found_is_told_where_it_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    plain = replace_settings(SETTINGS, fast_path=False, plain_because="DoRA scales the weights")
    with caplog.at_level(logging.INFO):
        assert not build.is_fast(plain, GPU, torch.bfloat16)
    assert "DoRA scales the weights" in caplog.text


def test_what_trains_outside_the_blocks_is_never_left_out_silently() -> None:
    adapted = adapt(make_base(), target_modules=["q_proj", "lm_head"])
    with pytest.raises(InvalidConfig, match=r"would not train .*lm_head"):
        build.build_fast(adapted, FAST, torch.float32)
