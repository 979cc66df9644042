"""What the start of a training takes, part by part, of a first attempt and of one that goes on from its checkpoint.

SmolLM2-135M as a QLoRA job on CPU, by the command line, each attempt in a process of its own. Then what could be kept
for a restart: the base quantized anew beside one that was saved quantized, and kernels of the fast path compiled for
an H100 (no GPU is needed for that) beside the same ones from the cache.

    python -m benchmarks.start                               # minutes on 2 cores
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from cluster.demo import fetch_model, make_dataset
from finetune_trainer.training.start import START_NAME, Start

STEPS = 3
JOB: dict[str, Any] = {
    "model": {"volume": {"claimName": "models", "path": "model.gguf"}},
    "datasets": [{"volume": {"claimName": "datasets", "path": "train.jsonl"}}],
    "evaluation": {"datasets": [{"volume": {"claimName": "datasets", "path": "heldout.jsonl"}}], "maxRows": 4},
    "training": {"maxSteps": STEPS, "globalBatchSize": 2, "maxLength": 128, "checkpoint": {"everySteps": 1}},
    "parallelism": {"gpusPerNode": 0},
}
KERNELS = {
    "normalize": {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "factors": "*fp32", "epsilon": "fp32"},
    "gate": {"both": "*bf16", "out": "*bf16"},
    "gate_backward": {"gradient": "*bf16", "both": "*bf16", "out": "*bf16"},
    "surprise": {"logits": "*bf16", "targets": "*i64", "losses": "*fp32"},
}
"""Those whose arguments are easily told: their types, where they are no i32."""
BLOCK = 1024


def main() -> None:
    """Print three tables, or do one piece of work of theirs in this process."""
    if len(sys.argv) > 1:
        work = Path(sys.argv[2])
        print(json.dumps({"load": load, "compile": compile_kernels}[sys.argv[1]](work)))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        show_starts(attempts(root))
        for name in ("load", "compile", "compile"):
            print(f"{name}: " + ", ".join(f"{what} {seconds:.2f} s" for what, seconds in aside(name, root).items()))


def attempts(root: Path) -> list[Start]:
    """The starts of a first attempt, and of one that has one step left."""
    sources, work = root / "sources", root / "work"
    (sources / "models").mkdir(parents=True)
    shutil.copy(fetch_model(), sources / "models" / "model.gguf")
    shutil.copytree(make_dataset(), sources / "datasets")
    (root / "job.json").write_text(json.dumps(JOB), encoding="utf-8")
    run(root, "prepare")
    run(root, "train", "--attempt", "1")
    starts = [read_start(work)]
    shutil.rmtree(work / "adapter")
    shutil.rmtree(work / "checkpoints" / f"step-{STEPS:08d}")
    run(root, "train", "--attempt", "2")
    return [*starts, read_start(work)]


def run(root: Path, stage: str, *options: str) -> None:
    """A stage, as on a workstation."""
    folders = ["--config", str(root / "job.json"), "--work", str(root / "work"), "--sources", str(root / "sources")]
    subprocess.run([sys.executable, "-m", "finetune_trainer", stage, *folders, *options], check=True)  # noqa: S603 - the trainer


def read_start(work: Path) -> Start:
    """What the last attempt left."""
    return Start.model_validate_json((work / "report" / START_NAME).read_bytes())


def show_starts(starts: list[Start]) -> None:
    """A line a part, a column an attempt."""
    seconds = [{part.activity: part.seconds for part in start.parts} | {"together": start.seconds} for start in starts]
    print(f"{'seconds':<34}" + "".join(f"{f'attempt {start.attempt}':>12}" for start in starts))
    for name in dict.fromkeys(name for each in seconds for name in each if name != "together") | {"together": None}:
        print(f"{name:<34}" + "".join(f"{each[name]:12.1f}" if name in each else " " * 12 for each in seconds))


def aside(name: str, root: Path) -> dict[str, float]:
    """A piece of work in a process of its own, whose kernels are those of the work folder."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(root / "kernels")}
    command = [sys.executable, "-m", "benchmarks.start", name, str(root / "work")]
    told = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout  # noqa: S603 - ourselves
    found: dict[str, float] = json.loads(told.splitlines()[-1])
    return found


def load(work: Path) -> dict[str, float]:
    """Seconds of CPU to load the base: quantized on the way, and saved quantized."""
    from finetune_trainer.models.loading import load_base, load_finished, set_up_torch  # noqa: PLC0415 - slow
    from finetune_trainer.runtime.manifest import settings_in  # noqa: PLC0415 - beside it

    set_up_torch()
    import torch  # noqa: PLC0415 - after it is set up

    saved, cpu, resolved = work / "saved", torch.device("cpu"), settings_in(work / "data")
    load_base(work / "model", resolved, cpu, torch.float32).save_pretrained(saved)  # and with it what is imported
    began = time.process_time()
    load_base(work / "model", resolved, cpu, torch.float32)
    between = time.process_time()
    load_finished(saved, cpu, torch.float32)
    return {"quantized anew": between - began, "saved quantized": time.process_time() - between}


def compile_kernels(_work: Path) -> dict[str, float]:
    """Seconds until the kernels are there, without Triton's import."""
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415 - slow
    from triton.compiler import ASTSource, compile  # noqa: A004, PLC0415 - slow

    from finetune_trainer.fast import kernels  # noqa: PLC0415 - brings triton

    began = time.monotonic()
    for name, types in KERNELS.items():
        kernel = getattr(kernels, name)
        signature = dict.fromkeys(kernel.arg_names, "i32") | types | {"BLOCK": "constexpr"}
        compile(ASTSource(kernel, signature, {"BLOCK": BLOCK}), target=GPUTarget("cuda", 90, 32))
    return {f"{len(KERNELS)} kernels": time.monotonic() - began}


if __name__ == "__main__":
    main()
