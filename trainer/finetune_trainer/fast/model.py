"""The loss of a causal language model with LoRA, and its gradients: the blocks one after another, without autograd.

The model itself stays as it is, and so do its parameters: evaluation, checkpoints and adapters know nothing of this.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from finetune_trainer.evaluate import IGNORED
from finetune_trainer.fast import ops
from finetune_trainer.fast.attention import Rows
from finetune_trainer.fast.block import Attention, Batch, Block, Mlp, Norm, Plan
from finetune_trainer.fast.host import Host, move_embedding
from finetune_trainer.fast.linear import Layer, Scratch, WideLinears
from finetune_trainer.fast.narrow import Adapters, NarrowLinears
from finetune_trainer.fast.record import Recorder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from finetune_trainer.fast.block import Kept
    from finetune_trainer.fast.linear import Linears
    from finetune_trainer.fast.record import Outcome

HEAD_ROWS = 1024
"""Tokens whose logits are held at once: larger pieces are no faster (an H100, 128,256 words)."""
INPUTS = ("input_ids", "labels", "position_ids", "cu_seq_lens_q", "max_length_q")
"""What is looked at of a micro-batch."""
SEEDS = 7
"""Of dropout in a block, one a layer."""


@dataclass
class Passed:
    """Of a forward pass."""

    batch: Batch
    kept: list[Kept]
    gradient: Tensor
    """Of the sum of all losses, by the residual stream after the last block; with room."""


class FastModel:
    """Computes losses and gradients of the adapters of a PEFT model."""

    def __init__(
        self,
        adapted: Any,  # noqa: ANN401 - a PEFT model
        plan: Plan,
        dtype: torch.dtype,
        *,
        float8: bool = False,
        offload: bool = False,
    ) -> None:
        """`adapted`: a PEFT model whose blocks are a Llama's (`settings/fast.py`). `dtype`: what is computed in.

        `float8`: products of linear layers take 8 bits, but for those of adapters alone. `offload`: between its forward
        and its backward pass a block's input and what attention gave lie in host memory; so does a frozen embedding.

        Frozen weights of 16 bits move (`fast/linear.py`); what they are does not change.
        """
        causal = adapted.get_base_model()
        self._host = Host(causal.lm_head.weight.device) if offload else None
        if offload:
            move_embedding(causal)
        self._embed, self._rotary = causal.model.embed_tokens, causal.model.rotary_emb
        self._norm, self._head = _norm(causal.model.norm), causal.lm_head
        self._plan, self._dtype = plan, dtype
        self._scratch = Scratch()
        join = partial(_join, NarrowLinears if float8 else WideLinears, self._scratch)
        self._blocks = [_build_block(each, join) for each in causal.model.layers]
        narrow = [each for block in self._blocks for each in _linears(block) if isinstance(each, NarrowLinears)]
        self._adapters = Adapters(narrow, dtype) if narrow else None
        self.trained = [parameter for block in self._blocks for parameter in _trained(block)]
        self.stepped = torch.nn.ParameterList(self.trained)
        """The same as a module: what an optimizer's step, clipping and zeroing are about."""
        self._drops = any(linears.drops for block in self._blocks for linears in _linears(block))
        self.recorder = Recorder(self.trained, on=self.trained[0].is_cuda and self._is_steady)

    def loss(self, inputs: Mapping[str, Any], count: Tensor | float) -> Tensor:
        """Sum of the losses of a micro-batch in nats, divided by `count`; its backward pass gives adapters gradients.

        `inputs` as `Collator` makes them: input_ids and labels [rows, length]; packed sequences lie in one row, with
        cu_seq_lens_q, max_length_q and position_ids.
        """
        taken = {name: inputs[name] for name in INPUTS if name in inputs}
        counted = torch.as_tensor(count, device=inputs["input_ids"].device)
        loss: Tensor = _Loss.apply(self, taken | {"count": counted}, *self.trained)  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def take(self, inputs: Mapping[str, Any]) -> Outcome:
        """A pass: the loss of inputs as `loss` takes them with their `count`, and gradients of `trained`."""
        total, passed = self.forward(inputs)
        return total / inputs["count"], self.backward(passed, torch.ones_like(total) / inputs["count"])

    @torch.no_grad()
    def forward(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Passed]:
        """The sum of the losses of all tokens, and what `backward` begins with."""
        self._scratch.turn += 1
        if self._adapters is not None:
            self._adapters.refresh()
        ids = inputs["input_ids"]
        x = self._embed(ids).to(self._dtype).flatten(0, 1)
        batch = self._batch(inputs, x)
        kept: list[Kept] = []
        for block in self._blocks:
            self._send_last(kept)
            x, one = block.forward(x, batch, self._seeds(), self._plan)
            kept.append(one)
        if self._host is not None:
            self._host.settle()
        targets = torch.full_like(inputs["labels"], IGNORED)
        targets[:, :-1] = inputs["labels"][:, 1:]
        total, gradient = self._measure(x, targets.flatten())
        return total, Passed(batch, kept, gradient)

    @torch.no_grad()
    def backward(self, passed: Passed, scale: Tensor) -> list[Tensor]:
        """Gradients of `trained`, fp32, times `scale`. What the forward pass kept is let go on the way."""
        found: dict[int, Tensor] = {}

        def keep(parameter: torch.nn.Parameter, gradient: Tensor) -> None:
            found[id(parameter)] = gradient

        gradient = passed.gradient.mul_(scale)
        rooms = [0, *(block.mlp.down.room for block in self._blocks[:-1])]
        for block, room in zip(reversed(self._blocks), reversed(rooms), strict=True):
            gradient = block.backward(gradient, self._take_last(passed.kept), passed.batch, keep, room)
        return [found[id(parameter)].to(parameter.dtype) for parameter in self.trained]

    def _send_last(self, kept: list[Kept]) -> None:
        """To the host, beside the next block's forward pass, what the last one kept; that of the one before may go."""
        if self._host is not None:
            self._host.settle()
            if kept:
                kept[-1] = kept[-1].moved(self._host.send)

    def _take_last(self, kept: list[Kept]) -> Kept:
        """What the last block kept, which is there; that of the one before comes back beside its backward pass.

        What the model's last block keeps is never sent.
        """
        last = kept.pop()
        if self._host is not None:
            self._host.settle()
            if kept:
                kept[-1] = kept[-1].moved(self._host.fetch)
        return last

    def _batch(self, inputs: Mapping[str, Any], x: Tensor) -> Batch:
        count, length = inputs["input_ids"].shape
        positions = inputs.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=x.device)[None]
        cosines, sines = (each.flatten(0, -2).contiguous() for each in self._rotary(x, positions))
        limits = inputs.get("cu_seq_lens_q")
        return Batch(Rows(count, length, limits, inputs.get("max_length_q", 0)), cosines, sines)

    @property
    def _is_steady(self) -> bool:
        """Whether a pass does the same whenever shapes are the same: no seeds, no angles that follow the length."""
        return not self._drops and not any(word in self._rotary.rope_type for word in ("dynamic", "longrope"))

    def _seeds(self) -> Sequence[int]:
        """Drawn on the CPU, whose state checkpoints keep."""
        return torch.randint(2**31 - 1, (SEEDS,)).tolist() if self._drops else (0,) * SEEDS

    def _measure(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the losses, and its gradient by the last residual stream [tokens, width + room]."""
        room = self._blocks[-1].mlp.down.room
        out = x.new_empty(len(x), x.shape[1] + room)
        losses = []
        for start in range(0, len(x), HEAD_ROWS):
            some = x[start : start + HEAD_ROWS]
            normed = torch.empty_like(some)
            factors = ops.normalize(some, self._norm.weight, self._norm.epsilon, normed)
            logits = normed @ self._head.weight.T
            losses.append(ops.surprise(logits, targets[start : start + HEAD_ROWS]))
            torch.mm(logits, self._head.weight, out=normed)
            below = out[start : start + HEAD_ROWS, : x.shape[1]]
            ops.normalize_backward(normed, some, self._norm.weight, factors, below)
            del logits, normed
        return torch.cat(losses).sum(), out


class _Loss(torch.autograd.Function):
    """The loss of a micro-batch, for autograd: gradients come with it."""

    @staticmethod
    def forward(ctx: Any, model: FastModel, inputs: Mapping[str, Any], *_: Tensor) -> Tensor:  # noqa: ANN401 - torch's context
        loss, ctx.gradients = model.recorder.take(model.take, inputs)
        return loss

    @staticmethod
    def backward(ctx: Any, *scale: Any) -> Any:  # noqa: ANN401 - torch's signature
        return None, None, *torch._foreach_mul(ctx.gradients, scale[0])  # noqa: SLF001 - torch has no other name


def _build_block(layer: Any, join: Callable[..., Linears]) -> Block:  # noqa: ANN401 - a decoder layer of transformers
    looks, gated = layer.self_attn, layer.mlp
    norms = (looks.q_norm, looks.k_norm) if hasattr(looks, "q_norm") else ()
    inputs = join(looks.q_proj, looks.k_proj, looks.v_proj)
    attention = Attention(
        norm=_norm(layer.input_layernorm),
        inputs=inputs,
        out=join(looks.o_proj),
        head_norms=tuple(_norm(each) for each in norms),
        widths=[layer.outputs for layer in inputs.layers],
        head_width=looks.head_dim,
        scale=looks.scaling,
    )
    mlp = Mlp(
        _norm(layer.post_attention_layernorm),
        join(gated.gate_proj, gated.up_proj),
        join(gated.down_proj),
    )
    return Block(attention, mlp)


def _norm(module: Any) -> Norm:  # noqa: ANN401 - an RMS norm of transformers
    return Norm(module.weight, module.variance_epsilon)


def _join(kind: type[Linears], scratch: Scratch, *modules: Any) -> Linears:  # noqa: ANN401 - linear layers, adapted or not
    adapted = [each for each in modules if hasattr(each, "lora_A")]
    scale = adapted[0].scaling[adapted[0].active_adapters[0]] if adapted else 1.0
    return kind([_layer(each) for each in modules], scale, scratch)


def _layer(module: Any) -> Layer:  # noqa: ANN401 - a linear layer, adapted or not
    if not hasattr(module, "lora_A"):
        return Layer(module)
    name = module.active_adapters[0]
    dropout = getattr(module.lora_dropout[name], "p", 0.0)
    return Layer(module.get_base_layer(), module.lora_A[name].weight, module.lora_B[name].weight, dropout)


def _linears(block: Block) -> tuple[Linears, ...]:
    return block.attention.inputs, block.attention.out, block.mlp.both, block.mlp.down


def _trained(block: Block) -> list[torch.nn.Parameter]:
    return [parameter for linears in _linears(block) for parameter in linears.trained]
