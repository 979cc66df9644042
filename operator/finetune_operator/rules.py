"""What the API server itself refuses: CEL rules of the CRD, each with a message that says the way out.

The same rules stand in the models (`finetune_trainer.config`, `finetune_operator.api`), for what reaches the operator
in other ways; a test holds both to the same cases. ROOT is about the whole resource, the rest about a path in it,
where `[]` goes into a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune_operator.api import (
    DRILL_ENV_PREFIX,
    GPU_RESOURCE,
    NAME_LIMIT_CHARACTERS,
    RESERVED_ENV_PATTERN,
    RunPolicy,
    Spec,
)
from finetune_trainer.config import (
    ADAPTER_METHODS,
    COMMIT_PATTERN,
    EIGHT_BIT,
    FAST_FORMATS,
    FORMATS,
    NAME_PATTERN,
    NO_BRANCH,
    OCI_REPOSITORY,
    REGION_PATTERN,
    SHARD_SIZE_PATTERN,
    SMOOTHED_LOSSES,
    SOURCE_FIELDS,
    TARGET_FIELDS,
    WITHOUT_BETAS,
    BaseFormat,
    DatasetFormat,
    Merge,
    MethodType,
    PublishedArtifact,
    QuantizeMethod,
)


@dataclass(frozen=True)
class Rule:
    """A CEL expression that must be true, and what is said where it is not."""

    rule: str
    message: str


def exactly_one(fields: tuple[str, ...], what: str) -> Rule:
    """A union: exactly one of the fields is set."""
    listed = ",".join(f"has(self.{field})" for field in fields)
    names = f"{', '.join(fields[:-1])} and {fields[-1]}"
    return Rule(f"[{listed}].filter(x, x).size() == 1", f"{what}: set exactly one of {names}")


def not_both(one: str, other: str, where: str) -> Rule:
    """Alternatives, of which none is needed."""
    return Rule(f"!(has(self.{one}) && has(self.{other}))", f"{where}: {one} and {other} are alternatives, set one")


def formed(field: str, pattern: str, message: str) -> Rule:
    """The text of a field, if it is set, has this form; what the schema says of a pattern is the pattern."""
    return Rule(f"!has(self.{field}) || self.{field}.matches(r'{pattern}')", message)


def one_of(values: tuple[str, ...]) -> str:
    """A CEL list of words."""
    return f"[{', '.join(repr(str(value)) for value in values)}]"


METHOD = f"self.?method.?type.orValue('{MethodType.QLORA}')"
OBJECTIVE = "self.?objective.?type.orValue('SFT')"
TRAINS_ADAPTER = f"{METHOD} in {one_of(ADAPTER_METHODS)}"
DEVICES = (
    "self.?parallelism.?numNodes.orValue(1)"
    " * (self.?parallelism.?gpusPerNode.orValue(1) > 1 ? self.parallelism.gpusPerNode : 1)"
)
"""On the spec: words of the models' own properties."""

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


# --- sources ---------------------------------------------------------------------------------------------------------

SOURCES = {
    "model": "model",
    "model.adapter": "model.adapter",
    "merge.original": "merge.original",
    "datasets.[]": "datasets",
    "evaluation.datasets.[]": "evaluation.datasets",
}
"""Path and name of everything that is fetched."""

TARGETS = "output.publish.[]"
"""Path of everything that is sent."""

PORT = r"([1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"
SERVICE = (
    formed(
        "endpoint",
        rf"^https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:{PORT})?(/[^?#@\s]*)?$",
        "endpoint: write https://host:port, with a port up to 65535, without user and password, '?' and '#'",
    ),
    formed("region", REGION_PATTERN, "region: letters, digits, dots and dashes only, e.g. eu-central-1"),
)
OF_ITS_KIND: dict[str, tuple[Rule, ...]] = {
    "volume": (
        Rule("!self.path.split('/').exists(part, part == '..')", "path: no part may be '..'"),
        Rule("!self.path.startsWith('/')", "path: relative to the claim, without a slash before it"),
    ),
    "s3": (
        Rule("self.uri.matches('^s3://[^/]+/.+$')", "uri: write s3://bucket/key, or s3://bucket/prefix/"),
        *SERVICE,
    ),
    "oci": (
        Rule("!self.reference.contains('://')", "reference: write registry/repository:tag, without https:// before it"),
    ),
}
"""Of one kind of source, wherever it stands."""

