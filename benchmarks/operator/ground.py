"""Where the operators are measured: etcd, API server, controller manager, scheduler and KWOK, on this machine's cores.

Client limits are raised, or the controllers' own pace (20 requests a second) is what one measures. Storage is not part
of it: claims are made and never bound, so the binder of volumes and the scheduler's volume plugins are off. The API
server writes down each call of the operators, and of nobody else.
"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import yaml

from benchmarks.operator import fakes
from benchmarks.operator.calls import AUDITED, Calls
from cluster import build, certificates, control_plane
from cluster.api import Api
from cluster.control_plane import Layout
from cluster.files import write_json
from cluster.processes import Component, spawn, stop, wait_until
from finetune_operator.crd import render

if TYPE_CHECKING:
    from collections.abc import Callable

QPS, BURST = 1000, 2000
READY_SECONDS = 90.0
VOLUME_PLUGINS = ("VolumeBinding", "VolumeZone", "VolumeRestrictions", "NodeVolumeLimits")
NAMESPACE = "default"
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "users": list(AUDITED)}, {"level": "None"}],
}


class Ground:
    """A control plane with fake nodes, for the length of a `with`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.layout = Layout.below(directory)
        self.pids: dict[str, int] = {}
        """By the component's name."""
        self.calls = Calls(directory / "audit.log")
        self._stack = ExitStack()

    @property
    def kubeconfig(self) -> Path:
        """The administrator's."""
        return self.layout.kubeconfig(certificates.admin().file)

    def kubeconfig_of(self, user: str) -> Path:
        """An operator's own."""
        return self.layout.kubeconfig(user)

    def __enter__(self) -> Self:
        """Start everything; the CRD is in service and the nodes are ready."""
        build.build_control_plane()
        build.build_fake_nodes()
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        users = [certificates.Identity(user, user, "system:masters") for user in AUDITED]
        control_plane.issue(self.layout, *users)
        self._spawn(control_plane.etcd(self.layout))
        self._spawn(self._api_server())
        api = Api(self.kubeconfig)
        self._wait(api.ready, "The API server")
        self._spawn(self._controller_manager())
        self._spawn(self._scheduler())
        self._wait(lambda: api.get(f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/default") is not None, "An account")
        api.call("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", yaml.safe_load(render()))
        self._wait(lambda: api.get("/apis/finetune.dev/v1alpha1/finetunejobs") is not None, "The CRD in service")
        for node in fakes.nodes():
            api.call("POST", "/api/v1/nodes", node)
        self._spawn(self._kwok())

    def _api_server(self) -> Component:
        policy = write_json(self.directory / "audit-policy.json", AUDIT_POLICY)
        options = {
            "audit-policy-file": policy,
            "audit-log-path": self.calls.file,
            "profiling": "true",
            "max-requests-inflight": 1000,
            "max-mutating-requests-inflight": 500,
        }
        return _told(control_plane.api_server(self.layout), options)

    def _controller_manager(self) -> Component:
        controllers = "*,-persistentvolume-binder-controller"
        options = {"kube-api-qps": QPS, "kube-api-burst": BURST, "controllers": controllers}
        return _told(control_plane.controller_manager(self.layout), options)

    def _scheduler(self) -> Component:
        """Without its volume plugins: a pod does not wait for a claim that nobody binds."""
        component = control_plane.scheduler(self.layout)
        file = self.layout.config / "kube-scheduler.json"
        content = json.loads(file.read_text())
        content["clientConnection"] |= {"qps": QPS, "burst": BURST}
        off = [{"name": name} for name in VOLUME_PLUGINS]
        content["profiles"] = [{"schedulerName": "default-scheduler", "plugins": {"multiPoint": {"disabled": off}}}]
        write_json(file, content)
        return component

    def _kwok(self) -> Component:
        config = self.layout.config / "kwok.yaml"
        config.write_text(yaml.safe_dump_all(fakes.documents()))
        command = (
            str(build.command("kwok")),
            "--config",
            str(config),
            "--kubeconfig",
            str(self.kubeconfig),
            "--v",
            "WARN",
        )
        return Component("kwok", command, self.layout.log("kwok"))

    def _spawn(self, component: Component) -> None:
        child = spawn(component)
        self._stack.callback(stop, child)
        self.pids[component.name] = child.pid

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, what, READY_SECONDS, Path(self.layout.log("kube-apiserver")))


def _told(component: Component, options: dict[str, object]) -> Component:
    """The component with more options; of one that is given twice the last holds."""
    more = (f"--{option}={value}" for option, value in options.items())
    return replace(component, command=(*component.command, *more))
