"""The trainer's configuration as a ConfigMap. Pure."""

from __future__ import annotations

from finetune_operator import names
from finetune_operator.api import JSON, FineTuneJob
from finetune_operator.manifests.meta import build_metadata


def build_config_map(job: FineTuneJob) -> JSON:
    """The training half of the spec, byte for byte the same in every pass; immutable like the spec."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": build_metadata(job, names.config_map(job)),
        "immutable": True,
        "data": {names.CONFIG_FILE: job.valid_spec.config.to_json()},
    }
