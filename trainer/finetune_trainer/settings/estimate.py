"""What one GPU must hold to train, from a model's configuration and the settings. Pure: no weights, no GPU.

    held        weights, adapter, the optimizer's states; gradients too, where several passes make a step
    a pass      held, what the forward pass keeps, and the head or one block's backward pass
    the step    held, gradients, and what the optimizer makes on the way
    measuring   held, and logits of held-out rows

The peak is that of a pass or of the step; what a GPU must have is the largest of the three, and a reserve. Shapes are
exact (the model is built on torch's meta device); each formula says where it is from, and `benchmarks/estimate.py`
holds the sum against measured peaks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from finetune_trainer.config import Sharding, Strategy
from finetune_trainer.models.loading import MEASURED_TOKENS
from finetune_trainer.progress import Estimate
from finetune_trainer.settings.activations import FP32, SIZES, Batch, count_activations
from finetune_trainer.settings.by_hand import count_by_hand, count_copies, count_host, count_scratch
from finetune_trainer.settings.holdings import count_holdings
from finetune_trainer.settings.layout import KNOWN, blocks_of

if TYPE_CHECKING:
    from finetune_trainer.models.folder import ModelFacts
    from finetune_trainer.progress import DataFacts, Resolved
    from finetune_trainer.settings.activations import Activations
    from finetune_trainer.settings.holdings import Holdings

CUBLAS_BYTES = 2 * 8 * 4096 * 1024
"""CUBLAS_WORKSPACE_CONFIG of `models.loading.set_up_torch`, for the threads of the forward and the backward pass."""
CONTEXT_BYTES = 800 * 2**20
"""CUDA's context and the kernels that are loaded, which no allocator counts: 700 to 810 MiB on an H100."""
FRAGMENTATION = 0.08
"""Of the peak: reserved by torch's allocator beyond what tensors hold, 0.1% to 7.9% on an H100."""
LOGITS_BYTES = 2 * FP32
"""A word of a measured token: logits, and their logarithms (`evaluate.measure_loss`)."""


def why_none(model: ModelFacts, resolved: Resolved) -> str | None:
    """Why nothing is claimed of a job, as the end of a sentence; None: it can be estimated."""
    if model.architecture not in KNOWN:
        return f"what the blocks of {model.architecture} keep is not known"
    if resolved.lora is not None and resolved.lora.use_dora:
        return "what DoRA keeps is not known"
    return None


def batch_of(resolved: Resolved, data: DataFacts) -> Batch:
    """The largest micro-batch of a run: as many of the longest rows, of pairs both answers. Packed ones are full."""
    tokens = resolved.max_length if resolved.packing else data.length_max
    rows = resolved.micro_batch_size * (1 if resolved.dpo is None else 2)
    return Batch(rows, tokens, masked=resolved.packing or rows > 1)


def measured_tokens(data: DataFacts) -> int:
    """The most tokens of held-out rows at a time: rows are held out at random, so they may be as long as any."""
    return max(MEASURED_TOKENS, data.length_max) if data.eval_rows else 0


def estimate(
    model: ModelFacts, resolved: Resolved, batch: Batch, measured: int = 0, gpu_memory_bytes: int | None = None
) -> Estimate:
    """What each GPU holds with these settings. `measured`: tokens of held-out rows that are measured at a time."""
    count = count_by_hand if resolved.fast_path else count_activations
    holdings, activations = count_holdings(model, resolved), count(model, resolved, batch)
    weights = _share(holdings.weights, resolved, sharded=True)
    gradients = _share(holdings.gradients, resolved, sharded=resolved.lora is None)
    states = _share(holdings.resident, resolved, sharded=resolved.lora is None)
    stepping = _share(holdings.stepping, resolved, sharded=resolved.lora is None)
    collected = _collected(model, resolved, holdings)
    casts = 0 if resolved.parallelism.strategy == Strategy.FSDP and resolved.lora is None else holdings.casts
    held = weights + holdings.adapter + states + collected
    peak = CUBLAS_BYTES + max(
        held + _passing(resolved, casts, activations, len(blocks_of(model)), gradients),
        held + gradients + stepping,
    )
    measuring = CUBLAS_BYTES + held + LOGITS_BYTES * measured * (model.vocabulary or 0)
    most = max(peak, measuring)
    reserve = CONTEXT_BYTES + int(most * FRAGMENTATION)
    return Estimate(
        weights_bytes=weights,
        adapter_bytes=holdings.adapter,
        gradients_bytes=gradients,
        optimizer_bytes=_share(holdings.optimizer, resolved, sharded=resolved.lora is None),
        activations_bytes=activations.kept + activations.block,
        logits_bytes=activations.head,
        workspace_bytes=CUBLAS_BYTES + collected + max(casts + activations.passing, stepping),
        peak_bytes=peak,
        measuring_bytes=measuring,
        reserve_bytes=reserve,
        total_bytes=most + reserve,
        host_bytes=count_host(model, resolved, batch) or None,
        micro_batch_size=resolved.micro_batch_size,
        length=batch.tokens,
        gradient_checkpointing=resolved.gradient_checkpointing,
        gpu_memory_bytes=gpu_memory_bytes,
    )


def _passing(resolved: Resolved, casts: int, activations: Activations, blocks: int, gradients: int) -> int:
    """What a pass adds to what is held: at the head, or in the backward pass of a block.

    `casts`: autocast's copies of weights; FSDP gathers in the dtype computed in instead. With checkpointing they are
    gone by the backward pass, but for those of the block. The fast path gathers all gradients of a pass before any is
    added to those of earlier ones.
    """
    kept = activations.kept + (gradients if resolved.gradient_accumulation_steps > 1 else 0)
    of_block = casts if resolved.gradient_checkpointing == "Off" else math.ceil(casts / max(blocks, 1))
    backward = activations.block + activations.passing - activations.freed + of_block
    if resolved.fast_path:
        backward += max(gradients - activations.gone, 0)
    return kept + max(activations.head + casts, backward)


# Several GPUs


def _share(whole: int, resolved: Resolved, *, sharded: bool) -> int:
    """One GPU's part of what FSDP spreads, none of what lies in host memory; else all of it."""
    if not sharded or resolved.parallelism.strategy != Strategy.FSDP:
        return whole
    return 0 if resolved.parallelism.cpu_offload else math.ceil(whole / resolved.parallelism.world_size)


def _collected(model: ModelFacts, resolved: Resolved, holdings: Holdings) -> int:
    """What is whole for a while: DDP's buckets, one copy of the gradients; FSDP's blocks in the dtype computed in.

    Of FSDP (Full) two blocks at a time, the next is fetched early (Zhao et al. 2023, arXiv:2304.11277), with their
    gradients in fp32, embeddings and head; of GradOp all weights. Of the fast path buffers of a layer's weights, and
    copies of adapters.
    """
    match resolved.parallelism.strategy:
        case Strategy.DDP:
            return holdings.gradients
        case Strategy.FSDP:
            compute = SIZES[resolved.compute_dtype]
            block = max((sum(layer.numel for layer in block.layers) for block in blocks_of(model)), default=0)
            if resolved.parallelism.sharding == Sharding.GRAD_OP:
                return compute * model.parameters + FP32 * block
            ends = (model.vocabulary or 0) * model.hidden * (1 if model.tied else 2)
            return compute * (2 * block + ends) + FP32 * block
        case _:
            return _besides(model, resolved, holdings) if resolved.fast_path else 0


def _besides(model: ModelFacts, resolved: Resolved, holdings: Holdings) -> int:
    return count_scratch(model, resolved) + count_copies(resolved, holdings.gradients)
