"""Jobs on a GPU by the real stages, on models of real shapes with random weights, and what they took."""

from __future__ import annotations

import gc
import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import shapes
from finetune_trainer.__main__ import main
from tests.tiny import make_config, make_jsonl, make_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TOKENIZER: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
COMMON: dict[str, Any] = {"max_position_embeddings": 8192, "rope_theta": 500_000.0}
LLAMA_1B = shapes.LLAMA_1B | COMMON
LLAMA_8B = shapes.LLAMA_8B | COMMON
STEPS = 20
WARM_UP_STEPS = 3
GIB = 2**30


@dataclass(frozen=True)
class Outcome:
    """What a training took. Memory is the most that tensors held."""

    name: str
    first_loss: float
    last_loss: float
    tokens_per_second: float
    peak_bytes: float

    @classmethod
    def of(cls, name: str, work: Path, resumed: int = 0) -> Outcome:
        """What the log of a training in that folder says, which went on from step `resumed`; memory is rank 0's."""
        lines = [json.loads(line) for line in (work / "report" / "training.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "loss" in line]
        latest = [line for line in steps if line["step"] > resumed]
        return cls(
            name,
            steps[0]["loss"],
            steps[-1]["loss"],
            steady([line["tokens_per_second"] for line in latest]),
            max(line["peak_memory_bytes"] for line in latest),
        )

    def __str__(self) -> str:
        """A line for people."""
        return (
            f"{self.name:<28} {self.tokens_per_second:>9,.0f} tokens/s {self.peak_bytes / GIB:>7.2f} GiB "
            f"({self.peak_bytes / 1e9:.1f} GB)   loss {self.first_loss:.3f} -> {self.last_loss:.3f}"
        )


def steady(rates: list[float]) -> float:
    """Tokens a second without the first steps, which wait for kernels.

    `rates`: of each step, the average since the first; all steps have as many tokens.
    """
    count = len(rates)
    return (count - WARM_UP_STEPS) / (count / rates[-1] - WARM_UP_STEPS / rates[WARM_UP_STEPS - 1])


@dataclass(frozen=True)
class Bench:
    """A workstation with a GPU: claims of models and datasets, and a work folder for one job at a time."""

    root: Path

    @property
    def models(self) -> Path:
        return self.root / "sources" / "models"

    def make_model(self, name: str, shape: dict[str, Any], device: str = "cuda") -> None:
        """A Llama with random weights in bf16, made on the device: 16 GB are on the disk within half a minute."""
        make_tokenizer(self.models / name)
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                LlamaConfig(**shape, **TOKENIZER), dtype=torch.bfloat16
            )
        model.save_pretrained(self.models / name, max_shard_size="5GB")
        del model
        forget()

    def train(self, name: str, job: dict[str, Any]) -> Outcome:
        """Prepare and train in a fresh work folder, which is removed: nothing but figures is wanted."""
        forget()
        path, work = self.root / "job.json", self.root / "work"
        path.write_text(json.dumps(job))
        options = ["--config", str(path), "--work", str(work), "--sources", str(self.root / "sources")]
        try:
            for stage in ("prepare", "train"):
                code = main([stage, *options, "--termination-log", str(self.root / "last-word")])
                assert code == 0, (self.root / "last-word").read_text()
            return Outcome.of(name, work)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def forget() -> None:
    """Give back the memory of the job before, and count its peak no longer."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def make_texts(path: Path, numbers: range, tokens: int) -> None:
    """Rows that are all alike but for their numbers, so that 20 steps suffice to see a loss fall."""
    make_jsonl(path, [{"text": f"What is {n} plus one? It is {n + 1}. " * (tokens // 16)} for n in numbers])


def make_job(model: str, method: dict[str, Any], **training: Any) -> dict[str, Any]:
    """The method on that model: 16 rows of 512 tokens a step."""
    return make_config(
        model=model,
        parallelism={"gpusPerNode": 1},
        evaluation={"percent": 2, "maxRows": 8},
        method=method,
        training={
            "maxSteps": STEPS,
            "maxLength": 512,
            "longRows": "Truncate",
            "packing": "Off",
            "globalBatchSize": 16,
            "perDeviceTrainBatchSize": 8,
            "learningRate": 0.001,
            "checkpoint": {"everySteps": STEPS},
            **training,
        },
    )
