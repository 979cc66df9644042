"""What an administrator allows, and claims that several pods cannot share: told before a job begins."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_operator.api import JSON
from finetune_operator.consent import lies_below
from finetune_operator.facts import Facts
from finetune_operator.status import Decision, decide
from tests.unit.operator.builders import GANG, SETTINGS, SPEC, START, Cluster, a_job

CODE = SPEC | {"model": {"volume": {"claimName": "models", "path": "x"}, "trustRemoteCode": True}}
ALLOWED = ("https://minio.test:9000/team-a/", "https://registry.test", "http://mlflow.test/tracking")


def decided(spec: JSON, *, claim_modes: tuple[str, ...] | None = None, **settings: object) -> Decision:
    facts = Facts(a_job(spec), claim_modes=claim_modes)
    return decide(facts, SETTINGS.model_copy(update=settings), START)


def s3(**more: str) -> JSON:
    return SPEC | {"model": {"s3": {"uri": "s3://bucket/model/", **more}}}


def tracked(**tracking: JSON) -> JSON:
    return SPEC | {"tracking": tracking}


def published(**place: JSON) -> JSON:
    return SPEC | {"output": {"publish": [{"name": "out", "artifact": "Merged", **place}]}}


KEY = {"name": "wandb", "key": "key"}
REFUSED = [
    pytest.param(CODE, {}, "spec.model.trustRemoteCode", "trainer.allowRemoteCode", id="code of a model"),
    pytest.param(
        s3(endpoint="https://evil.test"), {"endpoints": ALLOWED}, "spec.model.s3.endpoint", "trainer.endpoints",
        id="an endpoint of one's own",
    ),
    pytest.param(
        s3(), {"endpoints": ALLOWED}, "spec.model.s3.endpoint: https://s3.us-east-1.amazonaws.com", "https://minio.test:9000",
        id="the public store, which is where an endpoint left out leads",
    ),
    pytest.param(
        SPEC | {"merge": {"original": {"oci": {"reference": "registry.test:5000/m:1"}}}}, {"endpoints": ALLOWED},
        "spec.merge.original.oci.reference", "trainer.endpoints", id="a registry at another port",
    ),
    pytest.param(
        SPEC | {"datasets": [{"oci": {"reference": "registry.test/m:1", "plainHttp": True}}]}, {"endpoints": ALLOWED},
        "spec.datasets[0].oci.reference: http://registry.test", "trainer.endpoints", id="a registry without TLS",
    ),
    pytest.param(
        published(s3={"uri": "s3://bucket/out", "credentialsSecretRef": {"name": "s3"}}), {"endpoints": ALLOWED},
        "spec.output.publish[0].s3.endpoint: https://s3.us-east-1.amazonaws.com", "trainer.endpoints",
        id="a place to publish to: the public store",
    ),
    pytest.param(
        published(oci={"reference": "evil.test/m:1"}), {"endpoints": ALLOWED},
        "spec.output.publish[0].oci.reference: https://evil.test/m:1", "trainer.endpoints",
        id="a place to publish to: a registry",
    ),
    pytest.param(
        tracked(mlflow={"uri": "http://mlflow.test/"}), {"endpoints": ALLOWED}, "spec.tracking.mlflow.uri",
        "trainer.endpoints", id="a tracker above what is allowed",
    ),
    pytest.param(
        tracked(wandb={"project": "p", "apiKeySecretRef": KEY}), {"endpoints": ALLOWED},
        "spec.tracking.wandb.baseUrl: https://api.wandb.ai", "trainer.endpoints", id="W&B's public server",
    ),
    pytest.param(
        GANG | {"output": {"volume": {"existing": {"claimName": "mine"}}}}, {"claim_modes": ("ReadWriteOnce",)},
        "claim mine is ReadWriteOnce", "Use a claim with ReadWriteMany", id="a claim that nodes cannot share",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "settings", "what", "remedy"), REFUSED)
def test_a_job_that_must_not_begin_is_not_accepted(spec: JSON, settings: JSON, what: str, remedy: str) -> None:
    decision = decided(spec, **settings)
    status = decision.status
    accepted = next(c for c in status.conditions or () if c.type == "Accepted")
    assert (status.phase, decision.actions, accepted.status) == ("Failed", (), "False")
    assert what in (status.message or "")
    assert remedy in (status.message or "")
    assert (status.message or "").endswith("then apply the job under a new name.")


ACCEPTED = [
    pytest.param(CODE, {"allow_remote_code": True}, id="code that the administrator consents to"),
    pytest.param(s3(endpoint="https://anywhere.test"), {}, id="an empty list allows all"),
    pytest.param(s3(endpoint="https://minio.test:9000/team-a"), {"endpoints": ALLOWED}, id="an endpoint of the list"),
    pytest.param(
        SPEC | {"datasets": [{"oci": {"reference": "registry.test/m:1"}}]}, {"endpoints": ALLOWED}, id="a registry"
    ),
    pytest.param(published(oci={"reference": "registry.test/m:1"}), {"endpoints": ALLOWED}, id="one to publish to"),
    pytest.param(tracked(mlflow={"uri": "http://mlflow.test/tracking/"}), {"endpoints": ALLOWED}, id="a tracker"),
    pytest.param(tracked(wandb={"project": "p"}), {"endpoints": ALLOWED}, id="W&B without a key reaches nobody"),
    pytest.param(
        GANG | {"output": {"volume": {"existing": {"claimName": "mine"}}}}, {"claim_modes": ("ReadWriteMany",)},
        id="a claim that nodes share",
    ),
    pytest.param(
        SPEC | {"output": {"volume": {"existing": {"claimName": "mine"}}}}, {"claim_modes": ("ReadWriteOnce",)},
        id="one pod shares with nobody",
    ),
    pytest.param(GANG | {"output": {"volume": {"existing": {"claimName": "mine"}}}}, {}, id="a claim not there yet"),
]  # fmt: skip


@pytest.mark.parametrize(("spec", "settings"), ACCEPTED)
def test_a_job_that_may_begin_does(spec: JSON, settings: JSON) -> None:
    assert decided(spec, **settings).actions


def test_a_job_that_has_begun_is_not_asked_again() -> None:
    """Consent withdrawn holds for new jobs; one at work is not left between two stages."""
    cluster = Cluster(spec=CODE, settings=SETTINGS.model_copy(update={"allow_remote_code": True}))
    cluster.settle()
    cluster.settings = SETTINGS
    cluster.run_pod()
    assert cluster.settle().status.reason == "Running"
    assert not decide(replace(cluster.facts, jobs=()), SETTINGS, START).status.finished


@pytest.mark.parametrize(
    ("address", "allowed", "below"),
    [
        ("https://minio.test/a", "https://minio.test", True),
        ("https://MINIO.test:443/", "https://minio.test", True),
        ("https://minio.test/team-a/x", "https://minio.test/team-a/", True),
        ("https://minio.test/team-ab", "https://minio.test/team-a", False),
        ("https://minio.test/team-a/../team-b", "https://minio.test/team-a", False),
        ("https://minio.test/team-a/%2e%2e/team-b", "https://minio.test/team-a", False),
        ("https://minio.test.evil.test/", "https://minio.test", False),
        ("https://minio.test@evil.test/", "https://minio.test", False),
        ("https://user@minio.test/", "https://minio.test", False),
        ("https://minio.test:8443/", "https://minio.test", False),
        ("http://minio.test/", "https://minio.test", False),
        ("https://minio.test:port/", "https://minio.test", False),
        ("https:///a", "https://minio.test", False),
    ],
)
def test_an_address_lies_below_another_by_host_and_whole_parts_of_its_path(
    address: str, allowed: str, below: bool
) -> None:
    assert lies_below(address, allowed) is below
