"""finetune-trainer merge --config job.json --work DIR: the adapter merged into its base, and compared.

An adapter belongs to the weights that it was trained on. On a base that was quantized in training these are the
quantized ones, widened (Dequantized): into the original weights it is another model (KL 0.28 nats a token on
SmolLM2-135M), though that may be the better one. Base Auto measures the adapter in both and takes the lower held-out
loss. Merging into 4-bit layers themselves quantizes again and loses nearly all that was learned.

What is written is loaded back and compared with the adapter on the same weights, and, merged into the original weights
of a quantized base, with what was trained. The figures are always told; they fail the stage where a gate asks for it.

The merge itself takes the memory of a part of the model (models/streaming.py), the comparison that of one model in
fp32: each is run over the rows and dropped before the next is loaded (models/recording.py).
"""

from __future__ import annotations

import gc
import logging
import math
import tempfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.config import FLOATING, BaseFormat, Merge, MergeBase, MergeDtype
from finetune_trainer.evaluate import Comparison, compare, measure_loss, read_token_rows, rounded
from finetune_trainer.models.finished import QUANTIZED_WEIGHT, cast, finish_folder, write_finished
from finetune_trainer.models.loading import (
    DTYPES,
    extend_embeddings,
    load_base,
    load_dequantized,
    load_finished,
    put_adapter,
    set_up_torch,
    working_device,
)
from finetune_trainer.models.sharding import build_empty
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.errors import GateFailed, InvalidConfig, VerificationFailed
from finetune_trainer.runtime.manifest import Made, Manifest, Result
from finetune_trainer.settings.outcome import choose_unmeasured

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from finetune_trainer.config import JobConfig
    from finetune_trainer.evaluate import TokenRow
    from finetune_trainer.progress import Measured, Resolved, ResolvedMerge
    from finetune_trainer.runtime.context import Context

log = logging.getLogger(__name__)

MAX_KL = 2e-3
"""Nats a token. Rounding weights that were widened to bf16 costs about 1e-4 (SmolLM2-135M); a merge that goes wrong
(another base, a lost scale, requantized layers) costs 0.03 and more. What is in between is looked at: `verify_same`."""
MAX_LOSS_DRIFT = 0.1
"""Nats a token, either way, between the held-out loss that ended the training and that of the adapter loaded back in
fp32. Computing in 16 bits moves it by 0.002, in bitsandbytes' 8 bits by 0.014 (SmolLM2-135M on CPU); an adapter ten
times too large by 0.35 after six steps of training (the model of the tests)."""
HELD_BYTES = 4
"""Bytes a parameter: one model in fp32."""


@dataclass(frozen=True)
class Reference:
    """The adapter, unmerged, on weights that it may be merged into. It has been run over the held-out rows, once."""

    model: Any
    loss: float
    """Held-out, nats a token."""


@dataclass(frozen=True)
class Merging:
    """What a merge is made from, and what is asked of it."""

    context: Context
    resolved: Resolved
    rows: Sequence[TokenRow]
    asked: Merge
    trained_loss: float | None = None
    """Held-out, nats a token, as training measured it at its end; None where it measured no such loss."""

    @property
    def settings(self) -> ResolvedMerge:
        """InvalidConfig if prepare knew of no merge."""
        if self.resolved.merge is None:
            msg = "merge was asked for after prepare ran. Use a new --work folder for this config."
            raise InvalidConfig(msg)
        return self.resolved.merge

    @property
    def trained_base(self) -> MergeBase:
        """The weights that the adapter was trained on."""
        return MergeBase.ORIGINAL if self.resolved.base_format in FLOATING else MergeBase.DEQUANTIZED

    @property
    def is_measured(self) -> bool:
        """Whether the held-out loss decides on the weights to merge into."""
        return bool(self.rows) and self.settings.base == MergeBase.AUTO

    def without_rounding(self) -> Merging:
        """The same, written in fp32."""
        settings = self.settings.model_copy(update={"dtype": MergeDtype.FP32})
        return replace(self, resolved=self.resolved.model_copy(update={"merge": settings}))

    def weights_of(self, base: MergeBase) -> Path:
        """The folder of the weights to merge into."""
        apart = base is MergeBase.ORIGINAL and self.asked.original is not None
        return self.context.work.original if apart else self.context.work.model

    def device(self, bytes_each: int) -> torch.device:
        """Where there is room for the model at so many bytes a parameter."""
        return working_device(self.resolved.parameters * bytes_each)


