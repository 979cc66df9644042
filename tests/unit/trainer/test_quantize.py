"""The quantized model is small, loads anywhere, writes, and names nothing of the machine it was made on."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch.cuda._utils import _nvrtc_compile as nvrtc_compile

from finetune_trainer import quantize
from finetune_trainer.config import Quantize
from finetune_trainer.evaluate import IGNORED, Comparison, TokenRow, compare
from finetune_trainer.models import awq_clips, awq_scales, gptq_blocks, gptq_scales
from finetune_trainer.models.finished import load_quantized, verify_layers
from finetune_trainer.models.loading import load_finished, set_up_torch
from finetune_trainer.progress import ExitCode, Reason, ResolvedQuantize, Stage
from finetune_trainer.runtime.context import Context
from finetune_trainer.runtime.errors import GateFailed, VerificationFailed
from finetune_trainer.runtime.report import Report
from finetune_trainer.runtime.work import WorkFolder
from finetune_trainer.settings.outcome import QUANTIZABLE
from tests.tiny import make_config, make_instructions, make_jsonl, make_tokenizer
from tests.unit.trainer.conftest import Desk
from tests.unit.trainer.runs import CPU, make_rows, same_bits

ENTRY = {"name": "small", "method": "GPTQ", "groupSize": 32, "calibration": {"samples": 8, "maxLength": 48}}
SIZE = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CONFIGS = {
    "LlamaForCausalLM": ("LlamaConfig", {}),
    "MistralForCausalLM": ("MistralConfig", {}),
    "Qwen2ForCausalLM": ("Qwen2Config", {}),
    "Qwen3ForCausalLM": ("Qwen3Config", {}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {}),
    "OlmoeForCausalLM": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4}),
}
CALIBRATION = [
    {"input_ids": [(7 * row + 3 * place) % 290 + 5 for place in range(48)], "attention_mask": [1] * 48}
    for row in range(8)
]


def make_finished(folder: Path, architecture: str, **changes: Any) -> Path:
    """A random finished model of a class; each of its layers has 64 or more outputs, as AWQ asks for."""
    import transformers  # noqa: PLC0415 - slow

    name, settings = CONFIGS[architecture]
    make_tokenizer(folder)
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SIZE | settings | changes)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    assert type(model).__name__ == architecture
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_settings(method: str = "GPTQ", **changes: Any) -> ResolvedQuantize:
    gptq = {"symmetric": True, "act_order": False, "dampening_frac": 0.05} if method == "GPTQ" else {"symmetric": False}
    return ResolvedQuantize(**{"name": "small", "method": method, "bits": 4, "group_size": 32, **gptq, **changes})


def make_quantized(
    root: Path,
    architecture: str,
    settings: ResolvedQuantize,
    calibration: list[dict[str, list[int]]] = CALIBRATION,
    **changes: Any,
) -> tuple[Path, Path]:
    """The finished model and its quantized form."""
    set_up_torch()
    finished, folder = make_finished(root / "merged", architecture, **changes), root / "quantized"
    folder.mkdir()
    tokens = quantize.write_quantized(finished, folder, settings, calibration, make_context(root))
    assert tokens == sum(len(row["input_ids"]) for row in calibration)
    return finished, folder


def make_context(root: Path) -> Context:
    return Context(WorkFolder(root), root, root, 1, Report(Stage.QUANTIZE, 1, bar=False))


FORMS = {
    f"{method}-{name}": (name, make_settings(method.value)) for method, names in QUANTIZABLE.items() for name in names
} | {
    "AWQ, symmetric": ("LlamaForCausalLM", make_settings("AWQ", symmetric=True)),
    "GPTQ, zero points": ("LlamaForCausalLM", make_settings(symmetric=False)),
    "GPTQ, act order": ("Qwen2ForCausalLM", make_settings(act_order=True)),
    "GPTQ, 8 bits": ("LlamaForCausalLM", make_settings(bits=8)),
    "GPTQ, 8 bits, zero points, act order": (
        "Qwen3ForCausalLM",
        make_settings(bits=8, symmetric=False, act_order=True),
    ),
}


@pytest.fixture(scope="module")
def divergences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """KL of every form from its finished model, by its name, loaded in a process that quantized nothing."""
    root = tmp_path_factory.mktemp("forms")
    for name, (architecture, settings) in FORMS.items():
        make_quantized(root / name, architecture, settings)
    code = f"from tests.unit.trainer.test_quantize import print_divergences; print_divergences({str(root)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_divergences(root: str) -> None:
    """What the fresh process does."""
    found = {}
    set_up_torch()
    for folder in sorted(Path(root).iterdir()):
        large = load_finished(folder / "merged", CPU, torch.float32)
        found[folder.name] = compare(large, load_quantized(folder / "quantized", CPU), make_rows(20)).kl
    print(json.dumps(found))


@pytest.mark.parametrize("name", FORMS)
def test_what_is_written_loads_back_whole_and_is_the_model_within_rounding(
    divergences: dict[str, float], name: str
) -> None:
    _, settings = FORMS[name]
    assert 0 < divergences[name] < (0.005 if settings.bits == 4 else 0.00005)


def test_act_order_damping_and_the_search_for_scales_reach_the_files(tmp_path: Path) -> None:
    """Reordered over the borders of groups, columns tell their group: they are in order otherwise."""
    _, folder = make_quantized(tmp_path, "LlamaForCausalLM", make_settings(act_order=True, dampening_frac=0.25))
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert settings["desc_act"] is True
    assert settings["meta"]["damp_percent"] == 0.25
    assert settings["meta"]["mse"] == quantize.ERROR_POWER
    tensors = load_file(folder / "model.safetensors")
    groups = [tensor for name, tensor in tensors.items() if name.endswith("g_idx")]
    assert groups
    assert any(bool((tensor.diff() < 0).any()) for tensor in groups)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("elements", [1, 2**16], ids=["one by one", "all at once"])
def test_scales_searched_side_by_side_are_as_good_as_those_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, elements: int
) -> None:
    monkeypatch.setitem(gptq_scales.ELEMENTS_AT_ONCE, "cpu", elements)
    gptqmodel = quantize.import_gptqmodel(tmp_path)
    quantize.quicken(gptqmodel)
    module = gptqmodel.quantization.quantizer
    settings = gptqmodel.QuantizeConfig(bits=bits, group_size=32, sym=True, mse=quantize.ERROR_POWER)
    weights = torch.randn(40, 32, generator=torch.Generator().manual_seed(7)) * 0.02
    weights[0], weights[1] = 0, weights[1].abs()

    def errors(find: Callable[..., None]) -> torch.Tensor:
        quantizer = module.Quantizer(settings)
        quantizer.configure(perchannel=True)
        find(quantizer, weights, weight=True)
        assert (quantizer.scale.shape, quantizer.zero.shape) == ((40, 1), (40, 1))
        rounded: torch.Tensor = module.quantize(weights, quantizer.scale, quantizer.zero, quantizer.maxq, False)
        return (rounded - weights).square().sum(1)

    ours, theirs = errors(module.Quantizer.find_params), errors(module.Quantizer.find_params.__wrapped__)
    assert torch.allclose(ours[2:], theirs[2:], rtol=1e-4, atol=0)
    assert float(ours[0]) == float(theirs[0]) == 0, "a row of zeros"
    assert ours[1] < 0.5 * theirs[1], "a row without a negative weight: the library has no use for its lower half"


@pytest.mark.parametrize("capability", ["75", "80", "90", "120"])
def test_the_kernel_of_gptqs_blocks_compiles_without_a_toolkit_and_a_card(capability: str) -> None:
    with gptq_blocks.without_toolkit():
        code, name = nvrtc_compile(
            gptq_blocks.SOURCE, gptq_blocks.NAME, capability, nvcc_options=gptq_blocks.ROUNDED_AS_TORCH_DOES
        )
    assert name == gptq_blocks.NAME
    assert code


@pytest.mark.parametrize("symmetric", [False, True], ids=["zero points", "no zero points"])
@pytest.mark.parametrize(("size", "elements"), [(32, 2**24), (32, 2**9), (-1, 2**24)])
def test_limits_by_second_moments_are_as_good_as_those_of_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, symmetric: bool, size: int, elements: int
) -> None:
    monkeypatch.setattr(awq_clips, "ELEMENTS_AT_ONCE", elements)
    gptqmodel = quantize.import_gptqmodel(tmp_path)
    processors = importlib.import_module("gptqmodel.looper.awq_processor").AWQProcessor
    processor = processors.__new__(processors)
    processor.qcfg = gptqmodel.quantization.config.AWQConfig(bits=4, group_size=size, sym=symmetric)
    draw = torch.Generator().manual_seed(7)
    weights = torch.randn(64, 96, generator=draw) * 0.05
    weights[0] = 0
    inputs = torch.randn(2, 600, 96, generator=draw) * torch.rand(96, generator=draw).mul(3).exp()
    seen = inputs.reshape(1200, 96)[::2]

    def errors(limits: torch.Tensor) -> torch.Tensor:
        """Of the products of each group of each row; (rows, groups)."""
        groups = weights.reshape(64, -1, size if size > 0 else 96)
        rounded = torch.empty_like(groups)
        processor._pseudo_quantize_tensor_into(groups.clamp(-limits, limits), rounded)
        products = torch.einsum("tgk,rgk->trg", seen.reshape(600, *groups.shape[1:]), rounded - groups)
        return products.square().mean(0)

    plain = getattr(processors._compute_best_clip, "__wrapped__", processors._compute_best_clip)
    ours, theirs = (find(processor, weights, inputs) for find in (awq_clips.find_limits, plain))
    assert ours.shape == theirs.shape
    assert (errors(ours) <= errors(theirs) * (1 + 1e-4)).all()
    assert errors(ours).sum() < 0.95 * errors(weights.abs().amax().expand_as(ours)).sum(), "it looked for none"


@pytest.mark.parametrize("symmetric", [False, True], ids=["zero points", "no zero points"])
@pytest.mark.parametrize("hint", [None, 0.25])
def test_scales_searched_where_the_model_is_are_those_of_the_library(
    tmp_path: Path, symmetric: bool, hint: float | None
) -> None:
    gptqmodel = quantize.import_gptqmodel(tmp_path)
    quantize.quicken(gptqmodel)
    processors = importlib.import_module("gptqmodel.looper.awq_processor").AWQProcessor
    processor = processors.__new__(processors)
    processor.qcfg = gptqmodel.quantization.config.AWQConfig(bits=4, group_size=32, sym=symmetric)
    processor._scale_context = SimpleNamespace(prev_scale=hint)
    processor._quant_batch_size, processor.duo_scaling = 1, True
    processor.gptq_model, processor.model = SimpleNamespace(rotary_embedding=None), None
    torch.manual_seed(7)
    scaled = torch.nn.Linear(64, 64, dtype=torch.bfloat16)
    block = torch.nn.Sequential(scaled, torch.nn.SiLU(), torch.nn.Linear(64, 64, dtype=torch.bfloat16))
    inputs = torch.randn(3, 40, 64).mul(torch.arange(1, 65)).bfloat16()
    weight_mean, input_mean = scaled.weight.abs().mean(0).detach(), inputs.abs().mean((0, 1))
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}

    def search(find: Callable[..., tuple[torch.Tensor, float]]) -> tuple[torch.Tensor, float]:
        with torch.inference_mode():
            expected = [block(some) for some in torch.split(inputs, 1)]
            return find(processor, inputs, weight_mean, input_mean, block, [scaled], expected, {})

    ours, theirs = (search(find) for find in (awq_scales.find_scales, processors._compute_best_scale.__wrapped__))
    assert torch.equal(ours[0], theirs[0])
    assert ours[1] == theirs[1]
    assert same_bits(dict(block.state_dict()), before), "the weights are not what they were"


def test_a_search_on_the_device_finds_the_scales_of_one_in_the_hosts_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "AWQ_BLOCK_TOKENS", 64)
    written = []
    for room in (False, True):
        monkeypatch.setattr(quantize, "_has_room", lambda *_, room=room: room)
        _, folder = make_quantized(tmp_path / str(room), "Qwen3ForCausalLM", make_settings("AWQ"))
        written.append(load_file(folder / "model.safetensors"))
    assert same_bits(*written)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("biased", [False, True])
def test_codes_packed_in_groups_have_the_bits_of_the_library(tmp_path: Path, dtype: torch.dtype, biased: bool) -> None:
    gptqmodel = quantize.import_gptqmodel(tmp_path)
    quantize.quicken(gptqmodel)
    packers = importlib.import_module("gptqmodel.nn_modules.qlinear.torch_awq").AwqTorchLinear
    draw = torch.Generator().manual_seed(7)
    linear = torch.nn.Linear(96, 64, bias=biased, dtype=dtype)
    scales = torch.rand(64, 3, generator=draw).add(0.5).mul(0.01).to(dtype)
    zeros = torch.randint(0, 16, (64, 3), generator=draw).to(dtype)

    def pack(how: Callable[..., None]) -> dict[str, torch.Tensor]:
        layer = packers(bits=4, group_size=32, sym=False, desc_act=False, in_features=96, out_features=64, bias=biased)
        how(layer, linear, scales, zeros)
        return dict(layer.state_dict())

    ours, theirs = pack(packers.pack), pack(packers.pack.__wrapped__)
    assert set(ours) == {"qweight", "qzeros", "scales"} | ({"bias"} if biased else set())
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("symmetric", [False, True], ids=["zero points", "no zero points"])
def test_awq_is_of_the_format_that_servers_read(tmp_path: Path, symmetric: bool) -> None:
    """Zero points are always in the files, all in the middle where there are none in effect."""
    _, folder = make_quantized(tmp_path, "LlamaForCausalLM", make_settings("AWQ", symmetric=symmetric))
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    expected = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
    assert {name: settings[name] for name in expected} == expected
    middle = int.from_bytes(b"\x88" * 4, signed=True)
    zeros = [tensor for name, tensor in load_file(folder / "model.safetensors").items() if name.endswith("qzeros")]
    assert len(zeros) == 14
    assert all(bool((tensor == middle).all()) for tensor in zeros) is symmetric


def test_awq_looks_at_every_row_however_long(tmp_path: Path) -> None:
    """By itself the library takes the last one alone where they are of several lengths."""

    rows = [item["input_ids"][:length] for item, length in zip(CALIBRATION, (48, 40, 30, 20), strict=False)]

    def weights(name: str, *rows: list[int]) -> dict[str, torch.Tensor]:
        calibration = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
        _, folder = make_quantized(tmp_path / name, "LlamaForCausalLM", make_settings("AWQ"), calibration)
        return load_file(folder / "model.safetensors")

    assert not same_bits(weights("some", *rows), weights("others", *(row[::-1] for row in rows[:3]), rows[3]))


def test_blocks_of_one_length_have_all_tokens_in_order_but_a_rest() -> None:
    rows = [{"input_ids": list(range(start, start + 30))} for start in (0, 30, 60)]
    assert [row["input_ids"] for row in quantize.in_blocks(rows, 40)] == [list(range(40)), list(range(40, 80))]
    assert [len(row["attention_mask"]) for row in quantize.in_blocks(rows, 1000)] == [90]
    many = [{"input_ids": [7] * 100_000}]
    assert {len(row["input_ids"]) for row in quantize.in_blocks(many, 4096)} == {quantize.AWQ_BLOCK_TOKENS}
    assert len(quantize.in_blocks(many, 4096)) == quantize.AWQ_BLOCKS


def test_rows_of_a_few_tokens_calibrate_too(tmp_path: Path) -> None:
    rows = [{"input_ids": item["input_ids"][:length], "attention_mask": [1] * length}
            for length, item in enumerate(CALIBRATION, start=1)]  # fmt: skip
    _, folder = make_quantized(tmp_path, "LlamaForCausalLM", make_settings(), rows)
    load_quantized(folder, CPU)


def test_experts_that_are_not_loaded_back_are_found_out(tmp_path: Path) -> None:
    """Of such models transformers makes the experts up, and nothing but a warning tells."""
    _, folder = make_quantized(tmp_path, "OlmoeForCausalLM", make_settings())
    with pytest.raises(VerificationFailed, match=r"has 32 quantized layers, of which 8 were loaded"):
        load_quantized(folder, CPU)


def test_a_model_without_quantized_layers_is_found_out(tiny_model: Path) -> None:
    with pytest.raises(VerificationFailed, match="0 quantized layers"):
        verify_layers(torch.nn.Linear(2, 2), tiny_model)


# The stage

GATE: dict[str, Any] = {"maxPerplexityIncreasePercent": 1.0}
ENTRIES = [ENTRY | GATE] + [ENTRY | GATE | {"name": name, "method": "AWQ"} for name in ("awq", "spoilt")]
ENTRIES += [{"name": "q8", "method": "GGUF"} | GATE]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Desk, dict[str, Any]]:
    """A desk with a merged model, and the config it was made by."""
    desk = Desk(tmp_path_factory.mktemp("finished"))
    make_finished(desk.models / "wide", "LlamaForCausalLM")
    make_jsonl(desk.datasets / "rows.jsonl", make_instructions(40))
    training = {"globalBatchSize": 8, "maxSteps": 12, "learningRate": 0.02}
    config = make_config(model="wide", training=training, evaluation={"percent": 20}, quantize=ENTRIES)
    for stage in ("prepare", "train", "merge"):
        assert desk.run(stage, config)[0] == 0
    return desk, config


@pytest.mark.parametrize("name", ["small", "awq"])
def test_a_quantized_model_loads_and_writes_in_a_bare_pod(
    finished: tuple[Desk, dict[str, Any]], tmp_path: Path, name: str
) -> None:
    """No compiler on the path, no network, a current folder that cannot be written."""
    desk, _ = finished
    run_bare(desk, tmp_path, name)
    folder = desk.work / "quantized" / name
    manifest = json.loads((folder / "manifest.json").read_text())
    measured = manifest["result"]["artifact"]["measured"]
    calibration = manifest["result"]["artifact"]["calibration"]
    assert (calibration["rows"], calibration["ofRows"], calibration["maxLength"]) == (8, 32, 48)
    assert measured["klDivergence"] > 0
    assert measured["top1Agreement"] > 0.5
    assert measured["perplexityIncreasePercent"] <= 1.0
    for config in ("config.json", "quantize_config.json"):
        text = (folder / config).read_text()
        assert str(tmp_path) not in text
        assert "offload" not in text
        assert "/tmp" not in text  # noqa: S108 - must not be there
    assert not list(folder.glob("*log*"))
    assert {"tokenizer.json", "generation_config.json"} <= {path.name for path in folder.iterdir()}


def run_bare(desk: Desk, tmp_path: Path, name: str) -> None:
    """The quantize stage as a process of its own in an environment as poor as a pod's."""
    root = Path(__file__).parents[3]
    nothing, home, current = (tmp_path / name for name in ("bin", "home", "current"))
    for folder in (nothing, home, current):
        folder.mkdir()
    current.chmod(0o555)
    environment = {
        "PATH": str(nothing),
        "HOME": str(home),
        "TMPDIR": str(home),
        "PYTHONPATH": str(root / "trainer"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
    }
    folders = ["--config", str(desk.root / "job.json"), "--work", str(desk.work), "--sources", str(desk.sources)]
    done = subprocess.run(
        [sys.executable, "-m", "finetune_trainer", "quantize", "--name", name, *folders],
        cwd=current,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ExitCode.COMPLETED, done.stderr
    assert not list(current.iterdir())


def test_a_gguf_export_is_one_file_that_was_measured(finished: tuple[Desk, dict[str, Any]]) -> None:
    desk, config = finished
    code, word = desk.run("quantize", config, "--name", "q8")
    assert word is not None
    assert code == ExitCode.COMPLETED, word.message
    assert re.search(r"Exported as GGUF Q8_0: perplexity 1\d\d\.\d\d, [+-]0\.\d%", word.message)
    assert word.artifact is not None
    assert word.artifact.measured is not None
    assert (word.artifact.measured.kl_divergence or 1.0) < 1e-3
    assert sorted(path.name for path in (desk.work / "quantized" / "q8").iterdir()) == [
        "manifest.json",
        "model-Q8_0.gguf",
    ]


def test_a_gate_that_fires_publishes_nothing(
    finished: tuple[Desk, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With simulated figures: what is measured of so small a model differs from one training to the next."""
    desk, config = finished
    monkeypatch.setattr(quantize, "call_apart", lambda *_: quantize.Found("", compared(12.3)))
    code, word = desk.run("quantize", config, "--name", "spoilt")
    assert word is not None
    assert (code, word.reason) == (ExitCode.GATE_FAILED, Reason.GATE_FAILED)
    assert re.search(r"\+12\.3% .*'spoilt' allows 1%.*nothing was published", word.message)
    assert not [path.name for path in (desk.work / "quantized").iterdir() if "spoilt" in path.name]


def test_bad_calibration_rows_fire_a_gate_that_real_ones_pass(tmp_path: Path) -> None:
    """One token over and over says nothing of the activations."""
    entry = Quantize.model_validate({"name": "small", "method": "AWQ", "maxPerplexityIncreasePercent": 9})
    settings, bad = make_settings("AWQ"), [{"input_ids": [7] * 48, "attention_mask": [1] * 48}] * 8
    quantize.judge(entry, settings, measure(tmp_path / "good", settings, CALIBRATION))
    with pytest.raises(GateFailed, match=r"allows 9%"):
        quantize.judge(entry, settings, measure(tmp_path / "bad", settings, bad))


def measure(root: Path, settings: ResolvedQuantize, calibration: list[dict[str, list[int]]]) -> Comparison:
    """A form of a model whose weights are large enough for their rounding to be seen."""
    large, folder = make_quantized(root, "LlamaForCausalLM", settings, calibration, initializer_range=0.1)
    model = load_finished(large, CPU, torch.float32)
    return compare(model, load_quantized(folder, CPU), draw_rows(model))


def draw_rows(model: Any) -> list[TokenRow]:
    """Rows that the model itself draws: on no others does a random model's loss tell what rounding did to it."""
    torch.manual_seed(0)
    drawn = model.generate(torch.tensor([[2, 3]] * 64), do_sample=True, top_k=0, min_new_tokens=30, max_new_tokens=30)
    return [TokenRow(row, [IGNORED] * 2 + row[2:]) for row in drawn.tolist()]


def compared(increase_percent: float) -> Comparison:
    return Comparison(2.0, 2.0 + math.log1p(increase_percent / 100), 0.01, 0.9)


@pytest.mark.parametrize("limit", [None, 5.0, 100.0])
def test_within_its_gate_a_form_is_told_with_its_figures(limit: float | None) -> None:
    entry = Quantize.model_validate(ENTRY | {"maxPerplexityIncreasePercent": limit})
    result = quantize.judge(entry, make_settings(), compared(4.99))
    assert "perplexity 7.76, +5.0% against the 16-bit model (KL 0.01 nats a token, same first choice 90.0%)" in (
        result.message
    )


@pytest.mark.parametrize(
    ("found", "error", "words"),
    [
        pytest.param(compared(5.01), GateFailed, r"\+5\.0%.*allows 5%.*Use more bits", id="beyond its gate"),
        pytest.param(None, GateFailed, "no row was held out.*drop the gate", id="nothing to measure"),
        pytest.param(Comparison(2.0, math.nan, 0.1, 0.9), VerificationFailed, "computes no numbers", id="NaN"),
        pytest.param(Comparison(2.0, 2.0, math.inf, 0.9), VerificationFailed, "computes no numbers", id="infinite KL"),
    ],
)
def test_a_form_that_is_worse_than_allowed_ends_the_stage(
    found: Comparison | None, error: type[Exception], words: str
) -> None:
    entry = Quantize.model_validate(ENTRY | {"maxPerplexityIncreasePercent": 5})
    with pytest.raises(error, match=words):
        quantize.judge(entry, make_settings(), found)


# Calibration


def test_calibration_rows_are_plain_seeded_and_cut() -> None:
    entry = Quantize.model_validate(ENTRY)
    rows = [[index] * 100 for index in range(20)]
    chosen = quantize.choose_calibration(rows, entry, seed=1)
    assert chosen == quantize.choose_calibration(rows, entry, seed=1)
    assert chosen != quantize.choose_calibration(rows, entry, seed=2)
    assert [len(item["input_ids"]) for item in chosen] == [48] * 8
    assert all(type(item) is dict and item["attention_mask"] == [1] * 48 for item in chosen)
    assert len(quantize.choose_calibration(rows[:3], entry, seed=1)) == len(rows[:3])
    told = quantize.describe_calibration(chosen, rows, entry, seed=1, tokens=8 * 48)
    assert (told.rows, told.of_rows, told.seed, told.max_length, told.tokens) == (8, 20, 1, 48, 8 * 48)


def test_awq_tells_the_tokens_that_it_looked_at(tmp_path: Path) -> None:
    """A block is of 512 tokens; a rest is left out."""
    finished, rows = make_finished(tmp_path / "merged", "LlamaForCausalLM"), [quantize._whole([7] * 300)] * 2
    (folder := tmp_path / "form").mkdir()
    assert quantize.write_quantized(finished, folder, make_settings("AWQ"), rows, make_context(tmp_path)) == 512


@pytest.mark.parametrize("lengths", [None, [[2, 3], [4]]], ids=["a row a sequence", "packed"])
def test_rows_that_share_a_sequence_calibrate_alone(lengths: list[list[int]] | None, tmp_path: Path) -> None:
    columns = {"input_ids": [[1, 2, 3, 4, 5], [6, 7, 8, 9]]} | ({} if lengths is None else {"lengths": lengths})
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    rows = quantize.read_calibration_rows(tmp_path)
    assert rows == (columns["input_ids"] if lengths is None else [[1, 2], [3, 4, 5], [6, 7, 8, 9]])
