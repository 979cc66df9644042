"""A stand-in for Kueue: writes to Jobs and Workloads of one namespace what the real one was seen to write.

Kueue is not among what the local cluster builds; what Kueue at commit ff69552e, built from source, wrote was recorded:
the order of writes, conditions, reasons and messages below are those. It has one ClusterQueue with one flavor, no
borrowing, and makes lower priorities give way to higher ones. Its admission webhooks are absent, so that it suspends
Jobs after their creation.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from finetune_operator.queueing import JOB_UID_LABEL, KUEUE, PRIORITY_LABEL, QUEUE_LABEL
from tests.apiserver.api import JSON, RefusedError, Space, wait_for
from tests.apiserver.players import now

FINALIZER = f"{KUEUE}/resource-in-use"
STOPPING = f"{KUEUE}/stopping"
WORKLOAD = f"{KUEUE}/workload"
PRIORITIES = {"high": 1000, "low": -1000}
PAUSE_SECONDS = 0.05
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
GONE = None
"""In a merge patch: take it away."""

OPEN = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def build_crd(served: tuple[str, ...]) -> JSON:
    """Kueue's kind, open to whatever is written."""
    names = {"kind": "Workload", "listKind": "WorkloadList", "plural": "workloads", "singular": "workload"}
    schema = {"openAPIV3Schema": {"type": "object", "properties": {"spec": OPEN, "status": OPEN}}}
    versions = [
        {
            "name": version,
            "served": True,
            "storage": version == served[0],
            "subresources": {"status": {}},
            "schema": schema,
        }
        for version in served
    ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"workloads.{KUEUE}"},
        "spec": {"group": KUEUE, "scope": "Namespaced", "names": names, "versions": versions},
    }


@contextmanager
def workload_api(space: Space, *served: str) -> Iterator[None]:
    """Kueue's kind in these versions, for as long as this lasts."""
    crd = build_crd(served)
    space.call("POST", CRDS, crd)
    wait_for(lambda: space.api.get(space.path("workloads")), "Workloads in service")
    try:
        yield
    finally:
        space.call("DELETE", f"{CRDS}/{crd['metadata']['name']}")
        wait_for(lambda: space.api.get(space.path("workloads")) is None, "Workloads out of service")


