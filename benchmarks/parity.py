"""python -m benchmarks.parity [--device cuda] [--model DIR] [--gptq DIR]: our losses beside those of TRL and PEFT.

Each method is trained twice on the same rows with the same seed: by a job's settings through our trainer, and by
somebody who calls TRL and PEFT as their tutorials do. Printed is the largest difference of a step's loss. The second
way shares no code with ours; where ours differs on purpose, it says so by name (`ByHand`).
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch
from datasets import Dataset
from peft import LoraConfig, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPTQConfig, PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune_trainer.data.pack import pack_rows
from finetune_trainer.data.tokenized import INPUT_IDS, LENGTHS, LOSS_MASK, REJECTED_IDS, REJECTED_MASK
from finetune_trainer.evaluate import IGNORED
from finetune_trainer.models.folder import describe, load_tokenizer
from finetune_trainer.models.loading import compute_dtype, load_base, set_up_torch, training_device
from finetune_trainer.progress import DataFacts, Resolved
from finetune_trainer.runtime.parsing import parse_config
from finetune_trainer.settings.resolve import SourceFacts, resolve
from finetune_trainer.training.collate import build_order
from finetune_trainer.training.trainers import build_trainer
from tests.tiny import make_tiny_gptq, make_tiny_model

if TYPE_CHECKING:
    from collections.abc import Sequence

Row = dict[str, Any]

STEPS = 10
STEP_ROWS, MICRO_BATCH = 4, 2
LEARNING_RATE, SEED = 0.01, 42
SEQUENCE_TOKENS = 48
"""Tokens of a packed sequence: two or three of the rows."""
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class ByHand:
    """What somebody tells TRL and PEFT who follows their tutorials."""

    dtype: str | None = None
    """Of the base, by torch's name; unset: bfloat16 on a GPU, float32 on CPU."""
    quantization: dict[str, Any] | None = None
    lora: dict[str, Any] | None = field(default_factory=dict)
    """LoraConfig besides rank, scale and layers; None: the model itself is trained."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """SFTConfig or DPOConfig besides what all methods share."""
    kbit: bool = False
    """Calls prepare_model_for_kbit_training, as PEFT's guide to 8 bits has it."""
    adapters_in_fp32: bool = False
    """Does as ours does on purpose: TRL rounds adapters on 4 and 8 bits to bf16."""


@dataclass(frozen=True)
class Method:
    """A method by both ways."""

    name: str
    job: dict[str, Any]
    """Blocks of a job's spec."""
    by_hand: ByHand
    packed: bool = False
    noise: float = 1e-5
    """How far apart the losses of a step may be on CPU, in nats, where sums are added up in another order."""

    @property
    def dpo(self) -> bool:
        """Whether pairs are trained on."""
        return "objective" in self.job

    @property
    def gptq(self) -> bool:
        """Whether the base comes quantized."""
        return self.name.endswith("GPTQ")


def _adapters(kind: str, held: str, **settings: bool) -> dict[str, Any]:
    return {"method": {"type": kind, "lora": {"r": 8, "alpha": 16, **settings}, "baseWeights": {"format": held}}}


