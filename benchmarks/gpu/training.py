"""The trainings that are compared: ours by its own pieces, TRL with PEFT and Unsloth as their guides have it."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from datasets import Dataset
from peft import LoraConfig
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile
from transformers import AutoTokenizer, BitsAndBytesConfig, LlamaConfig, PrinterCallback, TrainerCallback, set_seed
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from benchmarks.gpu.drawn import load_drawn
from benchmarks.gpu.process import OURS, TRL, UNSLOTH, Figures, Run
from benchmarks.gpu.task import Task
from benchmarks.gpu.works import SHAPES, WORKS, Batches, build_job, make_batches, merged
from finetune_trainer.data.tokenized import INPUT_IDS, LOSS_MASK, TRAIN, read_rows
from finetune_trainer.evaluate import IGNORED, TokenRow, measure_loss, read_token_rows
from finetune_trainer.models import loading
from finetune_trainer.models.folder import ModelFacts, describe, describe_config, load_tokenizer
from finetune_trainer.progress import DataFacts, Resolved
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.parsing import parse_config
from finetune_trainer.settings.resolve import SourceFacts, resolve
from finetune_trainer.training.collate import build_order
from finetune_trainer.training.trainers import build_trainer
from tests.tiny import make_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pyarrow as pa

LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")
PROFILE_LINES = 40


@dataclass(frozen=True)
class Subject:
    """What is trained, for ours and by hand."""

    folder: Path
    """Of the model; of a drawn one with no more than its config."""
    tokenizer: Path
    load: Callable[..., Any]
    """As `models.loading.load_placed`."""
    facts: ModelFacts
    resolved: Resolved
    table: pa.Table
    """The rows as our trainer takes them."""
    rows: list[dict[str, list[int]]]
    """The same under TRL's names, in the order in which ours takes them, for all steps."""
    micro_batch: int
    """Rows, by hand."""
    step_rows: int
    held_out: Sequence[TokenRow] = ()

    @property
    def step_tokens(self) -> int:
        """Of the first step, without padding."""
        return sum(len(row["input_ids"]) for row in self.rows[: self.step_rows])


def train(run: Run) -> Figures:
    """Take the steps, and what they took."""
    device = loading.training_device(int(run.device == "cuda"))
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        subject = make_task_subject(run) if run.task else make_drawn_subject(run, scratch)
        set_seed(run.seed)
        trainer = WAYS[run.by](subject, device, scratch)
        trainer.remove_callback(PrinterCallback)
        clock = Clock(device, run)
        trainer.add_callback(clock)
        peak, reserved = _peaks_of(trainer, device)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return Figures(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        parameters=parameters_in_products(subject.facts),
        step_tokens=subject.step_tokens,
        step_seconds=clock.step_seconds,
        first_loss=losses[0],
        last_loss=losses[-1],
        peak_bytes=peak,
        reserved_bytes=reserved,
        held_out_loss=measure_loss(trainer.model, subject.held_out) if subject.held_out else None,
    )


def parameters_in_products(facts: ModelFacts) -> int:
    """All but the embeddings, which are looked up; where they are the head as well, all."""
    return facts.parameters - (0 if facts.tied else (facts.vocabulary or 0) * facts.hidden)


def _peaks_of(trainer: Any, device: torch.device) -> tuple[int, int]:  # noqa: ANN401 - a transformers Trainer
    """Take the steps; bytes that tensors held at most, and that the allocator did."""
    if device.type == "cpu":
        trainer.train()
        return 0, 0
    torch.cuda.empty_cache()  # what loading and quantizing took counts for nobody
    torch.cuda.reset_peak_memory_stats(device)
    trainer.train()
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


# What is trained


