"""What is in a checkpoint: everything that the next step depends on.

trained.safetensors    every trained tensor, in the dtype it trains in
optimizer.pt scheduler.pt rng_state.pth (scaler.pt)    read with weights_only: no pickle is ever run
trainer_state.json     the Trainer's own account of steps

Several processes: rank 0 writes what is the same on all of them, and each its own `rng_state_<rank>.pth`. Weights that
are sharded are saved so, each rank its own rows of weights and optimizer state, and read by any number of ranks:

shard-0000N-model-*.safetensors    by torch.distributed.checkpoint, in the form that needs no pickle
optimizer.pt                       settings and counters of the optimizer alone
"""

from __future__ import annotations

import io
import logging
import random
from typing import TYPE_CHECKING, Any

from finetune_trainer.models.sharding import reshard
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.distributed import leads, rank, world_size
from finetune_trainer.runtime.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

TRAINED_NAME = "trained.safetensors"
OPTIMIZER_NAME = "optimizer.pt"
WEIGHT = "weight."
"""Before the name of a weight in a sharded checkpoint, where optimizer state has its kind."""


def write_state(trainer: Any, folder: Path, random_states: dict[str, Any]) -> None:  # noqa: ANN401 - a transformers Trainer
    """Everything that the next step depends on, as the Trainer itself names it where it does. All ranks take part.

    `random_states`: of the end of the last step, from `random_state`: within a step dropout has drawn from them since.
    """
    reshard(trainer.model)
    if is_sharded(trainer.model):
        _write_shards(trainer, folder)
    elif leads():
        _write_whole(trainer, folder)
    _save(random_states, folder / _random_name())
    if not leads():
        return
    _save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")
    if trainer.accelerator.scaler is not None:
        _save(trainer.accelerator.scaler.state_dict(), folder / "scaler.pt")
    trainer.state.save_to_json(str(folder / "trainer_state.json"))


def _write_whole(trainer: Any, folder: Path) -> None:  # noqa: ANN401 - a transformers Trainer
    from safetensors.torch import save_file  # noqa: PLC0415 - slow

    save_file({name: tensor.detach().contiguous() for name, tensor in trained(trainer.model)}, folder / TRAINED_NAME)
    _save(trainer.optimizer.state_dict(), folder / OPTIMIZER_NAME)


def _random_name() -> str:
    return "rng_state.pth" if world_size() == 1 else f"rng_state_{rank()}.pth"


def random_state() -> dict[str, Any]:
    """The state of every generator of this process."""
    import numpy as np  # noqa: PLC0415 - slow
    import torch  # noqa: PLC0415 - slow

    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002 - the generator that libraries use
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.random.get_rng_state()
    return state


def read_random(folder: Path) -> None:
    """Set every generator of this process as it was. Told where the checkpoint is of another number of processes."""
    import numpy as np  # noqa: PLC0415 - slow
    import torch  # noqa: PLC0415 - slow
    from transformers.trainer_pt_utils import safe_globals  # noqa: PLC0415 - slow

    saved = len(list(folder.glob("rng_state*.pth")))
    if saved != world_size():
        told = "%s is of %d processes, this run has %d: each step has the same rows, but dropout draws anew"
        log.warning(told, folder.name, saved, world_size())
        return
    with safe_globals():  # type: ignore[no-untyped-call]
        state = torch.load(folder / _random_name(), weights_only=True)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002 - the generator that libraries use
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.random.set_rng_state(state["cuda"])


def _save(value: object, path: Path) -> None:
    """Like torch.save, by way of memory: on a full volume its own writer says "iostream error" (2.13), not ENOSPC."""
    import torch  # noqa: PLC0415 - slow

    buffer = io.BytesIO()
    torch.save(value, buffer)
    path.write_bytes(buffer.getbuffer())


def read_weights(model: Any, folder: Path) -> None:  # noqa: ANN401 - a torch module
    """Put a checkpoint's weights into the model, bit by bit.

    Trainer's own way reloads a bf16 adapter as fp32, and the losses part from there (transformers 5.23): here names,
    shapes and dtypes must agree. InvalidConfig if they do not.
    """
    import torch  # noqa: PLC0415 - slow
    from safetensors.torch import load_file  # noqa: PLC0415 - slow

    reshard(model)
    if has_shards(folder):
        _read_shards({WEIGHT + name: tensor.detach() for name, tensor in trained(model)}, folder)
        return
    saved, wanted = load_file(folder / TRAINED_NAME), dict(trained(model))
    for name in saved.keys() | wanted.keys():
        here, there = _shape(wanted.get(name)), _shape(saved.get(name))
        if here != there:
            msg = f"{folder}: {name} is {there}, what is to be trained has {here}. Delete the checkpoint."
            raise InvalidConfig(msg)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(_spread_like(parameter, saved[name]))


