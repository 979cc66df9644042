"""Shapes of Llamas, without what each benchmark or test chooses by itself: lengths, rotary angles, words."""

from __future__ import annotations

from typing import Any

LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
"""Llama-3.2-1B."""
LLAMA_8B: dict[str, Any] = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
"""Llama-3-8B."""
