"""Bytes that the fast path takes: what its blocks keep, what its backward pass makes anew, what passes by. Pure.

Counted tensor by tensor from `fast/block.py`, `linear.py` and `model.py`, which hold nothing else: no autograd, no
autocast. Layers with the same input are one buffer [rows + room, columns + room], and what they are given has room for
the adapters' columns beside it. Of checkpointing Full keeps a block's input alone, Selective what attention gave as
well, Off all that took a product. These two can lie in host memory until they are wanted, and the embedding for good.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_trainer.settings.activations import FOUR_BITS, FP32, SIZES, Activations, taps
from finetune_trainer.settings.layout import blocks_of

if TYPE_CHECKING:
    from finetune_trainer.models.folder import ModelFacts
    from finetune_trainer.progress import Resolved
    from finetune_trainer.settings.activations import Batch
    from finetune_trainer.settings.layout import Block, Layer

C = SIZES["BF16"]
"""Bytes of a number, but for what is said to be in fp32."""
MULTIPLE = 64
"""Of the room: `fast.linear.MULTIPLE`."""
HEAD_ROWS = 1024
"""Tokens whose logits are made at once: `fast.model.HEAD_ROWS`."""
TARGET = 8
"""Bytes of a token's id."""
WIDENED = (*FOUR_BITS, "FP8")
"""Formats whose layers are brought into 16 bits one after another."""
FP8_MULTIPLE = 128
"""Of columns of a matrix in FP8: `fast.ops.FLOAT8_MULTIPLE`."""
PLACE_BYTES = 8 * 2**20
"""Host memory comes in so many: `fast.host.PLACE_BYTES`."""
PROCESSORS = 132
"""Streaming multiprocessors of an H100: FlashAttention in a fixed order has a sum for each share of them."""


@dataclass(frozen=True)
class Group:
    """Layers that share their input."""

    rows: int
    """Of all of them."""
    columns: int
    ranks: int
    """Of the adapters."""
    room: int
    """For the adapters and a bias."""
    shared: bool
    """Whether there are several."""

    @property
    def numel(self) -> int:
        """Numbers in their buffer."""
        return (self.rows + self.room) * (self.columns + self.room)

    @property
    def given(self) -> int:
        """Bytes of a token's input with its room."""
        return C * (self.columns + self.room)

    @property
    def above(self) -> int:
        """Bytes of the gradient of a token's output with its room."""
        return C * (self.rows + self.room)

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of the weights in FP8 with the adapters, for the forward and for the backward pass."""
        return (self.rows, _padded(self.columns + self.ranks)), (self.columns, _padded(self.rows + self.ranks))

    def narrowed(self, tokens: int) -> int:
        """Bytes of the gradient of the outputs in FP8; a scale a row."""
        return (self.shapes[1][1] + FP32) * tokens


def _padded(columns: int) -> int:
    return math.ceil(columns / FP8_MULTIPLE) * FP8_MULTIPLE


@dataclass(frozen=True)
class Sizes:
    """A block as the fast path sees it. Bytes of a token."""

    inputs: Group
    """Query, key, value."""
    out: Group
    both: Group
    """Gate, up."""
    down: Group
    heads: int
    """Query, key and value, once more where heads have norms, and factors of these."""
    attended: int
    """What attention gives, and a log-sum-exp a head in fp32."""

    @property
    def groups(self) -> tuple[Group, ...]:
        """All of them."""
        return (self.inputs, self.out, self.both, self.down)

    @property
    def stream(self) -> int:
        """What goes from block to block."""
        return C * self.out.rows

    def sent(self, resolved: Resolved) -> tuple[int, ...]:
        """Of what a block keeps, each tensor that is sent to host memory: its input, and what attention gave."""
        if not is_offloading(resolved):
            return ()
        given = () if resolved.gradient_checkpointing == "Full" else (C * self.out.columns,)
        return (self.stream, *given)


def sizes_of(block: Block, model: ModelFacts, resolved: Resolved) -> Sizes:
    """The sizes of a Llama's block."""
    attention, mlp = block.modules
    within = [norm for norm in block.norms if norm.within]
    inputs = _group(attention.first, model, resolved)
    return Sizes(
        inputs=inputs,
        out=_group((attention.last,), model, resolved),
        both=_group(mlp.first, model, resolved),
        down=_group((mlp.last,), model, resolved),
        heads=C * inputs.rows + sum(C * norm.width + FP32 * norm.groups for norm in within),
        attended=C * attention.last.columns + FP32 * model.heads,
    )


