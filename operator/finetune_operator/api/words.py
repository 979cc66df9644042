"""Names, limits and forms that everything about the resource shares."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from finetune_trainer.progress import MESSAGE_LIMIT_CHARACTERS

GROUP = "finetune.dev"
VERSION = "v1alpha1"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
API_VERSION = f"{GROUP}/{VERSION}"
MANAGER = "finetune-operator"
"""Field manager, value of the managed-by label, and reporter of events."""

NAME_LIMIT_CHARACTERS = 40
ATTEMPTS_KEPT = 10
DATASETS_KEPT = 32
"""16 to train on and 16 to measure on."""

JSON = dict[str, Any]
"""An object as the API server speaks it."""


class Label:
    """Labels of everything the operator makes."""

    MANAGED_BY = "app.kubernetes.io/managed-by"
    JOB_NAME = f"{GROUP}/job-name"
    JOB_UID = f"{GROUP}/job-uid"
    STAGE = f"{GROUP}/stage"
    ATTEMPT = f"{GROUP}/attempt"
    INDEX = "batch.kubernetes.io/job-completion-index"
    """Kubernetes' own annotation of the pods of an Indexed Job."""


OVERRIDES_ANNOTATION = f"{GROUP}/overrides"
"""Of a stage's Job: what its pods were told to change of the resolved settings, as JSON."""


def parse_time(text: str) -> datetime:
    """An RFC 3339 time, with or without fractions."""
    return datetime.fromisoformat(text)


def format_time(time: datetime) -> str:
    """As Kubernetes writes times: UTC, whole seconds."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def cut(text: str, limit: int = MESSAGE_LIMIT_CHARACTERS) -> str:
    """The text, or its begin and an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
