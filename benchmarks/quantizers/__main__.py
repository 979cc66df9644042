"""Our GPTQ and AWQ beside gptqmodel and llm-compressor, called by hand: the same model, rows, bits and group size.

    python -m benchmarks.quantizers                            # SmolLM2-135M on CPU: perplexity, time, memory
    python -m benchmarks.quantizers --device cuda --shape 1b   # random weights shaped as Llama-3.2-1B: time, memory

Every form is made in a process of its own and measured in another one. One that fails loses its own figures only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.quantizers.environment import CACHE, python_with_llmcompressor
from benchmarks.quantizers.process import LLMCOMPRESSOR, MAKERS, NOBODY, Cost
from benchmarks.quantizers.subject import METHODS, REAL, SHAPES, Subject, make_random, make_real
from cluster.target import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Bench:
    """What is quantized, and where."""

    subject: Subject
    device: str

    def quantize(self, by: str, method: str, folder: Path) -> Cost:
        """Let somebody make a form. CalledProcessError."""
        return Cost(**json.loads(self._run(by, folder, "--method", method)))

    def measure(self, by: str, folder: Path) -> float | None:
        """Its loss on the held-out rows, nats a token; None without rows. CalledProcessError."""
        return float(self._run(by, folder)) if self.subject.has_held_out_rows else None

    def _run(self, by: str, folder: Path, *options: str) -> str:
        """The last line that the process prints."""
        python = str(python_with_llmcompressor()) if by == LLMCOMPRESSOR else sys.executable
        command = [python, "-m", "benchmarks.quantizers.process", "--by", by, *options]
        folders = ["--work", str(self.subject.work.root), "--folder", str(folder)]
        paths = os.pathsep.join(str(ROOT / name) for name in ("", "trainer"))
        environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if self.device == "cpu" else {})}
        if by == LLMCOMPRESSOR:
            environment["PYTHONPATH"] = paths  # or packages of ours could stand before theirs
        done = subprocess.run(  # noqa: S603 - our own words
            [*command, *folders], cwd=ROOT, check=True, capture_output=True, text=True, env=environment
        )
        return done.stdout.splitlines()[-1]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantizers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=REAL, default="smollm2", help="a real one; default: %(default)s")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of a shape instead")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=METHODS, help="default: both")
    parser.add_argument("--by", nargs="+", choices=MAKERS, default=list(MAKERS), help="default: all")
    parser.add_argument("--rows", type=int, default=128, help="to calibrate on; default: %(default)s")
    given = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="quantizers-") as folder:
        if given.shape:
            subject = make_random(Path(folder) / "work", given.shape, given.device, given.rows)
        else:
            subject = make_real(CACHE / given.model, given.model, given.rows)
        bench = Bench(subject, given.device)
        before = bench.measure(NOBODY, subject.work.model)
        rows = subject.calibration
        print(f"Calibrated on {len(rows):,} rows of {sum(len(row['input_ids']) for row in rows):,} tokens together")
        print(HEADER, flush=True)
        for method, by in itertools.product(given.method, given.by):
            print(make_line(bench, by, method, before), flush=True)


HEADER = (
    f"{'method':<7} {'bits':>4} {'group':>5} {'by':<15} {'perplexity':>10} {'after':>8} {'increase':>9} "
    f"{'seconds':>8} {'CPU s':>6} {'host MiB':>9} {'GPU MiB':>8}"
)


def make_line(bench: Bench, by: str, method: str, before: float | None) -> str:
    """A form's figures, or why there are none."""
    settings = bench.subject.settings(method)
    what = f"{method:<7} {settings.bits:>4} {settings.group_size:>5} {by:<15}"
    with tempfile.TemporaryDirectory(prefix="form-") as folder:
        try:
            cost = bench.quantize(by, method, Path(folder))
            after = bench.measure(by, Path(folder))
        except subprocess.CalledProcessError as error:
            return f"{what} failed: {' / '.join((error.stderr or '').strip().splitlines()[-3:])}"
    time = f"{cost.seconds:>8.0f} {cost.cpu_seconds:>6.0f}"
    return f"{what} {_quality(before, after)} {time} {cost.host_mib:>9,.0f} {cost.gpu_mib:>8,.0f}"


def _quality(before: float | None, after: float | None) -> str:
    """Perplexity before and after, and its increase; empty where nothing was measured."""
    if before is None or after is None:
        return f"{'':>10} {'':>8} {'':>9}"
    return f"{math.exp(before):>10.3f} {math.exp(after):>8.3f} {100 * math.expm1(after - before):>+8.2f}%"


if __name__ == "__main__":
    main()
