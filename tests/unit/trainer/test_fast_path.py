"""The fast path: which jobs take it, why others do not, and what it is counted to hold."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, MistralConfig

from benchmarks.estimate import FAST_GRID, SHAPES
from benchmarks.estimate import settle as settle_run
from finetune_trainer.fast import host, linear, ops
from finetune_trainer.fast import model as fast_model
from finetune_trainer.fast.block import Plan
from finetune_trainer.models.folder import describe_config
from finetune_trainer.models.loading import import_peft, load_base
from finetune_trainer.progress import DataFacts, Resolved
from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.runtime.parsing import parse_config
from finetune_trainer.settings import by_hand
from finetune_trainer.settings.activations import Batch
from finetune_trainer.settings.estimate import CUBLAS_BYTES, estimate
from finetune_trainer.settings.fast import why_plain, with_path
from finetune_trainer.settings.layout import blocks_of
from finetune_trainer.settings.resolve import SourceFacts, resolve
from finetune_trainer.training.adapters import build_lora
from tests.tiny import make_config, make_tiny_model
from tests.unit.trainer.test_estimate import ROWS, SMALL, write_config

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_trainer.models.folder import ModelFacts

ONE_GPU = {"gpusPerNode": 1}
PLANS = {"Full": Plan.INPUT, "Selective": Plan.ATTENTION, "Off": Plan.PRODUCTS}
WHOLE_BLOCKS = {**SMALL, "intermediate_size": 128}
NAMED = MistralConfig.from_dict({**SMALL, "layer_types": ["full_attention"] * 2})
"""Mistral's window is that of all layers, whatever they are called."""


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return describe_config(write_config(tmp_path_factory.mktemp("llama"), {"model_type": "llama", **WHOLE_BLOCKS}))


def settle(
    facts: ModelFacts, data: DataFacts = ROWS, added_tokens: tuple[int, ...] = (), **fields: Any
) -> tuple[Resolved, str | None]:
    """The settings, and why the plain path is taken."""
    config = parse_config({**make_config(parallelism=ONE_GPU), **fields})
    resolved = resolve(config, SourceFacts("sha256:m", None, "sha256:d"), facts, data, added_tokens)
    return resolved, why_plain(config, resolved, facts, data.length_max)


def method(kind: str, held: str | None = None, **lora: Any) -> dict[str, Any]:
    weights = {} if held is None else {"baseWeights": {"format": held}}
    return {"method": {"type": kind, **weights} | ({"lora": lora} if lora else {})}


