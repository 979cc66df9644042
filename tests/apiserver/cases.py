"""Specs that must be refused, and what is said of them: by the API server's own rules and by the operator's models."""

from __future__ import annotations

import copy
from typing import Any

JSON = dict[str, Any]

VOLUME = {"claimName": "models", "path": "smollm2"}
GOOD: JSON = {"model": {"volume": VOLUME}, "datasets": [{"volume": {"claimName": "datasets", "path": "train.jsonl"}}]}
HUB = {"repo": "Qwen/Qwen2.5-3B-Instruct"}


def spec(**changes: Any) -> JSON:
    """The shortest spec with some fields changed."""
    return copy.deepcopy(GOOD) | changes


FINE = spec(
    model={"volume": VOLUME | {"path": "a..b/..c/x.."}}, evaluation={"percent": 0}, training={"checkpoint": {"keep": 1}}
)
"""Close to what is refused."""

BAD: dict[str, tuple[JSON, str]] = {
    "an unknown field": (spec(suspend=True), 'unknown field "spec.suspend"'),
    "an unknown field far inside": (spec(method={"lora": {"rank": 8}}), 'unknown field "spec.method.lora.rank"'),
    "no model": ({"datasets": GOOD["datasets"]}, "spec.model: Required value"),
    "two sources": (spec(model={"volume": VOLUME, "huggingFace": HUB}), "set exactly one of huggingFace and volume"),
    "no source": (spec(model={}), "set exactly one of huggingFace and volume"),
    "no dataset": (spec(datasets=[]), "should have at least 1 items"),
    "a path from the root": (spec(model={"volume": VOLUME | {"path": "/etc"}}), "spec.model.volume.path"),
    "a path that leaves the claim": (
        spec(model={"volume": VOLUME | {"path": "a/../../b"}}),
        "path: no part may be '..'",
    ),
    "a dataset's path that leaves the claim": (
        spec(datasets=[{"volume": VOLUME | {"path": ".."}}]),
        "path: no part may be '..'",
    ),
    "a measured path that leaves the claim": (
        spec(evaluation={"datasets": [{"volume": VOLUME | {"path": "../rows"}}]}),
        "path: no part may be '..'",
    ),
    "a claim's name with a slash": (spec(model={"volume": VOLUME | {"claimName": "../x"}}), "claimName"),
    "percent and datasets": (
        spec(evaluation={"percent": 5, "datasets": GOOD["datasets"]}),
        "percent and datasets are alternatives, set one",
    ),
    "a loss measured on no rows": (
        spec(evaluation={"percent": 0}, training={"eval": {"everySteps": 5}}),
        "evaluation.percent 0 holds nothing out: drop training.eval or hold rows out",
    ),
    "warm-up twice": (
        spec(training={"warmupRatio": 0.1, "warmupSteps": 5}),
        "warmupRatio and warmupSteps are alternatives, set one",
    ),
    "length twice": (
        spec(training={"numTrainEpochs": 1, "maxSteps": 5}),
        "numTrainEpochs and maxSteps are alternatives, set one",
    ),
    "a batch that does not divide": (
        spec(training={"globalBatchSize": 8, "perDeviceTrainBatchSize": 3}),
        "perDeviceTrainBatchSize must divide globalBatchSize",
    ),
    "a learning rate of zero": (spec(training={"learningRate": 0}), "spec.training.learningRate"),
    "a method that is not there": (spec(method={"type": "Full"}), 'supported values: "QLoRA"'),
    "quantize without merge": (
        spec(merge={"policy": "Never"}, quantize=[{"name": "q", "method": "GPTQ"}]),
        "quantize needs the merged model: leave merge.policy unset or drop quantize",
    ),
    "two quantized forms of one name": (
        spec(quantize=[{"name": "q", "method": "GPTQ"}, {"name": "q", "method": "GPTQ"}]),
        'Duplicate value: {"name":"q"}',
    ),
    "three bits": (spec(quantize=[{"name": "q", "method": "GPTQ", "bits": 3}]), "spec.quantize[0].bits"),
    "two volumes": (
        spec(output={"volume": {"create": {}, "existing": {"claimName": "x"}}}),
        "set exactly one of create and existing",
    ),
    "no volume": (spec(output={"volume": {}}), "set exactly one of create and existing"),
    "an access mode twice": (
        spec(output={"volume": {"create": {"accessModes": ["ReadWriteOnce", "ReadWriteOnce"]}}}),
        "each mode at most once",
    ),
    "a size that is none": (spec(output={"volume": {"create": {"size": "much"}}}), "spec.output.volume.create.size"),
    "two GPUs": (spec(parallelism={"gpusPerNode": 2}), "spec.parallelism.gpusPerNode"),
    "steps without end": (spec(training={"maxSteps": 10**8 + 1}), "spec.training.maxSteps"),
    "a warm-up without end": (spec(training={"warmupSteps": 10**8 + 1}), "spec.training.warmupSteps"),
    "a log line never": (spec(training={"loggingSteps": 10**8 + 1}), "spec.training.loggingSteps"),
    "a measurement never": (spec(training={"eval": {"everySteps": 10**8 + 1}}), "spec.training.eval.everySteps"),
    "a checkpoint never": (
        spec(training={"checkpoint": {"everySteps": 10**8 + 1}}),
        "spec.training.checkpoint.everySteps",
    ),
    "gradients without bound": (spec(training={"maxGradNorm": 1e7}), "spec.training.maxGradNorm"),
    "rows without end": (spec(evaluation={"maxRows": 10**7 + 1}), "spec.evaluation.maxRows"),
    "a seed of 33 bits": (spec(evaluation={"seed": 2**32}), "spec.evaluation.seed"),
    "a Secret's name with a slash": (
        spec(model={"huggingFace": HUB | {"tokenSecretRef": {"name": "a/b", "key": "token"}}}),
        "spec.model.huggingFace.tokenSecretRef.name",
    ),
    "a Secret's key with a space": (
        spec(model={"huggingFace": HUB | {"tokenSecretRef": {"name": "a.b", "key": "a b"}}}),
        "spec.model.huggingFace.tokenSecretRef.key",
    ),
    "retries without end": (spec(runPolicy={"maxRetries": 1000}), "spec.runPolicy.maxRetries"),
}
