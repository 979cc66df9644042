"""Queueing with Kueue: the labels that ask for it, and why a queued Job waits. Pure.

Kueue holds a Job by its `spec.suspend` and says why in the conditions of the Job's Workload alone. The operator makes
such a Job suspended, reads its Workload while it waits, and leaves suspending, resuming and the pod template to Kueue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_operator.api import JSON, FineTuneJob, cut

KUEUE = "kueue.x-k8s.io"
QUEUE_LABEL = f"{KUEUE}/queue-name"
"""On a Job: the LocalQueue that it waits in. Without it Kueue leaves the Job alone."""

PRIORITY_LABEL = f"{KUEUE}/priority-class"
"""On a Job: its WorkloadPriorityClass, which decides who makes way for whom."""

JOB_UID_LABEL = f"{KUEUE}/job-uid"
"""On a Workload: the Job that it stands for."""

ADMITTED = "Admitted"
NOT_TAKEN_UP = "NotTakenUp"
NO_KUEUE = "NoKueue"
HELD_BY_HAND = "HeldByHand"

REMEDIES = {
    "WaitingForQuota": "It starts when others in the queue end, or the queue gets more quota.",
    "WaitingForPreemptedWorkloads": "It starts when those that make way for it have stopped.",
    "ExceedsMaxQuota": (
        "It can never start in this queue: ask for less in a job of a new name, use another queue, or have it enlarged."
    ),
    "NoMatchingFlavor": "Correct pod.nodeSelector or pod.tolerations in a job of a new name, or use another queue.",
    "Misconfigured": (
        f"Have LocalQueue {{queue}} put in order in this namespace, or correct the label {QUEUE_LABEL} and set"
        " spec.suspend to true and back to false."
    ),
    "Suspended": "It waits until who administers LocalQueue {queue} lets it go on.",
    "Preempted": "It goes on from its last checkpoint when it is admitted again; this does not count as a retry.",
    "Deactivated": "It waits until spec.active of Workload {workload} is true again.",
}
REMEDIES["Inadmissible"] = REMEDIES["Misconfigured"]
"""What to do, by the reasons that Kueue gives; `Inadmissible` is an older word for `Misconfigured`."""

WAITING = "It waits in LocalQueue {queue} until Kueue admits it."
"""For reasons that are not listed here."""

NO_KUEUE_MESSAGE = (
    f"Job {{job}} has the label {QUEUE_LABEL}, but this cluster has no Kueue that could ever start it. Install Kueue,"
    " or take the label off and set spec.suspend to true and back to false."
)
HELD_BY_HAND_MESSAGE = (
    "Somebody suspended Job {job}, which is in no queue. Set its spec.suspend to false; to hold the job back, set"
    " spec.suspend of the FineTuneJob."
)
NOT_TAKEN_UP_MESSAGE = (
    "Kueue has not taken up Job {job} yet. If this stays so, check that Kueue runs and manages Jobs of this namespace."
)


@dataclass(frozen=True)
class Queueing:
    """How a Job that asks for a queue fares there."""

    reason: str
    message: str
    reserved: bool = False
    """Whether quota is set aside for it, and not about to be taken away."""

    @property
    def admitted(self) -> bool:
        """Whether Kueue lets it run."""
        return self.reason == ADMITTED


def build_queue_labels(job: FineTuneJob) -> dict[str, str]:
    """Kueue's labels for a stage's Job: those of the FineTuneJob."""
    return {name: job.labels[name] for name in (QUEUE_LABEL, PRIORITY_LABEL) if job.labels.get(name)}


def admitted(job: str, queue: str) -> Queueing:
    """Of a Job that Kueue lets run."""
    return Queueing(ADMITTED, f"Kueue has admitted Job {job} from LocalQueue {queue}.", reserved=True)


def parse_waiting(job: str, queue: str, workloads: Sequence[JSON] | None) -> Queueing:
    """Why a suspended Job waits, from its Workloads (one, or none yet); None where the cluster has no Kueue."""
    if not queue:
        return Queueing(HELD_BY_HAND, HELD_BY_HAND_MESSAGE.format(job=job))
    if workloads is None:
        return Queueing(NO_KUEUE, NO_KUEUE_MESSAGE.format(job=job))
    if not workloads:
        return Queueing(NOT_TAKEN_UP, NOT_TAKEN_UP_MESSAGE.format(job=job))
    return _parse_workload(workloads[0], queue)


def _parse_workload(body: Mapping[str, Any], queue: str) -> Queueing:
    """What its conditions say: an eviction that stands first, then why there is no quota, or what else is missing."""
    conditions = {c["type"]: c for c in (body.get("status") or {}).get("conditions") or ()}
    quota, evicted = conditions.get("QuotaReserved") or {}, conditions.get("Evicted") or {}
    reserved = quota.get("status") == "True"
    lacking = (conditions.get("Admitted") or {}) if reserved else quota
    if evicted.get("status") != "True":
        evicted = {}
    told = evicted or lacking
    reason = told.get("reason") or NOT_TAKEN_UP
    remedy = REMEDIES.get(reason, WAITING).format(queue=queue, workload=body["metadata"]["name"])
    said = [_sentence(told.get("message") or "Kueue has not said yet why it waits"), remedy]
    if evicted and not reserved and lacking.get("message") not in (None, "", evicted.get("message")):
        said.append(f"Now: {_sentence(lacking['message'])}")
    return Queueing(reason, cut(" ".join(said)), reserved and not evicted)


def _sentence(text: str) -> str:
    return f"{cut(text.strip().rstrip('.'), 450)}."
