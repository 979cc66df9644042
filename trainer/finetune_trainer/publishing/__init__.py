"""Finished artifacts put where others fetch them: verified, resumable, and whole or not to be seen.

s3, oci, hub     what is there, and what makes a file be there
delivery         a parcel brought to its place, whatever breaks off
card, licence    what people read of the model, written from the run
base             what those are made of
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_trainer.config import HuggingFaceTarget, OciTarget, S3Target
from finetune_trainer.sources import read_keys, read_login, read_token

if TYPE_CHECKING:
    from finetune_trainer.config import JobConfig, Publish
    from finetune_trainer.publishing.base import Sink
    from finetune_trainer.runtime.context import Context


def check_credentials(config: JobConfig, context: Context) -> None:
    """See, without asking anybody, that every place's credentials are there. AccessDenied, InvalidConfig, NotFound."""
    for slot, field, entry in config.destinations_seen_early():
        build_sink(slot, field, entry, context)


def build_sink(slot: str, field: str, entry: Publish, context: Context) -> Sink:
    """The place that an entry names, with the credentials of its slot. InvalidConfig, NotFound."""
    from finetune_trainer.publishing import hub, oci, s3  # noqa: PLC0415 - their clients are slow to load

    match entry.kind:
        case HuggingFaceTarget() as kind:
            return hub.HubSink(kind, field, read_token(slot, f"{field}.huggingFace", kind, context))
        case S3Target() as kind:
            return s3.S3Sink(kind, field, read_keys(slot, f"{field}.s3", kind, context))
        case OciTarget() as kind:
            return oci.OciSink(kind, field, read_login(slot, f"{field}.oci", kind, context))
