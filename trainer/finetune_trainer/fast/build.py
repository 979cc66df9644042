"""Whether the fast path can be used on this machine, where its kernels are kept, and that of a model that trains."""

from __future__ import annotations

import logging
import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.settings.fast import needs_fast_path

if TYPE_CHECKING:
    import torch

    from finetune_trainer.fast.model import FastModel
    from finetune_trainer.progress import Resolved
    from finetune_trainer.runtime.work import WorkFolder

log = logging.getLogger(__name__)

OLDEST_CAPABILITY = (8, 0)
"""Ampere: the first GPUs with bf16 and the attention kernels."""
OLDEST_WITH_FLOAT8 = (8, 9)
"""Ada: the first with tensor cores for FP8."""
CACHE_VARIABLE, MANAGER_VARIABLE = "TRITON_CACHE_DIR", "TRITON_CACHE_MANAGER"
"""Triton's: the folder of what it compiled, and the class that reads and writes there."""
COMPILERS = ("gcc", "clang")
"""What Triton (3.7) looks for where CC names none; what starts a kernel is a C file that includes Python.h."""


def keep_kernels(work: WorkFolder) -> None:
    """Have Triton keep what it compiles in the work folder, where the next attempt finds it.

    To be called before Triton compiles anything. Nothing is kept where the environment names a folder already, or
    where the volume cannot be used so: of one that is mounted noexec, what starts a kernel could not be loaded.
    """
    folder = work.kernels
    if CACHE_VARIABLE in os.environ:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        refusal = "the volume is mounted noexec" if os.statvfs(folder).f_flag & os.ST_NOEXEC else None
    except OSError as error:
        refusal = str(error)
    if refusal is not None:
        log.info("compiled kernels are not kept for the next attempt: %s", refusal)
        return
    os.environ[CACHE_VARIABLE] = str(folder)
    os.environ[MANAGER_VARIABLE] = "finetune_trainer.fast.cache:KeptKernels"


def is_fast(resolved: Resolved, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a training takes the fast path on this machine. The log says so, or why not.

    InvalidConfig if products in FP8 were asked for and cannot be had: another loss than was asked for is no way out.
    """
    fp8 = resolved.fp8_products
    if resolved.fast_path:
        reason = why_not_here(device, dtype, float8=fp8)
    else:
        reason = resolved.plain_because or "prepared without it"
    if reason is None:
        told = (", products in FP8" if fp8 else "", ", in host memory what can wait" if resolved.offloads else "")
        log.info("training the fast way (training.fastPath): blocks by hand%s%s", *told)
    elif fp8:
        raise InvalidConfig(needs_fast_path(reason))
    else:
        log.info("training the plain way, by autograd: %s", reason)
    return reason is None


def build_fast(adapted: Any, resolved: Resolved, dtype: torch.dtype) -> FastModel:  # noqa: ANN401 - a PEFT model
    """The fast path of a model that trains. InvalidConfig if it would leave out something that trains."""
    import torch  # noqa: PLC0415 - slow

    from finetune_trainer.fast.block import Plan  # noqa: PLC0415 - brings torch
    from finetune_trainer.fast.model import FastModel  # noqa: PLC0415 - likewise

    plans = {"Full": Plan.INPUT, "Selective": Plan.ATTENTION, "Off": Plan.PRODUCTS}
    plan, float8 = plans[resolved.gradient_checkpointing], resolved.fp8_products
    fast = FastModel(adapted, plan, dtype, float8=float8, offload=resolved.offloads)
    known = set(map(id, fast.trained))
    lost = [name for name, each in adapted.named_parameters() if each.requires_grad and id(each) not in known]
    if lost:
        msg = f"The fast path would not train {lost[0]}. Set training.fastPath: Off, and report this as a bug."
        raise InvalidConfig(msg)
    torch.cuda.empty_cache()  # of the places that weights moved out of
    return fast


def why_not_here(device: torch.device, dtype: torch.dtype, *, float8: bool = False) -> str | None:
    """What this machine lacks, in words; None where nothing."""
    import torch  # noqa: PLC0415 - slow

    if device.type != "cuda":
        return "there is no GPU"
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        return "the GPU is older than NVIDIA's Ampere, or another maker's"
    if float8 and torch.cuda.get_device_capability(device) < OLDEST_WITH_FLOAT8:
        return "the GPU is older than NVIDIA's Ada, and has no FP8"
    if dtype is not torch.bfloat16:
        return f"products are computed in {str(dtype).removeprefix('torch.')}"
    return _why_no_kernels()


def _why_no_kernels() -> str | None:
    compilers = (os.environ["CC"],) if "CC" in os.environ else COMPILERS
    if find_spec("triton") is None:
        return "there is no Triton, whose kernels it has"
    if not any(map(shutil.which, compilers)):
        return "there is no C compiler, which Triton needs"
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file():
        return "there is no Python.h, which Triton needs (the python3-dev of this Python)"
    return None
