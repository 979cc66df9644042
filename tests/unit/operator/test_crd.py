"""The generated definition: current, structural, described, bounded."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from finetune_operator.api import RunPolicy, Spec
from finetune_operator.crd import CHART_TARGET, TARGET, build_crd, render, spec_schema, status_schema
from finetune_operator.rules import RULES
from tests.apiserver.cases import BAD

JSON = dict[str, Any]


def nodes(schema: JSON, path: str = "") -> Iterator[tuple[str, JSON]]:
    yield path, schema
    for name, part in schema.get("properties", {}).items():
        yield from nodes(part, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")


SPEC_NODES = dict(nodes(spec_schema()))
ALL_NODES = SPEC_NODES | {f"status{path}": node for path, node in nodes(status_schema())}


@pytest.mark.parametrize("target", [TARGET, CHART_TARGET], ids=lambda path: path.parent.name)
def test_the_committed_definition_is_current(target: Any) -> None:
    assert target.read_text(encoding="utf-8") == render(), "run: python -m finetune_operator.crd"


def test_the_same_models_give_the_same_bytes() -> None:
    assert render() == render()
    assert yaml.safe_load(render()) == build_crd()


def test_every_field_says_what_it_is() -> None:
    fields = {path: node for path, node in ALL_NODES.items() if path and not path.endswith("[]")}
    bare = [path for path, node in fields.items() if not node.get("description")]
    assert bare == []


def test_the_schema_is_structural() -> None:
    forbidden = {"$ref", "$defs", "title", "const", "oneOf", "allOf"}
    assert {path for path, node in ALL_NODES.items() if forbidden & node.keys()} == set()
    untyped = {p for p, node in ALL_NODES.items() if "type" not in node and "x-kubernetes-int-or-string" not in node}
    assert untyped == set()


def test_what_rules_walk_over_is_bounded() -> None:
    unbounded = [
        path
        for path, node in SPEC_NODES.items()
        if (node.get("type") == "array" and "maxItems" not in node)
        or (node.get("type") == "string" and "maxLength" not in node and "enum" not in node)
        or ("additionalProperties" in node and "maxProperties" not in node)
    ]
    assert unbounded == []


def test_every_list_says_how_it_is_merged() -> None:
    kinds = {path: node["x-kubernetes-list-type"] for path, node in ALL_NODES.items() if node.get("type") == "array"}
    assert {path for path, kind in kinds.items() if kind == "map"} == {
        ".quantize",
        ".output.publish",
        ".pod.imagePullSecrets",
        ".pod.env",
        "status.conditions",
        "status.stages",
        "status.artifacts",
        "status.artifacts[].published",
        "status.attempts",
    }


def test_attempts_are_told_apart_by_stage_and_number() -> None:
    """All stages of a clean run have number 1."""
    assert status_schema()["properties"]["attempts"]["x-kubernetes-list-map-keys"] == ["stage", "number"]


def test_every_field_of_the_spec_but_those_to_steer_by_is_immutable_by_a_rule_of_its_own() -> None:
    rules = " ".join(rule["rule"] for rule in spec_schema()["x-kubernetes-validations"])
    steering = {"suspend", "cancel", "runPolicy"}
    for field in {field.alias or name for name, field in Spec.model_fields.items()} - steering:
        assert f"self.{field} == oldSelf.{field}" in rules
    for field in {field.alias or name for name, field in RunPolicy.model_fields.items()}:
        fixed = f"self.runPolicy.{field} == oldSelf.runPolicy.{field}" in rules
        assert fixed == (field != "ttlSecondsAfterFinished")


def test_every_rule_is_broken_by_a_case() -> None:
    """What the API server and the models are tried with leaves no rule out."""
    told = [message for _, message in BAD.values()]
    rules = [rule.message for path in RULES.values() for rule in path]
    assert [message for message in rules if not any(part in message for part in told)] == []


def test_every_rule_is_a_sentence_with_the_way_out() -> None:
    rules = [rule for node in SPEC_NODES.values() for rule in node.get("x-kubernetes-validations", ())]
    assert len(rules) > 15
    assert all(len(rule["message"].split()) > 4 for rule in rules)


def test_the_status_has_no_plain_fractions() -> None:
    """A NaN among them would make every write of the status fail."""
    assert [path for path, node in nodes(status_schema()) if node.get("type") == "number"] == []