def run(config: JobConfig, context: Context) -> Manifest:
    """Choose the weights, merge into them, load back, compare, let the gates judge, publish `merged/`."""
    set_up_torch()
    rows, asked = read_token_rows(context.work.data), config.merge or Merge()
    merging = Merging(context, context.resolved, rows, asked, read_trained_loss(context))

    def build(folder: Path) -> Result:
        with tempfile.TemporaryDirectory(prefix=".reference-", dir=folder) as aside:
            return merge(merging, folder, Path(aside))

    return context.publish(build)


def read_trained_loss(context: Context) -> float | None:
    """What the adapter's manifest says of its held-out loss, nats a token; a loss of pairs (DPO) is none of tokens."""
    made = manifest.read(context.work.adapter).result.artifact
    if context.resolved.dpo is not None or made is None or made.measured is None:
        return None
    return made.measured.eval_loss


def merge(merging: Merging, folder: Path, aside: Path) -> Result:
    """Write the merged model into `folder`, and say what it is worth. `aside`: for what is needed meanwhile.

    VerificationFailed if the adapter is not the one that was trained or merging changed the model, GateFailed if a
    figure is worse than the job allows.
    """
    if not merging.rows:
        return merge_unmeasured(merging, folder)
    references = measure_references(merging, aside)
    verify_trained(references[merging.trained_base].loss, merging.trained_loss)
    losses = {base: reference.loss for base, reference in references.items()}
    base = choose_base(merging.settings, losses)
    write_merged(merging, base, folder)
    same, found = compare_merged(merging, base, folder, references)
    remark = verify_same(same, merging, base, aside)
    pass_gates(found, base, merging)
    measured = found.measured()
    if merging.is_measured:
        measured = measured.model_copy(update=_of_both(losses))
    return _result(_message(found, base, losses, merging) + remark, base, measured)


def _result(message: str, base: MergeBase, measured: Measured | None) -> Result:
    return Result(message=message, artifact=Made(name="merged", type="Merged", measured=measured, base=base.value))


def _of_both(losses: Mapping[MergeBase, float]) -> dict[str, float]:
    """Without what is no number, which no record can hold."""
    return {f"eval_loss_{base.value.lower()}": rounded(loss) for base, loss in losses.items() if math.isfinite(loss)}


def _message(found: Comparison, base: MergeBase, losses: Mapping[MergeBase, float], merging: Merging) -> str:
    """The figures for people."""
    where = "on the same weights"
    if base is not merging.trained_base:
        where = f"on the {merging.resolved.base_format} weights that it was trained on"
    told = (
        f"Merged into the {base.value.lower()} weights: KL {found.kl:.1e} nats a token from the adapter {where}, "
        f"held-out loss {found.loss:.4f} ({found.loss - found.reference_loss:+.4f})."
    )
    if merging.is_measured:
        told += (
            f" merge.base Auto took the lower held-out loss of the adapter: {losses[MergeBase.DEQUANTIZED]:.4f} in the "
            f"dequantized weights, {losses[MergeBase.ORIGINAL]:.4f} in the original ones."
        )
    return told


def merge_unmeasured(merging: Merging, folder: Path) -> Result:
    """Merge where nothing was held out to measure on: base Auto goes by the kind of the base."""
    import torch  # noqa: PLC0415 - slow

    settings, told = merging.settings, "Merged; nothing was held out to compare on."
    base = MergeBase(settings.base)
    if base is MergeBase.AUTO:
        base = choose_unmeasured(BaseFormat(merging.resolved.base_format), merging.asked)
        told = (
            f"Merged into the {base.value.lower()} weights, as merge.base Auto does with an "
            f"{merging.resolved.base_format} base where nothing was held out to measure on."
        )
    write_merged(merging, base, folder)
    merging.context.report.begin("loading the merged model back")
    load_finished(folder, torch.device("cpu"), getattr(torch, DTYPES[settings.dtype]))
    return _result(told, base, None)


# Which weights


def measure_references(merging: Merging, aside: Path) -> dict[MergeBase, Reference]:
    """The adapter on the weights that it was trained on, and on those that it may be merged into."""
    asked = MergeBase(merging.settings.base)
    both = (MergeBase.DEQUANTIZED, MergeBase.ORIGINAL)
    wanted = both if asked is MergeBase.AUTO else dict.fromkeys((merging.trained_base, asked))
    return {base: measure_reference(merging, base, aside / base.value) for base in wanted}


def measure_reference(merging: Merging, base: MergeBase, aside: Path) -> Reference:
    """Run the adapter on these weights, in fp32, over the held-out rows."""
    from finetune_trainer.models.recording import record  # noqa: PLC0415 - slow

    context = merging.context
    context.raise_if_stopping()
    context.report.begin(f"loading the adapter on the {base.value.lower()} weights")
    model = load_reference(merging, base)
    context.report.begin(f"measuring the adapter on the {base.value.lower()} weights", len(merging.rows), "rows")
    loss = record(model, aside, partial(measure_loss, rows=merging.rows, poll=context.polled))
    gc.collect()
    return Reference(model, loss)


