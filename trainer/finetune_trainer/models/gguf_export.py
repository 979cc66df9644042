"""A finished model as one GGUF file, which llama.cpp and what is built on it read; and such a file loaded back.

Names, shapes and settings are those of llama.cpp's own converter (convert_hf_to_gguf.py); the rounding is gguf's. It
writes block types of one scale (Q8_0, Q5_1, Q5_0, Q4_1, Q4_0) and no k-quants (gguf 0.19: it reads those only).
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_trainer.models.folder import load_tokenizer, quiet, shapes_in
from finetune_trainer.models.gguf_vocabulary import SENTENCE_PIECE, SPACE, describe, unsayable
from finetune_trainer.runtime.errors import InvalidModel, VerificationFailed
from finetune_trainer.runtime.work import require_space

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import numpy as np
    import torch

    from finetune_trainer.runtime.context import Context

log = logging.getLogger(__name__)

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
"""The classes whose files are loaded back and compared, by a test each, and llama.cpp's names for them."""
BLOCK_COLUMNS = 32
"""Weights of a row that share a scale, in all block types."""
WHOLE_TYPES = ("F16", "BF16")
COARSE_TYPES = ("Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""In files of these the embeddings and the head are Q8_0: little in size, much in quality."""
ROPES = ("default", "llama3")
"""Ways to stretch positions that a file can say and that are proven."""
BIASES = ("attention_bias", "mlp_bias")
"""Of models that may or may not have them; where a class always has biases (Qwen2), they are known to be there."""
ROPE_FACTORS = "rope_freqs.weight"
EMBEDDINGS, HEAD = "token_embd.weight", "output.weight"


def file_name(kind: str) -> str:
    """The file of an export, named as people name them."""
    return f"model-{kind}.gguf"


def find_exported(folder: Path) -> Path | None:
    """The GGUF file of an artifact, if it is one."""
    return next(iter(sorted(folder.glob("*.gguf"))), None)


def unexportable(folder: Path, tokenizer: Any) -> str | None:  # noqa: ANN401 - a transformers tokenizer
    """What of a model of a known class a GGUF file has no words for."""
    config = _config(folder)
    if (rope := config.rope_parameters.get("rope_type", "default")) not in ROPES:
        return f"positions stretched by '{rope}' (rope_parameters in config.json)"
    if (window := getattr(config, "sliding_window", None)) is not None:
        return f"attention to the last {window:,} tokens alone (sliding_window in config.json)"
    if any(getattr(config, name, False) for name in BIASES):
        return f"biases of a {config.model_type} so that transformers reads them ({', '.join(BIASES)} in config.json)"
    return unsayable(tokenizer)


def _config(folder: Path) -> Any:  # noqa: ANN401 - a config of transformers
    from transformers import AutoConfig  # noqa: PLC0415 - slow

    return AutoConfig.from_pretrained(folder)


# Writing


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file, and where it comes from."""

    name: str
    source: Path
    key: str
    shape: tuple[int, ...]
    kind: str
    """GGUF's type."""

    @property
    def size_bytes(self) -> int:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # noqa: PLC0415 - slow

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.kind]]
        count = 1
        for each in self.shape:
            count *= each
        return count // block * size


def write(finished: Path, tokenizer: Path, path: Path, kind: str, context: Context) -> None:
    """Write a finished model's folder as one GGUF file of a type, a tensor at a time. VolumeFull."""
    from gguf import GGMLQuantizationType, GGUFWriter  # noqa: PLC0415 - slow

    config = _config(finished)
    tensors = _plan(finished, config, kind)
    total = sum(each.size_bytes for each in tensors)
    require_space(path.parent, total, path.name)
    writer = GGUFWriter(path, ARCHITECTURES[config.architectures[0]])
    _describe_model(writer, config, kind)
    _describe_tokenizer(writer, load_tokenizer(tokenizer), config)
    factors = rope_factors(config)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    for each in tensors:
        raw = GGMLQuantizationType[each.kind]
        writer.add_tensor_info(each.name, each.shape, _FLOAT, each.size_bytes, raw_dtype=raw)
    for step in ("header", "kv_data", "ti_data"):
        getattr(writer, f"write_{step}_to_file")()
    context.report.begin(f"writing {path.name}", total, "bytes")
    if factors is not None:
        writer.write_tensor_data(factors)
    for each in tensors:
        context.raise_if_stopping()
        writer.write_tensor_data(_encoded(each, config))
        context.report.advance(each.size_bytes)
    writer.close()


