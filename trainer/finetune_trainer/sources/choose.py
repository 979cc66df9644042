"""Which of a source's files are fetched: a model's or adapter's by their names, a dataset's by what makes a split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_trainer.data.files import READERS, is_hidden
from finetune_trainer.models import folder as model
from finetune_trainer.runtime.errors import InvalidDataset, InvalidModel
from finetune_trainer.runtime.wording import what_is_there

if TYPE_CHECKING:
    from collections.abc import Collection

DATA_SUFFIXES = tuple(READERS)
"""Of files with rows."""
GGUF = ".gguf"


def model_names(names: Collection[str], where: str, *, code: bool) -> list[str]:
    """The files that make up a model: no pickles, nothing twice; its Python files only if `code`. InvalidModel."""
    there = set(names)
    if model.CONFIG not in there:
        return [_only_gguf(there, where)]
    weights = {model.WEIGHTS} & there or {name for name in there if _is_shard(name)} | ({model.INDEX} & there)
    if not weights:
        msg = f"{where} has no safetensors files ({what_is_there(there)}). "
        raise InvalidModel(msg + "Use a repository that has them, or convert the model yourself.")
    scripts = {name for name in there if name.endswith(".py") and "/" not in name} if code else set()
    return sorted(weights | scripts | (set(model.COMPANIONS) & there))


def adapter_names(names: Collection[str], where: str) -> list[str]:
    """The files that make up an adapter of PEFT. InvalidModel."""
    there = set(names)
    if model.ADAPTER_CONFIG not in there:
        msg = f"{where} is no adapter: {model.ADAPTER_CONFIG} is missing ({what_is_there(there)}). "
        raise InvalidModel(msg + "Give what PEFT's save_pretrained made.")
    if model.ADAPTER_WEIGHTS not in there:
        msg = f"{where} has no {model.ADAPTER_WEIGHTS} ({what_is_there(there)}); pickles are not read. "
        raise InvalidModel(msg + "Save the adapter as safetensors, which save_pretrained of PEFT does.")
    return [model.ADAPTER_CONFIG, model.ADAPTER_WEIGHTS]


def data_names(names: Collection[str], where: str) -> list[str]:
    """The files with rows, hidden ones left out. InvalidDataset if there are none."""
    found = sorted(name for name in names if is_data(name) and not is_hidden(name))
    if not found:
        msg = f"{where} has no {', '.join(DATA_SUFFIXES)} file ({what_is_there(names)}). "
        raise InvalidDataset(msg + "Give files of one of these kinds.")
    return found


def is_data(name: str) -> bool:
    """Whether a file is of a kind that has rows."""
    return name.lower().endswith(DATA_SUFFIXES)


def _only_gguf(names: set[str], where: str) -> str:
    files = sorted(name for name in names if name.endswith(GGUF))
    if len(files) == 1:
        return files[0]
    if len(files) > 1:
        msg = f"{where} has {len(files)} GGUF files ({what_is_there(files)}) and no {model.CONFIG}. "
        raise InvalidModel(msg + "Use the repository of the original model, with safetensors.")
    below = sorted(name for name in names if name.endswith(f"/{model.CONFIG}"))
    hint = f" The folder '{below[0].rpartition('/')[0]}' has one: that must be the top." if below else ""
    msg = f"{where} is no model: {model.CONFIG} is missing ({what_is_there(names)}).{hint} "
    raise InvalidModel(msg + "Give a place with config, tokenizer and weights.")


def _is_shard(name: str) -> bool:
    return name.startswith("model-") and name.endswith(".safetensors")
