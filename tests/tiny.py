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


def make_tiny_model(
    folder: Path,
    *,
    dtype: str = "bfloat16",
    chat_template: bool = True,
    hidden_size: int = 64,
    layers: int = 2,
    seed: int = 0,
    max_shard_size: str = "1GB",
) -> Path:
    """A random Llama with a tokenizer; its linear layers have `hidden_size` or 2 `hidden_size` input columns."""
    import torch  # noqa: PLC0415 - slow
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - slow

    make_tokenizer(folder, chat_template=chat_template)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


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
