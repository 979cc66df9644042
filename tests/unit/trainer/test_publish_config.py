"""output.publish: what an entry may say, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from finetune_trainer.config import HuggingFaceTarget, OciTarget, Output, Publish, S3Target
from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.runtime.parsing import parse_config

HUB = {"huggingFace": {"repo": "acme/fox", "tokenSecretRef": {"name": "hub", "key": "token"}}}
S3 = {"s3": {"uri": "s3://models/fox", "credentialsSecretRef": {"name": "s3"}}}
OCI = {"oci": {"reference": "registry.example/acme/fox:v1"}}
ADAPTER: dict[str, Any] = {"name": "out", "artifact": "Adapter"}


@pytest.mark.parametrize(
    ("place", "kind"), [(HUB, HuggingFaceTarget), (S3, S3Target), (OCI, OciTarget)], ids=["hub", "s3", "oci"]
)
def test_an_entry_has_one_place(place: dict[str, Any], kind: type) -> None:
    assert isinstance(Publish.model_validate(ADAPTER | place).kind, kind)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no place": (ADAPTER, "exactly one place is needed: huggingFace, s3 or oci"),
    "two places": (ADAPTER | HUB | S3, "exactly one place"),
    "a place to read from alone": (ADAPTER | {"volume": {"claimName": "c", "path": "p"}}, "volume"),
    "a quantized form without its name": ({"name": "out", "artifact": "Quantized"} | S3, "quantizeName"),
    "a name of a quantized form for the adapter": (ADAPTER | {"quantizeName": "gptq4"} | S3, "quantizeName"),
    "another artifact": ({"name": "out", "artifact": "Checkpoint"} | S3, "artifact"),
    "a name that is no folder": (ADAPTER | {"name": "../out"} | S3, "name"),
    "a hub without a token": (ADAPTER | {"huggingFace": {"repo": "acme/fox"}}, "tokenSecretRef"),
    "a bucket without keys": (ADAPTER | {"s3": {"uri": "s3://models/fox"}}, "credentialsSecretRef"),
    "a whole bucket": (ADAPTER | {"s3": S3["s3"] | {"uri": "s3://models/"}}, "uri"),
    "a whole bucket, said twice": (ADAPTER | {"s3": S3["s3"] | {"uri": "s3://models//"}}, "It must be s3://"),
    "a prefix with an empty part": (ADAPTER | {"s3": S3["s3"] | {"uri": "s3://models/a//b"}}, "It must be s3://"),
    "a prefix that leads out": (ADAPTER | {"s3": S3["s3"] | {"uri": "s3://models/a/../b"}}, "It must be s3://"),
    "a bucket that cannot be": (ADAPTER | {"s3": S3["s3"] | {"uri": "s3://mo..dels/a"}}, "It must be s3://"),
    "a service without a host": (ADAPTER | {"s3": S3["s3"] | {"endpoint": "https://:9000"}}, "It must be http"),
    "a service at no port": (ADAPTER | {"s3": S3["s3"] | {"endpoint": "http://store:90000"}}, "It must be http"),
    "a service with a question": (ADAPTER | {"s3": S3["s3"] | {"endpoint": "http://store/?a=b"}}, "It must be http"),
    "a service at half an address": (ADAPTER | {"s3": S3["s3"] | {"endpoint": "http://[::1"}}, "It must be http"),
    "a password in an address": (ADAPTER | {"s3": S3["s3"] | {"endpoint": "http://u:p@store"}}, "belong in a Secret"),
    "a repository of nobody": (ADAPTER | {"huggingFace": HUB["huggingFace"] | {"repo": "fox"}}, "owner/name"),
    "a repository that cannot be": (
        ADAPTER | {"huggingFace": HUB["huggingFace"] | {"repo": "acme/f..x"}},
        "owner/name",
    ),
    "a commit": (ADAPTER | {"huggingFace": HUB["huggingFace"] | {"revision": "a" * 40}}, "name of a branch"),
    "a branch that cannot be": (
        ADAPTER | {"huggingFace": HUB["huggingFace"] | {"revision": "a//b"}},
        "name of a branch",
    ),
    "a registry at no port": (ADAPTER | {"oci": {"reference": "registry.example:0/fox"}}, "It must be http"),
    "an artifact that leads out": (ADAPTER | {"oci": {"reference": "registry.example/a/../fox"}}, "registries allow"),
    "a digest, which cannot be chosen": (
        ADAPTER | {"oci": {"reference": "registry.example/fox@sha256:" + "0" * 64}},
        "reference",
    ),
    "a branch that reads as an option": (
        ADAPTER | {"huggingFace": HUB["huggingFace"] | {"revision": "-x"}},
        "revision",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_entry_that_cannot_be_is_refused_with_its_field(case: str) -> None:
    entry, word = REFUSED[case]
    with pytest.raises(ValidationError, match=word):
        Publish.model_validate(entry)


FINE: list[dict[str, Any]] = [
    {"s3": S3["s3"] | {"uri": "s3://models/team-a/fox.v1/", "endpoint": "http://minio_1.store.svc:9000/below"}},
    {"s3": S3["s3"] | {"endpoint": "https://[fd00::1]:9000"}},
    {"huggingFace": HUB["huggingFace"] | {"repo": "Acme-1/fox_v1.2-chat", "revision": "runs/v1.2"}},
    {"oci": {"reference": "localhost:5000/a-b__c/fox.v1:latest"}},
    {"oci": {"reference": "registry/fox"}},
]


@pytest.mark.parametrize("place", FINE)
def test_every_address_that_can_be_is_taken(place: dict[str, Any]) -> None:
    Publish.model_validate(ADAPTER | place)


@pytest.mark.parametrize("endpoint", ["http://fox:s3cr3t@store", "ftp://fox:s3cr3t@store", "http://fox:s3 cr3t/@store"])
def test_a_password_in_an_address_is_not_repeated(endpoint: str) -> None:
    place = {"s3": S3["s3"] | {"endpoint": endpoint}}
    job = {
        "model": {"huggingFace": {"repo": "acme/base"}},
        "datasets": [{"huggingFace": {"repo": "acme/rows"}}],
        "output": {"publish": [ADAPTER | place]},
    }
    with pytest.raises(InvalidConfig) as caught:
        parse_config(job)
    said = str(caught.value)
    assert said.startswith('output.publish[0].s3.endpoint cannot be "...@store"')
    assert "cr3t" not in said


TWICE: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a name": ([ADAPTER | S3, ADAPTER | OCI], "a name of its own, 'out'"),
    "a prefix": (
        [ADAPTER | S3, {"name": "too", "artifact": "Merged", "s3": S3["s3"] | {"uri": "s3://models/fox/"}}],
        "a place of its own",
    ),
    "a branch": (
        [
            ADAPTER | HUB,
            {"name": "too", "artifact": "Merged", "huggingFace": HUB["huggingFace"] | {"revision": "main"}},
        ],
        "a place of its own, 'acme/fox@main'",
    ),
    "a tag": (
        [
            ADAPTER | {"oci": {"reference": "registry.example:5000/fox"}},
            {"name": "too", "artifact": "Merged", "oci": {"reference": "registry.example:5000/fox:latest"}},
        ],
        "a place of its own, 'registry.example:5000/fox:latest'",
    ),
}


@pytest.mark.parametrize("case", TWICE)
def test_two_entries_do_not_share(case: str) -> None:
    entries, word = TWICE[case]
    with pytest.raises(ValidationError, match=word):
        Output.model_validate({"publish": entries})


def test_two_branches_of_one_repository_are_two_places() -> None:
    other = {"name": "too", "artifact": "Merged", "huggingFace": HUB["huggingFace"] | {"revision": "merged"}}
    assert len(Output.model_validate({"publish": [ADAPTER | HUB, other]}).publish or ()) == 2


def test_a_quantized_form_that_is_not_made_is_told_with_those_that_are() -> None:
    entry = {"name": "out", "artifact": "Quantized", "quantizeName": "gptq8"} | S3
    job = {
        "model": {"huggingFace": {"repo": "acme/base"}},
        "datasets": [{"huggingFace": {"repo": "acme/rows"}}],
        "quantize": [{"name": "gptq4", "method": "GPTQ"}],
        "output": {"publish": [entry]},
    }
    with pytest.raises(InvalidConfig, match=r"publish\[0\]\.quantizeName: .* 'gptq8' \(has: gptq4\)"):
        parse_config(job)
