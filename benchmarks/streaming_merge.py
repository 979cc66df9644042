"""Peak memory of merging an adapter a part of the model at a time, beside PEFT's `merge_and_unload`.

A random Llama of about 1.6B parameters in bf16 and a LoRA adapter on all of its linear layers are written into a
temporary folder. Each way of merging runs in a fresh process, which tells the most memory that it held: anonymous
pages and pages of mapped files alike (`ru_maxrss`), imports included; and with a GPU what tensors held there.

    python -m benchmarks.streaming_merge                     # 3 GB on disk and as much again twice; minutes on 2 cores
    python -m benchmarks.streaming_merge --layers 4          # a smaller one
    python -m benchmarks.streaming_merge --device cuda       # merged on the GPU
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file

from finetune_trainer.models.finished import cast
from finetune_trainer.models.loading import set_up_torch
from finetune_trainer.models.sharding import blocks_of, build_empty
from tests.tiny import make_tokenizer
from tests.unit.trainer.runs import SETTINGS, replace_settings

if TYPE_CHECKING:
    import torch

SIZE: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHARD = "500MB"
MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """What merging took."""

    seconds: float
    host_mib: float
    """The most that the process held, imports included."""
    gpu_mib: float
    """The most that tensors held on the GPU; 0 without one."""


def make_model(folder: Path, layers: int) -> int:
    """Write a random model, a shard a block; its parameters."""
    import torch  # noqa: PLC0415 - slow
    from transformers import LlamaConfig  # noqa: PLC0415 - slow

    make_tokenizer(folder)
    LlamaConfig(**SIZE, num_hidden_layers=layers, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    empty = build_empty(folder)
    blocks = [name for name, _ in blocks_of(empty)]
    shards: dict[str, dict[str, Any]] = {}
    drawn: dict[torch.Size, torch.Tensor] = {}  # once for each shape: drawing takes longer than merging
    for name, weight in empty.state_dict().items():
        block = next((each for each in blocks if name.startswith(each + ".")), "rest")
        shards.setdefault(f"model-{block}.safetensors", {})[name] = weight
    for file, weights in shards.items():
        for each in weights.values():
            if each.shape not in drawn:
                drawn[each.shape] = torch.empty(each.shape, dtype=torch.bfloat16).normal_(0, 0.02)
        made = {name: drawn[each.shape].clone() for name, each in weights.items()}
        save_file(made, folder / file, metadata={"format": "pt"})
    places = {name: file for file, weights in shards.items() for name in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return sum(each.numel() for each in empty.parameters())


def make_adapter(model: Path, folder: Path) -> None:
    """Write a LoRA adapter of rank 16 on all linear layers, random in all its parts."""
    import torch  # noqa: PLC0415 - slow
    from peft import LoraConfig  # noqa: PLC0415 - slow

    LoraConfig(r=16, lora_alpha=32, target_modules=list(LINEAR), task_type="CAUSAL_LM").save_pretrained(str(folder))
    weights: dict[str, Any] = {}
    for name, layer in build_empty(model).named_modules():
        if name.rpartition(".")[2] in LINEAR:
            weights[f"base_model.model.{name}.lora_A.weight"] = torch.randn(16, layer.in_features) * 0.02
            weights[f"base_model.model.{name}.lora_B.weight"] = torch.randn(layer.out_features, 16) * 0.02
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merge_streaming(model: Path, adapter: Path, out: Path, device: torch.device) -> None:
    """Ours: a part at a time, in fp32."""
    from finetune_trainer.models import streaming  # noqa: PLC0415 - slow

    resolved = replace_settings(SETTINGS, base_format="BF16")
    parts = streaming.parts_of(build_empty(model))

    def load(part: streaming.Part) -> Any:  # noqa: ANN401 - a model
        return streaming.merge_part(model, adapter, part, parts, resolved, device, None)

    streaming.stream(parts, load, out, partial(cast, dtype="BF16"), SHARD, lambda *_: None)


def merge_plain(model: Path, adapter: Path, out: Path, device: torch.device) -> None:
    """PEFT's, as its documentation has it, with the model in bf16."""
    import torch  # noqa: PLC0415 - slow
    from peft import PeftModel  # noqa: PLC0415 - slow
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, device_map={"": device})
    merged = PeftModel.from_pretrained(loaded, adapter).merge_and_unload(safe_merge=True)
    merged.save_pretrained(out, max_shard_size=SHARD)


def import_only(_model: Path, _adapter: Path, _out: Path, _device: torch.device) -> None:
    """What both need before they begin."""
    import peft  # noqa: F401, PLC0415 - slow

    from finetune_trainer.models import streaming  # noqa: F401, PLC0415 - slow


WAYS = {"imports": import_only, "streaming": merge_streaming, "merge_and_unload": merge_plain}


def measure(way: str, root: Path, device: str) -> Cost:
    """What a way of merging takes, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.streaming_merge", "--run", way, "--root", str(root)]
    done = subprocess.run([*command, "--device", device], check=True, capture_output=True, text=True)  # noqa: S603 - this very file
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def run_one(way: str, root: Path, device: str) -> None:
    """Merge, and print the figures."""
    import torch  # noqa: PLC0415 - slow

    set_up_torch()
    out = root / way
    out.mkdir()
    begun = time.monotonic()
    WAYS[way](root / "model", root / "adapter", out, torch.device(device))
    cost = Cost(
        seconds=time.monotonic() - begun,
        host_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        gpu_mib=torch.cuda.max_memory_allocated() / MIB if device == "cuda" else 0.0,
    )
    print(json.dumps(asdict(cost)))


def run_all(layers: int, device: str) -> None:
    """Print the table."""
    set_up_torch()
    with tempfile.TemporaryDirectory(prefix="merge-") as folder:
        root = Path(folder)
        parameters = make_model(root / "model", layers)
        make_adapter(root / "model", root / "adapter")
        print(f"{parameters / 1e9:.2f}B parameters, {parameters * 2 / MIB:,.0f} MiB in bf16, shards of {SHARD}")
        found = {way: measure(way, root, device) for way in WAYS}
    imports = found["imports"].host_mib
    print(f"{'way':<18} {'peak':>8} {'less imports':>13} {'on the GPU':>11} {'seconds':>8}   MiB")
    for way, cost in found.items():
        host = f"{cost.host_mib:>8,.0f} {cost.host_mib - imports:>13,.0f}"
        print(f"{way:<18} {host} {cost.gpu_mib:>11,.0f} {cost.seconds:>8.0f}")
    ours, plain = found["streaming"].host_mib, found["merge_and_unload"].host_mib
    print(f"streaming / merge_and_unload: {ours / plain:.2f}, less imports {(ours - imports) / (plain - imports):.2f}")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=28, help="blocks of 51 million parameters each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where it is merged")
    parser.add_argument("--run", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run_one(given.run, given.root, given.device)
    else:
        run_all(given.layers, given.device)


if __name__ == "__main__":
    main()
