"""A wrong value is refused with a word that says which one and why."""

from __future__ import annotations

import pytest

from .conftest import Helm, HelmError


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("replica", 2, "additional properties 'replica' not allowed"),
        ("replicas", "2", r"at '/replicas': got string, want integer"),
        ("replicas", -1, r"at '/replicas': minimum: got -1, want 0"),
        ("image.tga", "1.0", r"at '/image': additional properties 'tga' not allowed"),
        ("trainer.image.tga", "1.0", r"at '/trainer/image': additional properties 'tga' not allowed"),
        ("operator.startDeadline", 3, r"at '/operator': additional properties 'startDeadline' not allowed"),
        ("trainer.volume.class", "fast", r"at '/trainer/volume': additional properties 'class' not allowed"),
        ("trainer.volume.size", 50, r"at '/trainer/volume/size': got number, want string"),
        ("trainer.volume.size", "50 GB", r"at '/trainer/volume/size': '50 GB' does not match pattern"),
        ("trainer.volume.accessMode", "RWX", r"at '/trainer/volume/accessMode': value must be one of"),
        ("trainer.resources.requests.memory", "4 Gi", r"at '/trainer/resources/requests/memory': '4 Gi' does not"),
        ("trainer.resources.request", {}, r"at '/trainer/resources': additional properties 'request' not allowed"),
        ("trainer.env", ["HF_ENDPOINT=x"], r"at '/trainer/env': got array, want object"),
        ("trainer.env.HF_TIMEOUT", 5, r"at '/trainer/env/HF_TIMEOUT': got number, want string"),
        ("trainer.env.HF-ENDPOINT", "x", r"'HF-ENDPOINT' does not match pattern"),
        ("trainer.allowRemoteCode", "yes", r"at '/trainer/allowRemoteCode': got string, want boolean"),
        ("trainer.endpoints", "https://minio", r"at '/trainer/endpoints': got string, want array"),
        ("trainer.endpoints", ["minio.example"], r"at '/trainer/endpoints/0': 'minio.example' does not match pattern"),
        ("operator.progressIntervalSeconds", "30", r"at '/operator/progressIntervalSeconds': got string, want number"),
        ("operator.progressIntervalSeconds", 0, r"at '/operator/progressIntervalSeconds': exclusiveMinimum: got 0"),
        ("image.tag", 1.1, r"at '/image/tag': got number, want string"),
        ("image.digest", "abc", r"at '/image/digest': 'abc' does not match pattern"),
        ("image.repository", "", r"at '/image/repository': minLength: got 0, want 1"),
        ("image.pullPolicy", "always", r"at '/image/pullPolicy': value must be one of 'IfNotPresent', 'Always'"),
        ("imagePullSecrets", ["registry"], r"at '/imagePullSecrets/0': got string, want object"),
        ("operator.workers", 0, r"at '/operator/workers': minimum: got 0, want 2"),
        ("operator.workers", 2.5, r"at '/operator/workers': got number, want integer"),
        ("operator.logLevel", "debug", r"at '/operator/logLevel': value must be one of 'DEBUG', 'INFO'"),
        ("crd.install", "no", r"at '/crd/install': got string, want boolean"),
        ("crd.keep", False, r"at '/crd': additional properties 'keep' not allowed"),
        ("operator.watchNamespace", "Team A", r"at '/operator/watchNamespace': 'Team A' does not match pattern"),
        ("nodeSelector", ["a"], r"at '/nodeSelector': got array, want object"),
        ("tolerations", {"key": "a"}, r"at '/tolerations': got object, want array"),
        ("affinity.nodeAfinity", {}, r"at '/affinity': additional properties 'nodeAfinity' not allowed"),
    ],
)
def test_a_typo_or_a_wrong_type_is_refused(helm: Helm, name: str, value: object, said: str) -> None:
    with pytest.raises(HelmError, match=said):
        helm.template({name: value})
