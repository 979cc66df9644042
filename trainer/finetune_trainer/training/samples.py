"""A few answers before and after training, for people: `report/samples.json` and the log."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from finetune_trainer.evaluate import PairRow, evaluating
from finetune_trainer.runtime.work import write_report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from finetune_trainer.evaluate import TokenRow

log = logging.getLogger(__name__)

SAMPLES = 2
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
    """Greedy answers to tokenized prompts, one at a time, so that none depends on another's padding.

    `poll(answers done, answers in all)` is called before each token and may raise.
    """
    import torch  # noqa: PLC0415 - slow

    def polled(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # noqa: ANN401 - transformers' signature
        poll(len(answers), len(prompts))
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    answers: list[str] = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        with evaluating(model):
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=tokenizer.eos_token_id,
                stopping_criteria=[polled],
                pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            )
        answers.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return answers


def choose_prompts(rows: Sequence[TokenRow | PairRow], count: int = SAMPLES) -> list[list[int]]:
    """Prompts of held-out rows, spread over them; of a text that is learned whole, its beginning."""
    step = max(1, len(rows) // count)
    return [_prompt(row) for row in rows[::step][:count]]


def _prompt(row: TokenRow | PairRow) -> list[int]:
    if isinstance(row, PairRow) or len(row.prompt) > 1:
        return list(row.prompt)
    return list(row.input_ids[: max(1, min(len(row.input_ids) // BEGINNING, BEGINNING_TOKENS))])


def write(
    path: Path,
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    prompts: Sequence[Sequence[int]],
    before: Sequence[str],
    after: Sequence[str],
) -> None:
    """Leave them as JSON, and show them in the log."""
    records = [
        {"prompt": tokenizer.decode(list(prompt), skip_special_tokens=True).strip(), "before": was, "after": now}
        for prompt, was, now in zip(prompts, before, after, strict=True)
    ]
    write_report(path, json.dumps(records, ensure_ascii=False, indent=1) + "\n")
    for record in records:
        for name, text in record.items():
            log.info("%-6s %s", name, text[:SHOWN_CHARACTERS].replace("\n", " "))
