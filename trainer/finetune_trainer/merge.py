"""finetune-trainer merge --config job.json --work DIR: the adapter merged into its base, and compared.

An adapter belongs to the weights that it was trained on. On a base that was quantized in training these are the
quantized ones, widened (Dequantized): into the original weights it is another model (KL 0.28 nats a token on
SmolLM2-135M), and merging into 4-bit layers themselves quantizes again and loses nearly all that was learned.

What is written is loaded back and compared with the adapter on the same weights. Merged into the original weights of
a quantized base, it is also compared with what was trained: that figure is told, and fails nothing.
"""

from __future__ import annotations

import copy
import gc
import logging
import math
from typing import TYPE_CHECKING, Any

from finetune_trainer.config import FLOATING, BaseFormat, MergeBase
from finetune_trainer.evaluate import Comparison, compare, load_adapted, put_adapter, read_token_rows
from finetune_trainer.models.finished import QUANTIZED_WEIGHT, write_finished
from finetune_trainer.models.loading import (
    extend_embeddings,
    load_base,
    load_dequantized,
    load_finished,
    set_up_torch,
    working_device,
)
from finetune_trainer.runtime.errors import InvalidConfig, VerificationFailed
from finetune_trainer.runtime.manifest import Made, Manifest, Result

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from finetune_trainer.config import JobConfig
    from finetune_trainer.evaluate import TokenRow
    from finetune_trainer.progress import Measured, Resolved, ResolvedMerge
    from finetune_trainer.runtime.context import Context

log = logging.getLogger(__name__)

MAX_KL = 2e-3
"""Nats a token. Rounding the merged weights to bf16 costs about 1e-4 (SmolLM2-135M); a merge that goes wrong (another
base, a lost scale, requantized layers) costs 0.03 and more. In between, nothing was seen."""
HELD_BYTES = 2 * 4
"""Bytes a parameter: two models in fp32, the reference and either its merged copy or what is loaded back."""


def run(config: JobConfig, context: Context) -> Manifest:
    """Merge, write `merged/`, load it back, compare, publish."""
    set_up_torch()
    resolved, settings = context.resolved, _settings(context.resolved)
    device = working_device(resolved.parameters * HELD_BYTES)
    base = _base_folder(config, context)
    rows = read_token_rows(context.work.data)

    def build(folder: Path) -> Result:
        found = merge(base, folder, rows, resolved, context, device)
        if found is None:
            return _result("Merged; nothing was held out to compare on.", None)
        where = "on the same weights"
        if settings.base == MergeBase.ORIGINAL and resolved.base_format not in FLOATING:
            found = compare_with_trained(folder, rows, resolved, context, device)
            where = f"on the {resolved.base_format} base that it was trained on"
        message = (
            f"Merged: KL {found.kl:.1e} nats a token from the adapter {where}, held-out loss {found.loss:.4f} "
            f"({found.loss - found.reference_loss:+.4f})."
        )
        return _result(message, found.measured())

    return context.publish(build)


def _result(message: str, measured: Measured | None) -> Result:
    return Result(message=message, artifact=Made(name="merged", type="Merged", measured=measured))


def _settings(resolved: Resolved) -> ResolvedMerge:
    if resolved.merge is None:
        msg = "merge was asked for after prepare ran. Use a new --work folder for this config."
        raise InvalidConfig(msg)
    return resolved.merge


def _base_folder(config: JobConfig, context: Context) -> Path:
    """The folder of the weights that the adapter is merged into."""
    original = config.merge is not None and config.merge.original is not None
    return context.work.original if original else context.work.model


