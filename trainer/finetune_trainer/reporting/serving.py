"""Manifests that serve what was made: a Deployment with its Service, and a KServe InferenceService. Pure.

Both run the same pod, which reads the job's folder on its claim: vLLM on one GPU, or llama.cpp's server for a GGUF
file. Of a quantized form vLLM reads the method from the model's config and takes the fastest kernel of the GPU at hand,
so none is named here. An adapter is served on the base as it was trained on, or not at all: on other weights it is
another model.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from finetune_trainer.config import FLOATING, BaseFormat, ComputeDtype
from finetune_trainer.models.folder import CONFIG
from finetune_trainer.models.loading import DTYPES
from finetune_trainer.reporting.record import Serving

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from finetune_trainer.progress import Resolved
    from finetune_trainer.reporting.record import JobReport, MadeArtifact

SERVE_FOLDER = "serve"
VLLM = "vLLM"
VLLM_IMAGE = "vllm/vllm-openai:v0.33.0"
"""Reads what transformers 5 writes (it has 5.16 to 5.20 itself)."""
LLAMA_CPP_IMAGE = "ghcr.io/ggml-org/llama.cpp:server-b11151"
"""Of the same build there is server-cuda-b11151."""
UNKNOWN_CLAIM = "FILL-IN-THE-CLAIM"
"""No name that Kubernetes takes: applied as it is, it is refused."""
JOB_FOLDER = "/job"
PORT = 8000
USER_ID = 65532
"""Any but root, as the stages have it: the job's files are for everybody to read."""
SCRATCH = "/tmp"  # noqa: S108 - the pod's own
NAME_CHARACTERS = 50
"""Of an InferenceService, whose name and namespace make up a host name."""
SERVED_LENGTH = 8192
"""Tokens of prompt and answer, where the model takes more: each costs memory that is set aside at the start."""
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM takes as its limit."""
START_MINUTES = 30
CHAT_TEMPLATE = "chat_template.jinja"

Manifest = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A file to be written, or why there is none."""

    told: Serving
    text: str | None = None

    @property
    def name(self) -> str:
        """The file's name in the folder of manifests."""
        return (self.told.file or "").rpartition("/")[2]


@dataclass(frozen=True)
class Served:
    """A server, and what it is to load."""

    artifact: str
    server: str
    image: str
    command: tuple[str, ...]
    args: tuple[str, ...]
    resources: Manifest
    remarks: tuple[str, ...]


ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "HOME": SCRATCH, "USER": "server"}
"""The last two: what is compiled is kept below HOME, in a folder of USER, whom the image's list of users lacks."""
ON_GPU: Manifest = {"limits": {"nvidia.com/gpu": "1"}, "requests": {"cpu": "2", "memory": "16Gi"}}
ON_CPU: Manifest = {"requests": {"cpu": "4", "memory": "8Gi"}}


def plan_serving(report: JobReport, root: Path, claim: str | None) -> list[Plan]:
    """The manifests of every finished artifact. `root`: the work folder; `claim`: that it lies in, if it is known."""
    return [plan for artifact in report.artifacts for plan in _plans(artifact, report, root, claim)]


def _plans(artifact: MadeArtifact, report: JobReport, root: Path, claim: str | None) -> Iterator[Plan]:
    if report.settings is None:
        return
    refusal = refuse_adapter(report.settings) if artifact.type == "Adapter" else None
    if refusal is not None:
        yield Plan(Serving(artifact=artifact.name, server=VLLM, refusal=refusal))
        return
    served, name = _describe(artifact, report.settings, root), dns_label(report.job, artifact.name)
    pod = build_pod(served, report.job, claim)
    kinds = {served.server: [build_deployment(name, pod), build_service(name)]}
    kinds["KServe"] = [build_inference_service(name, pod)]
    for server, manifests in kinds.items():
        file = f"{SERVE_FOLDER}/{artifact.name}-{server.lower().replace('.', '')}.yaml"
        yield Plan(Serving(artifact=artifact.name, server=server, file=file), write_yaml(manifests, served, claim))


# What is served


def _describe(artifact: MadeArtifact, settings: Resolved, root: Path) -> Served:
    if artifact.type == "Adapter":
        return _describe_adapter(artifact, settings, root)
    exported = next(iter(sorted((root / artifact.path).glob("*.gguf"))), None)
    if exported is not None:
        return _describe_gguf(artifact, exported.name, settings, root)
    return _describe_finished(artifact, settings, root)


