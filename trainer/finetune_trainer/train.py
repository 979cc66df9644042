"""finetune-trainer train --config job.json --work DIR: train an adapter, or the model itself, and prove it.

TRL's trainers take the steps on rows that prepare tokenized. A run that was broken off goes on from its newest good
checkpoint, and ends with the very weights of an unbroken one (on CPU bit by bit).
"""

from __future__ import annotations

import importlib
import json
import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from finetune_trainer.data.tokenized import TRAIN, read_rows
from finetune_trainer.evaluate import perplexity, read_pair_rows, read_token_rows, rounded
from finetune_trainer.fast.build import keep_kernels
from finetune_trainer.models import census
from finetune_trainer.models.census import count_layers
from finetune_trainer.models.finished import write_finished
from finetune_trainer.models.folder import load_tokenizer
from finetune_trainer.models.loading import compute_dtype, load_base, refuse_broken_model, set_up_torch, training_device
from finetune_trainer.models.sharding import gather, is_to_shard
from finetune_trainer.progress import Measured, Resolved, TrainFacts
from finetune_trainer.runtime import distributed, manifest
from finetune_trainer.runtime.context import IMPORTING
from finetune_trainer.runtime.errors import InvalidDataset
from finetune_trainer.runtime.manifest import Made, Manifest, Result
from finetune_trainer.training import samples
from finetune_trainer.training.checkpoint import Checkpoints
from finetune_trainer.training.course import EVAL_ACCURACY, EVAL_LOSS, Line
from finetune_trainer.training.drill import read_drill
from finetune_trainer.training.tracking import following, unasked

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pyarrow as pa
    import torch

    from finetune_trainer.config import JobConfig
    from finetune_trainer.runtime.context import Context
    from finetune_trainer.training.exact import Exact
    from finetune_trainer.training.loop import Loop
    from finetune_trainer.training.tracking import Followers

log = logging.getLogger(__name__)

BEFORE_NAME = "before.json"
LAYERS_NAME = "layers.json"


@dataclass(frozen=True)
class Before:
    """What was measured before the first step; kept over a resume, never measured twice."""

    eval_loss: float | None
    answers: list[str]


@dataclass(frozen=True)
class Rows:
    """What is learned from, and what is measured on."""

    train: pa.Table
    """As `data.read_rows` gives them."""
    held_out: Sequence[Any]
    """TokenRow; for DPO PairRow."""
    prompts: list[list[int]]


def run(config: JobConfig, context: Context) -> Manifest:
    """Load the base and the rows, train from the newest good checkpoint, publish what was trained."""
    context.report.begin(IMPORTING)
    set_up_torch()
    keep_kernels(context.work)
    context.overrides.tell(context.prepared)
    drill = read_drill()
    resolved, device = context.resolved, training_device(config.gpus_per_node)
    _import_libraries(resolved)
    context.report.begin("looking for a checkpoint")
    checkpoints = _checkpoints(context, resolved)
    start = checkpoints.newest_good()
    context.report.begin("reading the rows")
    rows = _read_rows(context)
    tokenizer = load_tokenizer(context.work.tokenizer)
    trainer = _build_trainer(tokenizer, rows, device, context)
    trainer.drill = None if drill is None else partial(drill.strike, resolved=resolved)
    before = _measure_before(trainer, tokenizer, rows, context)
    layers = count_layers(trainer.model)
    log.info("%s", census.table(layers))
    figures: Line = {}
    with following(config.tracking, context, figures) as followers:
        loop = _take_steps(trainer, rows, checkpoints, start, context, followers)
        after = _answers("after", trainer, tokenizer, rows, context)
        if distributed.leads():
            with context.committing():
                path = context.work.report / samples.SAMPLES_NAME
                samples.write(path, tokenizer, rows.held_out, before.answers, after)
                census.write(context.work.report / LAYERS_NAME, layers, count_layers(trainer.model))
        result = _result(loop, before, resolved)
        figures.update(_figures(result))
    return _publish(trainer, tokenizer, result, context)