DPO = {"objective": {"type": "DPO"}}
FULL = {"method": {"type": "Full"}}
FULL_BY_HAND = ByHand("float32", lora=None, arguments={"weight_decay": 0.01})
GALORE = {"method": {"type": "GaLore", "galore": {"rank": 8, "updateInterval": 4, "scale": 0.25}}}
GALORE_BY_HAND = {
    "optim": "galore_adamw",
    "optim_target_modules": LAYERS,
    "optim_args": "rank=8,update_proj_gap=4,scale=0.25",
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FP4 = {**NF4, "bnb_4bit_quant_type": "fp4"}
GPTQ: dict[str, Any] = {"bits": 4, "backend": "torch"}
INT8 = {"load_in_8bit": True}
METHODS = (
    Method("QLoRA NF4", _adapters("QLoRA", "NF4"), ByHand(quantization=NF4, adapters_in_fp32=True)),
    Method("QLoRA FP4", _adapters("QLoRA", "FP4"), ByHand(quantization=FP4, adapters_in_fp32=True)),
    Method("QLoRA GPTQ", _adapters("QLoRA", "GPTQ"), ByHand(quantization=GPTQ)),
    Method("LoRA Int8", _adapters("LoRA", "Int8"), ByHand(quantization=INT8, kbit=True, adapters_in_fp32=True)),
    Method("LoRA BF16", _adapters("LoRA", "BF16"), ByHand("bfloat16"), noise=1e-3),
    Method("LoRA FP32", _adapters("LoRA", "FP32"), ByHand("float32")),
    Method("DoRA", _adapters("LoRA", "FP32", useDora=True), ByHand("float32", lora={"use_dora": True})),
    Method("rsLoRA", _adapters("LoRA", "FP32", useRslora=True), ByHand("float32", lora={"use_rslora": True})),
    Method("Full", FULL, FULL_BY_HAND),
    Method("GaLore", GALORE, ByHand(lora=None, arguments=GALORE_BY_HAND), noise=2e-3),
    Method(
        "LoRA FP32, packed",
        _adapters("LoRA", "FP32"),
        ByHand("float32", arguments={"padding_free": True}),
        packed=True,
    ),
    Method("DPO, LoRA FP32", _adapters("LoRA", "FP32") | DPO, ByHand("float32")),
    Method("DPO, QLoRA NF4", _adapters("QLoRA", "NF4") | DPO, ByHand(quantization=NF4, adapters_in_fp32=True)),
    Method("DPO, Full", FULL | DPO, FULL_BY_HAND),
)
NOTES = """\
Both ways take the same rows in the same order: ours, which sorts the rows of a step by length. Packed: TRL is given
our sequences and keeps their rows apart in its own way (padding_free).
Asked of TRL by name: adapters on 4 and 8 bits in fp32, which TRL would round to bf16 (adapters_in_fp32).
GaLore: without weight decay, which transformers' own way leaves out. Its directions are those of a matrix's singular
values: the last digit of a gradient decides between two that are alike."""


@dataclass(frozen=True)
class Parity:
    """The losses of a method's steps, both ways."""

    method: str
    ours: list[float]
    by_hand: list[float]

    @property
    def difference(self) -> float:
        """The largest of a step, in nats."""
        return max(abs(one - other) for one, other in zip(self.ours, self.by_hand, strict=True))


def compare(method: Method, folder: Path, device: torch.device, steps: int = STEPS) -> Parity:
    """Train both ways."""
    tokenizer = load_tokenizer(folder)
    rows = make_pairs(tokenizer, 3 * STEP_ROWS) if method.dpo else make_rows(3 * STEP_ROWS)
    table = as_table(rows, packed=method.packed)
    resolved = settle(method, folder, table, device, steps)
    with tempfile.TemporaryDirectory() as scratch:
        ours = train_ours(resolved, folder, table, device, Path(scratch))
        forget()
        by_hand = train_by_hand(method, folder, in_our_order(rows, table, resolved), device, Path(scratch))
        forget()
    return Parity(method.name, ours, by_hand)


# Rows


def make_rows(count: int) -> list[Row]:
    """Rows of random tokens, 8 to 24 of them; the first three are the prompt."""
    generator = torch.Generator().manual_seed(SEED)
    rows = []
    for index in range(count):
        ids = torch.randint(3, 300, (8 + 5 * index % 17,), generator=generator).tolist()
        rows.append({INPUT_IDS: ids, LOSS_MASK: [False] * 3 + [True] * (len(ids) - 3)})
    return rows


def make_pairs(tokenizer: Any, count: int) -> list[Row]:  # noqa: ANN401 - a transformers tokenizer
    """Pairs of answers, as text and as prepare tokenizes them: DPOTrainer takes nothing but text."""
    return [_pair(tokenizer, f"What is {n} plus {n}?\n", f"It is {2 * n}.", f"Who knows, {n}?") for n in range(count)]


def _pair(tokenizer: Any, prompt: str, chosen: str, rejected: str) -> Row:  # noqa: ANN401 - likewise
    row: Row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    asked = len(tokenizer(prompt)["input_ids"])
    for answer, (ids, mask) in ((chosen, (INPUT_IDS, LOSS_MASK)), (rejected, (REJECTED_IDS, REJECTED_MASK))):
        row[ids] = tokenizer(prompt + answer + tokenizer.eos_token)["input_ids"]
        row[mask] = [place >= asked for place in range(len(row[ids]))]
    return row


def as_table(rows: Sequence[Row], *, packed: bool) -> pa.Table:
    """The rows as prepare leaves them for training."""
    if packed:
        sequences = pack_rows([len(row[INPUT_IDS]) for row in rows], SEQUENCE_TOKENS)
        whole = len(sequences) // STEP_ROWS * STEP_ROWS
        rows = [_sequence([rows[index] for index in indexes]) for indexes in sequences[:whole]]
    kinds = {INPUT_IDS: pa.int32(), LOSS_MASK: pa.bool_(), LENGTHS: pa.int32()}
    kinds |= {REJECTED_IDS: pa.int32(), REJECTED_MASK: pa.bool_()}
    there = {name: pa.list_(kind) for name, kind in kinds.items() if name in rows[0]}
    return pa.table({name: [row[name] for row in rows] for name in there}, schema=pa.schema(list(there.items())))


def _sequence(rows: Sequence[Row]) -> Row:
    joined = {name: [value for row in rows for value in row[name]] for name in (INPUT_IDS, LOSS_MASK)}
    return {**joined, LENGTHS: [len(row[INPUT_IDS]) for row in rows]}


def in_our_order(rows: Sequence[Row], table: pa.Table, resolved: Resolved) -> list[Row]:
    """What our trainer takes, one epoch behind the other: plain TRL is to take the same."""
    order = build_order(table, resolved)
    found: list[Row] = []
    taken = table.to_pylist() if resolved.packing else rows
    while len(found) < resolved.total_steps * resolved.global_batch_size:
        found += [taken[index] for index in order]
        order.epoch += 1
    return found[: resolved.total_steps * resolved.global_batch_size]


# Our way


def settle(method: Method, folder: Path, table: pa.Table, device: torch.device, steps: int) -> Resolved:
    """The settings of the job, as prepare fixes them."""
    tokens = sum(map(len, table.column(INPUT_IDS).to_pylist()))
    data = DataFacts(
        train_rows=len(table),
        eval_rows=0,
        dropped_rows=0,
        train_tokens=tokens,
        loss_tokens=tokens,
        length_p50=1,
        length_p95=1,
        length_p99=1,
        length_max=1,
        packed_rows=len(table) if method.packed else None,
    )
    job = {
        "model": {"volume": {"claimName": "models", "path": "base"}},
        "datasets": [{"volume": {"claimName": "rows", "path": "rows.jsonl"}}],
        "parallelism": {"gpusPerNode": int(device.type == "cuda")},
        "training": {
            "globalBatchSize": STEP_ROWS,
            "perDeviceTrainBatchSize": MICRO_BATCH,
            "learningRate": LEARNING_RATE,
            "maxSteps": steps,
            "seed": SEED,
        },
        **method.job,
    }
    return resolve(parse_config(job), SourceFacts("sha256:0", None, "sha256:0"), describe(folder), data)


def train_ours(resolved: Resolved, folder: Path, table: pa.Table, device: torch.device, scratch: Path) -> list[float]:
    """Losses of the steps of our trainer."""
    dtype = compute_dtype(resolved, device)
    bases = [load_base(folder, resolved, device, dtype) for _ in range(2 if resolved.dpo and not resolved.lora else 1)]
    trainer = build_trainer(bases[0], load_tokenizer(folder), table, resolved, dtype, scratch, *bases[1:])
    trainer.train()
    return losses(trainer)


# By hand


def train_by_hand(
    method: Method, folder: Path, rows: Sequence[Row], device: torch.device, scratch: Path
) -> list[float]:
    """Losses of the steps of TRL's trainer, called as in its tutorials."""
    by_hand, tokenizer = method.by_hand, AutoTokenizer.from_pretrained(folder)
    lora = None
    if by_hand.lora is not None:
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS, task_type="CAUSAL_LM", **by_hand.lora)
    pieces = {"model": load_by_hand(by_hand, folder, device), "processing_class": tokenizer, "peft_config": lora}
    settings = arguments_by_hand(by_hand, len(rows) // STEP_ROWS, device, scratch)
    if method.dpo:
        texts = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows])
        trainer: Any = DPOTrainer(args=DPOConfig(**settings), train_dataset=texts, **pieces)
    else:
        config = SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True})
        trainer = SFTTrainer(args=config, train_dataset=tokens_by_hand(rows), **pieces)
    if by_hand.adapters_in_fp32:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return losses(trainer)


