"""The micro-batch and the checkpointing that fill a GPU and do not burst it; what would fit where nothing does. Pure.

Chosen is only what changes nothing that is learned: the same rows make up each step. How the base is held does change
it, so that is proposed, never chosen. What a user has set stays as it is.

Of all choices that fit the fastest is taken, by the time of a token relative to the best there could be:

    recompute x offload x (1 + 1,900 / tokens of a micro-batch)

`recompute` is 1.4 for full checkpointing (12,852 against 9,183 tokens/s of an 8B LoRA, PEFT on an H100), else 1; 1,900
is what FSDP2's 8,756 and 10,434 tokens/s with micro-batches of 4,096 and 8,192 tokens give. Selective checkpointing is
for who asks for it: what it costs is not measured. `offload` is 1.05 where host memory is used, else 1: no measure (a
lead lost 1%), but what host memory must be worth, of which nobody knows how much a node has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_trainer.config import (
    FLOATING,
    SORTING_LOSSES,
    BaseFormat,
    GradientCheckpointing,
    JobConfig,
    Method,
    MethodType,
    Offload,
    Optimizer,
    Strategy,
    Training,
)
from finetune_trainer.runtime.errors import InvalidConfig, OutOfMemory
from finetune_trainer.runtime.memory import gib
from finetune_trainer.settings.estimate import batch_of, estimate, measured_tokens, why_none
from finetune_trainer.settings.fast import with_path
from finetune_trainer.settings.methods import resolve_lora

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune_trainer.models.folder import ModelFacts
    from finetune_trainer.progress import DataFacts, Estimate, Resolved, ResolvedLora

FULL, OFF = GradientCheckpointing.FULL, GradientCheckpointing.OFF
RECOMPUTE = {FULL: 1.4}
OFFLOAD = 1.05
LAUNCH_TOKENS = 1900
TOLERANCE, DERIVED_TOLERANCE = 0.1, 0.3
"""How far the peak of a step may be off: where `benchmarks.estimate` measured such settings, and where none did. A job
is refused only if it would not fit with so much less."""
GPUS_PER_NODE = (2, 4, 8)
"""As machines have them."""
SHORTEST_LENGTH = 256
"""Nobody is told to cut rows shorter."""


@dataclass(frozen=True)
class Job:
    """What memory and speed depend on besides the settings."""

    config: JobConfig
    model: ModelFacts
    data: DataFacts

    @property
    def memory_bytes(self) -> int | None:
        """Of one GPU; None: not known."""
        return self.config.gpu_memory_bytes

    def needs(self, resolved: Resolved) -> Estimate:
        """What a GPU must have for these settings."""
        batch, measured = batch_of(resolved, self.data), measured_tokens(self.data)
        return estimate(self.model, resolved, batch, measured, self.memory_bytes)

    def slowness(self, resolved: Resolved) -> float:
        """Time of a token, relative."""
        length = resolved.max_length if resolved.packing else self.data.train_tokens / self.data.train_rows
        recompute = RECOMPUTE.get(GradientCheckpointing(resolved.gradient_checkpointing), 1.0)
        offload = OFFLOAD if resolved.offloads else 1.0
        return recompute * offload * (1 + LAUNCH_TOKENS / max(resolved.micro_batch_size * length, 1))


def fit(job: Job, resolved: Resolved) -> tuple[Resolved, Estimate | None]:
    """The settings with which a GPU is filled, and what they take; as they were where its memory is not known.

    None of jobs without a GPU, and of those of which nothing is known (`why_none`). OutOfMemory, with what would fit,
    where nothing does that is allowed to be changed.
    """
    if not job.config.gpus_per_node or why_none(job.model, resolved):
        return resolved, None
    if job.memory_bytes is None:
        return resolved, job.needs(resolved)
    check_any_fits(job, resolved, job.memory_bytes)
    choices = [(each, job.needs(each)) for each in choices_of(job.config, resolved)]
    fitting = [choice for choice in choices if choice[1].total_bytes <= job.memory_bytes]
    if not fitting:
        return min(choices, key=lambda choice: (choice[1].total_bytes, choice[1].peak_bytes))
    return min(fitting, key=lambda choice: job.slowness(choice[0]))


def choices_of(config: JobConfig, resolved: Resolved) -> Iterator[Resolved]:
    """All settings that the config leaves open, from the largest micro-batch down: it, checkpointing and offload."""
    training = config.training or Training()
    asked = training.gradient_checkpointing or GradientCheckpointing.AUTO
    ways = (OFF, FULL) if asked is GradientCheckpointing.AUTO else (asked,)
    choices = [(way, offloads) for way in ways for offloads in _offloads(training, resolved, way)]
    fixed = training.per_device_train_batch_size is not None or _compares_pairs(resolved)
    sizes = [resolved.micro_batch_size] if fixed else _divisors(_rank_batch(resolved))
    return (with_pass(resolved, size, way, offloads=offloads) for size in reversed(sizes) for way, offloads in choices)


def _offloads(training: Training, resolved: Resolved, checkpointing: GradientCheckpointing) -> tuple[bool, ...]:
    """Whether host memory may be used, and whether it may not. With products kept there is no want of it."""
    if checkpointing is OFF or not resolved.fast_path:
        return () if resolved.offloads else (False,)
    if training.offload in (None, Offload.AUTO):
        return (False, True)
    return (training.offload is Offload.ON,)


def with_pass(resolved: Resolved, micro_batch: int, checkpointing: str, *, offloads: bool = False) -> Resolved:
    """The settings with another micro-batch and the same global batch."""
    return resolved.model_copy(
        update={
            "micro_batch_size": micro_batch,
            "gradient_accumulation_steps": _rank_batch(resolved) // micro_batch,
            "gradient_checkpointing": str(checkpointing),
            "offloads": offloads,
        }
    )


def _rank_batch(resolved: Resolved) -> int:
    """Rows of a step on one device."""
    return resolved.global_batch_size // resolved.parallelism.world_size


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _compares_pairs(resolved: Resolved) -> bool:
    """Whether another micro-batch would be another loss."""
    return resolved.dpo is not None and resolved.dpo.loss_type in SORTING_LOSSES


# Where nothing fits


def check_any_fits(job: Job, resolved: Resolved, memory_bytes: int) -> None:
    """OutOfMemory if not even what healing could come to fits: micro-batch 1 and full checkpointing.

    By the peak of a step alone: how long held-out rows are is not known for sure, nor what the reserve must be.
    """
    least = job.needs(_least(job.config, resolved))
    if least.peak_bytes * (1 - _tolerance(resolved)) <= memory_bytes:
        return
    needed = least.total_bytes
    told = [f"{change} (about {gib(size)})" for change, size in _ways_out(job, resolved) if size <= memory_bytes]
    advice = f"What would fit: {'; '.join(told)}; or " if told else "No setting alone would do: use "
    micro = 1 if not _compares_pairs(resolved) else resolved.micro_batch_size
    msg = (
        f"Training needs about {gib(needed)} of a GPU even with micro-batch {micro} and full checkpointing, "
        f"pod.gpuMemory is {gib(memory_bytes)}. {advice}a GPU with {gib(needed)}."
    )
    raise OutOfMemory(msg)


def _tolerance(resolved: Resolved) -> float:
    one = resolved.parallelism.world_size == 1 and resolved.dpo is None
    usual = resolved.base_format not in (BaseFormat.GPTQ, BaseFormat.FP8) and resolved.attention in ("Auto", "SDPA")
    measured = one and usual and not resolved.added_tokens
    return TOLERANCE if measured else DERIVED_TOLERANCE


def _least(config: JobConfig, resolved: Resolved) -> Resolved:
    offloads = _offloads(config.training or Training(), resolved, FULL)[-1]
    return with_pass(resolved, resolved.micro_batch_size if _compares_pairs(resolved) else 1, FULL, offloads=offloads)


def _ways_out(job: Job, resolved: Resolved) -> Iterator[tuple[str, int]]:
    """Single changes that take less, as a user would write them, and the bytes they take."""
    for change, other in _lighter(job, resolved):
        yield change, job.needs(_least(job.config, other)).total_bytes
    for found in (_shared(job, resolved), _shorter(job, resolved)):
        if found is not None:
            yield found


def _lighter(job: Job, resolved: Resolved) -> Iterator[tuple[str, Resolved]]:
    in_4_bits = {"base_format": BaseFormat.NF4.value, "double_quantization": True}
    whole, sharded = resolved.lora is None, resolved.parallelism.strategy == Strategy.FSDP
    if whole and resolved.base_format == BaseFormat.FP32:
        yield "method.baseWeights.format BF16", resolved.model_copy(update={"base_format": BaseFormat.BF16.value})
    if whole and not sharded and resolved.galore is None and resolved.optimizer != Optimizer.PAGED_ADAMW_8BIT:
        yield "training.optimizer PagedAdamW8bit", resolved.model_copy(update={"optimizer": "PagedAdamW8bit"})
    if sharded and not resolved.parallelism.cpu_offload:
        parallelism = resolved.parallelism.model_copy(update={"cpu_offload": True})
        yield "parallelism.fsdp.cpuOffload true", resolved.model_copy(update={"parallelism": parallelism})
    if not whole and not sharded and resolved.base_format in FLOATING:
        changed = resolved.model_copy(update={"base_format": BaseFormat.FP8.value})
        yield "method.baseWeights.format FP8", with_path(job.config, changed, job.model, job.data.length_max)
    lora = _adapter_for(job, resolved)
    if lora is not None and resolved.base_format not in (BaseFormat.NF4, BaseFormat.FP4, BaseFormat.GPTQ):
        update = {**in_4_bits, "lora": lora, "galore": None}
        changed = resolved.model_copy(update=update)
        yield "method.type QLoRA", with_path(job.config, changed, job.model, job.data.length_max)


def _adapter_for(job: Job, resolved: Resolved) -> ResolvedLora | None:
    """The adapter of a job that trains one, or that it would train; None where the model takes none."""
    if resolved.lora is not None:
        return resolved.lora
    try:
        return resolve_lora(job.config.model_copy(update={"method": Method(type=MethodType.QLORA)}), job.model)
    except InvalidConfig:
        return None


def _shared(job: Job, resolved: Resolved) -> tuple[str, int] | None:
    """As few GPUs as hold a model that trains whole, sharded."""
    if resolved.lora is not None or resolved.galore is not None:
        return None
    nodes = resolved.parallelism.num_nodes
    for gpus in GPUS_PER_NODE:
        together = {"gpus_per_node": gpus, "world_size": nodes * gpus, "strategy": "FSDP", "sharding": "Full"}
        sharded = resolved.model_copy(update={"parallelism": resolved.parallelism.model_copy(update=together)})
        if gpus > resolved.parallelism.gpus_per_node and resolved.global_batch_size % (nodes * gpus) == 0:
            size = job.needs(_least(job.config, sharded)).total_bytes
            if size <= (job.memory_bytes or 0):
                return f"parallelism.gpusPerNode {gpus}", size
    return None


def _shorter(job: Job, resolved: Resolved) -> tuple[str, int] | None:
    """The longest rows, halved until they fit."""
    length = batch_of(resolved, job.data).tokens // 2
    while length >= SHORTEST_LENGTH:
        cut = job.data.model_copy(update={"length_max": length})
        least = _least(job.config, resolved.model_copy(update={"max_length": length}))
        size = Job(job.config, job.model, cut).needs(least).total_bytes
        if size <= (job.memory_bytes or 0):
            return f"training.maxLength {length}", size
        length //= 2
    return None
