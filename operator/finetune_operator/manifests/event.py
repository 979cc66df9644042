"""What is told under `kubectl describe`. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from finetune_operator import names
from finetune_operator.api import API_VERSION, JSON, KIND, MANAGER, FineTuneJob, cut, format_time


@dataclass(frozen=True)
class News:
    """What is to be told, once. `key` tells it from all other news about the same job."""

    key: str
    reason: str
    message: str
    warning: bool = False


def build_event(job: FineTuneJob, news: News, now: datetime) -> JSON:
    """One Event about the job, under the same name whenever the same news is told."""
    time = format_time(now)
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": names.event(job, news.key), "namespace": job.namespace},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": job.name,
            "namespace": job.namespace,
            "uid": job.uid,
            "resourceVersion": job.resource_version,
        },
        "type": "Warning" if news.warning else "Normal",
        "reason": news.reason,
        "message": cut(news.message),
        "source": {"component": MANAGER},
        "firstTimestamp": time,
        "lastTimestamp": time,
        "count": 1,
    }
