"""CONTRACT: `report/report.json`, all that is known of a job so far. Written anew at the end of every stage.

A newer trainer may add fields, never under the same version take one away or change what it means.
"""

from __future__ import annotations

from datetime import datetime

from pydantic import Field

from finetune_trainer.config import Model
from finetune_trainer.progress import Artifact, DataFacts, Estimate, Published, Resolved, Stage, TrainFacts
from finetune_trainer.runtime.manifest import CalibrationFacts
from finetune_trainer.training.memory import StepMemory
from finetune_trainer.training.start import Start

REPORT_VERSION = 1
REPORT_NAME = "report.json"


class Machine(Model):
    """What a stage ran on."""

    system: str = Field(description="Operating system and architecture.")
    cores: int = Field(description="Usable by the process.")
    memory_bytes: int = Field(description="Of the machine.")
    gpus: tuple[str, ...] = Field(default=(), description="Names of the GPUs that the process sees.")


class StageRun(Model):
    """One stage that ended well."""

    stage: Stage
    name: str | None = Field(default=None, description="quantize, publish: which entry.")
    attempt: int
    message: str = Field(description="What it says of itself.")
    digest: str = Field(description="SHA-256 of its manifest.")
    finished_at: datetime
    seconds: float = Field(description="From the start of the process's work to its proof, loading included.")
    peak_memory_bytes: int = Field(description="Most memory of a process of the stage.")
    peak_gpu_memory_bytes: int | None = Field(default=None, description="Most memory of a GPU, of the first process.")
    machine: Machine
    libraries: dict[str, str] = Field(description="Versions of what computes, by distribution.")


class Origin(Model):
    """Where a model, an adapter or rows came from."""

    field: str = Field(description="model, model.adapter, merge.original, datasets[0] or evaluation.datasets[0].")
    name: str | None = Field(default=None, description="Of a dataset.")
    kind: str = Field(description="huggingFace, modelScope, volume, s3 or oci.")
    place: str = Field(description="Repository, claim and path, URI or reference.")
    revision: str | None = Field(default=None, description="Commit or digest, of a source that could move.")


class MadeArtifact(Artifact):
    """An artifact with what it was made from."""

    files: int
    made_from: dict[str, str] = Field(description="Digests of the manifests of what it was made from.")
    base: str | None = Field(default=None, description="merged: the weights merged into, Dequantized or Original.")
    calibration: CalibrationFacts | None = Field(default=None, description="GPTQ, AWQ: the rows that were looked at.")


class Gate(Model):
    """What the job asks of a figure."""

    artifact: str
    field: str = Field(description="In the spec, e.g. merge.maxKLDivergence.")
    limit: float = Field(description="The largest figure that passes.")
    measured: float | None = Field(
        default=None,
        description="Unset: the artifact is not there, or is merged into weights that the gate is not for.",
    )
    passed: bool | None = Field(default=None, description="Set with the figure.")


class PublishedPlace(Published):
    """A published artifact with where it is asked for."""

    endpoint: str | None = Field(default=None, description="s3: URL of the service.")


class History(Model):
    """Lines of `report/training.jsonl`, at most `collect.HISTORY_LINES` of each kind, evenly chosen."""

    training: tuple[dict[str, float], ...] = Field(description="step, loss, learning_rate, tokens_per_second, ...")
    measured: tuple[dict[str, float], ...] = Field(description="step, eval_loss, ...: on the held-out rows.")
    lines: int = Field(description="Lines in the file.")


class Sample(Model):
    """A prompt from the held-out rows, answered greedily."""

    prompt: str
    before: str = Field(description="By what training began with.")
    after: str = Field(description="By what was trained.")
    expected: str | None = Field(default=None, description="As the row has it.")


class Part(Model):
    """Tokens of a row that stand together, and all count in the loss or none does."""

    text: str
    learned: bool


class PreviewRow(Model):
    """A row as it is trained on."""

    tokens: int
    loss_tokens: int
    parts: tuple[Part, ...]
    rejected: tuple[Part, ...] = Field(default=(), description="Of a pair: the worse answer.")


class Serving(Model):
    """How an artifact is served."""

    artifact: str
    server: str
    file: str | None = Field(default=None, description="Manifest, relative to the report's folder.")
    refusal: str | None = Field(default=None, description="Why there is none.")


class JobReport(Model):
    """All that is known of a job."""

    version: int = REPORT_VERSION
    job: str = Field(description="Name of the work folder.")
    resource: str | None = Field(default=None, description="namespace/name of the FineTuneJob, in a cluster.")
    written_at: datetime
    stages: tuple[StageRun, ...] = Field(description="In their order.")
    origins: tuple[Origin, ...]
    settings: Resolved | None = Field(default=None, description="As prepare fixed them.")
    data: DataFacts | None = None
    estimate: Estimate | None = Field(default=None, description="What a GPU was expected to hold.")
    memory: StepMemory | None = Field(default=None, description="What the first steps took of it.")
    start: Start | None = Field(default=None, description="What the last attempt to train did before its first step.")
    data_digest: str | None = Field(
        default=None,
        description="SHA-256 of the manifest of data/: rows, tokenizer and settings. Of the rows alone: settings.",
    )
    training: TrainFacts | None = None
    history: History | None = None
    artifacts: tuple[MadeArtifact, ...] = ()
    gates: tuple[Gate, ...] = ()
    published: tuple[PublishedPlace, ...] = ()
    samples: tuple[Sample, ...] = ()
    preview: tuple[PreviewRow, ...] = ()
    serving: tuple[Serving, ...] = ()
