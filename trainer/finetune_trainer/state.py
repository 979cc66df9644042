"""What is in a checkpoint: everything that the next step depends on.

adapter.safetensors    every trained tensor, in the dtype it trains in
optimizer.pt scheduler.pt rng_state.pth (scaler.pt)    read with weights_only: no pickle is ever run
trainer_state.json     the Trainer's own account of steps
"""

from __future__ import annotations

import io
import random
from typing import TYPE_CHECKING, Any

from finetune_trainer.errors import InvalidConfig

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ADAPTER_NAME = "adapter.safetensors"


def write_state(trainer: Any, folder: Path, random_states: dict[str, Any]) -> None:  # noqa: ANN401 - a transformers Trainer
    """Everything that the next step depends on, as the Trainer itself names it where it does.

    `random_states`: of the end of the last step, from `random_state`: within a step dropout has drawn from them since.
    """
    from safetensors.torch import save_file  # noqa: PLC0415 - slow

    save_file({name: tensor.detach().contiguous() for name, tensor in trained(trainer.model)}, folder / ADAPTER_NAME)
    _save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
    _save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")
    if trainer.accelerator.scaler is not None:
        _save(trainer.accelerator.scaler.state_dict(), folder / "scaler.pt")
    _save(random_states, folder / "rng_state.pth")
    trainer.state.save_to_json(str(folder / "trainer_state.json"))


def random_state() -> dict[str, Any]:
    """The state of every generator, as Trainer reads it back (`_load_rng_state`, with weights_only)."""
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

    saved, wanted = load_file(folder / ADAPTER_NAME), dict(trained(model))
    for name in saved.keys() | wanted.keys():
        here, there = _shape(wanted.get(name)), _shape(saved.get(name))
        if here != there:
            msg = f"{folder}: {name} is {there}, the adapter to be trained has {here}. Delete the checkpoint."
            raise InvalidConfig(msg)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])


def trained(model: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - a torch module
    """Names and tensors of what is trained."""
    return ((name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad)


def _shape(tensor: Any) -> str:  # noqa: ANN401 - a tensor or nothing
    return "absent" if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
