"""What a method cannot do on a model: refused in prepare, with the field and the way out."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_trainer.config import JobConfig
from finetune_trainer.models.folder import ModelFacts, check_folder, describe
from finetune_trainer.progress import ResolvedGaLore
from finetune_trainer.runtime.errors import InvalidConfig, InvalidModel, TrainerError
from finetune_trainer.settings.methods import (
    check_added_tokens,
    check_method,
    remedy_for_lost_numbers,
    resolve_base_format,
    resolve_compute_dtype,
    resolve_galore,
    resolve_lora,
)
from tests.tiny import make_config, make_tiny_gptq, make_tiny_model
from tests.unit.trainer.runs import SETTINGS, replace_settings

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
BLOCKS = [f"model.layers.{block}." for block in range(2)]
LAYERS = {block + name: 64 for block in BLOCKS for name in NAMES}
ROWS = {name: 32 if "k_proj" in name else 64 for name in LAYERS}
MODULES = ("model.embed_tokens", *LAYERS, "model.norm", "lm_head")
EXPERTS = {f"{block}mlp.experts.gate_up_proj": (4, 64, 64) for block in BLOCKS}


def facts(**known: Any) -> ModelFacts:
    """A model with two blocks of three linear layers."""
    told = {"linear_layers": LAYERS, "linear_rows": ROWS, "modules": MODULES, **known}
    return ModelFacts(architecture="TinyForCausalLM", parameters=1000, max_positions=512, **told)


def job(gpus: int = 1, attention: str = "Auto", **fields: Any) -> JobConfig:
    config = make_config() | {"parallelism": {"gpusPerNode": gpus}} | fields
    return JobConfig.model_validate(config | {"model": config["model"] | {"attention": attention}})


def qlora(**settings: Any) -> dict[str, Any]:
    return {"method": {"lora": settings}}


def held(kind: str, form: str, **settings: Any) -> dict[str, Any]:
    return {"method": {"type": kind, "baseWeights": {"format": form}, **settings}}


ADAPTER = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}
WITH_EXPERTS = {"experts": EXPERTS, "taken_for_experts": ("gate_proj", "down_proj")}


@pytest.mark.parametrize(
    ("given", "known", "words"),
    [
        pytest.param(
            qlora(targetModules=["qproj"]),
            {},
            "targetModules: TinyForCausalLM has no linear layer 'qproj'. Use some of q_proj, k_proj, down_proj,",
            id="a layer that is not there",
        ),
        pytest.param(
            qlora(excludeModules=["v_proj"]), {}, "excludeModules: .* has no linear layer 'v_proj'", id="excluded"
        ),
        pytest.param(
            qlora(targetModules=["q_proj"], excludeModules=["self_attn.q_proj"]),
            {},
            "excludeModules leaves no layer to adapt. Exclude fewer",
            id="all of them excluded",
        ),
        pytest.param(
            qlora(modulesToSave=["wte"]),
            {},
            "modulesToSave: .* has no module 'wte'. Use some of embed_tokens, .*lm_head",
            id="a module to save that is not there",
        ),
        pytest.param(
            qlora(modulesToSave=["k_proj"]),
            {},
            "modulesToSave: 'k_proj' is held in NF4 and cannot be trained whole. Adapt it",
            id="a quantized module to save",
        ),
        pytest.param(
            qlora(modulesToSave=["lm_head"]),
            {"tied": True},
            "modulesToSave: 'lm_head' .* is tied to its embeddings. Name embed_tokens instead",
            id="a tied head to save",
        ),
        pytest.param(
            qlora(targetParameters=["experts.up"]),
            WITH_EXPERTS,
            "targetParameters: .* has no parameter of fused experts 'experts.up'. Use some of mlp.experts.gate_up_proj",
            id="experts that are not there",
        ),
        pytest.param(
            qlora(targetParameters=["mlp.experts.gate_up_proj"]),
            {},
            "targetParameters: .* Leave targetParameters unset",
            id="experts of a model that has none",
        ),
        pytest.param(
            qlora(targetModules=["down_proj"]),
            WITH_EXPERTS,
            "PEFT takes 'down_proj' of TinyForCausalLM for its fused experts. Leave it out, and set targetParameters",
            id="a layer that PEFT takes for experts",
        ),
        pytest.param(
            qlora(dropout=0.1),
            WITH_EXPERTS,
            "dropout does not go with experts in one piece .*: set it to 0, or name targetModules",
            id="dropout on experts",
        ),
        pytest.param(
            qlora(useDora=True), WITH_EXPERTS, "useDora does not go with experts in one piece", id="DoRA on experts"
        ),
        pytest.param(
            held("LoRA", "BF16", lora={"initLoraWeights": "Orthogonal"}),
            WITH_EXPERTS,
            "initLoraWeights Orthogonal does not go with experts in one piece",
            id="orthogonal experts",
        ),
        pytest.param(
            qlora(r=128),
            {},
            "method.lora.r is 128, no adapted layer has a rank above 64. Set it to 64 or less, or use method.type Full",
            id="a rank above that of the layers",
        ),
        pytest.param(
            qlora(r=64, targetModules=["k_proj"]), {}, "no adapted layer has a rank above 32", id="and of those named"
        ),
        pytest.param(
            held("QLoRA", "GPTQ", lora={"useDora": True}),
            {"gptq": True},
            "useDora does not go with a base held in GPTQ: drop it, or use NF4",
            id="DoRA on GPTQ",
        ),
        pytest.param(
            held("LoRA", "Int8", lora={"useDora": True}), {}, "useDora does not go with .* Int8", id="DoRA on 8 bits"
        ),
        pytest.param(
            held("LoRA", "FP8", lora={"useDora": True}), {}, "useDora does not go with .* FP8", id="DoRA on FP8"
        ),
        pytest.param(
            held("LoRA", "FP8", lora={"modulesToSave": ["k_proj"]}),
            {},
            "'k_proj' is held in FP8 and cannot be trained whole",
            id="a layer in FP8, whole",
        ),
        pytest.param(
            held("LoRA", "FP8"), {"gptq": True}, "format is FP8, but the model is quantized already", id="GPTQ in FP8"
        ),
        pytest.param(
            held("QLoRA", "GPTQ", lora={"bias": "All"}),
            {"gptq": True},
            "bias does not go with a GPTQ",
            id="GPTQ's bias",
        ),
        pytest.param(
            qlora(bias="LoraOnly"),
            {"has_biases": False},
            "bias does not go with TinyForCausalLM, which has no biases: drop it",
            id="biases that are not there",
        ),
        pytest.param(
            {**qlora(bias="All"), "objective": {"type": "DPO"}},
            {},
            "bias does not go with DPO, whose reference is the model without its adapter",
            id="biases of a reference",
        ),
        pytest.param(
            qlora(initLoraWeights="Orthogonal"),
            {},
            "initLoraWeights Orthogonal does not go with a base held in NF4",
            id="orthogonal on 4 bits",
        ),
        pytest.param(
            held("LoRA", "FP32", lora={"initLoraWeights": "Orthogonal", "r": 7}),
            {},
            r"Orthogonal does not go with an odd rank \(7\): set method.lora.r to an even number",
            id="orthogonal of an odd rank",
        ),
        pytest.param(
            held("QLoRA", "GPTQ"), {}, "format is GPTQ, but the model is not quantized. Give a GPTQ", id="no GPTQ"
        ),
        pytest.param({}, {"gptq": True}, "format is NF4, but the model is quantized already", id="GPTQ unasked"),
        pytest.param(
            held("LoRA", "FP16") | {"gpus": 0}, {}, "format FP16 needs a GPU.* Set it to FP32 or BF16", id="FP16 on CPU"
        ),
        pytest.param(
            held("LoRA", "BF16", computeDtype="FP32"),
            {},
            "computeDtype FP32 does not go with a base that is held in BF16.*baseWeights.format to FP32 as well",
            id="fp32 products of 16 bits",
        ),
        pytest.param(
            {"gpus": 0, "attention": "FlashAttention2"},
            {},
            "model.attention FlashAttention2 needs a GPU.* Leave it unset, or set SDPA",
            id="flash attention on CPU",
        ),
        pytest.param(
            {"attention": "FlashAttention2", "method": {"computeDtype": "FP32"}},
            {},
            "FlashAttention2 computes in 16 bits, method.computeDtype is FP32",
            id="flash attention in FP32",
        ),
        pytest.param(
            {"method": {"type": "GaLore", "galore": {"rank": 65}}},
            {},
            "method.galore.rank is 65, no layer of TinyForCausalLM has more than 64. Set it to 64 or less",
            id="a projection that projects nothing",
        ),
        pytest.param(
            {"method": {"type": "GaLore"}, "training": {"optimizer": "SGD"}},
            {},
            "training.optimizer SGD does not go with GaLore",
            id="GaLore by another optimizer",
        ),
        pytest.param({}, {"linear_layers": {}}, "no linear layers that an adapter could be put on", id="no layers"),
        pytest.param(
            {"method": {"type": "GaLore"}}, {"linear_layers": {}}, "no linear layers to project", id="none to project"
        ),
        pytest.param(
            qlora(r=16),
            {"adapter": ADAPTER},
            "method.lora.r is 16, the adapter of model.adapter has 8. Drop r: the adapter's own settings hold",
            id="another rank than the adapter's",
        ),
        pytest.param(
            qlora(targetModules=["k_proj"]),
            {"adapter": ADAPTER},
            "method.lora.targetModules is k_proj, the adapter of model.adapter has q_proj",
            id="other layers than the adapter's",
        ),
        pytest.param(
            {},
            {"adapter": {**ADAPTER, "init_lora_weights": "pissa"}},
            "model.adapter began as 'pissa' .* Convert it to plain LoRA",
            id="an adapter that changed its base",
        ),
        pytest.param(
            held("QLoRA", "GPTQ"),
            {"gptq": True, "adapter": {**ADAPTER, "use_dora": True}},
            "useDora does not go with a base held in GPTQ",
            id="a DoRA adapter on GPTQ",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_with_field_and_remedy(
    given: dict[str, Any], known: dict[str, Any], words: str
) -> None:
    with pytest.raises(TrainerError, match=words) as found:
        check_method(job(**given), facts(**known))
    assert isinstance(found.value, InvalidConfig | InvalidModel)


@pytest.mark.parametrize(
    ("given", "form", "dtype"),
    [
        pytest.param({}, "NF4", "BF16", id="QLoRA"),
        pytest.param({"gpus": 0}, "NF4", "FP32", id="QLoRA on CPU"),
        pytest.param({"method": {"type": "LoRA"}}, "BF16", "BF16", id="LoRA"),
        pytest.param({"method": {"type": "LoRA"}, "gpus": 0}, "FP32", "FP32", id="LoRA on CPU"),
        pytest.param(held("LoRA", "FP16"), "FP16", "FP16", id="LoRA in half precision"),
        pytest.param(held("LoRA", "Int8", computeDtype="FP16"), "Int8", "FP16", id="LoRA on 8 bits, as asked for"),
        pytest.param(held("LoRA", "FP8"), "FP8", "BF16", id="LoRA on FP8"),
        pytest.param(held("LoRA", "FP8") | {"gpus": 0}, "FP8", "FP32", id="LoRA on FP8 on CPU"),
        pytest.param(held("LoRA", "BF16") | {"gpus": 0}, "BF16", "BF16", id="16 bits on CPU, as asked for"),
        pytest.param({"method": {"type": "Full"}}, "FP32", "BF16", id="Full: fp32 masters"),
        pytest.param({"method": {"type": "GaLore"}}, "BF16", "BF16", id="GaLore"),
    ],
)
def test_the_base_is_held_and_computed_in_what_suits_method_and_device(
    given: dict[str, Any], form: str, dtype: str
) -> None:
    config = job(**given)
    assert (resolve_base_format(config).value, resolve_compute_dtype(config)) == (form, dtype)


def test_an_adapter_is_put_on_all_linear_layers_and_fused_experts() -> None:
    lora = resolve_lora(job(), facts(**WITH_EXPERTS))
    assert lora is not None
    assert lora.target_modules == ("q_proj", "k_proj")
    assert lora.target_parameters == ("mlp.experts.gate_up_proj",)


def test_layers_that_are_named_are_those_adapted() -> None:
    lora = resolve_lora(job(**qlora(targetModules=["self_attn.q_proj"])), facts(**WITH_EXPERTS))
    assert lora is not None
    assert (lora.target_modules, lora.target_parameters) == (("self_attn.q_proj",), ())


def test_experts_alone_can_be_adapted() -> None:
    lora = resolve_lora(job(**qlora(targetParameters=["experts.gate_up_proj"])), facts(**WITH_EXPERTS))
    assert lora is not None
    assert (lora.target_modules, lora.target_parameters) == ((), ("experts.gate_up_proj",))


def test_the_settings_of_an_adapter_gone_on_from_hold() -> None:
    lora = resolve_lora(job(**qlora(r=8)), facts(adapter={**ADAPTER, "use_rslora": True, "bias": "lora_only"}))
    assert lora is not None
    assert (lora.r, lora.alpha, lora.target_modules) == (8, 16, ("q_proj",))
    assert (lora.use_rslora, lora.bias) == (True, "LoraOnly")


@pytest.mark.parametrize(
    ("known", "added"),
    [
        pytest.param({}, (320, 321), id="tokens that it does not know"),
        pytest.param({"trainable_token_indices": {"model.embed_tokens": [320, 321]}}, (), id="tokens left out"),
    ],
)
def test_an_adapter_is_gone_on_from_with_its_own_tokens(known: dict[str, Any], added: tuple[int, ...]) -> None:
    with pytest.raises(InvalidConfig, match=r"model.tokens.add has .* Add the tokens that it was trained with"):
        check_added_tokens(job(), facts(adapter=ADAPTER | known), added)
    rows = known.get("trainable_token_indices", {"model.embed_tokens": []})["model.embed_tokens"]
    check_added_tokens(job(), facts(adapter=ADAPTER | known), tuple(rows))


@pytest.mark.parametrize(
    ("asked", "rank"), [pytest.param({}, 64, id="by default"), pytest.param({"rank": 8}, 8, id="as asked for")]
)
def test_a_projection_is_no_larger_than_the_layers(asked: dict[str, Any], rank: int) -> None:
    galore = resolve_galore(job(method={"type": "GaLore", "galore": asked}), facts())
    assert galore is not None
    assert galore.rank == rank


@pytest.mark.parametrize(
    ("changes", "in_fp16", "remedy"),
    [
        pytest.param({}, False, "Lower training.learningRate", id="in fp32"),
        pytest.param(
            {"compute_dtype": "FP16"},
            True,
            "Lower training.learningRate, or set method.computeDtype to BF16",
            id="in fp16 as asked for",
        ),
        pytest.param(
            {"compute_dtype": "BF16"},
            True,
            "Lower training.learningRate, or set method.computeDtype to FP32",
            id="in fp16 for want of bf16",
        ),
        pytest.param(
            {"compute_dtype": "BF16", "base_format": "BF16"},
            False,
            "Lower training.learningRate, or set method.baseWeights.format and method.computeDtype to FP32",
            id="held in 16 bits",
        ),
        pytest.param(
            {"galore": ResolvedGaLore(rank=8, update_interval=200, scale=0.25)},
            False,
            "Lower training.learningRate, or lower method.galore.scale",
            id="GaLore",
        ),
    ],
)
def test_lost_numbers_have_a_remedy_that_the_method_takes(changes: dict[str, Any], in_fp16: bool, remedy: str) -> None:
    assert remedy_for_lost_numbers(replace_settings(SETTINGS, **changes), in_fp16=in_fp16) == remedy


# Folders


@pytest.fixture(scope="module")
def gptq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_gptq(tmp_path_factory.mktemp("gptq") / "tiny")


def test_a_gptq_model_is_described_by_its_layers(gptq: Path, tiny_model: Path) -> None:
    check_folder(gptq, "model")
    packed, plain = describe(gptq), describe(tiny_model)
    assert packed.gptq
    assert not plain.gptq
    assert packed.linear_layers == plain.linear_layers
    assert packed.parameters == plain.parameters == 94528
    assert plain.tied


def test_fused_experts_are_told_from_layers(tmp_path: Path) -> None:
    found = describe(make_tiny_model(tmp_path / "moe", architecture="Qwen3Moe"))
    assert found.expert_names == ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    assert found.linear_names == ("q_proj", "k_proj", "v_proj", "o_proj")
    assert "gate_proj" in found.taken_for_experts
    assert not found.tied


@pytest.mark.parametrize(
    ("quantization", "words"),
    [
        pytest.param({"bits": 8}, "GPTQ weights of 8 bits cannot be trained on.*4 bits", id="8 bits"),
        pytest.param({"lm_head": True}, "its output head is quantized", id="a quantized head"),
        pytest.param({"checkpoint_format": "marlin"}, "in the form 'marlin'", id="another form"),
        pytest.param({"quant_method": "awq"}, r"quantized already \(awq.*Give the original model", id="AWQ"),
        pytest.param({"quant_method": "bitsandbytes"}, r"already \(bitsandbytes.*Give the original", id="bitsandbytes"),
        pytest.param({"quant_method": "fp8"}, r"already \(fp8.*Give the original model", id="FP8"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused(
    gptq: Path, tmp_path: Path, quantization: dict[str, Any], words: str
) -> None:
    folder = shutil.copytree(gptq, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= quantization
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidModel, match=words):
        check_folder(folder, "model")


def test_what_is_merged_into_must_be_the_original(gptq: Path) -> None:
    with pytest.raises(InvalidModel, match=r"merge.original is quantized already \(gptq.*Give the original model"):
        check_folder(gptq, "merge.original", gptq=False)


def test_a_gptq_model_that_lacks_a_tensor_is_refused(gptq: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(gptq, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scales"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InvalidModel, match=r"has no model.layers.1.mlp.up_proj.weight.*Copy the model again"):
        describe(folder)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        pytest.param({}, "model.adapter is no adapter: adapter_config.json is missing", id="an empty folder"),
        pytest.param(
            {"adapter_config.json": "{}"}, "has no weights: adapter_model.safetensors is missing", id="no weights"
        ),
        pytest.param(
            {"adapter_config.json": "{}", "adapter_model.safetensors": "cut"}, "no whole safetensors file", id="cut off"
        ),
    ],
)
def test_a_folder_that_is_no_adapter_is_refused(
    tiny_model: Path, tmp_path: Path, files: dict[str, str], words: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "adapter").mkdir()
    for name, text in files.items():
        (folder / "adapter" / name).write_text(text)
    with pytest.raises(InvalidModel, match=words):
        describe(folder)


def test_an_adapter_of_another_kind_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    shutil.copy(tiny_model / "model.safetensors", folder / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InvalidModel, match=r"of type IA3 .*, only LORA can be gone on from"):
        describe(folder)


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        pytest.param("layers.0.mlp.up_proj", (4, 65), "layers.0.mlp.up_proj has 65 where it has 64", id="its size"),
        pytest.param("layers.7.mlp.up_proj", (4, 64), "layers.7.mlp.up_proj is none of its layers", id="its layers"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    tiny_model: Path, tmp_path: Path, layer: str, shape: tuple[int, int], words: str
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    weights = {f"base_model.model.model.{layer}.lora_A.weight": torch.zeros(shape)}
    save_file(weights, folder / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InvalidModel, match=f"not for this model: model.{words}.*Give the base model that the adapter"):
        describe(folder)
