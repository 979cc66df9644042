"""Bytes that a forward pass keeps for the backward pass, and those that pass by. Pure.

Derived operation by operation from transformers' blocks (5.23), PEFT's layers (0.21), bitsandbytes (0.50) and TRL's
head (1.16), on a GPU: what autograd saves, each storage once. `tests/unit/trainer/test_estimate.py` counts the same on
CPU with `torch.autograd.graph.saved_tensors_hooks`; `benchmarks/estimate.py` measures the sum on a GPU. The known
formula s b h (34 + 5 a s / h) a layer (Korthikanti et al. 2022, arXiv:2205.05198) is of a GELU block in 16 bits with
dropout that keeps the scores of attention, which no kernel of today does.

Letters: c bytes of the dtype that is computed in, d bytes of what goes from block to block, h its width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_trainer.settings.layout import Norm, blocks_of, layers_of
from finetune_trainer.settings.methods import matches

if TYPE_CHECKING:
    from finetune_trainer.models.folder import ModelFacts
    from finetune_trainer.progress import Resolved, ResolvedLora
    from finetune_trainer.settings.layout import Block, Layer, Module

SIZES = {"BF16": 2, "FP16": 2, "FP32": 4}
"""Bytes of a number."""
FP32 = SIZES["FP32"]
FOUR_BITS = ("NF4", "FP4")
LINEAR = (*SIZES, "FP8")
"""Formats whose layers are torch's linear layers to PEFT and to selective checkpointing."""
HEAD_ROWS, HEAD_WORDS = 4096, 32768
"""Tokens and words that TRL's head takes at a time (1.16, TOKEN_CHUNK_SIZE and _CHUNKED_LOGPROB_CHUNK_SIZE)."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch as a model sees it."""

    rows: int
    tokens: int
    """Of a row, padding counted."""
    masked: bool
    """Whether attention is told which tokens see which: rows are padded, or several share a sequence."""

    @property
    def total(self) -> int:
        """Tokens in all."""
        return self.rows * self.tokens


@dataclass(frozen=True)
class Widths:
    """How wide numbers are, and what takes a copy."""

    compute: int
    """c: bytes of what products take and give."""
    stream: int
    """d: bytes of what goes from block to block: as the embeddings are held."""
    inner: int
    """Bytes of what linear layers give."""
    casts: bool
    """Whether autocast makes a copy, in c, of what each layer takes, since that is wider."""
    peft_casts: bool
    """Whether PEFT does: it widens to the adapter's fp32, which autocast rounds again (Linear.forward)."""


def widths_of(resolved: Resolved) -> Widths:
    """By how the base is held and what is computed in (`models.loading.load_base`)."""
    compute = SIZES[resolved.compute_dtype]
    stream = FP32 if resolved.base_format == "Int8" else SIZES.get(resolved.base_format, compute)
    return Widths(
        compute=compute,
        stream=stream,
        inner=FP32 if resolved.base_format == "Int8" else compute,
        casts=stream > compute,
        peft_casts=resolved.lora is not None and resolved.base_format in LINEAR and compute < FP32,
    )


