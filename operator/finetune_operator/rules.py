"""What the API server itself refuses: CEL rules of the CRD, each with a message that says the way out.

The same rules stand in the models (`finetune_trainer.config`, `finetune_operator.api`), for what reaches the operator
in other ways; a test holds both to the same cases. ROOT is about the whole resource, the rest about a path in it,
where `[]` goes into a list.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune_operator.api import NAME_LIMIT_CHARACTERS, Spec
from finetune_trainer.config import NAME_PATTERN


@dataclass(frozen=True)
class Rule:
    """A CEL expression that must be true, and what is said where it is not."""

    rule: str
    message: str


def exactly_one(fields: tuple[str, ...], what: str) -> Rule:
    """A union: exactly one of the fields is set."""
    listed = ",".join(f"has(self.{field})" for field in fields)
    return Rule(f"[{listed}].filter(x, x).size() == 1", f"{what}: set exactly one of {' and '.join(fields)}")


def not_both(one: str, other: str, where: str) -> Rule:
    """Alternatives, of which none is needed."""
    return Rule(f"!(has(self.{one}) && has(self.{other}))", f"{where}: {one} and {other} are alternatives, set one")


ROOT = (
    Rule(
        f"size(self.metadata.name) <= {NAME_LIMIT_CHARACTERS}",
        f"metadata.name: at most {NAME_LIMIT_CHARACTERS} characters, so that its Jobs can be named after it",
    ),
    Rule(
        f"self.metadata.name.matches('{NAME_PATTERN}')",
        "metadata.name: lower-case letters, digits and dashes only, no dots",
    ),
)

INSIDE = Rule("!self.path.split('/').exists(part, part == '..')", "path: no part may be '..'")
"""Of a volume: its path does not leave the claim."""

RULES: dict[str, tuple[Rule, ...]] = {
    "model.volume": (INSIDE,),
    "datasets.[].volume": (INSIDE,),
    "evaluation.datasets.[].volume": (INSIDE,),
    "model": (exactly_one(("huggingFace", "volume"), "model"),),
    "evaluation": (not_both("percent", "datasets", "evaluation"),),
    "training": (
        not_both("warmupRatio", "warmupSteps", "training"),
        not_both("numTrainEpochs", "maxSteps", "training"),
        Rule(
            "!(has(self.globalBatchSize) && has(self.perDeviceTrainBatchSize))"
            " || self.globalBatchSize % self.perDeviceTrainBatchSize == 0",
            "training: perDeviceTrainBatchSize must divide globalBatchSize",
        ),
    ),
    "output.volume": (exactly_one(("create", "existing"), "output.volume"),),
    "output.volume.create.accessModes": (
        Rule("self.all(m, self.filter(n, n == m).size() == 1)", "accessModes: each mode at most once"),
    ),
    "": (
        Rule(
            "!(has(self.evaluation) && has(self.evaluation.percent) && self.evaluation.percent == 0.0"
            " && has(self.training) && has(self.training.eval))",
            "evaluation.percent 0 holds nothing out: drop training.eval or hold rows out",
        ),
        Rule(
            "!(has(self.quantize) && size(self.quantize) > 0 && has(self.merge) && has(self.merge.policy)"
            " && self.merge.policy == 'Never')",
            "quantize needs the merged model: leave merge.policy unset or drop quantize",
        ),
    ),
}
"""By path below spec; the empty path is spec itself."""

LIST_KEYS = {"quantize": ("name",), "pod.imagePullSecrets": ("name",)}
"""Lists of named entries; all other lists are replaced as a whole."""


def immutable(field: str, *, required: bool) -> Rule:
    """One rule a field, on spec, so that a later field can be mutable."""
    message = f"spec.{field} cannot be changed: delete the FineTuneJob, or apply the new spec under another name"
    if required:
        return Rule(f"self.{field} == oldSelf.{field}", message)
    same = f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})"
    return Rule(same, message)


def immutability() -> tuple[Rule, ...]:
    """Every field of the spec."""
    return tuple(
        immutable(field.alias or name, required=field.is_required()) for name, field in Spec.model_fields.items()
    )
