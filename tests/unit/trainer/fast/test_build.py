"""Where the fast path is taken on a machine, and what the log says where it is not. The GPU is a pretence."""

from __future__ import annotations

import logging
import shutil
import sysconfig
from typing import TYPE_CHECKING

import pytest
import torch

from finetune_trainer.fast import build
from finetune_trainer.fast.host import HostEmbedding
from finetune_trainer.runtime.errors import InvalidConfig
from tests.unit.trainer.fast.test_model import adapt, make_base
from tests.unit.trainer.runs import SETTINGS, replace_settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
FAST = replace_settings(SETTINGS, fast_path=True)


@pytest.fixture(autouse=True)
def able(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of Python's headers on a machine that has all that is wanted."""
    (tmp_path / "Python.h").touch()
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(build, "find_spec", lambda name: name)
    monkeypatch.setattr(shutil, "which", {"gcc": "/usr/bin/gcc"}.get)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    return tmp_path


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


def test_what_prepare_found_is_told_where_it_is_not_taken(caplog: pytest.LogCaptureFixture) -> None:
    plain = replace_settings(SETTINGS, fast_path=False, plain_because="DoRA scales the weights")
    with caplog.at_level(logging.INFO):
        assert not build.is_fast(plain, GPU, torch.bfloat16)
    assert "DoRA scales the weights" in caplog.text


def ask_for_fp8(*, fast: bool, why: str | None = None) -> bool:
    asked = replace_settings(SETTINGS, fast_path=fast, plain_because=why, fp8_products=True)
    return build.is_fast(asked, GPU, torch.bfloat16)


def test_products_in_fp8_are_told_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    with caplog.at_level(logging.INFO):
        assert ask_for_fp8(fast=True)
    assert "products in FP8" in caplog.text


def test_products_in_fp8_that_cannot_be_had_end_the_training_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidConfig, match=r"method.fp8Products .* older than NVIDIA's Ada, and has no FP8. Drop"):
        ask_for_fp8(fast=True)
    with pytest.raises(InvalidConfig, match=r"method.fp8Products .* DoRA scales the weights. Drop"):
        ask_for_fp8(fast=False, why="DoRA scales the weights")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(InvalidConfig, match="no C compiler"):
        ask_for_fp8(fast=True)


def test_what_can_wait_lies_in_host_memory_where_that_was_settled(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for offloads in (True, False):
        settings, adapted = replace_settings(FAST, offloads=offloads), adapt(make_base())
        with caplog.at_level(logging.INFO):
            assert build.is_fast(settings, GPU, torch.bfloat16)
        build.build_fast(adapted, settings, torch.float64)
        assert ("host memory" in caplog.text) == offloads
        assert isinstance(adapted.get_base_model().model.embed_tokens, HostEmbedding) == offloads
        caplog.clear()


def test_what_trains_outside_the_blocks_is_never_left_out_silently() -> None:
    adapted = adapt(make_base(), target_modules=["q_proj", "lm_head"])
    with pytest.raises(InvalidConfig, match=r"would not train .*lm_head"):
        build.build_fast(adapted, FAST, torch.float32)


def why_not_on_a_gpu() -> str | None:
    return build.why_not_here(GPU, torch.bfloat16)


def test_a_gpu_with_triton_a_compiler_and_headers_will_do() -> None:
    assert why_not_on_a_gpu() is None
    assert build.why_not_here(CPU, torch.bfloat16) == "there is no GPU"
    assert build.why_not_here(GPU, torch.float16) == "products are computed in float16"


@pytest.mark.parametrize("found", ["cc", ""])
def test_a_compiler_that_triton_does_not_look_for_is_none(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", {found: f"/usr/bin/{found}"}.get)
    assert why_not_on_a_gpu() == "there is no C compiler, which Triton needs"
    monkeypatch.setenv("CC", "cc")
    assert (why_not_on_a_gpu() is None) == (found == "cc")


def test_a_compiler_without_pythons_headers_will_not_do(able: Path) -> None:
    able.joinpath("Python.h").unlink()
    assert why_not_on_a_gpu() == "there is no Python.h, which Triton needs (the python3-dev of this Python)"


def test_a_gpu_of_before_ampere_will_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert why_not_on_a_gpu() == "the GPU is older than NVIDIA's Ampere, or another maker's"