def _describe_finished(artifact: MadeArtifact, settings: Resolved, root: Path) -> Served:
    """A model in one piece, of 16 bits or quantized."""
    config = _config(root / artifact.path)
    quantized = next((each for each in settings.quantize if artifact.path == f"quantized/{each.name}"), None)
    remark = (
        "A model of its own, in one piece."
        if quantized is None
        else f"{quantized.method} with {quantized.bits} bits, which vLLM reads in the model's {CONFIG}."
    )
    options = (
        f"--served-model-name={artifact.name}",
        f"--dtype={config.get('dtype') or 'auto'}",
        f"--max-model-len={served_length(config, settings)}",
        *_chat_template(root, artifact.path),
    )
    return _with_vllm(artifact.name, artifact.path, options, (remark,))


def _describe_adapter(artifact: MadeArtifact, settings: Resolved, root: Path) -> Served:
    """The base as it was trained on, with the adapter on it."""
    rank = settings.lora.r if settings.lora else LORA_RANKS[0]
    path = f"{JOB_FOLDER}/{artifact.path}"
    dtype = ComputeDtype.BF16 if settings.compute_dtype == ComputeDtype.FP32 else settings.compute_dtype  # LoRA's two
    options = [
        "--served-model-name=base",
        f"--dtype={DTYPES[dtype]}",
        f"--max-model-len={served_length(_config(root / 'model'), settings)}",
        f"--tokenizer={path}",
        *_chat_template(root, artifact.path),
        "--enable-lora",
        f"--lora-modules={artifact.name}={path}",
        f"--max-lora-rank={next(each for each in LORA_RANKS if each >= rank)}",
    ]
    if settings.base_format == BaseFormat.NF4:
        options.append("--quantization=bitsandbytes")  # NF4 with double quantization, made as the weights are loaded
    remarks = (
        f"The base, held in {settings.base_format} as in training, with the adapter on it.",
        f"Ask for the model '{artifact.name}'; 'base' answers without the adapter.",
    )
    return _with_vllm(artifact.name, "model", options, remarks)


def _with_vllm(artifact: str, model: str, options: Sequence[str], remarks: tuple[str, ...]) -> Served:
    larger = "Of a model too large for one GPU raise nvidia.com/gpu, and add --tensor-parallel-size to match."
    return Served(
        artifact=artifact,
        server=VLLM,
        image=VLLM_IMAGE,
        command=("vllm", "serve", f"{JOB_FOLDER}/{model}"),
        args=(*options, f"--port={PORT}"),
        resources=ON_GPU,
        remarks=(*remarks, larger),
    )


def _describe_gguf(artifact: MadeArtifact, file: str, settings: Resolved, root: Path) -> Served:
    """A GGUF file, whose tokenizer and chat template are in it."""
    config = _config(root / "merged")  # it was made from
    return Served(
        artifact=artifact.name,
        server="llama.cpp",
        image=LLAMA_CPP_IMAGE,
        command=("/app/llama-server",),
        args=(
            f"--model={JOB_FOLDER}/{artifact.path}/{file}",
            f"--alias={artifact.name}",
            f"--ctx-size={served_length(config, settings)}",
            "--jinja",
            "--host=0.0.0.0",
            f"--port={PORT}",
        ),
        resources=ON_CPU,
        remarks=("A GGUF file on CPU. For a GPU take the image server-cuda of the same build and ask for one.",),
    )


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    return config


def _chat_template(root: Path, path: str) -> tuple[str, ...]:
    """The option that names the template as trained with, if the model has one."""
    there = (root / path / CHAT_TEMPLATE).is_file()
    return (f"--chat-template={JOB_FOLDER}/{path}/{CHAT_TEMPLATE}",) if there else ()