def trained(model: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - a torch module
    """Names and tensors of what is trained."""
    return ((name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad)


def _shape(tensor: Any) -> str:  # noqa: ANN401 - a tensor or nothing
    return "absent" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"


# Sharded


def is_sharded(model: Any) -> bool:  # noqa: ANN401 - a torch module
    """Whether what is trained is spread over the ranks: then no rank has a whole state to save."""
    if world_size() == 1:
        return False
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow

    return any(isinstance(tensor, DTensor) for _, tensor in trained(model))


def has_shards(folder: Path) -> bool:
    """Whether a checkpoint was saved by ranks that each had a part."""
    return next(folder.glob("shard-*.safetensors"), None) is not None


def _spread_like(tensor: Any, whole: Any) -> Any:  # noqa: ANN401 - tensors
    """The whole tensor, spread over the ranks if the other one is."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # noqa: PLC0415 - slow

    return distribute_tensor(whole, tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else whole


def _write_shards(trainer: Any, folder: Path) -> None:  # noqa: ANN401 - a transformers Trainer
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415 - slow
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # noqa: PLC0415 - slow

    spread, counters = _optimizer_state(trainer)
    weights = {WEIGHT + name: tensor.detach() for name, tensor in trained(trainer.model)}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(weights | spread, storage_writer=writer)  # type: ignore[attr-defined]
    for path in folder.glob(f"shard-{rank() + 1:05d}-*"):
        manifest.sync(path)
    if leads():
        groups = [{key: value for key, value in group.items() if key != "params"} for group in _groups(trainer)]
        _save({"groups": groups, "counters": counters}, folder / OPTIMIZER_NAME)


def _optimizer_state(trainer: Any) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:  # noqa: ANN401 - a transformers Trainer
    """What is spread over the ranks like the weights, by kind and weight; what is the same on all, by weight."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - slow

    spread: dict[str, Any] = {}
    counters: dict[str, dict[str, Any]] = {}
    for name, parameter in trained(trainer.model):
        for kind, value in trainer.optimizer.state[parameter].items():
            if isinstance(value, DTensor):
                spread[f"{kind}.{name}"] = value
            else:
                counters.setdefault(name, {})[kind] = value
    return spread, counters


def read_optimizer(trainer: Any, folder: Path) -> None:  # noqa: ANN401 - a transformers Trainer
    """Put the state of the optimizer and the schedule's place back, on as many ranks as there are now."""
    import torch  # noqa: PLC0415 - slow

    record = torch.load(folder / OPTIMIZER_NAME, weights_only=True, map_location="cpu")
    if has_shards(folder):
        _read_spread_optimizer(trainer, record, folder)
    else:
        _spread_optimizer(trainer, record)
    trainer.lr_scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))


def _read_spread_optimizer(trainer: Any, record: dict[str, Any], folder: Path) -> None:  # noqa: ANN401 - a transformers Trainer
    import torch  # noqa: PLC0415 - slow

    kinds = _kinds_in(folder)
    spread = {
        f"{kind}.{name}": torch.zeros_like(tensor.detach()) for name, tensor in trained(trainer.model) for kind in kinds
    }
    _read_shards(spread, folder)
    for name, tensor in trained(trainer.model):
        own = {kind: spread[f"{kind}.{name}"] for kind in kinds}
        trainer.optimizer.state[tensor] = own | record["counters"].get(name, {})
    for group, saved in zip(_groups(trainer), record["groups"], strict=True):
        group.update(saved)


def _spread_optimizer(trainer: Any, record: dict[str, Any]) -> None:  # noqa: ANN401 - a transformers Trainer
    """What one rank saved whole, as parts of what several have."""
    for group, saved in zip(_groups(trainer), record["param_groups"], strict=True):
        for parameter, number in zip(group["params"], saved["params"], strict=True):
            trainer.optimizer.state[parameter] = {
                kind: _spread_like(parameter, value) if value.shape == parameter.shape else value
                for kind, value in record["state"][number].items()
            }
        group.update({key: value for key, value in saved.items() if key != "params"})


def _groups(trainer: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a transformers Trainer
    groups: list[dict[str, Any]] = trainer.optimizer.param_groups
    return groups


def _kinds_in(folder: Path) -> list[str]:
    """The kinds of optimizer state that a checkpoint holds, e.g. exp_avg."""
    from safetensors import safe_open  # noqa: PLC0415 - slow

    found: set[str] = set()
    for path in folder.glob("shard-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.update(name.partition(".")[0] for name in file.keys())  # noqa: SIM118 - no mapping
    return sorted(found - {WEIGHT.rstrip(".")})


def _read_shards(tensors: dict[str, Any], folder: Path) -> None:
    """Fill the local part of each tensor."""
    import torch.distributed.checkpoint as dcp  # noqa: PLC0415 - slow
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader  # noqa: PLC0415 - slow

    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))  # type: ignore[attr-defined]
