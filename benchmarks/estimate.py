"""python -m benchmarks.estimate [--only QLoRA ...]: what a training is estimated to take, and what it takes on a GPU.

Each run takes three steps of two micro-batches with the trainer's own pieces, on models of the shapes of Llama-3.2-1B
and Qwen3-0.6B with random weights made on the GPU. Printed are, in GiB, the estimated peak of a step, the measured one
(the most that torch's allocator gave out) and their ratio; the same of a measurement of held-out rows; what the
allocator reserved beyond the peak, and what CUDA itself takes. Adapters are trained by both paths.
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from finetune_trainer.data.tokenized import INPUT_IDS, LENGTHS, LOSS_MASK
from finetune_trainer.evaluate import token_row
from finetune_trainer.models.folder import ModelFacts, describe, load_tokenizer
from finetune_trainer.models.loading import MEASURED_TOKENS, compute_dtype, load_base, set_up_torch
from finetune_trainer.progress import DataFacts, Estimate, Resolved
from finetune_trainer.runtime.parsing import parse_config
from finetune_trainer.settings.activations import Batch
from finetune_trainer.settings.estimate import estimate
from finetune_trainer.settings.resolve import SourceFacts, resolve
from finetune_trainer.training.trainers import build_trainer
from tests.gpu.bench import LLAMA_1B, TOKENIZER
from tests.tiny import make_tokenizer

GIB = 2**30
STEPS, PASSES = 3, 2
"""The second step is the first that begins with the optimizer's states, the second pass the first with gradients."""
SHAPES: dict[str, Any] = {
    "llama": LlamaConfig(**LLAMA_1B, **TOKENIZER),
    "qwen3": Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        **TOKENIZER,
    ),
}


@dataclass(frozen=True)
class Run:
    """One point of the grid."""

    method: str
    rows: int
    tokens: int
    checkpointing: str
    settings: dict[str, Any]
    """`method` of the job."""
    training: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    shape: str = "llama"
    fast_path: str = "Off"

    @property
    def name(self) -> str:
        """The run for people."""
        kind = (" fast" if self.fast_path == "Auto" else "") + (" packed" if self.packed else "")
        return f"{self.shape} {self.method}{kind} {self.rows}x{self.tokens} {self.checkpointing}"


QLORA = {"type": "QLoRA"}
LORA = {"type": "LoRA"}
INT8 = {"type": "LoRA", "baseWeights": {"format": "Int8"}}
FULL = {"type": "Full"}
BF16 = {"type": "Full", "baseWeights": {"format": "BF16"}}
GALORE = {"type": "GaLore"}
DROPOUT = {"type": "QLoRA", "lora": {"r": 64, "dropout": 0.1}}
GRID = (
    *(
        Run(method, rows, tokens, checkpointing, settings)
        for method, settings in (("QLoRA", QLORA), ("LoRA", LORA), ("Full", FULL))
        for rows, tokens in ((8, 512), (2, 4096))
        for checkpointing in ("Full", "Off")
    ),
    Run("QLoRA", 8, 512, "Selective", QLORA),
    Run("LoRA", 8, 512, "Selective", LORA),
    Run("QLoRA r=64 dropout", 8, 512, "Off", DROPOUT),
    Run("QLoRA", 2, 2048, "Off", QLORA, packed=True),
    Run("Int8", 4, 1024, "Off", INT8),
    Run("Int8", 4, 1024, "Full", INT8),
    Run("Full BF16 AdamW8bit", 8, 512, "Off", BF16, {"optimizer": "AdamW8bit"}),
    Run("GaLore", 8, 512, "Full", GALORE),
    Run("LoRA", 8, 512, "Off", LORA, shape="qwen3"),
    Run("Full", 8, 512, "Full", FULL, shape="qwen3"),
)
FAST_GRID = tuple(
    replace(run, fast_path="Auto") for run in GRID if run.settings["type"] in ("QLoRA", "LoRA") and run.settings != INT8
)
"""The runs of them that the fast path takes, by it."""


@dataclass(frozen=True)
class Outcome:
    """What a run was estimated to take, and took. Bytes."""

    run: Run
    fast: bool
    """Whether the fast path was to be taken, by the settings as prepare fixes them."""
    expected: Estimate
    peak: int
    measuring: int
    reserved: int
    context: int
    seconds: float

    def __str__(self) -> str:
        """A line of the table."""
        expected, measuring = self.expected.peak_bytes, self.expected.measuring_bytes
        return (
            f"{self.run.name:<38} {'fast' if self.fast else 'plain':<5} "
            f"{expected / GIB:>8.2f} {self.peak / GIB:>8.2f} {expected / self.peak:>6.3f} "
            f"{measuring / GIB:>10.2f} {self.measuring / GIB:>8.2f} {measuring / self.measuring:>6.3f} "
            f"{self.reserved / self.peak - 1:>10.1%} {self.context / GIB:>8.2f} {self.seconds:>7.1f}"
        )


