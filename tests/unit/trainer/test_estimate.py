"""What a training takes of a GPU: exact where shapes decide, counted where autograd keeps, plain where it must grow."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.estimate import FAST_GRID, GRID, SHAPES
from benchmarks.estimate import settle as settle_run
from finetune_trainer.models.folder import CONFIG, ModelFacts, describe_config
from finetune_trainer.models.loading import load_base
from finetune_trainer.progress import DataFacts, Estimate, Resolved
from finetune_trainer.runtime.parsing import parse_config
from finetune_trainer.settings.activations import Batch, kept_by_block
from finetune_trainer.settings.estimate import batch_of, estimate, measured_tokens, why_none
from finetune_trainer.settings.holdings import count_holdings, count_weights, trained_tensors
from finetune_trainer.settings.layout import KNOWN, blocks_of
from finetune_trainer.settings.resolve import SourceFacts, resolve
from finetune_trainer.training.adapters import build_lora
from tests.tiny import make_config, make_tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

GIB = 2**30
PLAIN = {"fastPath": "Off"}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "pad_token_id": 0,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": SMALL,
    "ministral3": SMALL,
    "qwen2": {**SMALL, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen3": {**SMALL, "head_dim": 32},
    "smollm3": SMALL,
    "granite": SMALL,
    "arcee": SMALL,
}
ROWS = DataFacts(
    train_rows=16_000, eval_rows=10, dropped_rows=0, train_tokens=16_000 * 512, loss_tokens=1,
    length_p50=512, length_p95=512, length_p99=512, length_max=512,
)  # fmt: skip


def write_config(folder: Path, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    return describe_config(write_config(tmp_path_factory.mktemp("8b"), LLAMA_8B))


def settle(model: ModelFacts, data: DataFacts = ROWS, **fields: Any) -> Resolved:
    job = make_config(**{"parallelism": {"gpusPerNode": 1}, **fields})
    return resolve(parse_config(job), SourceFacts("sha256:m", None, "sha256:d"), model, data)


def of_method(kind: str, held: str | None = None, **lora: Any) -> dict[str, Any]:
    method: dict[str, Any] = {"type": kind}
    if held is not None:
        method["baseWeights"] = {"format": held}
    return {"method": method | ({"lora": lora} if lora else {})}


# Shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_all_parameters_of_a_model_that_trains_whole_are_counted(family: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path, {"model_type": family, **FAMILIES[family]})
    facts = describe_config(folder)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))  # type: ignore[no-untyped-call]
    counted = sum(tensor.numel for tensor in trained_tensors(facts, settle(facts, **of_method("Full"))))
    assert counted == facts.parameters == sum(parameter.numel() for parameter in model.parameters())


ADAPTERS: dict[str, dict[str, Any]] = {
    "all linear layers": {"r": 8},
    "two kinds": {"r": 4, "targetModules": ["q_proj", "down_proj"]},
    "but one": {"r": 4, "excludeModules": ["k_proj"]},
    "and a module whole": {"r": 4, "targetModules": ["q_proj"], "modulesToSave": ["embed_tokens"]},
}


@pytest.mark.parametrize(
    ("family", "lora"),
    [(family, {"r": 8}) for family in FAMILIES] + [("llama", lora) for lora in ADAPTERS.values()],
    ids=[*FAMILIES, *ADAPTERS],
)
def test_an_adapter_has_as_many_parameters_as_peft_makes(family: str, lora: dict[str, Any], tmp_path: Path) -> None:
    folder = write_config(tmp_path, {"model_type": family, **FAMILIES[family]})
    facts = describe_config(folder)
    resolved = settle(facts, **of_method("LoRA", "FP32", **lora))
    base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))  # type: ignore[no-untyped-call]
    settings = build_lora(resolved, base)
    assert settings is not None
    trainable, _ = get_peft_model(base, settings).get_nb_trainable_parameters()
    assert sum(tensor.numel for tensor in trained_tensors(facts, resolved)) == trainable


@pytest.mark.parametrize("held", ["NF4", "BF16", "FP32", "Int8", "FP8"])
def test_weights_take_what_the_loaded_model_takes(held: str, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", hidden_size=128)
    facts = describe_config(folder)
    kind = "QLoRA" if held == "NF4" else "LoRA"
    resolved = settle(facts, parallelism={"gpusPerNode": 0}, **of_method(kind, held))
    loaded = load_base(folder, resolved, torch.device("cpu"), torch.float32)
    assert count_weights(facts, resolved) == pytest.approx(sum(bytes_of(loaded)), rel=0.001)


def bytes_of(model: Any) -> Iterator[int]:
    """Of each weight with its scales; tables of codes, which all layers share, left out."""
    for parameter in model.parameters():
        yield parameter.untyped_storage().nbytes()
        if (state := getattr(parameter, "quant_state", None)) is not None:
            yield state.absmax.nbytes
            yield state.state2.absmax.nbytes
        if (scales := getattr(parameter, "SCB", None)) is not None:
            yield scales.nbytes
    yield from (buffer.nbytes for name, buffer in model.named_buffers() if name.endswith(".scales"))  # of FP8


# What autograd keeps


@dataclass(frozen=True)
class Case:
    """A model as it is trained on CPU, where autograd keeps what it keeps on a GPU, but for masks of dropout."""

    fields: dict[str, Any]
    held: torch.dtype
    family: str = "llama"


CASES = {
    "LoRA, BF16": Case(of_method("LoRA", "BF16", r=4), torch.bfloat16),
    "LoRA on some layers, BF16": Case(
        of_method("LoRA", "BF16", r=4, targetModules=["q_proj", "o_proj", "up_proj"]), torch.bfloat16
    ),
    "LoRA on FP32, computed in BF16": Case(
        {"method": {"type": "LoRA", "baseWeights": {"format": "FP32"}, "lora": {"r": 4}, "computeDtype": "BF16"}},
        torch.float32,
    ),
    "LoRA, FP8": Case(of_method("LoRA", "FP8", r=4), torch.bfloat16),
    "Full, FP32": Case(of_method("Full", "FP32"), torch.float32),
    "Full, BF16": Case(of_method("Full", "BF16"), torch.bfloat16),
    **{
        f"{name}, {family}": Case(fields, held, family)
        for family in FAMILIES
        for name, fields, held in (
            ("LoRA", of_method("LoRA", "BF16", r=4), torch.bfloat16),
            ("Full", of_method("Full", "FP32"), torch.float32),
        )
    },
}


def test_every_known_architecture_is_held_against_autograd(tmp_path: Path) -> None:
    folders = (write_config(tmp_path / name, {"model_type": name, **shape}) for name, shape in FAMILIES.items())
    assert {describe_config(folder).architecture for folder in folders} == KNOWN


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_block_keeps_what_autograd_saves(case: Case, tmp_path: Path) -> None:
    """A model with one more block saves more by what a block keeps, and by autocast's copies of its weights."""
    rows, tokens = 2, 48
    saved, expected = [], []
    for layers in (2, 3):
        shape = {"model_type": case.family, **FAMILIES[case.family], "num_hidden_layers": layers}
        folder = write_config(tmp_path / str(layers), shape)
        facts = describe_config(folder)
        resolved = settle(facts, training=PLAIN, **case.fields)
        saved.append(saved_bytes(folder, resolved, case.held, rows, tokens))
        block = blocks_of(facts)[-1]
        kept = kept_by_block(block, resolved, facts, Batch(rows, tokens, masked=False))
        expected.append(kept + count_holdings(facts, resolved).casts // layers)
    assert saved[1] - saved[0] == pytest.approx(expected[1], rel=0.01)


def saved_bytes(folder: Path, resolved: Resolved, held: torch.dtype, rows: int, tokens: int) -> int:
    """Bytes of all storages that a forward pass through the blocks saves, weights left out, each once."""
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).to(held)  # type: ignore[no-untyped-call]
    if resolved.base_format == "FP8":
        model.save_pretrained(folder)
        model = load_base(folder, resolved, torch.device("cpu"), held)
    inner = model
    if (settings := build_lora(resolved, model)) is not None:
        model = get_peft_model(model, settings)
        model.enable_input_require_grads()
    model.train()
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    ids = torch.zeros(rows, tokens, dtype=torch.long)
    compute = torch.autocast("cpu", dtype=torch.bfloat16)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), compute:
        out = inner.base_model(ids, use_cache=False).last_hidden_state
    assert out.requires_grad
    return sum(storage.nbytes() for storage in found.values())


