"""A small client of the API server: just enough to wait and to apply, without the half second that kubectl takes."""

from __future__ import annotations

import base64
import json
import ssl
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

Manifest = dict[str, Any]
TIMEOUT_SECONDS = 10.0
PLURALS = {"StorageClass": "storageclasses", "EndpointSlice": "endpointslices"}
CLUSTER_WIDE = {"Namespace", "StorageClass", "Node"}


class Api:
    """Calls with the identity of a kubeconfig written by this package."""

    def __init__(self, kubeconfig: Path) -> None:
        """Read server and certificates; nothing is called yet."""
        config = json.loads(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self.server: str = cluster["server"]
        authority = base64.b64decode(cluster["certificate-authority-data"]).decode()
        context = ssl.create_default_context(cadata=authority)
        with tempfile.TemporaryDirectory() as folder:
            pair = Path(folder, "pair.pem")
            pair.touch(mode=0o600)
            pair.write_bytes(b"".join(base64.b64decode(user[f"client-{part}-data"]) for part in ("key", "certificate")))
            context.load_cert_chain(pair)
        # no proxy: the cluster is on this machine, whatever HTTPS_PROXY says
        self._opener = urllib.request.build_opener(
            urllib.request.HTTPSHandler(context=context), urllib.request.ProxyHandler({})
        )

    def call(self, method: str, path: str, body: Manifest | None = None, kind: str = "application/json") -> bytes:
        """Make one call; an answer of 400 or more raises urllib's HTTPError."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.server}{path}", data, {"Content-Type": kind}, method=method)  # noqa: S310  always https, from our own kubeconfig
        with self._opener.open(request, timeout=TIMEOUT_SECONDS) as answer:
            content: bytes = answer.read()
        return content

    def get(self, path: str) -> Manifest | None:
        """Return the object, or None while it or the server is not there."""
        try:
            found: Manifest = json.loads(self.call("GET", path))
        except OSError:
            return None
        return found

    def ready(self) -> bool:
        """Tell whether the API server says that it is ready."""
        try:
            return self.call("GET", "/readyz") == b"ok"
        except OSError:
            return False

    def apply(self, manifest: Manifest) -> None:
        """Create the object or bring it to the manifest, by server-side apply."""
        query = "?fieldManager=finetune-cluster&force=true"
        self.call("PATCH", path_of(manifest) + query, manifest, "application/apply-patch+yaml")


def path_of(manifest: Manifest) -> str:
    """Return the object's path on the API server."""
    version, kind, metadata = manifest["apiVersion"], manifest["kind"], manifest["metadata"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    plural = PLURALS.get(kind, f"{kind.lower()}s")
    scope = "" if kind in CLUSTER_WIDE else f"/namespaces/{metadata['namespace']}"
    return f"{root}{scope}/{plural}/{metadata['name']}"