def make_drawn_subject(run: Run, scratch: Path) -> Subject:
    """A work on random weights. `scratch` gets a folder of config and tokenizer."""
    work, shape, folder = WORKS[run.work], SHAPES[run.shape], scratch / "model"
    make_tokenizer(folder)
    LlamaConfig(**shape.config, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    batches = make_batches(work, shape, run.steps + bool(run.profile), run.seed)
    job = build_job(work, shape, batches, run.seed, gpu=run.device == "cuda")
    facts = describe_config(folder)
    return Subject(
        folder=folder,
        tokenizer=folder,
        load=partial(load_drawn, run.seed),
        facts=facts,
        resolved=_resolve(merged(job, run.spec), facts, _facts_of(batches, work.tokens)),
        table=batches.as_table(),
        rows=[{"input_ids": row, "labels": [IGNORED, *row[1:]]} for row in batches.rows],
        micro_batch=work.rows,
        step_rows=batches.step_rows,
    )


def make_task_subject(run: Run) -> Subject:
    """A prepared task. Each seed has an order of rows and adapters of its own; what is held out stays."""
    task = Task(Path(run.task))
    work, facts = task.work, describe(task.work.model)
    data = manifest.read(work.data).result.data
    if data is None:
        msg = f"{work.data} was not made by prepare"
        raise ValueError(msg)
    settings = {"maxSteps": run.steps + bool(run.profile), "seed": run.seed}
    resolved = _resolve(merged(merged(task.read_job(), {"training": settings}), run.spec), facts, data)
    table = read_rows(work.data, TRAIN)
    return Subject(
        folder=work.model,
        tokenizer=work.tokenizer,
        load=loading.load_placed,
        facts=facts,
        resolved=resolved,
        table=table,
        rows=_in_our_order(table, resolved),
        micro_batch=resolved.micro_batch_size,
        step_rows=resolved.global_batch_size,
        held_out=read_token_rows(work.data),
    )


def _resolve(job: dict[str, Any], facts: ModelFacts, data: DataFacts) -> Resolved:
    return resolve(parse_config(job), SourceFacts("sha256:0", None, "sha256:0"), facts, data)


def _facts_of(batches: Batches, longest: int) -> DataFacts:
    lengths = list(map(len, batches.rows))
    middle = int(statistics.median(lengths))
    return DataFacts(
        train_rows=len(lengths), eval_rows=0, dropped_rows=0, train_tokens=sum(lengths), loss_tokens=sum(lengths),
        length_p50=middle, length_p95=longest, length_p99=longest, length_max=longest,
        packed_rows=None if batches.sequences is None else len(batches.sequences),
    )  # fmt: skip


def _in_our_order(table: pa.Table, resolved: Resolved) -> list[dict[str, list[int]]]:
    """As many rows as all steps take."""
    order, taken = build_order(table, resolved), table.select([INPUT_IDS, LOSS_MASK]).to_pylist()
    found: list[dict[str, Any]] = []
    while len(found) < resolved.total_steps * resolved.global_batch_size:
        found += [taken[index] for index in order]
        order.epoch += 1
    return [
        {
            "input_ids": row[INPUT_IDS],
            "labels": [
                token if counts else IGNORED for token, counts in zip(row[INPUT_IDS], row[LOSS_MASK], strict=True)
            ],
        }
        for row in found[: resolved.total_steps * resolved.global_batch_size]
    ]


# By whom


def build_ours(subject: Subject, device: torch.device, scratch: Path) -> Any:  # noqa: ANN401 - a transformers Trainer
    """The trainer of the train stage."""
    resolved = subject.resolved
    dtype = loading.compute_dtype(resolved, device)
    with patch.object(loading, "load_placed", subject.load):
        base = loading.load_base(subject.folder, resolved, device, dtype)
    return build_trainer(base, load_tokenizer(subject.tokenizer), subject.table, resolved, dtype, scratch)


def build_trl(subject: Subject, device: torch.device, scratch: Path) -> Any:  # noqa: ANN401 - likewise
    """As TRL's guides to SFT and PEFT have it."""
    resolved = subject.resolved
    lora, quantization = resolved.lora, None
    if lora is None:
        msg = "TRL is asked for adapters only"
        raise ValueError(msg)
    if resolved.base_format == "NF4":
        quantization = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    options = {} if quantization is None else {"quantization_config": quantization}
    return SFTTrainer(
        model=subject.load(subject.folder, torch.bfloat16, {"": device}, **options),
        args=SFTConfig(**arguments_by_hand(subject, device, scratch)),
        train_dataset=Dataset.from_list(subject.rows),
        processing_class=AutoTokenizer.from_pretrained(subject.tokenizer),
        peft_config=LoraConfig(
            r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
    )


def build_unsloth(subject: Subject, device: torch.device, scratch: Path) -> Any:  # noqa: ANN401 - likewise
    """As Unsloth's guides have it. It loads from files alone, so here the weights are on the disk for a while."""
    from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # noqa: PLC0415 - only where it is installed

    resolved, lora = subject.resolved, subject.resolved.lora
    if lora is None:
        msg = "Unsloth is asked for adapters only"
        raise ValueError(msg)
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        subject.load(subject.folder, torch.bfloat16, {"": device}).save_pretrained(folder)
        AutoTokenizer.from_pretrained(subject.tokenizer).save_pretrained(folder)
        torch.cuda.empty_cache()
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_name=folder,
            max_seq_length=resolved.max_length,
            dtype=torch.bfloat16,
            load_in_4bit=resolved.base_format == "NF4",
        )
    model = FastLanguageModel.get_peft_model(
        model,
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=0,
        bias="none",
        target_modules=sorted({name.rpartition(".")[2] for name in subject.facts.linear_layers}),
        use_gradient_checkpointing="unsloth" if resolved.gradient_checkpointing != "Off" else False,
        random_state=resolved.seed,
    )
    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments_by_hand(subject, device, scratch)),
        train_dataset=Dataset.from_list(subject.rows),
        processing_class=tokenizer,
    )


