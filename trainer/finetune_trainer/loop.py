"""The steps of a training: TRL's SFTTrainer, with what a job needs around each step.

Trainer's own saving, evaluating and loading are not used: saves are not atomic, a resume is not exact, and a
not-a-number loss is hidden (transformers 5.23). The loop itself, its optimizer, schedule and accumulation, is theirs.
"""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback, TrainerState
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from finetune_trainer import checkpoint
from finetune_trainer.errors import Interrupted, NonFiniteLoss
from finetune_trainer.evaluate import TokenRow, logits_that_count, measure_loss
from finetune_trainer.loading import import_peft, peak_memory_bytes
from finetune_trainer.progress import Resolved, TrainFacts

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from finetune_trainer.checkpoint import Checkpoints
    from finetune_trainer.context import Context

log = logging.getLogger(__name__)

SCHEDULERS = {"Cosine": "cosine", "Linear": "linear", "Constant": "constant_with_warmup"}
RATE_STEPS = 20
"""Steps over which tokens a second are averaged: of late, but not of one odd row."""


class RowOrder(Sampler[int]):
    """The order of rows: a function of seed and epoch alone, so that a resume needs no history.

    Rows of one optimizer step are sorted by length: the sum of their gradients is the same, with less padding.
    """

    def __init__(self, lengths: Sequence[int], seed: int, global_batch: int) -> None:
        """`lengths` in tokens."""
        self._lengths, self._seed, self._global_batch = lengths, seed, global_batch
        self.epoch = 0

    def __len__(self) -> int:
        """Rows."""
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        """Indices of rows."""
        generator = torch.Generator().manual_seed((self._seed << 20) + self.epoch)
        shuffled = torch.randperm(len(self), generator=generator).tolist()
        for start in range(0, len(self), self._global_batch):
            yield from sorted(shuffled[start : start + self._global_batch], key=self._lengths.__getitem__)


class ExactTrainer(SFTTrainer):
    """SFTTrainer with our order of rows, our checkpoints, and an eye on every loss."""

    row_order: RowOrder
    step_loss: torch.Tensor | None = None
    """Sum of the losses of the micro-batches since the last optimizer step."""
    step_tokens: int = 0

    def _get_train_sampler(self, train_dataset: Any = None) -> RowOrder:  # noqa: ANN401, ARG002 - Trainer's signature
        return self.row_order

    def _run_epoch(self, *rest: Any, **named: Any) -> None:  # noqa: ANN401 - Trainer's signature
        self.row_order.epoch = named["epoch"]
        super()._run_epoch(*rest, **named)  # type: ignore[no-untyped-call]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ANN401 - Trainer's signature
        checkpoint.read_weights(model or self.model, Path(resume_from_checkpoint))

    def compute_loss(
        self,
        model: Any,  # noqa: ANN401 - Trainer's signature
        inputs: Any,  # noqa: ANN401 - Trainer's signature
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ANN401 - Trainer's signature
    ) -> Any:  # noqa: ANN401 - Trainer's signature
        """Mean loss of the tokens that count in a whole step.

        On CPU TRL's head scores prompts too, and entropies besides (1.16): 30% of a step. The loss is the same.
        """
        if self.args.device.type != "cpu" or return_outputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[no-untyped-call]
        logits, targets = logits_that_count(model, inputs["input_ids"], inputs["attention_mask"], inputs["labels"])
        total = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        return total / (len(targets) if num_items_in_batch is None else num_items_in_batch)

    def training_step(self, model: Any, inputs: Any, *rest: Any) -> torch.Tensor:  # noqa: ANN401 - Trainer's signature
        """Take a micro-batch; remember its loss and its tokens."""
        self.step_tokens += int(inputs["attention_mask"].sum())
        loss: torch.Tensor = super().training_step(model, inputs, *rest)  # type: ignore[no-untyped-call]
        self.step_loss = loss.detach() if self.step_loss is None else self.step_loss + loss.detach()
        return loss


