"""Every reason that a status gives: what it means, whether the stage is run again, and the way out. The one table.

`python -m finetune_operator.reasons` prints it for docs/failures.md. What the trainer says of itself stands here under
its own words (`finetune_trainer.progress.Reason`), beside what the operator finds.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum

from finetune_trainer.progress import Reason as Said


class Reason(StrEnum):
    """What the operator itself finds; what the trainer says of itself is `finetune_trainer.progress.Reason`."""

    COMPLETED = "Completed"
    PREEMPTED = "Preempted"
    NODE_LOST = "NodeLost"
    EVICTED = "Evicted"
    NODE_REFUSED = "NodeRefused"
    OUT_OF_HOST_MEMORY = "OutOfHostMemory"
    STALLED_TRAINING = "StalledTraining"
    STALLED = "Stalled"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    CANCELLED = "Cancelled"
    SUSPENDED = "Suspended"
    LOST_WORD = "LostWord"
    POD_LOST = "PodLost"
    JOB_DELETED = "JobDeleted"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CANNOT_START = "CannotStart"
    MOUNT_FAILED = "MountFailed"
    VOLUME_UNBOUND = "VolumeUnbound"
    POD_REFUSED = "PodRefused"
    UNSCHEDULABLE = "Unschedulable"
    QUOTA_EXCEEDED = "QuotaExceeded"
    CREATION_REFUSED = "CreationRefused"
    INVALID_SPEC = "InvalidSpec"
    NAME_CONFLICT = "NameConflict"
    NOT_ALLOWED = "NotAllowed"
    UNKNOWN = "Unknown"


class Retry(StrEnum):
    """Whether a stage is run again after a failure."""

    FREE = "Free"
    """Nobody's fault: again, and it does not count against maxRetries."""
    COUNTED = "Counted"
    NEVER = "Never"
    """Only a person can mend it."""
    WAITS = "Waits"
    """No failure: it goes on by itself once what it waits for is there."""


@dataclass(frozen=True)
class Row:
    """One reason."""

    retry: Retry
    means: str
    remedy: str