# Which jobs take it


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="QLoRA"),
        pytest.param(method("QLoRA", "FP4"), id="FP4"),
        pytest.param(method("LoRA"), id="LoRA"),
        pytest.param(method("LoRA", r=64, alpha=16, dropout=0.1, useRslora=True), id="dropout"),
        pytest.param(method("LoRA", targetModules=["self_attn.q_proj", "down_proj"]), id="some layers"),
        pytest.param(method("LoRA", targetModules=["all-linear"], excludeModules=["k_proj"]), id="all but one"),
        pytest.param({"training": {"fastPath": "Auto", "packing": "On"}}, id="packed"),
        pytest.param({"model": {"volume": {"claimName": "m", "path": "m"}, "attention": "SDPA"}}, id="SDPA"),
    ],
)
def test_adapters_on_a_llama_on_one_gpu_take_it(fields: dict[str, Any], llama: ModelFacts) -> None:
    resolved, why = settle(llama, **fields)
    assert (why, resolved.fast_path) == (None, True)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"training": {"fastPath": "Off"}}, "training.fastPath is Off"),
        (method("Full"), "Full trains the weights themselves"),
        (method("GaLore"), "GaLore trains the weights themselves"),
        ({"objective": {"type": "DPO"}}, "DPO has a loss of its own"),
        (method("LoRA", "Int8"), "the base is held in Int8"),
        (method("LoRA", "FP16"), "the base is held in FP16"),
        (method("LoRA", "FP32"), "the base is held in FP32"),
        ({"method": {"computeDtype": "FP32"}}, "products are computed in FP32"),
        ({"method": {"computeDtype": "FP16"}}, "products are computed in FP16"),
        (
            {"parallelism": {"gpusPerNode": 0}, "method": {"computeDtype": "BF16"}},
            "there is no GPU",
        ),
        ({"parallelism": {"gpusPerNode": 2}}, "2 processes share the work"),
        ({"parallelism": {"numNodes": 2}}, "2 processes share the work"),
        (
            {"model": {"volume": {"claimName": "m", "path": "m"}, "attention": "Eager"}},
            "model.attention is Eager",
        ),
        ({"training": {"neftuneNoiseAlpha": 5}}, "NEFTune puts noise on the embeddings"),
        (method("LoRA", useDora=True), "DoRA scales the weights"),
        (method("LoRA", modulesToSave=["embed_tokens"]), "embed_tokens trains whole"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_other_jobs_take_the_plain_path_and_say_why(fields: dict[str, Any], why: str, llama: ModelFacts) -> None:
    resolved, told = settle(llama, **fields)
    assert (told, resolved.fast_path) == (why, False)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"activation": "gelu"}, "its MLPs have gelu, not silu"),
        ({"attention_dropout": 0.1}, "its attention has dropout"),
        ({"own_code": True}, "its LlamaForCausalLM is the model's own code"),
        ({"window": 511}, "rows of 512 tokens are longer than its attention's window of 511"),
        ({"window": 512}, None),
        ({"architecture": "Gemma2ForCausalLM"}, "Gemma2ForCausalLM has other blocks than a Llama"),
        ({"adapter": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}},
         "lm_head is none of a Llama's linear layers"),
        ({"adapter": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 4}}},
         "the adapter to go on from has alpha_pattern"),
        ({"adapter": {"r": 8, "lora_alpha": 8, "target_modules": r"lm_head|model\.layers\.0\.self_attn.q_proj"}},
         r"lm_head|model\.layers\.0\.self_attn.q_proj is none of a Llama's linear layers"),
        ({"adapter": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "alora_invocation_tokens": [5]}},
         "the adapter to go on from has alora_invocation_tokens"),
        ({"has_biases": True, "adapter": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "all"}},
         "biases train"),
        ({"adapter": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": ["mlp.w"]}},
         "mlp.w is no layer"),
        ({"adapter": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "alpha_pattern": {}}}, None),
    ],
)  # fmt: skip
def test_other_models_and_adapters_take_the_plain_path(
    changes: dict[str, Any], why: str | None, llama: ModelFacts
) -> None:
    resolved, told = settle(replace(llama, **changes))
    assert (told, resolved.fast_path) == (why, why is None)


def test_rows_that_4_bit_blocks_do_not_divide_take_the_plain_path(tmp_path: Path) -> None:
    odd = describe_config(write_config(tmp_path, {"model_type": "llama", **SMALL, "intermediate_size": 160}))
    assert settle(odd)[1] == "64 does not divide the columns of its layers, which are held in NF4"
    assert settle(odd, **method("LoRA"))[1] is None


def fp8(kind: str, held: str | None = None) -> dict[str, Any]:
    asked = method(kind, held)
    return {"method": {**asked["method"], "fp8Products": True}}


@pytest.mark.parametrize(
    "fields", [fp8("QLoRA"), fp8("QLoRA", "FP4"), fp8("LoRA"), fp8("LoRA", "BF16"), fp8("LoRA", "FP8")]
)
def test_products_in_fp8_are_for_the_fast_path(fields: dict[str, Any], llama: ModelFacts) -> None:
    resolved, why = settle(llama, **fields)
    assert (why, resolved.fast_path, resolved.fp8_products) == (None, True, True)
    assert not settle(llama)[0].fp8_products


def test_products_in_fp8_are_refused_where_the_path_is_not_taken(llama: ModelFacts) -> None:
    with pytest.raises(InvalidConfig, match=r"method.fp8Products .* its MLPs have gelu, not silu. Drop fp8Products"):
        settle(replace(llama, activation="gelu"), **fp8("LoRA"))


