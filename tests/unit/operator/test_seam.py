"""What the operator writes on a trainer's command line, the trainer reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_operator import names
from finetune_operator.api import Overrides
from finetune_operator.manifests import build_stage_job
from finetune_operator.names import Step, line
from finetune_trainer.__main__ import build_parser
from finetune_trainer.progress import PROGRESS_PORT, Stage
from tests.unit.operator.builders import GANG, SETTINGS, WHOLE, a_job

SMALLER = Overrides(micro_batch_size=2, gradient_accumulation_steps=4)
SMALLEST = Overrides(micro_batch_size=1, gradient_accumulation_steps=8, gradient_checkpointing="Full")
JOB = a_job(WHOLE | GANG | {"output": GANG["output"] | WHOLE["output"]})
STEPS = line(JOB.valid_spec)


def test_there_is_a_step_of_every_stage() -> None:
    assert {step.stage for step in STEPS} == set(Stage)


@pytest.mark.parametrize(
    ("step", "overrides"),
    [
        pytest.param(step, overrides, id=f"{step.key} {overrides.to_json() if overrides else ''}".strip())
        for step in STEPS
        for overrides in ((None, SMALLER, SMALLEST) if step.stage is Stage.TRAIN else (None,))
    ],
)
def test_the_trainer_reads_its_command_line_as_the_operator_meant_it(step: Step, overrides: Overrides | None) -> None:
    pod = build_stage_job(JOB, step, 3, SETTINGS, overrides)["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    read = build_parser().parse_args(container["args"])
    mounts = {Path(mount["mountPath"]) for mount in container["volumeMounts"]}
    assert (read.command, read.attempt, read.progress_port) == (step.stage, 3, PROGRESS_PORT)
    assert getattr(read, "name", None) == step.entry
    assert (read.config.parent in mounts, read.work.parent in mounts) == (True, True)
    assert read.work.name == names.folder(JOB)
    told = (getattr(read, "micro_batch", None), getattr(read, "gradient_checkpointing", None))
    assert told == ((overrides.micro_batch_size, overrides.gradient_checkpointing) if overrides else (None, None))
