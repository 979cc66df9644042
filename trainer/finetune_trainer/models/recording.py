"""A model that was run over the held-out rows, kept to be compared with another one when both are too much to hold.

What its body (embeddings and blocks) gave is on disk; of the model itself only what makes logits of it is left, a few
percent. It answers the same rows in the same order with the same bits, once.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

log = logging.getLogger(__name__)

HIDDEN = "last_hidden_state"


def record(model: Any, folder: Path, run: Callable[[Any], float]) -> float:  # noqa: ANN401 - a causal language model
    """What `run(model)` returns; afterwards the model has no body, and answers the same calls from `folder`.

    A model that has no body apart from its head stays whole.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    body = inner.base_model
    if body is inner:
        log.info("%s has no body apart from its head: it stays in memory", type(inner).__name__)
        return run(model)
    kinds: list[type] = []

    def keep(_module: object, _inputs: object, output: Any) -> None:  # noqa: ANN401 - a model's output
        save_file({HIDDEN: output[0].contiguous()}, _place(folder, len(kinds)))
        kinds.append(type(output))

    folder.mkdir()
    hook = body.register_forward_hook(keep)
    try:
        found = run(model)
    finally:
        hook.remove()
    _play_back(body, folder, kinds)
    return found


def _place(folder: Path, number: int) -> Path:
    return folder / f"{number}.safetensors"


def _play_back(body: Any, folder: Path, kinds: list[type]) -> None:  # noqa: ANN401 - a torch module
    """Let the body answer from the files, one after another, and drop what it was made of."""
    answers = iter(enumerate(kinds))
    device = next(body.parameters()).device

    def answer(*_: object, **__: object) -> Any:  # noqa: ANN401 - a model's output
        number, kind = next(answers)
        path = _place(folder, number)
        hidden = load_file(path, device=str(device))[HIDDEN]
        path.unlink()
        return kind(**{HIDDEN: hidden})

    for name, _ in list(body.named_children()):
        delattr(body, name)
    body.forward = answer