def test_offload_is_refused_where_the_path_is_not_taken(llama: ModelFacts) -> None:
    asked: dict[str, Any] = {"training": {"offload": "On"}}
    assert settle(llama, **asked)[0].offloads
    assert not settle(llama)[0].offloads
    with pytest.raises(InvalidConfig, match=r"training.offload On needs .* its MLPs have gelu, not silu. Drop offload"):
        settle(replace(llama, activation="gelu"), **asked)


def test_products_in_fp8_want_widths_that_16_divides(tmp_path: Path) -> None:
    odd = describe_config(write_config(tmp_path, {"model_type": "llama", **SMALL, "intermediate_size": 136}))
    with pytest.raises(InvalidConfig, match="16 does not divide the widths of its layers, which FP8 asks for"):
        settle(odd, **fp8("LoRA"))


def test_heads_of_256_take_the_plain_path(tmp_path: Path) -> None:
    wide = describe_config(write_config(tmp_path, {"model_type": "qwen3", **WHOLE_BLOCKS, "head_dim": 256}))
    assert settle(wide)[1] == "its heads have 256 dimensions"


def test_added_tokens_take_the_plain_path(llama: ModelFacts) -> None:
    assert settle(llama, added_tokens=(320, 321))[1] == "embeddings of added tokens train"


@pytest.mark.parametrize(
    ("config", "window"),
    [
        ({"model_type": "mistral", **SMALL}, 4096),
        ({"model_type": "mistral", **SMALL, "sliding_window": None}, None),
        (NAMED.to_dict(), 4096),
        ({"model_type": "qwen2", **SMALL}, None),
        ({"model_type": "qwen2", **SMALL, "use_sliding_window": True, "max_window_layers": 1}, 4096),
        ({"model_type": "llama", **SMALL}, None),
    ],
)
def test_the_window_of_attention_is_read_from_the_config(
    config: dict[str, Any], window: int | None, tmp_path: Path
) -> None:
    assert describe_config(write_config(tmp_path, config)).window == window


def test_another_base_is_another_path(llama: ModelFacts) -> None:
    config = parse_config(make_config(parallelism=ONE_GPU))
    resolved, _ = settle(llama, **method("LoRA", "Int8"))
    held = resolved.model_copy(update={"base_format": "NF4"})
    assert with_path(config, held, llama, 512).fast_path


# What it holds


def test_constants_are_those_of_the_code() -> None:
    assert (by_hand.MULTIPLE, by_hand.HEAD_ROWS) == (linear.MULTIPLE, fast_model.HEAD_ROWS)
    assert by_hand.FP8_MULTIPLE == ops.FLOAT8_MULTIPLE
    assert by_hand.PLACE_BYTES == host.PLACE_BYTES


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": WHOLE_BLOCKS,
    "mistral": WHOLE_BLOCKS,
    "qwen2": {**WHOLE_BLOCKS, "num_key_value_heads": 4},
    "qwen3": {**WHOLE_BLOCKS, "head_dim": 32},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "all layers": {"r": 4},
    "a full room": {"r": 64},
    "some layers": {"r": 4, "targetModules": ["q_proj", "down_proj"]},
}


