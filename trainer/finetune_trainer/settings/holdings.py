"""Bytes that are held for the whole of a training: weights, adapter, gradients, the optimizer's states. Pure.

Shapes are those of the model's own layers; formats and states are as bitsandbytes (0.50), torch's AdamW, transformers'
Adafactor (5.23) and galore-torch (1.0) lay them out. Biases of adapters that train (lora.bias) are left out: they are
thousandths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_trainer.config import Optimizer
from finetune_trainer.settings.activations import FP32, SIZES, taps, widths_of
from finetune_trainer.settings.by_hand import count_embedding, count_room
from finetune_trainer.settings.layout import layers_of
from finetune_trainer.settings.methods import matches

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune_trainer.models.folder import ModelFacts
    from finetune_trainer.progress import Resolved, ResolvedLora
    from finetune_trainer.settings.layout import Layer

QUANTIZED_BLOCK, NESTED_BLOCK = 64, 256
"""Numbers that share a scale in NF4 and FP4, and scales that share one where they are quantized too (QLoRA, Dettmers
et al. 2023, arXiv:2305.14314)."""
GPTQ_GROUP = 128
"""Columns that share a scale and a zero, as nearly all GPTQ models have it."""
STATES_BLOCK, SMALLEST_IN_8_BITS, SMALLEST_PAGED = 256, 4096, 100_000
"""bitsandbytes' optimizers: numbers that share a scale; smaller tensors keep fp32 states, or are not paged."""
PAGED = (Optimizer.PAGED_ADAMW, Optimizer.PAGED_ADAMW_8BIT)
IN_8_BITS = (Optimizer.ADAMW_8BIT, Optimizer.PAGED_ADAMW_8BIT)
DECOMPOSITION = 4
"""Matrices in fp32 that GaLore's singular value decomposition of a gradient holds: a copy, both factors, its own."""


@dataclass(frozen=True)
class Trained:
    """A tensor that trains."""

    rows: int
    columns: int
    embeds: bool = False
    projected: bool = False
    """Whether GaLore projects its gradient."""

    @property
    def numel(self) -> int:
        """Its numbers."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Holdings:
    """Bytes of the whole model, however many GPUs share it."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    resident: int
    """Of the optimizer's states those that the GPU must hold: paged ones make way to host memory."""
    stepping: int
    """What a step of the optimizer, or the embeddings' gradient before it, takes in passing."""
    casts: int
    """16-bit copies of weights that train in fp32, which autocast keeps from the forward pass on."""


def count_holdings(model: ModelFacts, resolved: Resolved) -> Holdings:
    """All that training holds whatever the micro-batch is."""
    trained, size = tuple(trained_tensors(model, resolved)), trained_size(resolved)
    numel = sum(tensor.numel for tensor in trained)
    adapter = size * numel if resolved.lora is not None else 0
    copies = 2 if resolved.dpo is not None and resolved.lora is None else 1
    references = 2 if resolved.dpo is not None and model.adapter is not None else 1
    states = [count_states(tensor, resolved, size) for tensor in trained]
    room = count_room(model, resolved) if resolved.fast_path else 0
    return Holdings(
        weights=copies * count_weights(model, resolved) + room - count_embedding(model, resolved),
        adapter=references * adapter,
        gradients=size * numel,
        optimizer=sum(total for total, _ in states),
        resident=sum(resident for _, resident in states),
        stepping=_stepping(trained, resolved, size),
        casts=_casts(model, resolved, numel, size),
    )


# Weights


def count_weights(model: ModelFacts, resolved: Resolved) -> int:
    """The base as it is held: linear layers in its format, the rest as `models.loading.load_base` has it."""
    layers = layers_of(model)
    rest = model.parameters - sum(layer.numel for layer in layers)
    return sum(_layer_bytes(layer, resolved) for layer in layers) + rest * widths_of(resolved).stream


def _layer_bytes(layer: Layer, resolved: Resolved) -> int:
    """A layer's weight with what belongs to it.

    4 bits, and a scale of each 64 numbers in fp32 or, quantized as well, in 8 bits; 8 bits, and a scale a row; GPTQ's
    4 bits, scales, zeros and the order of its columns; or plain numbers.
    """
    match resolved.base_format:
        case "NF4" | "FP4":
            scales = math.ceil(layer.numel / QUANTIZED_BLOCK)
            nested = scales + FP32 * math.ceil(scales / NESTED_BLOCK)
            return math.ceil(layer.numel / 2) + (nested if resolved.double_quantization else FP32 * scales)
        case "Int8" | "FP8":
            return layer.numel + FP32 * layer.rows
        case "GPTQ":
            groups = math.ceil(layer.columns / GPTQ_GROUP) * layer.rows
            return layer.numel // 2 + groups * 2 + groups // 2 + FP32 * layer.columns
        case plain:
            return layer.numel * SIZES[plain]


# What trains


def trained_size(resolved: Resolved) -> int:
    """Bytes of a number that trains: adapters are held in fp32 (`training.adapters.train_in_fp32`)."""
    return FP32 if resolved.lora is not None else SIZES[resolved.base_format]


