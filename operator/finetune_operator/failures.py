"""Why a stage ended, or does not begin, in the order in which the evidence is believed. Pure.

`classify` is for an attempt that ended, `decisive` for one of several pods that cannot end well any more, `obstacle`
for pods that do not start, `refused` for an attempt that cannot be made. Each failure carries a sentence with the way
out, and whether the stage is run again. `REMEDIES` and the two tables are all there is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum

from finetune_operator.api import cut
from finetune_operator.facts import Gang, Refusal, StageJob, StagePod
from finetune_trainer.progress import ExitCode
from finetune_trainer.progress import Reason as Said

TAIL_CHARACTERS = 600
"""Of a log that stands in for a last word."""


class Reason(StrEnum):
    """What the operator itself finds; what the trainer says of itself is `finetune_trainer.progress.Reason`."""

    COMPLETED = "Completed"
    DISRUPTED = "Disrupted"
    EVICTED = "Evicted"
    OUT_OF_HOST_MEMORY = "OutOfHostMemory"
    LOST_WORD = "LostWord"
    POD_LOST = "PodLost"
    JOB_DELETED = "JobDeleted"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CANNOT_START = "CannotStart"
    MOUNT_FAILED = "MountFailed"
    VOLUME_UNBOUND = "VolumeUnbound"
    POD_REFUSED = "PodRefused"
    UNSCHEDULABLE = "Unschedulable"
    QUOTA_EXCEEDED = "QuotaExceeded"
    CREATION_REFUSED = "CreationRefused"
    INVALID_SPEC = "InvalidSpec"
    NAME_CONFLICT = "NameConflict"
    NOT_ALLOWED = "NotAllowed"
    UNKNOWN = "Unknown"


class Retry(StrEnum):
    """Whether a stage is run again after a failure."""

    FREE = "Free"
    """Nobody's fault: again, and it does not count against maxRetries."""
    COUNTED = "Counted"
    NEVER = "Never"
    """Only a person can mend it."""


@dataclass(frozen=True)
class Failure:
    """Why a stage ended or does not begin."""

    reason: str
    message: str
    retry: Retry
    deadline: bool = True
    """For a delay: whether waiting has an end."""


REMEDIES: dict[str, tuple[Retry, str]] = {
    Said.INVALID_CONFIG: (Retry.NEVER, "Correct the spec and apply it under a new name."),
    Said.INVALID_DATASET: (Retry.NEVER, "Correct the dataset or its columns and apply the job under a new name."),
    Said.INVALID_MODEL: (Retry.NEVER, "Name a folder with config, tokenizer and safetensors, or one GGUF file."),
    Said.NOT_FOUND: (Retry.NEVER, "Correct the path or put the files there, then apply the job under a new name."),
    Said.ACCESS_DENIED: (Retry.NEVER, "Check the Secret that the source names and who may read the files."),
    Said.VOLUME_FULL: (Retry.NEVER, "Give output.volume more space; the last good checkpoint is kept."),
    Said.OUT_OF_MEMORY: (
        Retry.NEVER,
        "Use a larger GPU; to train, a smaller perDeviceTrainBatchSize or maxLength may do.",
    ),
    Said.NON_FINITE_LOSS: (Retry.NEVER, "Lower training.learningRate, or compute in BF16 or FP32."),
    Said.VERIFICATION_FAILED: (Retry.COUNTED, "What was read is not what was written: check the volume."),
    Said.RENDEZVOUS_FAILED: (
        Retry.COUNTED,
        "The pods of a stage meet at the first one's name: check the cluster's DNS and network policies.",
    ),
    Said.PEER_LOST: (Retry.COUNTED, "It goes on from its last checkpoint; check the network between the nodes."),
    Said.INTERRUPTED: (Retry.FREE, "It goes on from its last checkpoint."),
    Said.UNKNOWN: (Retry.COUNTED, "See the log of the stage's Job."),
    Reason.DISRUPTED: (Retry.FREE, "The stage is run again; this does not count as a retry."),
    Reason.EVICTED: (Retry.COUNTED, "Raise pod.resources.requests, or free space on the node."),
    Reason.OUT_OF_HOST_MEMORY: (
        Retry.NEVER,
        "Raise pod.resources.limits.memory, or use a smaller perDeviceTrainBatchSize or maxLength.",
    ),
    Reason.LOST_WORD: (Retry.FREE, "It is run again and ends at once if its manifest holds."),
    Reason.POD_LOST: (Retry.FREE, "The stage is run again; this does not count as a retry."),
    Reason.JOB_DELETED: (Retry.FREE, "To stop a job, delete the FineTuneJob; the stage is run again."),
    Reason.UNKNOWN: (Retry.COUNTED, "See the log of the stage's Job."),
}