def load_reference(merging: Merging, base: MergeBase) -> Any:  # noqa: ANN401 - a PEFT model
    """The adapter, unmerged, in fp32 on the weights that it is to be merged into."""
    import torch  # noqa: PLC0415 - slow

    resolved, weights, device = merging.resolved, merging.weights_of(base), merging.device(HELD_BYTES)
    if base is MergeBase.ORIGINAL:
        model = load_finished(weights, device, torch.float32)
        extend_embeddings(model, resolved.added_tokens)
    elif resolved.base_format == BaseFormat.GPTQ:
        model = widen_gptq(load_base(weights, resolved, device, torch.float32))
    else:
        model = load_dequantized(weights, resolved, device, torch.float32)
    return put_adapter(model, merging.context.work.adapter)


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


def verify_trained(loss: float, trained: float | None) -> None:
    """VerificationFailed unless the adapter loaded back is worth what it was when its training ended.

    One that was damaged in between makes the merged model and its reference worse alike, and they agree.
    """
    drift = 0.0 if trained is None else abs(loss - trained)
    if math.isfinite(loss) and drift <= MAX_LOSS_DRIFT:
        return
    told = "" if trained is None else f", {trained:.4f} when training ended (apart by at most {MAX_LOSS_DRIFT:g})"
    msg = (
        f"The adapter is not the one that was trained: held-out loss {loss:.4f} nats a token on the weights that it "
        f"was trained on{told}. Nothing is published. Train again in a new job; if it stays so, report this as a bug."
    )
    raise VerificationFailed(msg)


def choose_base(settings: ResolvedMerge, losses: Mapping[MergeBase, float]) -> MergeBase:
    """The weights that were asked for; with Auto those in which the adapter has the lower loss.

    What is no number is never the lower one, and of equals it is what was trained, the dequantized weights.
    """
    asked = MergeBase(settings.base)
    if asked is not MergeBase.AUTO:
        return asked
    return MergeBase.ORIGINAL if losses[MergeBase.ORIGINAL] < losses[MergeBase.DEQUANTIZED] else MergeBase.DEQUANTIZED


# Merging


def write_merged(merging: Merging, base: MergeBase, folder: Path) -> None:
    """Merge in fp32 and save in the dtype that was asked for; a part at a time where the model falls into parts.

    VerificationFailed if a weight is not finite.
    """
    from finetune_trainer.models.streaming import CannotStreamError  # noqa: PLC0415 - slow

    try:
        try:
            merge_streaming(merging, base, folder)
        except CannotStreamError as why:
            log.warning("%s: the whole model is merged at once", why)
            merge_whole(merging, base, folder)
    except ValueError as error:
        if "NaNs" not in str(error):
            raise
        msg = f"The merged weights are not finite: {error}. Train again with a lower training.learningRate."
        raise VerificationFailed(msg) from error
    gc.collect()


def merge_streaming(merging: Merging, base: MergeBase, folder: Path) -> None:
    """Merge in the memory of a part of the model and a shard. CannotStreamError, before anything is written."""
    from finetune_trainer.models import streaming  # noqa: PLC0415 - slow

    context, resolved, settings, weights = merging.context, merging.resolved, merging.settings, merging.weights_of(base)
    widened = base is MergeBase.DEQUANTIZED
    if widened and resolved.base_format == BaseFormat.GPTQ:
        msg = "Layers that GPTQ packed are only widened with the whole model at hand"
        raise streaming.CannotStreamError(msg)
    empty = build_empty(weights)
    parts = streaming.parts_of(empty)
    largest = max(streaming.parameters_of(empty, part) for part in parts)
    device = working_device(largest * streaming.WORK_BYTES)
    widening = streaming.Widening(weights, resolved, device) if widened else None

    def load(part: streaming.Part) -> Any:  # noqa: ANN401 - a causal language model
        return streaming.merge_part(weights, context.work.adapter, part, parts, resolved, device, widening)

    context.report.begin("merging the adapter", len(parts), "parts")
    streaming.stream(parts, load, folder, partial(cast, dtype=settings.dtype), settings.max_shard_size, context.polled)
    finish_folder(folder, weights, context.work.tokenizer, settings.dtype)


