"""The tokenizer as the job wants it: special tokens, chat template; and whether the base ever learned them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_trainer.config import ChatTemplatePreset, MethodType
from finetune_trainer.data.templates import RENDER_ERRORS, bounded
from finetune_trainer.models.folder import shapes_in
from finetune_trainer.runtime.errors import InvalidConfig, InvalidModel

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

    from finetune_trainer.config import BaseModelSource, ChatTemplate, JobConfig, Tokens

EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$")
HEADS = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
UNTRAINED_NORM = 0.1
"""Rows this much shorter than a usual one were never moved from where they began: near zero (Llama-3's reserved ones),
or taken down by weight decay alone."""
ROWS_COMPARED = 256
SAMPLE = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})


@dataclass(frozen=True)
class Preset:
    """A chat template that comes with the trainer."""

    jinja: str
    tokens: tuple[str, ...] = ()
    """Control tokens that it writes, which the tokenizer must know."""
    end: str | None = None
    """The token that ends an answer; None: the tokenizer's own end token."""


_SYSTEM_FIRST = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"
)
PRESETS: Mapping[ChatTemplatePreset, Preset] = {
    ChatTemplatePreset.CHATML: Preset(
        "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' }}"
        "{%- if m['role'] == 'assistant' %}{% generation %}{{- m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{%- else %}{{- m['content'] + '<|im_end|>' }}{%- endif %}{{- '\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
        ("<|im_start|>", "<|im_end|>"),
        "<|im_end|>",
    ),
    ChatTemplatePreset.LLAMA3: Preset(
        "{{- bos_token }}{%- for m in messages %}"
        "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
        "{%- if m['role'] == 'assistant' %}{% generation %}{{- m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{%- else %}{{- m['content'] | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}",
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
    ),
    ChatTemplatePreset.LLAMA2: Preset(
        _SYSTEM_FIRST + "{%- for m in turns %}{%- if m['role'] == 'user' %}{{- bos_token + '[INST] ' }}"
        "{%- if loop.first and system %}{{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' }}{%- endif %}"
        "{{- m['content'] | trim + ' [/INST]' }}"
        "{%- elif m['role'] == 'assistant' %}{{- ' ' }}"
        "{% generation %}{{- m['content'] | trim + ' ' + eos_token }}{% endgeneration %}"
        "{%- else %}{{- raise_exception('llama2 knows system, user and assistant') }}{%- endif %}{%- endfor %}"
    ),
    ChatTemplatePreset.ZEPHYR: Preset(
        "{%- for m in messages %}{{- '<|' + m['role'] + '|>\\n' }}"
        "{%- if m['role'] == 'assistant' %}{% generation %}{{- m['content'] + eos_token }}{% endgeneration %}"
        "{%- else %}{{- m['content'] + eos_token }}{%- endif %}{{- '\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
    ),
    ChatTemplatePreset.ALPACA: Preset(
        _SYSTEM_FIRST + "{%- if system %}{{- system + '\\n\\n' }}{%- endif %}"
        "{%- for m in turns %}{%- if m['role'] == 'assistant' %}{{- '### Response:\\n' }}"
        "{% generation %}{{- m['content'] + eos_token }}{% endgeneration %}{{- '\\n\\n' }}"
        "{%- else %}{{- '### Instruction:\\n' + m['content'] + '\\n\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '### Response:\\n' }}{%- endif %}"
    ),
}


def shape_tokenizer(tokenizer: Any, source: BaseModelSource) -> tuple[int, ...]:  # noqa: ANN401 - any of transformers' tokenizers
    """Give the tokenizer the tokens and the chat template that the job asks for; the ids whose embeddings are to train.

    The padding token is the end token where the tokenizer has none: masks are made from places, so it counts all the
    same. InvalidConfig names what the tokenizer does not know.
    """
    asked, template = source.tokens, source.chat_template
    preset = PRESETS[template.preset] if template is not None and template.preset is not None else None
    added = _add(tokenizer, asked, preset.jinja if preset else (template.jinja if template else None))
    if preset is not None:
        _require_known(tokenizer, preset, template)
    for field, text in (("eos", (asked and asked.eos) or (preset and preset.end)), ("pad", asked and asked.pad)):
        if text:
            _set_special(tokenizer, field, text)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    if template is not None and (jinja := preset.jinja if preset else template.jinja):
        tokenizer.chat_template = jinja
        _try_template(tokenizer)
    return added


def _add(tokenizer: Any, asked: Tokens | None, template: str | None) -> tuple[int, ...]:  # noqa: ANN401 - any of transformers' tokenizers
    """Add what is not known yet. Control tokens are those that the template or the job's own settings speak of."""
    from tokenizers import AddedToken  # noqa: PLC0415 - slow

    names = (asked.add or ()) if asked is not None else ()
    spoken_of = f"{template or tokenizer.chat_template or ''}"
    control = {name for name in names if name in spoken_of or (asked and name in {asked.eos, asked.pad})}
    new = [name for name in names if name not in tokenizer.get_vocab()]
    tokenizer.add_tokens([AddedToken(name, special=name in control, normalized=False) for name in new])
    return tuple(dict.fromkeys(int(tokenizer.convert_tokens_to_ids(name)) for name in names))


