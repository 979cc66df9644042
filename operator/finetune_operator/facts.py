"""What is observed of a job's children, parsed once from what the API server says. Pure."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError

from finetune_operator import names
from finetune_operator.api import (
    API_VERSION,
    JSON,
    KIND,
    OVERRIDES_ANNOTATION,
    FineTuneJob,
    Label,
    Overrides,
    parse_time,
)
from finetune_operator.names import Position
from finetune_operator.queueing import QUEUE_LABEL, Queueing
from finetune_trainer.progress import LastWord, Progress, Stage

CONTAINER = 0
"""A stage pod has one container."""

CONTROLLER_UID = "batch.kubernetes.io/controller-uid"
"""Kubernetes' own label of a Job's pods."""

TRACKING = "batch.kubernetes.io/job-tracking"
"""Kubernetes' own finalizer of a Job's pods: a pod that has it still counts for its Job."""

RUN = re.compile(r"(prepare|train|merge|(quantize|publish)-[0-9]{1,4}) [0-9]{1,9}")
"""Labels of stage and attempt that make sense."""


@dataclass(frozen=True)
class Owner:
    """Who owns a child, as far as it says."""

    uid: str | None = None
    namesake: bool = False
    """Whether the owner is, or was, a FineTuneJob of the same name."""

    @classmethod
    def parse(cls, body: Mapping[str, Any], job: FineTuneJob) -> Owner:
        """The owner that is a FineTuneJob; a retained claim has its owner in a label only."""
        metadata = body["metadata"]
        for reference in metadata.get("ownerReferences") or ():
            if reference["kind"] == KIND and reference["apiVersion"].split("/")[0] == API_VERSION.split("/")[0]:
                return cls(reference["uid"], reference["name"] == job.name)
        if body.get("kind") == "PersistentVolumeClaim":
            return cls((metadata.get("labels") or {}).get(Label.JOB_UID))
        return cls()


@dataclass(frozen=True)
class StageJob:
    """One Job of ours: one attempt of one stage."""

    name: str
    uid: str
    step: str
    attempt: int
    created: datetime
    complete: bool = False
    failed: bool = False
    """Failed, or bound to fail: on a lost node a Job never gets further than FailureTarget."""
    message: str = ""
    deleting: bool = False
    completed: datetime | None = None
    size: int = 1
    """How many pods it has at once."""
    suspended: bool = False
    """Whether it is held back: by the queue that it is in, for the operator never does so."""
    queue: str = ""
    """The LocalQueue that it asks for."""
    started: datetime | None = None
    """When it was last allowed to make pods; unset again by a queue that holds it back."""
    overrides: Overrides | None = None
    """What its pods were told to change of the resolved settings."""

    @property
    def position(self) -> Position:
        """Where it stands in the life of its job."""
        return self.attempt, names.place(self.step)

    @property
    def ended(self) -> bool:
        """Whether it will do no more."""
        return self.complete or self.failed or self.deleting


@dataclass(frozen=True)
class StagePod:
    """A pod of one attempt."""

    name: str
    uid: str
    step: str
    attempt: int
    created: datetime
    index: int = 0
    """Which of the pods of its attempt."""
    job_uid: str = ""
    """Its Job: one made anew under the same name, after a suspension, has another."""
    phase: str = "Pending"
    ready: bool = False
    ip: str = ""
    reason: str = ""
    message: str = ""
    claims: tuple[str, ...] = ()
    """The claims that it mounts."""
    disruption: str | None = None
    """Reason of the condition DisruptionTarget."""
    disruption_message: str = ""
    unschedulable: str | None = None
    """What the scheduler says."""
    scheduled: datetime | None = None
    waiting_reason: str = ""
    waiting_message: str = ""
    exit_code: int | None = None
    exit_reason: str = ""
    words: str = ""
    """The termination message as it is."""
    started: datetime | None = None
    ended_at: datetime | None = None
    gone_by: datetime | None = None
    """When a pod being deleted has been given all its time."""
    dismissed: bool = False
    """Whether its Job was suspended and sent it away: how it ends says nothing of the attempt."""

    @property
    def stage(self) -> Stage:
        """What the trainer in it calls itself."""
        return Stage(self.step.partition("-")[0])

    @property
    def position(self) -> Position:
        """Where its attempt stands in the life of its job."""
        return self.attempt, names.place(self.step)

    @property
    def ended(self) -> bool:
        """Whether the pod will do no more."""
        return self.phase in ("Succeeded", "Failed") or self.exit_code is not None

    @property
    def running(self) -> bool:
        """Whether its container runs."""
        return self.started is not None and not self.ended

    def belongs_to(self, job: StageJob | None) -> bool:
        """Whether it is a pod of this Job, as far as can be told."""
        return job is None or not self.job_uid or self.job_uid == job.uid

    @property
    def lost(self) -> bool:
        """Whether its node is not heard of any more: nothing that is said of it will come true by itself.

        Of a node that is well, a pod that is to leave stays ready until it has ended.
        """
        gone = self.disruption == "DeletionByTaintManager" and not self.ready and self.started is not None
        return not self.ended and (gone or self.disruption == "DeletionByPodGC")

    @property
    def last_word(self) -> LastWord | None:
        """The trainer's last word of this very attempt, if it can be read."""
        try:
            word = LastWord.model_validate_json(self.words)
        except ValidationError:
            return None
        return word if (word.attempt, word.stage) == (self.attempt, self.stage) else None


