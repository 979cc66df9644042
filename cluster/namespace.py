"""The cluster's namespaces seen from the host: made, found again, entered, and removed with all that goes with them."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import cgroups
from cluster.errors import ClusterError
from cluster.paths import CHECKOUT, State, locked
from cluster.processes import POLL_SECONDS, start_time, tail, wait_until
from cluster.supervisor import ANSWER_SECONDS, SOCKET

if TYPE_CHECKING:
    from cluster.processes import Component

# Benchmarks of network devices own this range (RFC 2544), so no real network is behind it.
NETWORKS = ipaddress.IPv4Network("198.18.0.0/15")
POD_NETWORK = "10.244.0.0/16"
HOST_FACTS = Path("/run/finetune-operator")  # shared by the clusters of all checkouts; gone with the last of them
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")
STUB_RESOLVER_SOURCE = Path("/run/systemd/resolve/resolv.conf")


@dataclass(frozen=True)
class Namespace:
    """The running namespaces of one cluster."""

    state: State
    pid: int

    @property
    def node_address(self) -> str:
        """Address of the node, which the host reaches and which the API server listens on."""
        return str(self.state.recorded()["node_address"])

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401  whatever JSON can hold
        """Send the supervisor one request."""
        with _connect(self.state) as connection:
            connection.settimeout(ANSWER_SECONDS * 4)
            with connection.makefile("rw") as stream:
                stream.write(json.dumps({"do": do, **arguments}) + "\n")
                stream.flush()
                answer: dict[str, Any] = json.loads(stream.readline() or "{}")
        if "error" in answer:
            raise ClusterError(f"The cluster's supervisor refused to {do}: {answer['error']}")
        return answer

    def start(self, component: Component) -> None:
        """Start the component unless it runs already with this very command; replace one that runs another."""
        running = self.running().get(component.name)
        wanted = json.loads(json.dumps(component.to_json()))
        if running and all(running[key] == wanted[key] for key in ("command", "environment")):
            return
        if running:
            self.stop(component.name)
        self.ask("start", component=wanted)

    def stop(self, name: str, seconds: float = 5.0) -> None:
        """Ask a component to end, and kill it at the deadline."""
        deadline = time.monotonic() + seconds
        if name in self.running():
            self.ask("signal", name=name, number=int(signal.SIGTERM))
        while name in self.running():
            if time.monotonic() > deadline:
                self.ask("signal", name=name, number=int(signal.SIGKILL))
            time.sleep(POLL_SECONDS)

    def running(self) -> dict[str, Any]:
        """Return the components that run."""
        return {name: child for name, child in self.ask("list").items() if not child["ended"]}

    def command(self, *command: str) -> list[str]:
        """Return the host's command line that runs the given one inside."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--pid", "--", *command]

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a short command inside and return its output."""
        result = subprocess.run(self.command(*command), check=False, capture_output=True, text=True)
        if check and result.returncode != 0:
            shown = " ".join([Path(command[0]).name, *command[1:]])
            raise ClusterError(f"'{shown}' failed inside the cluster: {(result.stderr or result.stdout).strip()}")
        return result


def find(state: State) -> Namespace | None:
    """Return the cluster's namespaces if they live. A killed PID 1 may take a while to end, but listens no more."""
    pid = _recorded_pid(state)
    if pid is None:
        return None
    try:
        _connect(state).close()
    except OSError:
        return None
    return Namespace(state, pid)


def _recorded_pid(state: State) -> int | None:
    """Return PID 1's number if it still is the process that was recorded, and not a stranger's after a restart."""
    facts = state.recorded()
    pid: int | None = facts.get("pid")
    if pid is None or facts.get("boot") != _boot() or start_time(pid) != facts.get("start_time"):
        return None
    return pid


def require(state: State) -> Namespace:
    """Return the running namespaces, or say how to start them."""
    found = find(state)
    if found is None:
        raise ClusterError("The cluster is not running.", "Start it with 'python3 -m cluster up'.")
    return found


def create(state: State) -> Namespace:
    """Make the namespaces, cabled to the host and able to reach what the host reaches."""
    state.config.mkdir(parents=True, exist_ok=True)
    state.resolver.write_text(_host_resolver())
    network = _free_network(state)
    host_address, node_address = (str(address) for address in network.hosts())
    state.record(network=str(network), node_address=node_address, host_address=host_address)
    cgroups.create(state.cgroup)
    pid = _start_supervisor(state)
    state.record(pid=pid, start_time=start_time(pid), boot=_boot())
    namespace = Namespace(state, pid)
    _cable(namespace, host_address, network.prefixlen)
    _let_out(state, network)
    return namespace


def remove(state: State) -> None:
    """Remove all that a cluster of this folder has on the host, whether it lives, was killed or never was."""
    for pid in _supervisors(state):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not _supervisors(state), "The end of the cluster's processes", 20)
    subprocess.run(["ip", "link", "delete", state.link], check=False, capture_output=True)
    _remove_rules(state)
    _restore_forwarding(state)
    cgroups.remove(state.cgroup)
    (state.root / SOCKET).unlink(missing_ok=True)
    (state.root / "run.json").unlink(missing_ok=True)


def _supervisors(state: State) -> list[int]:
    """Return PID 1 and its parent by their exact command, recorded or not: an `up` may be killed at any moment."""
    command = f"-m\0cluster.supervisor\0{state.root}\0"
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (entry / "cmdline").read_text(errors="replace").endswith(command):
                found.append(int(entry.name))
    return [pid for pid in found if start_time(pid)]