# What was measured on a GPU

PEAKS_GIB = {
    "llama QLoRA 8x512 Full": 1.96,
    "llama QLoRA 8x512 Off": 7.67,
    "llama QLoRA 2x4096 Full": 2.74,
    "llama QLoRA 2x4096 Off": 13.88,
    "llama LoRA 8x512 Full": 3.50,
    "llama LoRA 8x512 Off": 10.01,
    "llama LoRA 2x4096 Full": 4.46,
    "llama LoRA 2x4096 Off": 17.38,
    "llama Full 8x512 Full": 23.08,
    "llama Full 8x512 Off": 29.79,
    "llama Full 2x4096 Full": 23.08,
    "llama Full 2x4096 Off": 37.80,
    "llama QLoRA 8x512 Selective": 4.93,
    "llama LoRA 8x512 Selective": 9.16,
    "llama QLoRA r=64 dropout 8x512 Off": 10.50,
    "llama QLoRA packed 2x2048 Off": 8.29,
    "llama Int8 4x1024 Off": 15.92,
    "llama Int8 4x1024 Full": 7.16,
    "llama Full BF16 AdamW8bit 8x512 Off": 16.93,
    "llama GaLore 8x512 Full": 8.31,
    "qwen3 LoRA 8x512 Off": 9.32,
    "qwen3 Full 8x512 Full": 11.17,
    "llama QLoRA fast 8x512 Full": 1.97,
    "llama QLoRA fast 8x512 Off": 4.73,
    "llama QLoRA fast 2x4096 Full": 2.63,
    "llama QLoRA fast 2x4096 Off": 8.07,
    "llama LoRA fast 8x512 Full": 3.27,
    "llama LoRA fast 8x512 Off": 6.03,
    "llama LoRA fast 2x4096 Full": 3.93,
    "llama LoRA fast 2x4096 Off": 9.37,
    "llama QLoRA fast 8x512 Selective": 2.22,
    "llama LoRA fast 8x512 Selective": 3.52,
    "llama QLoRA r=64 dropout fast 8x512 Off": 5.28,
    "llama QLoRA fast packed 2x2048 Off": 4.73,
    "qwen3 LoRA fast 8x512 Off": 5.45,
}
"""Peaks of a step on an H100 with torch 2.11, as `python -m benchmarks.estimate` printed them: benchmarks/README.md."""