TABLE: dict[str, Row] = {
    # --- the trainer's own words
    Said.INVALID_CONFIG: Row(
        Retry.NEVER,
        "A field of the spec, or fields that do not go together.",
        "Correct the spec and apply it under a new name.",
    ),
    Said.INVALID_DATASET: Row(
        Retry.NEVER,
        "A row, a file or a column of a dataset.",
        "Correct the dataset or its columns and apply the job under a new name.",
    ),
    Said.INVALID_MODEL: Row(
        Retry.NEVER,
        "The base model's files.",
        "Name a folder with config, tokenizer and safetensors, or one GGUF file.",
    ),
    Said.NOT_FOUND: Row(
        Retry.NEVER,
        "A file or a repository is not there.",
        "Correct the path or put the files there, then apply the job under a new name.",
    ),
    Said.ACCESS_DENIED: Row(
        Retry.NEVER,
        "A token or a permission is missing.",
        "Check the Secret that the source or the place names, and who may read or write there.",
    ),
    Said.VOLUME_FULL: Row(
        Retry.NEVER,
        "No space is left on the work volume.",
        "Give output.volume more space; the last good checkpoint is kept.",
    ),
    Said.OUT_OF_MEMORY: Row(
        Retry.NEVER,
        "The GPU's memory does not suffice: so a stage found, or prepare before a GPU is held, where pod.gpuMemory is "
        "set. As long as a smaller micro-batch or full checkpointing may help, training is run again with these, "
        "uncounted.",
        "Use baseWeights NF4, a shorter maxLength or a larger GPU.",
    ),
    Said.NON_FINITE_LOSS: Row(
        Retry.NEVER,
        "The loss became zero, NaN or infinite.",
        "Lower training.learningRate, or compute in BF16 or FP32.",
    ),
    Said.VERIFICATION_FAILED: Row(
        Retry.COUNTED,
        "A file is not what its manifest says.",
        "What was read is not what was written: check the volume.",
    ),
    Said.GATE_FAILED: Row(
        Retry.NEVER,
        "What came out is measured worse than a gate of the spec allows; it was not published.",
        "The message has both figures and what to change; or apply the job under a new name with a wider gate.",
    ),
    Said.RENDEZVOUS_FAILED: Row(
        Retry.COUNTED,
        "The pods of a stage did not meet in time.",
        "The pods of a stage meet at the first one's name: check the cluster's DNS and network policies.",
    ),
    Said.PEER_LOST: Row(
        Retry.COUNTED,
        "Another pod of the stage was lost, and nothing says why.",
        "It goes on from its last checkpoint; check the network between the nodes.",
    ),
    Said.INTERRUPTED: Row(
        Retry.FREE, "The pod was told to leave, saved and left.", "It goes on from its last checkpoint."
    ),
    # --- what the operator finds of pods that ended
    Reason.PREEMPTED: Row(
        Retry.FREE,
        "A pod of higher priority needed the room.",
        "It goes on from its last checkpoint once there is room; pod.priorityClassName says who yields to whom.",
    ),
    Reason.NODE_LOST: Row(
        Retry.FREE,
        "The node is not heard of any more, or is gone.",
        "It goes on from its last checkpoint on another node; what the lost pod still does changes nothing.",
    ),
    Reason.EVICTED: Row(
        Retry.FREE,
        "The node was drained, shut down, tainted or short of memory or disk. Counted where the pod itself took more "
        "disk than its limit.",
        "It goes on from its last checkpoint; where nodes run short, raise pod.resources.requests.",
    ),
    Reason.NODE_REFUSED: Row(
        Retry.FREE,
        "The node would not take the pod that was given to it.",
        "It is run again, on another node where there is one.",
    ),
    Reason.OUT_OF_HOST_MEMORY: Row(
        Retry.NEVER,
        "The pod took more memory than its limit and was killed.",
        "Raise pod.resources.limits.memory, set training.offload to Off if status.resolved.offloads is true, or use a "
        "smaller perDeviceTrainBatchSize or maxLength.",
    ),
    Reason.STALLED_TRAINING: Row(
        Retry.COUNTED,
        "Training made no step for runPolicy.stallTimeoutSeconds: a hung rank, or a collective that never ends.",
        "It goes on from its last checkpoint; if single steps take that long, raise runPolicy.stallTimeoutSeconds.",
    ),
    Reason.STALLED: Row(
        Retry.COUNTED,
        "Another stage made no progress for runPolicy.stallTimeoutSeconds.",
        "It is run again; check the volume and the network, or raise runPolicy.stallTimeoutSeconds.",
    ),
    Reason.LOST_WORD: Row(
        Retry.FREE,
        "The stage ended well without a last word that proves it.",
        "It is run again and ends at once if its manifest holds.",
    ),
    Reason.POD_LOST: Row(
        Retry.FREE,
        "The pod vanished without saying why.",
        "The stage is run again; this does not count as a retry.",
    ),
    Reason.JOB_DELETED: Row(
        Retry.FREE,
        "Somebody deleted the stage's Job.",
        "To stop a job, set spec.suspend or spec.cancel, or delete the FineTuneJob; the stage is run again.",
    ),
    Reason.UNKNOWN: Row(
        Retry.COUNTED,
        "Anything else; the message ends with the last lines of the log.",
        "See the log of the stage's Job.",
    ),
    # --- what the operator finds of pods that do not start: ended by a deadline
    Reason.IMAGE_PULL_FAILED: Row(
        Retry.NEVER,
        "The trainer's image cannot be pulled.",
        "Check the image's name and pod.imagePullSecrets.",
    ),
    Reason.CANNOT_START: Row(
        Retry.NEVER,
        "The container, or the pod around it, cannot be set up.",
        "Check that the Secrets and keys that the spec names exist.",
    ),
    Reason.MOUNT_FAILED: Row(
        Retry.NEVER, "A volume cannot be mounted.", "Check the claims and secrets that the spec names."
    ),
    Reason.VOLUME_UNBOUND: Row(
        Retry.NEVER,
        "A claim is not there, or has no volume.",
        "Check that the claim's StorageClass exists and can make volumes.",
    ),
    Reason.POD_REFUSED: Row(
        Retry.NEVER, "The API server would not make the pod.", "Ask who administers the namespace's policies."
    ),
    Reason.UNSCHEDULABLE: Row(
        Retry.WAITS,
        "No node has room; the message says what is missing on how many nodes.",
        "It waits until a node has room; lower pod.resources or parallelism, or add nodes, if none ever will.",
    ),
    Reason.QUOTA_EXCEEDED: Row(
        Retry.WAITS,
        "The namespace's quota is used up.",
        "It waits until the namespace's quota has room, or the quota is raised.",
    ),
    Reason.CREATION_REFUSED: Row(
        Retry.WAITS,
        "The API server would not make a child of the job: a webhook, a right that lacks.",
        "It is tried again; ask who administers the namespace's policies and webhooks if this stays so.",
    ),
    # --- the job itself
    Reason.NAME_CONFLICT: Row(
        Retry.NEVER,
        "An object of the same name is there and is not this job's.",
        "Delete or rename it, or give the FineTuneJob another name.",
    ),
    Reason.INVALID_SPEC: Row(
        Retry.NEVER,
        "The stored spec makes no sense to this operator.",
        "Correct the spec and apply it under a new name.",
    ),
    Reason.NOT_ALLOWED: Row(
        Retry.NEVER,
        "The administrator does not allow what the spec asks for.",
        "Leave it out, or ask for it, then apply the job under a new name.",
    ),
    Reason.DEADLINE_EXCEEDED: Row(
        Retry.NEVER,
        "runPolicy.activeDeadlineSeconds or startDeadlineSeconds is over.",
        "What is there is kept; apply the job under a new name with a longer deadline.",
    ),
    Reason.SUSPENDED: Row(
        Retry.WAITS, "spec.suspend is true.", "Set spec.suspend to false to go on from the last checkpoint."
    ),
    Reason.CANCELLED: Row(
        Retry.NEVER, "spec.cancel is true.", "What is there is kept; apply the job under a new name to begin anew."
    ),
}


RETRIES = {
    Retry.FREE: "again, uncounted",
    Retry.COUNTED: "again, up to maxRetries",
    Retry.NEVER: "no",
    Retry.WAITS: "waits",
}


def render() -> str:
    """The table for the docs."""
    lines = ["| Reason | What it means | Run again | What to do |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {row.means} | {RETRIES[row.retry]} | {row.remedy} |" for name, row in TABLE.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(render())
