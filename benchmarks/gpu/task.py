"""A small real task: a model and rows of the user's, prepared once by our own stage and trained on by all ways."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.works import BASES, LORA
from finetune_trainer.runtime.work import WorkFolder


@dataclass(frozen=True)
class Task:
    """A folder with a job and what prepare made of it."""

    root: Path

    @property
    def work(self) -> WorkFolder:
        """Model, rows, and rows that are held out."""
        return WorkFolder(self.root / "work")

    @property
    def _job(self) -> Path:
        return self.root / "job.json"

    def read_job(self) -> dict[str, Any]:
        """The spec that all begin with."""
        job: dict[str, Any] = json.loads(self._job.read_text(encoding="utf-8"))
        return job

    def prepare(self, model: Path, data: Path, method: str, device: str, steps: int) -> None:
        """Tokenize, and hold rows out. SystemExit if our prepare ends in an error, which it tells."""
        sources = self.root / "sources"
        sources.mkdir(parents=True)
        for claim, path in (("models", model), ("datasets", data)):
            (sources / claim).symlink_to(path.resolve().parent, target_is_directory=True)
        job = {
            "model": {"volume": {"claimName": "models", "path": model.name}},
            "datasets": [{"volume": {"claimName": "datasets", "path": data.name}}],
            "parallelism": {"gpusPerNode": int(device == "cuda")},
            "method": {
                "type": method,
                "baseWeights": {"format": BASES[method]},
                "computeDtype": "BF16",
                "lora": LORA,
            },
            "training": {
                "maxSteps": steps,
                "longRows": "Truncate",
                "packing": "Off",  # so that all take the same rows a step
            },
        }
        self._job.write_text(json.dumps(job), encoding="utf-8")
        folders = ["--work", str(self.work.root), "--sources", str(sources)]
        command = [sys.executable, "-m", "finetune_trainer", "prepare", "--config", str(self._job), *folders]
        word = ["--termination-log", str(self.root / "last-word")]
        if code := subprocess.run([*command, *word], check=False).returncode:  # noqa: S603 - our own words
            raise SystemExit(code)
