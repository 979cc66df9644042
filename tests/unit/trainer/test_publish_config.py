"""output.publish: what an entry may say, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from finetune_trainer.config import HuggingFaceTarget, OciTarget, Output, Publish, S3Target

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
