"""Helm as a fixture: the chart is rendered by the real thing, no cluster is needed."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import build
from cluster.errors import ClusterError

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts" / "finetune-operator"

Manifest = dict[str, Any]


class HelmError(Exception):
    """Helm refused; the message is its own."""


@dataclass(frozen=True)
class Helm:
    """The helm command, and what it makes of the chart."""

    path: str

    def run(self, *arguments: str) -> str:
        done = subprocess.run([self.path, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise HelmError(done.stderr + done.stdout)
        return done.stdout

    def template(self, values: dict[str, object] | None = None, *options: str, chart: Path = CHART) -> list[Manifest]:
        """Every object of a release `tuner` in the namespace `tuning`. Values have dotted names."""
        settings = [f"--set-json={name}={json.dumps(value)}" for name, value in (values or {}).items()]
        rendered = self.run("template", "tuner", str(chart), "--namespace", "tuning", *settings, *options)
        return [manifest for manifest in yaml.safe_load_all(rendered) if manifest]


@pytest.fixture(scope="session")
def helm() -> Helm:
    try:
        return Helm(str(build.command("helm")))
    except ClusterError as error:
        pytest.fail(str(error))