def merge_whole(merging: Merging, base: MergeBase, folder: Path) -> None:
    """Merge in the memory of the whole model in fp32."""
    context, settings = merging.context, merging.settings
    context.report.begin("merging the adapter into the whole model at once")
    merged = load_reference(merging, base).merge_and_unload(safe_merge=True)
    write_finished(
        merged,
        folder,
        merging.weights_of(base),
        context.work.tokenizer,
        dtype=settings.dtype,
        max_shard_size=settings.max_shard_size,
    )


# Judging


def compare_merged(
    merging: Merging, base: MergeBase, folder: Path, references: Mapping[MergeBase, Reference]
) -> tuple[Comparison, Comparison]:
    """Load the merged model back and compare it with the adapter on the same weights, and with what was trained."""
    import torch  # noqa: PLC0415 - slow

    context = merging.context
    context.raise_if_stopping()
    context.report.begin("loading the merged model back")
    candidate = load_finished(folder, merging.device(HELD_BYTES), torch.float32)
    context.report.begin("comparing with the adapter", len(merging.rows), "rows")
    same = compare(references[base].model, candidate, merging.rows, context.polled)
    if base is merging.trained_base:
        return same, same
    context.report.begin("comparing with what was trained", len(merging.rows), "rows")
    return same, compare(references[merging.trained_base].model, candidate, merging.rows, context.polled)


def is_same(found: Comparison) -> bool:
    """Whether the merged model is the adapter on the same weights."""
    return math.isfinite(found.kl) and found.kl <= MAX_KL


def verify_same(found: Comparison, merging: Merging, base: MergeBase, aside: Path) -> str:
    """VerificationFailed if merging changed the model; if only rounding did, what there is to say of it.

    A weight of 16 bits loses what is added to it and is less than half of its last digit; of an adapter that was
    trained for a few steps that may be a good part. A merge in fp32 tells this from a merge that went wrong.
    """
    if is_same(found):
        return ""
    dtype = merging.settings.dtype
    if dtype != MergeDtype.FP32 and is_same(compare_unrounded(merging, base, aside)):
        return (
            f" Rounding to {dtype} alone took it {found.kl:.1e} nats a token (KL) away from the adapter on the same "
            f"weights, {found.loss - found.reference_loss:+.4f} of held-out loss: merge.dtype FP32 rounds nothing."
        )
    msg = (
        f"The merged model is not the one that was trained: KL {found.kl:.3g} nats a token (at most {MAX_KL:g}), "
        f"held-out loss {found.loss:.4f} instead of {found.reference_loss:.4f}. "
        "Keep the adapter and report this as a bug."
    )
    raise VerificationFailed(msg)


def compare_unrounded(merging: Merging, base: MergeBase, aside: Path) -> Comparison:
    """The same merge without rounding, compared with the adapter. `aside`: has room for 4 bytes a parameter."""
    import torch  # noqa: PLC0415 - slow

    context, folder = merging.context, aside / "unrounded"
    reference = measure_reference(merging, base, aside / "again")
    folder.mkdir()
    write_merged(merging.without_rounding(), base, folder)
    context.report.begin("comparing without rounding", len(merging.rows), "rows")
    candidate = load_finished(folder, merging.device(HELD_BYTES), torch.float32)
    return compare(reference.model, candidate, merging.rows, context.polled)


def pass_gates(found: Comparison, base: MergeBase, merging: Merging) -> None:
    """GateFailed if a figure, or what is no number, is worse than the job allows.

    A KL divergence is asked of the weights that were trained on, a loss of original ones: there the model is another.
    """
    asked, increase = merging.asked, found.loss - found.reference_loss
    figures = f"held-out loss {found.loss:.4f} instead of {found.reference_loss:.4f}, KL {found.kl:.3g} nats a token"
    allowed = asked.max_kl_divergence
    if base is merging.trained_base and allowed is not None and not found.kl <= allowed:
        msg = (
            f"The merged model is {found.kl:.3g} nats a token (KL) away from the trained one, merge.maxKLDivergence "
            f"allows {allowed:g} ({figures}; dtype {merging.settings.dtype}). Nothing is published; the adapter is "
            "kept. Set merge.dtype to FP32, which rounds nothing, or allow more."
        )
        raise GateFailed(msg)
    allowed = asked.max_loss_increase
    if base is MergeBase.ORIGINAL and allowed is not None and not increase <= allowed:
        way_out = "Set merge.dtype to FP32" if base is merging.trained_base else "Set merge.base to Dequantized"
        msg = (
            f"Merged into the original weights the held-out loss is {increase:+.4f} nats a token against what was "
            f"trained, merge.maxLossIncrease allows {allowed:g} ({figures}). Nothing is published; the adapter is "
            f"kept. {way_out}, or allow more."
        )
        raise GateFailed(msg)