def failure(reason: str, what: str) -> Failure:
    """A failure of this reason: what happened, and the way out that belongs to it unless what happened says it."""
    retry, remedy = REMEDIES[reason]
    what = what.strip() or reason
    stop = "" if what.endswith((".", "!", "?", "…")) else "."
    return Failure(str(reason), cut(f"{cut(what, 800)}{stop} {remedy}"), retry)


# --- an attempt that ended -------------------------------------------------------------------------------------------

Judge = Callable[[StagePod], Failure | None]


def _disrupted(pod: StagePod) -> Failure | None:
    if pod.reason == "Evicted":
        return failure(Reason.EVICTED, f"The kubelet evicted pod {pod.name}: {pod.message}")
    if pod.disruption is None:
        return None
    why = pod.disruption_message or "its node was drained, lost or needed for others"
    return failure(Reason.DISRUPTED, f"Pod {pod.name} was taken away ({pod.disruption}): {why}")


def _out_of_host_memory(pod: StagePod) -> Failure | None:
    at_once = pod.exit_reason == "StartError" and "OOM-killed" in pod.words
    if pod.exit_reason != "OOMKilled" and not at_once:
        return None
    return failure(Reason.OUT_OF_HOST_MEMORY, f"Stage {pod.step} took more memory than its limit and was killed")


def _said(pod: StagePod) -> Failure | None:
    """The trainer's own word. It names the way out itself, so ours is not added."""
    word = pod.last_word
    if word is None or word.reason is Said.COMPLETED:
        return None
    retry, _ = REMEDIES[word.reason]
    return Failure(word.reason, cut(word.message.strip() or word.reason), retry)


def _exit_code(pod: StagePod) -> Failure | None:
    """A reserved exit code, where the word is lost."""
    reserved = {code.value: code for code in ExitCode if code not in (ExitCode.COMPLETED, ExitCode.UNKNOWN)}
    code = reserved.get(pod.exit_code if pod.exit_code is not None else -1)
    if code is None:
        return None
    return failure(code.reason, f"Stage {pod.step} ended with exit code {code.value} ({code.reason}). {tail(pod)}")


def _unknown(pod: StagePod) -> Failure | None:
    """Ended, and nothing says why."""
    if not pod.ended or pod.exit_code == 0:
        return None
    return failure(Reason.UNKNOWN, f"Stage {pod.step} ended with exit code {pod.exit_code}. {tail(pod)}")


def _lost_word(pod: StagePod) -> Failure | None:
    """It says it succeeded, but does not prove it. Of several pods only the first has anything to prove."""
    word = pod.last_word
    if pod.exit_code != 0 or pod.index > 0 or (word is not None and word.succeeded):
        return None
    return failure(Reason.LOST_WORD, f"Stage {pod.step} ended well, but without a last word that proves it")


JUDGES: tuple[Judge, ...] = (_disrupted, _out_of_host_memory, _said, _exit_code, _unknown, _lost_word)

LATE_REASONS: dict[str, int] = {
    Said.UNKNOWN: 1,
    Said.RENDEZVOUS_FAILED: 2,
    Said.PEER_LOST: 3,
    Said.INTERRUPTED: 3,
    Reason.LOST_WORD: 4,
}
"""What one of several pods may end for because another one did: believed only where no pod has a reason of its own,
and the less the greater the number."""

NEVER_ENDED = datetime.max.replace(tzinfo=UTC)