def load_by_hand(by_hand: ByHand, folder: Path, device: torch.device) -> Any:  # noqa: ANN401 - a transformers model
    """The base."""
    dtype = by_hand.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    quantization: Any = None
    if by_hand.quantization == GPTQ:
        quantization = GPTQConfig(**GPTQ)
    elif by_hand.quantization is not None:
        quantization = BitsAndBytesConfig(**by_hand.quantization, bnb_4bit_compute_dtype=dtype)  # type: ignore[no-untyped-call]
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, device_map={"": device}, quantization_config=quantization
    )
    if by_hand.kbit:
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # type: ignore[no-untyped-call]
    return model


def arguments_by_hand(by_hand: ByHand, steps: int, device: torch.device, scratch: Path) -> dict[str, Any]:
    """What SFTConfig and DPOConfig are told alike."""
    on_gpu = device.type == "cuda"
    return {
        "output_dir": str(scratch),
        "max_steps": steps,
        "per_device_train_batch_size": MICRO_BATCH,
        "gradient_accumulation_steps": STEP_ROWS // MICRO_BATCH,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
        "optim": "adamw_torch",
        "seed": SEED,
        "bf16": on_gpu or by_hand.dtype == "bfloat16",
        "use_cpu": not on_gpu,
        "activation_checkpointing": on_gpu,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **by_hand.arguments,
    }