def build(folder: Path, resolved: Resolved) -> Any:
    """A PEFT model in bf16 with random weights."""
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    return import_peft().get_peft_model(base, build_lora(resolved, base))


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_keeps_and_holds_what_is_counted(family: str, adapter: dict[str, Any], tmp_path: Path) -> None:
    folder = write_config(tmp_path, {"model_type": family, **FAMILIES[family]})
    facts, tokens = describe_config(folder), 2 * 24
    resolved, why = settle(facts, **method("LoRA", **adapter))
    assert why is None
    adapted, sizes = build(folder, resolved), by_hand.sizes_of(blocks_of(facts)[0], facts, resolved)
    ids = torch.zeros(2, 24, dtype=torch.long)
    for way, plan in PLANS.items():
        fast = fast_model.FastModel(adapted, plan, torch.bfloat16)
        _, passed = fast.forward({"input_ids": ids, "labels": ids})
        counted = by_hand.kept_by_hand(sizes, resolved.model_copy(update={"gradient_checkpointing": way})) * tokens
        in_kernels = (
            4 * facts.heads * tokens if plan >= Plan.ATTENTION else 0
        )  # log-sum-exps, which a CPU does not keep
        assert bytes_of(passed.kept[0]) == counted - in_kernels
        assert bytes_of(passed.gradient) == sizes.down.above * tokens
    layers = sum(layer.numel for block in blocks_of(facts) for layer in block.layers)
    held = {each.untyped_storage() for name, each in adapted.named_parameters() if name.endswith("proj.weight")}
    held |= {each.untyped_storage() for name, each in adapted.named_parameters() if "base_layer.weight" in name}
    assert sum(each.nbytes() for each in unique(held)) == 2 * layers + by_hand.count_room(facts, resolved)


def unique(storages: set[torch.UntypedStorage]) -> list[torch.UntypedStorage]:
    return list({each.data_ptr(): each for each in storages}.values())


def bytes_of(kept: Any) -> int:
    """Of all tensors in an object and what it has, each storage once."""
    found: dict[int, torch.UntypedStorage] = {}
    left = [kept]
    while left:
        each = left.pop()
        if isinstance(each, torch.Tensor):
            found[each.untyped_storage().data_ptr()] = each.untyped_storage()
        elif isinstance(each, tuple | list):
            left += each
        elif hasattr(each, "__dict__"):
            left += vars(each).values()
    return sum(storage.nbytes() for storage in found.values())


