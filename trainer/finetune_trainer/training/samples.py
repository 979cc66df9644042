"""A few answers before and after training, for people: `report/samples.json` and the log."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, TypeVar

from finetune_trainer.evaluate import PairRow, evaluating
from finetune_trainer.runtime.work import write_report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from finetune_trainer.evaluate import TokenRow

log = logging.getLogger(__name__)

Row = TypeVar("Row")

SAMPLES_NAME = "samples.json"
SAMPLES = 4
NEW_TOKENS = 32
SHOWN_CHARACTERS = 400
BEGINNING, BEGINNING_TOKENS = 3, 64
"""Of a text without a prompt: a third of it, at most so many tokens."""


def generate(
    model: Any,  # noqa: ANN401 - a transformers model
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    prompts: Sequence[Sequence[int]],
    poll: Callable[[int, int], None],
    new_tokens: int = NEW_TOKENS,
) -> list[str]:
    """Greedy answers to tokenized prompts, written side by side: as many passes through the model as for one.

    Shorter prompts are padded on the left, which no token of theirs sees. `poll(0, answers in all)` is called before
    each token and may raise.
    """
    import torch  # noqa: PLC0415 - slow

    def polled(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # noqa: ANN401 - transformers' signature
        poll(0, len(prompts))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    if not prompts:
        return []
    end = tokenizer.eos_token_id
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    longest = max(map(len, prompts))
    ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with evaluating(model):
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=end,
            stopping_criteria=[polled],
            pad_token_id=padding,
        )
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, longest:]]


def choose_prompts(rows: Sequence[TokenRow | PairRow], count: int = SAMPLES) -> list[list[int]]:
    """Prompts of held-out rows, spread over them; of a text that is learned whole, its beginning."""
    return [_prompt(row) for row in _spread(rows, count)]


def choose_answers(rows: Sequence[TokenRow | PairRow], count: int = SAMPLES) -> list[list[int]]:
    """How those rows themselves go on after their prompts; of a pair, with the better answer."""
    chosen = [row.chosen if isinstance(row, PairRow) else row for row in _spread(rows, count)]
    return [list(row.input_ids[len(_prompt(row)) :]) for row in chosen]


def _spread(rows: Sequence[Row], count: int) -> Sequence[Row]:
    """So many rows, evenly apart."""
    return rows[:: max(1, len(rows) // count)][:count]


def _prompt(row: TokenRow | PairRow) -> list[int]:
    if isinstance(row, PairRow) or len(row.prompt) > 1:
        return list(row.prompt)
    return list(row.input_ids[: max(1, min(len(row.input_ids) // BEGINNING, BEGINNING_TOKENS))])


def write(
    path: Path,
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    rows: Sequence[TokenRow | PairRow],
    before: Sequence[str],
    after: Sequence[str],
) -> None:
    """Leave the prompts chosen of the rows and their answers as JSON, and show them in the log."""

    def text(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    records = [
        {"prompt": text(prompt), "before": was, "after": now, "expected": text(answer)}
        for prompt, was, now, answer in zip(choose_prompts(rows), before, after, choose_answers(rows), strict=True)
    ]
    write_report(path, json.dumps(records, ensure_ascii=False, indent=1) + "\n")
    for record in records:
        for name, told in record.items():
            log.info("%-8s %s", name, told[:SHOWN_CHARACTERS].replace("\n", " "))
