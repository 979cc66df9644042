"""A base in FP8 on a GPU: the bits of the CPU, products of the widened weights, and what loading takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from finetune_trainer.models.float8 import Float8Linear, narrow, widen
from finetune_trainer.models.folder import describe_config
from finetune_trainer.models.loading import load_base
from finetune_trainer.settings.holdings import count_weights
from finetune_trainer.settings.layout import layers_of
from tests.unit.trainer.runs import SETTINGS, replace_settings

if TYPE_CHECKING:
    from tests.gpu.bench import Bench

FP8 = replace_settings(SETTINGS, method="LoRA", base_format="FP8", compute_dtype="BF16", double_quantization=False)
WIDE = [torch.float32, torch.bfloat16, torch.float16]
NARROWING_BYTES = 2 + 4 + 1
"""Of a number, while its layer is narrowed: as read, divided by the scale in fp32, in 8 bits."""


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


@pytest.mark.parametrize("dtype", WIDE)
def test_narrowing_and_widening_give_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    weight = draw(1024, 512, dtype=dtype) * torch.logspace(-3, 3, 512).to(dtype)
    (ours, scales), (theirs, expected) = narrow(weight.cuda()), narrow(weight)
    assert torch.equal(scales.cpu(), expected)
    assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))
    assert torch.equal(widen(ours, scales, dtype).cpu(), widen(theirs, expected, dtype))


@pytest.mark.parametrize("dtype", WIDE)
def test_products_and_gradients_are_those_of_the_widened_layer(dtype: torch.dtype) -> None:
    layer = Float8Linear(512, 1024, bias=False, source_cls=torch.nn.Linear).cuda()
    layer.weight.data, layer.scales = narrow(draw(1024, 512, dtype=dtype).cuda())
    given = draw(4, 64, 512, dtype=dtype).cuda()
    found: list[tuple[Any, Any]] = []
    for each in (layer, layer.plain(dtype)):
        x = given.clone().requires_grad_()
        y = each(x)
        y.backward(torch.ones_like(y))
        found.append((y.detach(), x.grad))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_loading_takes_the_narrow_weights_and_one_wide_layer(bench: Bench) -> None:
    folder = bench.models / "1b"
    facts = describe_config(folder)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_base(folder, FP8, torch.device("cuda", 0), torch.bfloat16)
    held, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
    assert held == pytest.approx(count_weights(facts, FP8), rel=0.01)
    assert peak - held <= NARROWING_BYTES * max(layer.numel for layer in layers_of(facts))
    del model
