"""A small training, set up by hand: the pieces of the train stage without its command line."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from transformers import TrainerCallback

from finetune_trainer.data.tokenized import INPUT_IDS, LENGTHS, LOSS_MASK, REJECTED_IDS, REJECTED_MASK
from finetune_trainer.evaluate import IGNORED, PairRow, TokenRow
from finetune_trainer.models.folder import load_tokenizer
from finetune_trainer.models.loading import compute_dtype, load_base, set_up_torch
from finetune_trainer.progress import Resolved, ResolvedLora, ResolvedParallelism, Stage
from finetune_trainer.runtime import distributed, manifest
from finetune_trainer.runtime.context import Context
from finetune_trainer.runtime.manifest import Result, Target
from finetune_trainer.runtime.report import Report
from finetune_trainer.runtime.work import WorkFolder
from finetune_trainer.training import state
from finetune_trainer.training.checkpoint import Checkpoints
from finetune_trainer.training.tracking import Followers

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from finetune_trainer.training.loop import Loop

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CPU = torch.device("cpu")
SETTINGS = Resolved(
    model_digest="sha256:0",
    data_digest="sha256:0",
    architecture="LlamaForCausalLM",
    parameters=1,
    method="QLoRA",
    objective="SFT",
    max_length=64,
    packing=False,
    global_batch_size=4,
    micro_batch_size=2,
    gradient_accumulation_steps=2,
    total_steps=8,
    num_train_epochs=2.666667,
    learning_rate=0.01,
    lr_scheduler="Cosine",
    warmup_steps=1,
    weight_decay=0.01,
    max_grad_norm=1.0,
    optimizer="AdamW",
    adam_beta1=0.9,
    adam_beta2=0.999,
    compute_dtype="FP32",
    attention="SDPA",
    gradient_checkpointing="Off",
    base_format="NF4",
    double_quantization=True,
    lora=ResolvedLora(r=4, alpha=8, dropout=0.1, target_modules=LINEAR),
    shuffle=True,
    seed=7,
    logging_steps=1,
    eval_steps=3,
    checkpoint_steps=2,
    checkpoint_keep=3,
    restore_best=False,
    parallelism=ResolvedParallelism(num_nodes=1, gpus_per_node=0, world_size=1, strategy="Single"),
)
"""Ten rows, four a step in two micro-batches: an epoch is three steps, and its last step has two rows."""


def make_rows(count: int = 10, seed: int = 0) -> list[TokenRow]:
    """Rows of different lengths; the first three tokens are the prompt, the last is the end token, and it counts."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        ids = [*torch.randint(3, 300, (5 + 3 * index % 11,), generator=generator).tolist(), 1]
        rows.append(TokenRow(ids, [IGNORED] * 3 + ids[3:]))
    return rows


def make_table(rows: Sequence[TokenRow]) -> pa.Table:
    """The rows as `data.read_rows` gives them."""
    masks = [[label != IGNORED for label in row.labels] for row in rows]
    return pa.table(
        {INPUT_IDS: [list(row.input_ids) for row in rows], LOSS_MASK: masks},
        schema=pa.schema([(INPUT_IDS, pa.list_(pa.int32())), (LOSS_MASK, pa.list_(pa.bool_()))]),
    )


def make_packed_table(rows: Sequence[TokenRow]) -> pa.Table:
    """The rows, two to a sequence."""
    pairs = [rows[start : start + 2] for start in range(0, len(rows), 2)]
    together = [
        TokenRow([token for row in pair for token in row.input_ids], [label for row in pair for label in row.labels])
        for pair in pairs
    ]
    lengths = pa.array([[len(row.input_ids) for row in pair] for pair in pairs], pa.list_(pa.int32()))
    return make_table(together).append_column(LENGTHS, lengths)


def make_pairs(count: int = 10, seed: int = 0) -> list[PairRow]:
    """The rows of `make_rows`, each with another answer to its prompt that is the worse one."""
    pairs = []
    for chosen, other in zip(make_rows(count, seed), make_rows(count, seed + 100), strict=True):
        ids = [*chosen.input_ids[:3], *other.input_ids[3:]]
        pairs.append(PairRow(chosen, TokenRow(ids, [IGNORED] * 3 + ids[3:])))
    return pairs


