"""Compiled kernels are kept on the work volume: what Triton compiled in one process is there in the next one."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from triton import knobs

from finetune_trainer.fast import cache
from finetune_trainer.fast.build import CACHE_VARIABLE, MANAGER_VARIABLE, keep_kernels
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.work import WorkFolder

ROOT = Path(__file__).parents[4]
KEY = "A" * 52
COMPILE = """
import sys
from pathlib import Path
from finetune_trainer.fast.build import keep_kernels
from finetune_trainer.runtime.work import WorkFolder
keep_kernels(WorkFolder(Path(sys.argv[1])))
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from finetune_trainer.fast import kernels
heard = []
knobs.compilation.listener = lambda **told: heard.append(told["cache_hit"])
arguments = {name: "i32" for name in kernels.gate.arg_names}
arguments |= {"both": "*bf16", "out": "*bf16", "BLOCK": "constexpr"}
triton.compile(ASTSource(kernels.gate, arguments, {"BLOCK": 1024}), target=GPUTarget("cuda", 90, 32))
print(heard)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkFolder:
    """A work folder, with Triton's usual place beside it."""
    for name in (CACHE_VARIABLE, MANAGER_VARIABLE):
        monkeypatch.setenv(name, "")  # to be put back as it was
        monkeypatch.delenv(name)
    monkeypatch.setattr(knobs.cache, "home_dir", str(tmp_path / "home"))
    cache._tell_once.cache_clear()
    return WorkFolder(tmp_path / "work")


def test_the_next_process_finds_what_one_compiled(work: WorkFolder, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "trainer"), "HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", COMPILE, str(work.root)]
    heard = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    assert heard == ["[False]\n", "[True]\n"]
    (entry,) = work.kernels.iterdir()
    assert {"gate.cubin", "__grp__gate.json"} < {path.name for path in entry.iterdir()}
    assert not (tmp_path / "home" / ".triton" / "cache").exists()


def test_a_folder_that_the_pod_names_itself_is_kept(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "/mine")
    keep_kernels(work)
    assert os.environ[CACHE_VARIABLE] == "/mine"
    assert MANAGER_VARIABLE not in os.environ
    assert not work.kernels.exists()


def test_nothing_is_kept_where_code_cannot_be_loaded_from(
    work: WorkFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mounted = os.statvfs("/")
    flags = os.statvfs_result([*mounted[:8], mounted.f_flag | os.ST_NOEXEC, *mounted[9:]])
    monkeypatch.setattr(os, "statvfs", lambda _: flags)
    with caplog.at_level(logging.INFO):
        keep_kernels(work)
    assert CACHE_VARIABLE not in os.environ
    assert "mounted noexec" in caplog.text


def test_a_volume_that_takes_no_folder_ends_no_training(work: WorkFolder, caplog: pytest.LogCaptureFixture) -> None:
    work.root.touch()
    with caplog.at_level(logging.INFO):
        keep_kernels(work)
    assert CACHE_VARIABLE not in os.environ
    assert "not kept for the next attempt" in caplog.text


def test_what_a_full_volume_does_not_take_goes_to_tritons_usual_place(
    work: WorkFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep_kernels(work)
    kept = cache.KeptKernels(KEY)
    sync = manifest.sync

    def full(path: Path) -> None:
        if path.is_relative_to(work.root):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(path)

    monkeypatch.setattr(manifest, "sync", full)
    paths = [kept.put(b"cubin", "gate.cubin"), kept.put_group("gate.json", {"gate.cubin": "where it is"})]
    assert [Path(path).parent for path in paths] == [tmp_path / "home" / ".triton" / "cache" / KEY] * 2
    assert Path(paths[0]).read_bytes() == b"cubin"
    assert not list((work.kernels / KEY).iterdir()), "nothing half written"
    assert caplog.text.count("not kept for the next attempt") == 1


def test_a_full_volume_that_takes_no_entry_at_all_does_so_too(
    work: WorkFolder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keep_kernels(work)
    (work.kernels / KEY).touch()  # stands in the way of the entry's folder
    kept = cache.KeptKernels(KEY)
    assert kept.get_file("gate.cubin") is None
    assert Path(kept.put("{}", "gate.json")).parent == tmp_path / "home" / ".triton" / "cache" / KEY
    assert kept.get_file("gate.json") is not None
    assert "not kept for the next attempt" in caplog.text


def test_an_entry_is_on_the_disk_before_it_has_its_name(work: WorkFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a node that dies leaves an empty file, which every later attempt would load."""
    keep_kernels(work)

    def dies(path: Path) -> NoReturn:
        assert path.read_bytes() == b"cubin"
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "sync", dies)
    kept = cache.KeptKernels(KEY)
    with pytest.raises(KeyboardInterrupt):
        kept.put(b"cubin", "gate.cubin")
    assert kept.get_file("gate.cubin") is None
