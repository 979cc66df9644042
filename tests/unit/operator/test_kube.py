"""The client's own account of its calls."""

from __future__ import annotations

import aiohttp
import pytest
from kubernetes.aio.client.configuration import Configuration

from cluster.processes import free_ports
from finetune_operator.kube import NO_ANSWER, PATHS, Kube, kind_of, url_of


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("where", [(None,), ("ns",), ("ns", "name"), ("ns", "name", "status"), ("pods", "jobs")])
def test_the_path_of_a_call_tells_its_kind(kind: str, where: tuple[str | None, ...]) -> None:
    assert kind_of(url_of(kind, *where)) == kind


async def test_a_call_without_an_answer_is_counted_as_such() -> None:
    calls: list[tuple[str, str, str]] = []
    configuration = Configuration()
    configuration.host = f"http://127.0.0.1:{free_ports(1)[0]}"
    configuration.client_session_kwargs = {"trust_env": False}
    kube = Kube(configuration, 5, lambda *call: calls.append(call))
    with pytest.raises(aiohttp.ClientError):
        await kube.read("Job", "ns", "name")
    await kube.close()
    assert calls == [("GET", "Job", NO_ANSWER)]