def make_pair_table(pairs: Sequence[PairRow]) -> pa.Table:
    """The pairs as `data.read_rows` gives them."""
    chosen, rejected = make_table([pair.chosen for pair in pairs]), make_table([pair.rejected for pair in pairs])
    return chosen.append_column(REJECTED_IDS, rejected.column(INPUT_IDS)).append_column(
        REJECTED_MASK, rejected.column(LOSS_MASK)
    )


class CrashError(Exception):
    """What a lost machine looks like from inside."""


class CrashAfter(TrainerCallback):
    """Dies after a step, before anything else is done about it but what the loop did."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002 - Trainer's
        if state.global_step == self.step:
            raise CrashError


@dataclass
class Run:
    """One run in a work folder; each `go` is an attempt."""

    model: Path
    root: Path
    settings: Resolved = SETTINGS
    rows: int = 10
    attempt: int = 0
    followers: Followers = field(default_factory=lambda: Followers([]))
    loop: Loop = field(init=False)
    """Of the last attempt."""

    @property
    def checkpoints(self) -> Checkpoints:
        target = Target(Stage.TRAIN, self.root / "adapter", "adapter", "sha256:settings", {"data": "sha256:data"})
        return Checkpoints(self.root, target, self.attempt, self.settings.checkpoint_keep)

    def change(self, **settings: Any) -> Run:
        self.settings = replace_settings(self.settings, **settings)
        return self

    def context(self) -> Context:
        work, report = WorkFolder(self.root), Report(Stage.TRAIN, self.attempt, bar=False)
        prepared = Target(Stage.PREPARE, work.data, "data", "sha256:0")
        result = Result(message="prepared", resolved=self.settings)
        distributed.lead(lambda: manifest.publish(prepared, self.attempt, lambda _: result))
        return Context(work, self.root, self.root, self.attempt, report, self.checkpoints.run)

    def build(self) -> tuple[Any, Loop]:
        """Trainer and loop, on a freshly loaded base."""
        from finetune_trainer.training.adapters import go_on_from  # noqa: PLC0415 - slow
        from finetune_trainer.training.loop import Loop  # noqa: PLC0415 - slow
        from finetune_trainer.training.trainers import build_trainer  # noqa: PLC0415 - slow

        set_up_torch()
        held_out: Sequence[Any]
        dtype = compute_dtype(self.settings, CPU)
        base = go_on_from(load_base(self.model, self.settings, CPU, dtype), self.model)
        tokenizer = load_tokenizer(self.model)
        if self.settings.dpo is None:
            make = make_packed_table if self.settings.packing else make_table
            rows, held_out, reference = make(make_rows(self.rows)), make_rows(4, seed=9), None
        else:
            rows, held_out = make_pair_table(make_pairs(self.rows)), make_pairs(4, seed=9)
            reference = None if self.settings.lora else load_base(self.model, self.settings, CPU, dtype)
        trainer = build_trainer(base, tokenizer, rows, self.settings, dtype, self.root, reference)
        loop = Loop(trainer, self.settings, held_out, self.checkpoints, self.context(), self.followers)
        trainer.add_callback(loop)
        loop.begin(self.checkpoints.newest_good())
        return trainer, loop

    def go(self, *callbacks: Any) -> dict[str, torch.Tensor]:
        """Train from the newest good checkpoint to the end, and return the tensors that would be published."""
        self.attempt += 1
        trainer, self.loop = self.build()
        for callback in callbacks:
            trainer.add_callback(callback)
        if not self.loop.finished:
            start = self.checkpoints.newest_good()
            trainer.train(resume_from_checkpoint=None if start is None else str(start))
        self.loop.end()
        return weights(trainer.model)


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Copies of what was trained."""
    return {name: tensor.detach().clone() for name, tensor in state.trained(model)}


def replace_settings(settings: Resolved, **changes: Any) -> Resolved:
    """The settings with some changed; a dict changes parts of a block: lora={"dropout": 0.0}."""
    blocks = {
        name: getattr(settings, name).model_copy(update=change)
        for name, change in changes.items()
        if isinstance(change, dict)
    }
    return settings.model_copy(update=changes | blocks)


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether all tensors are equal bit by bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


__all__ = ["CPU", "LINEAR", "SETTINGS", "Run", "make_rows", "replace", "replace_settings", "same_bits", "weights"]