OF_TARGETS: dict[str, tuple[Rule, ...]] = {
    "huggingFace": (
        Rule(
            r"self.repo.matches(r'^\w([\w.-]*\w)?/\w([\w.-]*\w)?$') && !self.repo.matches(r'--|\.\.|\.git$')",
            "repo: write owner/name, neither of which begins or ends with a dot or a dash, without '--' and '..'",
        ),
        Rule(
            f"!self.revision.matches(r'{NO_BRANCH.pattern}')",
            "revision: write the name of a branch, which is no commit and has no '..', '//' or '/.' in it",
        ),
    ),
    "s3": (
        formed(
            "uri",
            r"^s3://[a-z0-9-]+(\.[a-z0-9-]+)*(/\.*[^./?#][^/?#]*)+/?$",
            "uri: write s3://bucket/prefix, without '?', '#', empty parts, '.' and '..', in the bucket's name as well",
        ),
        *SERVICE,
    ),
    "oci": (
        formed(
            "reference",
            rf"^[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*(:{PORT})?/{OCI_REPOSITORY.pattern}(:.*)?$",
            "reference: write registry/repository:tag, without https:// before it, without empty parts, '.' and '..', "
            "with a port up to 65535",
        ),
    ),
}
"""Of one kind of place to publish to."""

SPLIT = Rule(
    "!has(self.files) || !(has(self.config) || has(self.split))", "files are in place of config and split: set either"
)
DATASETS = tuple(path for path in SOURCES if path.endswith("[]"))
HUBS = ("huggingFace", "modelScope")


def _sources() -> dict[str, tuple[Rule, ...]]:
    unions = {path: (exactly_one(SOURCE_FIELDS, name),) for path, name in SOURCES.items()}
    kinds = {f"{path}.{kind}": rules for path in SOURCES for kind, rules in OF_ITS_KIND.items()}
    kinds |= {f"{TARGETS}.{kind}": OF_TARGETS[kind] for kind in TARGET_FIELDS}
    splits = {f"{path}.{hub}": (SPLIT,) for path in DATASETS for hub in HUBS}
    return _joined(unions, kinds, splits)


# --- blocks ----------------------------------------------------------------------------------------------------------


def formats_of(method: MethodType) -> Rule:
    """The formats of the base that a method takes."""
    takes = FORMATS[method]
    return Rule(
        f"self.?type.orValue('{MethodType.QLORA}') != '{method}'"
        f" || self.?baseWeights.?format.orValue('{takes[0]}') in {one_of(takes)}",
        f"method.baseWeights.format: {method} takes {', '.join(takes)}",
    )


def distinct_names(where: str) -> Rule:
    """Names that are set are set once."""
    return Rule(
        "self.all(one, !has(one.name) || self.filter(other, has(other.name) && other.name == one.name).size() == 1)",
        f"{where}: each name at most once",
    )


def of_method(fields: tuple[str, ...], *methods: QuantizeMethod) -> Rule:
    """Settings that only some ways to quantize have."""
    return Rule(
        f"self.method in {one_of(methods)} || !({' || '.join(f'has(self.{field})' for field in fields)})",
        f"quantize: {', '.join(fields)} only with method {' and '.join(methods)}, drop them with any other",
    )


def apart(kind: str, *parts: str) -> Rule:
    """No two places of this kind are the same: `parts` are CEL of a place, `{0}`, equal where it is the same place."""
    same = " && ".join(f"{part.format(f'other.{kind}')} == {part.format(f'one.{kind}')}" for part in parts)
    return Rule(
        f"self.all(one, !has(one.{kind}) || self.filter(other, has(other.{kind}) && {same}).size() == 1)",
        f"output.publish: each entry needs a place of its own, two have the same {kind}",
    )


def with_slash(text: str) -> str:
    """An address that ends with one slash, whether it is written with it or not."""
    return f"({text} + ({text}.endsWith('/') ? '' : '/'))"


def pinned(hub: str) -> str:
    """Whether a hub's revision is a commit, if this hub is the source."""
    return f"(!has(self.{hub}) || self.{hub}.revision.matches('{COMMIT_PATTERN}'))"