_FLOAT: Any = "float32"


def _plan(finished: Path, config: Any, kind: str) -> list[_Tensor]:  # noqa: ANN401 - a config of transformers
    """Every tensor of the folder under its name in the file; the head left out where it is the embeddings."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map  # noqa: PLC0415 - slow

    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[config.architectures[0]])
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tensors = []
    for source in sorted(finished.glob("*.safetensors")):
        for key, shape in shapes_in(source).items():
            if (name := names.get_name(key, try_suffixes=(".weight", ".bias"))) is None:
                msg = f"{source.name}: GGUF has no name for {key} in a model of type {arch.name}. Use another method."
                raise InvalidModel(msg)
            if not (name == HEAD and config.tie_word_embeddings):
                tensors.append(_Tensor(name, source, key, shape, _kind_of(name, shape, kind)))
    return tensors


def _kind_of(name: str, shape: Sequence[int], kind: str) -> str:
    """Norms and biases stay whole."""
    if len(shape) == 1:
        return "F32"
    return "Q8_0" if kind in COARSE_TYPES and name in (EMBEDDINGS, HEAD) else kind


def _encoded(tensor: _Tensor, config: Any) -> np.ndarray[Any, Any]:  # noqa: ANN401 - a config of transformers
    """A tensor's bytes in the file. VerificationFailed if it has values that its type cannot hold."""
    import numpy as np  # noqa: PLC0415 - beside gguf
    from gguf import GGMLQuantizationType, quants  # noqa: PLC0415 - slow
    from safetensors import safe_open  # noqa: PLC0415 - slow

    with safe_open(tensor.source, framework="pt") as file:
        values = file.get_tensor(tensor.key).float().numpy()
    if ARCHITECTURES[config.architectures[0]] == "llama":
        values = _rotated(tensor.name, values, config)
    with np.errstate(over="ignore"):
        data = np.ascontiguousarray(quants.quantize(values, GGMLQuantizationType[tensor.kind]))
    if not np.isfinite(values if data.dtype == np.uint8 else data).all():
        msg = f"{tensor.key} has values that are not finite in {tensor.kind}. Set ggufType to BF16 or Q8_0."
        raise VerificationFailed(msg)
    return data


