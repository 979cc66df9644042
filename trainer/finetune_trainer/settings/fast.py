"""Whether a training takes the fast path (`fast/`), as far as prepare can know. Pure.

The fast path computes what the plain one does, for the common case alone: adapters on the linear layers of a Llama,
one GPU. Positions are turned by the model's own tables, so whatever scales them will do.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from finetune_trainer.config import BITSANDBYTES, FAST_FORMATS, ComputeDtype, FastPath, LoraBias
from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.settings.holdings import QUANTIZED_BLOCK
from finetune_trainer.settings.layout import layers_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune_trainer.config import JobConfig
    from finetune_trainer.models.folder import ModelFacts
    from finetune_trainer.progress import Resolved, ResolvedLora

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
LAYER = re.compile(r"(\w+\.)*(q|k|v|o|gate|up|down)_proj")
"""An end of a name of the layers that adapters may be on; a pattern (PEFT takes them) could mean others besides."""
HEAD_WIDTHS = (16, 32, 64, 128)
"""What the kernels of attention take on every GPU: 256 want 136 kB of shared memory, of which many have 101."""
FP8_MULTIPLE = 16
"""What tensor cores take of rows and columns of FP8 at once."""
FURTHER = (
    *("rank_pattern", "alpha_pattern", "lora_bias", "layer_replication", "alora_invocation_tokens", "use_qalora"),
    *("use_bdlora", "velora_config", "monteclora_config", "arrow_config", "kasa_config"),
)
"""What makes an adapter more than A and B of one rank and scale, in PEFT's words (0.21)."""


def with_path(config: JobConfig, resolved: Resolved, model: ModelFacts, longest: int) -> Resolved:
    """The settings with the path that they lead to. `longest`: tokens of the longest row.

    InvalidConfig if products in FP8 or offload are asked for, which the plain path does not have.
    """
    reason = why_plain(config, resolved, model, longest)
    if resolved.offloads and reason is not None:
        msg = f"training.offload On needs the fast path, which is not taken: {reason}. Drop offload, or change that."
        raise InvalidConfig(msg)
    if resolved.fp8_products and reason is not None:
        raise InvalidConfig(needs_fast_path(reason))
    return resolved.model_copy(update={"fast_path": reason is None, "plain_because": reason})


def needs_fast_path(reason: str) -> str:
    """What is said to who asks for products in FP8 where the plain path is taken."""
    return f"method.fp8Products needs the fast path, which is not taken: {reason}. Drop fp8Products, or change that."


def why_plain(config: JobConfig, resolved: Resolved, model: ModelFacts, longest: int) -> str | None:
    """Why the plain path is taken, for the log; None: the fast one is. `longest`: tokens of the longest row."""
    if config.training is not None and config.training.fast_path is FastPath.OFF:
        return "training.fastPath is Off"
    if resolved.lora is None:
        return f"{resolved.method} trains the weights themselves"
    reasons = (*_of_the_run(resolved), *_of_the_model(resolved, model, longest), *_of_the_adapter(resolved.lora, model))
    return next(iter(reasons), None)


def _of_the_run(resolved: Resolved) -> Iterator[str]:
    if resolved.dpo is not None:
        yield "DPO has a loss of its own"
    if resolved.base_format not in FAST_FORMATS:
        yield f"the base is held in {resolved.base_format}"
    if resolved.compute_dtype != ComputeDtype.BF16:
        yield f"products are computed in {resolved.compute_dtype}"
    if resolved.parallelism.gpus_per_node == 0:
        yield "there is no GPU"
    if resolved.parallelism.world_size > 1:
        yield f"{resolved.parallelism.world_size} processes share the work"
    if resolved.attention not in ("Auto", "SDPA"):
        yield f"model.attention is {resolved.attention}"
    if resolved.neftune_noise_alpha is not None:
        yield "NEFTune puts noise on the embeddings"
    if resolved.added_tokens:
        yield "embeddings of added tokens train"


def _of_the_model(resolved: Resolved, model: ModelFacts, longest: int) -> Iterator[str]:
    if model.architecture not in ARCHITECTURES:
        yield f"{model.architecture} has other blocks than a Llama"
    if model.own_code:
        yield f"its {model.architecture} is the model's own code"
    if model.activation != "silu":
        yield f"its MLPs have {model.activation}, not silu"
    if _head_width(model) not in HEAD_WIDTHS:
        yield f"its heads have {_head_width(model)} dimensions"
    if model.attention_dropout:
        yield "its attention has dropout"
    if model.window is not None and longest > model.window:
        yield f"rows of {longest:,} tokens are longer than its attention's window of {model.window:,}"
    widths = {width for layer in layers_of(model) for width in (layer.rows, layer.columns)}
    if resolved.fp8_products and any(width % FP8_MULTIPLE for width in widths):
        yield f"{FP8_MULTIPLE} does not divide the widths of its layers, which FP8 asks for"
    in_4_bits = resolved.base_format in BITSANDBYTES
    if in_4_bits and any(columns % QUANTIZED_BLOCK for columns in model.linear_layers.values()):
        yield f"{QUANTIZED_BLOCK} does not divide the columns of its layers, which are held in {resolved.base_format}"


def _head_width(model: ModelFacts) -> int:
    """Dimensions of a head; 0 where no output of attention is known."""
    widths = (columns for name, columns in model.linear_layers.items() if name.endswith("o_proj"))
    return next(widths, 0) // max(model.heads, 1)


def _of_the_adapter(lora: ResolvedLora, model: ModelFacts) -> Iterator[str]:
    if lora.use_dora:
        yield "DoRA scales the weights"
    if lora.bias != LoraBias.NONE:
        yield "biases train"
    if lora.modules_to_save:
        yield f"{lora.modules_to_save[0]} trains whole"
    if lora.target_parameters:
        yield f"{lora.target_parameters[0]} is no layer"
    if others := [name for name in lora.target_modules if not LAYER.fullmatch(name)]:
        yield f"{others[0]} is none of a Llama's linear layers"
    if further := [name for name in FURTHER if (model.adapter or {}).get(name)]:
        yield f"the adapter to go on from has {further[0]}"
