"""etcd, API server, controller manager and scheduler: their commands, and a light control plane for tests.

    with ControlPlane(tmp_path) as control_plane:
        run("kubectl", "--kubeconfig", control_plane.kubeconfig, ...)

The light one runs as plain child processes on free ports of the loopback address; any user may run it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cluster import build, certificates, kubeconfig
from cluster.api import Api
from cluster.files import write_json
from cluster.processes import Component, free_ports, spawn, stop, wait_until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

    from cluster.paths import State

SERVICE_NETWORK = "10.96.0.0/16"
FIRST_SERVICE_ADDRESS = "10.96.0.1"
READY_SECONDS = 60.0
SERVED_NAMES = (
    "localhost",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc",
    "kubernetes.default.svc.cluster.local",
    FIRST_SERVICE_ADDRESS,
    "127.0.0.1",
)

# Tests create and delete many objects at once. With the defaults (20 to 50 requests a second) the controllers, not the
# machine, set the pace.
CLIENT_QPS = 200
CLIENT_BURST = 400


@dataclass(frozen=True)
class Layout:
    """Where one control plane keeps its files and listens."""

    certificates: Path
    config: Path
    data: Path
    logs: Path
    address: str = "127.0.0.1"
    etcd_port: int = 2379
    etcd_peer_port: int = 2380
    api_port: int = 6443
    controller_manager_port: int = 10257
    scheduler_port: int = 10259

    @classmethod
    def below(cls, directory: Path) -> Self:
        """A control plane of its own: all files below the directory, free ports of the loopback."""
        etcd_port, peer_port, api_port, manager_port, scheduler_port = free_ports(5)
        return cls(
            certificates=directory / "certificates",
            config=directory / "config",
            data=directory / "etcd",
            logs=directory / "logs",
            etcd_port=etcd_port,
            etcd_peer_port=peer_port,
            api_port=api_port,
            controller_manager_port=manager_port,
            scheduler_port=scheduler_port,
        )

    @property
    def server(self) -> str:
        """Address that clients use."""
        return f"https://{self.address}:{self.api_port}"

    @property
    def on_loopback(self) -> bool:
        """Whether this is the light control plane, which no pod can reach."""
        return self.address.startswith("127.")

    def log(self, name: str) -> str:
        """Return the path of a component's log."""
        return str(self.logs / f"{name}.log")

    def kubeconfig(self, identity: str) -> Path:
        """Return the path of a component's kubeconfig."""
        return self.config / f"{identity}.kubeconfig"


def layout_of(state: State, address: str) -> Layout:
    """Return where the cluster's control plane lies and listens."""
    return Layout(
        certificates=state.certificates,
        config=state.config,
        data=state.root / "etcd",
        logs=state.logs,
        address=address,
    )


def issue(layout: Layout, *more: certificates.Identity) -> None:
    """Make certificates and the control plane's kubeconfigs."""
    server = certificates.api_server([*SERVED_NAMES, layout.address])
    clients = (certificates.admin(), certificates.controller_manager(), certificates.scheduler(), *more)
    certificates.issue_all(layout.certificates, [server, *clients])
    for client in clients:
        kubeconfig.write(layout.kubeconfig(client.file), layout.server, layout.certificates, client.file)


def etcd(layout: Layout) -> Component:
    """Return etcd, which need not survive a power cut."""
    client, peer = (f"http://127.0.0.1:{port}" for port in (layout.etcd_port, layout.etcd_peer_port))
    options = {
        "name": "local",
        "data-dir": layout.data,
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"local={peer}",
        "unsafe-no-fsync": "true",
        "log-level": "warn",
    }
    return Component("etcd", _command("etcd", options), layout.log("etcd"), f"{client}/health")


