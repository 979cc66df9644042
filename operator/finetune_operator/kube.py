"""Every call to the API server, with a time limit on each. Objects are plain dicts.

Errors::

    KubeError           the server refused: `.status`, `.message`
    ├── NotFoundError   404
    ├── ExistsError     409 on create
    ├── StaleError      409 on a write of an object that has changed since
    └── GoneError       410: the resource version is too old to go on from
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import config
from kubernetes.aio.client.api_client import ApiClient
from kubernetes.aio.client.configuration import Configuration

from finetune_operator.api import API_VERSION, JSON, KIND, MANAGER, PLURAL, Label
from finetune_operator.queueing import JOB_UID_LABEL, KUEUE

PAGE = 500
CONNECT_SECONDS = 10
GRACE_SECONDS = 30
"""So much later than the server was to end it a watch is given up."""

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")

WHOLE = "application/json"
METADATA = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"
METADATA_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"
"""What an answer has of each object; the metadata alone are a fraction of it."""

CONTENT_TYPES = {"PATCH": "application/apply-patch+yaml"}
"""The only patch there is here is a server-side apply."""

PATHS = {
    "ConfigMap": ("/api/v1", "configmaps"),
    "PersistentVolumeClaim": ("/api/v1", "persistentvolumeclaims"),
    "Event": ("/api/v1", "events"),
    "Service": ("/api/v1", "services"),
    "Pod": ("/api/v1", "pods"),
    "Job": ("/apis/batch/v1", "jobs"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
    "Workload": (f"/apis/{KUEUE}/v1beta2", "workloads"),
    "Workload v1beta1": (f"/apis/{KUEUE}/v1beta1", "workloads"),
    KIND: (f"/apis/{API_VERSION}", PLURAL),
}
"""Root and plural of every kind that the operator touches."""

WORKLOADS = ("Workload", "Workload v1beta1")
"""Newer and older Kueue; what is read of them is the same."""

NO_KUEUE_SECONDS = 300
"""For so long Kueue is not looked for again where there was none."""


class KubeError(Exception):
    """The API server refused a call."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status
        self.message = message


class NotFoundError(KubeError):
    """There is no such object."""


class ExistsError(KubeError):
    """There is an object of this name already."""


class StaleError(KubeError):
    """The object has changed since it was read."""


class GoneError(KubeError):
    """The resource version is too old."""


ERRORS = (KubeError, aiohttp.ClientError, TimeoutError, OSError, ValueError)
"""What a call may raise."""


def what(error: Exception) -> str:
    """What an error says; of one that says nothing, as a timeout, its kind."""
    return str(error) or type(error).__name__


