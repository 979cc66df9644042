"""Every object the operator makes. Pure: a job in, a manifest out; `kube` creates it."""

from finetune_operator.manifests.claim import build_claim
from finetune_operator.manifests.config import build_config_map
from finetune_operator.manifests.event import News, build_event
from finetune_operator.manifests.jobs import build_stage_job
from finetune_operator.manifests.service import build_service

__all__ = ["News", "build_claim", "build_config_map", "build_event", "build_service", "build_stage_job"]
