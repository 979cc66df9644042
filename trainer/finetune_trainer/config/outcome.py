"""What becomes of the trained weights."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator
from pydantic.alias_generators import to_camel

from finetune_trainer.config.base import Model, ShortName
from finetune_trainer.config.sources import Source


class MergePolicy(StrEnum):
    """Whether the adapter is merged into the base."""

    AUTO = "Auto"
    ALWAYS = "Always"
    NEVER = "Never"


class MergeBase(StrEnum):
    """Which weights the adapter is merged into."""

    AUTO = "Auto"
    DEQUANTIZED = "Dequantized"
    ORIGINAL = "Original"


class MergeDtype(StrEnum):
    """What the merged weights are saved in."""

    BF16 = "BF16"
    FP16 = "FP16"
    FP32 = "FP32"


SHARD_SIZE_PATTERN = r"^0*[1-9][0-9]*(KB|MB|GB)$"


class Merge(Model):
    """The adapter merged into the base: the model that was trained, in one piece."""

    policy: MergePolicy | None = Field(
        default=None, description="Auto, Always: merge; Never: end with the adapter. Default Auto."
    )
    base: MergeBase | None = Field(
        default=None,
        description="Dequantized: the weights that were trained on, widened. Original: the weights before they were "
        "quantized. Auto: the one of both in which the adapter has the lower held-out loss; without held-out rows "
        "Dequantized for NF4, FP4 and GPTQ bases, Original for Int8 and FP8 ones and where original is set. "
        "Default Auto.",
    )
    original: Source | None = Field(
        default=None,
        description="The original model of a base that is quantized as it comes (GPTQ): same architecture, shapes and "
        "tokenizer. Default: the base itself.",
    )
    dtype: MergeDtype | None = Field(default=None, description="BF16, FP16 or FP32. Default BF16.")
    max_shard_size: str | None = Field(
        default=None,
        max_length=20,
        pattern=SHARD_SIZE_PATTERN,
        description="Largest file of the saved weights, e.g. 2048MB. Default 5GB.",
    )
    max_kl_divergence: float | None = Field(
        default=None,
        alias="maxKLDivergence",
        ge=0.0,
        le=100.0,
        description="Gate for the weights that were trained on (base Dequantized, or a base that is not quantized): "
        "fails the job where the merged model is farther from the trained one, nats a token. Default none: told, "
        "fails nothing.",
    )
    max_loss_increase: float | None = Field(
        default=None,
        ge=-100.0,
        le=100.0,
        description="Gate for base Original: fails the job where the merged model's held-out loss is higher than the "
        "trained one's by more, nats a token. Default none: told, fails nothing.",
    )

    @model_validator(mode="after")
    def _settings_of_a_merge(self) -> Self:
        if self.policy is MergePolicy.NEVER and (
            idle := self.model_dump(by_alias=True, exclude={"policy"}, exclude_none=True)
        ):
            msg = f"merge.policy Never merges nothing: drop {', '.join(idle)}, or leave policy unset"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _original_is_merged_into(self) -> Self:
        if self.base is not MergeBase.DEQUANTIZED:
            return self
        for field, value in {"original": self.original, "maxLossIncrease": self.max_loss_increase}.items():
            if value is not None:
                msg = f"merge: {field} is for base Original, base is Dequantized"
                raise ValueError(msg)
        return self

    @property
    def gates(self) -> dict[str, float]:
        """What is asked of the merged model's figures, by the names of the fields."""
        given = {"maxKLDivergence": self.max_kl_divergence, "maxLossIncrease": self.max_loss_increase}
        return {name: value for name, value in given.items() if value is not None}


class QuantizeMethod(StrEnum):
    """How the finished model is made small."""

    GPTQ = "GPTQ"
    AWQ = "AWQ"
    GGUF = "GGUF"


class GgufType(StrEnum):
    """What a GGUF file holds its matrices in; norms stay whole. The number is that of bits, without the scales."""

    F16 = "F16"
    BF16 = "BF16"
    Q8_0 = "Q8_0"
    Q5_1 = "Q5_1"
    Q5_0 = "Q5_0"
    Q4_1 = "Q4_1"
    Q4_0 = "Q4_0"


class Calibration(Model):
    """Rows of the training set that a quantizer looks at."""

    samples: int | None = Field(default=None, ge=1, le=4096, description="How many rows. Default 256.")
    max_length: int | None = Field(default=None, ge=8, le=32768, description="Longest row, in tokens. Default 1024.")


class Quantize(Model):
    """One quantized form of the finished model."""

    name: ShortName = Field(description="Its folder below quantized/ and its name in the status.")
    method: QuantizeMethod = Field(description="GPTQ or AWQ, for vLLM and transformers; GGUF, for llama.cpp.")
    gguf_type: GgufType | None = Field(
        default=None, description="GGUF: F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0. Default Q8_0."
    )
    bits: int | None = Field(
        default=None, ge=4, le=8, multiple_of=4, description="Bits a weight: GPTQ 4 or 8, AWQ 4. Default 4."
    )
    group_size: int | None = Field(
        default=None,
        ge=16,
        le=1024,
        description="Weights that share a scale; must divide the model's layers. "
        "Default the largest of 128, 64, 32 that does.",
    )
    symmetric: bool | None = Field(
        default=None, description="Scales without a zero point. Default true for GPTQ, false for AWQ."
    )
    act_order: bool | None = Field(
        default=None,
        description="GPTQ: round the columns that matter most first, over group borders (desc_act); servers may be "
        "slower with it. False: reordered within the groups, which costs nothing. Default false.",
    )
    dampening_frac: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="GPTQ: what is added to the Hessian's diagonal, as a share of its mean (damp_percent); raised by "
        "itself where it does not suffice. Default 0.05.",
    )
    calibration: Calibration | None = Field(default=None, description="The rows that the quantizer looks at.")
    max_perplexity_increase_percent: float | None = Field(
        default=None,
        ge=0,
        description="Gate: fail if the perplexity on the held-out rows is more than so many percent above the 16-bit "
        "model's, and publish nothing. Default none.",
    )

    @model_validator(mode="after")
    def _fields_are_of_the_method(self) -> Self:
        if self.method is QuantizeMethod.AWQ and self.bits not in (None, 4):
            msg = f"quantize: AWQ has 4 bits, bits is {self.bits}: drop it, or use method GPTQ"
            raise ValueError(msg)
        for field in self.model_fields_set - FIELDS_OF[self.method]:
            if getattr(self, field) is not None:
                takers = " and ".join(method for method, names in FIELDS_OF.items() if field in names)
                msg = f"quantize: {to_camel(field)} is for {takers}, method is {self.method}: drop it"
                raise ValueError(msg)
        return self


OF_ALL = {"name", "method", "max_perplexity_increase_percent"}
OF_CALIBRATED = OF_ALL | {"bits", "group_size", "symmetric", "calibration"}
FIELDS_OF = {
    QuantizeMethod.GPTQ: OF_CALIBRATED | {"act_order", "dampening_frac"},
    QuantizeMethod.AWQ: OF_CALIBRATED,
    QuantizeMethod.GGUF: OF_ALL | {"gguf_type"},
}
"""What may be set beside each method."""
