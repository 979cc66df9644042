"""Keys and certificates of one run, made with openssl: one authority, and who each component is."""

from __future__ import annotations

import ipaddress
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import ClusterError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

DAYS = "3650"


@dataclass(frozen=True)
class Identity:
    """A certificate to issue: file name, subject, and the names that a server answers to."""

    file: str
    common_name: str
    organization: str = ""
    served_names: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """The subject as openssl reads it."""
        organization = f"/O={self.organization}" if self.organization else ""
        return f"{organization}/CN={self.common_name}"


def admin() -> Identity:
    """Return the administrator, who may do everything."""
    return Identity("admin", "finetune-admin", "system:masters")


def api_server(names: Sequence[str]) -> Identity:
    """Return the API server, serving under these names and calling kubelets."""
    return Identity("kube-apiserver", "kube-apiserver", "system:masters", tuple(names))


def controller_manager() -> Identity:
    """Return the controller manager."""
    return Identity("kube-controller-manager", "system:kube-controller-manager")


def scheduler() -> Identity:
    """Return the scheduler."""
    return Identity("kube-scheduler", "system:kube-scheduler")


def proxy() -> Identity:
    """Return the network proxy of services."""
    return Identity("kube-proxy", "system:kube-proxy")


def kubelet(node: str, address: str) -> Identity:
    """Return the kubelet of a node; the name is what the node authorizer goes by."""
    return Identity(f"kubelet-{node}", f"system:node:{node}", "system:nodes", (node, address))


def issue_all(folder: Path, identities: Iterable[Identity]) -> None:
    """Make the authority, the key of service account tokens, and every certificate."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    _openssl(folder, *_request("ca", "/CN=finetune-local-ca"), "-addext", "keyUsage=critical,keyCertSign,cRLSign")
    _openssl(folder, "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048", "-out", "sa.key")
    _openssl(folder, "pkey", "-in", "sa.key", "-pubout", "-out", "sa.pub")
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda identity: issue(folder, identity), identities))


def _request(file: str, subject: str) -> list[str]:
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{file}.key"]
    return ["req", "-x509", *key, "-subj", subject, "-days", DAYS, "-out", f"{file}.crt"]


def issue(folder: Path, identity: Identity) -> None:
    """Make one certificate by the authority in the folder."""
    usage = ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "extendedKeyUsage=clientAuth,serverAuth"]
    if identity.served_names:
        usage += ["-addext", f"subjectAltName={','.join(_alternative_name(name) for name in identity.served_names)}"]
    _openssl(folder, *_request(identity.file, identity.subject), "-CA", "ca.crt", "-CAkey", "ca.key", *usage)


def _alternative_name(name: str) -> str:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return f"DNS:{name}"
    return f"IP:{name}"


def _openssl(folder: Path, *arguments: str) -> None:
    try:
        result = subprocess.run(["openssl", *arguments], cwd=folder, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise ClusterError("openssl is missing.", "Install the package openssl, version 3 or newer.") from error
    if result.returncode != 0:
        message = f"openssl could not make a certificate: {result.stderr.strip().splitlines()[-1]}"
        raise ClusterError(message, "It must be version 3 or newer.")