def build_trainer(  # noqa: PLR0913 - the pieces of a training
    base: Any,  # noqa: ANN401 - a transformers model
    tokenizer: Any,  # noqa: ANN401 - a transformers tokenizer
    rows: Sequence[TokenRow],
    resolved: Resolved,
    dtype: torch.dtype,
    scratch: Path,
) -> ExactTrainer:
    """The trainer of a fresh adapter on the base. `scratch`: Trainer wants a folder's name; nothing is written."""
    from datasets import Dataset  # noqa: PLC0415 - slow

    import_peft()
    dataset = Dataset.from_dict(
        {"input_ids": [list(row.input_ids) for row in rows], "labels": [list(row.labels) for row in rows]}
    )
    trainer = ExactTrainer(
        model=base,
        args=build_arguments(resolved, dtype, base.device, scratch),
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=build_lora(resolved),
    )
    trainer.remove_callback(PrinterCallback)
    train_in_fp32(trainer.model)
    trainer.row_order = RowOrder([len(row.input_ids) for row in rows], resolved.seed, resolved.global_batch_size)
    return trainer


def build_lora(resolved: Resolved) -> LoraConfig:
    """The adapter in PEFT's terms."""
    return LoraConfig(
        r=resolved.lora_r,
        lora_alpha=resolved.lora_alpha,
        lora_dropout=resolved.lora_dropout,
        target_modules=list(resolved.target_modules),
        task_type="CAUSAL_LM",
    )


def build_arguments(resolved: Resolved, dtype: torch.dtype, device: torch.device, scratch: Path) -> SFTConfig:
    """The settings in TRL's terms. Rows are tokenized and masked already, and never packed or cut."""
    return SFTConfig(
        output_dir=str(scratch),
        max_steps=resolved.total_steps,
        num_train_epochs=math.ceil(resolved.num_train_epochs),
        per_device_train_batch_size=resolved.micro_batch_size,
        gradient_accumulation_steps=resolved.gradient_accumulation_steps,
        learning_rate=resolved.learning_rate,
        lr_scheduler_type=SCHEDULERS[resolved.lr_scheduler],
        warmup_steps=resolved.warmup_steps,
        weight_decay=resolved.weight_decay,
        max_grad_norm=resolved.max_grad_norm,
        optim=resolved.optimizer,
        activation_checkpointing=resolved.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False},
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        use_cpu=device.type == "cpu",
        seed=resolved.seed,
        logging_steps=resolved.logging_steps,
        logging_nan_inf_filter=False,  # it hides what `Loop` watches for
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type != "cpu",
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        packing=False,
        restore_callback_states_from_checkpoint=False,
    )


def train_in_fp32(model: Any) -> None:  # noqa: ANN401 - a torch module
    """Hold the adapter in fp32, as QLoRA's authors do in effect (autocast to the compute dtype in products).

    TRL casts adapters on a 4-bit base to bf16 (1.16): AdamW's steps below 0.4% of a weight are then rounded away.
    """
    for _, parameter in checkpoint.trained(model):
        parameter.data = parameter.data.float()


