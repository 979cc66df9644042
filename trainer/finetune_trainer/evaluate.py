"""finetune-trainer evaluate --config job.json --work DIR: measure every artifact that is there on the held-out rows.

The measures are deterministic: rows sorted by length, batches of a bounded number of tokens, sums in float64. The
stages use the same functions, so that a figure in a status and one printed here are the same.

    loss        mean negative log-likelihood of the tokens that count, nats a token
    KL          mean over those tokens of sum p (log p - log q), p of the reference, nats a token
    top-1       share of those tokens whose first choice is the same
"""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from finetune_trainer.data.tokenized import EVAL, INPUT_IDS, LOSS_MASK, REJECTED_IDS, REJECTED_MASK, read_rows
from finetune_trainer.models.finished import load_quantized
from finetune_trainer.models.loading import (
    MEASURED_TOKENS,
    compute_dtype,
    load_base,
    load_finished,
    put_adapter,
    set_up_torch,
    training_device,
)
from finetune_trainer.models.sharding import reshard
from finetune_trainer.progress import Measured, Resolved
from finetune_trainer.runtime.distributed import rank, total, world_size
from finetune_trainer.runtime.errors import NotFound
from finetune_trainer.runtime.work import write_report

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import pyarrow as pa
    import torch
    from numpy.typing import NDArray

    from finetune_trainer.config import JobConfig
    from finetune_trainer.runtime.context import Context

Row = TypeVar("Row")

IGNORED = -100
"""The label of a token that does not count, as torch's cross-entropy has it."""
FINISHED = {True: "merged", False: "model"}
"""What the finished 16-bit model is called: an adapter merged, or the model itself trained."""


@dataclass(frozen=True)
class TokenRow:
    """A row as prepare left it."""

    input_ids: Sequence[int] | NDArray[np.int64]
    labels: Sequence[int] | NDArray[np.int64]
    """The same tokens; IGNORED where a token does not count in the loss."""

    @property
    def prompt(self) -> Sequence[int] | NDArray[np.int64]:
        """What stands before the first token to learn."""
        return self.input_ids[: next(i for i, label in enumerate(self.labels) if label != IGNORED)]

    @property
    def width(self) -> int:
        """Tokens that it takes in a batch without padding."""
        return len(self.input_ids)


@dataclass(frozen=True)
class PairRow:
    """Two answers to one prompt, as prepare left them."""

    chosen: TokenRow
    """Prompt and better answer; of the tokens only the answer's count."""
    rejected: TokenRow

    @property
    def prompt(self) -> Sequence[int] | NDArray[np.int64]:
        """What both answers answer."""
        return self.chosen.prompt

    @property
    def width(self) -> int:
        """Tokens that it takes in a batch: two rows, padded to the longer one."""
        return 2 * max(self.chosen.width, self.rejected.width)


class LazyRows(Sequence[Row]):
    """Rows that stay in arrow's buffers, where they cost their bytes, and become numbers one at a time."""

    def __init__(self, table: pa.Table, build: Callable[..., Row]) -> None:
        """`build` makes a row of its values in the table's columns, arrays each."""
        self._table, self._build = table, build

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        values = (column[index].values for column in self._table.columns)
        return self._build(*(value.to_numpy(zero_copy_only=False) for value in values))


Measurable = TypeVar("Measurable", TokenRow, PairRow)


@dataclass(frozen=True)
class HeldOut:
    """What a model in training is worth on the held-out rows."""

    loss: float
    """Of the objective: nats a token; DPO: its loss, a pair."""
    preference_accuracy: float | None = None
    """DPO: share of pairs whose better answer gained more on the reference than the other, 0 to 1."""
    reward_margin: float | None = None
    """DPO: mean of beta x (gain of the better answer - gain of the other), in nats."""


LARGEST_LOSS = 700.0
"""Nats a token: exp of more is infinite in float64."""


@dataclass(frozen=True)
class Comparison:
    """A candidate against a reference, on the same tokens."""

    reference_loss: float
    loss: float
    kl: float
    top1: float

    def measured(self) -> Measured:
        """The figures of the candidate."""
        increase = math.expm1(min(self.loss - self.reference_loss, LARGEST_LOSS)) * 100
        return Measured(
            eval_loss=rounded(self.loss),
            perplexity=perplexity(self.loss),
            kl_divergence=rounded(max(self.kl, 0.0)),
            top1_agreement=rounded(self.top1),
            perplexity_increase_percent=rounded(increase),
            loss_increase=rounded(self.loss - self.reference_loss),
        )


def rounded(value: float) -> float:
    """Six digits: what a measure is worth, and the same text for the same figure."""
    return float(f"{value:.6g}")


