"""The claim a job works in, where it does not bring one. Pure."""

from __future__ import annotations

from finetune_operator import names
from finetune_operator.api import JSON, FineTuneJob
from finetune_operator.manifests.meta import build_metadata
from finetune_operator.settings import Settings


def build_claim(job: FineTuneJob, settings: Settings) -> JSON | None:
    """The claim to make, or None where the job uses one that exists.

    Retained claims have no owner: they outlive the job, and its namesake gets another name (it carries the uid).
    """
    wish = job.valid_spec.created_claim
    if wish is None:
        return None
    metadata = build_metadata(job, names.folder(job))
    if job.valid_spec.keeps_claim:
        del metadata["ownerReferences"]
    modes = [str(mode) for mode in wish.access_modes or (settings.default_access_mode,)]
    spec: JSON = {
        "accessModes": modes,
        "resources": {"requests": {"storage": wish.size or settings.default_volume_size}},
    }
    storage_class = wish.storage_class_name or settings.default_storage_class
    if storage_class:
        spec["storageClassName"] = storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}
