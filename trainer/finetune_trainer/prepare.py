"""The prepare stage: the model fetched and checked, the rows tokenized, every open setting fixed.

Leaves `model/`, maybe `original/` (merge.original), `data/` (whose manifest is the stage's proof) and
`report/preview.jsonl`. Later stages read these and never go back to the sources.
"""

from __future__ import annotations

import hashlib
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from finetune_trainer import ingest
from finetune_trainer.config import HuggingFaceSource, LossOn, ModelScopeSource, Training
from finetune_trainer.data import pack, tokenized, tokens
from finetune_trainer.data.render import Renderer
from finetune_trainer.fetch import fetch_models, reusable, revision
from finetune_trainer.models.folder import describe, load_tokenizer
from finetune_trainer.publishing import check_credentials
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.manifest import Manifest, Result
from finetune_trainer.runtime.memory import gib
from finetune_trainer.settings import resolve
from finetune_trainer.settings.estimate import why_none
from finetune_trainer.settings.fit import Job, fit
from finetune_trainer.settings.outcome import check_gguf, check_original
from finetune_trainer.sources import fetch_source, forget

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from finetune_trainer.config import BaseModelSource, JobConfig
    from finetune_trainer.models.folder import ModelFacts
    from finetune_trainer.progress import DataFacts, Estimate, Resolved
    from finetune_trainer.runtime.context import Context

log = logging.getLogger(__name__)


def run(config: JobConfig, context: Context) -> Manifest:
    """Prepare the job; the manifest of `data/`."""
    check_credentials(config, context)
    datasets, revisions = _open_datasets(config, context)
    firsts = ingest.first_rows(datasets, config)
    fetched, model_folder, original = fetch_models(config, context), context.work.model, context.work.original
    target = context.goal.with_inputs(**{name: each.digest for name, each in fetched.items()})
    if (found := reusable(target, context)) is not None:
        return found
    context.report.begin("reading the model's config and tokenizer")
    facts, tokenizer = describe(model_folder), load_tokenizer(model_folder)
    resolve.check_early(config, facts)
    if "original" in fetched:
        check_original(facts, describe(original), tokenizer.get_vocab(), load_tokenizer(original).get_vocab())
    pack.check_packing(config, facts.architecture)
    added_tokens = tokens.shape_tokenizer(tokenizer, config.model)
    check_gguf(config, model_folder, tokenizer)
    renderer = _build_renderer(config, tokenizer)
    if any(renderer.uses_template(row) for row in firsts) and renderer.has_template:
        tokens.check_trained(config, model_folder, tokenizer, renderer.template_kwargs)
    log.info("model: %s, %s parameters", facts.architecture, f"{facts.parameters:,}")

    def build(folder: Path) -> Result:
        max_length = resolve.resolve_max_length(config, facts)
        packs = partial(_packs, config, facts)
        prepared = ingest.prepare_data(config, datasets, renderer, max_length, packs, folder, context)
        sources = resolve.SourceFacts(
            fetched["model"].digest, revision(model_folder), _digest_of_rows(folder), revisions
        )
        resolved = resolve.resolve(config, sources, facts, prepared.facts, added_tokens)
        resolved, needed = fit(Job(config, facts, prepared.facts), resolved)
        if resolved.plain_because is not None:
            log.info("the fast path is not taken: %s", resolved.plain_because)
        tokens.check_embedded(tokenizer, prepared.highest_token, facts.vocabulary, added_tokens)
        tokenizer.save_pretrained(folder / context.work.tokenizer.name)
        with context.committing():
            tokenized.write_preview(folder, tokenizer, context.work.report / tokenized.PREVIEW_NAME)
        on_memory = _on_memory(needed, why_none(facts, resolved)) if config.gpus_per_node else ()
        remarks = (*on_memory, *_on_another_base(config.model, facts), *prepared.remarks)
        message = " ".join([_summary(prepared.facts, resolved), *remarks])
        return Result(message=message, resolved=resolved, data=prepared.facts, estimate=needed)

    made = manifest.publish(target, context.attempt, build, context.report.bytes_progress)
    forget(context)
    return made


