"""The Service by which the pods of one train stage find each other by name. Pure."""

from __future__ import annotations

from finetune_operator import names
from finetune_operator.api import JSON, FineTuneJob, Label
from finetune_operator.manifests.meta import build_labels, build_metadata
from finetune_trainer.config import RENDEZVOUS_PORT
from finetune_trainer.progress import Stage


def build_service(job: FineTuneJob) -> JSON:
    """Headless: names without an address of its own. Pods have theirs before they are ready, since they meet first."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": build_metadata(job, names.service(job)),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {**build_labels(job), Label.STAGE: Stage.TRAIN.value},
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
        },
    }
