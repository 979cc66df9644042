"""Every method on every format of the base: it learns, trains what it should alone, and goes on exactly."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import peft_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from finetune_trainer.models import census
from finetune_trainer.models.finished import save_weights
from finetune_trainer.models.loading import extend_embeddings, import_peft, load_base
from finetune_trainer.progress import ResolvedGaLore
from finetune_trainer.runtime.errors import VerificationFailed
from finetune_trainer.training import state
from finetune_trainer.training.adapters import save_adapter
from finetune_trainer.training.arguments import PRODUCTS
from tests.tiny import ARCHITECTURES, make_tiny_gptq, make_tiny_model
from tests.unit.trainer.runs import (
    CPU,
    LINEAR,
    SETTINGS,
    CrashAfter,
    CrashError,
    Run,
    replace_settings,
    same_bits,
    weights,
)

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_trainer.progress import Resolved

STEPS = 10
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ADDED = (320, 321)
LORA_WEIGHTS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class Method:
    """A method as a job would have it."""

    settings: dict[str, Any]
    model: str = "Llama"
    trains: tuple[str, ...] = LORA_WEIGHTS
    """What the names of all that trains contain, one of them each."""
    quantizes: set[str] = field(default_factory=set)
    """Classes of the layers that the base is held in."""


def lora(**changes: Any) -> dict[str, Any]:
    assert SETTINGS.lora is not None
    return {"lora": SETTINGS.lora.model_copy(update=changes)}


def plain(dtype: str, **changes: Any) -> dict[str, Any]:
    return {"method": "LoRA", "base_format": dtype, "compute_dtype": dtype, **changes}


def whole(method: str, dtype: str = "FP32", **changes: Any) -> dict[str, Any]:
    return {
        "method": method,
        "base_format": dtype,
        "compute_dtype": dtype,
        "lora": None,
        "learning_rate": 0.002,
        **changes,
    }


GALORE = ResolvedGaLore(rank=8, update_interval=3, scale=1.0)
TOKENS = ("trainable_tokens_delta",)
METHODS = {
    "NF4": Method({}, quantizes={"Linear4bit"}),
    "NF4, single quantization": Method({"double_quantization": False}, quantizes={"Linear4bit"}),
    "FP4": Method({"base_format": "FP4"}, quantizes={"Linear4bit"}),
    "GPTQ": Method({"base_format": "GPTQ"}, "GPTQ", quantizes={"TorchLinear"}),
    "Int8": Method({"method": "LoRA", "base_format": "Int8"}, quantizes={"Linear8bitLt"}),
    "FP8": Method({"method": "LoRA", "base_format": "FP8"}, quantizes={"Float8Linear"}),
    "FP8, recomputed": Method(
        {"method": "LoRA", "base_format": "FP8", "gradient_checkpointing": "Full"}, quantizes={"Float8Linear"}
    ),
    "FP8, biases": Method(
        {"method": "LoRA", "base_format": "FP8", **lora(bias="All", use_rslora=True)},
        "Qwen2",
        trains=(*LORA_WEIGHTS, "bias"),
        quantizes={"Float8Linear"},
    ),
    "FP8, added tokens": Method(
        {"method": "LoRA", "base_format": "FP8", "added_tokens": ADDED}, trains=(*LORA_WEIGHTS, *TOKENS)
    ),
    "LoRA BF16": Method(plain("BF16")),
    "LoRA FP32": Method(plain("FP32")),
    "DoRA": Method(lora(use_dora=True), trains=(*LORA_WEIGHTS, "lora_magnitude_vector")),
    "rsLoRA, Gaussian": Method(lora(use_rslora=True, init_lora_weights="Gaussian")),
    "Orthogonal": Method({**plain("FP32"), **lora(init_lora_weights="Orthogonal")}),
    "biases": Method(lora(bias="LoraOnly"), "Qwen2", trains=(*LORA_WEIGHTS, "bias")),
    "excluded": Method(lora(exclude_modules=("down_proj",))),
    "saved module, tied": Method(lora(modules_to_save=("embed_tokens",)), trains=(*LORA_WEIGHTS, "modules_to_save")),
    "saved modules": Method(
        lora(modules_to_save=("embed_tokens", "lm_head")), "Qwen2", trains=(*LORA_WEIGHTS, "modules_to_save")
    ),
    "added tokens, tied": Method({"added_tokens": ADDED}, trains=(*LORA_WEIGHTS, *TOKENS)),
    "added tokens": Method({"added_tokens": ADDED}, "Qwen2", trains=(*LORA_WEIGHTS, *TOKENS)),
    "added tokens, GPTQ": Method({"added_tokens": ADDED, "base_format": "GPTQ"}, "GPTQ", (*LORA_WEIGHTS, *TOKENS)),
    "experts": Method(
        {**plain("FP32"), **lora(dropout=0.0, target_modules=LINEAR[:4], target_parameters=EXPERTS)}, "Qwen3Moe"
    ),
    "experts, NF4": Method(lora(dropout=0.0, target_modules=LINEAR[:4], target_parameters=EXPERTS), "Qwen3Moe"),
    "Conv1D": Method({**plain("FP32"), **lora(target_modules=("c_attn", "c_proj"))}, "GPT2"),
    "Conv1D, FP8": Method(
        {"method": "LoRA", "base_format": "FP8", **lora(target_modules=("c_attn", "c_proj"))},
        "GPT2",
        quantizes={"Float8Linear"},
    ),
    "Conv1D, NF4": Method(lora(target_modules=("c_attn", "c_proj")), "GPT2", quantizes={"Linear4bit"}),
    "GPTBigCode, Int8": Method(
        {"method": "LoRA", "base_format": "Int8", **lora(target_modules=("attn.c_proj", "attn.c_attn"))},
        "GPTBigCode",
        quantizes={"Linear8bitLt"},
    ),
    "Full": Method(whole("Full"), trains=("",)),
    "Full BF16": Method(whole("Full", "BF16"), trains=("",)),
    "Full, added tokens": Method(whole("Full", added_tokens=ADDED), trains=("",)),
    "Full, experts": Method(whole("Full"), "Qwen3Moe", trains=("",)),
    "GaLore": Method(whole("GaLore", galore=GALORE), trains=("",)),
    "GaLore BF16": Method(whole("GaLore", "BF16", galore=GALORE), trains=("",)),
    "GaLore, Conv1D": Method(whole("GaLore", galore=GALORE), "GPT2", trains=("",)),
    **{
        f"{optimizer}": Method({"optimizer": optimizer, **lora(r=64)})
        for optimizer in ("AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "Adafactor")
    },
    "SGD": Method({"optimizer": "SGD", "learning_rate": 0.5}),
    "noise on embeddings": Method({"neftune_noise_alpha": 0.1, "added_tokens": ADDED}, trains=(*LORA_WEIGHTS, *TOKENS)),
    "recomputed": Method({"gradient_checkpointing": "Full"}),
    "recomputed but for products": Method({"gradient_checkpointing": "Selective"}),
}
ADAPTERS = [name for name, method in METHODS.items() if "lora" not in method.settings or method.settings["lora"]]
WHOLE = [name for name in METHODS if name not in ADAPTERS]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of each architecture, and one that GPTQ quantized."""
    folder = tmp_path_factory.mktemp("models")
    for architecture in ARCHITECTURES:
        make_tiny_model(folder / architecture, architecture=architecture)
    make_tiny_gptq(folder / "GPTQ")
    return folder


