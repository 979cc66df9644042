"""finetune-trainer merge --config job.json --work DIR: the adapter merged into the dequantized base, and compared.

The adapter was trained on NF4 weights, so it is merged into those, widened: into the original weights it would be
another model (KL 0.28 on SmolLM2-135M), and merging into the 4-bit layers themselves quantizes again and loses nearly
all that was learned. What is written is loaded back and compared with the adapter on the same base.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
import shutil
from typing import TYPE_CHECKING, Any

from finetune_trainer.errors import VerificationFailed
from finetune_trainer.evaluate import COMPARED_ROWS, Comparison, TokenRow, compare, read_token_rows
from finetune_trainer.loading import import_peft, load_dequantized, load_finished, set_up_torch, working_device
from finetune_trainer.manifest import Made, Manifest, Result
from finetune_trainer.progress import Measured

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from finetune_trainer.config import JobConfig
    from finetune_trainer.context import Context

log = logging.getLogger(__name__)

MAX_KL = 2e-3
"""Nats a token. Rounding the merged weights to bf16 costs about 1e-4 (SmolLM2-135M); a merge that goes wrong (another
base, a lost scale, requantized layers) costs 0.03 and more. In between, nothing was seen."""
HELD_BYTES = 2 * 4
"""Bytes a parameter: two models in fp32, the reference and either its merged copy or what is loaded back."""
MAX_SHARD_SIZE = "5GB"


def run(_config: JobConfig, context: Context) -> Manifest:
    """Merge, write `merged/` in bf16, load it back, compare, publish."""
    set_up_torch()
    device = working_device(context.resolved.parameters * HELD_BYTES)
    rows = read_token_rows(context.work.data)[:COMPARED_ROWS]
    context.report.begin("dequantizing the base model")
    reference = load_reference(context, device)

    def build(folder: Path) -> Result:
        context.raise_if_stopping()
        context.report.begin("merging the adapter")
        write_merged(reference, folder)
        copy_companions(context, folder)
        return _prove(reference, folder, rows, context)

    return context.publish(build)


def load_reference(context: Context, device: torch.device) -> Any:  # noqa: ANN401 - a PEFT model
    """The adapter, unmerged, on the dequantized base in fp32: the model that was trained."""
    import torch  # noqa: PLC0415 - slow

    base = load_dequantized(context.work.model, context.resolved, device, torch.float32)
    return import_peft().PeftModel.from_pretrained(base, context.work.adapter).eval()


def write_merged(adapted: Any, folder: Path) -> None:  # noqa: ANN401 - a PEFT model
    """Merge a copy in fp32 (`safe_merge` refuses what is not finite) and save it in bf16, the dtype models ship in."""
    import torch  # noqa: PLC0415 - slow

    try:
        merged = copy.deepcopy(adapted).merge_and_unload(safe_merge=True).to(torch.bfloat16)
    except ValueError as error:
        msg = f"The merged weights are not finite: {error}. Train again with a lower training.learningRate."
        raise VerificationFailed(msg) from error
    merged.config.name_or_path = ""
    merged.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    del merged
    gc.collect()


def copy_companions(context: Context, folder: Path) -> None:
    """Tokenizer and chat template as trained with; the base's generation settings and licence."""
    for source, names in (
        (context.work.adapter, ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json")),
        (context.work.model, ("generation_config.json", "merges.txt", "vocab.*", "LICENSE*")),
    ):
        for name in names:
            for path in sorted(source.glob(name)):
                shutil.copyfile(path, folder / path.name)


def _prove(reference: Any, folder: Path, rows: list[TokenRow], context: Context) -> Result:  # noqa: ANN401 - a PEFT model
    """Load what was written and compare. VerificationFailed if it is not the model that was trained."""
    import torch  # noqa: PLC0415 - slow

    context.report.begin("loading the merged model back", len(rows), "rows")
    candidate = load_finished(folder, reference.device, torch.float32)
    if not rows:
        return Result(message="Merged; nothing was held out to compare on.", artifact=_made(None))
    context.report.begin("comparing with the adapter", len(rows), "rows")
    found = compare(reference, candidate, rows, context.polled)
    verify_same(found)
    message = f"Merged: KL {found.kl:.1e} nats a token from the adapter on its base, held-out loss {found.loss:.4f}."
    return Result(message=message, artifact=_made(found.measured()))


def _made(measured: Measured | None) -> Made:
    return Made(name="merged", type="Merged", measured=measured)


def verify_same(found: Comparison) -> None:
    """VerificationFailed unless the merged model is, within rounding, the one that was trained."""
    if math.isfinite(found.kl) and found.kl <= MAX_KL:
        return
    msg = (
        f"The merged model is not the one that was trained: KL {found.kl:.3g} nats a token (at most {MAX_KL:g}), "
        f"held-out loss {found.loss:.4f} instead of {found.reference_loss:.4f}. "
        "Keep the adapter and report this as a bug."
    )
    raise VerificationFailed(msg)
