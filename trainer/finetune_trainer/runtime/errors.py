"""Everything a stage can end for, as one small tree.

    TrainerError                 carries the Reason and a sentence for people, with the way out
    ├── InvalidConfig            a field of the config, or fields that do not go together
    ├── InvalidDataset           a row, a file or a column
    ├── InvalidModel             the base model's files
    ├── NotFound                 a file, claim, repository or an earlier stage's artifact
    ├── AccessDenied             a token or a permission is missing
    ├── VolumeFull               no space left to write to
    ├── OutOfMemory              of the accelerator
    ├── OutOfHostMemory          of the machine, or of the pod
    ├── NonFiniteLoss            NaN or infinity while training
    ├── VerificationFailed       a file is not what its manifest says
    ├── GateFailed               a measured figure is worse than the job allows
    ├── RendezvousFailed         the pods of the stage did not find each other
    ├── PeerLost                 another pod of the stage ended or fell silent
    ├── Interrupted              left on request, to be continued
    └── Unavailable              a server that does not answer: Unknown, which is tried again

Stages raise these. What libraries raise is translated once, at the edge, by `translate`.
"""

# ruff: noqa: N818 - an exception is named like the reason it carries

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, ClassVar

from finetune_trainer.progress import Reason
from finetune_trainer.runtime import memory

if TYPE_CHECKING:
    from collections.abc import Iterator


class TrainerError(Exception):
    """A stage cannot go on. The message is one or two sentences: what, where, and the way out."""

    reason: ClassVar[Reason] = Reason.UNKNOWN


class InvalidConfig(TrainerError):
    """A field of the config, or fields that do not go together."""

    reason = Reason.INVALID_CONFIG


class InvalidDataset(TrainerError):
    """A row, a file or a column of a dataset."""

    reason = Reason.INVALID_DATASET


class InvalidModel(TrainerError):
    """The base model's files."""

    reason = Reason.INVALID_MODEL


class NotFound(TrainerError):
    """A file, a claim, a repository, or what an earlier stage should have left."""

    reason = Reason.NOT_FOUND


class AccessDenied(TrainerError):
    """A token or a permission is missing."""

    reason = Reason.ACCESS_DENIED


class VolumeFull(TrainerError):
    """No space left where the job writes."""

    reason = Reason.VOLUME_FULL


class OutOfMemory(TrainerError):
    """The accelerator's memory does not suffice."""

    reason = Reason.OUT_OF_MEMORY


class OutOfHostMemory(TrainerError):
    """The machine's memory, or the pod's, does not suffice."""

    reason = Reason.OUT_OF_HOST_MEMORY


class NonFiniteLoss(TrainerError):
    """The loss became NaN or infinite."""

    reason = Reason.NON_FINITE_LOSS


class VerificationFailed(TrainerError):
    """A file is not what its manifest says."""

    reason = Reason.VERIFICATION_FAILED


class GateFailed(TrainerError):
    """An artifact is complete, but measured worse than a gate of the config allows: nothing of it is published."""

    reason = Reason.GATE_FAILED


class RendezvousFailed(TrainerError):
    """The processes of several nodes did not find each other in time."""

    reason = Reason.RENDEZVOUS_FAILED


class PeerLost(TrainerError):
    """A process of another node ended or fell silent: why, it says itself."""

    reason = Reason.PEER_LOST


class Interrupted(TrainerError):
    """Asked to leave (SIGTERM); what was done is kept and the next attempt goes on from it."""

    reason = Reason.INTERRUPTED


class Unavailable(TrainerError):
    """The other side does not answer, or broke off: worth another try, as what is Unknown gets."""


NO_SPACE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
NO_SPACE_WORDS = ("no space left", "disk quota exceeded", "os error 28", "enospc")
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - where processes of a pod share memory


def translate(error: BaseException) -> TrainerError | None:
    """What a library raised, in the words of this tree; None for what is nobody's known case.

    Looks through causes and contexts, because savers wrap the system's error in their own.
    """
    for each in _chain(error):
        if isinstance(each, TrainerError):
            return each
        for known in (_as_volume_full, _as_out_of_memory, _as_out_of_host_memory, _as_file_error):
            if (found := known(each)) is not None:
                return found
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, then what it came from, each once; not what `raise ... from None` left behind."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)


def _as_volume_full(error: BaseException) -> VolumeFull | None:
    code = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if code not in NO_SPACE_ERRNOS and not any(words in text.lower() for words in NO_SPACE_WORDS):
        return None
    if SHARED_MEMORY in text:
        return VolumeFull(f"{SHARED_MEMORY}, the memory that processes share, is full: {text}. Make it larger.")
    where = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
    return VolumeFull(f"The volume is full{where}. Make the job's claim larger, or free space on it; then retry.")


def _as_out_of_memory(error: BaseException) -> OutOfMemory | None:
    if not memory.is_of_gpu(error):
        return None
    return OutOfMemory(
        f"The GPU ran out of memory ({memory.needs(str(error))}). "
        "Use a GPU with more memory, or one that nobody else works on."
    )


def _as_out_of_host_memory(error: BaseException) -> OutOfHostMemory | None:
    if not memory.is_of_host(error):
        return None
    return OutOfHostMemory(
        f"The machine ran out of memory ({memory.needs(str(error))}). Give more (in a cluster: "
        "pod.resources.limits.memory), or use a smaller training.perDeviceTrainBatchSize or maxLength."
    )


def _as_file_error(error: BaseException) -> TrainerError | None:
    if isinstance(error, PermissionError):
        return AccessDenied(
            f"No permission for {error.filename or error}: the files must be readable, and the work folder writable, "
            "for the user the trainer runs as (in a cluster: pod.fsGroup)."
        )
    if isinstance(error, FileNotFoundError) and error.filename:
        return NotFound(f"{error.filename} is not there.")
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return AccessDenied(
            f"{error.filename or 'The work folder'} is on a read-only file system: give a writable --work."
        )
    return None
