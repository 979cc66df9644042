"""Jobs, pods and words for tests of decisions, and a small cluster that plays them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_operator import names
from finetune_operator.api import JSON, FineTuneJob, Label, format_time
from finetune_operator.facts import TRACKING, Facts, parse_jobs, parse_pods
from finetune_operator.journal import Journal, alive
from finetune_operator.manifests import build_stage_job
from finetune_operator.names import Position
from finetune_operator.queueing import Queueing
from finetune_operator.settings import Settings
from finetune_operator.status import Decision, Remove, Start, Stop, decide
from finetune_trainer.progress import (
    Artifact,
    DataFacts,
    DatasetFacts,
    LastWord,
    Measured,
    Progress,
    Published,
    Reason,
    Resolved,
    ResolvedLora,
    ResolvedParallelism,
    Stage,
    TrainFacts,
)

START = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
UID = "0123abcd-0000-4000-8000-000000000000"
SETTINGS = Settings(trainer_image="registry.test/trainer:1", retry_backoff_seconds=10)
SPEC: JSON = {
    "model": {"volume": {"claimName": "models", "path": "smollm2"}},
    "datasets": [{"volume": {"claimName": "datasets", "path": "train.jsonl"}}],
    "parallelism": {"gpusPerNode": 0},
}
BUCKET: JSON = {"s3": {"uri": "s3://models/demo", "credentialsSecretRef": {"name": "store"}}}
WHOLE = SPEC | {
    "quantize": [{"name": "gptq4", "method": "GPTQ"}],
    "output": {"publish": [{"name": "bucket", "artifact": "Merged", **BUCKET}]},
}
"""A job with a stage of each kind."""
NODES = 2
GANG = SPEC | {
    "parallelism": {"gpusPerNode": 0, "numNodes": NODES},
    "output": {"volume": {"create": {"accessModes": ["ReadWriteMany"]}}},
}
"""A training of two pods."""


def job_body(spec: JSON = SPEC, status: JSON | None = None, *, name: str = "demo", **metadata: Any) -> JSON:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {
            "name": name,
            "namespace": "default",
            "uid": UID,
            "resourceVersion": "7",
            "generation": 1,
            "creationTimestamp": format_time(START),
            **metadata,
        },
        "spec": spec,
        "status": status or {},
    }


def a_job(spec: JSON = SPEC, status: JSON | None = None, **metadata: Any) -> FineTuneJob:
    return FineTuneJob.parse(job_body(spec, status, **metadata))


def pod_body(step: str = "train", attempt: int = 1, uid: str = UID, *, index: int = 0, **status: Any) -> JSON:
    return {
        "metadata": {
            "name": f"demo-{step}-{attempt}-{index}-x",
            "uid": f"pod-{step}-{attempt}-{index}",
            "creationTimestamp": format_time(START),
            "labels": {Label.JOB_UID: uid, Label.STAGE: step, Label.ATTEMPT: str(attempt)},
            "annotations": {Label.INDEX: str(index)},
            "finalizers": [TRACKING],
        },
        "status": {"phase": "Pending", **status},
    }


def condition(kind: str, reason: str = "", message: str = "", status: str = "True") -> JSON:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": format_time(START),
    }


def container(**state: Any) -> list[JSON]:
    return [{"name": "trainer", "state": state}]


def ended(code: int, reason: str = "Error", message: str = "") -> JSON:
    """Status of a pod whose container ended."""
    state = {"exitCode": code, "reason": reason, "message": message, "finishedAt": format_time(START)}
    return {
        "phase": "Failed" if code else "Succeeded",
        "containerStatuses": container(terminated=state | {"startedAt": format_time(START)}),
    }


RUNNING: JSON = {
    "phase": "Running",
    "podIP": "10.0.0.9",
    "containerStatuses": container(running={"startedAt": format_time(START)}),
}


def data_facts() -> DataFacts:
    """A count of 7 of everything, in each of two datasets."""
    counts = {name: 7 for name, field in DataFacts.model_fields.items() if field.is_required()}
    one = {name: 7 for name in DatasetFacts.model_fields if name != "name"}
    datasets = tuple(DatasetFacts(name=name, **one) for name in ("a", "b"))
    return DataFacts(**counts, truncated_rows=7, packed_rows=3, datasets=datasets)


def resolved() -> Resolved:
    return Resolved(
        model_digest="m" * 64,
        data_digest="d" * 64,
        architecture="LlamaForCausalLM",
        parameters=134_515_008,
        method="QLoRA",
        objective="SFT",
        packing=False,
        max_length=128,
        global_batch_size=8,
        micro_batch_size=4,
        gradient_accumulation_steps=2,
        total_steps=40,
        num_train_epochs=0.1,
        learning_rate=0.0002,
        lr_scheduler="Cosine",
        warmup_steps=4,
        weight_decay=0.0,
        max_grad_norm=1.0,
        optimizer="AdamW",
        adam_beta1=0.9,
        adam_beta2=0.999,
        compute_dtype="FP32",
        attention="SDPA",
        gradient_checkpointing="Off",
        base_format="NF4",
        double_quantization=True,
        lora=ResolvedLora(r=16, alpha=32, dropout=0.05, target_modules=("q_proj", "v_proj")),
        shuffle=True,
        seed=42,
        logging_steps=1,
        eval_steps=4,
        checkpoint_steps=4,
        checkpoint_keep=2,
        restore_best=False,
        parallelism=ResolvedParallelism(num_nodes=1, gpus_per_node=0, world_size=1, strategy="Single"),
    )


def word(step: str, attempt: int, reason: Reason = Reason.COMPLETED, message: str = "Done.", **more: Any) -> LastWord:
    """What the trainer says at the end of a stage, with all that goes with success."""
    stage = Stage(step.split("-", maxsplit=1)[0])
    told: dict[str, Any] = {}
    if reason is Reason.COMPLETED:
        told["manifest_digest"] = f"{step}-digest"
        if stage is Stage.PREPARE:
            told |= {"resolved": resolved(), "data": data_facts()}
        if stage is Stage.TRAIN:
            told["training"] = TrainFacts(
                steps=40, epochs=0.1, loss=1.20441, trainable_parameters=5, total_parameters=9
            )
        if stage is Stage.PUBLISH:
            told["published"] = Published(
                name="bucket", artifact="merge", uri="s3://models/demo", digest="b" * 64, size_bytes=2**20
            )
        elif stage is not Stage.PREPARE:
            kind = {Stage.TRAIN: "Adapter", Stage.MERGE: "Merged", Stage.QUANTIZE: "Quantized"}[stage]
            told["artifact"] = Artifact(
                name=step, type=kind, path=step, size_bytes=2**20, digest="a" * 64, measured=Measured(eval_loss=1.5)
            )
    return LastWord(stage=stage, attempt=attempt, reason=reason, message=message, **{**told, **more})


@dataclass
class Cluster:
    """A FineTuneJob with its Jobs and pods, played. `crash` loses the next status write."""

    spec: JSON = field(default_factory=lambda: WHOLE)
    settings: Settings = SETTINGS
    status: JSON = field(default_factory=dict)
    jobs: dict[str, JSON] = field(default_factory=dict)
    pods: dict[str, JSON] = field(default_factory=dict)
    """By their Job's name, and `<Job>/<index>` for all but the first."""
    created: list[str] = field(default_factory=list)
    made: int = 0
    """How many Jobs, those made anew after a suspension included."""
    writes: int = 0
    now: datetime = START
    progress: Progress | None = None
    still_since: datetime | None = None
    warnings: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    queueing: Queueing | None = None
    lose_status: bool = False
    slow: bool = False
    """Whether pods that are told to leave take their time."""
    removed: bool = False
    said: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)

    @property
    def job(self) -> FineTuneJob:
        return a_job(self.spec, copy.deepcopy(self.status), labels=self.labels)

    @property
    def facts(self) -> Facts:
        jobs, pods = parse_jobs(self.jobs.values(), UID), parse_pods(self.pods.values(), UID)
        return Facts(self.job, jobs, pods, self.progress, self.still_since, self.warnings, queueing=self.queueing)

    def step(self) -> Decision:
        """One pass: decide, act, write."""
        decision = decide(self.facts, self.settings, self.now)
        for action in decision.actions:
            if isinstance(action, Start):
                self._create(action)
            if isinstance(action, Stop):
                self.stop(action.name)
            if isinstance(action, Remove):
                self.removed = True
        told = decision.status.to_dict()
        if not self.lose_status and told != self.status:
            self.status = told
            self.writes += 1
            self.said += [news.reason for news in decision.events]
            self.keys += [news.key for news in decision.events]
        self.lose_status = False
        return decision

    def settle(self, limit: int = 20) -> Decision:
        """Passes until nothing changes."""
        for _ in range(limit):
            before = copy.deepcopy((self.status, self.jobs))
            decision = self.step()
            if before == (self.status, self.jobs):
                return decision
        raise AssertionError("the decisions never come to rest")

    def _create(self, action: Start) -> None:
        manifest = build_stage_job(self.job, action.step, action.attempt, self.settings, action.overrides)
        name = manifest["metadata"]["name"]
        if name in self.jobs:
            return
        again = self.job.status.suspended and self.created[-1:] == [name]
        assert again or name not in self.created, f"{name} was made twice"
        assert not any(alive(pod, self.now) for pod in self.facts.pods), f"{name} was made beside a live attempt"
        assert again or all(position(name) > position(made) for made in self.created), f"{name} after {self.created}"
        if not again:
            self.created.append(name)
        manifest["metadata"] |= {"uid": f"job-{name}-{self.made}", "creationTimestamp": format_time(self.now)}
        self.made += 1
        self.jobs[name] = manifest
        for index in range(action.step.pods):
            pod = pod_body(action.step.key, action.attempt, index=index)
            pod["metadata"]["creationTimestamp"] = format_time(self.now)
            pod["metadata"]["labels"]["batch.kubernetes.io/controller-uid"] = manifest["metadata"]["uid"]
            self.pods[name if index == 0 else f"{name}/{index}"] = pod

    def stop(self, name: str) -> None:
        """The operator deletes the Job: its pods save and leave."""
        if not self.slow:
            self.jobs.pop(name, None)
            self.pods = {pod: body for pod, body in self.pods.items() if pod.partition("/")[0] != name}
            return
        self.jobs[name]["metadata"]["deletionTimestamp"] = format_time(self.now)
        for pod in self.live_pods:
            gone_by = format_time(self.now + timedelta(seconds=120))
            self.pods[pod]["metadata"].setdefault("deletionTimestamp", gone_by)

    def leave(self) -> None:
        """The pods that were told to leave have left, and their Job is gone."""
        for name in [name for name, job in self.jobs.items() if "deletionTimestamp" in job["metadata"]]:
            del self.jobs[name]
            self.pods = {pod: body for pod, body in self.pods.items() if pod.partition("/")[0] != name}

    def wish(self, **changed: Any) -> None:
        """The user edits the spec."""
        self.spec = self.spec | changed

    def delete(self, name: str) -> None:
        """The Job goes, and its pod with it. If its status was never written, nobody knows that it was there."""
        if self.jobs.pop(name, None) and position(name) > Journal.remembered(self.job).position:
            self.created.remove(name)
        self.pods = {pod: body for pod, body in self.pods.items() if pod.partition("/")[0] != name}

    @property
    def live(self) -> str:
        """Name of the newest Job."""
        return max(self.jobs, key=position)

    @property
    def live_pods(self) -> list[str]:
        """Names of the newest Job's pods."""
        return [name for name in self.pods if name.partition("/")[0] == self.live]

    def run_pod(self) -> None:
        """All pods of the newest Job run."""
        for name in self.live_pods:
            self.pods[name]["status"] = copy.deepcopy(RUNNING)

    def end_one(self, index: int, code: int = 0, message: str = "", reason: str = "Error", **status: Any) -> None:
        """One of several pods ends; Kubernetes has not told its Job yet."""
        name = f"{self.live}/{index}" if index else self.live
        self.pods[name]["status"] = ended(code, reason, message) | status

    def fail_job(self) -> None:
        """Kubernetes gives the newest Job up: pods that still run are deleted, and gone as soon as they have ended."""
        self.jobs[self.live]["status"] = {"conditions": [condition("FailureTarget")]}
        for pod in parse_pods([self.pods[name] for name in self.live_pods], UID):
            if not pod.ended:
                del self.pods[f"{self.live}/{pod.index}" if pod.index else self.live]

    def end_pod(self, code: int = 0, message: str = "", reason: str = "Completed", **status: Any) -> None:
        """All pods of the newest Job end alike, and it with them."""
        name = self.live
        for pod in self.live_pods:
            self.pods[pod]["status"] = ended(code, reason, message) | status
        kind = "Failed" if code else "Complete"
        self.jobs[name]["status"] = {"conditions": [condition(kind)]}

    def say(self, **more: Any) -> None:
        """The live pod ends and says how."""
        labels = self.jobs[self.live]["metadata"]["labels"]
        told = word(labels[Label.STAGE], int(labels[Label.ATTEMPT]), **more)
        code = 0 if told.reason is Reason.COMPLETED else 11
        self.end_pod(code, told.to_json())

    def later(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)


def play(cluster: Cluster, limit: int = 60) -> None:
    """Let every stage succeed, to the end."""
    for _ in range(limit):
        cluster.settle()
        if cluster.job.status.finished:
            return
        if not cluster.jobs or "status" in cluster.jobs[cluster.live]:
            cluster.later(400)
            continue
        cluster.say()
    raise AssertionError("the job never ends")


def position(name: str) -> Position:
    """Number and step of a stage's Job, in their order."""
    key, number = name.removeprefix("demo-").rsplit("-", 1)
    return int(number), names.place(key)


def stages_made(cluster: Cluster) -> list[str]:
    return [name.removeprefix("demo-").rsplit("-", 1)[0] for name in cluster.created]


def steps() -> list[str]:
    return [step.key for step in names.line(a_job(WHOLE).valid_spec)]


def digests(cluster: Cluster) -> list[str | None]:
    return [stage.manifest_digest for stage in cluster.job.status.stages or ()]