class Loop(TrainerCallback):
    """What happens around each optimizer step: watch the loss, report, measure, save, leave when asked."""

    def __init__(
        self,
        trainer: ExactTrainer,
        resolved: Resolved,
        held_out: Sequence[TokenRow],
        checkpoints: Checkpoints,
        context: Context,
    ) -> None:
        """`held_out` may be empty: nothing is measured then."""
        self._trainer, self._resolved, self._held_out = trainer, resolved, held_out
        self._checkpoints, self._context = checkpoints, context
        self._steps: list[tuple[int, float]] = []
        self._step_began = 0.0
        self._saved: int | None = None
        self.resumed_from: int | None = None
        self.loss: float | None = None
        self.eval_loss: float | None = None

    # What Trainer calls

    def on_step_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - Trainer's signature
        """Start the clock of a step: measuring and saving are not training."""
        self._step_began = time.monotonic()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401, ARG002 - Trainer's signature
        """Look at the loss before it moves a weight."""
        self._watch(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401, ARG002 - Trainer's signature
        """Report; leave if asked; measure and save when it is time."""
        step, last = state.global_step, state.global_step >= self._resolved.total_steps
        self._count()
        self._report(step, state.epoch)
        self._leave_if_asked(step)
        if last or step % self._resolved.eval_steps == 0:
            self._measure(step)
        if last or step % self._resolved.checkpoint_steps == 0:
            self._save(step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ANN401, ARG002 - Trainer's signature
        """Keep the loss of the log line, and the curve for people."""
        if not logs or "loss" not in logs:
            return
        self.loss = float(logs["loss"])
        self._context.report.update(loss=self.loss)
        log.info("step %d/%d loss %.4f", state.global_step, self._resolved.total_steps, self.loss)

    def take_over(self, folder: Path) -> None:
        """Take the finished run's weights and account; Trainer would take one step more (transformers 5.23)."""
        checkpoint.read_weights(self._trainer.model, folder)
        self._saved = checkpoint.step_of(folder)
        self._trainer.state = state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.loss = next((float(line["loss"]) for line in reversed(state.log_history) if "loss" in line), None)
        self._measure(state.global_step)

    # What is told at the end

    def facts(self) -> TrainFacts:
        """What training did. Speed and memory are told live: in a manifest they would change its digest."""
        trained = [tensor.numel() for _, tensor in checkpoint.trained(self._trainer.model)]
        state = self._trainer.state
        return TrainFacts(
            steps=state.global_step,
            epochs=round(state.epoch or 0.0, 4),
            loss=None if self.loss is None else float(f"{self.loss:.6g}"),
            trainable_parameters=sum(trained),
            total_parameters=self._resolved.parameters + sum(trained),
        )

    # Pieces

    def _watch(self, step: int) -> None:
        loss, self._trainer.step_loss = self._trainer.step_loss, None
        value = math.nan if loss is None else float(loss)
        if math.isfinite(value) and value != 0.0 and self._gradients_are_finite():
            return
        what = f"The loss is {value}" if not (math.isfinite(value) and value) else "The gradients are not finite"
        remedy = "Lower training.learningRate"
        if self._resolved.compute_dtype != "FP32":
            remedy += ", or set method.computeDtype to " + ("BF16" if self._trainer.args.fp16 else "FP32")
        msg = f"{what} at step {step}. {remedy}; the checkpoint before it is kept."
        raise NonFiniteLoss(msg)

    def _gradients_are_finite(self) -> bool:
        """With fp16 the scaler skips steps that overflow and goes on smaller: that is no failure."""
        if self._trainer.args.fp16:
            return True
        gradients = [tensor.grad for _, tensor in checkpoint.trained(self._trainer.model) if tensor.grad is not None]
        return not gradients or bool(torch.isfinite(torch.stack(torch._foreach_norm(gradients))).all())  # noqa: SLF001 - torch's own optimizers use it

    def _count(self) -> None:
        self._steps.append((self._trainer.step_tokens, time.monotonic() - self._step_began))
        self._trainer.step_tokens = 0
        del self._steps[:-RATE_STEPS]

    def _report(self, step: int, epoch: float | None) -> None:
        tokens, seconds = (sum(column) for column in zip(*self._steps, strict=True))
        left = self._resolved.total_steps - step
        self._context.report.update(
            done=step,
            total=self._resolved.total_steps,
            unit="steps",
            epoch=None if epoch is None else round(epoch, 4),
            tokens_per_second=round(tokens / max(seconds, 1e-9), 1),
            eta_seconds=round(left * seconds / len(self._steps), 1),
            peak_memory_bytes=peak_memory_bytes(self._trainer.args.device),
        )

    def _measure(self, step: int) -> None:
        if not self._held_out:
            return
        self._context.report.update(activity="measuring the held-out loss")
        self.eval_loss = measure_loss(self._trainer.model, self._held_out, lambda *_: self._leave_if_asked(step))
        self._context.report.update(activity="training", eval_loss=self.eval_loss)
        log.info("step %d held-out loss %.4f", step, self.eval_loss)

    def _save(self, step: int) -> None:
        self._checkpoints.save(step, lambda folder: checkpoint.write_state(self._trainer, folder))
        self._saved = step
        self._context.report.update(checkpoint_step=step)

    def _leave_if_asked(self, step: int) -> None:
        if not self._context.stopping.is_set():
            return
        if step != self._saved:  # a run that was taken over has no optimizer to save
            self._save(step)
        total = self._resolved.total_steps
        msg = f"Asked to leave at step {step} of {total}: saved; the next attempt goes on from there."
        raise Interrupted(msg)