def _connect(state: State) -> socket.socket:
    """Connect through the folder's descriptor: the path itself may be longer than the 107 bytes of an address."""
    folder = os.open(state.root, os.O_PATH)
    try:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"/proc/self/fd/{folder}/{SOCKET}")
    finally:
        os.close(folder)
    return connection


def _start_supervisor(state: State) -> int:
    """Start PID 1 and return the PID that the host knows it by, which the kernel tells of the socket's other end."""
    state.logs.mkdir(parents=True, exist_ok=True)
    log = state.logs / "supervisor.log"
    (state.root / SOCKET).unlink(missing_ok=True)
    command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, sys.executable, "-m", "cluster.supervisor", str(state.root)],
            cwd=CHECKOUT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def listening() -> bool:
        if process.poll() is not None:
            raise ClusterError(f"The cluster's namespaces could not be made.{tail(log)}")
        with contextlib.suppress(OSError), _connect(state):
            return True
        return False

    wait_until(listening, "The cluster's supervisor", 10, log)
    with _connect(state) as connection:
        pid, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def _cable(namespace: Namespace, host_address: str, prefix: int) -> None:
    link = namespace.state.link
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(namespace.pid))
    _ip("address", "add", f"{host_address}/{prefix}", "dev", link)
    _ip("link", "set", link, "up")
    inside = f"""
        set -e
        ip link set lo up
        ip address add {namespace.node_address}/{prefix} dev eth0
        ip link set eth0 up
        ip route add default via {host_address}
        echo 1 > {FORWARDING}
        iptables -t nat -A POSTROUTING -s {POD_NETWORK} ! -d {POD_NETWORK} -o eth0 -j MASQUERADE
    """
    namespace.run("sh", "-c", inside)


def _free_network(state: State) -> ipaddress.IPv4Network:
    """Return a network of two addresses that the host has no other use for, the same one each time if it can be."""
    taken = [ipaddress.IPv4Network(found) for found in _networks_of_host()]
    candidates = list(NETWORKS.subnets(new_prefix=30))
    first = int(state.id, 16) % len(candidates)
    for network in candidates[first:] + candidates[:first]:
        if not any(network.overlaps(other) for other in taken):
            return network
    raise ClusterError(f"Every network of {NETWORKS} is in use.", "Stop clusters of other checkouts.")


def _networks_of_host() -> list[str]:
    routes = json.loads(_ip("-4", "-json", "route", "show", "table", "all"))
    return [route["dst"] for route in routes if re.fullmatch(r"[\d./]+", route["dst"]) and route["dst"] != "default"]


def _rules(state: State, network: str) -> list[tuple[str, str, list[str]]]:
    mark = ["-m", "comment", "--comment", state.link]
    return [
        ("nat", "POSTROUTING", ["-s", network, "!", "-o", state.link, *mark, "-j", "MASQUERADE"]),
        ("filter", "FORWARD", ["-i", state.link, *mark, "-j", "ACCEPT"]),
        ("filter", "FORWARD", ["-o", state.link, *mark, "-j", "ACCEPT"]),
    ]


def _let_out(state: State, network: ipaddress.IPv4Network) -> None:
    """Forward and masquerade what leaves the cluster."""
    with locked(HOST_FACTS / "lock"):
        before = HOST_FACTS / "ip_forward"
        if not before.exists():
            before.write_text(FORWARDING.read_text())
        if FORWARDING.read_text().strip() != "1":
            FORWARDING.write_text("1")
        (HOST_FACTS / state.link).touch()
    for table, chain, rule in _rules(state, str(network)):
        subprocess.run(["iptables", "-w", "-t", table, "-I", chain, *rule], check=True, capture_output=True)


def _remove_rules(state: State) -> None:
    """Remove every rule with the cluster's mark, however often it was added."""
    if shutil.which("iptables") is None:
        return
    for table in ("nat", "filter"):
        saved = subprocess.run(["iptables", "-w", "-t", table, "-S"], check=False, capture_output=True, text=True)
        for line in saved.stdout.splitlines():
            if f"--comment {state.link} " in line.replace('"', ""):
                rule = line.replace('"', "").split()
                subprocess.run(["iptables", "-w", "-t", table, "-D", *rule[1:]], check=False, capture_output=True)


def _restore_forwarding(state: State) -> None:
    """The last cluster of this machine turns forwarding back to what the first one found."""
    if not HOST_FACTS.exists():
        return
    with locked(HOST_FACTS / "lock"):
        (HOST_FACTS / state.link).unlink(missing_ok=True)
        if any(entry.name.startswith("ftc") for entry in HOST_FACTS.iterdir()):
            return
        before = HOST_FACTS / "ip_forward"
        if before.exists() and before.read_text() != FORWARDING.read_text():
            FORWARDING.write_text(before.read_text())
        shutil.rmtree(HOST_FACTS)


def _host_resolver() -> str:
    """Return the host's resolver settings without name servers on its loopback address, unreachable from inside."""
    settings = Path("/etc/resolv.conf").read_text()
    if re.search(r"^nameserver\s+(127\.|::1)", settings, re.MULTILINE) and STUB_RESOLVER_SOURCE.exists():
        settings = STUB_RESOLVER_SOURCE.read_text()
    usable = [line for line in settings.splitlines() if not re.match(r"nameserver\s+(127\.|::1)", line)]
    return "\n".join(usable) + "\n"


def name_servers(state: State) -> list[str]:
    """Return the name servers that the cluster asks."""
    return re.findall(r"^nameserver\s+(\S+)", state.resolver.read_text(), re.MULTILINE)
