"""finetune-trainer estimate --config job.json [--model config.json]: what a GPU must have, told without one.

The model's shapes are taken from its config alone, no weights are read. Rows are taken to be as long as
training.maxLength allows; prepare, which has read them, goes by the longest there is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from finetune_trainer.config import GradientCheckpointing
from finetune_trainer.data.pack import resolve_packing
from finetune_trainer.models.folder import CONFIG, describe_config
from finetune_trainer.progress import DataFacts, Estimate
from finetune_trainer.runtime.errors import InvalidConfig, NotFound
from finetune_trainer.settings import resolve
from finetune_trainer.settings.estimate import why_none
from finetune_trainer.settings.fit import Job, choices_of, fit
from finetune_trainer.settings.layout import KNOWN
from finetune_trainer.sources import fetch_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from finetune_trainer.config import JobConfig
    from finetune_trainer.models.folder import ModelFacts
    from finetune_trainer.progress import Resolved
    from finetune_trainer.runtime.context import Context

Way: TypeAlias = "tuple[str, bool]"
"""Checkpointing, and whether what can wait lies in host memory."""
STEPS = 1000
"""A run so long that neither warm-up nor packing is that of a trial."""


def run(config: JobConfig, context: Context, model: Path | None) -> str:
    """The tables. InvalidConfig, also of models that are not known; OutOfMemory where no setting fits."""
    if not config.gpus_per_node:
        msg = "parallelism.gpusPerNode is 0: there is no GPU to estimate for. Set it to 1 or more, or leave it unset."
        raise InvalidConfig(msg)
    facts = describe_config(find_config(config, context, model).parent)
    resolve.check_early(config, facts)
    data = expect_rows(config, facts)
    settings = resolve.resolve(config, resolve.SourceFacts("", None, ""), facts, data)
    if (why := why_none(facts, settings)) is not None:
        msg = f"There is no estimate: {why}. Known are {', '.join(sorted(KNOWN))}, without DoRA."
        raise InvalidConfig(msg)
    job = Job(config, facts, data)
    chosen, _ = fit(job, settings)
    return "\n".join([*_table(job, chosen), "", *_choices(job, settings, chosen)])


def find_config(config: JobConfig, context: Context, model: Path | None) -> Path:
    """The model's config.json: as named, else that of the job's source. NotFound and what fetching raises."""
    if model is None:
        return fetch_file("model", "model", config.model, CONFIG, context)
    path = model / CONFIG if model.is_dir() else model
    if path.name != CONFIG or not path.is_file():
        msg = f"--model {model} is no {CONFIG}. Give the model's {CONFIG}, or a folder that has it."
        raise NotFound(msg)
    return path


def expect_rows(config: JobConfig, model: ModelFacts) -> DataFacts:
    """Rows as long as may be, for a long run."""
    length, (batch, _) = resolve.resolve_max_length(config, model), resolve.resolve_batch(config)
    rows = STEPS * batch
    return DataFacts(
        train_rows=rows,
        eval_rows=1,
        dropped_rows=0,
        train_tokens=rows * length,
        loss_tokens=rows * length,
        length_p50=length,
        length_p95=length,
        length_p99=length,
        length_max=length,
        packed_rows=rows if resolve_packing(config, model.architecture, STEPS) else None,
    )


def _table(job: Job, chosen: Resolved) -> Iterator[str]:
    """What is trained, and each part of what it takes."""
    needed = job.needs(chosen)
    facts = job.model
    yield f"{facts.architecture}, {facts.parameters:,} parameters, {chosen.method} on a base in {chosen.base_format}"
    yield (
        f"computed in {chosen.compute_dtype}, {chosen.optimizer}, {chosen.parallelism.strategy} on "
        f"{chosen.parallelism.world_size} GPUs; micro-batch {needed.micro_batch_size} of {needed.length:,} tokens"
        f"{', packed' if chosen.packing else ''}, checkpointing {needed.gradient_checkpointing}"
        f"{', fast path' if chosen.fast_path else ''}{', offload' if chosen.offloads else ''}"
    )
    yield ""
    for name, field in Estimate.model_fields.items():
        if name.endswith("_bytes") and (size := getattr(needed, name)) is not None:
            title = name.removesuffix("_bytes").replace("_", " ")
            yield f"{title:<12} {_gib(size):>12}   {field.description}"


def _choices(job: Job, settings: Resolved, chosen: Resolved) -> Iterator[str]:
    """What the GPU must have with each micro-batch, checkpointing and offload that the config leaves open."""
    sizes: dict[int, dict[Way, int]] = {}
    for each in choices_of(job.config, settings):
        sizes.setdefault(each.micro_batch_size, {})[_way(each)] = job.needs(each).total_bytes
    known = ((way.value, offloads) for way in GradientCheckpointing for offloads in (False, True))
    ways = [way for way in known if any(way in found for found in sizes.values())]
    titles = (f"{way}, offload" if offloads else f"checkpointing {way}" for way, offloads in ways)
    yield f"{'micro-batch':<12} " + "".join(f"{title:>24}" for title in titles)
    for size in sorted(sizes):
        found = (f"{_gib(sizes[size][way]) + _mark(size, way, job, sizes[size][way], chosen):>24}" for way in ways)
        yield f"{size:<12} " + "".join(found)
    yield "* chosen, - too much" if job.memory_bytes is not None else "* taken; with pod.gpuMemory the GPU is filled"


def _way(resolved: Resolved) -> Way:
    return resolved.gradient_checkpointing, resolved.offloads


def _mark(size: int, way: Way, job: Job, needed_bytes: int, chosen: Resolved) -> str:
    if (size, way) == (chosen.micro_batch_size, _way(chosen)):
        return " *"
    return " -" if job.memory_bytes is not None and needed_bytes > job.memory_bytes else "  "


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.2f} GiB"
