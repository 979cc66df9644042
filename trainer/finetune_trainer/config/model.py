"""The base model of a job."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from finetune_trainer.config.base import Model
from finetune_trainer.config.sources import COMMIT_PATTERN, Source, VolumeSource

TokenText = Annotated[str, Field(min_length=1, max_length=100)]


class Attention(StrEnum):
    """Which kernel computes attention."""

    AUTO = "Auto"
    SDPA = "SDPA"
    FLASH_ATTENTION_2 = "FlashAttention2"
    EAGER = "Eager"


class ChatTemplatePreset(StrEnum):
    """Chat templates that come with the trainer."""

    CHATML = "chatml"
    LLAMA3 = "llama3"
    LLAMA2 = "llama2"
    ZEPHYR = "zephyr"
    ALPACA = "alpaca"


class ChatTemplate(Model):
    """How a conversation becomes text. Default: the tokenizer's own template."""

    preset: ChatTemplatePreset | None = Field(default=None, description="One that comes with the trainer.")
    jinja: str | None = Field(
        default=None,
        min_length=1,
        max_length=16384,
        description="A template of your own, in the sandboxed Jinja of transformers; {% generation %} marks answers.",
    )
    kwargs: dict[str, Annotated[str, Field(max_length=1000)]] | None = Field(
        default=None,
        max_length=16,
        description="Values that the template is given by name, as text, 'true' or 'false'.",
    )

    @model_validator(mode="after")
    def _one_template(self) -> Self:
        if self.preset is not None and self.jinja is not None:
            msg = "model.chatTemplate: preset and jinja are alternatives, set one"
            raise ValueError(msg)
        return self


class Tokens(Model):
    """Special tokens of the tokenizer."""

    pad: TokenText | None = Field(default=None, description="Token to pad with; it must be known or added.")
    eos: TokenText | None = Field(default=None, description="Token that ends an answer; it must be known or added.")
    add: tuple[TokenText, ...] | None = Field(
        default=None, min_length=1, max_length=256, description="New tokens. Of the embeddings only their rows train."
    )


class BaseModelSource(Source):
    """The base model: exactly one source."""

    volume: VolumeSource | None = Field(
        default=None,
        description="A folder with config, tokenizer and safetensors, or one GGUF file (converted once).",
    )
    adapter: Source | None = Field(default=None, description="An adapter (PEFT) to go on from, of any source.")
    attention: Attention | None = Field(
        default=None,
        description="Auto: FlashAttention2 on a GPU where it is installed, else SDPA. Default Auto.",
    )
    chat_template: ChatTemplate | None = Field(default=None, description="How a conversation becomes text.")
    tokens: Tokens | None = Field(default=None, description="Special tokens.")
    trust_remote_code: bool | None = Field(
        default=None,
        description="Run Python code that the model brings. Needs the administrator's consent, and a hub's revision "
        "must be a commit. Default false.",
    )

    @model_validator(mode="after")
    def _code_is_pinned(self) -> Self:
        hub = self.hugging_face or self.model_scope
        if self.trust_remote_code and hub is not None and not re.match(COMMIT_PATTERN, hub.revision):
            msg = "model.trustRemoteCode needs a revision that is a commit (40 hexadecimal digits)"
            raise ValueError(msg)
        return self
