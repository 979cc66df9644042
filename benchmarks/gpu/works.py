"""What is trained: shapes of models, works, the rows of a work, and its job as our users write it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.shapes import LLAMA_1B, LLAMA_8B
from finetune_trainer.data.pack import pack_rows
from finetune_trainer.data.tokenized import INPUT_IDS, LENGTHS, LOSS_MASK

Row = list[int]
"""Token ids, of which all count but the first, which nothing comes before."""


@dataclass(frozen=True)
class Shape:
    """A Llama without its weights."""

    config: dict[str, Any]
    """LlamaConfig."""
    shorter: int = 1
    """Rows are so many times shorter than a work says."""


WORDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
FIRST_WORD = 3
"""Of those that rows are drawn from."""
COMMON: dict[str, Any] = {
    "max_position_embeddings": 32_768,  # of which the speed does not depend, and our trainer takes no longer rows
    "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
    "rms_norm_eps": 1e-5,
    **WORDS,
}
TINY = {
    **LLAMA_8B,
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SHAPES = {
    "8b": Shape(LLAMA_8B | COMMON),
    "1b": Shape(LLAMA_1B | COMMON),
    "tiny": Shape(TINY | COMMON, shorter=32),
}
"""`8b`: Llama-3-8B's. `1b`: Llama-3.2-1B's. `tiny`: to see the benchmark run."""


@dataclass(frozen=True)
class Work:
    """A training of adapters; each step takes other rows of the same lengths."""

    method: str
    rows: int
    """A micro-batch, which is a step unless rows are packed."""
    tokens: int
    """Of a row; of a sequence where rows are packed."""
    checkpointing: str = "Full"
    """Full or Off, ours and theirs."""
    packed: bool = False


WORKS = {
    "qlora-8x512": Work("QLoRA", 8, 512),
    "lora-4x2048": Work("LoRA", 4, 2048),
    "lora-4x2048-whole": Work("LoRA", 4, 2048, checkpointing="Off"),
    "lora-8x512-whole": Work("LoRA", 8, 512, checkpointing="Off"),
    "packed": Work("LoRA", 8, 8192, packed=True),
    "long-16k": Work("LoRA", 1, 16_384),
    "long-32k": Work("LoRA", 1, 32_768),
}
"""QLoRA on NF4, quantized twice; LoRA on bf16. `whole`: activations are kept, not computed again. `packed`: by TRL
padded, in micro-batches of so many rows; by ours packed to sequences."""
SHORT_ROWS, MEAN_TOKENS, SPREAD, MOST_TOKENS = 64, 226, 1.0, 1601
"""Rows a step of `packed`: lognormal lengths."""
BASES = {"QLoRA": "NF4", "LoRA": "BF16"}
LORA = {"r": 16, "alpha": 32, "dropout": 0}
"""On all linear layers."""


@dataclass(frozen=True)
class Batches:
    """The rows of all steps, in the order in which they are taken."""

    rows: list[Row]
    step_rows: int
    sequences: list[list[Row]] | None = None
    """The same rows as they share sequences; None where they are not packed."""
    step_sequences: int = 0

    @property
    def step_tokens(self) -> int:
        """Of any step; without padding."""
        return sum(map(len, self.rows[: self.step_rows]))

    def as_table(self) -> pa.Table:
        """As prepare leaves them for training."""
        kinds = {INPUT_IDS: pa.int32(), LOSS_MASK: pa.bool_()}
        taken = [[row] for row in self.rows]
        if self.sequences is not None:
            taken, kinds[LENGTHS] = self.sequences, pa.int32()
        ids = [[token for row in sequence for token in row] for sequence in taken]
        columns = {
            INPUT_IDS: ids,
            LOSS_MASK: [[place > 0 for row in sequence for place in range(len(row))] for sequence in taken],
            LENGTHS: [list(map(len, sequence)) for sequence in taken],
        }
        schema = pa.schema([(name, pa.list_(kind)) for name, kind in kinds.items()])
        return pa.table({name: columns[name] for name in kinds}, schema=schema)


def make_batches(work: Work, shape: Shape, steps: int, seed: int) -> Batches:
    """Random tokens."""
    drawn = np.random.default_rng(seed)
    tokens = work.tokens // shape.shorter
    lengths = _short_lengths(drawn, shape.shorter) if work.packed else [tokens] * work.rows
    words = shape.config["vocab_size"]
    rows = [drawn.integers(FIRST_WORD, words, length).tolist() for _ in range(steps) for length in lengths]
    if not work.packed:
        return Batches(rows, work.rows)
    together = pack_rows(lengths, tokens)
    firsts = range(0, len(rows), len(lengths))
    sequences = [[rows[first + index] for index in indexes] for first in firsts for indexes in together]
    return Batches(rows, len(lengths), sequences, len(together))


def _short_lengths(drawn: np.random.Generator, shorter: int) -> list[int]:
    location = math.log(MEAN_TOKENS) - SPREAD**2 / 2  # a lognormal's mean is exp(location + spread² / 2)
    lengths = drawn.lognormal(location, SPREAD, SHORT_ROWS).clip(shorter, MOST_TOKENS) / shorter
    return [max(2, length) for length in lengths.astype(int).tolist()]  # of one token nothing follows


def build_job(work: Work, shape: Shape, batches: Batches, seed: int, *, gpu: bool) -> dict[str, Any]:
    """The spec of the work's job."""
    whole_step = batches.step_sequences or batches.step_rows
    return {
        "model": {"volume": {"claimName": "models", "path": "base"}},
        "datasets": [{"volume": {"claimName": "rows", "path": "rows.jsonl"}}],
        "parallelism": {"gpusPerNode": int(gpu)},
        "method": {
            "type": work.method,
            "baseWeights": {"format": BASES[work.method]},
            "computeDtype": "BF16",
            "lora": LORA,
        },
        "training": {
            "maxLength": work.tokens // shape.shorter,
            "globalBatchSize": whole_step,
            "perDeviceTrainBatchSize": 1 if work.packed else work.rows,
            "gradientCheckpointing": work.checkpointing,
            "maxSteps": len(batches.rows) // batches.step_rows,
            "shuffle": False,
            "seed": seed,
        },
    }


def merged(spec: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """A spec with fields of another put over it, block by block."""
    both = dict(spec)
    for name, value in more.items():
        old = both.get(name)
        both[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return both
