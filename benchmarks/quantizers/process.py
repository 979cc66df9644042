"""python -m benchmarks.quantizers.process ...: one form made or measured, in a process of its own.

Prints its figures as JSON, the last line. The libraries are called as their own READMEs have it: with bits and group
size as ours, and all else by their defaults.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from benchmarks.quantizers.subject import METHODS, Subject
from finetune_trainer import quantize
from finetune_trainer.evaluate import finished_dtype, measure_loss, read_token_rows
from finetune_trainer.models.finished import load_quantized
from finetune_trainer.models.loading import load_finished, set_up_torch, working_device
from finetune_trainer.progress import Stage
from finetune_trainer.runtime.context import Context
from finetune_trainer.runtime.report import Report
from finetune_trainer.runtime.work import WorkFolder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from finetune_trainer.progress import ResolvedQuantize

MIB = 2**20
OURS, GPTQMODEL, LLMCOMPRESSOR, NOBODY = "ours", "gptqmodel", "llm-compressor", "the model itself"


@dataclass(frozen=True)
class Cost:
    """What quantizing took, from files to files: read, quantize, write. Imports count in memory alone."""

    seconds: float
    cpu_seconds: float
    """On all cores together; the same on a busy machine as on a quiet one."""
    host_mib: float
    """The most that the process held."""
    gpu_mib: float
    """The most that tensors held on the GPU; 0 without one."""


# Who quantizes


def quantize_ours(subject: Subject, settings: ResolvedQuantize, folder: Path) -> None:
    """What the quantize stage does before it looks at what it wrote."""
    work = subject.work
    context = Context(work, work.root, work.root, 1, Report(Stage.QUANTIZE, 1, bar=False))
    quantize.write_quantized(work.model, folder, settings, subject.calibration, context)


def quantize_by_gptqmodel(subject: Subject, settings: ResolvedQuantize, folder: Path) -> None:
    """As gptqmodel's README has it."""
    gptqmodel = quantize.import_gptqmodel(folder)  # so that it runs at all on 2 cores: the same settings
    awq = settings.method == "AWQ"
    kind = gptqmodel.quantization.config.AWQConfig if awq else gptqmodel.QuantizeConfig
    model = gptqmodel.GPTQModel.load(str(subject.work.model), kind(bits=settings.bits, group_size=settings.group_size))
    packer = {"backend": gptqmodel.BACKEND.AWQ_TORCH} if awq and working_device(0).type == "cpu" else {}
    model.quantize(subject.calibration, batch_size=1, **packer)
    model.save(str(folder))


def quantize_by_llmcompressor(subject: Subject, settings: ResolvedQuantize, folder: Path) -> None:
    """As the guides of llm-compressor to W4A16 and to AWQ have it."""
    import torch  # noqa: PLC0415 - slow
    from compressed_tensors.quantization import preset_name_to_scheme  # noqa: PLC0415 - of its own environment
    from datasets import Dataset  # noqa: PLC0415 - slow
    from llmcompressor import oneshot  # noqa: PLC0415 - of its own environment
    from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: PLC0415
    from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: PLC0415
    from llmcompressor.modifiers.transform.awq import AWQModifier  # noqa: PLC0415
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow

    awq = settings.method == "AWQ"
    scheme = preset_name_to_scheme("W4A16_ASYM" if awq else "W4A16", ["Linear"])
    scheme.weights.group_size = settings.group_size
    rounding: dict[str, Any] = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    recipe = [AWQModifier(), QuantizationModifier(**rounding)] if awq else GPTQModifier(**rounding)
    model = AutoModelForCausalLM.from_pretrained(subject.work.model, dtype="auto")
    rows = subject.calibration
    pinning: AbstractContextManager[Any] = nullcontext()
    if not torch.cuda.is_available():  # its AWQ pins memory all the same, which torch refuses
        pinning = patch.object(torch.Tensor, "pin_memory", lambda tensor, *_: tensor)
    with pinning:
        oneshot(
            model=model,
            dataset=Dataset.from_list(rows),
            recipe=recipe,
            max_seq_length=max(len(row["input_ids"]) for row in rows),
            num_calibration_samples=len(rows),
        )
    model.save_pretrained(folder, save_compressed=True)


MAKERS = {OURS: quantize_ours, GPTQMODEL: quantize_by_gptqmodel, LLMCOMPRESSOR: quantize_by_llmcompressor}


def make(by: str, subject: Subject, method: str, folder: Path) -> Cost:
    """Quantize, and what it cost."""
    import torch  # noqa: PLC0415 - slow

    if by == LLMCOMPRESSOR:
        import llmcompressor  # noqa: F401, PLC0415 - of its own environment
    else:
        quantize.import_gptqmodel(folder)
    settings = subject.settings(method)
    begun, begun_cpu = time.monotonic(), time.process_time()
    MAKERS[by](subject, settings, folder)
    return Cost(
        seconds=time.monotonic() - begun,
        cpu_seconds=time.process_time() - begun_cpu,
        host_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        gpu_mib=torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else 0.0,
    )


def measure(by: str, subject: Subject, folder: Path) -> float:
    """Loss of a form that was written, or of the model itself, on the held-out rows; nats a token."""
    device = working_device(0)
    if by in {OURS, GPTQMODEL}:
        model = load_quantized(folder, device)
    else:
        model = load_finished(folder, device, finished_dtype(device))
    return measure_loss(model, read_token_rows(subject.work.data))


def main(argv: Sequence[str] | None = None) -> None:
    """Do one thing, and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="of the subject")
    parser.add_argument("--folder", type=Path, required=True, help="of the form")
    parser.add_argument("--by", choices=(*MAKERS, NOBODY), required=True)
    parser.add_argument("--method", choices=METHODS, help="make the form; unset: measure it")
    given = parser.parse_args(argv)
    set_up_torch()
    subject = Subject(WorkFolder(given.work))
    if given.method:
        print(json.dumps(asdict(make(given.by, subject, given.method, given.folder))))
    else:
        print(measure(given.by, subject, given.folder))


if __name__ == "__main__":
    main()