def _import_libraries(resolved: Resolved) -> None:
    """Import what trains at one go: piece by piece, its seconds would be told as loading and as setting up."""
    objective = "sft" if resolved.dpo is None else "dpo"
    with unasked():
        for name in ("trainers", objective, "loop"):
            importlib.import_module(f"finetune_trainer.training.{name}")


def _checkpoints(context: Context, resolved: Resolved) -> Checkpoints:
    return Checkpoints(context.work.root, context.goal, context.attempt, resolved.checkpoint_keep, context.report.beat)


def _read_rows(context: Context) -> Rows:
    train = read_rows(context.work.data, TRAIN)
    if not len(train):
        msg = "There is no row to train on. Run prepare again in a new work folder with rows that are not all held out."
        raise InvalidDataset(msg)
    read_held_out = read_token_rows if context.resolved.dpo is None else read_pair_rows
    held_out = read_held_out(context.work.data)
    return Rows(train, held_out, samples.choose_prompts(held_out))


def _measure_before(trainer: Exact, tokenizer: Any, rows: Rows, context: Context) -> Before:  # noqa: ANN401 - a transformers tokenizer
    """Held-out loss and answers of what training begins with, measured once in the life of the run."""
    path, run = context.work.checkpoints / BEFORE_NAME, _run_of(context)
    known = distributed.lead(lambda: _read_before(path, run))
    if known is not None and len(known.answers) == len(rows.prompts):  # an older trainer asked fewer
        log.info("measured before the first step, in an earlier attempt: held-out loss %s", known.eval_loss)
        return known
    loss = None
    if rows.held_out:
        context.report.begin("measuring the base model", len(rows.held_out), "rows")
        loss = trainer.measure(rows.held_out, context.polled).loss
        if not math.isfinite(loss):
            refuse_broken_model(context)
        log.info("held-out loss before training: %.4f", loss)
    before = Before(loss, _answers("before", trainer, tokenizer, rows, context))
    distributed.lead(lambda: _write_before(path, before, run, context))
    return before


def _answers(when: str, trainer: Exact, tokenizer: Any, rows: Rows, context: Context) -> list[str]:  # noqa: ANN401 - a transformers tokenizer
    """Of rank 0, which has all of the model; of all together, where each has a part."""
    context.report.begin(f"writing answers {when} training", len(rows.prompts), "answers")

    def generate() -> list[str]:
        with context.naming_rank():
            write = partial(samples.generate, trainer.model, tokenizer, rows.prompts, context.polled)
            return trainer.beside_passes(write)

    return generate() if is_to_shard(context.resolved) else distributed.lead(generate)


def _write_before(path: Path, before: Before, run: dict[str, Any], context: Context) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial-{context.attempt}")
    aside.write_text(json.dumps({"run": run, "evalLoss": before.eval_loss, "answers": before.answers}), "utf-8")
    manifest.sync(aside)
    with context.committing():
        aside.replace(path)


def _run_of(context: Context) -> dict[str, Any]:
    """What the figures belong to: settings, rows and model."""
    target = _checkpoints(context, context.resolved).run
    return {"settings": target.config_digest, **target.inputs}


def _read_before(path: Path, run: dict[str, Any]) -> Before | None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return Before(known["evalLoss"], known["answers"]) if known["run"] == run else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _build_trainer(tokenizer: Any, rows: Rows, device: torch.device, context: Context) -> Exact:  # noqa: ANN401 - a transformers tokenizer
    """The base in memory, and TRL's trainer around it."""
    from finetune_trainer.training.adapters import go_on_from  # noqa: PLC0415 - brings peft, slow
    from finetune_trainer.training.trainers import build_trainer  # noqa: PLC0415 - brings trl, slow

    resolved, folder = context.resolved, context.work.model
    context.report.begin("loading the base model")
    dtype = compute_dtype(resolved, device)
    base = go_on_from(load_base(folder, resolved, device, dtype), folder)
    twice = resolved.dpo is not None and resolved.lora is None
    reference = load_base(folder, resolved, device, dtype) if twice else None
    context.report.begin("setting up the trainer")
    return build_trainer(base, tokenizer, rows.train, resolved, dtype, context.work.checkpoints, reference)