def prepare(name: str, models: Path, root: Path, **changes: Any) -> Run:
    method = METHODS[name]
    quiet = {"total_steps": STEPS, "eval_steps": 100, "checkpoint_steps": 100}
    return Run(models / method.model, root).change(**quiet | method.settings | changes)


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """Copies of all that a model is made of."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_learns_and_moves_nothing_but_what_it_trains(models: Path, tmp_path: Path, name: str) -> None:
    method = METHODS[name]
    trainer, _ = prepare(name, models, tmp_path).build()
    trained, before = {name for name, _ in state.trained(trainer.model)}, tensors(trainer.model)
    assert trained
    assert all(any(part in each for part in method.trains) for each in trained)
    assert all(any(part in each for each in trained) for part in method.trains)
    assert {type(module).__name__ for module in trainer.model.modules()} >= method.quantizes
    trainer.train()
    after = tensors(trainer.model)
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert {name for name in before if not torch.equal(before[name], after[name])} <= trained


@pytest.mark.parametrize(
    "name",
    ["GPTQ", "Int8", "FP8", "LoRA BF16", "DoRA", "added tokens", "experts", "saved module, tied", "Conv1D", *WHOLE],
)
def test_a_method_goes_on_exactly(models: Path, tmp_path: Path, name: str) -> None:
    unbroken = prepare(name, models, tmp_path / "unbroken", total_steps=6).go()
    run = prepare(name, models, tmp_path / "broken", total_steps=6, checkpoint_steps=2)
    with pytest.raises(CrashError):
        run.go(CrashAfter(5))
    assert same_bits(run.go(), unbroken)


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "Adafactor", "SGD"])
def test_an_optimizer_goes_on_exactly(models: Path, tmp_path: Path, optimizer: str) -> None:
    unbroken = prepare(optimizer, models, tmp_path / "unbroken", total_steps=6).go()
    run = prepare(optimizer, models, tmp_path / "broken", total_steps=6, checkpoint_steps=2)
    with pytest.raises(CrashError):
        run.go(CrashAfter(5))
    assert same_bits(run.go(), unbroken)


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "PagedAdamW8bit"])
def test_states_of_eight_bits_are_of_eight_bits(models: Path, tmp_path: Path, optimizer: str) -> None:
    trainer, _ = prepare(optimizer, models, tmp_path, total_steps=1).build()
    trainer.train()
    assert torch.uint8 in {each["state1"].dtype for each in trainer.optimizer.state.values()}


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, 17, 33, 250, 9, 101, 44]])
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", ADAPTERS)
def test_plain_peft_reads_the_adapter_and_gives_the_same_logits(models: Path, tmp_path: Path, name: str) -> None:
    run = prepare(name, models, tmp_path, total_steps=3)
    trainer, _ = run.build()
    start = logits(trainer.model)
    trainer.train()
    save_adapter(trainer.model, tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    distinct = {tensor.numpy().tobytes(): tensor.numel() for tensor in saved}  # PEFT writes a tied head twice
    assert sum(distinct.values()) == census.totals(census.count_layers(trainer.model))[0]
    base = load_base(run.model, run.settings, CPU, torch.bfloat16 if name == "LoRA BF16" else torch.float32)
    read = import_peft().PeftModel.from_pretrained(base, tmp_path / "adapter")
    expected = logits(unwrapped(trainer))
    assert torch.equal(logits(read), expected)
    assert not torch.equal(start, expected)


def test_an_adapter_that_is_damaged_in_saving_is_not_published(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, _ = prepare("LoRA BF16", models, tmp_path, total_steps=1).build()

    def save_damaged(tensors: dict[str, torch.Tensor], *options: Any, **more: Any) -> None:
        save_file({name: tensor * 0.999 for name, tensor in tensors.items()}, *options, **more)

    monkeypatch.setattr(peft_model, "safe_save_file", save_damaged)
    with pytest.raises(VerificationFailed, match=r"lora_A\.default\.weight is not in it"):
        save_adapter(trainer.model, tmp_path / "adapter")


def unwrapped(trainer: Any) -> Any:
    """The model without the autocast that Trainer put around it."""
    return trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_trained_whole_is_saved_as_any_other(models: Path, tmp_path: Path, name: str) -> None:
    trainer, _ = prepare(name, models, tmp_path, total_steps=3).build()
    trainer.train()
    trained = {name: tensor.bfloat16() for name, tensor in weights(trainer.model).items()}
    save_weights(trainer.model, tmp_path / "merged", "BF16", "100KB")
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 1
    shipped = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert same_bits(dict(shipped.named_parameters()), trained)
    assert str(models) not in (tmp_path / "merged" / "config.json").read_text()


# Added tokens


@pytest.mark.parametrize("model", ["Llama", "Qwen2"])
def test_added_tokens_begin_as_the_mean_and_alone_among_the_embeddings_train(
    models: Path, tmp_path: Path, model: str
) -> None:
    run = Run(models / model, tmp_path).change(added_tokens=(7, *ADDED), total_steps=3, eval_steps=100)
    trainer, _ = run.build()
    base = load_base(run.model, run.settings, CPU, torch.float32)
    places = [base.get_input_embeddings(), base.get_output_embeddings()]
    known = load_file(run.model / "model.safetensors")["model.embed_tokens.weight"].float()
    assert torch.allclose(places[0].weight[ADDED[0]], known[:7].mean(0), atol=1e-6)
    assert all(torch.equal(place.weight[320], place.weight[7]) for place in places)
    trainer.train()
    merged = trainer.model.merge_and_unload()
    for before, after in zip(places, (merged.get_input_embeddings(), merged.get_output_embeddings()), strict=True):
        moved = (before.weight != after.weight).any(1).nonzero().flatten().tolist()
        assert set(moved) <= {7, *ADDED}
    assert merged.config.vocab_size == 322


def test_room_that_a_model_has_for_tokens_is_used(models: Path, tiny_settings: Resolved) -> None:
    base = load_base(models / "Llama", tiny_settings, CPU, torch.float32)
    extend_embeddings(base, (310,))
    assert base.get_input_embeddings().num_embeddings == 320


@pytest.fixture
def tiny_settings() -> Resolved:
    return replace_settings(SETTINGS, **plain("FP32"))


# Going on from an adapter


def test_an_adapter_is_gone_on_from_where_it_was_left_to_the_bit(models: Path, tmp_path: Path) -> None:
    first, _ = prepare("DoRA", models, tmp_path / "first", total_steps=3).build()
    first.train()
    model = shutil.copytree(models / "Llama", tmp_path / "model")
    save_adapter(first.model, model / "adapter")
    second, _ = Run(model, tmp_path / "second").change(**lora(r=2, use_dora=False)).build()
    assert same_bits(weights(second.model), weights(first.model))
    assert {tensor.dtype for tensor in weights(second.model).values()} == {torch.float32}
    second.train()
    assert not same_bits(weights(second.model), weights(first.model))


# What is told


def test_the_census_names_classes_and_dtypes_and_counts_packed_weights_as_numbers(models: Path, tmp_path: Path) -> None:
    trainer, _ = prepare("DoRA", models, tmp_path).build()
    layers = census.count_layers(trainer.model)
    found = {(layer.module, layer.dtype): (layer.parameters, layer.trainable) for layer in layers}
    assert found[("Linear4bit", "nf4")] == (73728, 0)
    assert found[("lora.Linear4bit", "float32")] == (9216, 9216)
    assert found[("Embedding", "float32")] == (20480, 0)
    assert census.totals(layers) == (9216, 94528 + 9216)
    table = census.table(layers)
    assert "9,216 of 103,744 parameters train (8.88%)" in table
    assert "lora.Linear4bit" in table
    census.write(tmp_path / "report" / "layers.json", layers, layers)
    assert len(json.loads((tmp_path / "report" / "layers.json").read_text())["after"]) == len(layers)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("GPTQ", ("TorchLinear", "gptq"), id="GPTQ"),
        pytest.param("Int8", ("Linear8bitLt", "int8"), id="8 bits"),
        pytest.param("FP8", ("Float8Linear", "float8_e4m3fn"), id="8 bits, floating"),
        pytest.param("LoRA BF16", ("Linear", "bfloat16"), id="16 bits"),
    ],
)
def test_a_base_counts_the_same_however_it_is_held(
    models: Path, tmp_path: Path, name: str, kind: tuple[str, str]
) -> None:
    trainer, _ = prepare(name, models, tmp_path).build()
    found = {(each.module, each.dtype): each.parameters for each in census.count_layers(trainer.model)}
    assert found[kind] == 73728
    assert census.totals(census.count_layers(trainer.model)) == (8192, 94528 + 8192)


def test_of_many_kinds_of_layers_the_small_ones_are_told_together() -> None:
    model = torch.nn.Module()
    for index in range(30):
        kind = type(f"Layer{index}", (torch.nn.Linear,), {})
        model.add_module(f"layer{index}", kind(index + 1, 1, bias=False))
    layers = census.count_layers(model)
    assert len(layers) == census.LAYERS_SHOWN
    assert layers[-1].module == census.OTHERS
    assert census.totals(layers) == (465, 465)


def test_beside_layers_of_eight_bits_all_else_is_held_in_fp32(models: Path, tmp_path: Path) -> None:
    trainer, _ = prepare("GPTBigCode, Int8", models, tmp_path).build()
    dtypes = {each.module: each.dtype for each in census.count_layers(trainer.model)}
    assert dtypes == {
        "Linear8bitLt": "int8",
        "Embedding": "float32",
        "LayerNorm": "float32",
        "lora.Linear8bitLt": "float32",
    } | {kind: dtype for kind, dtype in dtypes.items() if kind == "Linear8bitLt"}


# Optimizers and schedules


@pytest.mark.parametrize("name", ["Full", "GaLore"])
def test_weight_decay_leaves_norms_and_biases_alone(models: Path, tmp_path: Path, name: str) -> None:
    run = prepare(name, models, tmp_path, weight_decay=0.1, adam_beta2=0.95)
    run.model = models / "Qwen2"
    trainer, _ = run.build()
    decays = {
        name: group["weight_decay"]
        for group in trainer.create_optimizer().param_groups
        for tensor in group["params"]
        for name, parameter in trainer.model.named_parameters()
        if parameter is tensor
    }
    assert len(decays) == len(list(trainer.model.named_parameters()))
    assert {decay for name, decay in decays.items() if "norm" in name or name.endswith("bias")} == {0.0}
    assert {decay for name, decay in decays.items() if name.endswith("proj.weight")} == {0.1}
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.9, 0.95)}


def test_galore_projects_the_layers_of_the_blocks(models: Path, tmp_path: Path) -> None:
    trainer, _ = prepare("GaLore", models, tmp_path, total_steps=1).build()
    trainer.train()
    states = {name: trainer.optimizer.state[tensor] for name, tensor in trainer.model.named_parameters()}
    projected = {name for name, each in states.items() if "projector" in each}
    assert projected == {name for name in states if name.endswith("_proj.weight")}
    assert {min(states[name]["exp_avg"].shape) for name in projected} == {GALORE.rank}


@pytest.mark.parametrize(
    ("scheduler", "rates"),
    [
        pytest.param("Cosine", (1.0, 0.75, 0.25, 0.0), id="cosine"),
        pytest.param("Linear", (1.0, 2 / 3, 1 / 3, 0.0), id="line"),
        pytest.param("Constant", (1.0, 1.0, 1.0, 1.0), id="constant"),
        pytest.param("CosineWithRestarts", (1.0, 0.25, 0.75, 0.0), id="the second begins at the peak"),
        pytest.param("Polynomial", (1.0, 4 / 9, 1 / 9, 0.0), id="square"),
        pytest.param("InverseSqrt", (1.0, 0.5**0.5, 3**-0.5, 0.5), id="inverse square root"),
    ],
)
def test_a_schedule_takes_its_course(models: Path, tmp_path: Path, scheduler: str, rates: tuple[float, ...]) -> None:
    settings = {"lr_scheduler": scheduler, "warmup_steps": 3, "num_train_epochs": 2.0, "learning_rate": 1e-8}
    run = prepare("LoRA FP32", models, tmp_path, **settings)
    trainer, _ = run.build()
    trainer.create_optimizer_and_scheduler(12)
    course = trainer.lr_scheduler.lr_lambdas[0]
    assert [course(step) for step in (3, 6, 9, 12)] == pytest.approx(rates, abs=1e-6)
    assert course(0) == 0.0


class CountingProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch is half typed
    """Counts the products that are computed: not those that selective checkpointing has kept."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in PRODUCTS
        return func(*args, **kwargs or {})


def test_selective_checkpointing_computes_no_product_again(models: Path, tmp_path: Path) -> None:
    counts, told = {}, {}
    for kind in ("Off", "Selective", "Full"):
        run = prepare("Full", models, tmp_path / kind, total_steps=2, gradient_checkpointing=kind)
        trainer, _ = run.build()
        with CountingProducts() as counting:  # type: ignore[no-untyped-call]
            trainer.train()
        counts[kind], told[kind] = counting.count, losses(trainer)
    assert counts["Off"] == counts["Selective"] < counts["Full"]
    assert told["Off"] == told["Selective"] == told["Full"]


def test_selective_checkpointing_keeps_products_of_layers_in_fp8_as_of_any(models: Path, tmp_path: Path) -> None:
    counts = {}
    for name in ("LoRA FP32", "FP8"):
        run = prepare(name, models, tmp_path / name, total_steps=2, gradient_checkpointing="Selective")
        trainer, _ = run.build()
        with CountingProducts() as counting:  # type: ignore[no-untyped-call]
            trainer.train()
        counts[name] = counting.count
    assert counts["LoRA FP32"] == counts["FP8"]
