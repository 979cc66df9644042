"""What a model is made of: classes of layers, their dtypes, and how much of each trains."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from finetune_trainer.progress import LayerFacts
from finetune_trainer.runtime.work import write_report

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

LAYERS_SHOWN = 16
OTHERS = "others"


def count_layers(model: Any) -> tuple[LayerFacts, ...]:  # noqa: ANN401 - a torch module
    """Parameters by class of layer and dtype, the most first, at most `LAYERS_SHOWN` entries. Tied ones count once.

    A packed weight counts as the numbers that it stands for. Of an adapter the layer is the one that it is put on, as
    PEFT calls it: `lora.Linear4bit`.
    """
    parameters: Counter[tuple[str, str]] = Counter()
    trainable: Counter[tuple[str, str]] = Counter()
    for kind, count, trains in _parts(model):
        parameters[kind] += count
        trainable[kind] += count if trains else 0
    layers = [
        LayerFacts(module=kind[0], dtype=kind[1], parameters=count, trainable=trainable[kind])
        for kind, count in sorted(parameters.items(), key=lambda item: (-item[1], item[0]))
    ]
    return tuple(layers[: LAYERS_SHOWN - 1] + _together(layers[LAYERS_SHOWN - 1 :]))


def _together(layers: list[LayerFacts]) -> list[LayerFacts]:
    """One entry for all of them, where they are several."""
    if len(layers) < 2:  # noqa: PLR2004 - several
        return layers
    total, trains = sum(layer.parameters for layer in layers), sum(layer.trainable for layer in layers)
    return [LayerFacts(module=OTHERS, dtype="various", parameters=total, trainable=trains)]


def _parts(model: Any) -> Iterator[tuple[tuple[str, str], int, bool]]:  # noqa: ANN401 - a torch module
    """Class and dtype, count, and whether it trains, of each parameter."""
    modules, seen = dict(model.named_modules()), set()
    for name, module in modules.items():
        if hasattr(module, "qweight"):  # GPTQ: all that it has are buffers
            yield (type(module).__name__, "gptq"), module.in_features * module.out_features, False
        held = ((part, each) for part, each in module.named_buffers(recurse=False) if part == "weight")
        for part, parameter in (*module.named_parameters(recurse=False), *held):  # in host memory it is a buffer
            if id(parameter) not in seen:
                seen.add(id(parameter))
                layer = _layer(f"{name}.{part}", modules)
                yield (layer, _dtype(module, parameter)), _numbers(parameter), parameter.requires_grad


def _layer(name: str, modules: dict[str, Any]) -> str:
    """The class that a parameter belongs to; for an adapter's the class of the layer that PEFT made."""
    above, found, _ = name.partition(".lora_")
    if found:
        return f"lora.{_class(modules[above])}"
    above, found, _ = name.partition(".trainable_tokens_")
    return _class(modules[above if found else name.rpartition(".")[0]])


def _class(module: Any) -> str:  # noqa: ANN401 - a torch module
    """The class's name; where torch shards a module it makes a class of its own, FSDPLinear of Linear."""
    return type(module).__name__.removeprefix("FSDP")


def _dtype(module: Any, parameter: Any) -> str:  # noqa: ANN401 - torch's
    """nf4, fp4, int8 or torch's name."""
    state = getattr(parameter, "quant_state", None)
    packed = getattr(state, "quant_type", None) or getattr(module, "quant_type", None)
    return packed if isinstance(packed, str) else str(parameter.dtype).removeprefix("torch.")


def _numbers(parameter: Any) -> int:  # noqa: ANN401 - a parameter
    state = getattr(parameter, "quant_state", None)
    shape = getattr(state, "shape", None) or parameter.shape
    return int(shape.numel())


def totals(layers: Sequence[LayerFacts]) -> tuple[int, int]:
    """Trainable and all parameters."""
    return sum(layer.trainable for layer in layers), sum(layer.parameters for layer in layers)


def table(layers: Sequence[LayerFacts]) -> str:
    """The same for people: a line a kind of layer."""
    trains, total = totals(layers)
    lines = [f"{trains:,} of {total:,} parameters train ({trains / max(total, 1):.2%})"]
    lines += [
        f"{layer.module:<28} {layer.dtype:<10} {layer.parameters:>15,} {layer.trainable:>15,} train" for layer in layers
    ]
    return "\n".join(lines)


def write(path: Path, before: Sequence[LayerFacts], after: Sequence[LayerFacts]) -> None:
    """Leave them as JSON."""
    plain = {
        name: [layer.model_dump(by_alias=True) for layer in layers]
        for name, layers in (("before", before), ("after", after))
    }
    write_report(path, json.dumps(plain, indent=1) + "\n")
