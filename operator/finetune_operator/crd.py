"""python -m finetune_operator.crd [FILE ...]: write the CustomResourceDefinition, made from the typed models.

Without a file it goes to crds/ and, where there is a chart, to the chart's copy. Same models, same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from finetune_operator.api import GROUP, JSON, KIND, PLURAL, VERSION, Spec, Status
from finetune_operator.rules import LIST_KEYS, ROOT, RULES, Rule, immutability

NAME = f"{PLURAL}.{GROUP}"
HEADER = "# Made by `python -m finetune_operator.crd` from the typed models: change it there.\n"
REPOSITORY = Path(__file__).resolve().parents[2]
TARGET = REPOSITORY / "crds" / f"{NAME}.yaml"
CHART_TARGET = REPOSITORY / "charts" / "finetune-operator" / "files" / f"{NAME}.yaml"

DROPPED = frozenset({"title", "additionalProperties", "$defs"})
"""Of JSON Schema: what a structural schema must not have."""

STATUS_LIST_KEYS = {
    "conditions": ("type",),
    "stages": ("name",),
    "artifacts": ("name",),
    "artifacts.[].published": ("name",),
    "attempts": ("stage", "number"),
}

COLUMNS = (
    ("Phase", "string", ".status.phase", 0),
    ("Progress", "string", ".status.progress", 0),
    ("Loss", "string", ".status.training.loss", 0),
    ("ETA", "string", ".status.training.eta", 0),
    ("Reason", "string", ".status.reason", 1),
    ("Attempt", "integer", ".status.attemptCount", 1),
    ("Tokens/s", "string", ".status.training.tokensPerSecond", 1),
    ("Age", "date", ".metadata.creationTimestamp", 0),
)


def build_crd() -> JSON:
    """The CustomResourceDefinition."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": NAME},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["ftj"],
            },
            "versions": [_version()],
        },
    }


def _version() -> JSON:
    return {
        "name": VERSION,
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "additionalPrinterColumns": [
            {"name": name, "type": kind, "jsonPath": path} | ({"priority": priority} if priority else {})
            for name, kind, path, priority in COLUMNS
        ],
        "schema": {"openAPIV3Schema": _root()},
    }


def _root() -> JSON:
    return {
        "type": "object",
        "description": "A language model, fine-tuned, merged, quantized, proven and published.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec_schema(),
            "status": status_schema(),
        },
        "x-kubernetes-validations": _rules(ROOT),
    }


def spec_schema() -> JSON:
    """The structural schema of the spec, with its rules."""
    schema = structural(Spec.model_json_schema(by_alias=True))
    for path, rules in RULES.items():
        if path:
            at(schema, path)["x-kubernetes-validations"] = _rules(rules)
    schema["x-kubernetes-validations"] = _rules((*RULES[""], *immutability()))
    _name_list_types(schema, "", LIST_KEYS)
    return schema


def status_schema() -> JSON:
    """The structural schema of the status."""
    schema = structural(Status.model_json_schema(by_alias=True, mode="serialization"))
    _name_list_types(schema, "", STATUS_LIST_KEYS)
    return schema


def at(schema: JSON, path: str) -> JSON:
    """The part of a schema that a dotted path names; `[]` goes into a list."""
    for part in path.split("."):
        schema = schema["items"] if part == "[]" else schema["properties"][part]
    return schema


def _rules(rules: tuple[Rule, ...]) -> list[JSON]:
    return [{"rule": rule.rule, "message": rule.message} for rule in rules]


def _name_list_types(schema: JSON, path: str, keys: Mapping[str, tuple[str, ...]]) -> None:
    """Say of each list whether it is a map by some keys or replaced as a whole."""
    if schema.get("type") == "array":
        fields = keys.get(path)
        schema["x-kubernetes-list-type"] = "map" if fields else "atomic"
        if fields:
            schema["x-kubernetes-list-map-keys"] = list(fields)
        _name_list_types(schema["items"], f"{path}.[]", keys)
    for name, part in schema.get("properties", {}).items():
        _name_list_types(part, f"{path}.{name}".lstrip("."), keys)


# --- from JSON Schema to a structural schema -------------------------------------------------------------------------


def structural(schema: JSON) -> JSON:
    """Pydantic's JSON Schema as Kubernetes wants it: no references, no null, no titles, bounds in the old form."""
    return _convert(schema, schema.get("$defs", {}))


def _convert(node: JSON, definitions: JSON) -> JSON:
    node = _without_null(_resolve(node, definitions), definitions)
    if "x-kubernetes-int-or-string" in node:
        return {name: value for name, value in node.items() if name not in {"title", "default"}}
    converted = {name: value for name, value in node.items() if name not in DROPPED}
    if converted.get("default") is None:  # unset: whatever depends on anything else is resolved by the prepare stage
        converted.pop("default", None)
    if node.get("type") == "integer":
        converted["format"] = "int64"
    _old_bounds(converted)
    if "properties" in node:
        converted["properties"] = {name: _convert(part, definitions) for name, part in node["properties"].items()}
    if "items" in node:
        converted["items"] = _convert(node["items"], definitions)
    if isinstance(node.get("additionalProperties"), dict):
        converted["additionalProperties"] = _convert(node["additionalProperties"], definitions)
    return converted


def _resolve(node: JSON, definitions: JSON) -> JSON:
    """A reference's target; what stands beside the reference, its description above all, wins."""
    if "$ref" not in node:
        return node
    target = definitions[node["$ref"].removeprefix("#/$defs/")]
    beside = {name: value for name, value in node.items() if name != "$ref"}
    return {**target, **beside}


def _without_null(node: JSON, definitions: JSON) -> JSON:
    """`X or null` is an optional X."""
    options = [option for option in node.get("anyOf", ()) if option.get("type") != "null"]
    if "anyOf" not in node or len(options) != 1:
        return node
    beside = {name: value for name, value in node.items() if name != "anyOf"}
    return {**_resolve(options[0], definitions), **beside}


def _old_bounds(node: JSON) -> None:
    """`exclusiveMinimum: 0` was `minimum: 0, exclusiveMinimum: true` in OpenAPI 3.0."""
    for bound in ("minimum", "maximum"):
        exclusive = f"exclusive{bound.capitalize()}"
        if exclusive in node:
            node[bound], node[exclusive] = node[exclusive], True


# --- writing ---------------------------------------------------------------------------------------------------------


class _Plain(yaml.SafeDumper):
    """Writes out what occurs twice instead of pointing to it."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - yaml's signature
        return True


def render() -> str:
    """The file's text."""
    return HEADER + yaml.dump(build_crd(), Dumper=_Plain, sort_keys=False, width=120, allow_unicode=True)


def main(arguments: list[str]) -> None:
    """Write the files named, or the usual ones."""
    usual = [TARGET, *([CHART_TARGET] if CHART_TARGET.parent.is_dir() else [])]
    for path in [Path(argument) for argument in arguments] or usual:
        path.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