def url_of(kind: str, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
    """Path of a collection (all namespaces, or one), an object, or a part of it."""
    root, plural = PATHS[kind]
    middle = f"/namespaces/{namespace}" if namespace else ""
    return "/".join([f"{root}{middle}/{plural}", *(part for part in (name, subresource) if part)])


PATTERNS = {kind: re.compile(rf"{root}(/namespaces/[^/]+)?/{plural}(/.+)?") for kind, (root, plural) in PATHS.items()}


def kind_of(url: str) -> str:
    """The kind that a path of `url_of` is about."""
    return next(kind for kind, pattern in PATTERNS.items() if pattern.fullmatch(url))


Called = Callable[[str, str, str], None]
"""Is told of each call: method, kind, and the status of the answer or `NO_ANSWER`."""

NO_ANSWER = "<error>"
"""As client-go's metrics call it."""


class Kube:
    """A client for the few kinds of `PATHS`."""

    def __init__(self, configuration: Configuration, request_timeout_seconds: float, called: Called) -> None:
        self._api = ApiClient(configuration)
        self._timeout = aiohttp.ClientTimeout(total=request_timeout_seconds, sock_connect=CONNECT_SECONDS)
        self._no_kueue_until = 0.0
        self._before_write: Callable[[], None] = lambda: None
        self._called = called

    @classmethod
    async def connect(cls, request_timeout_seconds: float, called: Called) -> Kube:
        """In a pod by its service account, elsewhere by the kubeconfig."""
        configuration = Configuration()
        if "KUBECONFIG" not in os.environ and await asyncio.to_thread(SERVICE_ACCOUNT.exists):
            config.load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            await config.load_kube_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        configuration.client_session_kwargs = {"trust_env": False}
        return cls(configuration, request_timeout_seconds, called)

    def guarded(self, before_write: Callable[[], None]) -> Kube:
        """The same client, that asks before each write."""
        guarded = copy.copy(self)
        guarded._before_write = before_write  # noqa: SLF001 - of its own copy
        return guarded

    async def close(self) -> None:
        """Close all connections."""
        await self._api.close()  # type: ignore[no-untyped-call]

    # --- reading

    async def read(self, kind: str, namespace: str, name: str) -> JSON:
        """One object, as it is now."""
        return await self._request("GET", url_of(kind, namespace, name))

    async def list_page(self, kind: str, namespace: str | None, *, accept: str = WHOLE, **query: str | int) -> JSON:
        """One page of a list: items, and metadata with resourceVersion and continue."""
        return await self._request("GET", url_of(kind, namespace), query={"limit": PAGE, **query}, accept=accept)

    async def pages(
        self, kind: str, namespace: str | None, *, accept: str = WHOLE, **query: str | int
    ) -> AsyncIterator[JSON]:
        """A list, page by page."""
        more = ""
        while True:
            page = await self.list_page(kind, namespace, accept=accept, **query, **({"continue": more} if more else {}))
            yield page
            more = page["metadata"].get("continue", "")
            if not more:
                return

    async def children(self, kind: str, namespace: str, job_name: str) -> list[JSON]:
        """Jobs or pods of a FineTuneJob and of its namesakes, as they are now."""
        selector = f"{Label.MANAGED_BY}={MANAGER},{Label.JOB_NAME}={job_name}"
        return [
            item
            async for page in self.pages(kind, namespace, labelSelector=selector)
            for item in page.get("items") or ()
        ]

    async def workloads(self, namespace: str, job_uid: str) -> list[JSON] | None:
        """Kueue's Workloads of a Job: one, or none yet. None where there is no Kueue."""
        now = time.monotonic()
        if now < self._no_kueue_until:
            return None
        for kind in WORKLOADS:
            with contextlib.suppress(NotFoundError):
                page = await self.list_page(kind, namespace, labelSelector=f"{JOB_UID_LABEL}={job_uid}")
                found: list[JSON] = page.get("items") or []
                return found
        self._no_kueue_until = now + NO_KUEUE_SECONDS
        return None

    async def events(self, namespace: str, uid: str) -> list[JSON]:
        """Events about one object."""
        page = await self.list_page("Event", namespace, fieldSelector=f"involvedObject.uid={uid}")
        found: list[JSON] = page.get("items") or []
        return found

    async def watch(
        self, kind: str, namespace: str | None, *, accept: str = WHOLE, **query: str | int
    ) -> AsyncIterator[JSON]:
        """Events of a watch until the server ends it; a wrong resource version raises `GoneError`."""
        url = url_of(kind, namespace)
        seconds = int(query["timeoutSeconds"])
        limit = aiohttp.ClientTimeout(total=seconds + GRACE_SECONDS, sock_connect=CONNECT_SECONDS)
        response = await self._send(
            "GET", url, query={"watch": "true", "allowWatchBookmarks": "true", **query}, limit=limit, accept=accept
        )
        async with response:
            if response.status != 200:  # noqa: PLR2004 - OK
                raise _refusal("GET", response.status, await response.read())
            async for line in response.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise _refusal("GET", int(event["object"].get("code", 500)), json.dumps(event["object"]).encode())
                yield event

    # --- writing

    async def create(self, manifest: JSON) -> JSON:
        """Make an object; `ExistsError` if its name is taken."""
        url = url_of(manifest["kind"], manifest["metadata"]["namespace"])
        return await self._request("POST", url, query={"fieldManager": MANAGER}, body=manifest)

    async def replace(self, manifest: JSON) -> JSON:
        """Write an object whole, unless it has changed since it was read (`StaleError`)."""
        metadata = manifest["metadata"]
        url = url_of(manifest["kind"], metadata["namespace"], metadata["name"])
        return await self._request("PUT", url, query={"fieldManager": MANAGER}, body=manifest)

    async def delete(self, kind: str, namespace: str, name: str, uid: str) -> None:
        """Delete this very object, and in the background what it owns; that it is gone already is no error."""
        body = {"propagationPolicy": "Background", "preconditions": {"uid": uid}}
        try:
            await self._request("DELETE", url_of(kind, namespace, name), body=body)
        except (NotFoundError, StaleError):
            return

    async def apply_status(self, namespace: str, name: str, uid: str, resource_version: str, status: JSON) -> None:
        """Write the whole status, unless the resource is gone, or has changed since it was read (`StaleError`).

        Without the resource version a write could land on a recreated namesake.
        """
        metadata = {"name": name, "namespace": namespace, "uid": uid, "resourceVersion": resource_version}
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "status": status}
        with contextlib.suppress(NotFoundError):
            await self._request(
                "PATCH",
                url_of(KIND, namespace, name, "status"),
                query={"fieldManager": MANAGER, "force": "true"},
                body=body,
            )

    # --- below

    async def _request(
        self,
        method: str,
        url: str,
        *,
        query: dict[str, Any] | None = None,
        body: JSON | None = None,
        accept: str = WHOLE,
    ) -> JSON:
        response = await self._send(method, url, query=query, body=body, limit=self._timeout, accept=accept)
        async with response:
            content = await response.read()
        if response.status >= 400:  # noqa: PLR2004 - refused
            raise _refusal(method, response.status, content)
        parsed: JSON = json.loads(content) if content else {}
        return parsed

    async def _send(  # noqa: PLR0913 - the parts of a request
        self,
        method: str,
        url: str,
        *,
        limit: aiohttp.ClientTimeout,
        query: dict[str, Any] | None = None,
        body: JSON | None = None,
        accept: str = WHOLE,
    ) -> aiohttp.ClientResponse:
        _, full, headers, content, _ = await self._api.param_serialize(
            method,
            url,
            query_params=list((query or {}).items()),
            header_params={"Accept": accept, "Content-Type": CONTENT_TYPES.get(method, "application/json")},
            body=body,
            auth_settings=["BearerToken"],
        )
        if method != "GET":
            self._before_write()
        code = NO_ANSWER
        try:
            answer = await self._api.call_api(method, full, headers, content, _request_timeout=limit)
            response: aiohttp.ClientResponse = answer.response
            code = str(response.status)
        finally:
            self._called(method, kind_of(url), code)
        return response


def _refusal(method: str, status: int, content: bytes) -> KubeError:
    """The error that the server's answer stands for."""
    try:
        message = json.loads(content).get("message", "")
    except ValueError:
        message = content[:200].decode(errors="replace")
    conflict = ExistsError if method == "POST" else StaleError
    kinds: dict[int, type[KubeError]] = {404: NotFoundError, 409: conflict, 410: GoneError}
    return kinds.get(status, KubeError)(status, message)
