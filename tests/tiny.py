"""Models and datasets of a few KB, made on the spot: real formats, random weights."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BOS, EOS, PAD, UNKNOWN = "<|im_start|>", "<|im_end|>", "<|pad|>", "<|unk|>"
CORPUS = (
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen jugs.",
    "What is the capital of France? The capital of France is Paris.",
    "### Instruction: ### Input: ### Response: user assistant system",
    "def add(a, b): return a + b  # 0123456789",
)


def make_tokenizer(folder: Path, *, chat_template: bool = True, vocabulary: int = 320) -> None:
    """A byte-level BPE tokenizer like SmolLM2's: any text in, the same text out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - slow

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    if chat_template:
        settings["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


SIZE = {
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GPT_SIZE = {
    "vocab_size": 320,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {**SIZE, "tie_word_embeddings": True},
    "Qwen2": {**SIZE, "tie_word_embeddings": False},
    "Qwen3Moe": {**SIZE, **EXPERTS, "tie_word_embeddings": False},
    "GPT2": GPT_SIZE,
    "GPTBigCode": GPT_SIZE,
}
"""Settings of small models by the beginning of their class: Qwen2 has biases and a head of its own, Qwen3Moe experts
in one piece, GPT2 layers of type Conv1D."""


def make_tiny_model(
    folder: Path,
    *,
    architecture: str = "Llama",
    dtype: str = "bfloat16",
    chat_template: bool = True,
    hidden_size: int = 64,
    layers: int = 2,
    seed: int = 0,
    max_shard_size: str = "1GB",
) -> Path:
    """A random model with a tokenizer; Llama's linear layers have `hidden_size` or 2 `hidden_size` input columns."""
    import torch  # noqa: PLC0415 - slow
    import transformers  # noqa: PLC0415 - slow

    make_tokenizer(folder, chat_template=chat_template)
    settings = dict(ARCHITECTURES[architecture])
    if "n_embd" not in settings:
        settings |= {"hidden_size": hidden_size, "intermediate_size": 2 * hidden_size, "num_hidden_layers": layers}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(**settings)
    name = f"{architecture}LMHeadModel" if architecture == "GPT2" else f"{architecture}ForCausalLM"
    model = getattr(transformers, name)(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def make_tiny_gptq(folder: Path, **options: Any) -> Path:
    """The same model with its linear layers packed by GPTQ's rules: 4 bits, groups of 32, symmetric, rounded."""
    import torch  # noqa: PLC0415 - slow
    from safetensors.torch import load_file, save_file  # noqa: PLC0415 - slow

    make_tiny_model(folder, dtype="float16", **options)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            layer = name.removesuffix("weight")
            tensors |= {layer + part: packed for part, packed in pack_gptq(tensor).items()}
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GPTQ_GROUP,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


GPTQ_GROUP = 32


def pack_gptq(weight: Any) -> dict[str, Any]:
    """`qweight`, `qzeros`, `scales`, `g_idx` of a weight [rows, columns]: eight numbers of 4 bits in an int32."""
    import torch  # noqa: PLC0415 - slow

    rows, columns = weight.shape
    grouped = weight.float().view(rows, columns // GPTQ_GROUP, GPTQ_GROUP)
    scales = (grouped.abs().amax(-1) / 7).clamp(min=1e-8).half()
    numbers = (torch.round(grouped / scales.float()[..., None]) + 8).clamp(0, 15).to(torch.int32)
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    by_column = numbers.view(rows, columns).t().reshape(columns // 8, 8, rows)
    zeros = torch.full((columns // GPTQ_GROUP, rows // 8, 8), 7, dtype=torch.int32)  # this form of GPTQ has 8 - 1
    return {
        "qweight": (by_column << shifts[None, :, None]).sum(1, dtype=torch.int32),
        "qzeros": (zeros << shifts).sum(-1, dtype=torch.int32),
        "scales": scales.t().contiguous(),
        "g_idx": (torch.arange(columns) // GPTQ_GROUP).to(torch.int32),
    }


def make_jsonl(path: Path, rows: Iterable[Any]) -> Path:
    """A jsonl file: a row a line; a row that is text already is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def make_instructions(count: int) -> list[dict[str, str]]:
    """So many different rows of the Instruction format."""
    return [{"instruction": f"What is {n} plus one?", "output": f"It is {n + 1}."} for n in range(count)]


def make_config(*, rows: str = "rows.jsonl", model: str = "tiny", **fields: Any) -> dict[str, Any]:
    """The JSON of a small job: claims 'models' and 'datasets' below the sources folder."""
    return {
        "model": {"volume": {"claimName": "models", "path": model}},
        "datasets": [{"name": "sums", "volume": {"claimName": "datasets", "path": rows}}],
        "parallelism": {"gpusPerNode": 0},
        **fields,
    }
