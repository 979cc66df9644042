"""A tokenizer in the terms of a GGUF file, as llama.cpp's own converter has them (convert_hf_to_gguf.py).

llama.cpp knows two kinds that matter here. `gpt2`: bytes merged by rank, after a text was cut by rules that have a
name (`pre`). `llama`: SentencePiece's BPE with bytes to fall back on, merged by the scores of pieces.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

BYTE_LEVEL, SENTENCE_PIECE = "gpt2", "llama"
SPACE = "\u2581"
"""How SentencePiece writes a space."""
ADDED_SCORE = -1000.0
"""Of tokens that no merge makes."""
SPLITS = ("llama-bpe", "qwen2", "tekken", "gpt-4o", "qwen35")
"""Names of rules that transformers (5.23) knows as a regular expression."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str
    """gpt2 or llama."""
    pre: str
    """The name of the rules by which a text is cut before anything is merged."""
    tokens: list[str]
    types: list[int]
    """Of each token, as `gguf.TokenType` has them."""
    merges: list[str] | None
    """gpt2: pairs, the first to be merged first."""
    scores: list[float] | None
    """llama: of each token; the highest is merged first."""


def unsayable(tokenizer: Any) -> str | None:  # noqa: ANN401 - a transformers tokenizer
    """What of a tokenizer a GGUF file has no words for."""
    backend = _backend(tokenizer)
    if (kind := backend["model"].get("type")) != "BPE":
        return f"a tokenizer of type {kind}"
    if _model(backend) == BYTE_LEVEL and _pre(backend) is None:
        return "the way its tokenizer cuts a text before merging"
    return None


def describe(tokenizer: Any, rows: int) -> Vocabulary:  # noqa: ANN401 - a transformers tokenizer
    """The vocabulary of a tokenizer that is sayable. `rows`: of the embeddings, which may be more than tokens."""
    backend = _backend(tokenizer)
    model, tokens = _model(backend), [f"[PAD{index}]" for index in range(rows)]
    for token, index in tokenizer.get_vocab().items():
        tokens[index] = token
    types = _types(tokenizer, tokens)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]]
    scores = _scores(tokens, merges) if model == SENTENCE_PIECE else None
    for index, added in tokenizer.added_tokens_decoder.items():
        tokens[index] = tokens[index] if added.special else tokens[index].replace(SPACE, " ")
    pre = "default" if model == SENTENCE_PIECE else _pre(backend) or ""
    return Vocabulary(model, pre, tokens, types, merges if scores is None else None, scores)


def _backend(tokenizer: Any) -> dict[str, Any]:  # noqa: ANN401 - a transformers tokenizer
    """The tokenizer as tokenizer.json has it; {} for one in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found: dict[str, Any] = {"model": {}} if backend is None else json.loads(backend.to_str())
    return found


def _model(backend: dict[str, Any]) -> str:
    return SENTENCE_PIECE if backend["model"].get("byte_fallback") else BYTE_LEVEL


def _pre(backend: dict[str, Any]) -> str | None:
    """The name of the rules that cut a text; None if they have none here."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (  # noqa: PLC0415 - slow
        GGUF_PRE_TOKENIZER_SPLITS as KNOWN,
    )

    names = {("ByteLevel, words",): "gpt-2", ("Digits", "ByteLevel, words"): "smollm"}
    names |= {(KNOWN[name], "ByteLevel"): name for name in SPLITS}
    return names.get(tuple(map(_rule, _parts(backend.get("pre_tokenizer") or {}))))


def _parts(rule: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A rule, or those of a sequence."""
    if rule.get("type") != "Sequence":
        yield rule
        return
    for each in rule["pretokenizers"]:
        yield from _parts(each)


def _rule(rule: dict[str, Any]) -> str:
    """What a rule does: the regular expression that it cuts by, or its name."""
    match rule:
        case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
            return str(regex)
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": words}:
            return "ByteLevel, words" if words else "ByteLevel"
        case {"type": "Digits", "individual_digits": True}:
            return "Digits"
        case _:
            return f"unknown {rule.get('type')}"


def _types(tokenizer: Any, tokens: list[str]) -> list[int]:  # noqa: ANN401 - a transformers tokenizer
    """Of each token: whether it is text, has a meaning of its own, or is no token at all."""
    from gguf import TokenType  # noqa: PLC0415 - slow

    known, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    unknown, bytelike = tokenizer.unk_token_id, _model(_backend(tokenizer)) == SENTENCE_PIECE

    def type_of(index: int, token: str) -> int:
        if token not in known:
            return TokenType.UNUSED
        if bytelike and index == unknown:
            return TokenType.UNKNOWN
        if index in added:
            return TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        return TokenType.BYTE if bytelike and _is_byte(token) else TokenType.NORMAL

    return [int(type_of(index, token)) for index, token in enumerate(tokens)]


def _is_byte(token: str) -> bool:
    return len(token) == len("<0x00>") and token.startswith("<0x") and token.endswith(">")


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Scores by which the same pieces are merged in the same order as by the ranks of the merges."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", ""), rank)
    return [-float(ranks[token]) if token in ranks else ADDED_SCORE for token in tokens]
