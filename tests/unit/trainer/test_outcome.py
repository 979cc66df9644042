"""What becomes of the trained weights: how merge and quantize come out, and what is refused before a GPU is held."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_trainer.config import BaseFormat, Merge
from finetune_trainer.models.folder import ModelFacts
from finetune_trainer.runtime.errors import InvalidConfig, InvalidModel
from finetune_trainer.runtime.parsing import parse_config
from finetune_trainer.settings.outcome import (
    check_original,
    check_outcome,
    choose_unmeasured,
    resolve_merge,
    resolve_quantize,
)
from finetune_trainer.settings.resolve import check_held_out
from tests.tiny import make_config

LAYERS = {"model.layers.0.self_attn.q_proj": 576, "model.layers.0.mlp.down_proj": 1536}
LLAMA = ModelFacts("LlamaForCausalLM", 1000, 8192, LAYERS, linear_rows=dict.fromkeys(LAYERS, 576))
GPTQ = {"method": {"baseWeights": {"format": "GPTQ"}}}
INT8 = {"method": {"type": "LoRA", "baseWeights": {"format": "Int8"}}}
FP8 = {"method": {"type": "LoRA", "baseWeights": {"format": "FP8"}}}
ORIGINAL = {"original": {"volume": {"claimName": "models", "path": "original"}}}


@pytest.mark.parametrize(
    ("given", "base"),
    [
        pytest.param({}, "Auto", id="NF4: to be measured"),
        pytest.param({"method": {"baseWeights": {"format": "FP4"}}}, "Auto", id="FP4: to be measured"),
        pytest.param(GPTQ, "Dequantized", id="GPTQ: there is nothing but the widened weights"),
        pytest.param(GPTQ | {"merge": ORIGINAL}, "Auto", id="GPTQ with its original: to be measured"),
        pytest.param(INT8, "Auto", id="Int8: to be measured"),
        pytest.param(INT8 | {"merge": {"base": "Dequantized"}}, "Dequantized", id="Int8, widened"),
        pytest.param(FP8, "Auto", id="FP8: to be measured"),
        pytest.param(FP8 | {"merge": {"base": "Dequantized"}}, "Dequantized", id="FP8, widened"),
        pytest.param({"method": {"type": "LoRA"}}, "Original", id="unquantized: there is nothing but its weights"),
        pytest.param({"merge": {"base": "Original"}}, "Original", id="NF4, the 16-bit base"),
    ],
)
def test_the_weights_to_merge_into_are_settled_where_there_is_no_choice(given: dict[str, Any], base: str) -> None:
    merge = resolve_merge(parse_config(make_config(**given)))
    assert merge is not None
    assert (merge.base, merge.dtype, merge.max_shard_size) == (base, "BF16", "5GB")


@pytest.mark.parametrize(
    ("held", "original", "base"),
    [
        pytest.param("NF4", False, "Dequantized", id="NF4"),
        pytest.param("GPTQ", False, "Dequantized", id="GPTQ"),
        pytest.param("GPTQ", True, "Original", id="GPTQ with its original"),
        pytest.param("Int8", False, "Original", id="Int8"),
        pytest.param("FP8", False, "Original", id="FP8"),
        pytest.param("BF16", False, "Original", id="unquantized"),
    ],
)
def test_without_a_measure_the_kind_of_the_base_decides(held: str, original: bool, base: str) -> None:
    assert choose_unmeasured(BaseFormat(held), Merge.model_validate(ORIGINAL if original else {})) == base


@pytest.mark.parametrize("given", [{"merge": {"policy": "Never"}}, {"method": {"type": "Full"}}], ids=["Never", "Full"])
def test_nothing_is_merged(given: dict[str, Any]) -> None:
    assert resolve_merge(parse_config(make_config(**given))) is None


@pytest.mark.parametrize(
    ("entry", "columns", "expected"),
    [
        pytest.param({"method": "GPTQ"}, 4096, (4, 128, True, False, 0.05), id="GPTQ: symmetric"),
        pytest.param({"method": "AWQ"}, 4096, (4, 128, False, None, None), id="AWQ: zero points"),
        pytest.param({"method": "AWQ"}, 576, (4, 64, False, None, None), id="SmolLM2"),
        pytest.param({"method": "GPTQ", "bits": 8}, 96, (8, 32, True, False, 0.05), id="small layers, 8 bits"),
        pytest.param(
            {"method": "AWQ", "symmetric": True, "groupSize": 32}, 4096, (4, 32, True, None, None), id="as asked for"
        ),
        pytest.param(
            {"method": "GPTQ", "symmetric": False, "actOrder": True, "dampeningFrac": 0.1, "groupSize": 16},
            48,
            (4, 16, False, True, 0.1),
            id="GPTQ as asked for",
        ),
    ],
)
def test_quantized_forms_are_settled(entry: dict[str, Any], columns: int, expected: tuple[Any, ...]) -> None:
    config = parse_config(make_config(quantize=[{"name": "q", **entry}]))
    (found,) = resolve_quantize(config, replace(LLAMA, linear_layers={"a": columns}))
    assert (found.bits, found.group_size, found.symmetric, found.act_order, found.dampening_frac) == expected


@pytest.mark.parametrize(
    ("entry", "columns", "kind"),
    [
        pytest.param({}, 576, "Q8_0", id="by default"),
        pytest.param({"ggufType": "Q4_0"}, 576, "Q4_0", id="as asked for"),
        pytest.param({"ggufType": "F16"}, 100, "F16", id="any size in 16 bits"),
    ],
)
def test_gguf_forms_have_a_type_alone(entry: dict[str, Any], columns: int, kind: str) -> None:
    config = parse_config(make_config(quantize=[{"name": "q", "method": "GGUF", **entry}]))
    (found,) = resolve_quantize(config, replace(LLAMA, linear_layers={"a": columns}))
    assert found.model_dump(exclude_none=True) == {"name": "q", "method": "GGUF", "gguf_type": kind}


def quantize(**entry: Any) -> dict[str, Any]:
    return {"quantize": [{"name": "q", "method": "GPTQ", **entry}]}


@pytest.mark.parametrize(
    ("given", "facts", "words"),
    [
        pytest.param(
            GPTQ | {"merge": {"base": "Original"}},
            {},
            r"merge.base Original.*GPTQ.*Set merge.original.*leave merge.base unset.*merge.policy to Never",
            id="the original of a GPTQ base is not in it",
        ),
        pytest.param(
            {"method": {"type": "LoRA"}, "merge": {"base": "Dequantized"}},
            {},
            r"merge.base Dequantized.*held in FP32. Leave merge.base unset",
            id="nothing to widen",
        ),
        pytest.param(
            quantize(groupSize=128), {}, r"groupSize 128 .*576, 1536 columns\). Use 64 or 32", id="group size"
        ),
        pytest.param(
            quantize(groupSize=48), {}, r"groupSize 48 is none that GPTQ has kernels for", id="odd group size"
        ),
        pytest.param(
            quantize(method="AWQ", groupSize=256), {}, r"groupSize 256 is none that AWQ .*16, 32, 64, 128", id="for AWQ"
        ),
        pytest.param(
            quantize(), {"linear_layers": {"a": 100}}, "none of the group sizes.*leave quantize out", id="none"
        ),
        pytest.param(
            quantize(bits=8), {"linear_layers": {"a": 100}}, "none of the group sizes.*100 columns", id="none, 8 bits"
        ),
        pytest.param(
            quantize(method="AWQ"),
            {"linear_rows": {"model.layers.0.self_attn.k_proj": 96}},
            r"64 outputs of a layer at a time, model.layers.0.self_attn.k_proj has 96. Use method GPTQ",
            id="few outputs",
        ),
        pytest.param(
            quantize(method="AWQ"),
            {"architecture": "GPTBigCodeForCausalLM"},
            r"'q': method AWQ of GPTBigCodeForCausalLM .* cannot be loaded whole. Drop this entry",
            id="GPTBigCode",
        ),
        pytest.param(
            quantize(), {"architecture": "Qwen3MoeForCausalLM"}, "method GPTQ of Qwen3MoeForCausalLM", id="experts"
        ),
        pytest.param(
            quantize(method="AWQ"), {"architecture": "Gemma3ForCausalLM"}, "Use GPTQ; AWQ is for Llama", id="Gemma 3"
        ),
        pytest.param(
            quantize(method="GGUF"),
            {"linear_layers": {"a": 100}},
            r"Q8_0 holds 32 weights of a row in a block, a has 100 columns. Set ggufType to F16 or BF16",
            id="no whole blocks",
        ),
        pytest.param(
            quantize(method="GGUF"), {"architecture": "Gemma3ForCausalLM"}, "Use GPTQ; GGUF is for Llama", id="GGUF"
        ),
        pytest.param(
            quantize(calibration={"maxLength": 9000}),
            {},
            r"calibration.maxLength is 9,000.*8,192 tokens. Set it to 8,192 or less",
            id="calibration rows",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(given: dict[str, Any], facts: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        check_outcome(parse_config(make_config(**given)), replace(LLAMA, **facts))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        pytest.param({"method": "AWQ", "bits": 8}, "AWQ has 4 bits, bits is 8: drop it, or use method GPTQ", id="AWQ"),
        pytest.param({"bits": 6}, "multiple of 4", id="6 bits"),
        pytest.param({"method": "AWQ", "actOrder": True}, "actOrder is for GPTQ, method is AWQ: drop it", id="order"),
        pytest.param({"method": "GGUF", "bits": 8}, "bits is for GPTQ and AWQ, method is GGUF: drop it", id="GGUF"),
        pytest.param({"ggufType": "Q8_0"}, "ggufType is for GGUF, method is GPTQ: drop it", id="GGUF's type"),
        pytest.param({"method": "GGUF", "ggufType": "Q4_K_M"}, "ggufType", id="a k-quant"),
        pytest.param({"method": "AWQ", "dampeningFrac": 0.1}, "dampeningFrac is for GPTQ", id="damping of AWQ"),
        pytest.param({"dampeningFrac": 5}, "less than 1", id="a share, not percents"),
        pytest.param({"maxPerplexityIncreasePercent": -1}, "greater than or equal to 0", id="negative gate"),
    ],
)
def test_fields_that_do_not_go_together_are_no_config(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        parse_config(make_config(**quantize(**entry)))


@pytest.mark.parametrize(
    ("given", "field"),
    [
        pytest.param(
            quantize(maxPerplexityIncreasePercent=5), r"quantize\[\].maxPerplexityIncreasePercent", id="forms"
        ),
        pytest.param({"merge": {"maxKLDivergence": 0.01}}, "merge.maxKLDivergence", id="merge, KL"),
        pytest.param({"merge": {"maxLossIncrease": 0.0}}, "merge.maxLossIncrease", id="merge, loss"),
    ],
)
def test_a_gate_needs_held_out_rows(given: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidConfig, match=rf"percent 0 holds nothing out: drop {field} or hold rows out"):
        parse_config(make_config(evaluation={"percent": 0}, **given))
    with pytest.raises(InvalidConfig, match=rf"{field} needs a held-out loss, but no row was held out"):
        check_held_out(parse_config(make_config(**given)), eval_rows=0)


def test_a_gate_for_the_original_weights_is_refused_where_others_are_asked_for() -> None:
    with pytest.raises(InvalidConfig, match="maxLossIncrease is for base Original, base is Dequantized"):
        parse_config(make_config(merge={"base": "Dequantized", "maxLossIncrease": 0.0}))


WORDS = {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("facts", "known", "words"),
    [
        pytest.param({"gptq": True}, WORDS, "is quantized itself", id="another quantized one"),
        pytest.param(
            {"architecture": "Qwen2ForCausalLM"}, WORDS, "is a Qwen2ForCausalLM, the base a Llama", id="class"
        ),
        pytest.param({"linear_layers": LAYERS | {next(iter(LAYERS)): 512}}, WORDS, "q_proj is 512 x 576", id="shape"),
        pytest.param({"linear_layers": {}}, WORDS, "q_proj is absent", id="fewer layers"),
        pytest.param({"parameters": 1064}, WORDS, "has 1,064 parameters, the base 1,000", id="embeddings"),
        pytest.param({}, {"a": 0, "b": 2, "c": 1}, "tokenizer differs from the base's, first in 'b'", id="tokenizer"),
    ],
)
def test_another_model_than_the_original_is_refused(facts: dict[str, Any], known: dict[str, int], words: str) -> None:
    with pytest.raises(InvalidModel, match="merge.original.*" + words):
        check_original(LLAMA, replace(LLAMA, **facts), WORDS, known)


def test_the_original_is_taken() -> None:
    check_original(replace(LLAMA, gptq=True), LLAMA, WORDS, dict(WORDS))