HEADING = (
    f"{'run':<38} {'path':<5} {'estimate':>8} {'measured':>8} {'ratio':>6} "
    f"{'evaluation':>10} {'measured':>8} {'ratio':>6} {'+ reserved':>10} {'context':>8} {'seconds':>7}"
)


def make_model(folder: Path, shape: str) -> None:
    """Random weights in bf16, made on the GPU."""
    make_tokenizer(folder)
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)


def settle(run: Run, facts: ModelFacts) -> Resolved:
    """The settings of the run, as prepare fixes them."""
    count = run.rows * PASSES * STEPS
    tokens = count * run.tokens
    data = DataFacts(
        train_rows=count, eval_rows=0, dropped_rows=0, train_tokens=tokens, loss_tokens=tokens,
        length_p50=run.tokens, length_p95=run.tokens, length_p99=run.tokens, length_max=run.tokens,
        packed_rows=count if run.packed else None,
    )  # fmt: skip
    job = {
        "model": {"volume": {"claimName": "models", "path": run.shape}, "attention": "SDPA"},
        "datasets": [{"volume": {"claimName": "rows", "path": "rows.jsonl"}}],
        "method": run.settings,
        "training": {
            "globalBatchSize": run.rows * PASSES,
            "perDeviceTrainBatchSize": run.rows,
            "maxLength": run.tokens,
            "maxSteps": STEPS,
            "gradientCheckpointing": run.checkpointing,
            "fastPath": run.fast_path,
            **run.training,
        },
    }
    return resolve(parse_config(job), SourceFacts("sha256:0", None, "sha256:0"), facts, data)


def make_rows(run: Run, words: int) -> pa.Table:
    """Full rows of random tokens, all in the loss; packed ones are of four rows each."""
    ids = np.random.default_rng(0).integers(3, words, (run.rows * PASSES * STEPS, run.tokens), dtype=np.int32)
    columns = {INPUT_IDS: list(ids), LOSS_MASK: list(np.ones(ids.shape, dtype=np.bool_))}
    kinds = {INPUT_IDS: pa.list_(pa.int32()), LOSS_MASK: pa.list_(pa.bool_())}
    if run.packed:
        columns[LENGTHS] = [np.full(4, run.tokens // 4, dtype=np.int32)] * len(ids)
        kinds[LENGTHS] = pa.list_(pa.int32())
    return pa.table(columns, schema=pa.schema(list(kinds.items())))


def measure(run: Run, folder: Path, scratch: Path) -> Outcome:
    """Train, and read what the allocator and the driver say."""
    began, facts, device = time.monotonic(), describe(folder), torch.device("cuda", 0)
    resolved = settle(run, facts)
    measured = max(MEASURED_TOKENS, run.tokens)
    expected = estimate(facts, resolved, Batch(run.rows, run.tokens, masked=run.packed), measured)
    before = torch.cuda.memory_allocated()  # bitsandbytes never lets go of embeddings whose states it was told about
    dtype = compute_dtype(resolved, device)
    base = load_base(folder, resolved, device, dtype)
    rows = make_rows(run, facts.vocabulary or 0)
    trainer = build_trainer(base, load_tokenizer(folder), rows, resolved, dtype, scratch)
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak, reserved = torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved() - before
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    ids = rows.column(INPUT_IDS).to_numpy()[:2]
    trainer.measure([token_row(each, np.ones(len(each), dtype=np.bool_)) for each in ids])
    measuring = torch.cuda.max_memory_allocated() - before
    return Outcome(run, resolved.fast_path, expected, peak, measuring, reserved, context, time.monotonic() - began)


def forget() -> None:
    """Give back what a run held."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - there is no public name
    torch.cuda.empty_cache()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="runs whose names have one of these words in them")
    only = parser.parse_args().only
    set_up_torch()
    logging.disable(logging.WARNING)
    if not torch.cuda.is_available():
        parser.exit(1, "No GPU is seen here.\n")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n{HEADING}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for shape in SHAPES:
            make_model(root / shape, shape)
            forget()
        for run in (*GRID, *FAST_GRID):
            if not only or any(word in run.name for word in only):
                try:
                    print(measure(run, root / run.shape, root / "scratch"), flush=True)
                except torch.OutOfMemoryError as error:
                    print(f"{run.name:<40} {error}".splitlines()[0], flush=True)
                forget()


if __name__ == "__main__":
    main()