def classify(gang: Gang, job: StageJob | None) -> Failure:
    """The strongest evidence that any pod has. Only for attempts that ended without proof of success."""
    found = _strongest(gang)
    if found is not None and gang.claim is not None and found.retry is Retry.NEVER:
        return replace(found, retry=Retry.COUNTED)  # what it was to make is there: run again, it ends at once
    if found is not None:
        return found
    if job is not None and job.complete:
        return failure(Reason.LOST_WORD, f"The pod of {job.name} is gone, and its last word with it")
    if job is not None and not job.deleting:
        return failure(Reason.POD_LOST, f"The pod of {job.name} vanished without saying why")
    return failure(Reason.JOB_DELETED, "The stage's Job was deleted")


def decisive(gang: Gang) -> Failure | None:
    """Why an attempt of several pods is bound to fail while some of them still run, if it is plain already.

    What is seen of a pod that leaves may soon be gone with it. What a pod ends for because of another one is not
    believed before all have ended.
    """
    if gang.size == 1:
        return None
    found = _strongest(replace(gang, pods=tuple(pod for pod in gang.pods if pod.ended or pod.gone_by is not None)))
    return None if found is None or found.reason in LATE_REASONS else found


def _strongest(gang: Gang) -> Failure | None:
    """Of all pods' evidence the strongest; among equals that of the pod which ended first."""
    found = [(rank, pod.ended_at or NEVER_ENDED, told) for pod in gang.pods for rank, told in _evidence(pod)]
    return min(found, key=lambda each: each[:2], default=(0, NEVER_ENDED, None))[2]


def _evidence(pod: StagePod) -> Iterator[tuple[tuple[int, int], Failure]]:
    """The first judge's finding, if any, and how strong it is: the smaller the stronger."""
    for place, judge in enumerate(JUDGES):
        if (found := judge(pod)) is not None:
            yield (LATE_REASONS.get(found.reason, 0), place), found
            return


def tail(pod: StagePod) -> str:
    """The end of the log, on one line, where that is all there is."""
    text = " ".join(pod.words.split())
    return "" if not text else f"Its last lines: …{text[-TAIL_CHARACTERS:]}"


# --- a pod that does not start ---------------------------------------------------------------------------------------

IMAGE_REASONS = frozenset({"ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"})
START_REASONS = frozenset({"CreateContainerConfigError", "CreateContainerError", "RunContainerError"})


def obstacle(gang: Gang, warnings: tuple[str, ...]) -> Failure | None:
    """Why the pods of a live attempt do not all run yet. The warnings are about the first that is late, or the Job."""
    if not gang.complete:
        return delay(None, warnings)
    found = (delay(pod, warnings if pod is gang.late[0] else ()) for pod in gang.late)
    return next((each for each in found if each is not None), None)


def delay(pod: StagePod | None, warnings: tuple[str, ...]) -> Failure | None:
    """Why a pod of a live attempt does not run yet, or None if nothing is wrong that can be seen."""
    if pod is None:
        return _no_pod(warnings)
    if pod.waiting_reason in IMAGE_REASONS:
        what = f"The trainer's image cannot be pulled ({pod.waiting_reason}): {pod.waiting_message}"
        return waiting(Reason.IMAGE_PULL_FAILED, what, "Check the image's name and pod.imagePullSecrets.")
    if pod.waiting_reason in START_REASONS:
        what = f"The container cannot start ({pod.waiting_reason}): {pod.waiting_message}"
        return waiting(Reason.CANNOT_START, what, "Check that the Secrets and keys that the spec names exist.")
    if pod.unschedulable is not None:
        return _unschedulable(pod.unschedulable, pod.claims)
    return _on_node(warnings)


def waiting(reason: str, what: str, remedy: str, *, deadline: bool = True) -> Failure:
    """Something that keeps a pod from running."""
    what = what.strip().rstrip(".:")
    return Failure(reason, cut(f"{cut(what, 800)}. {remedy}"), Retry.NEVER, deadline)