def api_server(layout: Layout) -> Component:
    """Return the API server, which enforces Pod Security by its built-in default plugins."""
    own = layout.certificates
    options = {
        "etcd-servers": f"http://127.0.0.1:{layout.etcd_port}",
        "bind-address": layout.address if layout.on_loopback else "0.0.0.0",  # noqa: S104  within its own network
        "advertise-address": layout.address,
        "secure-port": layout.api_port,
        "service-cluster-ip-range": SERVICE_NETWORK,
        "authorization-mode": "Node,RBAC",
        "enable-admission-plugins": "NodeRestriction",
        "allow-privileged": "true",
        "profiling": "false",
        "client-ca-file": own / "ca.crt",
        "tls-cert-file": own / "kube-apiserver.crt",
        "tls-private-key-file": own / "kube-apiserver.key",
        "kubelet-client-certificate": own / "kube-apiserver.crt",
        "kubelet-client-key": own / "kube-apiserver.key",
        "kubelet-certificate-authority": own / "ca.crt",
        "kubelet-preferred-address-types": "InternalIP",
        "service-account-issuer": "https://kubernetes.default.svc.cluster.local",
        "service-account-key-file": own / "sa.pub",
        "service-account-signing-key-file": own / "sa.key",
    }
    if layout.on_loopback:
        options["endpoint-reconciler-type"] = "none"  # a loopback address may not be the endpoint of a Service
    health = f"{layout.server}/livez"
    return Component("kube-apiserver", _command("kube-apiserver", options), layout.log("kube-apiserver"), health)


def controller_manager(layout: Layout) -> Component:
    """Return the controller manager: Jobs, endpoints, garbage collection, service accounts."""
    identity = certificates.controller_manager().file
    options = {
        "kubeconfig": layout.kubeconfig(identity),
        "use-service-account-credentials": "true",
        "service-account-private-key-file": layout.certificates / "sa.key",
        "root-ca-file": layout.certificates / "ca.crt",
        "leader-elect": "false",
        "kube-api-qps": CLIENT_QPS,
        "kube-api-burst": CLIENT_BURST,
        "bind-address": "127.0.0.1",
        "secure-port": layout.controller_manager_port,
        "profiling": "false",
    }
    health = f"https://127.0.0.1:{layout.controller_manager_port}/healthz"
    return Component(identity, _command(identity, options), layout.log(identity), health)


def scheduler(layout: Layout) -> Component:
    """Return the scheduler."""
    identity = certificates.scheduler().file
    content = {
        "apiVersion": "kubescheduler.config.k8s.io/v1",
        "kind": "KubeSchedulerConfiguration",
        "leaderElection": {"leaderElect": False},
        "clientConnection": {
            "kubeconfig": str(layout.kubeconfig(identity)),
            "qps": CLIENT_QPS,
            "burst": CLIENT_BURST,
        },
    }
    config = write_json(layout.config / "kube-scheduler.json", content)
    options = {"config": config, "bind-address": "127.0.0.1", "secure-port": layout.scheduler_port}
    health = f"https://127.0.0.1:{layout.scheduler_port}/healthz"
    return Component(identity, _command(identity, options), layout.log(identity), health)


def _command(name: str, options: dict[str, object]) -> tuple[str, ...]:
    return (str(build.command(name)), *(f"--{option}={value}" for option, value in options.items()))


class ControlPlane:
    """A real etcd and API server, and where asked for the controller manager, for the length of a test."""

    def __init__(self, directory: Path, *, with_controllers: bool = False) -> None:
        """Keep everything below the directory; nothing starts before ``with``."""
        self.layout = Layout.below(directory)
        self.with_controllers = with_controllers
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def kubeconfig(self) -> Path:
        """Administrator's kubeconfig."""
        return self.layout.kubeconfig(certificates.admin().file)

    @property
    def server(self) -> str:
        """Address of the API server."""
        return self.layout.server

    def __enter__(self) -> Self:
        """Start everything and wait until the API server is ready."""
        build.build_control_plane()
        try:
            issue(self.layout)
            self._spawn(etcd(self.layout))
            self.start()
            if self.with_controllers:
                self._spawn(controller_manager(self.layout))
                self._wait(_has_default_account, "The default service account")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End every process, the last one started first."""
        for child in reversed(self._children.values()):
            stop(child)
        self._children.clear()

    def start(self) -> None:
        """Start the API server and wait until it is ready."""
        self._spawn(api_server(self.layout))
        self._wait(Api.ready, "The API server")

    def stop(self) -> None:
        """End the API server; etcd keeps what it knew."""
        stop(self._children.pop("kube-apiserver"))

    def _spawn(self, component: Component) -> None:
        self._children[component.name] = spawn(component)

    def _wait(self, condition: Callable[[Api], bool], what: str) -> None:
        api = Api(self.kubeconfig)
        wait_until(lambda: condition(api), what, READY_SECONDS, Path(self.layout.log("kube-apiserver")))


def _has_default_account(api: Api) -> bool:
    return api.get("/api/v1/namespaces/default/serviceaccounts/default") is not None