def test_peaks_that_were_measured_on_an_h100_come_out(tmp_path: Path) -> None:
    """The formulas alone: nothing is measured here."""
    facts = {name: describe_config(write_config(tmp_path / name, shape.to_dict())) for name, shape in SHAPES.items()}
    assert {run.name for run in (*GRID, *FAST_GRID)} == set(PEAKS_GIB)
    for run in (*GRID, *FAST_GRID):
        model = facts[run.shape]
        found = estimate(model, settle_run(run, model), Batch(run.rows, run.tokens, masked=run.packed))
        assert found.peak_bytes / GIB == pytest.approx(PEAKS_GIB[run.name], rel=0.025), run.name


# What must grow, and what must not

Shape = tuple[int, int, int, int]


@st.composite
def models(draw: Callable[[Any], Any]) -> ModelFacts:
    """Llamas of any width: the facts alone, as `describe_config` gives them."""
    head, key_value, group = draw(st.sampled_from((16, 64))), draw(st.integers(1, 8)), draw(st.integers(1, 4))
    hidden, inner, layers = head * key_value * group, draw(st.integers(1, 64)) * 32, draw(st.integers(1, 4))
    columns: dict[str, int] = {}
    rows: dict[str, int] = {}
    norms = {"model.norm": hidden}
    for index in range(layers):
        at, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."
        shapes = {
            f"{at}q_proj": (hidden, hidden),
            f"{at}k_proj": (hidden, head * key_value),
            f"{at}v_proj": (hidden, head * key_value),
            f"{at}o_proj": (hidden, hidden),
            f"{mlp}gate_proj": (hidden, inner),
            f"{mlp}up_proj": (hidden, inner),
            f"{mlp}down_proj": (inner, hidden),
        }
        columns |= {name: shape[0] for name, shape in shapes.items()}
        rows |= {name: shape[1] for name, shape in shapes.items()}
        norms |= {f"model.layers.{index}.{name}": hidden for name in ("input_layernorm", "post_attention_layernorm")}
    words, tied = draw(st.integers(100, 50_000)), draw(st.booleans())
    parameters = sum(columns[name] * rows[name] for name in columns) + sum(norms.values())
    return ModelFacts(
        "LlamaForCausalLM", parameters + words * hidden * (1 if tied else 2), None, columns, linear_rows=rows,
        norms=norms, hidden=hidden, heads=key_value * group, vocabulary=words, tied=tied,
    )  # fmt: skip