QUOTA_REMEDY = "It waits until the namespace's quota has room, or the quota is raised."
POLICY_REMEDY = "Ask who administers the namespace's policies."
NAME_REMEDIES = (
    ("no PriorityClass with name", "Correct pod.priorityClassName."),
    ('RuntimeClass "', "Correct pod.runtimeClassName."),
)
"""By what the API server says of a name that it does not know."""


def _no_pod(warnings: tuple[str, ...]) -> Failure | None:
    refused = next((warning for warning in warnings if warning.startswith("FailedCreate: ")), None)
    if refused is None:
        return None
    if "exceeded quota" in refused:
        return waiting(Reason.QUOTA_EXCEEDED, refused.removeprefix("FailedCreate: "), QUOTA_REMEDY, deadline=False)
    what = f"The pod was refused: {refused.removeprefix('FailedCreate: ')}"
    remedy = next((remedy for name, remedy in NAME_REMEDIES if name in refused), POLICY_REMEDY)
    return waiting(Reason.POD_REFUSED, what, remedy)


SCHEDULER_NOISE = re.compile(r"[\s,]*\b(still not schedulable|no new claims to deallocate|preemption:)")


STRAY = re.compile(r"(?<=[.])\s+not found\.?$")
"""What the scheduler leaves of a StorageClass that is not there."""


def _unschedulable(said: str, claims: tuple[str, ...]) -> Failure:
    said = SCHEDULER_NOISE.split(said, maxsplit=1)[0] or said
    if "persistentvolumeclaim" in said and "not found" in said:
        claim = said.partition('persistentvolumeclaim "')[2].partition('"')[0]
        what = f"PersistentVolumeClaim {claim!r} is not there" if claim else said
        return waiting(Reason.VOLUME_UNBOUND, what, "Create it in the job's namespace, or correct claimName.")
    if "PersistentVolumeClaim" in said or "persistentvolumeclaim" in said:
        remedy = "Check that the claim's StorageClass exists and can make volumes."
        which = f"Claim {claims[0]}" if len(claims) == 1 else f"One of the claims {', '.join(claims)}"
        what = f"{which if claims else 'A claim'} has no volume yet: {STRAY.sub('', said.rstrip())}"
        return waiting(Reason.VOLUME_UNBOUND, what, remedy)
    remedy = "It waits until a node has room; lower pod.resources or parallelism, or add nodes, if none ever will."
    return waiting(Reason.UNSCHEDULABLE, f"No node can take the pod: {said}", remedy, deadline=False)


def _on_node(warnings: tuple[str, ...]) -> Failure | None:
    """What a kubelet cannot do before it pulls the image: told by Events only."""
    for warning in warnings:
        reason, _, said = warning.partition(": ")
        if reason in {"FailedMount", "FailedAttachVolume"}:
            what = f"A volume cannot be mounted: {said}"
            return waiting(Reason.MOUNT_FAILED, what, "Check the claims and secrets that the spec names.")
        if reason == "FailedCreatePodSandBox":
            what = f"The node cannot set up the pod: {said}"
            return waiting(Reason.CANNOT_START, what, "Check pod.runtimeClassName, and the node's runtime and network.")
    return None


# --- an attempt that cannot be made ----------------------------------------------------------------------------------

UNPROCESSABLE = 422
"""HTTP: the object itself makes no sense, and the spec it is made from cannot change."""


def refused(refusal: Refusal) -> Failure:
    """Why there is no attempt. With a deadline it is over at once; all else may be mended, and is tried again."""
    what = f"{refusal_of(refusal)}{refusal.message}"
    if refusal.status == UNPROCESSABLE:
        return waiting(Reason.INVALID_SPEC, what, "Correct the spec and apply it under a new name.")
    if "exceeded quota" in refusal.message:
        return waiting(Reason.QUOTA_EXCEEDED, what, QUOTA_REMEDY, deadline=False)
    remedy = "It is tried again; ask who administers the namespace's policies and webhooks if this stays so."
    return waiting(Reason.CREATION_REFUSED, what, remedy, deadline=False)


def refusal_of(refusal: Refusal) -> str:
    """How the message of a refusal begins."""
    return f"{refusal.kind} {refusal.name} cannot be created: "
