"""Models whose weights are spread over the ranks (FSDP2).

Weights in 16 or 32 bits are sharded while they are read: each rank reads its own rows of each tensor from the work
folder, and no rank, rank 0 included, ever holds the model (transformers' own loading, 5.23; what accelerate 1.15 calls
RAM-efficient loading saves nothing there, and on CPU it falls back to DDP without a word). 4-bit weights are quantized
whole, then sharded. Adapters are small: every rank holds them, and Trainer averages their gradients.

Gradients are reduced in fp32, and no output is rounded: the loss is that of an unsharded model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_trainer.config import BITSANDBYTES, Sharding, Strategy
from finetune_trainer.models.folder import trusts_code
from finetune_trainer.runtime.distributed import leads, world_size
from finetune_trainer.runtime.errors import InvalidModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import torch

    from finetune_trainer.progress import Resolved

FREED, KEPT = "free_full_weight", "keep_full_weight"
"""After a block's forward pass its whole weights are freed and gathered again for the backward pass, or kept."""


def is_to_shard(resolved: Resolved) -> bool:
    """Whether the settings ask for it, and there is anybody to share with: later stages have one process."""
    return resolved.parallelism.strategy == Strategy.FSDP and world_size() > 1


def loading_options(folder: Path, resolved: Resolved, compute_dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told to read each rank's shard alone; nothing for what is not sharded so."""
    if not is_to_shard(resolved) or resolved.base_format in BITSANDBYTES:
        return {}
    import torch  # noqa: PLC0415 - slow
    from transformers.distributed.configuration_utils import DistributedConfig  # noqa: PLC0415 - slow

    return {
        "distributed_config": DistributedConfig(
            fsdp_size=world_size(),
            fsdp_plan=build_plan(folder, resolved),
            fsdp_cpu_offload=resolved.parallelism.cpu_offload and torch.cuda.is_available(),
            fsdp_mixed_precision=compute_dtype is torch.bfloat16,
        )
    }


def build_plan(folder: Path, resolved: Resolved) -> dict[str, str]:
    """Which modules are gathered as one: the model's blocks, and what transformers knows besides. InvalidModel."""
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard  # noqa: PLC0415 - slow

    model = build_empty(folder)
    blocks = {replace_layer_number_by_wildcard(name) for name, _ in blocks_of(model)}
    if not blocks:
        msg = f"{type(model).__name__} does not say what its blocks are, so it cannot be sharded. "
        raise InvalidModel(msg + "Set parallelism.strategy to DDP.")
    style = KEPT if resolved.parallelism.sharding == Sharding.GRAD_OP else FREED
    known = dict.fromkeys(model.fsdp_plan, KEPT) if style == KEPT else model.fsdp_plan
    return {**known, **dict.fromkeys(blocks, style)}


def build_empty(folder: Path) -> Any:  # noqa: ANN401 - a causal language model
    """The model of a folder without its weights, on the meta device."""
    import torch  # noqa: PLC0415 - slow
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - slow

    with torch.device("meta"):
        code = trusts_code(folder)
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=code)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=code)  # type: ignore[no-untyped-call]


def blocks_of(model: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - a torch module
    """Names and modules of the transformer's blocks."""
    kinds = set(getattr(model, "_no_split_modules", None) or ())
    return ((name, module) for name, module in model.named_modules() if type(module).__name__ in kinds)


def finish(model: Any, resolved: Resolved) -> None:  # noqa: ANN401 - a torch module
    """Shard what could not be sharded while it was read, and make sure that all of the base is."""
    if resolved.base_format in BITSANDBYTES:
        shard_quantized(model, resolved)
    model.config.distributed_config = None  # or rank 0, saving what it gathered, would wait for the others to gather
    check_sharded(model)


def shard_quantized(model: Any, resolved: Resolved) -> None:  # noqa: ANN401 - a torch module
    """Spread a 4-bit base, its adapters on it already, over the ranks; they stay whole.

    What is stored in 4 bits must look like numbers of the compute dtype (`bnb_4bit_quant_storage`), or it would stay
    whole without a word.
    """
    import torch  # noqa: PLC0415 - slow
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard  # noqa: PLC0415 - slow

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    offloads = resolved.parallelism.cpu_offload and torch.cuda.is_available()  # else they are in host memory anyway
    options: dict[str, Any] = {
        "reshard_after_forward": resolved.parallelism.sharding != Sharding.GRAD_OP,
        "offload_policy": CPUOffloadPolicy() if offloads else OffloadPolicy(),
        "ignored_params": {parameter for parameter in model.parameters() if parameter.requires_grad},
    }
    for _, block in blocks_of(inner):
        fully_shard(block, **options)
    fully_shard(inner, **options)


def check_sharded(model: Any) -> None:  # noqa: ANN401 - a torch module
    """Refuse to train a base of which any weight is whole on each rank: that would be DDP, and need its memory."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow

    adapters = hasattr(model, "peft_config")
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor) and not (adapters and parameter.requires_grad):
            msg = f"parallelism.strategy is FSDP, but {name} is not sharded"
            raise TypeError(msg)


def reshard(model: Any) -> None:  # noqa: ANN401 - a torch module
    """Give back what a forward pass without a backward pass left whole.

    Until then parameters are whole tensors under the same names, which no optimizer knows.
    """
    if world_size() == 1:
        return
    from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415 - slow

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(model: Any, dtype: torch.dtype, beat: Callable[[], None]) -> dict[str, torch.Tensor]:  # noqa: ANN401 - a torch module
    """The whole weights in host memory, in `dtype`: on rank 0; the others help, and hold none. `beat()` with each."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow

    reshard(model)
    found: dict[str, torch.Tensor] = {}
    seen: dict[int, torch.Tensor] = {}  # tied weights stay one tensor
    for name, value in model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            wanted = dtype if whole.is_floating_point() else whole.dtype
            seen[id(value)] = whole.detach().to("cpu", wanted) if leads() else whole.new_empty(0)
        if leads():
            found[name] = seen[id(value)]
        beat()
    return found