def _require_known(tokenizer: Any, preset: Preset, template: ChatTemplate | None) -> None:  # noqa: ANN401 - any of transformers' tokenizers
    unknown = [name for name in preset.tokens if name not in tokenizer.get_vocab()]
    if unknown and template is not None:
        listed = ", ".join(f'"{name}"' for name in unknown)
        msg = f"model.chatTemplate.preset {template.preset} writes {listed}, which the tokenizer does not know. "
        raise InvalidConfig(msg + f"Set model.tokens.add: [{listed}], which trains them, or take another preset.")


def _set_special(tokenizer: Any, field: str, text: str) -> None:  # noqa: ANN401 - any of transformers' tokenizers
    if text not in tokenizer.get_vocab():
        msg = f"model.tokens.{field} is '{text}', which the tokenizer does not know. "
        raise InvalidConfig(msg + "Correct it, or put it into model.tokens.add as well.")
    setattr(tokenizer, f"{field}_token", text)


def _try_template(tokenizer: Any) -> None:  # noqa: ANN401 - any of transformers' tokenizers
    """InvalidConfig if the template cannot render a question and its answer."""
    try:
        with bounded():
            text = tokenizer.apply_chat_template(list(SAMPLE), tokenize=False)
    except RENDER_ERRORS as error:
        msg = f"model.chatTemplate.jinja cannot render a question and its answer: {error}. Correct the template."
        raise InvalidConfig(msg) from error
    if SAMPLE[1]["content"] not in text:
        msg = "model.chatTemplate.jinja leaves out the assistant's answer. Write message['content'] for every role."
        raise InvalidConfig(msg)


def template_kwargs(values: Mapping[str, str] | None) -> dict[str, Any]:
    """What a chat template is given by name: texts, of which 'true' and 'false' are meant as such."""
    words = {"true": True, "false": False}
    return {name: words.get(value, value) for name, value in (values or {}).items()}


def check_embedded(tokenizer: Any, highest: int, vocabulary: int | None, added: Sequence[int]) -> None:  # noqa: ANN401 - any of transformers' tokenizers
    """InvalidModel if the rows hold a token beyond the embeddings. `highest`: the highest id in the rows."""
    if vocabulary is None or highest < max(vocabulary, *(index + 1 for index in added), 0):
        return
    msg = (
        f"The tokenizer writes '{tokenizer.convert_ids_to_tokens(highest)}' as token {highest:,}, but the model has "
        f"embeddings for {vocabulary:,} tokens only. "
    )
    raise InvalidModel(msg + "Copy the tokenizer's files and the model's from the same place.")


# Tokens that were never trained


def check_trained(config: JobConfig, folder: Path, tokenizer: Any, kwargs: Mapping[str, Any]) -> None:  # noqa: ANN401 - any of transformers' tokenizers
    """InvalidModel if the chat template writes control tokens that the base model never learned and this job freezes.

    A base model's chat tokens may be there and mean nothing (Llama-3 base): its answers would never end.
    """
    if config.method_type in {MethodType.FULL, MethodType.GALORE} or _saves_embeddings(config):
        return
    with bounded():
        text = tokenizer.apply_chat_template(list(SAMPLE), tokenize=False, **kwargs)
    ids = set(tokenizer(text, add_special_tokens=False)["input_ids"])
    named = set((config.model.tokens.add or ()) if config.model.tokens else ())
    control = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if i in ids}
    frozen = {index: name for index, name in control.items() if name not in named}
    if untrained := sorted(frozen[index] for index in find_untrained(folder, sorted(frozen))):
        listed = ", ".join(f'"{name}"' for name in untrained)
        msg = (
            f"The chat template writes {', '.join(untrained)}, which this base model never learned (their embeddings "
            "are all but zero). "
        )
        remedy = f"Use the instruct model; or set model.tokens.add: [{listed}], so that their embeddings are trained."
        raise InvalidModel(msg + remedy)


def _saves_embeddings(config: JobConfig) -> bool:
    lora = config.method.lora if config.method else None
    return any(EMBEDDINGS.search(f"{name}.weight") for name in (lora and lora.modules_to_save) or ())


def find_untrained(folder: Path, ids: Sequence[int]) -> list[int]:
    """Those of the tokens whose row of the embeddings, or of the head, is all but zero beside usual ones."""
    found: set[int] = set()
    for path in sorted(folder.glob("*.safetensors")):
        for name, shape in shapes_in(path).items():
            if (EMBEDDINGS.search(name) or HEADS.search(name)) and len(shape) == 2:  # noqa: PLR2004 - a matrix
                found |= _short_rows(path, name, [index for index in ids if index < shape[0]])
    return sorted(found)


def _short_rows(path: Path, name: str, ids: Sequence[int]) -> set[int]:
    from safetensors import safe_open  # noqa: PLC0415 - slow

    with safe_open(path, "pt") as file:
        matrix = file.get_slice(name)
        count = matrix.get_shape()[0]
        step = max(1, count // ROWS_COMPARED)
        usual = sorted(_norm(matrix, index) for index in range(0, count, step))
        return {index for index in ids if _norm(matrix, index) < UNTRAINED_NORM * usual[len(usual) // 2]}


def _norm(matrix: Any, index: int) -> float:  # noqa: ANN401 - a slice of safetensors
    row: torch.Tensor = matrix[index : index + 1]
    return float(row.float().norm())