def _group(layers: tuple[Layer, ...], model: ModelFacts, resolved: Resolved) -> Group:
    ranks = sum(resolved.lora.r for _ in taps(resolved.lora, layers)) if resolved.lora is not None else 0
    extra = ranks + any(layer.name in model.biased for layer in layers)
    room = math.ceil(extra / MULTIPLE) * MULTIPLE
    return Group(sum(layer.rows for layer in layers), layers[0].columns, ranks, room, len(layers) > 1)


# What is held besides the weights


def count_room(model: ModelFacts, resolved: Resolved) -> int:
    """What buffers that weights move into have more than the weights themselves."""
    groups = [group for block in blocks_of(model) for group in sizes_of(block, model, resolved).groups]
    if resolved.fp8_products and resolved.base_format == "FP8":
        return sum(group.shapes[0][0] * group.shapes[0][1] - group.rows * group.columns for group in groups)
    if resolved.base_format in WIDENED or resolved.fp8_products:
        return 0
    return C * sum(group.numel - group.rows * group.columns for group in groups)


def count_scratch(model: ModelFacts, resolved: Resolved) -> int:
    """Buffers that weights are brought into for a product, in 16 bits or in FP8: one of each shape."""
    groups = {group for block in blocks_of(model) for group in sizes_of(block, model, resolved).groups}
    if resolved.fp8_products:
        numbers = [[rows * columns for rows, columns in group.shapes] for group in groups]
        return sum(
            backward if resolved.base_format == "FP8" else max(forward, backward) for forward, backward in numbers
        )
    if resolved.base_format not in WIDENED:
        return 0
    shapes = {(group.rows + group.room, group.columns + group.room) for group in groups}
    return C * sum(rows * columns for rows, columns in shapes)


