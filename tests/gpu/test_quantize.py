"""Quantizing on a GPU: GPTQ's blocks have the bits of its columns one by one, and a form answers as the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.quantizers.process import quantize_ours
from benchmarks.quantizers.subject import make_random
from finetune_trainer.models.finished import load_quantized
from finetune_trainer.models.gptq_blocks import compile_kernel, update_block
from finetune_trainer.models.loading import load_finished

if TYPE_CHECKING:
    from pathlib import Path

WIDTH = 128
"""Columns of a block."""


@pytest.mark.parametrize(("rows", "size", "bits"), [(1, 128, 4), (1001, 64, 4), (2048, 32, 8)])
def test_a_block_has_the_bits_of_its_columns_one_by_one(rows: int, size: int, bits: int) -> None:
    assert compile_kernel(0) is not None
    draw = torch.Generator(device="cuda").manual_seed(rows)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=draw)

    levels = 2**bits - 1
    group = torch.arange(WIDTH, device="cuda", dtype=torch.int32) // size
    scale = (drawn(WIDTH // size, rows).abs() + 0.5) * 0.3 / levels
    zero = torch.full_like(scale, (levels + 1) / 2)
    seen = drawn(4 * WIDTH, 2 * WIDTH)
    hessian = seen.T @ seen / len(seen) + torch.eye(2 * WIDTH, device="cuda") * 0.01
    factor = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    inverse = factor[WIDTH:, WIDTH:]  # a part of a wider tensor, as all of these are
    work = drawn(rows, WIDTH) * 0.05
    wide = [torch.full((rows, 2 * WIDTH), torch.nan, device="cuda") for _ in range(3)]
    quantized, errors, losses = (each[:, WIDTH:] for each in wide)

    one_by_one = work.clone()
    expected = [torch.empty_like(work) for _ in range(3)]
    for i in range(WIDTH):
        weight, width, middle = one_by_one[:, i], scale[group[i]], zero[group[i]]
        rounded = width * (torch.clamp(torch.round(weight / width) + middle, 0, levels) - middle)
        left, diagonal = weight - rounded, inverse[i, i]
        spread = left / diagonal
        for kept, value in zip(expected, (rounded, spread, left.square() / diagonal.square()), strict=True):
            kept[:, i] = value
        one_by_one[:, i:] -= spread.unsqueeze(1) * inverse[i, i:]

    update_block(work, inverse, scale, zero, group, quantized, errors, losses, levels)

    for name, ours, plain in zip(("rounded", "errors", "losses"), (quantized, errors, losses), expected, strict=True):
        assert torch.equal(ours, plain), name
    assert torch.equal(work, one_by_one)
    assert all(each[:, :WIDTH].isnan().all() for each in wide), "it wrote beside its block"


@pytest.mark.parametrize("method", ["GPTQ", "AWQ"])
def test_a_model_quantized_on_a_gpu_says_what_the_model_says(tmp_path: Path, method: str) -> None:
    subject = make_random(tmp_path / "work", "tiny", "cuda", 32)
    quantize_ours(subject, subject.settings(method), tmp_path / "form")
    device = torch.device("cuda", 0)
    asked = torch.tensor([subject.calibration[0]["input_ids"][:64]], device=device)
    with torch.inference_mode():
        expected = load_finished(subject.work.model, device, torch.bfloat16)(asked).logits.float()
        found = load_quantized(tmp_path / "form", device)(asked).logits.float()
    assert (found - expected).norm() < 0.2 * expected.norm()
