"""AWQ's search for scales where the model is: what it looks at stays on the GPU, if there is room.

gptqmodel (7.6) keeps activations, outputs and weights in the host's memory and copies them to the GPU for each of 20
candidates: close to 60 GB for a layer of Llama-3.2-1B and 128 blocks of 512 tokens. On a CPU this is its search, bit by
bit, with weights put by in their own dtype. On a GPU sums are taken in another order.
"""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

CANDIDATES = 20
"""Exponents that are tried: gptqmodel's."""
BLOCKS_AT_ONCE = 8
"""In a forward pass of the search on a GPU: one by one it would wait for Python."""


def activation_bytes(model: Any, tokens: int) -> int:  # noqa: ANN401 - a causal language model of transformers
    """What so many tokens take of a GPU: all that a block's linear layers get, and the widest of it twice more."""
    import torch  # noqa: PLC0415 - slow

    block = model.get_submodule("model.layers.0")
    widths = [each.in_features for each in block.modules() if isinstance(each, torch.nn.Linear)]
    return tokens * (sum(widths) + 2 * max(widths)) * int(model.dtype.itemsize)


def find_scales(  # noqa: PLR0913 - as gptqmodel calls it
    processor: Any,  # noqa: ANN401 - gptqmodel's AWQProcessor
    inputs: torch.Tensor,
    weight_mean: torch.Tensor,
    input_mean: torch.Tensor,
    inspected: torch.nn.Module,
    layers: Sequence[torch.nn.Linear],
    expected: torch.Tensor | list[torch.Tensor],
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, float]:
    """The scale of each column (columns), on the CPU, and the mean square that it changes the output by.

    `inputs` (blocks, tokens, columns) of `inspected`, of which `layers` are a part; `expected`: its outputs before.
    Arithmetic: https://arxiv.org/abs/2306.00978, section 3.2.
    """
    device = next(inspected.parameters()).device
    input_mean, weight_mean = (each.reshape(-1).to(device) for each in (input_mean, weight_mean))
    if (hint := getattr(processor._scale_context, "prev_scale", None)) is not None:  # noqa: SLF001 - theirs
        weight_mean = weight_mean * float(hint)
    put_by = [layer.weight.detach().clone() for layer in layers]
    best, least = None, float("inf")
    for step in range(CANDIDATES):
        ratio = step / CANDIDATES
        scales = (input_mean.pow(ratio) / (weight_mean.pow(1 - ratio) + 1e-4)).clamp(min=1e-4)
        scales = scales / (scales.max() * scales.min()).sqrt()
        scales[~scales.isfinite()] = 1
        for layer in layers:
            layer.weight.mul_(scales)
            processor._pseudo_quantize_tensor_into(layer.weight, layer.weight)  # noqa: SLF001
            layer.weight.div_(scales)
        error = _error(processor, inputs, inspected, expected, kwargs)
        if error < least:
            best, least = scales, error
        for layer, weight in zip(layers, put_by, strict=True):
            layer.weight.copy_(weight)
    if best is None:
        msg = "no scale gave an output that is a number: is the model's?"
        raise ValueError(msg)
    return best.cpu(), least


def _error(
    processor: Any,  # noqa: ANN401 - gptqmodel's AWQProcessor
    inputs: torch.Tensor,
    inspected: torch.nn.Module,
    expected: torch.Tensor | list[torch.Tensor],
    kwargs: dict[str, Any],
) -> float:
    """The mean square of what differs, waiting for the device once."""
    import torch  # noqa: PLC0415 - slow

    total = torch.zeros((), dtype=torch.float64, device=next(inspected.parameters()).device)
    count = 0
    references = processor._iter_reference_output_chunks(inputs, expected)  # noqa: SLF001
    outputs = processor._iter_module_forward_outputs(inputs, inspected, kwargs)  # noqa: SLF001
    for reference, output in zip(references, outputs, strict=True):
        limits = torch.finfo(output.dtype)
        difference = (reference.to(output) - output.clip(limits.min, limits.max)).float()
        total += difference.pow(2).sum()
        count += difference.numel()
    return float(total) / max(count, 1)


def record_in_place(processor: Any, name: str, inputs: torch.Tensor) -> None:  # noqa: ANN401 - gptqmodel's AWQProcessor
    """Keep what a layer got of one block for the search, on the device that it is on: (1, tokens, columns)."""
    kept = processor._apply_active_keep_mask_to_feature(inputs.detach())  # noqa: SLF001
    with processor.lock:
        entry = processor.tasks.setdefault(name, {})
        entry.setdefault("inputs", []).append(kept.reshape(-1, *kept.shape[-2:]))
        entry.setdefault("batch_indices", []).append(processor.current_batch_index())


def search_in_place(processors: Any) -> None:  # noqa: ANN401 - a class of gptqmodel
    """Let gptqmodel's `AWQProcessor` search so. Once or more often.

    What stays on a GPU is told by `scale_search_chunked_activations` of its config: off, it does. Of itself gptqmodel
    then keeps the outputs there, and nothing else.
    """
    record, search = (_plain(each) for each in (processors._record_input_feature, processors._compute_best_scale))  # noqa: SLF001

    @wraps(record)
    def record_feature(processor: Any, name: str, inputs: torch.Tensor, *, dedupe_batch: bool = False) -> None:  # noqa: ANN401 - theirs
        if processor.qcfg.scale_search_chunked_activations or dedupe_batch:
            record(processor, name, inputs, dedupe_batch=dedupe_batch)
        else:
            processor._quant_batch_size = BLOCKS_AT_ONCE  # noqa: SLF001
            record_in_place(processor, name, inputs)

    @wraps(search)
    def find(processor: Any, *given: Any) -> tuple[torch.Tensor, float]:  # noqa: ANN401 - theirs
        return find_scales(processor, *given)

    processors._record_input_feature, processors._compute_best_scale = record_feature, find  # noqa: SLF001


def _plain(theirs: Any) -> Any:  # noqa: ANN401 - a function of gptqmodel
    return getattr(theirs, "__wrapped__", theirs)