def taps(lora: ResolvedLora | None, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
    """The layers that train: those with an adapter, or all."""
    if lora is None:
        return layers
    return tuple(
        layer
        for layer in layers
        if matches(layer.name, lora.target_modules) and not matches(layer.name, lora.exclude_modules)
    )


# A block


def kept_by_block(block: Block, resolved: Resolved, model: ModelFacts, batch: Batch) -> int:
    """Bytes that a block keeps for its backward pass, if none are computed again."""
    widths = widths_of(resolved)
    a_token = sum(_norm(norm, resolved, widths) for norm in block.norms)
    a_token += sum(_module(module, resolved, widths, model.heads, batch) for module in block.modules)
    a_token += _held_by_int8(block, resolved)
    return a_token * batch.total + _kept_weights(block, resolved, widths)


def _norm(norm: Norm, resolved: Resolved, widths: Widths) -> int:
    """RMSNorm: its input in fp32, a scale of each group, and where its weight trains the normed values as well."""
    normed = (widths.inner if norm.within else widths.stream) * norm.width if resolved.lora is None else 0
    return FP32 * (norm.width + norm.groups) + normed


def _module(module: Module, resolved: Resolved, widths: Widths, heads: int, batch: Batch) -> int:
    trained = taps(resolved.lora, module.layers)
    kept = _inputs(tuple(layer for layer in trained if layer != module.last), resolved, widths, shared=widths.casts)
    ends = module.last in trained
    if module.attends:
        kept += _attention(module, resolved, widths, heads, batch)
        ends = ends and (_dropout(resolved) or widths.peft_casts)  # else it shares what attention keeps
    else:
        kept += _mlp(module, widths)
    kept += _inputs((module.last,) if ends else (), resolved, widths, shared=False)
    if resolved.lora is not None:
        kept += len(trained) * resolved.lora.r * widths.compute  # between the adapter's two products
    return kept


def _inputs(layers: tuple[Layer, ...], resolved: Resolved, widths: Widths, *, shared: bool) -> int:
    """What trained layers keep of their common input, for the gradient of their weights. `shared`: cast by autocast.

    One tensor for all of them where none takes a copy. With dropout each draws its own: values, and a byte of mask.
    """
    columns = sum(layer.columns for layer in layers)
    if _dropout(resolved):
        return columns * (widths.compute + 1)
    if shared or widths.peft_casts:
        return columns * widths.compute
    return layers[0].columns * widths.compute if layers else 0


def _dropout(resolved: Resolved) -> bool:
    return resolved.lora is not None and resolved.lora.dropout > 0


def _attention(module: Module, resolved: Resolved, widths: Widths, heads: int, batch: Batch) -> int:
    """Query, key, value and result; a log-sum-exp a head (Dao 2023, arXiv:2307.08691), not the scores.

    Under a mask SDPA has no grouped heads: keys and values are repeated for all of them, and each layer makes numbers
    of the mask (transformers' use_gqa_in_sdpa, torch's convert_boolean_attn_mask). Eager attention keeps the scores,
    in fp32 and in c.
    """
    taken, given = sum(layer.rows for layer in module.first), module.last.columns
    if resolved.attention == "Eager":
        return widths.compute * (3 * given + given) + heads * batch.tokens * (FP32 + widths.compute)
    if batch.masked and resolved.attention != "FlashAttention2":
        return widths.compute * (3 * given + given + batch.tokens) + FP32 * heads
    return widths.compute * (taken + given) + FP32 * heads


def _mlp(module: Module, widths: Widths) -> int:
    """Gated: gate, its activation, up. Else what the activation takes."""
    return widths.inner * module.last.columns * (3 if module.gated else 1)


def _held_by_int8(block: Block, resolved: Resolved) -> int:
    """What 8-bit layers were given, in fp32; the result of attention left out, which attention keeps as well."""
    if resolved.base_format != "Int8":
        return 0
    inputs = sum(module.first[0].columns for module in block.modules)
    return FP32 * (inputs + sum(module.last.columns for module in block.modules if not module.attends))


def _attended(block: Block) -> int:
    """Width of what attention gives."""
    return sum(module.last.columns for module in block.modules if module.attends)


def _kept_weights(block: Block, resolved: Resolved, widths: Widths) -> int:
    """Weights that are made anew and kept: GPTQ's, widened by plain operations; frozen fp32, which autocast rounds."""
    rounded = resolved.lora is not None and resolved.base_format == "FP32" and widths.casts
    remade = rounded or resolved.base_format == "GPTQ"
    return widths.compute * sum(layer.numel for layer in block.layers) if remade else 0


def _kept_selectively(block: Block, resolved: Resolved, model: ModelFacts, batch: Batch) -> int:
    """Selective checkpointing keeps what products and attention gave (`training.arguments.PRODUCTS`).

    Layers of bitsandbytes and GPTQ are no such products: of these what the adapter gave is kept.
    """
    if resolved.gradient_checkpointing != "Selective":
        return 0
    widths = widths_of(resolved)
    trained = taps(resolved.lora, block.layers)
    given = sum(layer.rows for layer in block.layers) if resolved.base_format in LINEAR else 0
    if resolved.lora is not None:
        given += sum(layer.rows + resolved.lora.r for layer in trained)
    return (widths.compute * (given + _attended(block)) + FP32 * model.heads) * batch.total


# The model


@dataclass(frozen=True)
class Activations:
    """What a pass keeps, and what comes on top while it runs. Bytes."""

    kept: int
    """At the end of the forward pass."""
    head: int
    """Taken by the output head and the loss while all of `kept` is held."""
    block: int
    """Made again of one block in the backward pass, with checkpointing."""
    passing: int
    """Gradients of values on their way through one block, and the widened weight of one layer."""
    freed: int
    """Of `kept`, gone by the time of a block's backward pass."""
    gone: int = 0
    """Of `kept`, gone by that of the first block, which comes last."""


def count_activations(model: ModelFacts, resolved: Resolved, batch: Batch) -> Activations:
    """All blocks, the embeddings and the head."""
    widths, blocks = widths_of(resolved), blocks_of(model)
    whole = [kept_by_block(block, resolved, model, batch) for block in blocks]
    between = [_kept_between(block, resolved, model, batch) for block in blocks]
    last = (_norm(Norm(model.hidden), resolved, widths) + widths.stream * model.hidden) * batch.total
    again = resolved.gradient_checkpointing != "Off"
    mask = batch.rows * batch.tokens**2 if batch.masked else 0
    return Activations(
        kept=(sum(between) if again else sum(whole)) + last + mask,
        head=_head(model, resolved, widths, batch),
        block=max(whole, default=0) if again else 0,
        passing=max((_passing(block, resolved, widths, model, batch) for block in blocks), default=0),
        freed=last + max((_kept_selectively(block, resolved, model, batch) for block in blocks), default=0),
    )


def _kept_between(block: Block, resolved: Resolved, model: ModelFacts, batch: Batch) -> int:
    """What checkpointing keeps of a block: what it is given, what it is told to keep, what it cannot let go of.

    bitsandbytes (0.50, MatMul8bitLt) holds what it was given beside autograd's own store, where hooks do not see it.
    """
    widths = widths_of(resolved)
    held = _held_by_int8(block, resolved)
    held += widths.compute * _attended(block) if held else 0
    a_token = widths.stream * model.hidden + held
    return a_token * batch.total + _kept_selectively(block, resolved, model, batch)


def _passing(block: Block, resolved: Resolved, widths: Widths, model: ModelFacts, batch: Batch) -> int:
    """Gradients of what is widest in a block, and of the stream."""
    widened = _widened(model, resolved, widths)
    wide = [
        2 * widths.inner * sum(layer.rows for layer in module.first) * batch.total
        if module.attends
        else _passing_mlp(module, resolved, widths, widened, batch)
        for module in block.modules
    ]
    return max(wide, default=0) + widths.stream * model.hidden * batch.total


def _passing_mlp(module: Module, resolved: Resolved, widths: Widths, widened: int, batch: Batch) -> int:
    """At down's input: its gradient, and of a gate both halves', less the input itself, which is let go of by then.

    Before that a weight is widened. Where PEFT casts, down's adapter gives its part of the gradient in c, in fp32 and
    in c again, before the base gives its own, for which FP8 is widened. Layers in Int8 hold their input.
    """
    wide = module.last.columns * batch.total
    if widths.peft_casts and module.last in taps(resolved.lora, module.layers):
        return max((2 * widths.compute + FP32) * wide, 2 * widths.compute * wide + widened)
    gradients = (2 if module.gated else 1) + (1 if resolved.base_format == "Int8" else 0)
    return max(gradients * widths.inner * wide, widths.inner * wide + widened)


def _widened(model: ModelFacts, resolved: Resolved, widths: Widths) -> int:
    """The largest layer's weight, made of 4 or 8 bits for its product; of fp32 weights its 16-bit gradient."""
    if resolved.base_format in SIZES and resolved.lora is not None:
        return 0
    return widths.inner * max((layer.numel for layer in layers_of(model)), default=0)


def _head(model: ModelFacts, resolved: Resolved, widths: Widths, batch: Batch) -> int:
    """TRL's head (ChunkedLogProbFunction): logits tile by tile, never all of them.

    A tile of 4,096 tokens x 32,768 words; the gradient of what the head takes in fp32, and rounded; of a head that
    trains the gradient of its weight in fp32, and rounded; a piece of a weight in fp32, rounded; a dozen figures a
    token.
    """
    rounds = widths.stream < FP32
    tile = min(batch.total, HEAD_ROWS) * HEAD_WORDS * widths.compute
    gradient = (FP32 + widths.stream) * model.hidden * batch.total
    weight = (FP32 + (widths.stream if rounds else 0)) * (model.vocabulary or 0) * model.hidden
    piece = HEAD_WORDS * model.hidden * widths.compute if widths.casts else 0
    return tile + gradient + (weight if resolved.lora is None else 0) + piece + 12 * FP32 * batch.total
