"""Datasets of a job: where rows come from, how they become text, what is held out."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, model_validator

from finetune_trainer.config.base import DEFAULT_SEED, SEED_LIMIT, Model, ShortName
from finetune_trainer.config.sources import DatasetSource

ROWS_LIMIT = 1_000_000_000
ColumnName = Annotated[str, Field(min_length=1, max_length=200)]
Template = Annotated[str, Field(min_length=1, max_length=16384)]


class DatasetFormat(StrEnum):
    """How a row becomes text."""

    AUTO = "Auto"
    TEXT = "Text"
    INSTRUCTION = "Instruction"
    PROMPT_COMPLETION = "PromptCompletion"
    CHAT = "Chat"
    QUESTION_ANSWER = "QuestionAnswer"
    PREFERENCE = "Preference"


def _column(description: str) -> ColumnName | None:
    value: ColumnName | None = Field(default=None, description=description)
    return value


class Columns(Model):
    """Names of the fields of a row. Which ones count depends on the format."""

    text: ColumnName | None = _column("Text: the whole text. Default text.")
    instruction: ColumnName | None = _column("Instruction: what is asked. Default instruction.")
    input: ColumnName | None = _column("Instruction: further input, may be missing. Default input or context.")
    output: ColumnName | None = _column("Instruction: the answer. Default output or response.")
    prompt: ColumnName | None = _column("PromptCompletion, Preference: what comes before. Default prompt.")
    completion: ColumnName | None = _column("PromptCompletion: what is learned. Default completion.")
    question: ColumnName | None = _column("QuestionAnswer: the question. Default question.")
    answer: ColumnName | None = _column("QuestionAnswer: the answer. Default answer.")
    context: ColumnName | None = _column("QuestionAnswer: text that the question is about. Default context, if there.")
    chosen: ColumnName | None = _column("Preference: the better answer. Default chosen.")
    rejected: ColumnName | None = _column("Preference: the worse answer. Default rejected.")
    messages: ColumnName | None = _column("Chat: the list of messages. Default messages or conversations.")
    role: ColumnName | None = _column("Chat: name of a message's role. Default role, or from (ShareGPT).")
    content: ColumnName | None = _column("Chat: name of a message's text. Default content, or value (ShareGPT).")
    tools: ColumnName | None = _column("Chat: the tools the assistant may call, may be missing. Default tools.")
    system: ColumnName | None = _column(
        "Instruction, QuestionAnswer, Chat: a system message, may be missing. Default system."
    )


class Dataset(DatasetSource):
    """Rows to learn from or to measure on."""

    name: ShortName | None = Field(default=None, description="Used in messages. Default: its index.")
    weight: float | None = Field(
        default=None,
        gt=0,
        le=1_000_000,
        description="Share of the rows drawn for an epoch, relative to the other datasets; an epoch is as long as the "
        "rows kept in all. Default 1 beside datasets with a weight; where none has one, every row once.",
    )
    max_rows: int | None = Field(
        default=None, ge=1, le=ROWS_LIMIT, description="At most so many rows, chosen by the seed. Default all."
    )
    format: DatasetFormat | None = Field(
        default=None,
        description="Auto (from the fields of the first row), Text, Instruction, PromptCompletion, Chat, "
        "QuestionAnswer or Preference. Default Auto.",
    )
    columns: Columns | None = Field(default=None, description="Names of the fields, where they are not the usual ones.")
    prompt_template: Template | None = Field(
        default=None,
        description="Sandboxed Jinja that makes the prompt from the row's fields; not learned unless lossOn says so.",
    )
    response_template: Template | None = Field(
        default=None,
        description="Sandboxed Jinja that makes the response; needs promptTemplate. Default the answer's field.",
    )

    special_tokens: bool | None = Field(
        default=None,
        description="Text: the rows hold a rendered template, so special tokens that they spell are such. "
        "Other formats refuse it. Default false: they are plain text, and come from templates alone.",
    )

    @model_validator(mode="after")
    def _special_tokens_are_read(self) -> Self:
        rendered = self.format in (None, DatasetFormat.AUTO, DatasetFormat.TEXT) and self.prompt_template is None
        if self.special_tokens is not None and not rendered:
            msg = "datasets: specialTokens is for format Text without a promptTemplate: drop it"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _response_needs_a_prompt(self) -> Self:
        if self.response_template is not None and self.prompt_template is None:
            msg = "datasets: responseTemplate needs a promptTemplate"
            raise ValueError(msg)
        return self


class Evaluation(Model):
    """What the loss is measured on: a share of the training rows, or datasets of their own."""

    percent: float | None = Field(
        default=None, ge=0, le=50, description="Share of the rows held out, in percent. 0: none. Default 5."
    )
    datasets: tuple[Dataset, ...] | None = Field(
        default=None, min_length=1, max_length=16, description="Rows that are never trained on."
    )
    max_rows: int | None = Field(default=None, ge=1, le=10_000_000, description="At most so many rows. Default 500.")
    seed: int | None = Field(
        default=None, ge=0, le=SEED_LIMIT, description=f"Seed of the choice of rows. Default {DEFAULT_SEED}."
    )

    @model_validator(mode="after")
    def _measured_rows_have_no_weight(self) -> Self:
        if any(dataset.weight is not None for dataset in self.datasets or ()):
            msg = "evaluation.datasets: weight is for rows to train on, every row is measured once"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _percent_or_datasets(self) -> Self:
        if self.percent is not None and self.datasets is not None:
            msg = "evaluation: percent and datasets are alternatives, set one"
            raise ValueError(msg)
        return self
