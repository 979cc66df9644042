"""Models and rows for the recipes' small twins: the recipes' architectures, with random weights of a megabyte.

    .venv/bin/python examples/recipes/small/stage.py DOCS OUT

reads the rows that examples/stdlib_docs.py left in DOCS and writes

    OUT/models/llama/  qwen2/  qwen2-gptq/  gptbigcode/
    OUT/datasets/guanaco.jsonl  guanaco-test.jsonl  content.jsonl  chat.jsonl  stack-exchange.jsonl  dolly.jsonl

`qwen2-gptq` is `qwen2` quantized to 4 bits, as a model that comes quantized.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HIDDEN, LAYERS, HEADS, VOCABULARY, POSITIONS = 128, 2, 4, 1024, 512
ROWS, TEST_ROWS = 600, 60
SEED = 42
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

Row = dict[str, Any]


def main() -> None:
    """Write all of it and say what is there."""
    if len(sys.argv) != 3 or sys.argv[1].startswith("-"):  # noqa: PLR2004 - two arguments
        sys.exit(__doc__)
    docs, out = Path(sys.argv[1]), Path(sys.argv[2])
    train, heldout = (read_rows(docs / f"{split}.jsonl") for split in ("train", "heldout"))
    write_datasets(out / "datasets", train[:ROWS], heldout[:TEST_ROWS])
    texts = [row["instruction"] + " " + row["output"] for row in train]
    for name, special, chat_template in SPECIAL:
        write_tokenizer(out / "models" / name, texts, special, chat_template)
    write_models(out / "models")
    print(f"{out}: {', '.join(sorted(path.name for path in (out / 'models').iterdir()))}")  # noqa: T201 - its answer


def read_rows(path: Path) -> list[Row]:
    """The rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# Rows, each in the shape of the recipe's own dataset


def write_datasets(folder: Path, train: list[Row], heldout: list[Row]) -> None:
    """The recipes' columns, filled with questions and answers about Python's standard library."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, tuple[Callable[[int, Row], Row], list[Row]]] = {
        "guanaco": (_guanaco, train),
        "guanaco-test": (_guanaco, heldout),
        "content": (lambda _, row: {"content": f"Human: {row['instruction']}\nBot: {row['output']}"}, train),
        "chat": (_chat, train),
        "stack-exchange": (lambda _, row: {"question": row["instruction"], "response_j": row["output"]}, train),
        "dolly": (_dolly, train),
    }
    for name, (shape, rows) in shapes.items():
        lines = [json.dumps(shape(index, row)) + "\n" for index, row in enumerate(rows)]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _guanaco(_: int, row: Row) -> Row:
    return {"text": f"### Human: {row['instruction']}### Assistant: {row['output']}"}


def _chat(_: int, row: Row) -> Row:
    turns = (("user", row["instruction"]), ("assistant", row["output"]))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _dolly(index: int, row: Row) -> Row:
    """Every third row has a context, as some of Dolly's have."""
    context = "Python's standard library." if index % 3 == 0 else ""
    return {"instruction": row["instruction"], "context": context, "response": row["output"], "category": "open_qa"}


# Tokenizers


SPECIAL: tuple[tuple[str, dict[str, str], str | None], ...] = (
    ("llama", {"bos_token": "<s>", "eos_token": "</s>"}, None),
    ("qwen2", {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}, CHATML),
    ("gptbigcode", {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}, None),
)
"""Folder, special tokens, chat template. Where there is no padding token, the recipe names the end token."""


def write_tokenizer(folder: Path, texts: list[str], special: dict[str, str], chat_template: str | None) -> None:
    """A byte-level BPE of the rows' own words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - slow

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **special}
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")


# Models


@dataclass(frozen=True)
class Shape:
    """A model class and its size."""

    folder: str
    config: Any
    model: Any


def shapes() -> Iterator[Shape]:
    """The recipes' architectures; the sizes of all layers can be shared out in groups of 128."""
    import transformers  # noqa: PLC0415 - slow

    size: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "max_position_embeddings": POSITIONS}
    blocks: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
    }
    llama = transformers.LlamaConfig(**size, **blocks, eos_token_id=1)
    yield Shape("llama", llama, transformers.LlamaForCausalLM)
    qwen = transformers.Qwen2Config(**size, **blocks, eos_token_id=1, pad_token_id=2)
    yield Shape("qwen2", qwen, transformers.Qwen2ForCausalLM)
    size = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "n_positions": POSITIONS}
    bigcode = transformers.GPTBigCodeConfig(**size, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_inner=2 * HIDDEN)
    yield Shape("gptbigcode", bigcode, transformers.GPTBigCodeForCausalLM)


def write_models(folder: Path) -> None:
    """Random weights of each architecture, and one quantized model."""
    import torch  # noqa: PLC0415 - slow

    for shape in shapes():
        torch.manual_seed(SEED)
        shape.model(shape.config).to(torch.bfloat16).save_pretrained(folder / shape.folder)
    write_gptq(folder / "qwen2", folder / "qwen2-gptq")


def write_gptq(source: Path, target: Path) -> None:
    """The model in 4 bits, in groups of 64, as models on the hub come."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    source, target = source.resolve(), target.resolve()
    with tempfile.TemporaryDirectory() as aside:
        here = Path.cwd()
        os.chdir(aside)  # it writes logs into the current folder
        try:
            _quantize(source, target, aside)
        finally:
            os.chdir(here)


def _quantize(source: Path, target: Path, aside: str) -> None:
    import gptqmodel  # noqa: PLC0415 - slow
    import torch  # noqa: PLC0415 - slow

    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randint(2, VOCABULARY, (32, 64), generator=generator).tolist()
    settings = gptqmodel.QuantizeConfig(bits=4, group_size=64, desc_act=False, device="cpu", offload_to_disk_path=aside)
    model = gptqmodel.GPTQModel.load(str(source), settings)
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows], batch_size=1)
    model.save(str(target))


if __name__ == "__main__":
    main()