def refuse_adapter(settings: Resolved) -> str | None:
    """Why vLLM cannot serve the adapter on the weights that it was trained on; None if it can."""
    lora, held = settings.lora, settings.base_format
    if lora is None:
        return "No adapter was trained."
    cannot = {
        "DoRA": lora.use_dora,
        "layers that are trained whole (modulesToSave)": bool(lora.modules_to_save),
        "trained biases": lora.bias != "None",
        "added tokens": bool(settings.added_tokens),
        "adapters on parameters that are no layers (targetParameters)": bool(lora.target_parameters),
        f"a rank above {LORA_RANKS[-1]}": lora.r > LORA_RANKS[-1],
        f"a base held in {held}": held not in (BaseFormat.NF4, BaseFormat.GPTQ, *FLOATING),
        "NF4 without double quantization": held == BaseFormat.NF4 and not settings.double_quantization,
    }
    found = [name for name, is_so in cannot.items() if is_so]
    return f"vLLM serves no {' and no '.join(found)}: serve the merged model." if found else None


def served_length(config: dict[str, Any], settings: Resolved) -> int:
    """Tokens of prompt and answer: as trained at least, at most the model's own."""
    return min(int(config.get("max_position_embeddings") or SERVED_LENGTH), max(SERVED_LENGTH, settings.max_length))


# Manifests


def build_pod(served: Served, folder: str, claim: str | None) -> Manifest:
    """The server's pod, as Pod Security `restricted` takes it. `folder`: of the job, in the claim."""
    return {
        "containers": [
            {
                "name": "kserve-container",  # the name that KServe looks for
                "image": served.image,
                "command": list(served.command),
                "args": list(served.args),
                "env": [{"name": name, "value": value} for name, value in ENVIRONMENT.items()],
                "ports": [{"name": "http1", "containerPort": PORT, "protocol": "TCP"}],
                "resources": served.resources,
                "startupProbe": {**_probe(), "periodSeconds": 10, "failureThreshold": START_MINUTES * 6},
                "readinessProbe": {**_probe(), "periodSeconds": 10},
                "volumeMounts": [
                    {"name": "job", "mountPath": JOB_FOLDER, "subPath": folder, "readOnly": True},
                    {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - the pod's own
                    {"name": "scratch", "mountPath": SCRATCH},
                ],
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [
            {"name": "job", "persistentVolumeClaim": {"claimName": claim or UNKNOWN_CLAIM, "readOnly": True}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "2Gi"}},
            {"name": "scratch", "emptyDir": {}},
        ],
    }


def _probe() -> Manifest:
    return {"httpGet": {"path": "/health", "port": PORT}}


def build_deployment(name: str, pod: Manifest) -> Manifest:
    """One pod, replaced only after it is gone: it holds a GPU, and maybe a claim of one node."""
    labels = {"app.kubernetes.io/name": name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def build_service(name: str) -> Manifest:
    """The Deployment's address in the cluster."""
    labels = {"app.kubernetes.io/name": name}
    ports = [{"name": "http", "port": 80, "targetPort": PORT}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "labels": labels},
        "spec": {"selector": labels, "ports": ports},
    }


def build_inference_service(name: str, pod: Manifest) -> Manifest:
    """The pod under KServe, as a plain Deployment: Knative takes no claims unless an administrator lets it."""
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, "annotations": {"serving.kserve.io/deploymentMode": "RawDeployment"}},
        "spec": {"predictor": {"minReplicas": 1, "maxReplicas": 1, "deploymentStrategy": {"type": "Recreate"}, **pod}},
    }


def write_yaml(manifests: list[Manifest], served: Served, claim: str | None) -> str:
    """The file, with what there is to know about it above."""
    remarks = [f"{served.artifact}: kubectl apply --namespace <that of the claim> --filename <this file>"]
    remarks += served.remarks
    if claim is None:
        remarks.append(f"FILL IN claimName: the claim that has the job's folder. {UNKNOWN_CLAIM} is refused as it is.")
    head = "".join(f"# {remark}\n" for remark in remarks)
    return head + yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=120)


class _Dumper(yaml.SafeDumper):
    """Writes what stands in several places in full: people change files that they apply."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002 - PyYAML's signature
        """Nothing is written as a reference."""
        return True


def dns_label(job: str, artifact: str) -> str:
    """A name for Kubernetes: the job's, shortened so that the artifact's is whole."""
    words = [re.sub(r"[^a-z0-9]+", "-", word.lower()).strip("-") for word in (job, artifact)]
    start = words[0][: NAME_CHARACTERS - len(words[1]) - 1].strip("-")
    return f"{start}-{words[1]}" if start[:1].isalpha() else f"model-{start}-{words[1]}"[:NAME_CHARACTERS].strip("-")
