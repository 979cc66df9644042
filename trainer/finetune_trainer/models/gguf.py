"""Models as GGUF files, unpacked to safetensors once: left in GGUF blocks they can be neither trained nor saved."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_trainer.models import folder as model
from finetune_trainer.models.gguf_export import read_rope_factors, rope_factors
from finetune_trainer.runtime.errors import InvalidModel, TrainerError
from finetune_trainer.runtime.wording import first_line
from finetune_trainer.runtime.work import require_space

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_trainer.runtime.context import Context

MAGIC = b"GGUF"
HELD_EXACTLY = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""GGUF types of weights that safetensors hold as they are."""
QUANTIZED_SAVED_AS = "bfloat16"
"""Weights of the k-bit types: bf16's rounding (2^-9) is far below the steps of 8 bits and fewer, at half the size."""

LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""How all models of Llama 3.1, 3.2 and 3.3 stretch their positions; the factor is 8 or 32."""


def find(path: Path, where: str) -> Path | None:
    """The GGUF file that a source means: itself, or the only one of a folder without a config."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == MAGIC:
                return path
        msg = f"{where} is a file, but no GGUF file. "
        raise InvalidModel(msg + "Give a folder with config, tokenizer and safetensors, or a GGUF file.")
    if (path / model.CONFIG).exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        msg = f"{where} has {len(files)} GGUF files ({names}). Name one of them in the source's path."
        raise InvalidModel(msg)
    return find(files[0], f"{where}: {files[0].name}") if files else None


def convert(path: Path, where: str, context: Context, folder: Path) -> dict[str, str]:
    """Write a GGUF file's model into the folder; what there is to say of it. InvalidModel, VolumeFull."""
    kind, count = _weights(path, where)
    dtype = HELD_EXACTLY.get(kind, QUANTIZED_SAVED_AS)
    require_space(folder, count * (4 if dtype == "float32" else 2), f"{where}, unpacked from {kind} to {dtype},")
    context.report.begin(f"converting {path.name} ({kind}, {count:,} weights) to {dtype} safetensors")
    try:
        _load_and_save(path, dtype, folder)
    except (TrainerError, OSError, MemoryError):
        raise
    except Exception as error:
        msg = f"{where} cannot be converted: {first_line(error)}. Give the model's own folder with safetensors instead."
        raise InvalidModel(msg) from error
    context.raise_if_stopping()
    model.check_folder(folder, f"{where}, converted")
    return {"gguf": path.name, "ggufType": kind, "savedAs": dtype}


def _weights(path: Path, where: str) -> tuple[str, int]:
    """The type of most of the weights, and how many weights there are. InvalidModel if the file is damaged."""
    from gguf import GGUFReader  # noqa: PLC0415 - slow

    try:
        tensors = GGUFReader(path).tensors
        counts: dict[str, int] = {}
        for tensor in tensors:
            kind = tensor.tensor_type.name
            counts[kind] = counts.get(kind, 0) + int(tensor.n_elements)
    except Exception as error:
        msg = f"{where} is damaged or cut off: it cannot be read as GGUF ({error}). Copy the file again."
        raise InvalidModel(msg) from error
    if not counts:
        msg = f"{where} holds no weights. Give a GGUF file of a whole model."
        raise InvalidModel(msg)
    return max(counts, key=counts.__getitem__), sum(counts.values())


def _load_and_save(path: Path, dtype: str, folder: Path) -> None:
    import torch  # noqa: PLC0415 - slow
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415 - slow

    model.quiet()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
    )
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    _restore_rope(loaded.config, path)
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _restore_rope(config: Any, path: Path) -> None:  # noqa: ANN401 - a config of transformers
    """Put into the config how the file has positions slowed down, which transformers (5.23) leaves out. InvalidModel.

    The file has the outcome, a factor a frequency, the config the rule that it comes from.
    """
    import numpy as np  # noqa: PLC0415 - beside gguf

    if (factors := read_rope_factors(path)) is None:
        return
    config.rope_parameters = {**config.rope_parameters, **LLAMA3, "factor": float(factors.max())}
    known = rope_factors(config)
    if known is None or not np.allclose(factors, known, rtol=1e-4):
        msg = f"{path.name} slows positions down otherwise than Llama 3 does. "
        raise InvalidModel(msg + "Give the model's own folder with safetensors instead.")
