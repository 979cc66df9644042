"""Why a stage ended, or does not begin, in the order in which the evidence is believed. Pure.

`classify` is for an attempt that ended, `decisive` for one of several pods that cannot end well any more, `obstacle`
for pods that do not start, `refused` for an attempt that cannot be made. Each failure carries a sentence with the way
out, and whether the stage is run again: the table of `reasons` says what follows from what.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from finetune_operator.api import cut
from finetune_operator.facts import Gang, Refusal, StageJob, StagePod
from finetune_operator.reasons import TABLE, Reason, Retry
from finetune_trainer.progress import ExitCode
from finetune_trainer.progress import Reason as Said

TAIL_CHARACTERS = 600
"""Of a log that stands in for a last word."""


@dataclass(frozen=True)
class Failure:
    """Why a stage ended or does not begin."""

    reason: str
    message: str
    retry: Retry
    deadline: bool = True
    """For a delay: whether waiting has an end."""


def failure(reason: str, what: str, retry: Retry | None = None) -> Failure:
    """A failure of this reason: what happened, and the way out that the table knows."""
    row = TABLE[reason]
    return Failure(str(reason), ending_with(what.strip() or reason, row.remedy), retry or row.retry)


def ending_with(what: str, remedy: str) -> str:
    """A message: what happened, as a sentence, and the way out."""
    stop = "" if what.endswith((".", "!", "?", "…")) else "."
    return cut(f"{cut(what, 800)}{stop} {remedy}")


# --- an attempt that ended -------------------------------------------------------------------------------------------

Judge = Callable[[StagePod], Failure | None]


DISRUPTIONS = {
    "PreemptionByScheduler": (Reason.PREEMPTED, "gave way to a pod of higher priority"),
    "EvictionByEvictionAPI": (Reason.EVICTED, "was evicted, as by a drained node"),
    "DeletionByTaintManager": (Reason.EVICTED, "was told to leave its node, which has a NoExecute taint"),
    "DeletionByPodGC": (Reason.NODE_LOST, "was on a node that is gone"),
    "TerminationByKubelet": (Reason.EVICTED, "was ended by its node"),
}
"""By the reason of the condition DisruptionTarget: what became of the pod."""
SOME_DISRUPTION = (Reason.EVICTED, "was taken away")

OWN_EXCESS = ("exceeded its local ephemeral storage limit", "usage exceeds the total limit", "Usage of EmptyDir volume")
"""What a kubelet says of a pod that took more disk than its own limits allow: nobody else's fault."""


def _disrupted(pod: StagePod) -> Failure | None:
    if pod.lost:
        return failure(Reason.NODE_LOST, f"Pod {pod.name} was on a node that is not heard of any more")
    if pod.disruption is None and pod.reason != "Evicted":
        return None
    reason, became = DISRUPTIONS.get(pod.disruption or "TerminationByKubelet", SOME_DISRUPTION)
    said = (pod.message or pod.disruption_message).strip()
    own = any(excess in said for excess in OWN_EXCESS)
    return failure(reason, f"Pod {pod.name} {became}{f': {said}' if said else ''}", Retry.COUNTED if own else None)


REFUSED_BY_NODE = re.compile(
    r"OutOf\w+|NodeAffinity|NodeName|NodePorts|TaintToleration|\w+AdmissionError|NodeShutdown|Terminated"
)
"""Predicates that a kubelet asks again, and its own (pkg/kubelet/lifecycle of Kubernetes)."""


def _refused_by_node(pod: StagePod) -> Failure | None:
    """A kubelet ends a pod before it begins, where the scheduler was mistaken about the node."""
    if pod.phase != "Failed" or pod.exit_code is not None or not REFUSED_BY_NODE.fullmatch(pod.reason):
        return None
    return failure(Reason.NODE_REFUSED, f"The node would not take pod {pod.name} ({pod.reason}): {pod.message}")


