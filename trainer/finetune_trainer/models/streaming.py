"""An adapter merged into its base a part of the model at a time.

In memory are one part (blocks of the transformer, or what stands beside them: embeddings, last norm, head) in fp32 and
the shard that is being filled, never the model. Nothing is computed in a way of its own: transformers reads, renames
and fuses a part's tensors, with all other parts on the meta device, of which no byte is read; the quantizer of the base
as it was trained narrows and widens them; PEFT puts the adapter on and merges. So the weights are, bit by bit, those of
`merge_and_unload` on the whole model.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import core_model_loading, modeling_utils
from transformers.integrations.bitsandbytes import dequantize_bnb_weight
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from finetune_trainer.models.finished import write_json
from finetune_trainer.models.float8 import Float8Linear, widen
from finetune_trainer.models.folder import INDEX, WEIGHTS
from finetune_trainer.models.loading import extend_embeddings, load_placed, put_adapter, quantization_of
from finetune_trainer.models.sharding import blocks_of, build_empty

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from finetune_trainer.progress import Resolved

META = torch.device("meta")
WORK_BYTES = 3 * 4
"""Bytes a parameter of a part: its weights in fp32, what is added to them, and what is read or cast meanwhile."""

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

Part = tuple[str, ...]
"""Names of modules that are merged together."""


class CannotStreamError(Exception):
    """The model does not fall into parts: it is merged in one piece."""


# What the parts are


def parts_of(model: Any) -> list[Part]:  # noqa: ANN401 - a causal language model
    """The model's blocks and all other modules with weights, in its order, joined up to the size of the largest.

    CannotStreamError if it does not say what its blocks are, or if a module with weights has others with weights in it.
    """
    blocks = [name for name, _ in blocks_of(model)]
    roots = [name for name in blocks if not _is_inside(name, blocks)]
    if not roots:
        msg = f"{type(model).__name__} does not say what its blocks are"
        raise CannotStreamError(msg)
    others = [name for name, module in model.named_modules() if _has_own(module) and not _is_inside(name, roots)]
    others = [name for name in others if name not in roots]
    for name in others:
        if any(_is_inside(each, [name]) or not name for each in [*roots, *others] if each != name):
            msg = f"{name or type(model).__name__} has weights of its own beside those of its modules"
            raise CannotStreamError(msg)
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    return _joined(_with_tied(sorted([*roots, *others], key=order.__getitem__), model), model)


def _is_inside(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(each + ".") for each in modules)


def _has_own(module: Any) -> bool:  # noqa: ANN401 - a torch module
    return bool(module.state_dict(keep_vars=True).keys() & {name for name, _ in _own(module)})


def _own(module: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401 - a torch module
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _with_tied(names: Sequence[str], model: Any) -> list[Part]:  # noqa: ANN401 - a causal language model
    """Modules that share a weight, as a tied head does with the embeddings, become one part."""
    parts: list[list[str]] = []
    holder: dict[int, list[str]] = {}
    for name in names:
        weights = [id(weight) for weight in model.get_submodule(name).parameters()]
        part = next((holder[each] for each in weights if each in holder), None)
        if part is None:
            parts.append(part := [])
        part.append(name)
        holder.update(dict.fromkeys(weights, part))
    return [tuple(part) for part in parts]


def _joined(parts: Sequence[Part], model: Any) -> list[Part]:  # noqa: ANN401 - a causal language model
    """Neighbours together while they are no larger than the largest part: each costs a look at the whole model."""
    limit = max(parameters_of(model, part) for part in parts)
    joined: list[Part] = []
    for part in parts:
        if joined and parameters_of(model, joined[-1] + part) <= limit:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def parameters_of(model: Any, part: Part) -> int:  # noqa: ANN401 - a causal language model
    """Parameters of a part, tied ones once."""
    weights = {id(weight): weight.numel() for name in part for weight in model.get_submodule(name).parameters()}
    return sum(weights.values())


# A part's weights


class Widening:
    """Weights as a base in NF4, FP4, Int8 or FP8 was trained on: quantized as transformers does it, and widened."""

    def __init__(self, folder: Path, resolved: Resolved, device: torch.device) -> None:
        """`folder`: the base's own files, in 16 or 32 bits."""
        settings = quantization_of(resolved, torch.float32)["quantization_config"]
        self._quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
        self._empty = build_empty(folder)
        self._quantizer.preprocess_model(model=self._empty, device_map={"": device})
        self._layers = {name for name, layer in self._empty.named_modules() if hasattr(layer, "source_cls")}

    def widen(self, model: Any) -> None:  # noqa: ANN401 - a causal language model
        """Replace the weights of those layers that the quantizer would have quantized, as far as they are here."""
        for name, layer in model.named_modules():
            if name in self._layers and layer.weight.device != META:
                layer.weight.data = self._round(f"{name}.weight", layer)

    def _round(self, name: str, layer: Any) -> torch.Tensor:  # noqa: ANN401 - a torch module
        weight = layer.weight.data
        packed = self._quantizer.get_quantize_ops().convert({name: weight}, model=self._empty)
        holder = self._empty.get_submodule(name.removesuffix(".weight"))
        if isinstance(holder, Float8Linear):
            narrow, scales = packed.values()
            wide = widen(narrow, scales, weight.dtype)
        else:
            wide = dequantize_bnb_weight(packed[name], getattr(holder, "state", None)).to(weight.dtype)
        return wide.T.contiguous() if isinstance(layer, Conv1D) else wide


