"""How Triton (3.7) reads and writes compiled kernels on the work volume, where `build.keep_kernels` has it put them.

Triton itself names an entry by all that it depends on: source, settings, its own version, the compiler's, the kind of
GPU. Imported by Triton.
"""

from __future__ import annotations

import logging
import uuid
from functools import cache
from pathlib import Path

from triton import knobs
from triton.runtime.cache import FileCacheManager

from finetune_trainer.runtime import manifest

log = logging.getLogger(__name__)


class KeptKernels(FileCacheManager):  # type: ignore[misc]  # Triton has no type information
    """Triton's own cache, but for two things that a folder of one process need not care about.

    An entry is on the disk before it has its name: of a node that died, the next attempt would load an empty file. And
    one that cannot be written there goes to Triton's usual place, in the pod's own /tmp: a cache fails no training.
    """

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        """`key`: Triton's hash of what an entry is made from, the name of its folder."""
        try:
            super().__init__(key, override, dump)
        except OSError as error:
            self.key = key
            self._leave(error)

    def put(self, data: bytes | str, filename: str, binary: bool = True) -> str:  # noqa: ARG002 - Triton's signature
        """Write a file of the entry, whole or not at all; its path."""
        content = data if isinstance(data, bytes) else str(data).encode()
        try:
            return self._write(content, filename)
        except OSError as error:
            self._leave(error)
            return self._write(content, filename)

    def _write(self, content: bytes, filename: str) -> str:
        path = Path(self.cache_dir, filename)
        aside = path.with_name(f".{filename}.{uuid.uuid4().hex}")
        try:
            aside.write_bytes(content)
            manifest.sync(aside)
            aside.replace(path)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
        return str(path)

    def _leave(self, error: OSError) -> None:
        usual = Path(knobs.cache.get_triton_dir("cache"), self.key)
        usual.mkdir(parents=True, exist_ok=True)
        self.cache_dir = str(usual)
        _tell_once(str(error))


@cache
def _tell_once(problem: str) -> None:
    log.warning("compiled kernels are not kept for the next attempt: %s", problem)
