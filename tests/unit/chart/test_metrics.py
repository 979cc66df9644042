"""What the chart gives Prometheus and Grafana: rules that promtool has tried, and queries of metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster import build
from finetune_operator.metrics import PER_JOB, Metrics
from finetune_operator.queue import Key

from .conftest import CHART, ROOT, Helm, HelmError, Manifest
from .test_templates import one, pod_of

ALERTS = Path(__file__).with_name("alerts.yaml")
ALL_ON: dict[str, object] = {
    "metrics.serviceMonitor.enabled": True,
    "metrics.rules.enabled": True,
    "metrics.dashboard.enabled": True,
    "fullnameOverride": "ours",
}
TARGET_LABELS = {"job", "namespace", "pod"}
"""Which Prometheus adds to every series of a target."""

METRIC = re.compile(r"([a-z_]+)\{([^}]*)\}")
LABEL = re.compile(r'(\w+)(?:=|!=|=~|!~)"')
GROUPED = re.compile(r"by \(([\w, ]+)\)")


@pytest.fixture(scope="session")
def promtool() -> str:
    build.build_rule_checker()
    return str(build.command("promtool"))


def rules(helm: Helm) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = one(helm.template(ALL_ON), "PrometheusRule")["spec"]["groups"][0]["rules"]
    return found


def dashboard() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads((CHART / "files" / "dashboard.json").read_text())
    return parsed


# --- rules -----------------------------------------------------------------------------------------------------------


def test_every_alert_fires_when_it_should_and_only_then(helm: Helm, promtool: str, tmp_path: Path) -> None:
    spec = one(helm.template(ALL_ON, "--namespace", "tuning"), "PrometheusRule")["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(spec))
    shutil.copy(ALERTS, tmp_path)
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", ALERTS.name]):
        done = subprocess.run([promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_seen_both_silent_and_firing(helm: Helm) -> None:
    well, *ill = yaml.safe_load(ALERTS.read_text())["tests"]
    alerts = [rule["alert"] for rule in rules(helm)]
    assert [trial["alertname"] for trial in well["alert_rule_test"]] == alerts
    assert [trial["alertname"] for test in ill for trial in test["alert_rule_test"] if "exp_alerts" in trial] == alerts


def test_every_alert_says_what_happened_and_leads_to_what_can_be_done(helm: Helm) -> None:
    headings = {heading.lower() for heading in re.findall(r"^### (\w+)$", operations(), re.MULTILINE)}
    for rule in rules(helm):
        assert rule["labels"].keys() == {"severity"}
        assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
        page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
        assert (page, anchor) == ("docs/operations.md", rule["alert"].lower())
        assert anchor in headings


def test_thresholds_and_the_runbooks_place_can_be_set(helm: Helm) -> None:
    values = {"metrics.rules": {"enabled": True, "runbook": "https://wiki.example/ops", "checkpointAgeSeconds": 1e6}}
    (age,) = (
        rule
        for rule in one(helm.template(dict(values)), "PrometheusRule")["spec"]["groups"][0]["rules"]
        if rule["alert"] == "FineTuneCheckpointOld"
    )
    assert age["expr"].endswith("> 1000000")
    assert age["annotations"]["runbook_url"] == "https://wiki.example/ops#finetunecheckpointold"


# --- names -----------------------------------------------------------------------------------------------------------


def exported() -> dict[str, set[str]]:
    """Every series that the operator has, with its own labels."""
    metrics = Metrics()
    metrics.called("GET", "Job", "200")
    found: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found | {name: {"namespace", "name"} for name in PER_JOB}


def test_promtool_finds_nothing_amiss_in_what_a_scrape_gets(promtool: str) -> None:
    metrics = Metrics()
    metrics.called("GET", "Job", "200")
    metrics.jobs.see(Key("ns", "demo"), {"status": {"phase": "Training", "retries": 1}})
    text, _ = metrics.render("")
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


def queries(helm: Helm) -> Iterator[str]:
    yield from (rule["expr"] for rule in rules(helm))
    for panel in dashboard()["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def test_rules_and_dashboard_ask_for_nothing_that_the_operator_does_not_tell(helm: Helm) -> None:
    known = exported() | {"up": set()}
    for query in queries(helm):
        asked = METRIC.findall(query)
        assert asked, query
        for name, selector in asked:
            assert name in known, query
            assert set(LABEL.findall(selector)) <= known[name] | TARGET_LABELS, query
        grouped = {label.strip() for labels in GROUPED.findall(query) for label in labels.split(",")}
        assert grouped <= set().union(*(known[name] for name, _ in asked)) | TARGET_LABELS, query


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    shown = "".join(target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ()))
    suffixes = ("_bucket", "_sum", "_count", "_total")
    families = {next((n.removesuffix(s) for s in suffixes if n.endswith(s)), n) for n in exported()}
    missing = {family for family in families if family not in shown and not family.startswith("process_")}
    assert missing == set()


def test_panels_lie_side_by_side() -> None:
    boxes = [panel["gridPos"] for panel in dashboard()["panels"]]
    cells = [
        (x, y)
        for box in boxes
        for x in range(box["x"], box["x"] + box["w"])
        for y in range(box["y"], box["y"] + box["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


# --- objects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kinds"),
    [
        ("metrics.serviceMonitor.enabled", {"Service", "ServiceMonitor"}),
        ("metrics.rules.enabled", {"PrometheusRule"}),
        ("metrics.dashboard.enabled", {"ConfigMap"}),
    ],
)
def test_each_part_is_made_only_when_asked_for(helm: Helm, value: str, kinds: set[str]) -> None:
    def kinds_of(manifests: list[Manifest]) -> set[str]:
        return {manifest["kind"] for manifest in manifests}

    assert kinds_of(helm.template({value: True})) - kinds_of(helm.template()) == kinds


def test_the_monitor_finds_the_port_that_serves_metrics_on_every_replica(helm: Helm) -> None:
    manifests = helm.template(ALL_ON)
    service, monitor = one(manifests, "Service"), one(manifests, "ServiceMonitor")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["namespaceSelector"]["matchNames"] == [service["metadata"]["namespace"]]
    (endpoint,), (port,) = monitor["spec"]["endpoints"], service["spec"]["ports"]
    assert (endpoint["port"], endpoint["path"]) == (port["name"], "/metrics")
    pod_labels = one(manifests, "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= pod_labels.items()
    assert port["targetPort"] in {each["name"] for each in pod_of(manifests)["containers"][0]["ports"]}


def test_the_namespace_of_a_series_about_a_job_stays_the_jobs(helm: Helm) -> None:
    """Prometheus would else call it exported_namespace."""
    assert one(helm.template(ALL_ON), "ServiceMonitor")["spec"]["endpoints"][0]["honorLabels"] is True


def test_rules_select_the_series_that_the_service_brings(helm: Helm) -> None:
    """Prometheus Operator names the job of a target after its Service."""
    service = one(helm.template(ALL_ON), "Service")["metadata"]["name"]
    assert all(f'job="{service}"' in rule["expr"] for rule in rules(helm))


def test_the_dashboard_is_the_file_and_has_the_label_of_grafanas_sidecar(helm: Helm) -> None:
    found = one(helm.template(ALL_ON), "ConfigMap")
    assert json.loads(found["data"]["finetune-operator.json"]) == dashboard()
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("metrics.enabled", True, r"at '/metrics': additional properties 'enabled' not allowed"),
        ("metrics.rules.checkpointAgeSeconds", "2h", r"got string, want integer"),
        ("metrics.serviceMonitor.interval", "30s", r"additional properties 'interval' not allowed"),
        ("metrics.rules.runbook", "a page", r"'a page' does not match pattern"),
    ],
)
def test_a_wrong_value_is_refused(helm: Helm, name: str, value: object, said: str) -> None:
    with pytest.raises(HelmError, match=said):
        helm.template({name: value})


# --- docs ------------------------------------------------------------------------------------------------------------


def operations() -> str:
    return (ROOT / "docs" / "operations.md").read_text()


def test_the_page_lists_every_metric_with_its_kind_and_labels() -> None:
    told = set(re.findall(r"^\| `(\w+?)(?:\{([\w,]*)\})?` \| (\w+) \|", operations(), re.MULTILINE))
    metrics = Metrics()
    metrics.called("GET", "Job", "200")
    expected = set()
    for family in metrics.registry.collect():
        if family.name.startswith("process_"):
            continue
        labels = set().union(*(sample.labels for sample in family.samples)) - {"le"}
        labels |= {"namespace", "name"} if family.name in PER_JOB else set()
        name = f"{family.name}_total" if family.type == "counter" else family.name
        expected.add((name, frozenset(labels), family.type))
    assert {(name, frozenset(filter(None, labels.split(","))), kind) for name, labels, kind in told} == expected


def test_the_page_lists_no_alert_that_there_is_not(helm: Helm) -> None:
    alerts = [rule["alert"] for rule in rules(helm)]
    assert re.findall(r"^### (FineTune\w+)$", operations(), re.MULTILINE) == alerts
