"""What is trained, how the base is held, and what for."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from finetune_trainer.config.base import STEPS_LIMIT, Model


class MethodType(StrEnum):
    """What is trained."""

    QLORA = "QLoRA"
    LORA = "LoRA"
    FULL = "Full"
    GALORE = "GaLore"


class BaseFormat(StrEnum):
    """How the base weights are held."""

    NF4 = "NF4"
    FP4 = "FP4"
    GPTQ = "GPTQ"
    INT8 = "Int8"
    FP8 = "FP8"
    BF16 = "BF16"
    FP16 = "FP16"
    FP32 = "FP32"


FOUR_BIT = (BaseFormat.NF4, BaseFormat.FP4, BaseFormat.GPTQ)
EIGHT_BIT = (BaseFormat.INT8, BaseFormat.FP8)
BITSANDBYTES = (BaseFormat.NF4, BaseFormat.FP4)
FLOATING = (BaseFormat.BF16, BaseFormat.FP16, BaseFormat.FP32)
FAST_FORMATS = (*BITSANDBYTES, BaseFormat.FP8, BaseFormat.BF16)
"""What the fast path takes."""
TRAINED_WHOLE = (BaseFormat.BF16, BaseFormat.FP32)
"""Formats whose weights can train themselves: in FP16 their gradients would vanish."""
FORMATS = {
    MethodType.QLORA: FOUR_BIT,
    MethodType.LORA: (*EIGHT_BIT, *FLOATING),
    MethodType.FULL: TRAINED_WHOLE,
    MethodType.GALORE: TRAINED_WHOLE,
}
"""Which formats of the base a method takes. The first is not always the default: `settings.methods` chooses."""
ADAPTER_METHODS = (MethodType.QLORA, MethodType.LORA)


class ComputeDtype(StrEnum):
    """What products are computed in."""

    AUTO = "Auto"
    BF16 = "BF16"
    FP16 = "FP16"
    FP32 = "FP32"


class LoraBias(StrEnum):
    """Which biases train."""

    NONE = "None"
    ALL = "All"
    LORA_ONLY = "LoraOnly"


class LoraInit(StrEnum):
    """How adapters begin; all of them begin as no change of the model."""

    DEFAULT = "Default"
    GAUSSIAN = "Gaussian"
    ORTHOGONAL = "Orthogonal"


ModuleNames = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], Field(min_length=1, max_length=64)
]


class Lora(Model):
    """Low-rank adapters, in PEFT's terms."""

    r: int | None = Field(default=None, ge=1, le=1024, description="Rank. Default 16.")
    alpha: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Scale of the update is alpha / r (rsLoRA: alpha / sqrt r). Default 2 r.",
    )
    dropout: float | None = Field(default=None, ge=0, lt=1, description="Dropout before the adapter. Default 0.")
    target_modules: ModuleNames | None = Field(
        default=None, description="Names of the layers to adapt. Default: all linear layers, experts included."
    )
    target_parameters: ModuleNames | None = Field(
        default=None,
        description="Names of parameters to adapt that are no layers of their own, e.g. mlp.experts.down_proj.",
    )
    exclude_modules: ModuleNames | None = Field(default=None, description="Names of layers to leave out.")
    modules_to_save: ModuleNames | None = Field(
        default=None, description="Layers to train and save whole, e.g. embed_tokens and lm_head."
    )
    bias: LoraBias | None = Field(default=None, description="Which biases train: None, All or LoraOnly. Default None.")
    use_rslora: bool | None = Field(
        default=None, description="Scale by alpha / sqrt r (rank-stabilized). Default false."
    )
    use_dora: bool | None = Field(
        default=None, description="Decompose weights into magnitude and direction. Default false."
    )
    init_lora_weights: LoraInit | None = Field(
        default=None, description="Default (Kaiming), Gaussian or Orthogonal. Default Default."
    )


class GaLore(Model):
    """Full fine-tuning with gradients projected to a low rank."""

    rank: int | None = Field(default=None, ge=1, le=8192, description="Rank of the projection. Default 256.")
    update_interval: int | None = Field(
        default=None, ge=1, le=STEPS_LIMIT, description="Steps between two projections. Default 200."
    )
    scale: float | None = Field(default=None, gt=0, le=1000, description="Scale of the update. Default 0.25.")


class BaseWeights(Model):
    """How the base model's weights are held."""

    format: BaseFormat | None = Field(
        default=None,
        description="QLoRA: NF4, FP4 or GPTQ (the model's own). LoRA: Int8, FP8, BF16, FP16 or FP32. Full, GaLore: "
        "BF16 or FP32. Default NF4 for QLoRA, FP32 for Full; BF16 for LoRA and GaLore, on CPU FP32.",
    )
    double_quantization: bool | None = Field(
        default=None, description="NF4, FP4: quantize the scales as well (0.37 bits a weight less). Default true."
    )