@dataclass(frozen=True)
class Gang:
    """The pods of one attempt, each the newest of its index: one, or one a node. They start, fail and end together."""

    pods: tuple[StagePod, ...] = ()
    size: int = 1
    """How many there are to be."""

    @property
    def leader(self) -> StagePod | None:
        """The pod with index 0, which alone tells progress and proves the stage."""
        return next((pod for pod in self.pods if pod.index == 0), None)

    @property
    def complete(self) -> bool:
        """Whether all pods have been made."""
        return len(self.pods) >= self.size

    @property
    def started(self) -> bool:
        """Whether every pod's container has run."""
        return self.complete and all(pod.started is not None for pod in self.pods)

    @property
    def running(self) -> bool:
        """Whether all have begun and not all have ended."""
        return self.started and any(pod.running for pod in self.pods)

    @property
    def late(self) -> tuple[StagePod, ...]:
        """Pods that are there and have not started."""
        return tuple(pod for pod in self.pods if pod.started is None and not pod.ended)

    @property
    def claim(self) -> LastWord | None:
        """What the leader says where it says that all is done and verified."""
        word = self.leader.last_word if self.leader is not None and self.leader.ended else None
        return word if word is not None and word.succeeded else None

    def proof(self, job: StageJob | None) -> LastWord | None:
        """The last word that proves the stage: the leader's; of several pods only where all have ended well."""
        complete = job is not None and job.complete
        well = self.size == 1 or complete or (self.complete and all(pod.exit_code == 0 for pod in self.pods))
        return self.claim if well else None


@dataclass(frozen=True)
class Conflict:
    """A name of ours that is taken by an object that is not ours."""

    kind: str
    name: str
    leftover: bool
    """Of an earlier job of this name, and about to be collected."""


@dataclass(frozen=True)
class Refusal:
    """Something of ours that the API server would not create: a quota, a webhook, a right that lacks."""

    kind: str
    name: str
    status: int
    """HTTP status of the answer."""
    message: str