def _take_steps(  # noqa: PLR0913 - the pieces of a training
    trainer: Exact,
    rows: Rows,
    checkpoints: Checkpoints,
    start: Path | None,
    context: Context,
    followers: Followers,
) -> Loop:
    """Take the steps that are left, if any; the model has the weights to publish then."""
    from finetune_trainer.training.loop import Loop  # noqa: PLC0415 - brings transformers' trainer, slow

    loop = Loop(trainer, context.resolved, rows.held_out, checkpoints, context, followers)
    loop.begin(start)
    if not loop.finished:  # else broken off between the last step and what is published
        trainer.add_callback(loop)
        trainer.train(resume_from_checkpoint=None if start is None else str(start))
    loop.end()
    return loop


def _publish(trainer: Exact, tokenizer: Any, result: Result, context: Context) -> Manifest:  # noqa: ANN401 - a transformers tokenizer
    """What was trained: an adapter in PEFT's format, or a model that can be served; complete or absent."""
    from finetune_trainer.training.adapters import save_adapter  # noqa: PLC0415 - brings peft, slow

    weights = _gathered(trainer, context)

    def build(folder: Path) -> Result:
        context.report.begin("saving what was trained", unit="bytes")
        if context.resolved.lora is None:
            write_finished(trainer.model, folder, context.work.model, context.work.tokenizer, weights=weights)
        else:
            save_adapter(trainer.model, folder)
            _forget_machine(folder)
            tokenizer.save_pretrained(folder)
        return result

    return distributed.lead(lambda: context.publish(build))


def _gathered(trainer: Exact, context: Context) -> dict[str, torch.Tensor] | None:
    """Weights that were trained sharded, whole on rank 0; None where they are whole anyway, as adapters are."""
    import torch  # noqa: PLC0415 - slow

    if not is_to_shard(context.resolved) or context.resolved.lora is not None:
        return None
    context.report.begin("gathering what was trained")
    return gather(trainer.model, torch.bfloat16, context.report.beat)


def _forget_machine(folder: Path) -> None:
    """PEFT writes the base's path on this machine and a README: the base is `model/` of the same work folder."""
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["base_model_name_or_path"] = "../model"
    path.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").unlink(missing_ok=True)


def _result(loop: Loop, before: Before, resolved: Resolved) -> Result:
    facts, measured = loop.facts(), _measured(loop.published, before, resolved)
    steps = f"{facts.steps:,} of {resolved.total_steps:,}" if facts.stopped_early else f"{facts.steps:,}"
    name, kind = ("model", "Merged") if resolved.lora is None else ("adapter", "Adapter")
    early = ", until the held-out loss no longer fell" if facts.stopped_early else ""
    return Result(
        message=f"Trained {steps} steps{early}: {_told(loop.published, facts, before, resolved)}.",
        training=facts,
        artifact=Made(name=name, type=kind, measured=measured),
    )


def _measured(published: Line | None, before: Before, resolved: Resolved) -> Measured | None:
    """The figures of the weights that are published."""
    if published is None or before.eval_loss is None:
        return None
    loss, accuracy = published[EVAL_LOSS], published.get(EVAL_ACCURACY)
    return Measured(
        eval_loss=rounded(loss),
        eval_loss_base=rounded(before.eval_loss),
        perplexity=perplexity(loss) if resolved.dpo is None else None,
        preference_accuracy=None if accuracy is None else rounded(accuracy),
    )


def _told(published: Line | None, facts: TrainFacts, before: Before, resolved: Resolved) -> str:
    if published is None or before.eval_loss is None:
        return "nothing was held out"
    told = f"held-out loss {before.eval_loss:.4f} before, {published[EVAL_LOSS]:.4f} after"
    if not resolved.restore_best:
        return told
    told += f", with the weights of step {published['step']:,}"
    lost = published["step"] != facts.best_step
    return told + (f" (the checkpoint of step {facts.best_step:,}, which was better, is damaged)" if lost else "")


def _figures(result: Result) -> Line:
    """What was measured, for those who followed the run."""
    measured = result.artifact.measured if result.artifact else None
    figures = {} if measured is None else measured.model_dump(exclude_none=True)
    return {f"final/{name}": value for name, value in figures.items()}