@contextmanager
def _undispatched() -> Iterator[None]:
    """Keep accelerate from hooking a model on several devices: it would take the CPU for a place to swap out to."""
    loading: Any = modeling_utils
    dispatch = loading.accelerate_dispatch
    loading.accelerate_dispatch = lambda *_: None
    try:
        yield
    finally:
        loading.accelerate_dispatch = dispatch


def merge_part(  # noqa: PLR0913 - what makes up a part
    base: Path,
    adapter: Path,
    part: Part,
    parts: Sequence[Part],
    resolved: Resolved,
    device: torch.device,
    widening: Widening | None,
) -> Any:  # noqa: ANN401 - a causal language model
    """The model with the adapter merged into one part, in fp32 on the device; the other parts are taken out."""
    places = {"": META} | {name: META for each in parts for name in each} | dict.fromkeys(part, device)
    with _undispatched():
        model = load_placed(base, torch.float32, places)
    if widening is not None:
        widening.widen(model)
    extend_embeddings(model, resolved.added_tokens)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*non-meta parameter in the checkpoint to a meta parameter.*")
        adapted = put_adapter(model, adapter)
    inner = adapted.get_base_model()
    for name in (name for each in parts if each != part for name in each):
        inner.set_submodule(name, torch.nn.Identity())
    return adapted.merge_and_unload(safe_merge=True)


def as_saved(model: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # noqa: ANN401 - a causal language model
    """The tensors by the names and in the shapes that `save_pretrained` gives them; of tied ones the one it keeps."""
    ignored = set(model._keys_to_ignore_on_save or ())  # noqa: SLF001 - as save_pretrained does
    kept = {name: tensor for name, tensor in weights.items() if name not in ignored}
    untied = modeling_utils.remove_tied_weights_from_state_dict(kept, model)
    saved: dict[str, torch.Tensor] = core_model_loading.revert_weight_conversion(model, untied)
    return saved


# Files


class Shards:
    """Weights written as `save_pretrained` lays them out: one file, or shards of at most so many bytes and an index."""

    def __init__(self, folder: Path, max_shard_size: str) -> None:
        """`max_shard_size`: a number and KB, MB or GB; a larger tensor gets a shard of its own."""
        self._folder, self._limit = folder, int(max_shard_size[:-2]) * UNITS[max_shard_size[-2:]]
        self._filling: dict[str, torch.Tensor] = {}
        self._written: list[list[str]] = []
        self._bytes = self._parameters = 0

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Tensors to be written, each once."""
        for name, tensor in tensors.items():
            if self._filling and sum(each.nbytes for each in self._filling.values()) + tensor.nbytes > self._limit:
                self._flush()
            self._filling[name] = tensor.to("cpu").contiguous()
            self._bytes += tensor.nbytes
            self._parameters += tensor.numel()

    def _flush(self) -> None:
        self._written.append(list(self._filling))
        save_file(self._filling, self._aside(len(self._written)), metadata={"format": "pt"})
        self._filling = {}

    def _aside(self, number: int) -> Path:
        return self._folder / f".shard-{number}"

    def finish(self) -> None:
        """Write what is left, give the files their names, which tell how many they are, and write the index."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._aside(1).rename(self._folder / WEIGHTS)
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self._written, start=1):
            file = WEIGHTS.replace(".", f"-{number:05d}-of-{count:05d}.", 1)
            self._aside(number).rename(self._folder / file)
            places |= dict.fromkeys(names, file)
        metadata = {"total_parameters": self._parameters, "total_size": self._bytes}
        write_json(self._folder / INDEX, {"metadata": metadata, "weight_map": dict(sorted(places.items()))})


def stream(  # noqa: PLR0913 - what goes in and out
    parts: Sequence[Part],
    load: Callable[[Part], Any],
    folder: Path,
    cast: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]],
    max_shard_size: str,
    poll: Callable[[int, int], None],
) -> None:
    """Write the model's weights and config: `load` merges a part, `cast` is what is saved of it.

    `poll(parts done, parts in all)` is called before each and may raise.
    """
    shards = Shards(folder, max_shard_size)
    for done, part in enumerate(parts):
        poll(done, len(parts))
        model = load(part)
        shards.add(as_saved(model, cast(model.state_dict())))
        if not isinstance(model.get_input_embeddings(), torch.nn.Identity):
            model.config.name_or_path = ""
            model.save_pretrained(folder, state_dict={})  # config, generation settings, the model's own code
    shards.finish()