TEMPLATES = Rule(
    "!has(self.responseTemplate) || has(self.promptTemplate)", "datasets: responseTemplate needs a promptTemplate"
)
SPECIAL_TOKENS = Rule(
    f"!has(self.specialTokens) || (self.?format.orValue('Auto') in {one_of((DatasetFormat.AUTO, DatasetFormat.TEXT))}"
    " && !has(self.promptTemplate))",
    "datasets: specialTokens is for format Text without a promptTemplate: drop it",
)
MERGE_FIELDS = tuple(f"self.{field.alias or name}" for name, field in Merge.model_fields.items() if name != "policy")
INTERVAL = not_both("everySteps", "everyPercent", "training")

BLOCKS: dict[str, tuple[Rule, ...]] = {
    "model": (
        Rule(
            f"!self.?trustRemoteCode.orValue(false) || {' && '.join(map(pinned, HUBS))}",
            "model.trustRemoteCode needs a revision that is a commit (40 hexadecimal digits)",
        ),
    ),
    "model.chatTemplate": (not_both("preset", "jinja", "model.chatTemplate"),),
    "datasets": (distinct_names("datasets"),),
    "datasets.[]": (TEMPLATES, SPECIAL_TOKENS),
    "evaluation": (not_both("percent", "datasets", "evaluation"),),
    "evaluation.datasets": (distinct_names("evaluation.datasets"),),
    "evaluation.datasets.[]": (
        TEMPLATES,
        SPECIAL_TOKENS,
        Rule(
            "!has(self.weight)",
            "evaluation.datasets: weight is for rows to train on, every row is measured once: drop it",
        ),
    ),
    "method": (
        Rule(
            f"!has(self.lora) || self.?type.orValue('{MethodType.QLORA}') in {one_of(ADAPTER_METHODS)}",
            "method.lora is for QLoRA and LoRA: drop it, or set method.type to one of these",
        ),
        Rule(
            f"!has(self.galore) || self.?type.orValue('') == '{MethodType.GALORE}'",
            "method.galore is for GaLore: drop it, or set method.type to GaLore",
        ),
        *(formats_of(method) for method in MethodType),
        Rule(
            "!has(self.baseWeights) || !has(self.baseWeights.doubleQuantization)"
            f" || (self.?type.orValue('{MethodType.QLORA}') == '{MethodType.QLORA}'"
            f" && self.baseWeights.?format.orValue('{BaseFormat.NF4}') != '{BaseFormat.GPTQ}')",
            "method.baseWeights.doubleQuantization is for NF4 and FP4: drop it",
        ),
        Rule(
            f"!self.?fp8Products.orValue(false) || (self.?type.orValue('{MethodType.QLORA}')"
            f" in {one_of(ADAPTER_METHODS)} && self.?computeDtype.orValue('Auto') in ['Auto', 'BF16']"
            f" && self.?baseWeights.?format.orValue('{BaseFormat.BF16}') in {one_of(FAST_FORMATS)})",
            "method.fp8Products is for QLoRA in NF4 or FP4 and LoRA in BF16 or FP8, with computeDtype BF16: drop it",
        ),
    ),
    "objective": (
        Rule(
            "!has(self.sft) || self.?type.orValue('SFT') == 'SFT'",
            "objective.sft is for type SFT: drop it, or set objective.type to SFT",
        ),
        Rule(
            "!has(self.dpo) || self.?type.orValue('SFT') == 'DPO'",
            "objective.dpo is for type DPO: set objective.type to DPO",
        ),
    ),
    "objective.dpo": (
        Rule(
            f"!has(self.labelSmoothing) || self.?lossType.orValue('') in {one_of(SMOOTHED_LOSSES)}",
            f"objective.dpo.labelSmoothing is for lossType {', '.join(SMOOTHED_LOSSES)}: drop it",
        ),
    ),
    "training": (
        not_both("warmupRatio", "warmupSteps", "training"),
        not_both("numTrainEpochs", "maxSteps", "training"),
        Rule(
            "!(has(self.adamBeta1) || has(self.adamBeta2))"
            f" || !(self.?optimizer.orValue('AdamW') in {one_of(WITHOUT_BETAS)})",
            "training: adamBeta1 and adamBeta2 are for AdamW, not for Adafactor and SGD: "
            "drop them, or set optimizer to AdamW",
        ),
    ),
    "training.eval": (INTERVAL,),
    "training.checkpoint": (
        INTERVAL,
        Rule(
            "!self.?everyEpoch.orValue(false) || !(has(self.everySteps) || has(self.everyPercent))",
            "training.checkpoint: everyEpoch, everySteps and everyPercent are alternatives, set one",
        ),
    ),
    "parallelism": (
        Rule(
            "!has(self.fsdp) || self.?strategy.orValue('Auto') != 'DDP'",
            "parallelism.fsdp is for strategy FSDP: drop it, or set parallelism.strategy to FSDP",
        ),
    ),
    "merge": (
        Rule(
            f"self.?policy.orValue('Auto') != 'Never' || !({' || '.join(f'has({field})' for field in MERGE_FIELDS)})",
            "merge.policy Never merges nothing: drop the other fields of merge, or leave policy unset",
        ),
        formed(
            "maxShardSize",
            SHARD_SIZE_PATTERN,
            "merge.maxShardSize: write a size above zero in KB, MB or GB, e.g. 5GB or 2048MB",
        ),
        Rule(
            "!has(self.original) || self.?base.orValue('Auto') != 'Dequantized'",
            "merge.original is for base Original: drop it, or set merge.base to Original",
        ),
        Rule(
            "!has(self.maxLossIncrease) || self.?base.orValue('Auto') != 'Dequantized'",
            "merge.maxLossIncrease is for base Original: drop it, or set merge.base to Original",
        ),
    ),
    "quantize.[]": (
        Rule(
            f"self.method != '{QuantizeMethod.AWQ}' || self.?bits.orValue(4) == 4",
            "quantize: AWQ has 4 bits: drop bits, or use method GPTQ",
        ),
        of_method(("actOrder", "dampeningFrac"), QuantizeMethod.GPTQ),
        of_method(("bits", "groupSize", "symmetric", "calibration"), QuantizeMethod.GPTQ, QuantizeMethod.AWQ),
        of_method(("ggufType",), QuantizeMethod.GGUF),
    ),
    "output.publish": (
        apart("huggingFace", "{0}.repo", "{0}.revision"),
        apart("s3", with_slash("{0}.uri"), f"(has({{0}}.endpoint) ? {with_slash('{0}.endpoint')} : '')"),
        apart("oci", "({0}.reference + ({0}.reference.matches(':[^/]+$') ? '' : ':latest'))"),
    ),
    TARGETS: (
        exactly_one(TARGET_FIELDS, "output.publish"),
        Rule(
            f"(self.artifact == '{PublishedArtifact.QUANTIZED}') == has(self.quantizeName)",
            "output.publish: quantizeName goes with artifact Quantized, which needs it",
        ),
    ),
    "output.volume": (exactly_one(("create", "existing"), "output.volume"),),
    "output.volume.create.accessModes": (
        Rule("self.all(m, self.filter(n, n == m).size() == 1)", "accessModes: each mode at most once"),
    ),
    "pod": (
        Rule(
            "[self.?resources.?requests, self.?resources.?limits].all(amounts, !amounts.hasValue()"
            f" || !(self.?gpuResourceName.orValue('{GPU_RESOURCE}') in amounts.value()))",
            "pod.resources: GPUs are counted by parallelism.gpusPerNode, drop them here",
        ),
    ),
    "pod.env.[]": (
        Rule(
            f"!self.name.matches('{RESERVED_ENV_PATTERN}') || self.name.startsWith('{DRILL_ENV_PREFIX}')",
            "pod.env: this variable is set by the operator or changes what code runs, drop it",
        ),
    ),
}
"""By path below spec: what the fields of one block mean together."""


