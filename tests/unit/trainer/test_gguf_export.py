"""A finished model as a GGUF file: the same model, tokenizer and chat template, by what the file says alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_trainer.evaluate import compare
from finetune_trainer.models import gguf_export
from finetune_trainer.models.finished import load_quantized
from finetune_trainer.models.folder import load_tokenizer
from finetune_trainer.models.loading import load_finished, set_up_torch
from finetune_trainer.progress import Stage
from finetune_trainer.runtime.context import Context
from finetune_trainer.runtime.errors import Interrupted, InvalidConfig, VerificationFailed
from finetune_trainer.runtime.parsing import parse_config
from finetune_trainer.runtime.report import Report
from finetune_trainer.runtime.work import WorkFolder
from finetune_trainer.settings.outcome import check_gguf
from tests.tiny import CHAT_TEMPLATE, make_config, make_tokenizer
from tests.unit.trainer.runs import CPU, make_rows

SIZE = {
    "vocab_size": 336,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": [1, 3],
    "pad_token_id": 2,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", {}),
    "Llama, a head tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "Llama 3.1": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Qwen2": ("Qwen2Config", {"head_dim": None}),
    "Qwen3": ("Qwen3Config", {"head_dim": 128}),
}
"""More rows of embeddings than tokens, in all of them, as real models have."""


def make_finished(folder: Path, name: str) -> Path:
    """A random finished model whose norms and biases are not those that a class begins with."""
    import transformers  # noqa: PLC0415 - slow

    kind, settings = MODELS[name]
    make_tokenizer(folder)
    torch.manual_seed(0)
    config = getattr(transformers, kind)(
        **{key: value for key, value in (SIZE | settings).items() if value is not None}
    )
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def make_context(root: Path) -> Context:
    return Context(WorkFolder(root), root, root, 1, Report(Stage.QUANTIZE, 1, bar=False))


def export(root: Path, name: str, kind: str) -> tuple[Path, Path]:
    """The finished model and its GGUF file."""
    set_up_torch()
    finished, folder = make_finished(root / "merged", name), root / "gguf"
    folder.mkdir()
    path = folder / gguf_export.file_name(kind)
    gguf_export.write(finished, finished, path, kind, make_context(root))
    return finished, path


def divergence(finished: Path, path: Path) -> float:
    large = load_finished(finished, CPU, torch.float32)
    return compare(large, load_quantized(path.parent, CPU), make_rows(10)).kl


@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_each_kind_of_model_is_the_model(tmp_path: Path, name: str) -> None:
    finished, path = export(tmp_path, name, "BF16")
    assert divergence(finished, path) < 1e-9
    gguf_export.verify_tokenizer(path, load_tokenizer(finished), [list(row.input_ids) for row in make_rows(10)])


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        pytest.param("F16", 0, 1e-6, id="F16"),
        pytest.param("Q8_0", 1e-7, 0.02, id="Q8_0"),
        pytest.param("Q5_1", 1e-4, 0.5, id="Q5_1"),
        pytest.param("Q5_0", 1e-4, 0.5, id="Q5_0"),
        pytest.param("Q4_1", 1e-3, 2.0, id="Q4_1"),
        pytest.param("Q4_0", 1e-3, 2.0, id="Q4_0"),
    ],
)
def test_the_coarser_the_type_the_farther_the_model(tmp_path: Path, kind: str, least: float, most: float) -> None:
    finished, path = export(tmp_path, "Qwen2", kind)
    assert least <= divergence(finished, path) < most


def test_the_file_says_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    from gguf import GGUFReader  # noqa: PLC0415 - slow

    _, path = export(tmp_path, "Llama 3.1", "Q4_0")
    reader = GGUFReader(path)
    told = {name: field.contents() for name, field in reader.fields.items()}
    expected = {
        "general.architecture": "llama",
        "general.file_type": 2,
        "llama.context_length": 512,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 32,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 3,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    assert {name: told.get(name) for name in expected} == expected
    assert told["tokenizer.ggml.token_type"][:5] == [3, 3, 3, 3, 1]
    assert told["tokenizer.ggml.token_type"][-1] == 5
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["rope_freqs.weight"] == kinds["output_norm.weight"] == "F32"
    assert kinds["blk.1.ffn_down.weight"] == "Q4_0"
    assert {kinds[name] for name in ("token_embd.weight", "output.weight")} == {"Q8_0"}


def test_a_sentence_piece_tokenizer_keeps_its_merges_as_scores(tmp_path: Path) -> None:
    finished = make_finished(tmp_path / "merged", "Llama")
    make_sentence_piece(finished)
    path = tmp_path / "model-F16.gguf"
    set_up_torch()
    gguf_export.write(finished, finished, path, "F16", make_context(tmp_path))
    tokenizer = load_tokenizer(finished)
    rows = [
        tokenizer(text).input_ids for text in ("The lazy dog jumps over five dozen jugs.", "Größe 42 \n def add(a)")
    ]
    gguf_export.verify_tokenizer(path, tokenizer, rows)


def make_sentence_piece(folder: Path) -> None:
    """A tokenizer as Llama 2's is: BPE with bytes to fall back on, a space before the first word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - slow

    from tests.tiny import CORPUS  # noqa: PLC0415 - beside its use

    special = ["<unk>", "<s>", "</s>"]
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    learned.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=70, show_progress=False))
    state = json.loads(learned.to_str())
    known = [*special, *pieces, *sorted(state["model"]["vocab"], key=state["model"]["vocab"].__getitem__)]
    vocabulary = {word: index for index, word in enumerate(known)}
    merges = [tuple(pair) for pair in state["model"]["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token=special[0], byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"bos": special[1], "eos": special[2], "unk": special[0], "pad": special[2]}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | {f"{name}_token": word for name, word in words.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# What is found out


def test_another_tokenizer_is_found_out(tmp_path: Path) -> None:
    finished, path = export(tmp_path, "Llama", "F16")
    tokenizer = load_tokenizer(finished)
    tokenizer.chat_template = "{{ messages }}"
    with pytest.raises(VerificationFailed, match="tokenizer is not the model's: another chat_template"):
        gguf_export.verify_tokenizer(path, tokenizer, [])
    tokenizer = load_tokenizer(finished)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(VerificationFailed, match="1 words have other ids, among them '<new>'"):
        gguf_export.verify_tokenizer(path, tokenizer, [])


def test_a_file_without_all_weights_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = gguf_export._plan
    monkeypatch.setattr(
        gguf_export, "_plan", lambda *given: [each for each in plan(*given) if "ffn_up" not in each.name]
    )
    _, path = export(tmp_path, "Llama", "F16")
    with pytest.raises(VerificationFailed, match=r"has no model.layers.0.mlp.up_proj.weight \(2 weights are missing"):
        load_quantized(path.parent, CPU)


def test_values_beyond_the_type_are_refused(tmp_path: Path) -> None:
    finished = make_finished(tmp_path / "merged", "Llama")
    weights = load_file(finished / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, finished / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        VerificationFailed, match=r"layers.1.mlp.up_proj.weight has values .* in F16. Set ggufType to BF16"
    ):
        gguf_export.write(finished, finished, tmp_path / "model-F16.gguf", "F16", make_context(tmp_path))


def test_a_wish_to_leave_ends_the_writing(tmp_path: Path) -> None:
    finished, context = make_finished(tmp_path / "merged", "Llama"), make_context(tmp_path)
    context.stopping.set()
    with pytest.raises(Interrupted):
        gguf_export.write(finished, finished, tmp_path / "model-F16.gguf", "F16", context)


# What is refused before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        pytest.param(
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "'linear'", id="rope"
        ),
        pytest.param({"sliding_window": 64}, "the last 64 tokens alone", id="window"),
        pytest.param({"attention_bias": True}, "biases of a llama", id="biases"),
    ],
)
def test_what_a_file_cannot_say_is_refused_at_prepare(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    finished = make_finished(tmp_path / "merged", "Llama")
    config = AutoConfig.from_pretrained(finished)
    config.update(settings)
    config.save_pretrained(finished)
    asked = parse_config(make_config(quantize=[{"name": "q8", "method": "GGUF"}]))
    with pytest.raises(InvalidConfig, match=f"'q8': a GGUF file cannot say .*{words}.*Use method GPTQ or AWQ"):
        check_gguf(asked, finished, load_tokenizer(finished))
    check_gguf(parse_config(make_config()), finished, load_tokenizer(finished))


@pytest.mark.parametrize(
    ("rule", "name"),
    [
        pytest.param(
            {"type": "Split", "pattern": {"Regex": r"\w+"}, "behavior": "Isolated", "invert": False}, None, id="own"
        ),
        pytest.param({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}, None, id="space before"),
        pytest.param({"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}, "gpt-2", id="GPT-2"),
    ],
)
def test_ways_to_cut_a_text_have_names_or_are_refused(rule: dict[str, Any], name: str | None) -> None:
    from finetune_trainer.models.gguf_vocabulary import _pre  # noqa: PLC0415 - beside its use

    assert _pre({"pre_tokenizer": rule}) == name