@dataclass
class KueueStandIn:
    """Looks at all there is, again and again, and does the next thing."""

    space: Space
    quota: Mapping[str, int]
    """What all admitted Jobs may hold together, by resource; `pods` counts pods. What is not named is not counted."""
    queues: tuple[str, ...] = ("team-a",)
    refused: list[str] = field(default_factory=list)
    """What the API server did not do; most of it is a race that the next look settles."""
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[KueueStandIn]:
        """At work, for as long as this lasts; afterwards it holds nothing up any more."""
        thread = threading.Thread(target=self._loop, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
            for workload in self.space.all("workloads"):
                self._take_finalizer(workload)

    def _loop(self) -> None:
        while not self._stop.wait(PAUSE_SECONDS):
            try:
                self._look()
            except (RefusedError, OSError) as error:  # the latter is a call without an answer in time
                self.refused.append(str(error))

    def _look(self) -> None:
        jobs = {body["metadata"]["uid"]: body for body in self.space.all("jobs") if queue_of(body)}
        workloads = {body["metadata"]["labels"][JOB_UID_LABEL]: body for body in self.space.all("workloads")}
        for uid, workload in workloads.items():
            if uid not in jobs:
                self._let_go(workload, "OwnerNotFound")
        for uid, job in jobs.items():
            self._settle(job, workloads.get(uid))
        self._schedule([(jobs[uid], workload) for uid, workload in workloads.items() if uid in jobs])

    # --- one Job

    def _settle(self, job: JSON, workload: JSON | None) -> None:
        """Bring a Job and its Workload into step."""
        if workload is None or "deletionTimestamp" in workload["metadata"]:
            self._renew(job, workload)
        elif (end := ending(job)) is not None:
            self._let_go(workload, end)
        elif is_evicted(workload) or not is_reserved(workload):
            self._hold(job, workload)
        elif job["spec"]["suspend"]:
            self._let_run(job, workload)
        elif workload["spec"]["active"] is False:
            self._evict(workload, "Deactivated", "The workload is deactivated")

    def _renew(self, job: JSON, workload: JSON | None) -> None:
        """A Job without a Workload, or with one that is being deleted, gets a new one once it has stopped."""
        if ending(job) is not None or "deletionTimestamp" in job["metadata"]:
            return
        if not self._stop_job(job):
            return
        if workload is not None:
            self._take_finalizer(workload)
            return
        self.space.create("workloads", build_workload(job))

    def _hold(self, job: JSON, workload: JSON) -> None:
        """A Job without admission is kept from running; one that was evicted gives its quota back once it stands."""
        if not self._stop_job(job) or not is_evicted(workload):
            return
        evicted = condition(workload, "Evicted")
        requeued = "False" if evicted["reason"] == "Deactivated" else "True"
        self._tell(
            workload,
            ("QuotaReserved", "False", "WaitingForQuota", evicted["message"]),
            ("Admitted", "False", "NoReservation", "The workload has no reservation"),
            ("Requeued", requeued, evicted["reason"], evicted["message"]),
            admission=GONE,
        )

    def _stop_job(self, job: JSON) -> bool:
        """Whether the Job stands, with the template that it was made with; else the next step towards that is done."""
        name, metadata, status = job["metadata"]["name"], job["metadata"], job.get("status", {})
        if not job["spec"]["suspend"]:
            self.space.merge("jobs", name, {"metadata": {"annotations": {STOPPING: "true"}}, "spec": {"suspend": True}})
            self.space.merge("jobs", f"{name}/status", {"status": {"startTime": GONE}})
            return False
        if status.get("startTime"):
            self.space.merge("jobs", f"{name}/status", {"status": {"startTime": GONE}})
            return False
        suspended = any(c["type"] == "Suspended" and c["status"] == "True" for c in status.get("conditions", ()))
        if status.get("active") or not suspended:
            return False
        if STOPPING in metadata.get("annotations", {}) or WORKLOAD in template(job).get("annotations", {}):
            bare = {"labels": dict.fromkeys(template_labels("", ""), GONE), "annotations": {WORKLOAD: GONE}}
            patch = {"metadata": {"annotations": {STOPPING: GONE}}, "spec": {"template": {"metadata": bare}}}
            self.space.merge("jobs", name, patch)
        return True

    def _let_run(self, job: JSON, workload: JSON) -> None:
        """The one write by which an admitted Job begins."""
        marks = {
            "labels": template_labels(queue_of(job), workload["status"]["admission"]["clusterQueue"]),
            "annotations": {WORKLOAD: workload["metadata"]["name"]},
        }
        patch = {"spec": {"suspend": False, "template": {"metadata": marks}}}
        self.space.merge("jobs", job["metadata"]["name"], patch)

    def _let_go(self, workload: JSON, reason: str) -> None:
        """Its Job has ended or is gone."""
        if not is_true(workload, "Finished"):
            self._tell(workload, ("Finished", "True", reason, f"Job: {reason}"))
        self._take_finalizer(workload)
        if reason == "OwnerNotFound":
            with suppress(RefusedError):
                self.space.delete("workloads", workload["metadata"]["name"])

    def _take_finalizer(self, workload: JSON) -> None:
        if workload["metadata"].get("finalizers"):
            self.space.merge("workloads", workload["metadata"]["name"], {"metadata": {"finalizers": []}})

    # --- the queue

    def _schedule(self, pairs: list[tuple[JSON, JSON]]) -> None:
        """Admit what fits, the highest priority first; where it does not fit, lower ones make way."""
        live = [(job, wl) for job, wl in pairs if not is_true(wl, "Finished") and wl["spec"]["active"] is not False]
        holding = [(job, wl) for job, wl in live if is_reserved(wl)]
        waiting = [(job, wl) for job, wl in live if not is_reserved(wl) and is_standing(job)]
        for job, workload in sorted(waiting, key=lambda pair: in_line(pair[0])):
            if self._admit(job, workload, holding):
                return  # and look again: what there is has changed

    def _admit(self, job: JSON, workload: JSON, holding: list[tuple[JSON, JSON]]) -> bool:
        if queue_of(job) not in self.queues:
            return self._wait(workload, "Misconfigured", f"LocalQueue {queue_of(job)} doesn't exist")
        need = demand(job)
        for resource, total in self.quota.items():
            used = sum(demand(other).get(resource, 0) for other, _ in holding)
            asked = need.get(resource, 0)
            said = f"couldn't assign flavors to pod set main: insufficient {{}}quota for {resource} in flavor gpu, "
            if asked > total:
                most = f"previously considered podsets requests (0) + current podset request ({asked}) > maximum"
                return self._wait(workload, "ExceedsMaxQuota", f"{said.format('')}{most} capacity ({total})")
            if asked > total - used:
                short = f"{said.format('unused ')}{asked - (total - used)} more needed"
                return self._make_way(job, workload, holding, short)
        self._reserve(workload)
        return True

    def _reserve(self, workload: JSON) -> None:
        """One write: the admission, and what was before is past."""
        past = [
            (kind, "False", "QuotaReserved", f"Previously: {condition(workload, kind)['message']}")
            for kind in ("Evicted", "Preempted")
            if is_true(workload, kind)
        ]
        self._tell(
            workload,
            ("QuotaReserved", "True", "QuotaReserved", "Quota reserved in ClusterQueue gpus"),
            ("Admitted", "True", "Admitted", "The workload is admitted"),
            *past,
            admission={"clusterQueue": "gpus", "podSetAssignments": [{"name": "main"}]},
        )

    def _make_way(self, job: JSON, workload: JSON, holding: list[tuple[JSON, JSON]], short: str) -> bool:
        lower = [wl for other, wl in holding if priority(other) < priority(job)]
        if not lower:
            return self._wait(workload, "WaitingForQuota", short)
        for victim in lower:
            if not is_evicted(victim):
                why = "due to prioritization in the ClusterQueue; preemptor path: /gpus; preemptee path: /gpus"
                uids = f"(UID: {workload['metadata']['uid']}, JobUID: {job['metadata']['uid']})"
                self._evict(victim, "Preempted", f"Preempted to accommodate a workload {uids} {why}")
        pending = f"{short}. Pending the preemption of {len(lower)} workload(s)"
        return self._wait(workload, "WaitingForPreemptedWorkloads", pending)

    def _wait(self, workload: JSON, reason: str, message: str) -> bool:
        no = ("Admitted", "False", "NoReservation", "The workload has no reservation")
        self._tell(workload, ("QuotaReserved", "False", reason, message), no)
        return False

    def _evict(self, workload: JSON, reason: str, message: str) -> None:
        preempted = [("Preempted", "True", "InClusterQueue", message)] if reason == "Preempted" else []
        self._tell(workload, ("Evicted", "True", reason, message), *preempted)

    def _tell(self, workload: JSON, *told: tuple[str, str, str, str], **status: Any) -> None:
        """Conditions, and what else the status says, in one write if there is anything new."""
        before = {c["type"]: c for c in workload.get("status", {}).get("conditions", ())}
        after = before | {kind: told_as(before.get(kind), kind, *rest) for kind, *rest in told}
        if after == before and not status:
            return
        body = {"status": {"conditions": list(after.values()), **status}}
        told_body = self.space.merge("workloads", f"{workload['metadata']['name']}/status", body)
        workload["status"] = told_body["status"]


def told_as(before: JSON | None, kind: str, status: str, reason: str, message: str) -> JSON:
    since = before["lastTransitionTime"] if before is not None and before["status"] == status else now()
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": since}


# --- what is read of Jobs and Workloads


def queue_of(job: JSON) -> str:
    found: str = job["metadata"].get("labels", {}).get(QUEUE_LABEL, "")
    return found


def priority(job: JSON) -> int:
    return PRIORITIES.get(job["metadata"]["labels"].get(PRIORITY_LABEL, ""), 0)


def in_line(job: JSON) -> tuple[int, str, str]:
    return -priority(job), job["metadata"]["creationTimestamp"], job["metadata"]["name"]


def demand(job: JSON) -> dict[str, int]:
    """What the pods of a Job ask for together."""
    pods = job["spec"]["parallelism"]
    limits = job["spec"]["template"]["spec"]["containers"][0]["resources"].get("limits", {})
    return {"pods": pods} | {name: int(amount) * pods for name, amount in limits.items() if amount.isdecimal()}


def ending(job: JSON) -> str | None:
    done = {c["type"] for c in job.get("status", {}).get("conditions", ()) if c["status"] == "True"}
    return "Succeeded" if "Complete" in done else "Failed" if "Failed" in done else None


def is_standing(job: JSON) -> bool:
    return job["spec"]["suspend"] is True and "startTime" not in job.get("status", {})


def template(job: JSON) -> JSON:
    found: JSON = job["spec"]["template"]["metadata"]
    return found


def template_labels(queue: str, cluster_queue: str) -> dict[str, str]:
    names = {"cluster-queue-name": cluster_queue, "local-queue-name": queue, "podset": "main"}
    return {f"{KUEUE}/{name}": value for name, value in names.items()}


def condition(workload: JSON, kind: str) -> JSON:
    return next((c for c in workload.get("status", {}).get("conditions", ()) if c["type"] == kind), {})


def is_true(workload: JSON, kind: str) -> bool:
    return condition(workload, kind).get("status") == "True"


def is_reserved(workload: JSON) -> bool:
    return is_true(workload, "QuotaReserved")


def is_evicted(workload: JSON) -> bool:
    """Evicted, and not yet in line again."""
    return is_true(workload, "Evicted") and is_reserved(workload)


def build_workload(job: JSON) -> JSON:
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid, "controller": True}
    return {
        "apiVersion": f"{KUEUE}/v1beta1",
        "kind": "Workload",
        "metadata": {
            "name": f"job-{name}-{hashlib.sha256(uid.encode()).hexdigest()[:5]}",
            "labels": {JOB_UID_LABEL: uid},
            "finalizers": [FINALIZER],
            "ownerReferences": [owner],
        },
        "spec": {
            "active": True,
            "queueName": queue_of(job),
            "priority": priority(job),
            "podSets": [{"name": "main", "count": job["spec"]["parallelism"]}],
        },
    }
