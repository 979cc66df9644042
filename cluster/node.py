"""The node: containerd, kubelet and kube-proxy, with the settings that this kind of machine needs."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from cluster import base_image, build, requirements
from cluster.addons import DNS_ADDRESS
from cluster.errors import ClusterError
from cluster.files import write_json, write_text
from cluster.namespace import POD_NETWORK, Namespace
from cluster.processes import Component

if TYPE_CHECKING:
    from pathlib import Path

    from cluster.control_plane import Layout
    from cluster.paths import State

PAUSE_IMAGE = "docker.io/finetune-operator/pause"
CONTAINERD_SOCKET = "/run/containerd/containerd.sock"
KUBELET_HEALTH_PORT = 10248
PROXY_HEALTH_PORT = 10256


def containerd(state: State) -> Component:
    """Return containerd, with every path at its default: see cluster/mounts.py."""
    folder = requirements.cni_folder()
    runc = shutil.which("runc")
    if folder is None or runc is None:
        raise ClusterError("The network plugins or runc are missing.", "Run 'python3 -m cluster build'.")
    network = write_json(state.config / "cni" / "10-finetune.conflist", _network_config())
    config = write_text(state.config / "containerd.toml", _containerd_config(folder, network.parent, runc))
    tools = build.command("containerd").parent
    path = f"{tools}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    command = (str(tools / "containerd"), "--config", str(config))
    return Component("containerd", command, str(state.logs / "containerd.log"), environment={"PATH": path})


def pause_image() -> str:
    """Return the sandbox image's name; its tag changes with the program."""
    return f"{PAUSE_IMAGE}:{build.command('pause').parent.name.rpartition('-')[2]}"


def _containerd_config(plugins: Path, network: Path, runc: str) -> str:
    """Return containerd's configuration.

    oom_score 0 and restrict_oom_score_adj: lowering a score takes CAP_SYS_RESOURCE, which not every machine gives.
    """
    return f"""\
version = 3
oom_score = 0

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


def kubelet(namespace: Namespace, layout: Layout) -> Component:
    """Return the kubelet; a container that breaks its memory limit is really killed."""
    state = namespace.state
    identity = f"kubelet-{state.node_name}"
    config = write_json(state.config / "kubelet.json", _kubelet_config(namespace, layout, identity))
    options = {
        "config": config,
        "kubeconfig": layout.kubeconfig(identity),
        "hostname-override": state.node_name,
        "node-ip": namespace.node_address,
        "root-dir": "/var/lib/kubelet",
        "housekeeping-interval": "30s",  # how often cAdvisor reads every container's usage: idle CPU is the demo's
    }
    command = (str(build.command("kubelet")), *(f"--{name}={value}" for name, value in options.items()))
    health = f"http://127.0.0.1:{KUBELET_HEALTH_PORT}/healthz"
    return Component("kubelet", command, str(state.logs / "kubelet.log"), health)


def _kubelet_config(namespace: Namespace, layout: Layout, identity: str) -> dict[str, Any]:
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": str(layout.certificates / "ca.crt")},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(layout.certificates / f"{identity}.crt"),
        "tlsPrivateKeyFile": str(layout.certificates / f"{identity}.key"),
        "containerRuntimeEndpoint": f"unix://{CONTAINERD_SOCKET}",
        "healthzPort": KUBELET_HEALTH_PORT,
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": str(namespace.state.resolver),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": namespace.state.cgroup,
        "failCgroupV1": False,
        "failSwapOn": False,
        "featureGates": {"KubeletInUserNamespace": True},  # tolerates the missing CAP_SYS_RESOURCE
        "volumePluginDir": "/var/lib/kubelet/volume-plugins",  # the default is below /usr, on the host
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
        _import_pause(namespace)
    if base_image.reference() not in present:
        ctr(namespace, "images", "import", str(base_image.archive()))


def _import_pause(namespace: Namespace) -> None:
    folder = namespace.state.root / "pause"
    folder.mkdir(exist_ok=True)
    base_image.write_program_image(folder / "image.tar", pause_image(), build.command("pause"))
    ctr(namespace, "images", "import", str(folder / "image.tar"))
    shutil.rmtree(folder)


def images(namespace: Namespace) -> list[str]:
    """Return the names of the images in the store."""
    return ctr(namespace, "images", "list", "--quiet").split()


def ctr(namespace: Namespace, *arguments: str) -> str:
    """Run containerd's own client on the kubelet's store."""
    return namespace.run(str(build.command("ctr")), "--namespace", "k8s.io", *arguments).stdout


def remove_containers(namespace: Namespace) -> bool:
    """Kill and forget every container; tell whether there was any."""
    containers = ctr(namespace, "containers", "list", "--quiet").split()
    for name in containers:
        namespace.run(str(build.command("ctr")), "-n", "k8s.io", "tasks", "delete", "--force", name, check=False)
    if containers:
        ctr(namespace, "containers", "delete", *containers)
    return bool(containers)
