"""The demo on a cluster of one's own: what it asks for, and which images it expects."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import demo, target


def put_on_path(folder: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        (folder / name).write_text("#!/bin/sh\necho '{}'\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_without_a_repository_it_says_what_to_set_and_how_to_fill_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("IMAGE_REPOSITORY", raising=False)
    monkeypatch.setattr("sys.argv", ["demo", "--cluster", "current"])
    assert demo.main() == 1
    said = capsys.readouterr().err
    for words in ("IMAGE_REPOSITORY is not set", "docker build --target trainer", "CLUSTER=current"):
        assert words in said


def test_it_takes_the_images_of_that_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_path(tmp_path, monkeypatch, "kubectl", "helm")
    monkeypatch.setenv("IMAGE_REPOSITORY", "registry.example/team/")
    monkeypatch.setenv("IMAGE_TAG", "7")
    found = target.current_target()
    assert found.operator_image == "registry.example/team/finetune-operator:7"
    assert found.trainer_image == "registry.example/team/finetune-trainer:7"
    assert found.kubeconfig is None


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_path(tmp_path, monkeypatch, "kubectl")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("IMAGE_REPOSITORY", "registry.example")
    with pytest.raises(target.TargetError, match="helm is not on the PATH"):
        target.current_target()