# --- the whole spec --------------------------------------------------------------------------------------------------


def measured(field: str, asked: str) -> Rule:
    """What needs a held-out loss needs rows that are held out."""
    return Rule(
        f"self.?evaluation.?percent.orValue(5.0) > 0.0 || !({asked})",
        f"evaluation.percent 0 holds nothing out: drop {field} or hold rows out",
    )


def published(artifact: PublishedArtifact, there: str, message: str) -> Rule:
    """An artifact can go out only where the job makes it."""
    return Rule(
        "!(has(self.output) && has(self.output.publish))"
        f" || self.output.publish.all(entry, entry.artifact != '{artifact}' || {there})",
        f"output.publish: {message}",
    )


WHOLE: tuple[Rule, ...] = (
    measured("training.eval", "self.?training.?eval.hasValue()"),
    measured("training.restoreBest", "self.?training.?restoreBest.orValue(false)"),
    measured("training.earlyStopping", "self.?training.?earlyStopping.hasValue()"),
    measured("merge.maxKLDivergence", "self.?merge.?maxKLDivergence.hasValue()"),
    measured("merge.maxLossIncrease", "self.?merge.?maxLossIncrease.hasValue()"),
    measured(
        "quantize[].maxPerplexityIncreasePercent",
        "has(self.quantize) && self.quantize.exists(form, has(form.maxPerplexityIncreasePercent))",
    ),
    Rule(
        f"{OBJECTIVE} != 'DPO' || self.?training.?packing.orValue('Auto') != 'On'",
        "training.packing: rows of DPO are not packed, leave it unset or Off",
    ),
    Rule(
        f"{OBJECTIVE} != 'DPO' || self.?method.?lora.?dropout.orValue(0.0) == 0.0",
        "method.lora.dropout is for objective SFT: DPO compares model and reference without noise, drop it",
    ),
    Rule(
        f"{OBJECTIVE} != 'DPO' || !self.?training.?neftuneNoiseAlpha.hasValue()",
        "training.neftuneNoiseAlpha is for objective SFT: drop it",
    ),
    Rule(
        f"!self.?method.?fp8Products.orValue(false) || ({OBJECTIVE} == 'SFT'"
        " && self.?training.?fastPath.orValue('Auto') == 'Auto' && self.?parallelism.?numNodes.orValue(1) == 1"
        " && self.?parallelism.?gpusPerNode.orValue(1) == 1)",
        "method.fp8Products is for SFT on one GPU (parallelism.numNodes and gpusPerNode 1) by the fast path "
        "(training.fastPath Auto): drop it, or change the others",
    ),
    Rule(
        f"self.?training.?offload.orValue('Auto') != 'On' || ({OBJECTIVE} == 'SFT' && {TRAINS_ADAPTER}"
        " && self.?training.?fastPath.orValue('Auto') == 'Auto'"
        " && self.?training.?gradientCheckpointing.orValue('Auto') != 'Off'"
        " && self.?parallelism.?numNodes.orValue(1) == 1 && self.?parallelism.?gpusPerNode.orValue(1) == 1)",
        "training.offload On is for SFT of adapters on one GPU (parallelism.numNodes and gpusPerNode 1) by the "
        "fast path (training.fastPath Auto), with gradientCheckpointing Auto, Full or Selective: drop it, or "
        "change the others",
    ),
    Rule(
        "!self.?training.?globalBatchSize.hasValue() || self.training.globalBatchSize"
        f" % (self.training.?perDeviceTrainBatchSize.orValue(1) * {DEVICES}) == 0",
        "training: perDeviceTrainBatchSize times the number of devices (parallelism.numNodes x gpusPerNode) must "
        "divide globalBatchSize",
    ),
    Rule(
        "self.?parallelism.?strategy.orValue('Auto') != 'FSDP'"
        f" || !(self.?method.?baseWeights.?format.orValue('') in {one_of((BaseFormat.GPTQ, *EIGHT_BIT))})",
        "parallelism.strategy FSDP cannot shard GPTQ, Int8 and FP8 weights: use DDP, or baseWeights NF4 or BF16",
    ),
    Rule(
        f"self.?parallelism.?strategy.orValue('Auto') != 'FSDP' || {METHOD} != '{MethodType.GALORE}'",
        "parallelism.strategy FSDP does not go with GaLore, which needs whole gradients: use DDP",
    ),
    Rule(
        f"!has(self.merge) || {TRAINS_ADAPTER}",
        "merge is for adapters: method.type Full and GaLore train the model itself, drop merge",
    ),
    Rule(
        "self.?quantize.orValue([]).size() == 0 || self.?merge.?policy.orValue('Auto') != 'Never'",
        "quantize needs the merged model: leave merge.policy unset or drop quantize",
    ),
    Rule(
        "!self.?merge.?maxKLDivergence.hasValue() || self.?merge.?base.orValue('Auto') != 'Original'"
        f" || !({METHOD} == '{MethodType.QLORA}'"
        f" || self.?method.?baseWeights.?format.orValue('') in {one_of(EIGHT_BIT)})",
        "merge.maxKLDivergence says nothing of base Original of a quantized base: set merge.maxLossIncrease, "
        "or leave merge.base unset",
    ),
    published(
        PublishedArtifact.ADAPTER,
        f"({TRAINS_ADAPTER})",
        "artifact Adapter is for method.type QLoRA and LoRA: publish Merged, the finished model",
    ),
    published(
        PublishedArtifact.MERGED,
        "self.?merge.?policy.orValue('Auto') != 'Never'",
        "artifact Merged needs the merge: leave merge.policy unset, or publish Adapter",
    ),
    published(
        PublishedArtifact.QUANTIZED,
        "!has(entry.quantizeName)"
        " || (has(self.quantize) && self.quantize.exists(form, form.name == entry.quantizeName))",
        "quantizeName must be the name of an entry of quantize",
    ),
    Rule(
        f"!has(self.model.adapter) || {TRAINS_ADAPTER}",
        "model.adapter is for QLoRA and LoRA: drop it, or set method.type to one of these",
    ),
    Rule(
        "self.?parallelism.?numNodes.orValue(1) == 1 || self.?output.?volume.?existing.hasValue()"
        " || (self.?output.?volume.?create.?accessModes.hasValue()"
        " && self.output.volume.create.accessModes.exists(mode, mode == 'ReadWriteMany'))",
        "parallelism.numNodes above 1: set output.volume.create.accessModes to [ReadWriteMany]",
    ),
)
"""What blocks mean together."""


