"""A node: containerd, kubelet and kube-proxy, with the settings that this kind of machine needs."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import base_image, build, requirements
from cluster.addons import DNS_ADDRESS
from cluster.errors import ClusterError
from cluster.files import write_json, write_text
from cluster.namespace import POD_NETWORK, Namespace
from cluster.processes import Component, wait_until

if TYPE_CHECKING:
    import subprocess

    from cluster.api import Api
    from cluster.control_plane import Layout
    from cluster.paths import State

PAUSE_IMAGE = "docker.io/finetune-operator/pause"
PROXY_HEALTH_PORT = 10256
PORTS_APART = 100
READY_SECONDS = 120.0


@dataclass(frozen=True)
class Node:
    """Who a node is and what it has of its own; the first has every path and port at its default.

    All nodes share one network and the addresses of pods, so pods meet as they do on one node: see cluster/mounts.py
    for the first one's folders and cluster/joining.py for those of the others.
    """

    name: str
    address: str
    number: int = 0
    """0 is the first, which runs the control plane too."""
    cgroup: str = ""
    """Control group, in every hierarchy, below which the kubelet puts pods."""

    def component(self, program: str) -> str:
        """Name of one of its processes: of a further node with the node's name, as in kubelet@second."""
        return f"{program}@{self.name}" if self.number else program

    def folder(self, default: str) -> Path:
        """A folder of its own in place of a default one."""
        return Path(f"{default}-{self.name}" if self.number else default)

    def port(self, default: int) -> int:
        """A port of its own in place of a default one."""
        return default + self.number * PORTS_APART

    @property
    def socket(self) -> Path:
        """Where its containerd listens."""
        return self.folder("/run/containerd") / "containerd.sock"


def first(namespace: Namespace) -> Node:
    """Return the node that every cluster has."""
    return Node(namespace.state.node_name, namespace.node_address, cgroup=namespace.state.cgroup)


def containerd(state: State, node: Node) -> Component:
    """Return the node's containerd."""
    folder = requirements.cni_folder()
    runc = shutil.which("runc")
    if folder is None or runc is None:
        raise ClusterError("The network plugins or runc are missing.", "Run 'python3 -m cluster build'.")
    network = write_json(state.config / "cni" / "10-finetune.conflist", _network_config())
    name = node.component("containerd")
    config = write_text(state.config / f"{name}.toml", _containerd_config(node, folder, network.parent, runc))
    tools = build.command("containerd").parent
    path = f"{tools}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    command = (str(tools / "containerd"), "--config", str(config))
    return Component(name, command, str(state.logs / f"{name}.log"), environment={"PATH": path})


def pause_image() -> str:
    """Return the sandbox image's name; its tag changes with the program."""
    return f"{PAUSE_IMAGE}:{build.command('pause').parent.name.rpartition('-')[2]}"


def _containerd_config(node: Node, plugins: Path, network: Path, runc: str) -> str:
    """Return containerd's configuration.

    oom_score 0 and restrict_oom_score_adj: lowering a score takes CAP_SYS_RESOURCE, which not every machine gives.
    """
    return f"""\
version = 3
root = '{node.folder("/var/lib/containerd")}'
state = '{node.folder("/run/containerd")}'
oom_score = 0

[grpc]
  address = '{node.socket}'

[ttrpc]
  address = '{node.socket}.ttrpc'

[plugins.'io.containerd.nri.v1.nri']
  disable = true

[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = '{pause_image()}'

[plugins.'io.containerd.cri.v1.runtime']
  restrict_oom_score_adj = true
  max_container_log_line_size = 65536

[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['{plugins}']
  conf_dir = '{network}'

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  BinaryName = '{runc}'
"""


def _network_config() -> dict[str, Any]:
    """Return the pods' network: a cable each, routed; unlike a bridge it needs no br_netfilter for Services."""
    addresses = {
        "type": "host-local",
        "ranges": [[{"subnet": POD_NETWORK}]],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dataDir": "/run/cni-addresses",
    }
    return {
        "cniVersion": "1.0.0",
        "name": "finetune",
        "plugins": [{"type": "ptp", "ipam": addresses}, {"type": "portmap", "capabilities": {"portMappings": True}}],
    }


def kubelet(namespace: Namespace, layout: Layout, node: Node) -> Component:
    """Return the node's kubelet; a container that breaks its memory limit is really killed."""
    state, name = namespace.state, node.component("kubelet")
    identity = f"kubelet-{node.name}"
    config = write_json(state.config / f"{name}.json", _kubelet_config(namespace, layout, node))
    options = {
        "config": config,
        "kubeconfig": layout.kubeconfig(identity),
        "hostname-override": node.name,
        "node-ip": node.address,
        "root-dir": node.folder("/var/lib/kubelet"),
        "housekeeping-interval": "30s",  # how often cAdvisor reads every container's usage: idle CPU is the demo's
    }
    command = (str(build.command("kubelet")), *(f"--{option}={value}" for option, value in options.items()))
    return Component(name, command, str(state.logs / f"{name}.log"), f"http://127.0.0.1:{node.port(10248)}/healthz")


