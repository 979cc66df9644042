"""Every name of a child and every path in a pod, computed in one place. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from finetune_operator.api import FineTuneJob, Phase, Spec
from finetune_trainer.config import RENDEZVOUS_PORT
from finetune_trainer.progress import Stage

UID_CHARACTERS = 8

WORK = "/work"
SOURCES = "/sources"
SECRETS = "/secrets"
CONFIG = "/etc/finetune"
CONFIG_FILE = "job.json"
REPORT = "report/index.html"
"""In a job's folder: written anew by each stage."""

PHASES = {
    Stage.PREPARE: Phase.PREPARING,
    Stage.TRAIN: Phase.TRAINING,
    Stage.MERGE: Phase.MERGING,
    Stage.QUANTIZE: Phase.QUANTIZING,
    Stage.PUBLISH: Phase.PUBLISHING,
}


STAGES = tuple(Stage)

Position = tuple[int, int]
"""An attempt's number and its step's place: it grows strictly over the life of a job, the number alone never falls."""


ENTRIES = 10_000
"""More than one stage can have: an index has at most 4 digits."""


def place(key: str) -> int:
    """Where a step stands in the longest line: by its stage, and among the entries of one stage by its index."""
    stage, _, index = key.partition("-")
    return STAGES.index(Stage(stage)) * ENTRIES + int(index or 0)


@dataclass(frozen=True)
class Step:
    """One stage of one job's line. `key` goes into names and labels, `title` into the status."""

    stage: Stage
    key: str
    title: str
    entry: str | None = None
    pods: int = 1
    """How many work on it at once."""

    @property
    def place(self) -> int:
        """Where it stands among the steps."""
        return place(self.key)

    @property
    def phase(self) -> Phase:
        """The job's phase while this step is due."""
        return PHASES[self.stage]


def line(spec: Spec) -> tuple[Step, ...]:
    """The steps of a job, in their order. A method that trains the model itself leaves nothing to merge.

    What is published comes last: where a gate fires, or anything else fails, nothing has gone out.
    """
    steps = [_step(Stage.PREPARE)]
    if spec.stops_after_prepare:
        return tuple(steps)
    steps.append(_step(Stage.TRAIN, pods=spec.num_nodes))
    if spec.merges:
        steps.append(_step(Stage.MERGE))
    steps += _entries(Stage.QUANTIZE, (entry.name for entry in spec.quantize or ()))
    steps += _entries(Stage.PUBLISH, (entry.name for _, _, entry in spec.destinations()))
    return tuple(steps)


def _step(stage: Stage, pods: int = 1) -> Step:
    return Step(stage, stage.value, stage.value, pods=pods)


def _entries(stage: Stage, entries: Iterable[str]) -> Iterator[Step]:
    """One step an entry; users' names stay out of the names of children."""
    for index, entry in enumerate(entries):
        yield Step(stage, f"{stage.value}-{index}", f"{stage.value}-{entry}", entry)


def stage_job(job: FineTuneJob, step: Step, attempt: int) -> str:
    """Name of the Job of one attempt."""
    return f"{job.name}-{step.key}-{attempt}"


def config_map(job: FineTuneJob) -> str:
    """Name of the ConfigMap with the trainer's configuration."""
    return f"{job.name}-config"


def folder(job: FineTuneJob) -> str:
    """The job's folder in its claim, and the name of a claim made for it: jobs of one name never meet."""
    return f"{job.name}-{job.uid[:UID_CHARACTERS]}"


def report(job: FineTuneJob) -> str:
    """Path of the report in the claim."""
    return f"{folder(job)}/{REPORT}"


def claim(job: FineTuneJob) -> str:
    """Name of the claim the job works in."""
    return job.valid_spec.existing_claim or folder(job)


def event(job: FineTuneJob, key: str) -> str:
    """Name of an Event."""
    return f"{folder(job)}.{key}".lower()


def service(job: FineTuneJob) -> str:
    """Name of the Service by which the pods of a train stage find each other; a Service's name begins with a letter."""
    return f"train-{job.name}"


def rendezvous(job: FineTuneJob, step: Step, attempt: int) -> str:
    """host:port where the pods of an attempt meet: the pod with index 0."""
    return f"{stage_job(job, step, attempt)}-0.{service(job)}:{RENDEZVOUS_PORT}"


def source_claims(spec: Spec) -> tuple[str, ...]:
    """The claims that prepare reads from, each once, in the order of the spec."""
    volumes = [source.volume for _, _, source in spec.sources()]
    return tuple(dict.fromkeys(volume.claim_name for volume in volumes if volume is not None))