def arguments_by_hand(subject: Subject, device: torch.device, scratch: Path) -> dict[str, Any]:
    """What SFTConfig is told: a course of the learning rate like ours, rows as they are; all else by its defaults.

    Each step's loss is logged, where guides have every tenth: the first one is wanted.
    """
    resolved = subject.resolved
    return {
        "output_dir": str(scratch),
        "max_steps": resolved.total_steps,
        "per_device_train_batch_size": subject.micro_batch,
        "gradient_accumulation_steps": subject.step_rows // subject.micro_batch,
        "learning_rate": resolved.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": resolved.warmup_steps,
        "activation_checkpointing": resolved.gradient_checkpointing != "Off",
        "bf16": True,
        "use_cpu": device.type == "cpu",
        "seed": resolved.seed,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


WAYS = {OURS: build_ours, TRL: build_trl, UNSLOTH: build_unsloth}


# What a step takes


class Clock(TrainerCallback):
    """Looks at the time at the end of each step, the device waited for; profiles the step behind the last timed one."""

    def __init__(self, device: torch.device, run: Run) -> None:
        """Nothing is measured before the first step."""
        self._device, self._run = device, run
        self._ends: list[float] = []
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._profiler = profile(activities=activities) if run.profile else None

    @property
    def step_seconds(self) -> list[float]:
        """Of the timed steps."""
        ends = self._ends[self._run.warm_up - 1 : self._run.steps]
        return [end - begin for begin, end in pairwise(ends)]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401, ARG002 - TrainerCallback's signature
        """Profile from here, if it is that step."""
        if self._profiler is not None and state.global_step == self._run.steps:
            self._profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401, ARG002 - TrainerCallback's signature
        """Look at the time."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._ends.append(time.perf_counter())
        if self._profiler is not None and state.global_step == self._run.steps + 1:
            self._profiler.stop()
            Path(self._run.profile).write_text(describe_profile(self._profiler), encoding="utf-8")


def describe_profile(profiler: profile) -> str:
    """Launches and times of what was profiled, the kernels that took the most of the GPU, and operations of the CPU."""
    events: Any = profiler.key_averages()
    kernels = [each for each in events if each.device_type == DeviceType.CUDA and not each.is_user_annotation]
    kernels.sort(key=lambda each: -each.self_device_time_total)
    on_gpu = sum(each.self_device_time_total for each in kernels)
    on_cpu = sum(each.self_cpu_time_total for each in events if each.device_type == DeviceType.CPU)
    launches = sum(each.count for each in events if each.key in LAUNCHES)
    lines = [f"One step: {launches:,} launches, {on_gpu / 1e3:,.1f} ms of kernels, {on_cpu / 1e3:,.1f} ms of CPU", ""]
    if kernels:
        lines.append(f"{'ms':>10} {'%':>6} {'calls':>7}  kernel")
    for each in kernels[:PROFILE_LINES]:
        took = each.self_device_time_total
        lines.append(f"{took / 1e3:>10.3f} {100 * took / on_gpu:>6.1f} {each.count:>7,}  {each.key[:150]}")
    table: str = events.table(sort_by="self_cpu_time_total", row_limit=PROFILE_LINES, max_name_column_width=60)
    return "\n".join([*lines, "", table, ""])
