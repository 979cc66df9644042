"""What makes a bare cluster useful: names (CoreDNS) and volumes (local-path-provisioner), as processes of the node."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from cluster import base_image, build, kubeconfig
from cluster.files import write_json, write_text
from cluster.namespace import Namespace, name_servers
from cluster.processes import Component

if TYPE_CHECKING:
    from cluster.api import Api, Manifest
    from cluster.control_plane import Layout
    from cluster.paths import State

DNS_ADDRESS = "10.96.0.10"
DNS_HEALTH_PORT = 8080
STORAGE_NAMESPACE = "local-path-storage"
STORAGE_CONFIG = "local-path-config"
STORAGE_CLASS, SHARED_CLASS = "local-path", "shared"
"""The default class, whose volumes belong to a node, and one whose volumes pods of all nodes mount (ReadWriteMany)."""


def apply(namespace: Namespace, api: Api) -> None:
    """Apply the addons' objects."""
    for manifest in [*_dns_manifests(namespace.node_address), *_storage_manifests(namespace.state)]:
        api.apply(manifest)


def coredns(namespace: Namespace, layout: Layout) -> Component:
    """Return CoreDNS, listening on the node's address behind the Service kube-dns."""
    state = namespace.state
    corefile = write_text(state.config / "Corefile", _corefile(namespace, layout))
    command = (str(build.command("coredns")), "-conf", str(corefile))
    return Component("coredns", command, str(state.logs / "coredns.log"), f"http://127.0.0.1:{DNS_HEALTH_PORT}/health")


def _corefile(namespace: Namespace, layout: Layout) -> str:
    """Return CoreDNS's configuration; names of the cluster are never cached, so a new pod is found at once."""
    servers = " ".join(name_servers(namespace.state))
    forward = f"forward . {servers}" if servers else ""
    return f"""\
.:53 {{
    bind {namespace.node_address}
    errors
    health 127.0.0.1:{DNS_HEALTH_PORT} {{
        lameduck 0s
    }}
    kubernetes cluster.local in-addr.arpa ip6.arpa {{
        kubeconfig {layout.kubeconfig("admin")} {kubeconfig.CONTEXT}
        pods insecure
        fallthrough in-addr.arpa ip6.arpa
        ttl 1
    }}
    {forward}
    cache 30 {{
        disable success cluster.local
        disable denial cluster.local
    }}
}}
"""


def _dns_manifests(address: str) -> list[Manifest]:
    """Return the Service and its endpoint, written by hand because CoreDNS is no pod."""
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns-tcp", "port": 53, "protocol": "TCP"}]
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system"},
        "spec": {"clusterIP": DNS_ADDRESS, "ports": ports},
    }
    slice_ = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "kube-dns-node",
            "namespace": "kube-system",
            "labels": {"kubernetes.io/service-name": "kube-dns"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": ports,
    }
    return [service, slice_]


def local_path_provisioner(state: State, layout: Layout) -> Component:
    """Return the provisioner of PersistentVolumes below the state folder."""
    config = write_json(state.config / "local-path.json", _storage_config(state))
    options = {
        "config": config,
        "namespace": STORAGE_NAMESPACE,
        "kubeconfig": layout.kubeconfig("admin"),
        "helper-image": base_image.reference(),
        "configmap-name": STORAGE_CONFIG,
        "service-account-name": "default",
    }
    command = (
        str(build.command("local-path-provisioner")),
        "start",
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    )
    return Component("local-path-provisioner", command, str(state.logs / "local-path-provisioner.log"))


def _storage_config(state: State) -> dict[str, Any]:
    folder = str(state.volumes)
    classes = {
        STORAGE_CLASS: {"nodePathMap": [{"node": "DEFAULT_PATH_FOR_NON_LISTED_NODES", "paths": [folder]}]},
        SHARED_CLASS: {"sharedFileSystemPath": folder},  # all nodes of this cluster see one file system
    }
    return {"storageClassConfigs": classes}


def _storage_manifests(state: State) -> list[Manifest]:
    """Return the classes, and the scripts and pod by which the provisioner makes and removes folders."""
    helper = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "helper-pod"},
        "spec": {"containers": [{"name": "helper-pod", "image": base_image.reference()}]},
    }
    scripts = {
        "config.json": json.dumps(_storage_config(state)),
        "setup": '#!/bin/sh\nset -eu\nmkdir -m 0777 -p "$VOL_DIR"\n',
        "teardown": '#!/bin/sh\nset -eu\nrm -rf "$VOL_DIR"\n',
        "helperPod.yaml": json.dumps(helper),
    }
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": STORAGE_NAMESPACE}},
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": STORAGE_CONFIG, "namespace": STORAGE_NAMESPACE},
            "data": scripts,
        },
        _storage_class(STORAGE_CLASS, default=True),
        _storage_class(SHARED_CLASS, default=False),
    ]


def _storage_class(name: str, *, default: bool) -> Manifest:
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": name,
            "annotations": {"storageclass.kubernetes.io/is-default-class": str(default).lower()},
        },
        "provisioner": "rancher.io/local-path",
        "volumeBindingMode": "WaitForFirstConsumer",
        "reclaimPolicy": "Delete",
    }