@dataclass(frozen=True)
class Facts:
    """Everything a decision rests on."""

    job: FineTuneJob
    jobs: tuple[StageJob, ...] = ()
    pods: tuple[StagePod, ...] = ()
    progress: Progress | None = None
    still_since: datetime | None = None
    """Since when the live attempt's progress has not moved, as far as this process has seen."""
    warnings: tuple[str, ...] = ()
    """Warnings about the live Job or its pod that still hold, newest first, as 'Reason: message'."""
    conflicts: tuple[Conflict, ...] = ()
    refusal: Refusal | None = None
    queueing: Queueing | None = None
    """How the live attempt's Job fares in its queue, if it is in one and anything is known."""
    claim_modes: tuple[str, ...] | None = None
    """Access modes of a claim that the job brings, where it matters and can be read."""

    def gang(self, position: Position) -> Gang:
        """The pods of an attempt, without those that a Job which goes on has sent away."""
        job = self.job_of(position)
        ours = [pod for pod in self.pods if pod.position == position and pod.belongs_to(job)]
        if job is not None and not job.ended:
            ours = [pod for pod in ours if not pod.dismissed]
        newest = {pod.index: pod for pod in sorted(ours, key=lambda pod: (pod.index, pod.created))}
        return Gang(tuple(newest.values()), job.size if job is not None else max(len(newest), 1))

    def job_of(self, position: Position) -> StageJob | None:
        """The Job of an attempt."""
        return next((job for job in self.jobs if job.position == position), None)


def parse_jobs(bodies: Iterable[JSON], uid: str) -> tuple[StageJob, ...]:
    """The Jobs of the FineTuneJob with this uid, in the order in which they were made."""
    ours = [body for body in bodies if _labels(body).get(Label.JOB_UID) == uid and _is_run(body)]
    return tuple(sorted((parse_job(body) for body in ours), key=lambda job: job.position))


def parse_pods(bodies: Iterable[JSON], uid: str) -> tuple[StagePod, ...]:
    """The pods of the FineTuneJob with this uid, in the order of their attempts."""
    ours = [body for body in bodies if _labels(body).get(Label.JOB_UID) == uid and _is_run(body)]
    return tuple(sorted((parse_pod(body) for body in ours), key=lambda pod: pod.position))


OVERCOME = frozenset({"Pulling", "Pulled"})
"""Reasons of Events that a kubelet tells only when volumes are mounted and the sandbox stands."""


def parse_warnings(events: Iterable[JSON]) -> tuple[str, ...]:
    """The warnings that still hold: a mount that failed once is no reason while a large image is being pulled."""
    newest_first = sorted(events, key=lambda event: (_event_time(event), event.get("type") != "Warning"), reverse=True)
    recent = itertools.takewhile(lambda event: event.get("reason") not in OVERCOME, newest_first)
    warnings = (event for event in recent if event.get("type") == "Warning")
    return tuple(f"{event.get('reason', '')}: {event.get('message', '')}" for event in warnings)


def _event_time(event: JSON) -> str:
    return event.get("lastTimestamp") or event.get("eventTime") or event["metadata"].get("creationTimestamp") or ""


def _labels(body: Mapping[str, Any]) -> dict[str, str]:
    return body["metadata"].get("labels") or {}


def _is_run(body: Mapping[str, Any]) -> bool:
    """Whether it says of which attempt it is."""
    labels = _labels(body)
    return RUN.fullmatch(f"{labels.get(Label.STAGE)} {labels.get(Label.ATTEMPT)}") is not None


def parse_job(body: Mapping[str, Any]) -> StageJob:
    """One Job of batch/v1."""
    metadata, status, labels = body["metadata"], body.get("status") or {}, _labels(body)
    spec = body.get("spec") or {}
    true = {c["type"]: c for c in status.get("conditions") or () if c["status"] == "True"}
    failure = true.get("Failed") or true.get("FailureTarget")
    return StageJob(
        name=metadata["name"],
        uid=metadata["uid"],
        step=labels[Label.STAGE],
        attempt=int(labels[Label.ATTEMPT]),
        created=parse_time(metadata["creationTimestamp"]),
        complete="Complete" in true or "SuccessCriteriaMet" in true,
        failed=failure is not None,
        message=(failure or {}).get("message", ""),
        deleting="deletionTimestamp" in metadata,
        completed=_time(status.get("completionTime") or (failure or {}).get("lastTransitionTime")),
        size=spec.get("completions") or 1,
        suspended=bool(spec.get("suspend")),
        queue=labels.get(QUEUE_LABEL, ""),
        started=_time(status.get("startTime")),
        overrides=_overrides(metadata),
    )


