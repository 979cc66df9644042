"""What happens around each optimizer step: watch the loss, tell it, measure, save, end early, leave when asked.

After a step, in this order: the log line, the measurement, the checkpoint. A checkpoint so holds all that was told up
to its step, and a run that goes on from it tells nothing twice.
"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState, set_seed

from finetune_trainer.models.census import count_layers, totals
from finetune_trainer.models.loading import peak_memory_bytes, refuse_broken_model
from finetune_trainer.progress import Resolved, TrainFacts
from finetune_trainer.runtime.context import TRAINING
from finetune_trainer.runtime.distributed import leads, rank, total, world_size
from finetune_trainer.runtime.errors import Interrupted, NonFiniteLoss
from finetune_trainer.settings.methods import remedy_for_lost_numbers
from finetune_trainer.training import checkpoint
from finetune_trainer.training import state as states
from finetune_trainer.training.course import EVAL_LOSS, Course, Line, best_first, epochs_done, is_due, stops_early
from finetune_trainer.training.memory import MemoryWatch
from finetune_trainer.training.start import tell_start

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from finetune_trainer.runtime.context import Context
    from finetune_trainer.training.checkpoint import Checkpoints
    from finetune_trainer.training.exact import Exact
    from finetune_trainer.training.tracking import Followers

log = logging.getLogger(__name__)

RATE_STEPS = 20
"""Steps over which tokens a second are averaged: of late, but not of one odd row."""


class Loop(TrainerCallback):
    """What happens around each optimizer step: watch the loss, tell it, measure, save, end early, leave when asked."""

    def __init__(  # noqa: PLR0913 - what a loop works with
        self,
        trainer: Exact,
        resolved: Resolved,
        held_out: Sequence[Any],
        checkpoints: Checkpoints,
        context: Context,
        followers: Followers,
    ) -> None:
        """`held_out` may be empty: nothing is measured then."""
        self._trainer, self._resolved, self._held_out = trainer, resolved, held_out
        self._checkpoints, self._context, self._followers = checkpoints, context, followers
        self._course = Course()
        self._steps: list[tuple[int, float]] = []
        self._step_began = 0.0
        self._tokens = 0
        self._learning_rate = 0.0
        self._random: dict[str, Any] = {}
        self._saved = 0
        self._memory = MemoryWatch(context, trainer.args.device, fast=trainer.fast is not None)
        self.published: Line | None = None
        """The measurement of the weights that the model has at the end; None if nothing is held out."""

    # Before the first step and after the last

    def begin(self, start: Path | None) -> None:
        """Take up the weights and the account of a checkpoint, or begin with none.

        A measurement that was broken off there is made now: whether to go on may depend on it.
        """
        if start is not None:
            self._course = Course.read(start)
            self._saved = checkpoint.step_of(start)
            self._trainer.state = TrainerState.load_from_json(str(start / "trainer_state.json"))
            log.info("going on from step %d", self._saved)
        self._context.report.begin(TRAINING, self._resolved.total_steps, "steps")
        self._context.report.update(
            done=self._saved,
            loss=self._course.loss,
            checkpoint_step=self._saved or None,
            checkpoint_time=None if start is None else checkpoint.saved_at(start),
            resumed_from_step=self._saved or None,
            eta_seconds=None,
        )
        self._followers.add(self._course.lines)
        set_seed(self._resolved.seed + rank())  # or dropout would be the same on all ranks
        if start is not None and (self.finished or self._lacks_measurement):
            states.read_weights(self._trainer.model, start)
            self._measure_if_due()

    @property
    def finished(self) -> bool:
        """Whether no step is left to take: all are taken, or the run was ended early."""
        return self._step == self._resolved.total_steps or self._stops_early

    def end(self) -> None:
        """Leave the model with the weights to be published: the last, or with restoreBest the best ones."""
        self._context.report.update(done=self._step, total=self._step, eta_seconds=None)
        measurements = self._course.measurements
        self.published = measurements[-1] if measurements else None
        if not self._resolved.restore_best:
            return
        for line in best_first(measurements):
            step = int(line["step"])
            if step == self._step:
                return
            if (folder := self._checkpoints.good(step)) is not None:
                log.info("taking the weights of step %d, whose held-out loss is the lowest", step)
                states.read_weights(self._trainer.model, folder)
                self.published = line
                return

    def facts(self) -> TrainFacts:
        """What training did. Speed and memory are told live: in a manifest they would change its digest."""
        layers = count_layers(self._trainer.model)
        trainable, everything = totals(layers)
        best = next(iter(best_first(self._course.measurements)), None)
        return TrainFacts(
            steps=self._step,
            epochs=self._epoch,
            loss=None if self._course.loss is None else float(f"{self._course.loss:.6g}"),
            trainable_parameters=trainable,
            total_parameters=everything,
            best_step=None if best is None else int(best["step"]),
            best_eval_loss=None if best is None else float(f"{best[EVAL_LOSS]:.6g}"),
            stopped_early=self._step < self._resolved.total_steps and self._stops_early,
            layers=layers,
        )

    # What Trainer calls

    def on_step_begin(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - Trainer's signature
        """Start the clock of a step: measuring and saving are not training."""
        self._memory.begin_step()
        self._step_began = time.monotonic()

    def on_substep_end(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - Trainer's signature
        """Leave within a step as well: a micro-batch is the longest that anybody waits."""
        self._context.report.beat()
        self._leave_if_asked()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - Trainer's signature
        """Look at the loss before it moves a weight. A GPU was waited for just now, by the gradients' norm."""
        self._course.losses.append(self._watch(self._step + 1))
        self._tokens, self._trainer.step_tokens = int(self._trainer.step_tokens), 0
        self._learning_rate = self._trainer._get_learning_rate()  # noqa: SLF001 - the scheduler's own may lag (fp16)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ANN401, ARG002 - Trainer's signature
        """Tell, measure, end early, save; each when it is time. Leave if asked."""
        control.should_log = False  # told here, before the checkpoint that holds the line
        self._random = states.random_state()
        self._count()
        if len(self._steps) == 1 and leads():
            tell_start(self._context)
        self._memory.end_step(self._trainer.largest_batch)
        self._report()
        if is_due(self._step, self._resolved.logging_steps, self._resolved.total_steps):
            self._tell_losses()
        self._leave_if_asked()
        self._measure_if_due()
        if self._stops_early:
            self._end_early(control)
        if self.finished or self._step % self._resolved.checkpoint_steps == 0 or self._is_to_be_restored:
            self._save()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ANN401, ARG002 - Trainer's signature
        """Take a log line, with what TRL adds to it."""
        if logs and "loss" in logs:
            self._add(logs)

    # Pieces

    @property
    def _step(self) -> int:
        return int(self._trainer.state.global_step)

    @property
    def _epoch(self) -> float:
        return epochs_done(self._step, len(self._trainer.row_order), self._resolved.global_batch_size)

    @property
    def _stops_early(self) -> bool:
        return stops_early(self._course.measurements, self._resolved.early_stopping)

    @property
    def _lacks_measurement(self) -> bool:
        measured = {line["step"] for line in self._course.measurements}
        due = is_due(self._step, self._resolved.eval_steps, self._resolved.total_steps)
        return bool(self._held_out) and due and self._step not in measured

    @property
    def _is_to_be_restored(self) -> bool:
        """Whether these are the weights that restoreBest would publish if no better ones came."""
        best = best_first(self._course.measurements)[:1]
        return self._resolved.restore_best and any(line["step"] == self._step for line in best)

    def _watch(self, step: int) -> float:
        """The loss of the step. NonFiniteLoss if numbers were lost."""
        loss, self._trainer.step_loss = self._trainer.step_loss, None
        value: float = total([math.nan if loss is None else float(loss)])[0] / world_size()
        lost = not math.isfinite(value) or (value == 0.0 and self._trainer.zero_loss_is_failure)
        if lost or not self._gradients_are_finite:
            if step == 1:
                refuse_broken_model(self._context)
            what = f"The loss is {value}" if lost else "The gradients are not finite"
            raise NonFiniteLoss(f"{what} at step {step}. {self._remedy}; the checkpoint before it is kept.")
        return value

    @property
    def _remedy(self) -> str:
        return remedy_for_lost_numbers(self._resolved, in_fp16=self._trainer.args.fp16)

    @property
    def _gradients_are_finite(self) -> bool:
        """With fp16 the scaler skips steps that overflow and goes on smaller: that is no failure."""
        return bool(self._trainer.args.fp16) or math.isfinite(self._trainer.step_gradient_norm)

    def _count(self) -> None:
        tokens = int(total([self._tokens])[0])
        self._steps.append((tokens, time.monotonic() - self._step_began))
        del self._steps[:-RATE_STEPS]

    @property
    def _tokens_per_second(self) -> float:
        tokens, seconds = sum(tokens for tokens, _ in self._steps), sum(seconds for _, seconds in self._steps)
        return round(tokens / max(seconds, 1e-9), 1)

    def _report(self) -> None:
        left = self._resolved.total_steps - self._step
        self._context.report.update(
            done=self._step,
            epoch=self._epoch,
            tokens_per_second=self._tokens_per_second,
            eta_seconds=round(left * sum(seconds for _, seconds in self._steps) / len(self._steps), 1),
            peak_memory_bytes=peak_memory_bytes(self._trainer.args.device),
        )

    def _tell_losses(self) -> None:
        """A log line, by way of Trainer, which adds what TRL measured on the way."""
        self._trainer.log(
            {
                "loss": self._course.take_losses(),
                "learning_rate": self._learning_rate,
                "grad_norm": self._trainer.step_gradient_norm,
                "tokens_per_second": self._tokens_per_second,
                "peak_memory_bytes": peak_memory_bytes(self._trainer.args.device),
            }
        )
        self._context.report.update(loss=self._course.loss)
        log.info("step %d/%d loss %.4f", self._step, self._resolved.total_steps, self._course.loss)

    def _add(self, figures: Line) -> None:
        self._followers.add([self._course.add({"step": self._step, **figures, "epoch": self._epoch})])

    def _measure_if_due(self) -> None:
        if not self._lacks_measurement:
            return
        self._context.report.update(activity="measuring the held-out loss")
        found = self._trainer.measure(self._held_out, self._poll)
        if not math.isfinite(found.loss):
            raise NonFiniteLoss(f"The held-out loss is {found.loss} at step {self._step}. {self._remedy}.")
        figures = {f"eval_{name}": value for name, value in asdict(found).items() if value is not None}
        self._add(figures)
        best = best_first(self._course.measurements)[0]
        self._context.report.update(activity=TRAINING, eval_loss=found.loss, best_eval_loss=best[EVAL_LOSS])
        told = "step %d held-out loss %.4f (lowest %.4f at step %d)"
        log.info(told, self._step, found.loss, best[EVAL_LOSS], best["step"])

    def _end_early(self, control: Any) -> None:  # noqa: ANN401 - Trainer's control
        control.should_training_stop = True
        if self._course.losses:
            self._tell_losses()
        log.info("ending early at step %d: the held-out loss no longer falls", self._step)

    def _save(self) -> None:
        """A checkpoint as of the end of the last step, also in the middle of the next one."""

        def write(folder: Path) -> None:
            with self._context.report.growing(folder):
                states.write_state(self._trainer, folder, self._random)
            if leads():
                self._course.write(folder)

        ranking = [int(line["step"]) for line in best_first(self._course.measurements)]
        self._checkpoints.save(self._step, write, self.facts(), ranking)
        self._saved = self._step
        self._context.report.update(checkpoint_step=self._step, checkpoint_time=datetime.now(UTC))

    def _poll(self, *_: int) -> None:
        """Between two batches of a measurement: its rows are not counted, `done` are steps."""
        self._context.report.beat()
        self._leave_if_asked()

    def _leave_if_asked(self) -> None:
        if not self._context.asked_to_leave:
            return
        if self._step == 0:
            msg = "Asked to leave before the first step was taken: the next attempt begins the training."
            raise Interrupted(msg)
        if self._step != self._saved:
            self._save()
        total = self._resolved.total_steps
        msg = f"Asked to leave at step {self._step} of {total}: saved; the next attempt goes on from there."
        raise Interrupted(msg)
