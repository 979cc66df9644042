"""A GGUF file becomes a model in safetensors, once, with its values."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from transformers import LlamaConfig

from finetune_trainer.models.gguf import LLAMA3
from finetune_trainer.models.gguf_export import rope_factors
from finetune_trainer.progress import ExitCode
from tests.tiny import make_config
from tests.unit.trainer.conftest import Desk

gguf = pytest.importorskip("gguf")
HIDDEN, VOCABULARY, LAYERS = 64, 300, 1


def make_gguf(path: Path, kind: str, factors: np.ndarray[Any, Any] | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """A random Llama with a byte-level tokenizer; its weights as they come out of the file.

    `factors`: by how much each frequency of the positions is slowed down.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(2 * HIDDEN)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    tokens = ["<|end|>", "!#", *(chr(33 + n) if n < 94 else f"w{n}" for n in range(VOCABULARY - 2))]
    writer.add_token_list(tokens)
    writer.add_token_merges(["! #"])
    writer.add_token_types([3] + [1] * (VOCABULARY - 1))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    generator = np.random.default_rng(0)
    shapes = {"token_embd": (VOCABULARY, HIDDEN), "blk.0.ffn_down": (HIDDEN, 2 * HIDDEN)}
    shapes |= {f"blk.0.{name}": (2 * HIDDEN, HIDDEN) for name in ("ffn_gate", "ffn_up")}
    shapes |= {f"blk.0.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_output")}
    shapes |= {f"blk.0.{name}": (HIDDEN // 2, HIDDEN) for name in ("attn_k", "attn_v")}
    quantization = gguf.GGMLQuantizationType[kind]
    values = {}
    for name, shape in shapes.items():
        data = gguf.quants.quantize(generator.standard_normal(shape, dtype=np.float32) / 8, quantization)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=quantization)
        values[name] = gguf.quants.dequantize(data, quantization)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, dtype=np.float32))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return values


def prepare(desk: Desk) -> tuple[int, str]:
    code, word = desk.run("prepare", make_config(model="model.gguf", training={"maxLength": 256}))
    assert word is not None
    return code, word.message


@pytest.mark.parametrize(
    ("kind", "dtype", "rounding"),
    [
        pytest.param("Q8_0", "torch.bfloat16", 2**-8, id="8 bits are unpacked to bf16"),
        pytest.param("F16", "torch.float16", 0.0, id="f16 stays"),
        pytest.param("F32", "torch.float32", 0.0, id="f32 stays"),
    ],
)
def test_values_are_kept(desk: Desk, kind: str, dtype: str, rounding: float) -> None:
    values = make_gguf(desk.models / "model.gguf", kind)
    code, message = prepare(desk)
    assert code == ExitCode.COMPLETED, message
    with safe_open(desk.work / "model" / "model.safetensors", "pt") as file:
        for name, ours in (("blk.0.ffn_down", "layers.0.mlp.down_proj"), ("token_embd", "embed_tokens")):
            tensor = file.get_tensor(f"model.{ours}.weight")
            assert str(tensor.dtype) == dtype
            np.testing.assert_allclose(tensor.float().numpy(), values[name], rtol=rounding)


def test_positions_stretched_as_in_llama_3_stay_so(desk: Desk) -> None:
    stretched = {**LLAMA3, "rope_theta": 10000.0, "factor": 32.0}
    factors = rope_factors(LlamaConfig(hidden_size=HIDDEN, num_attention_heads=2, rope_parameters=stretched))
    assert factors is not None
    assert len(set(factors.tolist())) > 2
    make_gguf(desk.models / "model.gguf", "F16", factors)
    code, message = prepare(desk)
    assert code == ExitCode.COMPLETED, message
    kept = json.loads((desk.work / "model" / "config.json").read_text())["rope_parameters"]
    assert {name: kept[name] for name in stretched} == stretched


def test_positions_stretched_otherwise_are_refused(desk: Desk) -> None:
    make_gguf(desk.models / "model.gguf", "F16", np.linspace(1, 8, HIDDEN // 4, dtype=np.float32))
    code, message = prepare(desk)
    assert code == ExitCode.INVALID_MODEL
    assert "model.gguf slows positions down otherwise than Llama 3 does. Give the model's own folder" in message


def test_a_cut_file_is_refused(desk: Desk) -> None:
    path = desk.models / "model.gguf"
    make_gguf(path, "F16")
    path.write_bytes(path.read_bytes()[:3000])
    code, message = prepare(desk)
    assert code == ExitCode.INVALID_MODEL
    assert "is damaged or cut off" in message


def test_a_file_that_is_no_gguf_is_refused(desk: Desk) -> None:
    (desk.models / "model.gguf").write_bytes(b"PK\x03\x04")
    code, message = prepare(desk)
    assert code == ExitCode.INVALID_MODEL
    assert "is a file, but no GGUF file" in message


def test_two_files_ask_for_a_name(desk: Desk) -> None:
    for name in ("a.gguf", "b.gguf"):
        (desk.models / "both").mkdir(exist_ok=True)
        (desk.models / "both" / name).write_bytes(b"GGUF")
    _, word = desk.run("prepare", make_config(model="both"))
    assert word is not None
    assert "2 GGUF files (a.gguf, b.gguf). Name one of them in the source's path" in word.message