def _open_datasets(config: JobConfig, context: Context) -> tuple[ingest.Datasets, tuple[str, ...]]:
    """The datasets where their sources brought them, and the commits of those that could move."""
    fetched, revisions = {}, []
    for slot, (name, dataset) in ingest.named_datasets(config).items():
        found = fetch_source(slot, f"dataset '{name}'", dataset, context)
        fetched[slot] = found.path
        if found.revision is not None:
            revisions.append(f"{name}@{found.revision}")
    return ingest.open_datasets(config, fetched), tuple(revisions)


def _on_memory(needed: Estimate | None, unknown: str | None) -> Iterator[str]:
    """What a GPU is expected to be asked for, or why nobody can tell."""
    if needed is None:
        yield f"There is no estimate of GPU memory: {unknown}."
        return
    has = needed.gpu_memory_bytes
    of = "" if has is None else f" of {gib(has)}"
    checkpointing = needed.gradient_checkpointing.lower()
    told = f"A GPU needs about {gib(needed.total_bytes)}{of}: micro-batch {needed.micro_batch_size}, checkpointing "
    short = has is not None and needed.total_bytes > has
    beside = "" if needed.host_bytes is None else f", and {gib(needed.host_bytes)} of host memory"
    yield f"{told}{checkpointing}{beside}." + (" It may run out." if short else "")


def _on_another_base(source: BaseModelSource, facts: ModelFacts) -> Iterator[str]:
    """A remark where the adapter to go on from names another model than the repository given. Names are but a hint."""
    kind, named = source.kind, str((facts.adapter or {}).get("base_model_name_or_path") or "")
    if not isinstance(kind, HuggingFaceSource | ModelScopeSource) or not named or named.startswith((".", "/")):
        return
    if named.rpartition("/")[2].lower() != kind.repo.rpartition("/")[2].lower():  # mirrors have other owners
        yield f"model.adapter says that it was trained on {named}, the model is {kind.repo}: see that this is meant."


def _build_renderer(config: JobConfig, tokenizer: Any) -> Renderer:  # noqa: ANN401 - any of transformers' tokenizers
    sft, template = config.objective and config.objective.sft, config.model.chat_template
    loss_on = (sft and sft.loss_on) or LossOn.AUTO
    return Renderer(tokenizer, loss_on, tokens.template_kwargs(template.kwargs if template else None))


def _packs(config: JobConfig, model: ModelFacts, sequences: int) -> bool:
    """Whether rows that make so many sequences are packed."""
    global_batch, _ = resolve.resolve_batch(config)
    steps, _ = resolve.resolve_length(config.training or Training(), sequences, global_batch)
    return pack.resolve_packing(config, model.architecture, steps)


def _digest_of_rows(folder: Path) -> str:
    """One digest of the rows trained and measured on."""
    digests = [manifest.sha256_of_file(folder / f"{split}.parquet") for split in (tokenized.TRAIN, tokenized.EVAL)]
    return "sha256:" + hashlib.sha256("".join(digests).encode()).hexdigest()


def _summary(facts: DataFacts, resolved: Resolved) -> str:
    """What is going to happen, in a sentence."""
    return (
        f"{facts.train_rows:,} rows to train on ({facts.train_tokens:,} tokens, {facts.loss_tokens:,} of them in the "
        f"loss; {facts.length_p50:,} a row, at most {facts.length_max:,}), {facts.eval_rows:,} held out: "
        f"{resolved.total_steps:,} steps of {resolved.global_batch_size:,} {_unit(facts)}."
    )


def _unit(facts: DataFacts) -> str:
    """What a step takes so many of."""
    return "rows" if facts.packed_rows is None else f"sequences, of {facts.packed_rows:,} that the rows are packed into"
