"""Pods that publish to a real S3 server and a real registry, and a gate that keeps them from it."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from cluster import build
from cluster.paths import default_state
from cluster.target import Target
from tests.e2e.jobs import Jobs, Status, eventually, processes_of, send, work_folder
from tests.unit.trainer.publishing.test_oci import pulled
from tests.unit.trainer.publishing.test_s3 import contents_of, keys_below, open_uploads
from tests.unit.trainer.sources.servers import PASSWORD, UP, USER, Bucket, Registry, Relay, registry_server, s3_server

MID_TRANSFER_BYTES = 20_000
"""Of a model of several hundred thousand."""
KEYS = "bucket"
"""The name of the Secret."""


@dataclass
class Shore:
    """Where pods send to: servers of this machine, seen through relays on the cluster's side of it."""

    bucket: Bucket
    s3: Relay
    registry: Registry
    oci: Relay

    def in_bucket(self, name: str, artifact: str) -> dict[str, Any]:
        place = {"uri": f"s3://{self.bucket.name}/{name}", "endpoint": self.s3.url}
        return {"name": "bucket", "artifact": artifact, "s3": place | {"credentialsSecretRef": {"name": KEYS}}}

    def in_registry(self, name: str, artifact: str) -> dict[str, Any]:
        return {
            "name": "registry",
            "artifact": artifact,
            "oci": {"reference": f"{self.oci.address}/{name}:v1", "plainHttp": True},
        }


@pytest.fixture(scope="module")
def shore(cluster: Target, staged: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shore]:
    build.build_servers()
    keys = {"AWS_ACCESS_KEY_ID": USER, "AWS_SECRET_ACCESS_KEY": PASSWORD}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": KEYS, "namespace": staged}}
    cluster.apply(secret | {"stringData": keys})
    folder, host = tmp_path_factory.mktemp("shore"), default_state().recorded()["host_address"]
    with s3_server(folder) as port, registry_server(folder) as registry:
        bucket = Bucket(f"http://127.0.0.1:{port}", "models").create()
        found = Shore(bucket, Relay(port, host), registry, Relay(registry.port, host))
        yield found
        found.s3.close()
        found.oci.close()


def publishing(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"volume": {"create": {"size": "1Gi"}}, "publish": list(entries)}


def test_a_publishing_pod_that_is_killed_in_mid_transfer_is_followed_by_one_that_ends_complete_once(
    jobs: Jobs, shore: Shore
) -> None:
    shore.s3.reset(hold_after=MID_TRANSFER_BYTES, limited=UP)
    entries = shore.in_bucket("sent", "Merged"), shore.in_registry("sent", "Merged")
    jobs.apply("sent", method={"type": "Full"}, output=publishing(*entries))
    eventually("the transfer stands still in its middle", shore.s3.holding.is_set)
    assert "manifest.json" not in keys_below(shore.bucket, "sent/")
    send("KILL", processes_of(jobs, jobs.running_pod("sent", "publish-0")))
    shore.s3.reset()

    status = jobs.finish("sent")
    assert status["phase"] == "Succeeded", jobs.tell("sent")
    runs = [name.removeprefix("sent-publish-") for name in jobs.stage_jobs("sent") if "publish" in name]
    assert runs == ["0-1", "0-2", "1-2"]
    assert open_uploads(shore.bucket) == 0
    there = contents_of(shore.bucket, "sent/")
    digest, layers = pulled(shore.registry.reference("sent:v1"))
    in_bucket, in_registry = places(status)
    assert in_bucket["uri"] == "s3://models/sent/"
    assert in_registry["uri"] == f"oci://{shore.oci.address}/sent:v1@{digest}"
    for files, place in ((there, in_bucket), (layers, in_registry)):
        assert sha256(files["manifest.json"]) == place["digest"].removeprefix("sha256:")
        assert made(jobs, "sent", "merged").items() <= {name: sha256(body) for name, body in files.items()}.items()


def places(status: Status) -> list[dict[str, Any]]:
    """Where the only artifact was published."""
    (artifact,) = status["artifacts"]
    found: list[dict[str, Any]] = artifact["published"]
    return found


def made(jobs: Jobs, name: str, path: str) -> dict[str, str]:
    """The files of an artifact and their SHA-256, as its manifest on the claim has them."""
    manifest = json.loads((work_folder(jobs, name) / path / "manifest.json").read_text(encoding="utf-8"))
    return {file["path"]: file["sha256"] for file in manifest["files"]}


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def test_a_gate_that_fires_ends_the_job_with_its_figures_and_nothing_goes_out(jobs: Jobs, shore: Shore) -> None:
    gate = {"base": "Dequantized", "maxKLDivergence": 0}  # what is written in 16 bits is rounded
    jobs.apply("gated", merge=gate, output=publishing(shore.in_bucket("gated", "Adapter")))
    status = jobs.finish("gated")
    assert (status["phase"], status["reason"]) == ("Failed", "GateFailed"), jobs.tell("gated")
    assert re.search(r"[0-9.e-]+ nats a token \(KL\) .*merge.maxKLDivergence allows 0 ", status["message"])
    assert jobs.stage_jobs("gated") == ["gated-merge-1", "gated-prepare-1", "gated-train-1"]
    (adapter,) = status["artifacts"]
    assert (adapter["type"], adapter.get("published")) == ("Adapter", None)
    assert keys_below(shore.bucket, "gated/") == []
