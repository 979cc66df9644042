"""A namespace of a real API server, and waiting for what should come about in it."""

from __future__ import annotations

import json
import time
import urllib.error
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.api import Api
from finetune_operator.api import API_VERSION, KIND

JSON = dict[str, Any]
T = TypeVar("T")
DEADLINE_SECONDS = 60.0

ROOTS = {
    "finetunejobs": f"/apis/{API_VERSION}",
    "jobs": "/apis/batch/v1",
    "pods": "/api/v1",
    "configmaps": "/api/v1",
    "services": "/api/v1",
    "persistentvolumeclaims": "/api/v1",
    "events": "/api/v1",
    "workloads": "/apis/kueue.x-k8s.io/v1beta1",
}


class RefusedError(Exception):
    """The API server said no."""


def wait_for(probe: Callable[[], T | None], what: str, seconds: float = DEADLINE_SECONDS) -> T:
    """What the probe finds, as soon as it finds anything."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := probe():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not seen within {seconds:.0f} s: {what}")


@dataclass(frozen=True)
class Space:
    """One namespace."""

    api: Api
    namespace: str

    def path(self, plural: str, name: str = "", query: str = "") -> str:
        return f"{ROOTS[plural]}/namespaces/{self.namespace}/{plural}{'/' if name else ''}{name}{query}"

    def call(self, method: str, path: str, body: JSON | None = None, kind: str = "application/json") -> JSON:
        try:
            content = self.api.call(method, path, body, kind)
        except urllib.error.HTTPError as error:
            raise RefusedError(json.loads(error.read())["message"]) from None
        parsed: JSON = json.loads(content)
        return parsed

    def create(self, plural: str, body: JSON) -> JSON:
        """Strict, as `kubectl apply` is."""
        return self.call("POST", self.path(plural, query="?fieldValidation=Strict"), body)

    def submit(self, name: str, spec: JSON, labels: dict[str, str] | None = None) -> JSON:
        metadata = {"name": name, "labels": labels or {}}
        return self.create(
            "finetunejobs", {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "spec": spec}
        )

    def merge(self, plural: str, name: str, body: JSON) -> JSON:
        return self.call("PATCH", self.path(plural, name), body, "application/merge-patch+json")

    def find(self, plural: str, name: str) -> JSON | None:
        return self.api.get(self.path(plural, name))

    def read(self, plural: str, name: str) -> JSON:
        return self.call("GET", self.path(plural, name))

    def all(self, plural: str) -> list[JSON]:
        items: list[JSON] = self.call("GET", self.path(plural))["items"]
        return items

    def names(self, plural: str) -> list[str]:
        return sorted(item["metadata"]["name"] for item in self.all(plural))

    def delete(self, plural: str, name: str, policy: str = "Background") -> None:
        self.call("DELETE", self.path(plural, name), {"propagationPolicy": policy})

    def status(self, name: str) -> JSON:
        found: JSON = self.read("finetunejobs", name).get("status", {})
        return found

    def wait_status(self, name: str, seconds: float = DEADLINE_SECONDS, **fields: Any) -> JSON:
        """The status, once these fields of it are so."""

        def probe() -> JSON | None:
            status = self.status(name)
            return status if all(status.get(key) == value for key, value in fields.items()) else None

        try:
            return wait_for(probe, f"{name}: {fields}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}, but {json.dumps(self.status(name), indent=1)}") from None

    def version(self, name: str) -> str:
        found: str = self.read("finetunejobs", name)["metadata"]["resourceVersion"]
        return found

    def history(self, name: str, since: str) -> list[JSON]:
        """Every version of a FineTuneJob after this one, as a watch tells them."""
        query = f"?watch=true&resourceVersion={since}&timeoutSeconds=2"
        events = [
            json.loads(line) for line in self.api.call("GET", self.path("finetunejobs", query=query)).splitlines()
        ]
        assert all(event["type"] != "ERROR" for event in events), events
        return [event["object"] for event in events if event["object"]["metadata"]["name"] == name]