def _rotated(name: str, values: np.ndarray[Any, Any], config: Any) -> np.ndarray[Any, Any]:  # noqa: ANN401 - a config of transformers
    """Rows of queries and keys in llama.cpp's order: it turns neighbours, transformers a head's halves."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return values
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def rope_factors(config: Any) -> np.ndarray[Any, Any] | None:  # noqa: ANN401 - a config of transformers
    """By how much each frequency of the positions is slowed down; None where none is."""
    if config.rope_parameters.get("rope_type", "default") == "default":
        return None
    import torch  # noqa: PLC0415 - slow
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: PLC0415 - slow

    slowed, _ = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    size = _head_columns(config)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    factors: np.ndarray[Any, Any] = (plain / slowed).numpy()
    return factors


def _head_columns(config: Any) -> int:  # noqa: ANN401 - a config of transformers
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _describe_model(writer: Any, config: Any, kind: str) -> None:  # noqa: ANN401 - gguf's writer and a config of transformers
    from gguf import GGML_QUANT_VERSION, LlamaFileType  # noqa: PLC0415 - slow

    writer.add_type("model")
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_columns(config))
    writer.add_value_length(_head_columns(config))
    writer.add_rope_dimension_count(_head_columns(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _describe_tokenizer(writer: Any, tokenizer: Any, config: Any) -> None:  # noqa: ANN401 - gguf's writer, a tokenizer and a config
    """The vocabulary, the tokens with a meaning, and the chat template."""
    found = describe(tokenizer, config.vocab_size)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.merges is not None:
        writer.add_token_merges(found.merges)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
    for name, index in _meanings(tokenizer, config).items():
        getattr(writer, f"add_{name}_token_id")(index)
    framed = tokenizer("x").input_ids
    writer.add_add_bos_token(framed[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(framed[-1] == tokenizer.eos_token_id)
    if found.model == SENTENCE_PIECE:
        writer.add_add_space_prefix(tokenizer.tokenize("x")[0].startswith(SPACE))
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _meanings(tokenizer: Any, config: Any) -> dict[str, int]:  # noqa: ANN401 - a tokenizer and a config
    """Tokens that begin, end and pad; `eot` is a second one that ends an answer."""
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    others = [index for index in ends if index not in (None, tokenizer.eos_token_id)]
    known = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "eot": others[0] if others else None,
        "unk": tokenizer.unk_token_id,
        "pad": tokenizer.pad_token_id,
    }
    return {name: index for name, index in known.items() if index is not None}


# Loading back


def load_exported(path: Path, device: torch.device) -> Any:  # noqa: ANN401 - a causal language model
    """The model of a GGUF file by what the file says alone, unpacked: in fp32 on CPU, in 16 bits on a GPU.

    VerificationFailed if the file lacks weights, which transformers fills with random ones.
    """
    import torch  # noqa: PLC0415 - slow
    from transformers import AutoModelForCausalLM, GgufConfig  # noqa: PLC0415 - slow

    quiet()
    halves = torch.bfloat16 if path.name == file_name("BF16") else torch.float16
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path.parent,
            gguf_file=path.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32 if device.type == "cpu" else halves,
            device_map={"": device},
            output_loading_info=True,
        )
    except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        msg = f"{path.name} was written and cannot be loaded: {error}. Use another method, or report this as a bug."
        raise VerificationFailed(msg) from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        msg = f"{path.name} has no {missing[0]} ({len(missing):,} weights are missing). Report this as a bug."
        raise VerificationFailed(msg)
    _slow_down(model, path)
    return model.eval()


def _slow_down(model: Any, path: Path) -> None:  # noqa: ANN401 - a causal language model
    """Slow the positions down as the file says; transformers (5.23) does not read it."""
    import torch  # noqa: PLC0415 - slow

    if (factors := read_rope_factors(path)) is not None:
        rotary = model.model.rotary_emb
        rotary.inv_freq = rotary.inv_freq / torch.tensor(factors, device=rotary.inv_freq.device)


def read_rope_factors(path: Path) -> np.ndarray[Any, Any] | None:
    """By how much a GGUF file has each frequency of the positions slowed down; None where it has none."""
    from gguf import GGUFReader  # noqa: PLC0415 - slow

    return next((tensor.data for tensor in GGUFReader(path).tensors if tensor.name == ROPE_FACTORS), None)


def verify_tokenizer(path: Path, tokenizer: Any, rows: Sequence[Sequence[int]]) -> None:  # noqa: ANN401 - a transformers tokenizer
    """VerificationFailed unless the file's tokenizer has the same words, template and tokens for the same texts."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow

    found = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for what in itertools.chain(_other_words(found, tokenizer), _other_tokens(found, tokenizer, rows)):
        msg = f"{path.name}: its tokenizer is not the model's: {what}. Use another method, or report this as a bug."
        raise VerificationFailed(msg)


def _other_words(found: Any, tokenizer: Any) -> Iterator[str]:  # noqa: ANN401 - transformers tokenizers
    known = found.get_vocab()
    if other := [word for word, index in tokenizer.get_vocab().items() if known.get(word) != index]:
        yield f"{len(other):,} words have other ids, among them {other[0]!r}"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
        if getattr(found, name) != getattr(tokenizer, name):
            yield f"another {name}"


def _other_tokens(found: Any, tokenizer: Any, rows: Sequence[Sequence[int]]) -> Iterator[str]:  # noqa: ANN401 - transformers tokenizers
    for row in rows:
        text = tokenizer.decode(row)
        if found(text).input_ids != tokenizer(text).input_ids:
            yield f"other tokens for {text[:80]!r}"
