"""What all children have in common: labels and the owner."""

from __future__ import annotations

from finetune_operator.api import API_VERSION, JSON, KIND, MANAGER, FineTuneJob, Label


def build_labels(job: FineTuneJob) -> dict[str, str]:
    """Labels by which the children of a job are found, and told from those of a namesake."""
    return {Label.MANAGED_BY: MANAGER, Label.JOB_NAME: job.name, Label.JOB_UID: job.uid}


def build_owner(job: FineTuneJob) -> JSON:
    """The reference by which a child goes when its job goes. Blocks nothing, so it needs no right to finalizers."""
    return {"apiVersion": API_VERSION, "kind": KIND, "name": job.name, "uid": job.uid, "controller": True}


def build_metadata(job: FineTuneJob, name: str, labels: dict[str, str] | None = None) -> JSON:
    """Metadata of a child that goes with its job."""
    return {
        "name": name,
        "namespace": job.namespace,
        "labels": build_labels(job) | (labels or {}),
        "ownerReferences": [build_owner(job)],
    }