def _overrides(metadata: JSON) -> Overrides | None:
    told = (metadata.get("annotations") or {}).get(OVERRIDES_ANNOTATION)
    try:
        return Overrides.model_validate_json(told) if told else None
    except ValidationError:
        return None


def parse_pod(body: Mapping[str, Any]) -> StagePod:
    """One Pod, with the state of its one container."""
    metadata, status, labels = body["metadata"], body.get("status") or {}, _labels(body)
    conditions = {c["type"]: c for c in status.get("conditions") or ()}
    return StagePod(
        name=metadata["name"],
        uid=metadata["uid"],
        step=labels[Label.STAGE],
        attempt=int(labels[Label.ATTEMPT]),
        created=parse_time(metadata["creationTimestamp"]),
        index=_index(metadata),
        job_uid=labels.get(CONTROLLER_UID, ""),
        ready=conditions.get("Ready", {}).get("status") == "True",
        phase=status.get("phase", "Pending"),
        ip=status.get("podIP", ""),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        gone_by=_time(metadata.get("deletionTimestamp")),
        dismissed=_dismissed(metadata, conditions),
        claims=_claims(body),
        **_disruption(conditions.get("DisruptionTarget")),
        **_scheduling(conditions.get("PodScheduled")),
        **_container(status),
    )


def _dismissed(metadata: JSON, conditions: Mapping[str, JSON]) -> bool:
    """A Job that is suspended stops counting its pods, then deletes them; any other pod counts until it has ended."""
    counts = TRACKING in (metadata.get("finalizers") or ())
    return "deletionTimestamp" in metadata and not counts and "DisruptionTarget" not in conditions


def _index(metadata: JSON) -> int:
    told = str((metadata.get("annotations") or {}).get(Label.INDEX))
    return int(told) if told.isdecimal() else 0


def _claims(body: Mapping[str, Any]) -> tuple[str, ...]:
    volumes = (body.get("spec") or {}).get("volumes") or ()
    mounted = (volume["persistentVolumeClaim"]["claimName"] for volume in volumes if "persistentVolumeClaim" in volume)
    return tuple(dict.fromkeys(mounted))


def _disruption(condition: JSON | None) -> JSON:
    if condition is None or condition["status"] != "True":
        return {}
    return {"disruption": condition.get("reason", ""), "disruption_message": condition.get("message", "")}


def _scheduling(condition: JSON | None) -> JSON:
    if condition is None:
        return {}
    if condition["status"] == "True":
        return {"scheduled": _time(condition.get("lastTransitionTime"))}
    return {"unschedulable": condition.get("message", "")}


def _container(status: Mapping[str, Any]) -> JSON:
    statuses = status.get("containerStatuses") or ()
    state: JSON = statuses[CONTAINER].get("state") or {} if statuses else {}
    if waiting := state.get("waiting"):
        return {"waiting_reason": waiting.get("reason", ""), "waiting_message": waiting.get("message", "")}
    if running := state.get("running"):
        return {"started": _time(running.get("startedAt"))}
    if ended := state.get("terminated"):
        return {
            "exit_code": ended.get("exitCode"),
            "exit_reason": ended.get("reason", ""),
            "words": ended.get("message", ""),
            "started": _time(ended.get("startedAt")),
            "ended_at": _time(ended.get("finishedAt")),
        }
    return {}


def _time(text: str | None) -> datetime | None:
    return parse_time(text) if text else None


def after(time: datetime, seconds: float) -> datetime:
    """So many seconds later."""
    return time + timedelta(seconds=seconds)