def _kubelet_config(namespace: Namespace, layout: Layout, node: Node) -> dict[str, Any]:
    certificate = layout.certificates / f"kubelet-{node.name}"
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(layout.certificates / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{certificate}.crt",
        "tlsPrivateKeyFile": f"{certificate}.key",
        "containerRuntimeEndpoint": f"unix://{node.socket}",
        "port": node.port(10250),
        "healthzPort": node.port(10248),
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": str(namespace.state.resolver),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": node.cgroup,
        "failCgroupV1": False,
        "failSwapOn": False,
        "featureGates": {"KubeletInUserNamespace": True},  # tolerates the missing CAP_SYS_RESOURCE
        "volumePluginDir": str(node.folder("/var/lib/kubelet") / "volume-plugins"),  # the default: /usr, on the host
        "podLogsDir": str(node.folder("/var/log/pods")),  # it removes logs of pods that it does not know
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1Gi", "imagefs.available": "1Gi"},
        "imageGCHighThresholdPercent": 100,  # never: the images are the ones just built
        "eventRecordQPS": 0,  # unlimited: tests read events
        "kubeAPIQPS": 100,
        "kubeAPIBurst": 200,
        "serializeImagePulls": False,
    }


def kube_proxy(namespace: Namespace, layout: Layout) -> Component:
    """Return kube-proxy, which makes Services out of iptables rules."""
    state = namespace.state
    unchanged = {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"}
    content = {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "clientConnection": {"kubeconfig": str(layout.kubeconfig("kube-proxy"))},
        "mode": "iptables",
        "clusterCIDR": POD_NETWORK,
        "hostnameOverride": state.node_name,
        "conntrack": unchanged,  # these limits are the whole machine's
        "healthzBindAddress": f"127.0.0.1:{PROXY_HEALTH_PORT}",
        "metricsBindAddress": "127.0.0.1:10249",
    }
    config = write_json(state.config / "kube-proxy.json", content)
    command = (str(build.command("kube-proxy")), f"--config={config}")
    health = f"http://127.0.0.1:{PROXY_HEALTH_PORT}/livez"
    return Component("kube-proxy", command, str(state.logs / "kube-proxy.log"), health)


def import_images(namespace: Namespace) -> None:
    """Put the pause and base images into containerd's store, where they stay between runs."""
    present = images(namespace)
    if pause_image() not in present:
        import_program(namespace, pause_image(), build.command("pause"))
    if base_image.reference() not in present:
        ctr(namespace, "images", "import", str(base_image.archive()))


def import_program(namespace: Namespace, name: str, program: Path) -> None:
    """Put an image of one static program into containerd's store."""
    with tempfile.TemporaryDirectory(dir=namespace.state.root, prefix="program-") as folder:
        archive = Path(folder) / "image.tar"
        base_image.write_program_image(archive, name, program)
        ctr(namespace, "images", "import", str(archive))


def images(namespace: Namespace) -> list[str]:
    """Return the names of the images in the store."""
    return ctr(namespace, "images", "list", "--quiet").split()


def ctr(namespace: Namespace, *arguments: str) -> str:
    """Run containerd's own client on the first node's store."""
    return _ctr(namespace, first(namespace), *arguments).stdout


def _ctr(namespace: Namespace, node: Node, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    client = (str(build.command("ctr")), "--address", str(node.socket), "--namespace", "k8s.io")
    return namespace.run(*client, *arguments, check=check)


def wait_for_containerd(namespace: Namespace, node: Node) -> None:
    """Wait until the node's containerd answers."""

    def answers() -> bool:
        return _ctr(namespace, node, "version", check=False).returncode == 0

    name = node.component("containerd")
    wait_until(answers, name, READY_SECONDS, namespace.state.logs / f"{name}.log")


def remove_containers(namespace: Namespace, node: Node) -> bool:
    """Kill and forget every container of the node; tell whether there was any."""
    containers = _ctr(namespace, node, "containers", "list", "--quiet").stdout.split()
    for name in containers:
        _ctr(namespace, node, "tasks", "delete", "--force", name, check=False)
    if containers:
        _ctr(namespace, node, "containers", "delete", *containers)
    return bool(containers)


def forget_containers(namespace: Namespace, node: Node) -> None:
    """Forget pods of another run or node; a containerd that has read of them reads its store afresh.

    Sandboxes are removed by containerd, not left to a kubelet, which would give their addresses back: those of a copied
    store are in use by the pods of the node that it was copied from.
    """
    listed = _ctr(namespace, node, "sandboxes", "list").stdout.splitlines()[1:]
    if sandboxes := [line.split()[0] for line in listed if line.strip()]:
        _ctr(namespace, node, "sandboxes", "remove", "--force", *sandboxes)
    if remove_containers(namespace, node) or sandboxes:
        namespace.stop(node.component("containerd"))
        namespace.start(containerd(namespace.state, node))
        wait_for_containerd(namespace, node)


def is_ready(api: Api, name: str) -> bool:
    """Tell whether the node of this name is Ready."""
    found = api.get(f"/api/v1/nodes/{name}") or {}
    conditions = found.get("status", {}).get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)