def trained_tensors(model: ModelFacts, resolved: Resolved) -> Iterator[Trained]:
    """Shapes of all that trains."""
    if resolved.lora is not None:
        yield from _adapter(model, resolved.lora)
        ends = 1 if model.tied or model.head is None else 2
        yield from [Trained(len(resolved.added_tokens), model.hidden)] * (ends if resolved.added_tokens else 0)
        return
    known = [
        *(Trained(layer.rows, layer.columns, projected=resolved.galore is not None) for layer in layers_of(model)),
        *_ends(model),
    ]
    yield from known
    yield Trained(1, model.parameters - sum(tensor.numel for tensor in known))  # norms and biases


def _ends(model: ModelFacts) -> Iterator[Trained]:
    """Embeddings, and a head of its own."""
    words = model.vocabulary or 0
    yield Trained(words, model.hidden, embeds=True)
    if model.head is not None and not model.tied:
        yield Trained(words, model.hidden)


def _adapter(model: ModelFacts, lora: ResolvedLora) -> Iterator[Trained]:
    """A [r, columns] and B [rows, r] of each layer (Hu et al. 2021, arXiv:2106.09685), and modules that train whole."""
    layers = layers_of(model)
    for layer in taps(lora, layers):
        yield Trained(lora.r, layer.columns)
        yield Trained(layer.rows, lora.r)
    for layer in layers:
        if matches(layer.name, lora.modules_to_save):
            yield Trained(layer.rows, layer.columns)
    for name, tensor in zip((model.embeddings, model.head or ""), _ends(model), strict=False):
        if matches(name, lora.modules_to_save):
            yield tensor


# The optimizer


def count_states(tensor: Trained, resolved: Resolved, size: int) -> tuple[int, int]:
    """The states of a tensor, and those of them that the GPU must hold."""
    if resolved.galore is not None:
        states = _galore_states(tensor, resolved.galore.rank, size)
        return states, states
    match resolved.optimizer:
        case Optimizer.ADAMW:  # torch: both moments in the tensor's own dtype
            states = 2 * size * tensor.numel
        case Optimizer.ADAFACTOR:  # a row and a column of squares (Shazeer and Stern 2018, arXiv:1804.04235)
            factors = tensor.rows + tensor.columns if tensor.rows > 1 else tensor.numel
            states = FP32 * factors
        case Optimizer.SGD:
            states = 0
        case _:
            return _bitsandbytes_states(tensor, resolved.optimizer)
    return states, states


def _bitsandbytes_states(tensor: Trained, optimizer: str) -> tuple[int, int]:
    """Two moments in fp32, or in 8 bits with a scale of each 256 (Dettmers et al. 2021, arXiv:2110.02861).

    Small tensors, and embeddings (by transformers' wish), keep fp32.
    """
    in_8_bits = optimizer in IN_8_BITS and tensor.numel >= SMALLEST_IN_8_BITS and not tensor.embeds
    moments = 2 * tensor.numel * (1 if in_8_bits else FP32)
    scales = 2 * FP32 * math.ceil(tensor.numel / STATES_BLOCK) if in_8_bits else 0
    paged = optimizer in PAGED and tensor.numel >= SMALLEST_PAGED
    return moments + scales, scales + (0 if paged else moments)


def _galore_states(tensor: Trained, rank: int, size: int) -> int:
    """Both moments of the projected gradient [r, the larger side], and the projection [r, the smaller side]."""
    if not tensor.projected:
        return 2 * size * tensor.numel
    smaller, larger = sorted((tensor.rows, tensor.columns))
    return size * min(rank, smaller) * (2 * larger + smaller)


def _stepping(trained: tuple[Trained, ...], resolved: Resolved, size: int) -> int:
    """Torch's AdamW takes the roots of all squares at once (foreach); others go tensor by tensor.

    Before the step the embeddings' gradient is made whole besides what the head has of it.
    """
    embedding = max((tensor.numel for tensor in trained if tensor.embeds), default=0) * size
    largest = max((tensor.numel for tensor in trained if not tensor.projected), default=0)
    if resolved.galore is not None:
        decomposed = max((tensor.numel for tensor in trained if tensor.projected), default=0)
        return max(2 * size * largest, DECOMPOSITION * FP32 * decomposed, embedding)
    match resolved.optimizer:
        case Optimizer.ADAMW:
            return max(size * sum(tensor.numel for tensor in trained), embedding)
        case Optimizer.ADAFACTOR:
            return max(3 * FP32 * largest, embedding)
        case Optimizer.SGD if resolved.weight_decay:
            return max(size * sum(tensor.numel for tensor in trained), embedding)
        case _:
            return embedding


def _casts(model: ModelFacts, resolved: Resolved, trained: int, size: int) -> int:
    """Of adapters, or of linear layers; the embeddings are looked up as they are, the head is cast tile by tile.

    The fast path has its copies of adapters beside the weights.
    """
    compute = SIZES[resolved.compute_dtype]
    if compute >= size or resolved.fast_path:
        return 0
    return compute * (trained if resolved.lora is not None else sum(layer.numel for layer in layers_of(model)))
