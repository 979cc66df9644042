"""python -m benchmarks.rank0_loading [--sizes 300 900] [--device cuda]: host memory while a model is loaded for FSDP.

Recipe 2's table: on 2 GPUs a 7B took 32,744 MB of host memory on rank 0 and 1,506 MB on the other. Printed is, for
random Llamas of so many million parameters in fp32 and two ranks, what each rank held at most while it loaded, over
what it held before, and less its own shard, which is in host memory on CPU (gloo) and not with a GPU a rank (NCCL).
Beside it the same for ranks that each read the whole model into host memory, as they do who are not told of the others.

The peak is of anonymous memory, sampled each millisecond: pages of the file that are mapped are the kernel's to drop.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from finetune_trainer.models.folder import ModelFacts
from finetune_trainer.progress import DataFacts, Resolved
from finetune_trainer.runtime.parsing import parse_config
from finetune_trainer.settings.resolve import SourceFacts, resolve
from tests.tiny import make_config
from tests.unit.trainer.gang import ROOT, environment, free_port

if TYPE_CHECKING:
    from collections.abc import Sequence

RANKS = 2
LAYERS, MILLION, MIB = 24, 1_000_000, 2**20
SAMPLE_SECONDS = 0.001


@dataclass(frozen=True)
class Found:
    """What a rank measured; bytes."""

    rank: int
    parameters: int
    """Of the model."""
    held: int
    """Weights of this rank in host memory when all is loaded."""
    peak: int
    """Most anonymous memory while it loaded, over what there was before."""

    @property
    def besides(self) -> int:
        """Of the peak, what was not its own weights."""
        return self.peak - self.held


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[300, 900], help="millions of parameters")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: a GPU a rank")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rank:
        measure(Path(arguments.rank[0]), arguments.rank[1], arguments.device)
        return
    print(
        f"{'million':>8} {'model':>9} {'loaded':>8} {'rank':>5} {'shard':>9} {'peak':>9} {'besides the shard':>18}  MiB"
    )
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(Path(folder), size)
            for how in ("sharded", "whole"):
                for found in run_ranks(model, how, arguments.device if how == "sharded" else "cpu"):
                    print(describe(found, how), flush=True)


def make_model(folder: Path, millions: int) -> Path:
    """A random Llama of about so many parameters, in bf16 shards of 200 MB; held once here, layer by layer."""
    import torch  # noqa: PLC0415 - only where a model is made
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    width = int((millions * MILLION / (LAYERS * 12)) ** 0.5) // 64 * 64
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).to_empty(device="cpu").save_pretrained(folder, max_shard_size="200MB")
    return folder


def run_ranks(model: Path, how: str, device: str = "cpu") -> list[Found]:
    """What each rank measured."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.rank0_loading", "--rank", str(model), how, "--device", device]
    ranks = [
        subprocess.Popen(  # noqa: S603 - ourselves
            command, cwd=ROOT, env=environment(rank, RANKS, port), stdout=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    return [Found(**json.loads(rank.communicate()[0].splitlines()[-1])) for rank in ranks]


def build_settings(strategy: str) -> Resolved:
    """Those of a full fine-tuning in fp32 on so many ranks."""
    fields: dict[str, Any] = {
        "parallelism": {"numNodes": RANKS, "gpusPerNode": 0, "strategy": strategy},
        "method": {"type": "Full"},
    }
    rows = DataFacts(
        train_rows=64, eval_rows=0, dropped_rows=0, train_tokens=1, loss_tokens=1, length_p50=1, length_p95=1,
        length_p99=1, length_max=1,
    )  # fmt: skip
    sources, model = SourceFacts("sha256:model", None, "sha256:rows"), ModelFacts("LlamaForCausalLM", 1, 512, {})
    return resolve(parse_config(make_config(**fields)), sources, model, rows)


class Peak:
    """The most anonymous memory of this process while the body runs."""

    def __init__(self) -> None:
        self.bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.bytes = max(self.bytes, anonymous_bytes())
        self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Of this process, now."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise LookupError("RssAnon")


def describe(found: Found, how: str) -> str:
    """A line of the table."""
    figures = f"{found.held / MIB:>9,.0f} {found.peak / MIB:>9,.0f} {found.besides / MIB:>18,.0f}"
    return f"{found.parameters / MILLION:>8,.0f} {found.parameters * 4 / MIB:>9,.0f} {how:>8} {found.rank:>5} {figures}"


def measure(model: Path, how: str, kind: str) -> None:
    """In a rank: load, and print what it took. `kind` of device: cpu or cuda."""
    if kind == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or shards would go where a GPU is
    import torch  # noqa: PLC0415 - only in a rank

    from finetune_trainer.models import sharding  # noqa: PLC0415 - after the environment is set
    from finetune_trainer.models.loading import load_base, set_up_torch  # noqa: PLC0415
    from finetune_trainer.runtime import distributed  # noqa: PLC0415 - after the environment is set

    set_up_torch()
    settings = build_settings("FSDP" if how == "sharded" else "DDP")
    device = torch.device("cuda", distributed.local_rank()) if kind == "cuda" else torch.device("cpu")
    with distributed.joined(kind, 1, threading.Event(), lambda error: sys.exit(str(error))):
        sharding.build_plan(model, settings)  # brings the model's code, which is not its weights
        torch.distributed.all_reduce(torch.ones(1, device=device))  # brings CUDA and NCCL, which are not either
        before = anonymous_bytes()
        with Peak() as peak:
            loaded = load_base(model, settings, device, torch.float32)
        shards = [getattr(tensor, "_local_tensor", tensor) for tensor in loaded.parameters()]
        held = sum(shard.nbytes for shard in shards if shard.device.type == "cpu")
        parameters = sum(tensor.numel() for tensor in loaded.parameters())
        distributed.barrier()
    print(json.dumps({"rank": distributed.rank(), "parameters": parameters, "held": held, "peak": peak.bytes - before}))


if __name__ == "__main__":
    main()
