"""A finished model's folder: what is written into it, and how it is loaded back.

The same for a merged adapter and a model that was trained whole: weights in shards of safetensors, the tokenizer as
trained with, the tokens that end an answer where servers look for them, the licence of the base.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.models import gguf_export
from finetune_trainer.models.folder import CONFIG, load_tokenizer
from finetune_trainer.models.loading import DTYPES, load_finished
from finetune_trainer.runtime.errors import VerificationFailed

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

DTYPE = "BF16"
MAX_SHARD_SIZE = "5GB"
"""What models ship in, unless a job says otherwise."""
GENERATION_CONFIG = "generation_config.json"
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
QUANTIZED_WEIGHT = "qweight"


def write_finished(  # noqa: PLR0913 - what makes up a folder
    model: Any,  # noqa: ANN401 - a causal language model
    folder: Path,
    base: Path,
    tokenizer: Path,
    *,
    dtype: str = DTYPE,
    max_shard_size: str = MAX_SHARD_SIZE,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write a model that can be served. `base`: the model's folder, for its licence; the rest as `save_weights`.

    VerificationFailed if a weight is not finite in `dtype`.
    """
    save_weights(model, folder, dtype, max_shard_size, weights)
    finish_folder(folder, base, tokenizer, dtype)


def finish_folder(folder: Path, base: Path, tokenizer: Path, dtype: str) -> None:
    """Put beside weights and config all that servers read: the tokenizer, end tokens, the base's licence."""
    _amend(folder / CONFIG, dtype=DTYPES[dtype])
    copy_companions(base, tokenizer, folder)
    tell_end_tokens(folder, load_tokenizer(tokenizer))


def save_weights(
    model: Any,  # noqa: ANN401 - a causal language model
    folder: Path,
    dtype: str,
    max_shard_size: str,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Weights and config, in `dtype`. The model is cast in place; `weights` are written where its own are sharded."""
    import torch  # noqa: PLC0415 - slow

    target = getattr(torch, DTYPES[dtype])
    state = cast(model.to(target).state_dict() if weights is None else weights, dtype)
    model.config.name_or_path = ""
    model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)


def cast(weights: Mapping[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    """Weights as they are saved; those that are one tensor under two names (a tied head) stay one.

    VerificationFailed if one is not finite in `dtype`.
    """
    import torch  # noqa: PLC0415 - slow

    target = getattr(torch, DTYPES[dtype])
    known: dict[tuple[int, torch.Size], torch.Tensor] = {}
    state = {
        name: known.setdefault((tensor.data_ptr(), tensor.shape), tensor.detach().to(target))
        if tensor.is_floating_point()
        else tensor
        for name, tensor in weights.items()
    }
    _verify_finite(state, dtype)
    return state


def _verify_finite(weights: Mapping[str, torch.Tensor], dtype: str) -> None:
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            msg = f"The weights of {name} are not finite in {dtype}. "
            way_out = "Set merge.dtype to BF16." if dtype == "FP16" else "Train with a lower training.learningRate."
            raise VerificationFailed(msg + way_out)


def tell_end_tokens(folder: Path, tokenizer: Any) -> None:  # noqa: ANN401 - a transformers tokenizer
    """Let servers stop at the token that ends an answer in training, and at those the base knew; pad as trained.

    In the files: transformers refuses to save generation settings that were changed and are not flawless (5.23),
    and those of Llama 2 are not.
    """
    for name in (CONFIG, GENERATION_CONFIG):
        path = folder / name
        settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        eos = end_tokens(settings.get("eos_token_id"), tokenizer.eos_token_id)
        _amend(path, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)


def _amend(path: Path, **changes: Any) -> None:  # noqa: ANN401 - any JSON value
    settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    write_json(path, settings | {name: value for name, value in changes.items() if value is not None})


def write_json(path: Path, settings: Mapping[str, Any]) -> None:
    """JSON as transformers writes it."""
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def end_tokens(known: int | list[int] | None, eos: int) -> int | list[int]:
    """The ids that end an answer, the one that was trained first."""
    before = known if isinstance(known, list) else [] if known is None else [known]
    tokens = list(dict.fromkeys([eos, *before]))
    return tokens[0] if len(tokens) == 1 else tokens


def copy_companions(base: Path, tokenizer: Path, folder: Path) -> None:
    """Tokenizer and chat template as trained with, and the licence of the base."""
    for path in sorted(tokenizer.iterdir()):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
    copy_licence(base, folder)


def copy_licence(base: Path, folder: Path) -> None:
    """The licence of the base, which what is made of it keeps."""
    for pattern in LICENCES:
        for path in sorted(base.glob(pattern)):
            shutil.copyfile(path, folder / path.name)


# Loading back


def load_quantized(folder: Path, device: torch.device) -> Any:  # noqa: ANN401 - a causal language model
    """A GPTQ, AWQ or GGUF model, in fp32 on CPU and 16 bits on a GPU, to be measured.

    With the kernels that are written in torch: others are compiled as they are used, and a pod has none for C++.
    VerificationFailed unless every quantized layer of the files is one of the model.
    """
    import torch  # noqa: PLC0415 - slow

    if (path := gguf_export.find_exported(folder)) is not None:
        return gguf_export.load_exported(path, device)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    model = load_finished(folder, device, dtype, quantization_config=_torch_kernels(folder))
    verify_layers(model, folder)
    return model


def _torch_kernels(folder: Path) -> Any:  # noqa: ANN401 - a config of transformers
    """The kernels, in the terms of the method that the folder was quantized with."""
    from transformers import AwqConfig, GPTQConfig  # noqa: PLC0415 - slow
    from transformers.utils.quantization_config import AwqBackend  # noqa: PLC0415 - slow

    settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["quantization_config"]
    return (
        AwqConfig(backend=AwqBackend.TORCH_AWQ)
        if settings["quant_method"] == "awq"
        else GPTQConfig(bits=settings["bits"], backend="torch")
    )


def verify_layers(model: Any, folder: Path) -> None:  # noqa: ANN401 - a causal language model
    """VerificationFailed if layers of the files are not in the model, which is random there (transformers 5.23)."""
    written = {name for name in names_in(folder) if name.endswith("." + QUANTIZED_WEIGHT)}
    loaded = {name for name, module in model.named_modules() if hasattr(module, QUANTIZED_WEIGHT)}
    if written and len(written) == len(loaded):
        return
    msg = (
        f"{folder} has {len(written):,} quantized layers, of which {len(loaded):,} were loaded. "
        "Quantize with another method, or keep the 16-bit model."
    )
    raise VerificationFailed(msg)


def names_in(folder: Path) -> set[str]:
    """Names of all tensors in a folder's safetensors files."""
    from safetensors import safe_open  # noqa: PLC0415 - slow

    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names
