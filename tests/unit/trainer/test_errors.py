"""What libraries raise is told in the words of the house."""

import errno

import pytest

from finetune_trainer.progress import ExitCode, Reason, exit_code
from finetune_trainer.runtime import errors


class OutOfMemoryError(RuntimeError):
    """Named as torch's own."""


def nested(outer: Exception, inner: Exception) -> Exception:
    try:
        raise outer from inner
    except type(outer) as error:
        return error


NO_SPACE = OSError(errno.ENOSPC, "No space left on device", "/volume/model.safetensors")


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        pytest.param(NO_SPACE, errors.VolumeFull, id="the system says that the disk is full"),
        pytest.param(OSError(errno.EDQUOT, "Disk quota exceeded"), errors.VolumeFull, id="the quota is used up"),
        pytest.param(nested(RuntimeError("save failed"), NO_SPACE), errors.VolumeFull, id="full disk as a cause"),
        pytest.param(
            RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
            errors.VolumeFull,
            id="full disk as safetensors words it",
        ),
        pytest.param(OutOfMemoryError("CUDA out of memory. Tried to allocate"), errors.OutOfMemory, id="torch's own"),
        pytest.param(RuntimeError("CUDA out of memory."), errors.OutOfMemory, id="as older kernels word it"),
        pytest.param(PermissionError(errno.EACCES, "denied", "/w"), errors.AccessDenied, id="no permission"),
        pytest.param(OSError(errno.EROFS, "Read-only", "/w"), errors.AccessDenied, id="read-only work folder"),
        pytest.param(FileNotFoundError(errno.ENOENT, "none", "/x"), errors.NotFound, id="missing file"),
        pytest.param(nested(ValueError("x"), errors.InvalidModel("bad")), errors.InvalidModel, id="our own as a cause"),
    ],
)
def test_foreign_exceptions_are_translated(raised: Exception, kind: type[errors.TrainerError]) -> None:
    assert type(errors.translate(raised)) is kind


def test_what_was_deliberately_left_behind_is_no_cause() -> None:
    def replaced() -> None:
        try:
            raise NO_SPACE
        except OSError:
            raise ValueError("the disk has nothing to do with it") from None

    with pytest.raises(ValueError, match="nothing to do") as raised:
        replaced()
    assert errors.translate(raised.value) is None


def test_out_of_memory_at_large_says_nothing_of_micro_batches() -> None:
    found = errors.translate(OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert "training." not in str(found)
    assert "GPU with more memory" in str(found)


def test_a_bug_stays_a_bug() -> None:
    assert errors.translate(ValueError("surprise")) is None


def test_every_reason_has_an_exception_and_an_exit_code() -> None:
    reasons = {kind.reason for kind in errors.TrainerError.__subclasses__()}
    assert reasons == set(Reason) - {Reason.COMPLETED}
    assert {exit_code(reason) for reason in Reason} == set(ExitCode)
