"""GaLore: AdamW on gradients projected to a low rank, resumed exactly (Zhao et al. 2024, arXiv:2403.03507).

By transformers' own way (5.23, `galore_adamw`) betas and weight decay are left out without a word, and the projections
are objects that only a pickle could hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from galore_torch import GaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune_trainer.progress import Resolved

PROJECTOR = "projector"
"""Name of the projection in the state of a parameter."""


class ResumableGaLore(GaLoreAdamW):  # type: ignore[misc]  # galore_torch is untyped
    """GaLoreAdamW whose state is plain tensors and numbers, so that it is read with weights_only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - the optimizer's own
        super().__init__(*args, no_deprecation_warning=True, **kwargs)
        self.register_state_dict_post_hook(_unwrap_projectors)
        self.register_load_state_dict_post_hook(_wrap_projectors)


def _unwrap_projectors(_: Any, state: dict[str, Any]) -> None:  # noqa: ANN401 - the optimizer
    state["state"] = {
        index: {name: _plain(value) if isinstance(value, GaLoreProjector) else value for name, value in each.items()}
        for index, each in state["state"].items()
    }


def _plain(projector: GaLoreProjector) -> dict[str, Any]:
    """Its tensors and numbers. Text would not come back: torch (2.13) takes a word in a state for a list."""
    return {name: value for name, value in vars(projector).items() if not isinstance(value, str)}


def _wrap_projectors(optimizer: Any) -> None:  # noqa: ANN401 - the optimizer
    for each in optimizer.state.values():
        if isinstance(each.get(PROJECTOR), dict):
            settings, projector = each[PROJECTOR], GaLoreProjector(each[PROJECTOR]["rank"])
            vars(projector).update(settings)
            each[PROJECTOR] = projector


def build_galore(model: Any, resolved: Resolved) -> tuple[type, dict[str, Any]]:  # noqa: ANN401 - a transformers model
    """Class and arguments of GaLore's optimizer, as Trainer takes them.

    Projected are the weights of linear layers within the blocks; embeddings, head, norms and biases train as they are.
    """
    galore = resolved.galore
    if galore is None:
        msg = "GaLore has settings"
        raise AssertionError(msg)
    projected = list(_projected(model))
    known = {id(tensor) for tensor in projected}
    others = [tensor for tensor in model.parameters() if id(tensor) not in known]
    settings = {
        "rank": galore.rank,
        "update_proj_gap": galore.update_interval,
        "scale": galore.scale,
        "proj_type": "std",
    }
    groups = [
        {"params": [tensor for tensor in others if tensor.ndim > 1], "weight_decay": resolved.weight_decay},
        {"params": [tensor for tensor in others if tensor.ndim <= 1], "weight_decay": 0.0},
        {"params": projected, "weight_decay": resolved.weight_decay, **settings},
    ]
    betas = (resolved.adam_beta1, resolved.adam_beta2)
    return ResumableGaLore, {"params": groups, "lr": resolved.learning_rate, "betas": betas}


def _projected(model: Any) -> Iterator[Any]:  # noqa: ANN401 - a transformers model, its parameters
    """Weights of linear layers, the output head left out, in the order of the model."""
    head = model.get_output_embeddings()
    layers = (module for module in model.modules() if isinstance(module, torch.nn.Linear | Conv1D))
    return (layer.weight for layer in layers if layer is not head)
