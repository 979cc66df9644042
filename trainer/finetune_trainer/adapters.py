"""What of a model is trained: adapters put on a frozen base, or the model itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peft import LoraConfig

from finetune_trainer import state

if TYPE_CHECKING:
    from finetune_trainer.progress import ResolvedLora


def build_lora(lora: ResolvedLora) -> LoraConfig:
    """The adapter in PEFT's terms."""
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        task_type="CAUSAL_LM",
    )


def train_in_fp32(model: Any) -> None:  # noqa: ANN401 - a torch module
    """Hold the adapter in fp32, as QLoRA's authors do in effect (autocast to the compute dtype in products).

    TRL casts adapters on a 4-bit base to bf16 (1.16): AdamW's steps below 0.4% of a weight are then rounded away.
    """
    for _, parameter in state.trained(model):
        parameter.data = parameter.data.float()
