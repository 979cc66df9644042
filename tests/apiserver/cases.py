"""Specs that must be refused, and what is said of them: by the API server's own rules and by the operator's models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from finetune_operator.api import KIND

JSON = dict[str, Any]
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

VOLUME = {"claimName": "models", "path": "smollm2"}
GOOD: JSON = {"model": {"volume": VOLUME}, "datasets": [{"volume": {"claimName": "datasets", "path": "train.jsonl"}}]}
HUB = {"repo": "Qwen/Qwen2.5-3B-Instruct"}
ROWS = {"volume": {"claimName": "datasets", "path": "train.jsonl"}}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARED = {"volume": {"create": {"accessModes": ["ReadWriteMany"]}}}
DPO = {"type": "DPO"}
AWQ = {"name": "q", "method": "AWQ"}
GPTQ = {"name": "q", "method": "GPTQ"}
S3 = {"uri": "s3://models/fox", "credentialsSecretRef": {"name": "s3"}}
BUCKET = {"s3": S3}
REPOSITORY = {"huggingFace": {"repo": "acme/fox", "tokenSecretRef": {"name": "hub", "key": "token"}}}
TAG = {"oci": {"reference": "registry.test:5000/acme/fox:v1"}}
ADAPTER = {"name": "out", "artifact": "Adapter"}
MERGED = {"name": "out", "artifact": "Merged"}
QUANTIZED = {"name": "out", "artifact": "Quantized", "quantizeName": "q"}
ONE_SOURCE = "set exactly one of huggingFace, modelScope, volume, s3 and oci"


def spec(**changes: Any) -> JSON:
    """The shortest spec with some fields changed."""
    return copy.deepcopy(GOOD) | changes


def dataset(**fields: Any) -> JSON:
    """The shortest spec, whose dataset says more."""
    return spec(datasets=[ROWS | fields])


def published(*entries: JSON, **changes: Any) -> JSON:
    """The shortest spec that publishes something."""
    return spec(output={"publish": list(entries)}, **changes)


WHOLE = published(
    MERGED | BUCKET | {"name": "bucket"}, parallelism={"gpusPerNode": 0}, quantize=[GPTQ | {"name": "gptq4"}]
)
"""A job with a stage of each kind, on CPU."""


def examples() -> dict[str, JSON]:
    """The specs of examples/, every recipe and its small twin among them, by their files."""
    files = {path.relative_to(EXAMPLES).as_posix(): path.read_text() for path in sorted(EXAMPLES.rglob("*.yaml"))}
    documents = ((name, body) for name, text in files.items() for body in yaml.safe_load_all(text))
    return {name: body["spec"] for name, body in documents if body["kind"] == KIND}


FINE: dict[str, JSON] = {
    **examples(),
    "the shortest": GOOD,
    "dots in a path": spec(
        model={"volume": VOLUME | {"path": "a..b/..c/x.."}},
        evaluation={"percent": 0},
        training={"checkpoint": {"keep": 1}},
    ),
    "DPO with its settings": spec(
        objective=DPO | {"dpo": {"beta": 0.2, "lossType": "Robust", "labelSmoothing": 0.1}},
        training={"packing": "Off"},
        method={"lora": {"dropout": 0}},
    ),
    "products in FP8 of a base in FP8": spec(
        method={"type": "LoRA", "baseWeights": {"format": "FP8"}, "fp8Products": True}
    ),
    "special tokens of rows whose format is found later": dataset(specialTokens=True),
    "betas of a smaller AdamW": spec(training={"optimizer": "PagedAdamW8bit", "adamBeta1": 0.8, "adamBeta2": 0.95}),
    "settings of SFT without its type": spec(objective={"sft": {"lossOn": "Completion"}}),
    "an adapter to go on from": spec(
        model={"volume": VOLUME, "adapter": {"s3": {"uri": "s3://bucket/adapter/", "endpoint": "https://minio.test"}}}
    ),
    "a model of a registry, rows of a bucket": spec(
        model={
            "oci": {"reference": "registry.test:5000/models/starcoder:15b", "credentialsSecretRef": {"name": "oci"}}
        },
        datasets=[{"s3": {"uri": "s3://bucket/rows/train.jsonl", "credentialsSecretRef": {"name": "s3"}}}],
    ),
    "a GPTQ base of ModelScope, merged into its original": spec(
        model={"modelScope": {"repo": "qwen/Qwen-1_8B-Chat-Int4"}},
        method={"baseWeights": {"format": "GPTQ"}},
        merge={"base": "Original", "original": {"modelScope": {"repo": "qwen/Qwen-1_8B-Chat"}}},
    ),
    "code of a model on a volume": spec(model={"volume": VOLUME, "trustRemoteCode": True}),
    "code that is not trusted": spec(model={"huggingFace": HUB, "trustRemoteCode": False}),
    "code of a commit": spec(model={"huggingFace": HUB | {"revision": COMMIT}, "trustRemoteCode": True}),
    "nodes on a claim of one's own": spec(
        parallelism={"numNodes": 2}, output={"volume": {"existing": {"claimName": "shared"}}}
    ),
    "a batch that 2 x 3 devices share": spec(
        training={"globalBatchSize": 12, "perDeviceTrainBatchSize": 2},
        parallelism={"numNodes": 2, "gpusPerNode": 3},
        output=SHARED,
    ),
    "a batch on CPU": spec(training={"globalBatchSize": 5}, parallelism={"gpusPerNode": 0}),
    "no evaluation, nothing that needs one": spec(evaluation={"percent": 0}, training={"restoreBest": False}),
    "datasets of their own, and what needs them": spec(
        evaluation={"datasets": [ROWS | {"name": "a"}]}, training={"restoreBest": True, "eval": {"everyPercent": 5}}
    ),
    "an epoch's checkpoints": spec(training={"checkpoint": {"everyEpoch": False, "everySteps": 5}}),
    "sharded 4-bit weights": spec(parallelism={"strategy": "FSDP"}, method={"baseWeights": {"format": "NF4"}}),
    "other devices than GPUs": spec(
        pod={"gpuResourceName": "amd.com/gpu", "resources": {"limits": {"nvidia.com/mig-1g.5gb": 1}}}
    ),
    "the memory of a GPU": spec(pod={"gpuMemory": "79.6Gi"}),
    "all trackers": spec(
        tracking={
            "wandb": {"project": "p", "entity": "team", "baseUrl": "https://wandb.test"},
            "mlflow": {"uri": "https://mlflow.test", "credentialsSecretRef": {"name": "mlflow"}},
            "tensorboard": True,
        }
    ),
    "gates of the merge": spec(merge={"maxKLDivergence": 0.01, "maxLossIncrease": -0.01}),
    "quantized without a word about merging": spec(quantize=[{"name": "q", "method": "AWQ"}]),
    "trained whole, then quantized": spec(method={"type": "Full"}, quantize=[AWQ]),
    "GPTQ of 8 bits with its settings": spec(
        quantize=[GPTQ | {"bits": 8, "actOrder": True, "dampeningFrac": 0.1, "maxPerplexityIncreasePercent": 5}]
    ),
    "an adapter that is not merged, published": published(ADAPTER | BUCKET, merge={"policy": "Never"}),
    "a model trained whole, published": published(MERGED | TAG, method={"type": "Full"}),
    "everything, published everywhere": published(
        ADAPTER | BUCKET | {"name": "a"},
        MERGED | REPOSITORY | {"name": "b"},
        QUANTIZED | TAG | {"name": "c"},
        QUANTIZED | {"name": "d", "s3": BUCKET["s3"] | {"endpoint": "https://minio.test"}},
        quantize=[AWQ],
    ),
    "places in every spelling that works": published(
        ADAPTER | REPOSITORY | {"name": "a"},
        MERGED | TAG | {"name": "b"},
        MERGED | {"name": "c", "oci": {"reference": "localhost:65535/acme/fox__a/b-1.0"}},
        MERGED | {"name": "d", "oci": {"reference": "localhost:65535/acme/fox__a/b-1.0:v2"}},
        MERGED | {"name": "e", "s3": S3 | {"uri": "s3://my.models-1/a b/..x/v1.0/", "region": "eu-central-1"}},
        MERGED | {"name": "f", "s3": S3 | {"endpoint": "http://minio.storage.svc:9000/"}},
        MERGED | {"name": "g", "s3": S3 | {"endpoint": "https://files.test/storage/v1/s3"}},
        MERGED | {"name": "h", "s3": S3 | {"endpoint": "http://[::1]:65535"}},
    ),
    "a divergence from an original that was trained on": spec(
        method={"type": "LoRA"}, merge={"base": "Original", "maxKLDivergence": 0.01, "maxShardSize": "2048MB"}
    ),
    "two branches of one repository": published(
        ADAPTER | REPOSITORY,
        MERGED | {"name": "too", "huggingFace": REPOSITORY["huggingFace"] | {"revision": "merged"}},
    ),
}
"""Recipes, and what comes close to what is refused."""

BAD: dict[str, tuple[JSON, str]] = {
    "an unknown field": (spec(pause=True), 'unknown field "spec.pause"'),
    "an unknown field far inside": (spec(method={"lora": {"rank": 8}}), 'unknown field "spec.method.lora.rank"'),
    # --- sources
    "no model": ({"datasets": GOOD["datasets"]}, "spec.model: Required value"),
    "two sources": (spec(model={"volume": VOLUME, "huggingFace": HUB}), f"model: {ONE_SOURCE}"),
    "no source": (spec(model={}), f"model: {ONE_SOURCE}"),
    "two sources of an adapter": (
        spec(model={"volume": VOLUME, "adapter": {"volume": VOLUME, "huggingFace": HUB}}),
        f"model.adapter: {ONE_SOURCE}",
    ),
    "no source of the original": (spec(merge={"original": {}}), f"merge.original: {ONE_SOURCE}"),
    "no dataset": (spec(datasets=[]), "should have at least 1 items"),
    "two sources of a dataset": (dataset(huggingFace=HUB), f"datasets: {ONE_SOURCE}"),
    "no source of a dataset": (spec(datasets=[{"name": "x"}]), f"datasets: {ONE_SOURCE}"),
    "no source of measured rows": (spec(evaluation={"datasets": [{}]}), f"evaluation.datasets: {ONE_SOURCE}"),
    "a path from the root": (
        spec(model={"volume": VOLUME | {"path": "/etc"}}),
        "path: relative to the claim, without a slash before it",
    ),
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
    "an adapter's path that leaves the claim": (
        spec(model={"volume": VOLUME, "adapter": {"volume": VOLUME | {"path": "../a"}}}),
        "path: no part may be '..'",
    ),
    "an original's path that leaves the claim": (
        spec(merge={"original": {"volume": VOLUME | {"path": "../a"}}}),
        "path: no part may be '..'",
    ),
    "a claim's name with a slash": (spec(model={"volume": VOLUME | {"claimName": "../x"}}), "claimName"),
    "a bucket without a key": (spec(model={"s3": {"uri": "s3://bucket"}}), "uri: write s3://bucket/key"),
    "a bucket by its address": (spec(datasets=[{"s3": {"uri": "https://b/k"}}]), "uri: write s3://bucket/key"),
    "an endpoint without a scheme": (
        spec(model={"s3": {"uri": "s3://bucket/key", "endpoint": "minio:9000"}}),
        "spec.model.s3.endpoint",
    ),
    "an artifact by its address": (
        spec(model={"oci": {"reference": "https://registry.test/a:1"}}),
        "reference: write registry/repository:tag, without https://",
    ),
    "a ModelScope repository without an owner": (
        spec(model={"modelScope": {"repo": "qwen"}}),
        "spec.model.modelScope.repo",
    ),
    "a Secret's name with a slash": (
        spec(model={"huggingFace": HUB | {"tokenSecretRef": {"name": "a/b", "key": "token"}}}),
        "spec.model.huggingFace.tokenSecretRef.name",
    ),
    "a Secret's key with a space": (
        spec(model={"huggingFace": HUB | {"tokenSecretRef": {"name": "a.b", "key": "a b"}}}),
        "spec.model.huggingFace.tokenSecretRef.key",
    ),
    "a Secret without a name": (
        spec(model={"s3": {"uri": "s3://bucket/key", "credentialsSecretRef": {}}}),
        "spec.model.s3.credentialsSecretRef.name: Required value",
    ),
    # --- model
    "code of a branch": (
        spec(model={"huggingFace": HUB, "trustRemoteCode": True}),
        "model.trustRemoteCode needs a revision that is a commit",
    ),
    "code of a ModelScope branch": (
        spec(model={"modelScope": {"repo": "a/b", "revision": "v1.0"}, "trustRemoteCode": True}),
        "model.trustRemoteCode needs a revision that is a commit",
    ),
    "two chat templates": (
        spec(model={"volume": VOLUME, "chatTemplate": {"preset": "chatml", "jinja": "{{ messages }}"}}),
        "model.chatTemplate: preset and jinja are alternatives, set one",
    ),
    "a chat template that is not there": (
        spec(model={"volume": VOLUME, "chatTemplate": {"preset": "chatgpt"}}),
        'supported values: "chatml"',
    ),
    "an attention that is not there": (
        spec(model={"volume": VOLUME, "attention": "Flash"}),
        "spec.model.attention: Unsupported value",
    ),
    "an added token of no characters": (
        spec(model={"volume": VOLUME, "tokens": {"add": [""]}}),
        "spec.model.tokens.add[0]",
    ),
    # --- data
    "a format that is not there": (dataset(format="ShareGPT"), "spec.datasets[0].format: Unsupported value"),
    "a weight of nothing": (dataset(weight=0), "spec.datasets[0].weight"),
    "a column that is not there": (
        dataset(columns={"answers": "a"}),
        'unknown field "spec.datasets[0].columns.answers"',
    ),
    "a response without a prompt": (
        dataset(responseTemplate="{{ a }}"),
        "responseTemplate needs a promptTemplate",
    ),
    "a measured response without a prompt": (
        spec(evaluation={"datasets": [ROWS | {"responseTemplate": "{{ a }}"}]}),
        "responseTemplate needs a promptTemplate",
    ),
    "special tokens in a conversation": (
        dataset(format="Chat", specialTokens=True),
        "datasets: specialTokens is for format Text without a promptTemplate: drop it",
    ),
    "special tokens beside a template": (
        dataset(format="Text", specialTokens=True, promptTemplate="{{ a }}", responseTemplate="{{ b }}"),
        "datasets: specialTokens is for format Text without a promptTemplate: drop it",
    ),
    "special tokens in measured answers": (
        spec(evaluation={"datasets": [ROWS | {"format": "Instruction", "specialTokens": False}]}),
        "datasets: specialTokens is for format Text without a promptTemplate: drop it",
    ),
    "files and a split": (
        spec(datasets=[{"huggingFace": HUB | {"files": ["a.jsonl"], "split": "train"}}]),
        "files are in place of config and split: set either",
    ),
    "files and a configuration": (
        spec(evaluation={"datasets": [{"modelScope": HUB | {"files": ["a.jsonl"], "config": "default"}}]}),
        "files are in place of config and split: set either",
    ),
    "a weight of measured rows": (
        spec(evaluation={"datasets": [ROWS | {"weight": 2}]}),
        "evaluation.datasets: weight is for rows to train on",
    ),
    "two datasets of one name": (
        spec(datasets=[ROWS | {"name": "a"}, ROWS, ROWS | {"name": "a"}]),
        "datasets: each name at most once",
    ),
    "two measured datasets of one name": (
        spec(evaluation={"datasets": [ROWS | {"name": "a"}, ROWS | {"name": "a"}]}),
        "evaluation.datasets: each name at most once",
    ),
    "percent and datasets": (
        spec(evaluation={"percent": 5, "datasets": GOOD["datasets"]}),
        "percent and datasets are alternatives, set one",
    ),
    "a loss measured on no rows": (
        spec(evaluation={"percent": 0}, training={"eval": {"everySteps": 5}}),
        "evaluation.percent 0 holds nothing out: drop training.eval or hold rows out",
    ),
    "the best of no measurement": (
        spec(evaluation={"percent": 0}, training={"restoreBest": True}),
        "evaluation.percent 0 holds nothing out: drop training.restoreBest or hold rows out",
    ),
    "an early stop on no rows": (
        spec(evaluation={"percent": 0}, training={"earlyStopping": {"patience": 3}}),
        "evaluation.percent 0 holds nothing out: drop training.earlyStopping or hold rows out",
    ),
    "a gate of divergence on no rows": (
        spec(evaluation={"percent": 0}, merge={"maxKLDivergence": 0.01}),
        "evaluation.percent 0 holds nothing out: drop merge.maxKLDivergence or hold rows out",
    ),
    "a gate of loss on no rows": (
        spec(evaluation={"percent": 0}, merge={"maxLossIncrease": 0.01}),
        "evaluation.percent 0 holds nothing out: drop merge.maxLossIncrease or hold rows out",
    ),
    "a gate of perplexity on no rows": (
        spec(evaluation={"percent": 0}, quantize=[AWQ | {"maxPerplexityIncreasePercent": 5}]),
        "evaluation.percent 0 holds nothing out: drop quantize[].maxPerplexityIncreasePercent or hold rows out",
    ),
    "rows without end": (spec(evaluation={"maxRows": 10**7 + 1}), "spec.evaluation.maxRows"),
    "a seed of 33 bits": (spec(evaluation={"seed": 2**32}), "spec.evaluation.seed"),
    # --- method
    "a method that is not there": (spec(method={"type": "Prefix"}), 'supported values: "QLoRA"'),
    "an adapter's settings for Full": (
        spec(method={"type": "Full", "lora": {"r": 8}}),
        "method.lora is for QLoRA and LoRA",
    ),
    "an adapter's settings for GaLore": (
        spec(method={"type": "GaLore", "lora": {"r": 8}}),
        "method.lora is for QLoRA and LoRA",
    ),
    "GaLore's settings for the default": (spec(method={"galore": {"rank": 8}}), "method.galore is for GaLore"),
    "QLoRA on 16 bits": (
        spec(method={"baseWeights": {"format": "BF16"}}),
        "method.baseWeights.format: QLoRA takes NF4, FP4, GPTQ",
    ),
    "LoRA on 4 bits": (
        spec(method={"type": "LoRA", "baseWeights": {"format": "NF4"}}),
        "method.baseWeights.format: LoRA takes Int8, FP8, BF16, FP16, FP32",
    ),
    "QLoRA on FP8": (
        spec(method={"baseWeights": {"format": "FP8"}}),
        "method.baseWeights.format: QLoRA takes NF4, FP4, GPTQ",
    ),
    "Full on FP8": (
        spec(method={"type": "Full", "baseWeights": {"format": "FP8"}}),
        "method.baseWeights.format: Full takes BF16, FP32",
    ),
    "Full on 8 bits": (
        spec(method={"type": "Full", "baseWeights": {"format": "Int8"}}),
        "method.baseWeights.format: Full takes BF16, FP32",
    ),
    "Full in half precision": (
        spec(method={"type": "Full", "baseWeights": {"format": "FP16"}}),
        "method.baseWeights.format: Full takes BF16, FP32",
    ),
    "GaLore on 4 bits": (
        spec(method={"type": "GaLore", "baseWeights": {"format": "GPTQ"}}),
        "method.baseWeights.format: GaLore takes BF16, FP32",
    ),
    "double quantization of GPTQ": (
        spec(method={"baseWeights": {"format": "GPTQ", "doubleQuantization": True}}),
        "doubleQuantization is for NF4 and FP4",
    ),
    "double quantization of LoRA": (
        spec(method={"type": "LoRA", "baseWeights": {"doubleQuantization": False}}),
        "doubleQuantization is for NF4 and FP4",
    ),
    "products in FP8 of all weights": (
        spec(method={"type": "Full", "fp8Products": True}),
        "method.fp8Products is for QLoRA in NF4 or FP4 and LoRA in BF16 or FP8",
    ),
    "products in FP8 of an Int8 base": (
        spec(method={"type": "LoRA", "baseWeights": {"format": "Int8"}, "fp8Products": True}),
        "method.fp8Products is for QLoRA in NF4 or FP4 and LoRA in BF16 or FP8",
    ),
    "products in FP8 computed in FP32": (
        spec(method={"computeDtype": "FP32", "fp8Products": True}),
        "method.fp8Products is for QLoRA in NF4 or FP4 and LoRA in BF16 or FP8",
    ),
    "products in FP8 on CPU": (
        spec(method={"fp8Products": True}, parallelism={"gpusPerNode": 0}),
        "method.fp8Products is for SFT on one GPU",
    ),
    "products in FP8 on two GPUs": (
        spec(method={"fp8Products": True}, parallelism={"gpusPerNode": 2}),
        "method.fp8Products is for SFT on one GPU",
    ),
    "products in FP8 on two nodes": (
        spec(method={"fp8Products": True}, parallelism={"numNodes": 2}, output=SHARED),
        "method.fp8Products is for SFT on one GPU",
    ),
    "products in FP8 of DPO": (
        spec(method={"fp8Products": True}, objective=DPO),
        "method.fp8Products is for SFT on one GPU",
    ),
    "products in FP8 by autograd": (
        spec(method={"fp8Products": True}, training={"fastPath": "Off"}),
        "method.fp8Products is for SFT on one GPU",
    ),
    "offload by autograd": (spec(training={"offload": "On", "fastPath": "Off"}), "training.offload On is for SFT"),
    "offload with nothing computed again": (
        spec(training={"offload": "On", "gradientCheckpointing": "Off"}),
        "training.offload On is for SFT of adapters on one GPU",
    ),
    "offload of DPO": (spec(training={"offload": "On"}, objective=DPO), "training.offload On is for SFT"),
    "offload of all weights": (
        spec(training={"offload": "On"}, method={"type": "Full"}),
        "training.offload On is for SFT of adapters on one GPU",
    ),
    "offload on CPU": (
        spec(training={"offload": "On"}, parallelism={"gpusPerNode": 0}),
        "training.offload On is for SFT of adapters on one GPU",
    ),
    "offload on two GPUs": (
        spec(training={"offload": "On"}, parallelism={"gpusPerNode": 2}),
        "training.offload On is for SFT of adapters on one GPU",
    ),
    "offload on two nodes": (
        spec(training={"offload": "On"}, parallelism={"numNodes": 2}, output=SHARED),
        "training.offload On is for SFT of adapters on one GPU",
    ),
    "a rank of zero": (spec(method={"lora": {"r": 0}}), "spec.method.lora.r"),
    "a dropout of one": (spec(method={"lora": {"dropout": 1}}), "spec.method.lora.dropout"),
    "an empty list of layers": (spec(method={"lora": {"targetModules": []}}), "should have at least 1 items"),
    # --- objective
    "SFT's settings for DPO": (spec(objective=DPO | {"sft": {}}), "objective.sft is for type SFT"),
    "DPO's settings for the default": (
        spec(objective={"dpo": {"beta": 0.1}}),
        "objective.dpo is for type DPO: set objective.type to DPO",
    ),
    "a loss that is not there": (
        spec(objective=DPO | {"dpo": {"lossType": "sigmoid"}}),
        'supported values: "Sigmoid"',
    ),
    "packed pairs": (spec(objective=DPO, training={"packing": "On"}), "rows of DPO are not packed"),
    "dropout on pairs": (
        spec(objective=DPO, method={"lora": {"dropout": 0.1}}),
        "method.lora.dropout is for objective SFT",
    ),
    "smoothing that the loss does not use": (
        spec(objective=DPO | {"dpo": {"labelSmoothing": 0.1}}),
        "objective.dpo.labelSmoothing is for lossType ExoPair, Robust",
    ),
    "noise on pairs": (
        spec(objective=DPO, training={"neftuneNoiseAlpha": 5}),
        "training.neftuneNoiseAlpha is for objective SFT",
    ),
    # --- training
    "warm-up twice": (
        spec(training={"warmupRatio": 0.1, "warmupSteps": 5}),
        "warmupRatio and warmupSteps are alternatives, set one",
    ),
    "length twice": (
        spec(training={"numTrainEpochs": 1, "maxSteps": 5}),
        "numTrainEpochs and maxSteps are alternatives, set one",
    ),
    "two intervals of measuring": (
        spec(training={"eval": {"everySteps": 5, "everyPercent": 5}}),
        "everySteps and everyPercent are alternatives, set one",
    ),
    "two intervals of saving": (
        spec(training={"checkpoint": {"everySteps": 5, "everyPercent": 5}}),
        "everySteps and everyPercent are alternatives, set one",
    ),
    "epochs and steps of saving": (
        spec(training={"checkpoint": {"everySteps": 5, "everyEpoch": True}}),
        "everyEpoch, everySteps and everyPercent are alternatives, set one",
    ),
    "an early stop without patience": (
        spec(training={"earlyStopping": {}}),
        "spec.training.earlyStopping.patience: Required value",
    ),
    "an optimizer that is not there": (
        spec(training={"optimizer": "adamw_torch"}),
        'supported values: "AdamW"',
    ),
    "a first beta of SGD": (
        spec(training={"optimizer": "SGD", "adamBeta1": 0.9}),
        "training: adamBeta1 and adamBeta2 are for AdamW",
    ),
    "a second beta of Adafactor": (
        spec(training={"optimizer": "Adafactor", "adamBeta2": 0.95}),
        "training: adamBeta1 and adamBeta2 are for AdamW",
    ),
    "a batch that does not divide": (
        spec(training={"globalBatchSize": 8, "perDeviceTrainBatchSize": 3}),
        "must divide globalBatchSize",
    ),
    "a batch that the GPUs of a node cannot share": (
        spec(training={"globalBatchSize": 8}, parallelism={"gpusPerNode": 3}),
        "must divide globalBatchSize",
    ),
    "a batch that the nodes cannot share": (
        spec(training={"globalBatchSize": 9, "perDeviceTrainBatchSize": 3}, parallelism={"numNodes": 2}, output=SHARED),
        "must divide globalBatchSize",
    ),
    "a learning rate of zero": (spec(training={"learningRate": 0}), "spec.training.learningRate"),
    "steps without end": (spec(training={"maxSteps": 10**8 + 1}), "spec.training.maxSteps"),
    "a number that is true": (spec(training={"maxSteps": True}), "spec.training.maxSteps"),
    "a warm-up without end": (spec(training={"warmupSteps": 10**8 + 1}), "spec.training.warmupSteps"),
    "a log line never": (spec(training={"loggingSteps": 10**8 + 1}), "spec.training.loggingSteps"),
    "a measurement never": (spec(training={"eval": {"everySteps": 10**8 + 1}}), "spec.training.eval.everySteps"),
    "a checkpoint never": (
        spec(training={"checkpoint": {"everySteps": 10**8 + 1}}),
        "spec.training.checkpoint.everySteps",
    ),
    "gradients without bound": (spec(training={"maxGradNorm": 1e7}), "spec.training.maxGradNorm"),
    # --- devices
    "seventeen GPUs": (spec(parallelism={"gpusPerNode": 17}), "spec.parallelism.gpusPerNode"),
    "settings of FSDP for DDP": (
        spec(parallelism={"strategy": "DDP", "fsdp": {"cpuOffload": True}}),
        "parallelism.fsdp is for strategy FSDP",
    ),
    "sharded GPTQ weights": (
        spec(parallelism={"strategy": "FSDP"}, method={"baseWeights": {"format": "GPTQ"}}),
        "parallelism.strategy FSDP cannot shard GPTQ, Int8 and FP8 weights",
    ),
    "sharded 8-bit weights": (
        spec(parallelism={"strategy": "FSDP"}, method={"type": "LoRA", "baseWeights": {"format": "Int8"}}),
        "parallelism.strategy FSDP cannot shard GPTQ, Int8 and FP8 weights",
    ),
    "sharded FP8 weights": (
        spec(parallelism={"strategy": "FSDP"}, method={"type": "LoRA", "baseWeights": {"format": "FP8"}}),
        "parallelism.strategy FSDP cannot shard GPTQ, Int8 and FP8 weights",
    ),
    "sharded GaLore": (
        spec(parallelism={"strategy": "FSDP"}, method={"type": "GaLore"}),
        "parallelism.strategy FSDP does not go with GaLore",
    ),
    "nodes on a claim of the default mode": (
        spec(parallelism={"numNodes": 2}),
        "parallelism.numNodes above 1: set output.volume.create.accessModes to [ReadWriteMany]",
    ),
    "nodes on a claim of one node": (
        spec(
            parallelism={"numNodes": 2},
            output={"volume": {"create": {"accessModes": ["ReadWriteOnce"]}}},
        ),
        "parallelism.numNodes above 1: set output.volume.create.accessModes to [ReadWriteMany]",
    ),
    # --- what follows
    "a merge of what was trained whole": (spec(method={"type": "Full"}, merge={}), "merge is for adapters"),
    "a merge after GaLore": (spec(method={"type": "GaLore"}, merge={"policy": "Auto"}), "merge is for adapters"),
    "an adapter for Full": (
        spec(method={"type": "Full"}, model={"volume": VOLUME, "adapter": {"volume": VOLUME}}),
        "model.adapter is for QLoRA and LoRA",
    ),
    "an original to merge into the dequantized": (
        spec(merge={"base": "Dequantized", "original": {"volume": VOLUME}}),
        "merge.original is for base Original",
    ),
    "a gate of loss for the dequantized": (
        spec(merge={"base": "Dequantized", "maxLossIncrease": 0.01}),
        "merge.maxLossIncrease is for base Original: drop it, or set merge.base to Original",
    ),
    "a gate of divergence for other weights than were trained on": (
        spec(merge={"base": "Original", "maxKLDivergence": 0.01}),
        "merge.maxKLDivergence says nothing of base Original of a quantized base: set merge.maxLossIncrease",
    ),
    "a gate of divergence for the original of 8-bit weights": (
        spec(
            method={"type": "LoRA", "baseWeights": {"format": "Int8"}},
            merge={"base": "Original", "maxKLDivergence": 0.01},
        ),
        "merge.maxKLDivergence says nothing of base Original of a quantized base: set merge.maxLossIncrease",
    ),
    "a gate of divergence for the original of weights in FP8": (
        spec(
            method={"type": "LoRA", "baseWeights": {"format": "FP8"}},
            merge={"base": "Original", "maxKLDivergence": 0.01},
        ),
        "merge.maxKLDivergence says nothing of base Original of a quantized base: set merge.maxLossIncrease",
    ),
    "a gate of what is not merged": (
        spec(merge={"policy": "Never", "maxKLDivergence": 0.01}),
        "merge.policy Never merges nothing: drop the other fields of merge, or leave policy unset",
    ),
    "the shards of what is not merged": (
        spec(merge={"policy": "Never", "maxShardSize": "5GB"}),
        "merge.policy Never merges nothing: drop the other fields of merge, or leave policy unset",
    ),
    "shards of nothing": (spec(merge={"maxShardSize": "0GB"}), "merge.maxShardSize: write a size above zero"),
    "a gate of divergence below zero": (spec(merge={"maxKLDivergence": -0.1}), "spec.merge.maxKLDivergence"),
    "shards of a size that is none": (
        spec(merge={"maxShardSize": "2 GB"}),
        "merge.maxShardSize: write a size above zero",
    ),
    "quantize without merge": (
        spec(merge={"policy": "Never"}, quantize=[{"name": "q", "method": "GPTQ"}]),
        "quantize needs the merged model: leave merge.policy unset or drop quantize",
    ),
    "two quantized forms of one name": (
        spec(quantize=[{"name": "q", "method": "GPTQ"}, {"name": "q", "method": "GPTQ"}]),
        'Duplicate value: {"name":"q"}',
    ),
    "three bits": (spec(quantize=[GPTQ | {"bits": 3}]), "spec.quantize[0].bits"),
    "six bits": (spec(quantize=[GPTQ | {"bits": 6}]), "spec.quantize[0].bits"),
    "AWQ of 8 bits": (spec(quantize=[AWQ | {"bits": 8}]), "quantize: AWQ has 4 bits: drop bits, or use method GPTQ"),
    "an order of columns for AWQ": (
        spec(quantize=[AWQ | {"actOrder": False}]),
        "quantize: actOrder, dampeningFrac only with method GPTQ, drop them with any other",
    ),
    "dampening for AWQ": (
        spec(quantize=[AWQ | {"dampeningFrac": 0.1}]),
        "quantize: actOrder, dampeningFrac only with method GPTQ, drop them with any other",
    ),
    "bits for GGUF": (
        spec(quantize=[{"name": "q8", "method": "GGUF", "bits": 8}]),
        "quantize: bits, groupSize, symmetric, calibration only with method GPTQ and AWQ, drop them with any other",
    ),
    "a type of GGUF for GPTQ": (
        spec(quantize=[GPTQ | {"ggufType": "Q8_0"}]),
        "quantize: ggufType only with method GGUF, drop them with any other",
    ),
    "a gate below zero": (
        spec(quantize=[AWQ | {"maxPerplexityIncreasePercent": -1}]),
        "spec.quantize[0].maxPerplexityIncreasePercent",
    ),
    # --- what goes out
    "no place to publish to": (published(ADAPTER), "output.publish: set exactly one of huggingFace, s3 and oci"),
    "two places to publish to": (
        published(ADAPTER | BUCKET | TAG),
        "output.publish: set exactly one of huggingFace, s3 and oci",
    ),
    "a claim to publish to": (
        published(ADAPTER | {"volume": VOLUME}),
        'unknown field "spec.output.publish[0].volume"',
    ),
    "an artifact that is not there": (
        published({"name": "out", "artifact": "Checkpoint"} | BUCKET),
        'supported values: "Adapter", "Merged", "Quantized"',
    ),
    "a quantized form without its name": (
        published({"name": "out", "artifact": "Quantized"} | BUCKET, quantize=[AWQ]),
        "output.publish: quantizeName goes with artifact Quantized, which needs it",
    ),
    "a quantized form's name for the merged model": (
        published(MERGED | BUCKET | {"quantizeName": "q"}, quantize=[AWQ]),
        "output.publish: quantizeName goes with artifact Quantized, which needs it",
    ),
    "a quantized form that is not made": (
        published(QUANTIZED | BUCKET, quantize=[AWQ | {"name": "other"}]),
        "output.publish: quantizeName must be the name of an entry of quantize",
    ),
    "a quantized form where none is made": (
        published(QUANTIZED | BUCKET),
        "output.publish: quantizeName must be the name of an entry of quantize",
    ),
    "the adapter of a model trained whole": (
        published(ADAPTER | BUCKET, method={"type": "Full"}),
        "output.publish: artifact Adapter is for method.type QLoRA and LoRA",
    ),
    "a merged model that is not merged": (
        published(MERGED | BUCKET, merge={"policy": "Never"}),
        "output.publish: artifact Merged needs the merge: leave merge.policy unset, or publish Adapter",
    ),
    "two things published under one name": (
        published(ADAPTER | BUCKET, MERGED | TAG),
        'Duplicate value: {"name":"out"}',
    ),
    "two things below one prefix": (
        published(ADAPTER | BUCKET, MERGED | BUCKET | {"name": "too"}),
        "output.publish: each entry needs a place of its own, two have the same s3",
    ),
    "two things below one prefix, once with a slash behind it": (
        published(
            ADAPTER | {"s3": S3 | {"endpoint": "https://minio.test/"}},
            MERGED | {"name": "too", "s3": S3 | {"uri": "s3://models/fox/", "endpoint": "https://minio.test"}},
        ),
        "output.publish: each entry needs a place of its own, two have the same s3",
    ),
    "two things on one branch": (
        published(ADAPTER | REPOSITORY, MERGED | REPOSITORY | {"name": "too"}),
        "output.publish: each entry needs a place of its own, two have the same huggingFace",
    ),
    "two things under one tag": (
        published(ADAPTER | TAG, MERGED | TAG | {"name": "too"}),
        "output.publish: each entry needs a place of its own, two have the same oci",
    ),
    "two things under one tag, once unsaid": (
        published(
            ADAPTER | {"oci": {"reference": "registry.test:5000/acme/fox"}},
            MERGED | {"name": "too", "oci": {"reference": "registry.test:5000/acme/fox:latest"}},
        ),
        "output.publish: each entry needs a place of its own, two have the same oci",
    ),
    "a hub without a token": (
        published(ADAPTER | {"huggingFace": {"repo": "acme/fox"}}),
        "spec.output.publish[0].huggingFace.tokenSecretRef: Required value",
    ),
    "a bucket without keys": (
        published(ADAPTER | {"s3": {"uri": "s3://models/fox"}}),
        "spec.output.publish[0].s3.credentialsSecretRef: Required value",
    ),
    "a whole bucket to publish to": (
        published(ADAPTER | {"s3": BUCKET["s3"] | {"uri": "s3://models"}}),
        "uri: write s3://bucket/prefix, without",
    ),
    "a registry by its address": (
        published(ADAPTER | {"oci": {"reference": "https://registry.test/acme/fox:v1"}}),
        "reference: write registry/repository:tag, without https://",
    ),
    "a digest to publish to": (
        published(ADAPTER | {"oci": {"reference": f"registry.test/acme/fox@sha256:{'0' * 64}"}}),
        "spec.output.publish[0].oci.reference",
    ),
    # --- cluster
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
    "GPUs among the resources": (
        spec(parallelism={"gpusPerNode": 0}, pod={"resources": {"limits": {"nvidia.com/gpu": 1}}}),
        "GPUs are counted by parallelism.gpusPerNode",
    ),
    "GPUs of another kind among the resources": (
        spec(pod={"gpuResourceName": "amd.com/gpu", "resources": {"requests": {"amd.com/gpu": "1"}}}),
        "GPUs are counted by parallelism.gpusPerNode",
    ),
    "memory of a GPU without a unit": (spec(pod={"gpuMemory": "24"}), "spec.pod.gpuMemory"),
    "a variable that changes what code runs": (
        spec(pod={"env": [{"name": "LD_PRELOAD", "value": "x"}]}),
        "pod.env: this variable is set by the operator or changes what code runs",
    ),
    "a token in the open": (
        spec(pod={"env": [{"name": "HF_TOKEN", "value": "x"}]}),
        "pod.env: this variable is set by the operator or changes what code runs",
    ),
    "a variable of the operator's own": (
        spec(pod={"env": [{"name": "FINETUNE_RENDEZVOUS", "value": "x"}]}),
        "pod.env: this variable is set by the operator or changes what code runs",
    ),
    "a variable twice": (
        spec(pod={"env": [{"name": "A", "value": "x"}, {"name": "A", "value": "y"}]}),
        'Duplicate value: {"name":"A"}',
    ),
    "a variable of no name": (spec(pod={"env": [{"name": "A=B", "value": "x"}]}), "spec.pod.env[0].name"),
    # --- life
    "retries without end": (spec(runPolicy={"maxRetries": 1000}), "spec.runPolicy.maxRetries"),
    "a deadline in the past": (spec(runPolicy={"activeDeadlineSeconds": 0}), "spec.runPolicy.activeDeadlineSeconds"),
    "a patience of no time": (spec(runPolicy={"stallTimeoutSeconds": 1}), "spec.runPolicy.stallTimeoutSeconds"),
    "an end after training": (spec(runPolicy={"stopAfter": "Train"}), 'supported values: "Prepare"'),
    "a manager without a domain": (spec(managedBy="me"), "spec.managedBy"),
    # --- tracking
    "a W&B run of no project": (spec(tracking={"wandb": {}}), "spec.tracking.wandb.project: Required value"),
    "an MLflow server without a scheme": (
        spec(tracking={"mlflow": {"uri": "mlflow:5000"}}),
        "spec.tracking.mlflow.uri",
    ),
}

MISSPELT: dict[tuple[str, str], tuple[str, tuple[str, ...]]] = {
    ("s3", "uri"): (
        "uri: write s3://bucket/prefix, without '?', '#', empty parts, '.' and '..', in the bucket's name as well",
        (
            *("s3://models/../fox", "s3://models/fox/.", "s3://models//fox", "s3://models/fox//", "s3://models/"),
            *("s3://mo..dels/fox", "s3://models/fox?versionId=1", "s3://models/fox#1"),
        ),
    ),
    ("s3", "endpoint"): (
        "endpoint: write https://host:port, with a port up to 65535, without user and password, '?' and '#'",
        ("http://???", "http://u:p@store", "http://store:65536", "http://store:0", "http://store/?x", "http://store#x"),
    ),
    ("s3", "region"): ("region: letters, digits, dots and dashes only", ("us east 1", "us-east-1/x")),
    ("oci", "reference"): (
        "https:// before it, without empty parts, '.' and '..', with a port up to 65535",
        (
            *("registry.test/../fox", "registry.test/./fox:v1", "registry.test//fox", "registry.test/fox/"),
            "registry.test:99999/acme/fox:v1",
        ),
    ),
    ("huggingFace", "repo"): (
        "repo: write owner/name, neither of which begins or ends with a dot or a dash, without '--' and '..'",
        ("../..", "acme/-fox", "acme./fox", "acme/a..b", "fox"),
    ),
    ("huggingFace", "revision"): (
        "revision: write the name of a branch, which is no commit and has no '..', '//' or '/.' in it",
        (COMMIT, "a..b", "v1//a", "main/"),
    ),
}
"""By kind of place and field: what is said, and of what."""

BAD |= {
    f"{field} {text}": (published(ADAPTER | {kind: (BUCKET | TAG | REPOSITORY)[kind] | {field: text}}), message)
    for (kind, field), (message, texts) in MISSPELT.items()
    for text in texts
}