def merge(  # noqa: PLR0913 - what goes in and out
    base: Path,
    folder: Path,
    rows: Sequence[TokenRow],
    resolved: Resolved,
    context: Context,
    device: torch.device,
) -> Comparison | None:
    """Write the merged model into `folder`, load it back and compare it with the adapter on the same weights.

    None where there are no rows to compare on. VerificationFailed if the merge changed the model.
    """
    import torch  # noqa: PLC0415 - slow

    context.raise_if_stopping()
    context.report.begin("loading the weights to merge into")
    reference = load_reference(base, context.work.adapter, resolved, device)
    context.report.begin("merging the adapter")
    write_merged(reference, folder, base, context.work.tokenizer, _settings(resolved))
    context.raise_if_stopping()
    context.report.begin("loading the merged model back")
    candidate = load_finished(folder, device, torch.float32)
    if not rows:
        return None
    context.report.begin("comparing with the adapter", len(rows), "rows")
    found = compare(reference, candidate, rows, context.polled)
    verify_same(found)
    return found


def load_reference(base: Path, adapter: Path, resolved: Resolved, device: torch.device) -> Any:  # noqa: ANN401 - a PEFT model
    """The adapter, unmerged, in fp32 on the weights that it is to be merged into."""
    import torch  # noqa: PLC0415 - slow

    dequantized = _settings(resolved).base == MergeBase.DEQUANTIZED
    if dequantized and resolved.base_format == BaseFormat.GPTQ:
        model = widen_gptq(load_base(base, resolved, device, torch.float32))
    elif dequantized:
        model = load_dequantized(base, resolved, device, torch.float32)
    else:
        model = load_finished(base, device, torch.float32)
        extend_embeddings(model, resolved.added_tokens)
    return put_adapter(model, adapter)


def widen_gptq(model: Any) -> Any:  # noqa: ANN401 - a causal language model
    """The model with plain linear layers in place of its GPTQ layers: the very weights that were trained on."""
    import torch  # noqa: PLC0415 - slow

    for name, layer in list(model.named_modules()):
        if hasattr(layer, QUANTIZED_WEIGHT):
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
            plain.weight = torch.nn.Parameter(layer.dequantize_weight().T.float().contiguous(), requires_grad=False)
            if layer.bias is not None:
                plain.bias = torch.nn.Parameter(layer.bias.float(), requires_grad=False)
            model.set_submodule(name, plain)
    model.hf_quantizer.remove_quantization_config(model)
    return model


def write_merged(adapted: Any, folder: Path, base: Path, tokenizer: Path, settings: ResolvedMerge) -> None:  # noqa: ANN401 - a PEFT model
    """Merge a copy in fp32 (`safe_merge` refuses what is not finite) and save it in the dtype that was asked for."""
    try:
        merged = copy.deepcopy(adapted).merge_and_unload(safe_merge=True)
    except ValueError as error:
        if "NaNs" not in str(error):
            raise
        msg = f"The merged weights are not finite: {error}. Train again with a lower training.learningRate."
        raise VerificationFailed(msg) from error
    write_finished(merged, folder, base, tokenizer, dtype=settings.dtype, max_shard_size=settings.max_shard_size)
    del merged
    gc.collect()


def compare_with_trained(
    folder: Path, rows: Sequence[TokenRow], resolved: Resolved, context: Context, device: torch.device
) -> Comparison:
    """How far the model merged into other weights is from the one that was trained: told, and no failure."""
    import torch  # noqa: PLC0415 - slow

    context.report.begin("loading what was trained")
    gc.collect()
    trained = load_adapted(context.work.model, context.work.adapter, resolved, device, torch.float32)
    candidate = load_finished(folder, device, torch.float32)
    context.report.begin("comparing with what was trained", len(rows), "rows")
    return compare(trained, candidate, rows, context.polled)


def verify_same(found: Comparison) -> None:
    """VerificationFailed unless the merged model is, within rounding, the adapter on the same weights."""
    if math.isfinite(found.kl) and found.kl <= MAX_KL:
        return
    msg = (
        f"The merged model is not the one that was trained: KL {found.kl:.3g} nats a token (at most {MAX_KL:g}), "
        f"held-out loss {found.loss:.4f} instead of {found.reference_loss:.4f}. "
        "Keep the adapter and report this as a bug."
    )
    raise VerificationFailed(msg)
