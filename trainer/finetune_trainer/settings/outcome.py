"""What becomes of the trained weights, fixed once: merge and quantize. Pure: the same config and model, the same.

What cannot be merged, or would be quantized into something that nobody can load, is refused here, before a GPU is held.
Every refusal names the field in camelCase and the way out.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from finetune_trainer.config import (
    EIGHT_BIT,
    FLOATING,
    BaseFormat,
    GgufType,
    JobConfig,
    Merge,
    MergeBase,
    MergeDtype,
    Quantize,
    QuantizeMethod,
)
from finetune_trainer.models.gguf_export import ARCHITECTURES, BLOCK_COLUMNS, WHOLE_TYPES, unexportable
from finetune_trainer.progress import ResolvedMerge, ResolvedQuantize
from finetune_trainer.runtime.errors import InvalidConfig, InvalidModel
from finetune_trainer.settings.methods import or_default, resolve_base_format

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from finetune_trainer.models.folder import ModelFacts

DEFAULT_SHARD_SIZE = "5GB"
DEFAULT_BITS = 4
DEFAULT_GGUF_TYPE = GgufType.Q8_0
DEFAULT_DAMPENING = 0.05
"""Of gptqmodel 7.6."""
DEFAULT_GROUP_SIZES = (128, 64, 32)
GROUP_SIZES = {QuantizeMethod.GPTQ: (16, 32, 64, 128, 256, 512, 1024), QuantizeMethod.AWQ: (16, 32, 64, 128)}
"""What the kernels of gptqmodel 7.6 take."""
AWQ_ROWS = 64
"""gptqmodel searches the clipping of so many outputs of a layer at a time, and takes no remainder (7.6)."""
QUANTIZABLE = {
    QuantizeMethod.GPTQ: (
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Gemma3ForCausalLM",
    ),
    QuantizeMethod.AWQ: ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"),
    QuantizeMethod.GGUF: tuple(ARCHITECTURES),
}
"""Classes whose quantized form transformers loads back whole, each of them tested (gptqmodel 7.6, transformers 5.23).

Others are written and then cannot be loaded (GPTBigCode, GPT-2), or are loaded with random layers (Phi-3) or random
experts (Mixtral, Qwen3-MoE, OLMoE: fused in transformers, single in the files), and nothing but a warning tells.
"""


def check_outcome(config: JobConfig, model: ModelFacts) -> None:
    """All that can be refused before the rows are read. InvalidConfig."""
    resolve_merge(config)
    resolve_quantize(config, model)


# Merge


def resolve_merge(config: JobConfig) -> ResolvedMerge | None:
    """Into which weights the adapter is merged. Auto stays open where the merge stage has two to measure."""
    if not config.merges:
        return None
    asked, held = config.merge or Merge(), resolve_base_format(config)
    base = or_default(asked.base, MergeBase.AUTO)
    if base is MergeBase.AUTO and (held in FLOATING or (held is BaseFormat.GPTQ and asked.original is None)):
        base = choose_unmeasured(held, asked)
    if base is MergeBase.DEQUANTIZED and held in FLOATING:
        msg = f"merge.base Dequantized is for a quantized base, this one is held in {held}. Leave merge.base unset."
        raise InvalidConfig(msg)
    if base is MergeBase.ORIGINAL and held is BaseFormat.GPTQ and asked.original is None:
        msg = (
            "merge.base Original: the base comes quantized (GPTQ), its original weights are not in it. "
            "Set merge.original to the 16-bit model, leave merge.base unset to merge into the GPTQ weights widened, "
            "or set merge.policy to Never."
        )
        raise InvalidConfig(msg)
    return ResolvedMerge(
        base=base.value,
        dtype=or_default(asked.dtype, MergeDtype.BF16).value,
        max_shard_size=or_default(asked.max_shard_size, DEFAULT_SHARD_SIZE),
    )


def choose_unmeasured(held: BaseFormat, asked: Merge) -> MergeBase:
    """What base Auto means where there is no choice, or nothing to measure it on."""
    original = asked.original is not None or held in (*EIGHT_BIT, *FLOATING)
    return MergeBase.ORIGINAL if original else MergeBase.DEQUANTIZED


def check_original(
    base: ModelFacts, original: ModelFacts, base_words: dict[str, int], original_words: dict[str, int]
) -> None:
    """The model of merge.original must be the base before it was quantized. InvalidModel names what differs.

    `*_words`: the tokenizers' words and their ids.
    """
    where, way_out = "merge.original", "Give the very model that the base was quantized from."
    if original.gptq:
        msg = f"{where} is quantized itself (GPTQ, says config.json). Give the 16-bit model."
        raise InvalidModel(msg)
    if original.architecture != base.architecture:
        msg = f"{where} is a {original.architecture}, the base a {base.architecture}. {way_out}"
        raise InvalidModel(msg)
    for name, columns in base.linear_layers.items():
        ours, theirs = (columns, base.linear_rows.get(name)), _shape(original, name)
        if theirs != ours:
            msg = f"{where}: layer {name} is {_told(theirs)}, of the base {_told(ours)}. {way_out}"
            raise InvalidModel(msg)
    if original.parameters != base.parameters:
        msg = f"{where} has {original.parameters:,} parameters, the base {base.parameters:,}. {way_out}"
        raise InvalidModel(msg)
    if (word := _first_difference(base_words, original_words)) is not None:
        msg = f"{where}: its tokenizer differs from the base's, first in {word!r}. {way_out}"
        raise InvalidModel(msg)


def _shape(model: ModelFacts, name: str) -> tuple[int | None, int | None]:
    return model.linear_layers.get(name), model.linear_rows.get(name)


def _told(shape: tuple[int | None, int | None]) -> str:
    columns, rows = shape
    return "absent" if columns is None else f"{columns} x {rows}"


def _first_difference(one: dict[str, int], other: dict[str, int]) -> str | None:
    """The word of the lowest id that is not the same in both."""
    different = {(index, word) for word, index in one.items() ^ other.items()}
    return min(different)[1] if different else None


# Quantize


def resolve_quantize(config: JobConfig, model: ModelFacts) -> tuple[ResolvedQuantize, ...]:
    """The quantized forms, each with a group size that fits every layer."""
    return tuple(_resolve_entry(entry, model) for entry in config.quantize or ())


def _resolve_entry(entry: Quantize, model: ModelFacts) -> ResolvedQuantize:
    _check_architecture(entry, model)
    if entry.method is QuantizeMethod.GGUF:
        return _resolve_gguf(entry, model)
    if entry.method is QuantizeMethod.AWQ:
        _check_awq_rows(entry, model)
    _check_calibration(entry, model)
    gptq = entry.method is QuantizeMethod.GPTQ
    return ResolvedQuantize(
        name=entry.name,
        method=entry.method.value,
        symmetric=or_default(entry.symmetric, gptq),
        bits=or_default(entry.bits, DEFAULT_BITS),
        group_size=_group_size(entry, set(model.linear_layers.values())),
        act_order=or_default(entry.act_order, False) if gptq else None,
        dampening_frac=or_default(entry.dampening_frac, DEFAULT_DAMPENING) if gptq else None,
    )


def _resolve_gguf(entry: Quantize, model: ModelFacts) -> ResolvedQuantize:
    kind = or_default(entry.gguf_type, DEFAULT_GGUF_TYPE).value
    for name, columns in model.linear_layers.items():
        if columns % BLOCK_COLUMNS and kind not in WHOLE_TYPES:
            msg = (
                f"quantize '{entry.name}': {kind} holds {BLOCK_COLUMNS} weights of a row in a block, {name} has "
                f"{columns:,} columns. Set ggufType to {' or '.join(WHOLE_TYPES)}."
            )
            raise InvalidConfig(msg)
    return ResolvedQuantize(name=entry.name, method=entry.method.value, gguf_type=kind)


def check_gguf(config: JobConfig, folder: Path, tokenizer: Any) -> None:  # noqa: ANN401 - a transformers tokenizer
    """What a GGUF file has no words for, of a model's config and tokenizer. InvalidConfig."""
    names = [entry.name for entry in config.quantize or () if entry.method is QuantizeMethod.GGUF]
    if names and (what := unexportable(folder, tokenizer)) is not None:
        msg = f"quantize '{names[0]}': a GGUF file cannot say {what}. Use method GPTQ or AWQ, or drop this entry."
        raise InvalidConfig(msg)


