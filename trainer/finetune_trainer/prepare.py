"""The prepare stage: the model fetched and checked, the rows tokenized, every open setting fixed.

Leaves `model/`, `data/` (whose manifest is the stage's proof) and `report/preview.jsonl`. Later stages read these and
never go back to the sources.
"""

from __future__ import annotations

import hashlib
import logging
from typing import TYPE_CHECKING

from finetune_trainer import data, manifest, resolve
from finetune_trainer.fetch import fetch_model, reusable, revision
from finetune_trainer.manifest import Manifest, Result
from finetune_trainer.model import describe, load_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_trainer.config import JobConfig
    from finetune_trainer.context import Context
    from finetune_trainer.progress import DataFacts, Resolved

log = logging.getLogger(__name__)


def run(config: JobConfig, context: Context) -> Manifest:
    """Prepare the job; the manifest of `data/`."""
    data.check_first_rows(config, context)
    fetched, model_folder = fetch_model(config, context), context.work.model
    target = context.goal.with_inputs(model=fetched.digest)
    if (found := reusable(target, context)) is not None:
        return found
    context.report.begin("reading the model's config and tokenizer")
    facts, tokenizer = describe(model_folder), load_tokenizer(model_folder)
    resolve.check_early(config, facts)
    log.info("model: %s, %s parameters", facts.architecture, f"{facts.parameters:,}")

    def build(folder: Path) -> Result:
        max_length = resolve.resolve_max_length(config, facts)
        prepared = data.prepare_data(config, context, tokenizer, max_length, folder)
        sources = resolve.SourceFacts(fetched.digest, revision(model_folder), _digest_of_rows(folder))
        resolved = resolve.resolve(config, sources, facts, prepared.facts)
        data.write_preview(folder, tokenizer, context.work.report / data.PREVIEW_NAME)
        message = " ".join([_summary(prepared.facts, resolved), *prepared.remarks])
        return Result(message=message, resolved=resolved, data=prepared.facts)

    return manifest.publish(target, context.attempt, build)


def _digest_of_rows(folder: Path) -> str:
    """One digest of the rows trained and measured on."""
    digests = [manifest.sha256_of_file(folder / f"{split}.parquet") for split in (data.TRAIN, data.EVAL)]
    return "sha256:" + hashlib.sha256("".join(digests).encode()).hexdigest()


def _summary(facts: DataFacts, resolved: Resolved) -> str:
    """What is going to happen, in a sentence."""
    return (
        f"{facts.train_rows:,} rows to train on ({facts.train_tokens:,} tokens, {facts.loss_tokens:,} of them in the "
        f"loss; {facts.length_p50:,} a row, at most {facts.length_max:,}), {facts.eval_rows:,} held out: "
        f"{resolved.total_steps:,} steps of {resolved.global_batch_size:,} rows."
    )
