"""A webhook that must agree to each new Job of a namespace, and never answers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.apiserver.api import RefusedError, Space, wait_for

ROOT = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"


@contextmanager
def broken_webhook(space: Space) -> Iterator[None]:
    """It is in force for as long as this lasts."""
    webhook = {
        "name": "broken.finetune.test",
        "clientConfig": {"url": "https://127.0.0.1:1/"},
        "rules": [{"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": space.namespace}},
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }
    body = {"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration"}
    space.call("POST", ROOT, body | {"metadata": {"name": space.namespace}, "webhooks": [webhook]})
    wait_for(lambda: _refuses_jobs(space), "the webhook in force")
    try:
        yield
    finally:
        space.call("DELETE", f"{ROOT}/{space.namespace}")


def _refuses_jobs(space: Space) -> bool:
    """Whether a Job would be refused; none is made."""
    pod = {"restartPolicy": "Never", "containers": [{"name": "x", "image": "x"}]}
    body = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": {"template": {"spec": pod}}}
    try:
        space.call("POST", space.path("jobs", query="?dryRun=All"), body)
    except RefusedError:
        return True
    return False
