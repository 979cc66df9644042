"""The CRD in the chart is the generated one: the same bytes in the file, the same schema when rendered."""

from __future__ import annotations

from typing import Any

import yaml

from .conftest import CHART, ROOT, Helm

FILE = "finetunejobs.finetune.dev.yaml"


def rendered(helm: Helm) -> dict[str, Any]:
    crd: dict[str, Any] = helm.template({}, "--show-only", "templates/crd.yaml")[0]
    return crd


def generated() -> dict[str, Any]:
    crd: dict[str, Any] = yaml.safe_load((ROOT / "crds" / FILE).read_text())
    return crd


def test_the_charts_file_is_the_generated_one() -> None:
    assert (CHART / "files" / FILE).read_bytes() == (ROOT / "crds" / FILE).read_bytes(), "run `make crds`"


def test_nothing_is_lost_on_the_way(helm: Helm) -> None:
    assert rendered(helm)["spec"] == generated()["spec"]
    assert rendered(helm)["metadata"]["name"] == generated()["metadata"]["name"]


def test_it_outlives_the_release(helm: Helm) -> None:
    assert rendered(helm)["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"


def test_it_can_be_left_to_someone_else(helm: Helm) -> None:
    assert "CustomResourceDefinition" not in {m["kind"] for m in helm.template({"crd.install": False})}