def test_weights_of_4_bits_are_widened_into_one_buffer_of_each_shape(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", hidden_size=128)
    facts = describe_config(folder)
    resolved, _ = settle(facts)
    on_cpu = resolved.model_copy(update={"compute_dtype": "FP32"})
    base = load_base(folder, on_cpu, torch.device("cpu"), torch.bfloat16)
    adapted = import_peft().get_peft_model(base, build_lora(resolved, base))
    fast = fast_model.FastModel(adapted, Plan.INPUT, torch.bfloat16)
    ids = torch.zeros(1, 8, dtype=torch.long)
    fast.forward({"input_ids": ids, "labels": ids})
    buffers = fast._scratch._buffers.values()
    assert by_hand.count_scratch(facts, resolved) == sum(each.nbytes for each in buffers)
    assert by_hand.count_room(facts, resolved) == 0


@pytest.mark.parametrize("way", ["Full", "Selective"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_what_lies_in_host_memory_is_counted(way: str, tied: bool, tmp_path: Path) -> None:
    shape = {"model_type": "qwen2", **WHOLE_BLOCKS, "num_hidden_layers": 4, "tie_word_embeddings": tied}
    folder = write_config(tmp_path, shape)
    facts, batch = describe_config(folder), Batch(2, 24, masked=False)
    training = {"gradientCheckpointing": way}
    resolved, _ = settle(facts, training={**training, "offload": "On"}, **method("LoRA"))
    plain, _ = settle(facts, training=training, **method("LoRA"))
    adapted, ids = build(folder, resolved), torch.zeros(2, 24, dtype=torch.long)
    embedding = adapted.get_base_model().model.embed_tokens.weight
    fast = fast_model.FastModel(adapted, PLANS[way], torch.bfloat16, offload=True)
    _, passed = fast.forward({"input_ids": ids, "labels": ids})
    sent = [each for kept in passed.kept[:-1] for each in vars(kept).values() if isinstance(each, host.Sent)]
    sent += [kept.attended.out for kept in passed.kept[:-1] if kept.attended is not None]  # type: ignore[misc]
    places = sum(place.nbytes for each in sent for place in each.places)
    held = 0 if tied else embedding.nbytes
    assert by_hand.count_embedding(facts, resolved) == held
    assert held <= by_hand.count_host(facts, resolved, batch) - places < max(2 * held, 1)
    gone = sum(each.like.nbytes for each in sent)
    one_block = gone // 3
    counted, before = (by_hand.count_by_hand(facts, each, batch) for each in (resolved, plain))
    assert before.kept - counted.kept == gone
    assert counted.block - before.block == one_block, "what comes back for the next"
    found, without = (estimate(facts, each, batch) for each in (resolved, plain))
    assert without.weights_bytes - found.weights_bytes == held
    assert found.peak_bytes <= without.peak_bytes - held - gone + one_block + found.gradients_bytes


def test_a_machine_without_the_path_holds_all_itself(llama: ModelFacts) -> None:
    resolved, _ = settle(llama, training={"offload": "On"})
    by_autograd = resolved.model_copy(update={"fast_path": False})
    never = by_autograd.model_copy(update={"offloads": False})
    batch = Batch(2, 24, masked=False)
    assert estimate(llama, by_autograd, batch) == estimate(llama, never, batch)


TAKEN = {"fast_path": True, "plain_because": None}


def test_the_grid_of_the_fast_path_takes_it(tmp_path: Path) -> None:
    facts = {name: describe_config(write_config(tmp_path / name, shape.to_dict())) for name, shape in SHAPES.items()}
    assert FAST_GRID
    for run in FAST_GRID:
        plain = settle_run(replace(run, fast_path="Off"), facts[run.shape])
        assert settle_run(run, facts[run.shape]) == plain.model_copy(update=TAKEN), run.name


def test_matrices_in_fp8_are_counted(llama: ModelFacts) -> None:
    batch, (resolved, _) = Batch(4, 2048, masked=False), settle(llama, **fp8("LoRA"))
    group = by_hand.sizes_of(blocks_of(llama)[0], llama, resolved).both
    made = ops.narrow(torch.zeros(48, group.rows + group.ranks), ops.padded(group.rows + group.ranks))
    assert group.narrowed(48) == sum(each.nbytes for each in made)
    assert group.shapes == (
        (group.rows, ops.padded(group.columns + group.ranks)), (group.columns, ops.padded(group.rows + group.ranks))
    )  # fmt: skip
    wide, _ = settle(llama, **method("LoRA"))
    found, before = (estimate(llama, each, batch) for each in (resolved, wide))
    room, scratch = by_hand.count_room(llama, wide), by_hand.count_scratch(llama, resolved)
    passing = group.narrowed(batch.total) - by_hand._learned(group)  # which come after one another
    assert found.peak_bytes - before.peak_bytes == scratch - room + found.adapter_bytes // 2 + passing


def test_where_recorded_passes_leave_gradients_is_counted_but_with_dropout(llama: ModelFacts) -> None:
    (resolved, _), (dropping, _) = (settle(llama, method={"lora": {"dropout": rate}}) for rate in (0, 0.1))
    assert by_hand.count_copies(resolved, 4000) == 4000
    assert by_hand.count_copies(dropping, 4000) == 0


def test_more_is_kept_where_less_is_computed_again(llama: ModelFacts) -> None:
    batch = Batch(4, 2048, masked=False)
    settled = [settle(llama, training={"gradientCheckpointing": way})[0] for way in ("Full", "Selective", "Off")]
    found = [by_hand.count_by_hand(llama, each, batch) for each in settled]
    assert sorted(each.kept for each in found) == [each.kept for each in found]
    assert sorted((each.block for each in found), reverse=True) == [each.block for each in found]


def test_gradients_of_a_pass_lie_beside_those_of_earlier_ones(llama: ModelFacts) -> None:
    """With few tokens, so that gradients and not activations are what fills the memory."""
    batch = Batch(1, 8, masked=False)
    training = {"globalBatchSize": 2, "perDeviceTrainBatchSize": 1, "gradientCheckpointing": "Full"}
    two, _ = settle(llama, training=training, **method("LoRA", r=64))
    found = estimate(llama, two, batch)
    held = CUBLAS_BYTES + found.weights_bytes + found.adapter_bytes + found.optimizer_bytes
    assert found.peak_bytes > held + 2 * found.gradients_bytes