def tokens_by_hand(rows: Sequence[Row]) -> Any:  # noqa: ANN401 - datasets.Dataset
    """The rows under TRL's names."""
    names = {INPUT_IDS: "input_ids", LENGTHS: "seq_lengths"}
    taken = [{name: row[ours] for ours, name in names.items() if ours in row} for row in rows]
    for row, ours in zip(taken, rows, strict=True):
        pairs = zip(ours[INPUT_IDS], ours[LOSS_MASK], strict=True)
        row["labels"] = [token if counts else IGNORED for token, counts in pairs]
    return Dataset.from_list(taken)


# Both


def losses(trainer: Any) -> list[float]:  # noqa: ANN401 - a transformers Trainer
    """Of each step."""
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def forget() -> None:
    """Give the GPU's memory back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def table_line(parity: Parity) -> str:
    """A line for people."""
    return (
        f"{parity.method:<20} {len(parity.ours):>5} {parity.ours[0]:>10.4f} {parity.ours[-1]:>10.4f} "
        f"{parity.by_hand[-1]:>10.4f} {parity.difference:>12.2e}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", type=Path, help="folder of a Llama; unset: a random one of a few KB")
    parser.add_argument("--gptq", type=Path, help="folder of a Llama of GPTQ; unset: a random one of a few KB")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="*", help="names of methods")
    chosen = parser.parse_args()
    set_up_torch()
    device = training_device(int(chosen.device == "cuda"))
    print(f"{'method':<20} {'steps':>5} {'first':>10} {'last':>10} {'by hand':>10} {'difference':>12}")
    with tempfile.TemporaryDirectory() as scratch:
        model = chosen.model or make_tiny_model(Path(scratch) / "model")
        gptq = chosen.gptq or make_tiny_gptq(Path(scratch) / "gptq")
        for method in METHODS:
            if not chosen.only or method.name in chosen.only:
                folder = gptq if method.gptq else model
                print(table_line(compare(method, folder, device, chosen.steps)), flush=True)
    print(NOTES)


if __name__ == "__main__":
    main()