def perplexity(loss: float) -> float:
    """Exp of a loss in nats a token; of a model that is far off at most e^700, which is still a number."""
    return rounded(math.exp(min(loss, LARGEST_LOSS)))


def read_token_rows(data: Path, split: str = EVAL) -> Sequence[TokenRow]:
    """The rows of `train` or `eval` that prepare left in `data`."""
    return LazyRows(read_rows(data, split).select([INPUT_IDS, LOSS_MASK]), token_row)


def token_row(ids: NDArray[np.int32], mask: NDArray[np.bool_]) -> TokenRow:
    """A row of its two columns."""
    wide = ids.astype(np.int64)
    return TokenRow(wide, np.where(mask, wide, IGNORED))


def read_pair_rows(data: Path, split: str = EVAL) -> Sequence[PairRow]:
    """The pairs of `train` or `eval` that prepare left in `data`."""
    columns = [INPUT_IDS, LOSS_MASK, REJECTED_IDS, REJECTED_MASK]
    return LazyRows(
        read_rows(data, split).select(columns),
        lambda ids, mask, other, other_mask: PairRow(token_row(ids, mask), token_row(other, other_mask)),
    )


def batches(rows: Sequence[Measurable], max_tokens: int = MEASURED_TOKENS) -> Iterator[list[Measurable]]:
    """Rows sorted by length, in batches of at most so many tokens, padding counted; a longer row goes alone."""
    batch: list[Measurable] = []
    for row in sorted(rows, key=attrgetter("width")):
        if batch and (len(batch) + 1) * row.width > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def pad(rows: Sequence[TokenRow]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """input_ids, attention_mask and labels [rows, longest], padded on the right.

    The filler is id 0 and its label IGNORED: what is masked depends on places, never on a token's id, so that an
    end token counts also where the model pads with it.
    """
    import torch  # noqa: PLC0415 - slow

    longest = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        ids[index, :length] = torch.tensor(row.input_ids)
        labels[index, :length] = torch.tensor(row.labels)
        mask[index, :length] = 1
    return ids, mask, labels


def measure_loss(model: Any, rows: Sequence[TokenRow], poll: Callable[[int, int], None] | None = None) -> float:  # noqa: ANN401 - a causal language model
    """Held-out loss, nats a token. `poll(rows done, rows in all)` is called before each batch and may raise."""
    import torch  # noqa: PLC0415 - slow

    loss, count = 0.0, 0
    with evaluating(model):
        for batch, counts in polled(rows, poll):
            logprobs, targets = _logprobs(model, batch)
            loss -= counts * float(logprobs.gather(-1, targets[:, None]).to(torch.float64).sum())
            count += counts * len(targets)
            del logprobs  # or they would be held beside the next ones
    loss, tokens = total([loss, count])
    return loss / max(tokens, 1)


def compare(
    reference: Any,  # noqa: ANN401 - a causal language model
    candidate: Any,  # noqa: ANN401 - a causal language model
    rows: Sequence[TokenRow],
    poll: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Loss of both, KL divergence and top-1 agreement of the candidate against the reference."""
    import torch  # noqa: PLC0415 - slow

    sums, count = [0.0] * 4, 0
    with evaluating(reference), evaluating(candidate):
        for batch, _ in polled(rows, poll):
            p, targets = _logprobs(reference, batch)
            q, _ = _logprobs(candidate, batch)
            q, targets = q.to(p.device), targets.to(p.device)
            terms = (
                -p.gather(-1, targets[:, None]),
                -q.gather(-1, targets[:, None]),
                torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1),
                p.argmax(-1) == q.argmax(-1),
            )
            sums = [known + float(term.to(torch.float64).sum()) for known, term in zip(sums, terms, strict=True)]
            count += len(targets)
            del p, q, terms  # or they would be held beside the next ones
    return Comparison(*(known / max(count, 1) for known in sums))


@contextmanager
def evaluating(model: Any) -> Iterator[None]:  # noqa: ANN401 - a torch module
    """Evaluation mode and no gradients; then training as it was."""
    import torch  # noqa: PLC0415 - slow

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        reshard(model)
        model.train(was_training)


def polled(
    rows: Sequence[Measurable], poll: Callable[[int, int], None] | None
) -> Iterator[tuple[list[Measurable], bool]]:
    """This rank's batches of the rows, and whether they count; `poll(rows done, rows in all)` before each.

    Every rank gets as many, since a sharded model computes on all of them at once: where batches run out, a rank
    keeps the others company with one that does not count.
    """
    everybodys, done = list(batches(rows)), 0
    for turn in range(0, len(everybodys), world_size()):
        if poll is not None:
            poll(done, len(rows))
        own = turn + rank()
        yield everybodys[min(own, len(everybodys) - 1)], own < len(everybodys)
        done += sum(map(len, everybodys[turn : turn + world_size()]))


def _logprobs(model: Any, rows: Sequence[TokenRow]) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401 - a causal language model
    """Log-probabilities [tokens that count, words], in fp32, and those tokens."""
    import torch  # noqa: PLC0415 - slow

    ids, mask, labels = (tensor.to(model.device) for tensor in pad(rows))
    logits, targets = logits_that_count(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    return torch.log_softmax(logits, dim=-1), targets


def logits_that_count(model: Any, inputs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ANN401 - a causal language model
    """Logits [tokens that count, words] in fp32, and those tokens. Differentiable.

    `inputs`: `input_ids`, `labels`, and what keeps rows apart. Logits are asked for from the first place that counts
    in any of the rows: prompts need none.
    """
    apart = {name: value for name, value in inputs.items() if name != "labels"}
    targets = inputs["labels"][:, 1:]
    places = (targets != IGNORED).any(0).nonzero()
    first = int(places[0]) if len(places) else targets.shape[1] - 1
    kept = targets.shape[1] - first + 1
    logits = model(**apart, **{"use_cache": False, **keeping(model, kept)}).logits[:, -kept:-1]
    counts = targets[:, first:] != IGNORED
    return logits[counts].float(), targets[:, first:][counts]


def keeping(model: Any, places: int) -> dict[str, int]:  # noqa: ANN401 - a causal language model
    """The argument that asks for logits at the last places only, where the model knows it."""
    import inspect  # noqa: PLC0415 - beside its use

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    known = inspect.signature(type(inner).forward).parameters
    return {"logits_to_keep": places} if "logits_to_keep" in known else {}


# The command


def run(config: JobConfig, context: Context) -> None:
    """Measure what is there, print a table, leave `report/evaluation.json`."""
    set_up_torch()
    rows = read_token_rows(context.work.data)
    if not rows:
        msg = (
            "Nothing is held out: set evaluation.percent or evaluation.datasets, and run prepare in a new work folder."
        )
        raise NotFound(msg)
    measured = dict(_measure_all(config, context, rows))
    told = json.dumps({name: _plain(each) for name, each in measured.items()}, indent=1) + "\n"
    write_report(context.work.report / "evaluation.json", told)
    print(table(measured))  # noqa: T201 - the command's outcome


def _plain(measured: Measured) -> dict[str, float]:
    return {name: value for name, value in measured.model_dump(by_alias=True).items() if value is not None}


def _measure_all(config: JobConfig, context: Context, rows: Sequence[TokenRow]) -> Iterator[tuple[str, Measured]]:
    device = training_device(config.gpus_per_node)
    for name, load in _models(config, context, device):
        context.report.begin(f"measuring {name}", len(rows), "rows")
        model = load()
        loss = measure_loss(model, rows, context.polled)
        yield name, Measured(eval_loss=rounded(loss), perplexity=perplexity(loss))
        del model
        gc.collect()


def _models(config: JobConfig, context: Context, device: torch.device) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything that can be measured, and how it is loaded: the base and the adapter as they were trained."""
    work, resolved = context.work, context.resolved
    dtype = compute_dtype(resolved, device)
    yield "base", lambda: load_base(work.model, resolved, device, dtype)
    if work.adapter.is_dir():
        yield "adapter", lambda: load_adapted(work.model, work.adapter, resolved, device, dtype)
    if work.merged.is_dir():
        yield FINISHED[config.trains_adapter], lambda: load_finished(work.merged, device, finished_dtype(device))
    for entry in config.quantize or ():
        if (folder := work.quantized(entry.name)).is_dir():
            yield entry.name, partial(load_quantized, folder, device)


def load_adapted(base: Path, adapter: Path, resolved: Resolved, device: torch.device, dtype: torch.dtype) -> Any:  # noqa: ANN401 - a causal language model
    """The adapter on the base as it was trained."""
    return put_adapter(load_base(base, resolved, device, dtype), adapter)


def finished_dtype(device: torch.device) -> torch.dtype:
    """What a finished model is measured in: fp32 on CPU, where 16 bits are slow; on a GPU in what it ships in."""
    import torch  # noqa: PLC0415 - slow

    return torch.float32 if device.type == "cpu" else torch.bfloat16


def table(measured: dict[str, Measured]) -> str:
    """The figures for people."""
    lines = [f"{'artifact':<12} {'held-out loss':>14} {'perplexity':>11}"]
    lines += [f"{name:<12} {each.eval_loss:>14.4f} {each.perplexity:>11.3f}" for name, each in measured.items()]
    return "\n".join(lines)
