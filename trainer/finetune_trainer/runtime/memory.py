"""What is said when memory does not suffice, in the many wordings of torch, CUDA's libraries and the system. Pure."""

from __future__ import annotations

import errno
import re

GPU_WORDS = re.compile(
    r"\b(cuda|hip|nccl)\b.*out of memory"  # torch, NCCL, Triton, and bitsandbytes by way of torch
    r"|cu(blas|dnn|solver|sparse)_status_alloc_failed"
    r"|cudaerrormemoryallocation|cuda_error_out_of_memory"
    r"|out of memory on device",
    re.IGNORECASE | re.DOTALL,
)
HOST_WORDS = re.compile(
    r"defaultcpuallocator: can't allocate memory|cannot allocate memory|std::bad_alloc", re.IGNORECASE
)
SIZE = r"([\d.]+) (bytes|[KMG]iB)"
ASKED, HAS, FREE, OWN = (
    re.compile(words)
    for words in (
        rf"Tried to allocate {SIZE}",
        rf"has a total capacity of {SIZE}",
        rf"of which {SIZE} is free",
        rf"this process has {SIZE} memory in use",
    )
)
"""What torch's allocator tells (CUDACachingAllocator.cpp, 2.13)."""
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def is_of_gpu(error: BaseException) -> bool:
    """Whether the error is that the GPU's memory does not suffice."""
    return type(error).__name__ == "OutOfMemoryError" or GPU_WORDS.search(str(error)) is not None


def is_of_host(error: BaseException) -> bool:
    """Whether the error is that the machine's memory does not suffice, or that of the pod."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return HOST_WORDS.search(str(error)) is not None


def needs(text: str) -> str:
    """What was needed and what is there, as far as the error's text tells; else its first line.

    What a process holds and could not free, and what it asked for besides, is the least that it needs.
    """
    asked, has, free, own = (_bytes(pattern, text) for pattern in (ASKED, HAS, FREE, OWN))
    if asked is None or has is None or free is None:
        return text.splitlines()[0].rstrip(". ") if text.strip() else "no details given"
    used = has - free
    held = used if own is None else own
    told = f"needs at least {gib(held + asked)}, has {gib(has)}: {gib(used)} in use, {gib(asked)} asked for"
    return told if used - held < 2**30 else f"{told}; {gib(used - held)} of it used by other processes"


def _bytes(pattern: re.Pattern[str], text: str) -> float | None:
    found = pattern.search(text)
    return float(found[1]) * UNITS[found[2]] if found else None


def gib(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"
