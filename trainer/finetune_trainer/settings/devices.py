"""How devices share the work, fixed once. Pure: the same config, the same.

What cannot be sharded is refused here, before a GPU is held. Every refusal names the field in camelCase and the way
out.
"""

from __future__ import annotations

from finetune_trainer.config import (
    ComputeDtype,
    Fsdp,
    JobConfig,
    Lora,
    MethodType,
    Optimizer,
    Parallelism,
    Sharding,
    Strategy,
)
from finetune_trainer.progress import ResolvedParallelism
from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.settings.methods import or_default, resolve_compute_dtype, resolve_optimizer

SHARDED_OPTIMIZERS = (Optimizer.ADAMW, Optimizer.SGD)
"""Those that compute on parts of a weight; kernels of bitsandbytes see no parts, Adafactor needs whole rows."""


def resolve_parallelism(config: JobConfig) -> ResolvedParallelism:
    """How devices share the work: FSDP where all weights are trained on several of them, else DDP. InvalidConfig."""
    asked, strategy = config.parallelism or Parallelism(), resolve_strategy(config)
    fsdp = asked.fsdp or Fsdp()
    sharded = strategy == Strategy.FSDP
    if sharded:
        check_sharding(config)
    return ResolvedParallelism(
        num_nodes=config.num_nodes,
        gpus_per_node=config.gpus_per_node,
        world_size=asked.world_size,
        strategy=strategy,
        sharding=or_default(fsdp.sharding, Sharding.FULL).value if sharded else None,
        cpu_offload=sharded and or_default(fsdp.cpu_offload, False),
    )


def resolve_strategy(config: JobConfig) -> str:
    """Single, DDP or FSDP."""
    asked = config.parallelism or Parallelism()
    strategy = or_default(asked.strategy, Strategy.AUTO)
    if asked.world_size == 1:
        return "Single"
    if strategy is not Strategy.AUTO:
        return strategy.value
    shards = config.method_type is MethodType.FULL or asked.fsdp is not None
    return (Strategy.FSDP if shards else Strategy.DDP).value


def check_sharding(config: JobConfig) -> None:
    """Refuse what needs whole weights on each device. InvalidConfig."""
    lora = (config.method.lora if config.method else None) or Lora()
    tokens = config.model.tokens
    whole = {
        "method.lora.useDora": bool(lora.use_dora),
        "method.lora.modulesToSave": bool(lora.modules_to_save),
        "method.lora.targetParameters": bool(lora.target_parameters),
        "model.tokens.add": config.trains_adapter and tokens is not None and bool(tokens.add),
        "method.computeDtype FP16": resolve_compute_dtype(config) == ComputeDtype.FP16,
        f"training.optimizer {resolve_optimizer(config)}": not config.trains_adapter
        and resolve_optimizer(config) not in SHARDED_OPTIMIZERS,
    }
    for field, given in whole.items():
        if given:
            msg = (
                f"parallelism.strategy FSDP does not go with {field}, which needs weights that are whole on each "
                f"device. Set parallelism.strategy to DDP, or leave {field.partition(' ')[0]} unset."
            )
            raise InvalidConfig(msg)
