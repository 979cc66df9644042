"""The demo's S3 store: the version that the local cluster gives it is the one that its file asks for."""

from __future__ import annotations

from pathlib import Path

import yaml

from cluster import build

STORE = Path(__file__).parents[3] / "examples" / "store.yaml"


def test_the_store_asks_for_the_version_that_is_built_here() -> None:
    _, pod, _ = yaml.safe_load_all(STORE.read_text(encoding="utf-8"))
    (container,) = pod["spec"]["containers"]
    assert container["image"] == f"versity/versitygw:{build.versions()['versitygw']}"
