"""What is told under `kubectl describe`. Pure."""

from __future__ import annotations

from datetime import datetime

from finetune_operator.api import API_VERSION, JSON, KIND, MANAGER, FineTuneJob, cut, format_time


def build_event(job: FineTuneJob, name: str, reason: str, message: str, *, warning: bool, now: datetime) -> JSON:
    """One Event about the job. The name is the caller's, so that the same news is told once."""
    time = format_time(now)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": job.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": job.name,
            "namespace": job.namespace,
            "uid": job.uid,
            "resourceVersion": job.resource_version,
        },
        "type": "Warning" if warning else "Normal",
        "reason": reason,
        "message": cut(message),
        "source": {"component": MANAGER},
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