class Method(Model):
    """What is trained and how the base is held."""

    type: MethodType | None = Field(
        default=None,
        description="QLoRA: adapters on a 4-bit base. LoRA: adapters on an 8- or 16-bit base. Full: all weights. "
        "GaLore: all weights, with low-rank gradients. Default QLoRA.",
    )
    lora: Lora | None = Field(default=None, description="Settings of the adapters.")
    galore: GaLore | None = Field(default=None, description="Settings of GaLore.")
    base_weights: BaseWeights | None = Field(default=None, description="Settings of the base.")
    compute_dtype: ComputeDtype | None = Field(
        default=None,
        description="Auto: the format of a base of 16 bits; else BF16, on CPU FP32. A GPU without BF16 takes FP16 in "
        "its place. Default Auto.",
    )
    fp8_products: bool | None = Field(
        default=None,
        description="Multiply activations and gradients with the base in FP8, which is faster and less exact: QLoRA in "
        "NF4 or FP4 and LoRA in BF16 or FP8, on the fast path of one GPU of Ada's, Hopper's or a later generation. "
        "Default false.",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        kind = self.type or MethodType.QLORA
        if self.lora is not None and kind not in ADAPTER_METHODS:
            msg = f"method: lora is for QLoRA and LoRA, type is {kind}"
            raise ValueError(msg)
        if self.galore is not None and kind is not MethodType.GALORE:
            msg = f"method: galore is for type GaLore, type is {kind}"
            raise ValueError(msg)
        weights = self.base_weights or BaseWeights()
        if weights.format is not None and weights.format not in FORMATS[kind]:
            msg = f"method.baseWeights.format: {kind} takes {', '.join(FORMATS[kind])}, not {weights.format}"
            raise ValueError(msg)
        if weights.double_quantization is not None and (
            kind is not MethodType.QLORA or weights.format is BaseFormat.GPTQ
        ):
            msg = "method.baseWeights.doubleQuantization is for NF4 and FP4"
            raise ValueError(msg)
        in_bf16 = self.compute_dtype in (None, ComputeDtype.AUTO, ComputeDtype.BF16)
        if self.fp8_products and not (
            kind in ADAPTER_METHODS and (weights.format or BaseFormat.BF16) in FAST_FORMATS and in_bf16
        ):
            msg = "method.fp8Products is for QLoRA in NF4 or FP4 and LoRA in BF16 or FP8, with computeDtype BF16"
            raise ValueError(msg)
        return self


class ObjectiveType(StrEnum):
    """What training is for."""

    SFT = "SFT"
    DPO = "DPO"


class LossOn(StrEnum):
    """Which tokens count in the loss."""

    AUTO = "Auto"
    ALL_TOKENS = "AllTokens"
    COMPLETION = "Completion"
    ASSISTANT = "Assistant"


class Sft(Model):
    """Supervised fine-tuning."""

    loss_on: LossOn | None = Field(
        default=None,
        description="Auto: all tokens for Text, the completion for Instruction, QuestionAnswer and PromptCompletion, "
        "the assistant's turns for Chat. AllTokens; Completion: the last answer; Assistant: each answer. Default Auto.",
    )


class DpoLossType(StrEnum):
    """Loss of direct preference optimization, by TRL's names (camel case here).

    Left out is TRL's `sft`, which has no preference in it: that is objective SFT.
    """

    SIGMOID = "Sigmoid"
    SIGMOID_NORM = "SigmoidNorm"
    HINGE = "Hinge"
    IPO = "Ipo"
    EXO_PAIR = "ExoPair"
    NCA_PAIR = "NcaPair"
    ROBUST = "Robust"
    BCO_PAIR = "BcoPair"
    SPPO_HARD = "SppoHard"
    AOT = "Aot"
    AOT_UNPAIRED = "AotUnpaired"
    APO_ZERO = "ApoZero"
    APO_DOWN = "ApoDown"
    DISCOPOP = "Discopop"


SMOOTHED_LOSSES = (DpoLossType.EXO_PAIR, DpoLossType.ROBUST, DpoLossType.AOT, DpoLossType.AOT_UNPAIRED)
SORTING_LOSSES = (DpoLossType.AOT, DpoLossType.AOT_UNPAIRED)
"""Losses that compare the pairs of a micro-batch with each other."""


class Dpo(Model):
    """Direct preference optimization."""

    beta: float | None = Field(
        default=None, gt=0, le=100, description="How near to stay to the reference. Default 0.1."
    )
    loss_type: DpoLossType | None = Field(
        default=None,
        description="Loss, as TRL has them: Sigmoid, SigmoidNorm, Hinge, Ipo, ExoPair, NcaPair, Robust, BcoPair, "
        "SppoHard, Aot, AotUnpaired, ApoZero, ApoDown or Discopop. Default Sigmoid.",
    )
    label_smoothing: float | None = Field(
        default=None,
        gt=0,
        lt=0.5,
        description="Share of labels that may be wrong; ExoPair, Robust, Aot and AotUnpaired. "
        "Default 0.001 for ExoPair, 0.1 for Robust, else 0.",
    )

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> Self:
        if self.label_smoothing is not None and self.loss_type not in SMOOTHED_LOSSES:
            msg = (
                f"objective.dpo.labelSmoothing is for lossType {', '.join(SMOOTHED_LOSSES)}, "
                f"not {self.loss_type or DpoLossType.SIGMOID}: drop it"
            )
            raise ValueError(msg)
        return self


class Objective(Model):
    """What training is for."""

    type: ObjectiveType | None = Field(
        default=None, description="SFT: learn the answers. DPO: prefer the better of two answers. Default SFT."
    )
    sft: Sft | None = Field(default=None, description="Settings of SFT.")
    dpo: Dpo | None = Field(default=None, description="Settings of DPO.")

    @model_validator(mode="after")
    def _settings_of_its_type(self) -> Self:
        if self.sft is not None and self.type is ObjectiveType.DPO:
            msg = "objective: sft is for type SFT, type is DPO"
            raise ValueError(msg)
        if self.dpo is not None and self.type is not ObjectiveType.DPO:
            msg = "objective: dpo is for type DPO: set objective.type to DPO"
            raise ValueError(msg)
        return self