METHODS = [
    of_method("QLoRA", r=4),
    of_method("LoRA", "BF16", r=4),
    of_method("LoRA", "Int8", r=4),
    of_method("LoRA", "FP8", r=4),
    of_method("Full", "FP32"),
    of_method("Full", "BF16"),
    {"method": {"type": "GaLore", "galore": {"rank": 8}}},
]
jobs = st.fixed_dictionaries(
    {
        "fields": st.sampled_from(METHODS),
        "optimizer": st.sampled_from(("AdamW", "AdamW8bit", "PagedAdamW8bit", "Adafactor", "SGD")),
        "way": st.sampled_from(("Off", "Selective", "Full")),
        "path": st.sampled_from(("Auto", "Off")),
    }
)


def job_of(model: ModelFacts, job: dict[str, Any]) -> Resolved:
    galore = job["fields"]["method"]["type"] == "GaLore"
    training = {"gradientCheckpointing": job["way"], "fastPath": job["path"]}
    training |= {} if galore else {"optimizer": job["optimizer"]}
    return settle(model, training=training, **job["fields"])


@settings(max_examples=60, deadline=None)
@given(models(), jobs, st.integers(1, 16), st.integers(8, 4096), st.booleans())
def test_more_rows_and_longer_rows_never_take_less(
    model: ModelFacts, job: dict[str, Any], rows: int, tokens: int, masked: bool
) -> None:
    resolved = job_of(model, job)
    batch = Batch(rows, tokens, masked)
    found = estimate(model, resolved, batch).peak_bytes
    for larger in (replace(batch, rows=rows + 1), replace(batch, tokens=tokens + 8)):
        assert estimate(model, resolved, larger).peak_bytes >= found


@settings(max_examples=60, deadline=None)
@given(models(), jobs, st.integers(1, 16), st.integers(8, 4096))
def test_computing_again_never_keeps_more_than_it_makes_anew(
    model: ModelFacts, job: dict[str, Any], rows: int, tokens: int
) -> None:
    off, full = (job_of(model, job | {"way": way, "path": "Off"}) for way in ("Off", "Full"))
    batch = Batch(rows, tokens, masked=False)
    one_block = max(kept_by_block(block, off, model, batch) for block in blocks_of(model))
    entries = len(blocks_of(model)) * rows * tokens * model.hidden * 4
    found, without = (estimate(model, each, batch) for each in (full, off))
    assert found.activations_bytes <= without.activations_bytes + one_block + entries
    if len(blocks_of(model)) >= 3:  # fewer keep their input and one block beside it
        assert found.peak_bytes <= without.peak_bytes


@settings(max_examples=40, deadline=None)
@given(models(), st.integers(1, 8), st.integers(8, 2048))
def test_fewer_bits_and_fewer_trained_weights_take_less(model: ModelFacts, rows: int, tokens: int) -> None:
    ladder = [of_method("QLoRA", r=4), of_method("LoRA", "BF16", r=4), of_method("Full", "FP32")]
    plain = [settle(model, training=PLAIN, **fields) for fields in ladder]
    held = [estimate(model, each, Batch(rows, tokens, masked=False)) for each in plain]
    for less, more in pairwise(held):
        assert less.weights_bytes <= more.weights_bytes
    assert held[0].gradients_bytes == held[1].gradients_bytes