def _check_architecture(entry: Quantize, model: ModelFacts) -> None:
    known = QUANTIZABLE[entry.method]
    if model.architecture in known:
        return
    others = [method.value for method, names in QUANTIZABLE.items() if model.architecture in names]
    way_out = f"Use {others[0]}" if others else "Drop this entry and keep the 16-bit model"
    msg = (
        f"quantize '{entry.name}': method {entry.method} of {model.architecture} gives a model that cannot be loaded "
        f"whole. {way_out}; {entry.method} is for {', '.join(known)}."
    )
    raise InvalidConfig(msg)


def _check_awq_rows(entry: Quantize, model: ModelFacts) -> None:
    for name, rows in model.linear_rows.items():
        if rows % AWQ_ROWS:
            msg = (
                f"quantize '{entry.name}': AWQ takes {AWQ_ROWS} outputs of a layer at a time, {name} has {rows:,}. "
                "Use method GPTQ."
            )
            raise InvalidConfig(msg)


def _check_calibration(entry: Quantize, model: ModelFacts) -> None:
    asked, limit = entry.calibration.max_length if entry.calibration else None, model.max_positions
    if asked is not None and limit is not None and asked > limit:
        msg = (
            f"quantize '{entry.name}': calibration.maxLength is {asked:,}, the model's limit is {limit:,} tokens. "
            f"Set it to {limit:,} or less."
        )
        raise InvalidConfig(msg)


def _group_size(entry: Quantize, columns: Iterable[int]) -> int:
    """The largest usual group size that divides the input columns of all layers, or the one asked for."""
    common, known, asked = math.gcd(*columns), GROUP_SIZES[entry.method], entry.group_size
    where = f"quantize '{entry.name}'"
    fitting = [size for size in DEFAULT_GROUP_SIZES if common % size == 0]
    choice = f"Use {_one_of(fitting)}, or leave it unset." if fitting else "No usual size fits this model."
    if asked is not None and asked not in known:
        msg = f"{where}: groupSize {asked} is none that {entry.method} has kernels for ({_listed(known)}). "
        raise InvalidConfig(msg + choice)
    if asked is not None and common % asked:
        msg = f"{where}: groupSize {asked} does not divide the model's layers ({_listed(columns)} columns). "
        raise InvalidConfig(msg + choice)
    if asked is None and not fitting:
        msg = f"{where}: none of the group sizes 128, 64, 32 divides the layers ({_listed(columns)} columns). "
        raise InvalidConfig(msg + "Set groupSize to 16 if that divides them, or leave quantize out.")
    return fitting[0] if asked is None else asked


def _one_of(sizes: list[int]) -> str:
    return " or ".join(str(size) for size in sizes)


def _listed(sizes: Iterable[int]) -> str:
    return ", ".join(str(size) for size in sorted(set(sizes)))