def count_copies(resolved: Resolved, adapters: int) -> int:
    """Of adapters of so many bytes in fp32: gradients where recorded passes leave them, and a copy in 16 bits for FP8.

    Passes with dropout are not recorded.
    """
    recorded = resolved.lora is not None and not resolved.lora.dropout
    return (adapters if recorded else 0) + (adapters // FP32 * C if resolved.fp8_products else 0)


# Host memory


def is_offloading(resolved: Resolved) -> bool:
    """Whether host memory is used, by settings of which the path may be another on the machine."""
    return resolved.offloads and resolved.fast_path


def count_embedding(model: ModelFacts, resolved: Resolved) -> int:
    """The embedding in host memory; one that is the head as well stays."""
    return C * (model.vocabulary or 0) * model.hidden if is_offloading(resolved) and not model.tied else 0


def count_host(model: ModelFacts, resolved: Resolved, batch: Batch) -> int:
    """Pinned host memory: places for what all blocks but the last send, and the embedding.

    Torch pins memory in powers of 2, and keeps what was pinned.
    """
    blocks = blocks_of(model)[:-1]
    tensors = [each * batch.total for block in blocks for each in sizes_of(block, model, resolved).sent(resolved)]
    embedding = count_embedding(model, resolved)
    places = sum(math.ceil(each / PLACE_BYTES) for each in tensors) * PLACE_BYTES
    return places + (1 << (embedding - 1).bit_length() if embedding else 0)


# A pass


def count_by_hand(model: ModelFacts, resolved: Resolved, batch: Batch) -> Activations:
    """What a pass keeps and takes. Its first gradient lies beside what the blocks keep until the pass is over.

    Of what blocks send to host memory there is what one block wants, and what comes back for the next.
    """
    sizes = [sizes_of(block, model, resolved) for block in blocks_of(model)]
    each = [kept_by_hand(one, resolved) * batch.total for one in sizes]
    sent = [sum(one.sent(resolved)) * batch.total for one in sizes]
    back = max(sent[:-1], default=0)
    first_gradient = max(one.down.above for one in sizes) * batch.total
    again = max(_again(one, resolved) for one in sizes) * batch.total
    backward = max(_backward(one, resolved, model, batch) for one in sizes)
    return Activations(
        kept=sum(each) - sum(sent[:-1]) + first_gradient + _angles(sizes[0], resolved, model, batch),
        head=_head(model, batch),
        block=again + back,
        passing=backward - again,
        freed=0,
        gone=sum(each[1:]) - sum(sent[1:]) - (first_gradient if len(each) > 1 else 0),
    )


def kept_by_hand(sizes: Sizes, resolved: Resolved) -> int:
    """Bytes of a token that a block keeps for its backward pass."""
    kept = sizes.stream
    if resolved.gradient_checkpointing != "Full":
        kept += sizes.attended
    if resolved.gradient_checkpointing == "Off":
        kept += sizes.heads + sizes.stream + sizes.both.above
    return kept


def _again(sizes: Sizes, resolved: Resolved) -> int:
    """Of a token: all that a block's forward pass makes and its backward pass takes, less what was kept."""
    return _looked(sizes) + _opened(sizes) - (kept_by_hand(sizes, resolved) - sizes.stream)


def _looked(sizes: Sizes) -> int:
    """Of attention: its input normed and the factors of that, heads, what it gave and that again with room."""
    return sizes.inputs.given + FP32 + sizes.heads + sizes.attended + sizes.out.given


def _opened(sizes: Sizes) -> int:
    """Of the MLP: the stream before it, that normed and the factors of it, gate and up."""
    return sizes.stream + sizes.both.given + FP32 + sizes.both.above


def _backward(sizes: Sizes, resolved: Resolved, model: ModelFacts, batch: Batch) -> int:
    """The most that a block's backward pass holds beside what was kept."""
    drops = resolved.lora is not None and resolved.lora.dropout > 0
    again = _again(sizes, resolved)
    kept_of_mlp = sizes.stream + sizes.both.above if resolved.gradient_checkpointing == "Off" else 0
    between = sizes.out.above
    mlp = again + between + _through_mlp(sizes, drops=drops)
    attention = again - (_opened(sizes) - kept_of_mlp) + between + sizes.down.above
    attention += _through_attention(sizes, resolved, model, batch, drops=drops)
    return max(
        mlp * batch.total + max(_learned(sizes.both), _narrowed(sizes.both, resolved, batch)),
        attention * batch.total + max(_learned(sizes.inputs), _narrowed(sizes.inputs, resolved, batch)),
    )


def _through_mlp(sizes: Sizes, *, drops: bool) -> int:
    """Of a token: down's input and its gradient, and the gradient of the normed input."""
    inner = sizes.down.given + C * sizes.down.columns
    dropped = C * sizes.down.columns if drops else 0
    return inner + max(_below(sizes.both, drops=drops), dropped)


def _through_attention(sizes: Sizes, resolved: Resolved, model: ModelFacts, batch: Batch, *, drops: bool) -> int:
    """Of a token: the gradient of what attention gave, those of heads; a kernel's own, or what is made of them."""
    made = sizes.inputs.above + _below(sizes.inputs, drops=drops)
    return C * (sizes.out.columns + sizes.inputs.rows) + max(_kernel(sizes, resolved, model, batch), made)


def _kernel(sizes: Sizes, resolved: Resolved, model: ModelFacts, batch: Batch) -> int:
    """Of a token, in attention's backward pass: a sum of a row and head in fp32.

    Of packed rows FlashAttention's besides: query's gradient in fp32, in a fixed order once for each share of the
    processors that heads leave idle, and gradients of key and value for each head that shares them.
    """
    width, heads = sizes.out.columns, max(model.heads, 1)
    if not resolved.packing:
        return FP32 * heads
    sequences = max(batch.total // resolved.max_length, 1)
    sums = math.ceil(PROCESSORS / (sequences * heads))
    grouped = 2 * C * width if sizes.inputs.rows < 3 * width else 0
    return sums * FP32 * width + FP32 * heads + grouped


def _below(group: Group, *, drops: bool) -> int:
    """Of a token: the gradient of the input, and of a dropped one that through an adapter, two where there are more."""
    return C * group.columns * ((3 if group.shared else 2) if drops else 1)


def _learned(group: Group) -> int:
    """Gradients of the adapters side by side, in fp32, before each has its own."""
    return FP32 * group.room * (group.rows + group.columns)


def _narrowed(group: Group, resolved: Resolved, batch: Batch) -> int:
    """What a product of the backward pass takes in FP8; it is gone before the adapters' gradients are made."""
    return group.narrowed(batch.total) if resolved.fp8_products else 0


def _head(model: ModelFacts, batch: Batch) -> int:
    """The last stream, targets and losses; logits of a piece and its normed input."""
    tokens = C * model.hidden + TARGET + FP32
    return tokens * batch.total + min(batch.total, HEAD_ROWS) * C * ((model.vocabulary or 0) + model.hidden)


def _angles(sizes: Sizes, resolved: Resolved, model: ModelFacts, batch: Batch) -> int:
    """Cosines and sines of each place in a row; of packed rows of each token."""
    places = batch.total if resolved.packing else batch.tokens
    return 2 * C * (sizes.out.columns // max(model.heads, 1)) * places