def _joined(*parts: Mapping[str, tuple[Rule, ...]]) -> dict[str, tuple[Rule, ...]]:
    paths = dict.fromkeys(path for part in parts for path in part)
    return {path: tuple(rule for part in parts for rule in part.get(path, ())) for path in paths}


RULES = _joined(_sources(), BLOCKS, {"": WHOLE})
"""By path below spec; the empty path is spec itself."""

LIST_KEYS = {
    "quantize": ("name",),
    "output.publish": ("name",),
    "pod.imagePullSecrets": ("name",),
    "pod.env": ("name",),
}
"""Lists of named entries; all other lists are replaced as a whole."""


MUTABLE = frozenset({"suspend", "cancel"})
MUTABLE_POLICIES = frozenset({"ttlSecondsAfterFinished"})
"""Of runPolicy."""

CANCELLED_FOR_GOOD = Rule(
    "self.?cancel.orValue(false) || !oldSelf.?cancel.orValue(false)",
    "spec.cancel cannot be taken back: apply the job anew under another name",
)


def immutable(field: str, same: str) -> Rule:
    """One rule a field, on spec, so that a later field can be mutable."""
    message = f"spec.{field} cannot be changed: delete the FineTuneJob, or apply the new spec under another name"
    return Rule(same, message)


def unchanged(field: str, *, required: bool) -> str:
    """A field of the spec is what it was."""
    if required:
        return f"self.{field} == oldSelf.{field}"
    return f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})"


def unchanged_policy(policy: str) -> str:
    """A field of runPolicy is what it was, in a block that may come or go around it.

    Not by comparing optionals: to the API server's estimate their cost has no bound.
    """
    now, before = (f"has({who}.runPolicy) && has({who}.runPolicy.{policy})" for who in ("self", "oldSelf"))
    return f"({now}) == ({before}) && (!({now}) || self.runPolicy.{policy} == oldSelf.runPolicy.{policy})"


def immutability() -> tuple[Rule, ...]:
    """Every field of the spec but those that a job is steered by while it runs."""
    fields = {field.alias or name: field.is_required() for name, field in Spec.model_fields.items()}
    fixed = fields.keys() - MUTABLE - {"runPolicy"}
    policies = (field.alias or name for name, field in RunPolicy.model_fields.items())
    return (
        *(immutable(field, unchanged(field, required=fields[field])) for field in fields if field in fixed),
        *(
            immutable(f"runPolicy.{policy}", unchanged_policy(policy))
            for policy in policies
            if policy not in MUTABLE_POLICIES
        ),
        CANCELLED_FOR_GOOD,
    )