@settings(max_examples=40, deadline=None)
@given(models(), st.sampled_from((2, 4, 8)), st.booleans())
def test_more_gpus_share_what_is_sharded(model: ModelFacts, gpus: int, gathers_once: bool) -> None:
    sharding = {"sharding": "GradOp"} if gathers_once else {"sharding": "Full"}
    one = estimate(model, settle(model, **of_method("Full")), Batch(1, 64, masked=False))
    many = settle(model, parallelism={"gpusPerNode": gpus, "fsdp": sharding}, **of_method("Full"))
    found = estimate(model, many, Batch(1, 64, masked=False))
    for part in ("weights_bytes", "gradients_bytes", "optimizer_bytes"):
        assert getattr(found, part) == -(-getattr(one, part) // gpus)
    offloaded = settle(model, parallelism={"gpusPerNode": gpus, "fsdp": {"cpuOffload": True}}, **of_method("Full"))
    assert estimate(model, offloaded, Batch(1, 64, masked=False)).weights_bytes == 0


def test_fsdp_gathers_in_what_is_computed_in_so_autocast_copies_no_weights(llama_8b: ModelFacts) -> None:
    one, eight = (settle(llama_8b, parallelism={"gpusPerNode": gpus}, **of_method("Full")) for gpus in (1, 8))
    casts = count_holdings(llama_8b, one).casts
    batch = Batch(1, 64, masked=False)
    assert estimate(llama_8b, one, batch).workspace_bytes > casts > estimate(llama_8b, eight, batch).workspace_bytes


# Where nothing is claimed

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
UNKNOWN = {
    "qwen3_moe": {**SMALL, **MOE},
    "gemma": {**SMALL, "head_dim": 16},
    "gpt_bigcode": {"n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 320},
}


@pytest.mark.parametrize("family", UNKNOWN)
def test_nothing_is_claimed_of_blocks_that_are_not_known(family: str, tmp_path: Path) -> None:
    facts = describe_config(write_config(tmp_path, {"model_type": family, **UNKNOWN[family]}))
    assert why_none(facts, settle(facts)) == f"what the blocks of {facts.architecture} keep is not known"


def test_nothing_is_claimed_of_dora(llama_8b: ModelFacts) -> None:
    assert why_none(llama_8b, settle(llama_8b, **of_method("LoRA", useDora=True))) == "what DoRA keeps is not known"
    assert why_none(llama_8b, settle(llama_8b)) is None


def test_held_out_rows_count_only_where_there_are_any(llama_8b: ModelFacts) -> None:
    assert measured_tokens(ROWS) == 1024
    assert measured_tokens(ROWS.model_copy(update={"length_max": 8192})) == 8192
    assert measured_tokens(ROWS.model_copy(update={"eval_rows": 0, "length_max": 8192})) == 0
    batch, resolved = Batch(1, 512, masked=False), settle(llama_8b)
    with_rows, without = (estimate(llama_8b, resolved, batch, tokens) for tokens in (1024, 0))
    assert with_rows.measuring_bytes - without.measuring_bytes == 8 * 1024 * 128_256
    assert with_rows.peak_bytes == without.peak_bytes


# Figures of others


def full(model: ModelFacts, held: str, optimizer: str) -> Estimate:
    """Recipe 1's table: all 8B weights, micro-batch 8, rows of 512 tokens, nothing computed again."""
    training = {"optimizer": optimizer, "perDeviceTrainBatchSize": 8, "gradientCheckpointing": "Off"}
    resolved = settle(model, training=training, **of_method("Full", held))
    return estimate(model, resolved, Batch(8, 512, masked=False))


def test_the_weights_and_states_of_recipe_1_come_out(llama_8b: ModelFacts) -> None:
    """In GiB 14.96 in bf16 and 59.83 of moments in fp32: what bitsandbytes' AdamW holds for a model in bf16."""
    found = full(llama_8b, "BF16", "PagedAdamW")
    assert found.weights_bytes / GIB == pytest.approx(14.96, rel=0.02)
    assert found.optimizer_bytes / GIB == pytest.approx(59.83, rel=0.02)
    assert full(llama_8b, "FP32", "AdamW").optimizer_bytes / GIB == pytest.approx(59.83, rel=0.02)
    in_8_bits = full(llama_8b, "FP32", "AdamW8bit").optimizer_bytes / GIB  # about 15, were embeddings in 8 bits too
    assert in_8_bits == pytest.approx(15 + 6 * llama_8b.hidden * 128_256 / GIB, rel=0.02)


def test_activations_are_about_those_of_the_known_formula_without_the_scores_of_attention(
    llama_8b: ModelFacts,
) -> None:
    """s b h (34 + 5 a s / h) L is 27.0 GiB, 17.0 without the scores, of an MLP of 4 h; Llama's are gated, of 3.5 h."""
    found = full(llama_8b, "BF16", "AdamW").activations_bytes / GIB
    assert 17.0 < found < 27.0


def test_paged_states_need_no_room_on_the_gpu(llama_8b: ModelFacts) -> None:
    paged, resident = (full(llama_8b, "BF16", optimizer) for optimizer in ("PagedAdamW8bit", "AdamW8bit"))
    assert paged.optimizer_bytes == resident.optimizer_bytes
    assert resident.peak_bytes - paged.peak_bytes > 0.7 * resident.optimizer_bytes


def test_a_packed_micro_batch_is_full_and_pairs_are_two_rows(llama_8b: ModelFacts) -> None:
    packed = settle(llama_8b, ROWS.model_copy(update={"packed_rows": 16_000}), training={"maxLength": 2048})
    assert batch_of(packed, ROWS) == Batch(4, 2048, masked=True)
    pairs = settle(llama_8b, objective={"type": "DPO"}, training={"perDeviceTrainBatchSize": 1})
    assert batch_of(pairs, ROWS) == Batch(2, 512, masked=True)
