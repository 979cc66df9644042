"""Adapters: new ones and those that training goes on from, put on a frozen base, and saved."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

from finetune_trainer.models.folder import ADAPTER_FOLDER, ADAPTER_WEIGHTS
from finetune_trainer.runtime.errors import VerificationFailed
from finetune_trainer.settings.methods import BIASES, STARTS
from finetune_trainer.training import state

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from finetune_trainer.progress import Resolved

TRAINED = "default"
"""PEFT's name of the adapter that trains."""


def go_on_from(base: Any, model_folder: Path) -> Any:  # noqa: ANN401 - transformers' and PEFT's models
    """The base with the adapter that training goes on from (model.adapter), or the base alone."""
    folder = model_folder / ADAPTER_FOLDER
    if not folder.is_dir():
        return base
    adapted = PeftModel.from_pretrained(base, folder, is_trainable=True)
    train_in_fp32(adapted)
    return adapted


def build_lora(resolved: Resolved, base: Any) -> LoraConfig | None:  # noqa: ANN401 - transformers' or PEFT's model
    """A new adapter in PEFT's terms; None where one is there already, or the model itself is trained."""
    lora = resolved.lora
    if lora is None or isinstance(base, PeftModel):
        return None
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        target_parameters=list(lora.target_parameters) or None,
        exclude_modules=list(lora.exclude_modules) or None,
        modules_to_save=list(lora.modules_to_save) or None,
        bias=BIASES[lora.bias],
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=STARTS[lora.init_lora_weights],
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        trainable_token_indices=_token_rows(resolved, base),
        ensure_weight_tying=bool(lora.modules_to_save) and base.config.get_text_config().tie_word_embeddings,
        task_type="CAUSAL_LM",
    )


def _token_rows(resolved: Resolved, base: Any) -> dict[str, list[int]] | None:  # noqa: ANN401 - a transformers model
    """By name of the embeddings, and of a head of its own, the rows that train; not of those that train whole."""
    if not resolved.added_tokens or resolved.lora is None:
        return None
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = head is None or head.weight is embeddings.weight
    names = [name for name, module in base.named_modules() if module is embeddings or (module is head and not tied)]
    whole = resolved.lora.modules_to_save
    rows = [name for name in names if not any(name == each or name.endswith("." + each) for each in whole)]
    return {name: list(resolved.added_tokens) for name in rows} or None


def train_in_fp32(model: Any) -> None:  # noqa: ANN401 - a PEFT model
    """Hold the adapter in fp32, as QLoRA's authors do in effect (autocast to the compute dtype in products).

    TRL casts adapters on a 4-bit base to bf16 (1.16): AdamW's steps below 0.4% of a weight are then rounded away.
    """
    for _, parameter in state.trained(model):
        parameter.data = parameter.data.float()


@contextmanager
def unrounded(model: Any) -> Iterator[None]:  # noqa: ANN401 - a torch module
    """Keep what trains already, bit by bit, while TRL builds a trainer: it rounds adapters to bf16 (1.16)."""
    held = {name: parameter.data for name, parameter in state.trained(model)}
    yield
    for name, parameter in state.trained(model):
        if name in held:
            parameter.data = held[name]


def save_adapter(model: Any, folder: Path) -> None:  # noqa: ANN401 - a PEFT model
    """Write what was trained, in PEFT's format; of DPO's adapters the reference stays.

    Where tokens were added PEFT (0.21) writes all embeddings besides, or asks the hub: their rows will do.
    VerificationFailed if a tensor that was trained is not in what was written, bit by bit.
    """
    model.save_pretrained(folder, selected_adapters=[TRAINED], save_embedding_layers=False)
    written = {_digest(tensor) for tensor in load_file(folder / ADAPTER_WEIGHTS).values()}
    lost = [name for name, tensor in state.trained(model) if _digest(tensor) not in written]
    if lost:
        msg = f"{ADAPTER_WEIGHTS} is not what was trained: {lost[0]} is not in it ({len(lost)} tensors are missing). "
        raise VerificationFailed(msg + "Nothing was published. Report this as a bug.")


def _digest(tensor: torch.Tensor) -> bytes:
    """Of shape, dtype and bits: PEFT gives tensors other names in files than in the model."""
    content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(f"{list(tensor.shape)} {tensor.dtype} ".encode() + content.tobytes()).digest()