def _out_of_host_memory(pod: StagePod) -> Failure | None:
    at_once = pod.exit_reason == "StartError" and "OOM-killed" in pod.words
    if pod.exit_reason != "OOMKilled" and not at_once:
        return None
    return failure(Reason.OUT_OF_HOST_MEMORY, f"Stage {pod.step} took more memory than its limit and was killed")


def _said(pod: StagePod) -> Failure | None:
    """The trainer's own word. It names the way out itself, so ours is not added; healing adds its own."""
    word = pod.last_word
    if word is None or word.reason is Said.COMPLETED:
        return None
    return Failure(word.reason, cut(word.message.strip() or word.reason), TABLE[word.reason].retry)


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


JUDGES: tuple[Judge, ...] = (_disrupted, _refused_by_node, _out_of_host_memory, _said, _exit_code, _unknown, _lost_word)

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
    found = parting(gang) if gang.size > 1 else None
    return None if found is None or found.reason in LATE_REASONS else found


def parting(gang: Gang) -> Failure | None:
    """The strongest evidence of those that have ended or leave. It is there to be seen only as long as they are."""
    return _strongest(replace(gang, pods=tuple(pod for pod in gang.pods if pod.ended or pod.gone_by is not None)))


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
        return waiting(Reason.IMAGE_PULL_FAILED, what)
    if pod.waiting_reason in START_REASONS:
        what = f"The container cannot start ({pod.waiting_reason}): {pod.waiting_message}"
        return waiting(Reason.CANNOT_START, what)
    if pod.unschedulable is not None:
        return _unschedulable(pod.unschedulable, pod.claims)
    return _on_node(warnings)


def waiting(reason: str, what: str, remedy: str | None = None) -> Failure:
    """Something that keeps a pod from running; where the table does not say that it waits, waiting has an end."""
    row = TABLE[reason]
    message = f"{cut(what.strip().rstrip('.:'), 800)}. {remedy or row.remedy}"
    return Failure(reason, cut(message), Retry.NEVER, deadline=row.retry is not Retry.WAITS)


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
        return waiting(Reason.QUOTA_EXCEEDED, refused.removeprefix("FailedCreate: "))
    what = f"The pod was refused: {refused.removeprefix('FailedCreate: ')}"
    remedy = next((remedy for name, remedy in NAME_REMEDIES if name in refused), None)
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
        which = f"Claim {claims[0]}" if len(claims) == 1 else f"One of the claims {', '.join(claims)}"
        what = f"{which if claims else 'A claim'} has no volume yet: {STRAY.sub('', said.rstrip())}"
        return waiting(Reason.VOLUME_UNBOUND, what)
    return waiting(Reason.UNSCHEDULABLE, f"No node can take the pod: {said}")


STILL_ATTACHED = (
    "It starts once the other node lets go of the volume: if that node is lost, delete it or give it the taint "
    "node.kubernetes.io/out-of-service."
)


def _on_node(warnings: tuple[str, ...]) -> Failure | None:
    """What a kubelet cannot do before it pulls the image: told by Events only."""
    held = next((warning for warning in warnings if "Multi-Attach error" in warning), None)
    if held is not None:  # as after a node was lost: Kubernetes itself lets go of the volume in the end
        what = f"A volume cannot be mounted: {held.partition(': ')[2]}"
        return replace(waiting(Reason.MOUNT_FAILED, what, STILL_ATTACHED), deadline=False)
    for warning in warnings:
        reason, _, said = warning.partition(": ")
        if reason in {"FailedMount", "FailedAttachVolume"}:
            what = f"A volume cannot be mounted: {said}"
            return waiting(Reason.MOUNT_FAILED, what)
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
        return waiting(Reason.INVALID_SPEC, what)
    if "exceeded quota" in refusal.message:
        return waiting(Reason.QUOTA_EXCEEDED, what)
    return waiting(Reason.CREATION_REFUSED, what)


def refusal_of(refusal: Refusal) -> str:
    """How the message of a refusal begins."""
    return f"{refusal.kind} {refusal.name} cannot be created: "
