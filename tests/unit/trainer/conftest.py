"""A tiny model and a small dataset, made once a session, in the shape of mounted claims."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.__main__ import main
from finetune_trainer.progress import LastWord
from tests.tiny import make_config, make_instructions, make_jsonl, make_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@dataclass
class Desk:
    """A workstation's folders, and the command run on them."""

    root: Path

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def sources(self) -> Path:
        return self.root / "sources"

    @property
    def datasets(self) -> Path:
        return self.sources / "datasets"

    @property
    def models(self) -> Path:
        return self.sources / "models"

    def run(self, command: str, config: dict[str, Any], *options: str) -> tuple[int, LastWord | None]:
        """Run a command as a user would; its exit code and last word."""
        word = self.root / "last-word"
        word.unlink(missing_ok=True)
        (self.root / "job.json").write_text(json.dumps(config))
        folders = ["--work", str(self.work), "--sources", str(self.sources), "--secrets", str(self.root / "secrets")]
        arguments = [command, "--config", str(self.root / "job.json"), *folders, "--termination-log", str(word)]
        code = main([*arguments, *options])
        return code, LastWord.model_validate_json(word.read_bytes()) if word.exists() else None


@pytest.fixture
def desk(tmp_path: Path, tiny_model: Path) -> Desk:
    desk = Desk(tmp_path)
    desk.models.mkdir(parents=True)
    shutil.copytree(tiny_model, desk.models / "tiny")
    make_jsonl(desk.datasets / "rows.jsonl", make_instructions(40))
    return desk


@pytest.fixture
def config() -> dict[str, Any]:
    return make_config()
