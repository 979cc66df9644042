"""What happens around each optimizer step: watch the loss, report, measure, save, leave when asked."""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerState

from finetune_trainer import checkpoint
from finetune_trainer import state as states
from finetune_trainer.errors import Interrupted, NonFiniteLoss
from finetune_trainer.evaluate import TokenRow, measure_loss
from finetune_trainer.loading import peak_memory_bytes
from finetune_trainer.progress import Resolved, TrainFacts

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from finetune_trainer.checkpoint import Checkpoints
    from finetune_trainer.context import Context
    from finetune_trainer.trainers import ExactTrainer

log = logging.getLogger(__name__)

RATE_STEPS = 20
"""Steps over which tokens a second are averaged: of late, but not of one odd row."""


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
        states.read_weights(self._trainer.model, folder)
        self._saved = checkpoint.step_of(folder)
        self._trainer.state = state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.loss = next((float(line["loss"]) for line in reversed(state.log_history) if "loss" in line), None)
        self._measure(state.global_step)

    # What is told at the end

    def facts(self) -> TrainFacts:
        """What training did. Speed and memory are told live: in a manifest they would change its digest."""
        trained = [tensor.numel() for _, tensor in states.trained(self._trainer.model)]
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
        gradients = [tensor.grad for _, tensor in states.trained(self._trainer.model) if tensor.grad is not None]
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
        self._checkpoints.save(step, lambda folder: states.write_state(self._trainer, folder))
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
