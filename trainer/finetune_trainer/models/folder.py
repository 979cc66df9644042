"""What a base model's folder must hold, and what is to be known of the model. Reads headers and config, no weights."""

from __future__ import annotations

import copy
import json
import logging
import os
import re
import struct
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.config import REMOTE_CODE_VARIABLE
from finetune_trainer.runtime.errors import InvalidModel
from finetune_trainer.runtime.wording import first_line, first_of, what_is_there

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

log = logging.getLogger(__name__)

CONFIG, TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
WHOLE_NUMBERS = ("I", "U")
"""How safetensors' names of integer types begin."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    *TOKENIZERS,
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "README.md",
)
"""Files that belong to a model besides its weights, its card too: no code, no pickles."""
AUTO_MAP = "auto_map"
"""In a config: which classes of the model's own Python files transformers is to load."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HEADER_LIMIT_BYTES = 100_000_000

GPTQ = "gptq"
GPTQ_TENSORS = ("qweight", "qzeros", "scales", "g_idx")
"""What stands in the place of `weight` in a GPTQ layer."""
ADAPTER_FOLDER = "adapter"
"""In the model's folder: the adapter to go on from (model.adapter)."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

ENCODERS = ("ForMaskedLM", "ForPreTraining", "Encoder", "EncoderModel")
CLASSIFIERS = ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice")


@dataclass(frozen=True)
class ModelFacts:
    """What the other stages' settings depend on."""

    architecture: str
    """The model's class, e.g. LlamaForCausalLM."""
    parameters: int
    """Tied weights counted once."""
    max_positions: int | None
    """The model's own limit of tokens a row; None if it has none."""
    linear_layers: dict[str, int]
    """Full name of each linear layer (the output head left out) and its input columns."""
    gptq: bool = False
    """Whether its weights are quantized by GPTQ; otherwise they are the original ones."""
    linear_rows: dict[str, int] = field(default_factory=dict)
    """The same layers' outputs."""
    experts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Full name and shape of each parameter that holds all experts of a block in one piece."""
    taken_for_experts: tuple[str, ...] = ()
    """Names that PEFT understands as the fused experts, whatever else has them."""
    modules: tuple[str, ...] = ()
    """Full names of the modules that hold weights of their own."""
    has_biases: bool = True
    embeddings: str = "model.embed_tokens"
    vocabulary: int | None = None
    """Rows of the embeddings; None: not known."""
    head: str | None = "lm_head"
    tied: bool = False
    """Whether the head is the embeddings."""
    adapter: dict[str, Any] | None = None
    """The settings of the adapter to go on from, as PEFT wrote them."""
    hidden: int = 0
    """Columns of the embeddings: the width of what goes from block to block."""
    heads: int = 0
    """Of attention."""
    norms: dict[str, int] = field(default_factory=dict)
    """Full name and width of each RMSNorm."""
    activation: str = "silu"
    """Of the MLPs, by transformers' name."""
    attention_dropout: float = 0.0
    window: int | None = None
    """Tokens that attention looks back at, in some layers or in all; None: all look at all."""
    biased: tuple[str, ...] = ()
    """Full names of the linear layers that have a bias."""
    own_code: bool = False
    """Whether its class is none of transformers' own, whatever it is called."""

    @property
    def linear_names(self) -> tuple[str, ...]:
        """The last parts of the linear layers' names, in the order of the model: q_proj, k_proj, ..."""
        return tuple(dict.fromkeys(name.rpartition(".")[2] for name in self.linear_layers))

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names of the experts' parameters within a block: mlp.experts.gate_up_proj, ..."""
        return tuple(dict.fromkeys(re.sub(r"^.*?\.\d+\.", "", name) for name in self.experts))


def check_folder(folder: Path, where: str, *, gptq: bool = True, code: bool = False) -> list[str]:
    """Check that a folder is a causal language model that can be trained; the names of its files. InvalidModel.

    `gptq`: whether a model that GPTQ quantized will do; what is merged into must be the original one.
    `code`: whether its own Python code may be run (model.trustRemoteCode, and the administrator consents).
    """
    names = {path.name for path in folder.iterdir() if path.is_file()}
    _check_is_a_model(names, where)
    config = read_json(folder / CONFIG, where)
    check_config(config, where, gptq=gptq, code=code)
    if TOKENIZER_CONFIG in names:
        _check_code(read_json(folder / TOKENIZER_CONFIG, where), TOKENIZER_CONFIG, where, code=code)
    if not names & set(TOKENIZERS):
        msg = f"{where} has no tokenizer (tokenizer.json is missing). Copy the tokenizer's files beside {CONFIG}."
        raise InvalidModel(msg)
    weights = _weight_files(folder, names, where)
    for name in weights:
        check_safetensors(folder / name, where)
    if INDEX in names and WEIGHTS not in names:
        weights.append(INDEX)
    scripts = [name for name in names if code and name.endswith(".py")]
    return sorted(weights + scripts + [name for name in COMPANIONS if name in names])


def _check_is_a_model(names: set[str], where: str) -> None:
    if CONFIG in names:
        return
    if "adapter_config.json" in names:
        msg = f"{where} is an adapter, not a model: {CONFIG} is missing. Give the base model that it was trained on."
        raise InvalidModel(msg)
    msg = f"{where} is no model: {CONFIG} is missing ({what_is_there(names)}). "
    raise InvalidModel(msg + "Give a folder with config, tokenizer and weights.")


def _weight_files(folder: Path, names: set[str], where: str) -> list[str]:
    """The safetensors files that hold the weights: the single file, or all shards of the index."""
    if WEIGHTS in names:
        return [WEIGHTS]
    if INDEX in names:
        shards = _shards(read_json(folder / INDEX, where), where)
        if missing := sorted(shards - names):
            msg = (
                f"{where}: {INDEX} names {missing[0]}, which is missing ({len(missing)} of {len(shards)} shards are). "
            )
            raise InvalidModel(msg + "Copy the model again, all of it.")
        return sorted(shards)
    if pickles := sorted(name for name in names if name.endswith(PICKLES) and name != "training_args.bin"):
        msg = f"{where} has its weights only as pickles ({pickles[0]}), which can run code when they are read. "
        raise InvalidModel(msg + "Save the model as safetensors (save_pretrained does) and give that folder.")
    if others := sorted(name for name in names if name.endswith(".safetensors")):
        msg = f"{where} has {others[0]}, but neither {WEIGHTS} nor {INDEX}. Rename the file, or copy the missing index."
        raise InvalidModel(msg)
    msg = f"{where} has no weights: {WEIGHTS} is missing ({what_is_there(names)}). "
    raise InvalidModel(msg + f"Copy the safetensors files beside {CONFIG}.")


def _shards(index: dict[str, Any], where: str) -> set[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        msg = f"{where}: {INDEX} has no weight_map. Copy the model again."
        raise InvalidModel(msg)
    shards = {str(name) for name in weight_map.values()}
    if strange := sorted(name for name in shards if Path(name).name != name or not name.endswith(".safetensors")):
        msg = (
            f"{where}: {INDEX} names '{strange[0]}', which is no safetensors file of the folder. Copy the model again."
        )
        raise InvalidModel(msg)
    return shards


def check_config(config: dict[str, Any], where: str, *, gptq: bool = True, code: bool = False) -> None:
    """Refuse what is no causal language model that can be trained on, each for its own reason. InvalidModel."""
    _check_code(config, CONFIG, where, code=code)
    _check_precision(config.get("quantization_config") or {}, where, gptq)
    architecture = next(iter(config.get("architectures") or []), "")
    kind = _other_kind(architecture, config)
    if kind:
        msg = f"{where} is {kind} ({architecture or config.get('model_type')}, says {CONFIG}). "
        raise InvalidModel(msg + "Give a text model that writes, one whose architecture ends in ForCausalLM.")
    if not isinstance(config.get("model_type"), str):
        msg = f"{where}: {CONFIG} has no model_type, so nobody knows what to load. Copy the model's own {CONFIG}."
        raise InvalidModel(msg)


def _check_precision(quantization: dict[str, Any], where: str, gptq: bool) -> None:
    """No quantization, or GPTQ's of 4 bits where that will do. InvalidModel."""
    if not quantization:
        return
    method = quantization.get("quant_method", "unknown method")
    if method != GPTQ or not gptq:
        msg = f"{where} is quantized already ({method}, says {CONFIG}). "
        raise InvalidModel(msg + "Give the original model: it is quantized in training.")
    if fault := _gptq_fault(quantization):
        msg = f"{where}: {fault} ({CONFIG}). Use a GPTQ model of 4 bits whose head is not quantized."
        raise InvalidModel(msg)


def _gptq_fault(quantization: dict[str, Any]) -> str | None:
    """Why a GPTQ model cannot be trained on."""
    if quantization.get("bits") != 4:  # noqa: PLR2004 - bits a weight
        return f"GPTQ weights of {quantization.get('bits')} bits cannot be trained on"
    if quantization.get("lm_head"):
        return "its output head is quantized, and cannot be trained on"
    kind = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    return None if kind in {"gptq", "gptq_v2"} else f"GPTQ weights in the form '{kind}' cannot be trained on"


def _other_kind(architecture: str, config: dict[str, Any]) -> str | None:
    """What the model is, if it is no causal language model."""
    if any(key in config for key in ("vision_config", "audio_config")) or "Vision" in architecture:
        return "a vision or audio model"
    if architecture.endswith(CLASSIFIERS):
        return "a classifier: it labels text and writes none"
    if config.get("is_encoder_decoder"):
        return "an encoder-decoder model"
    if architecture.endswith(ENCODERS) or config.get("model_type") in {"bert", "roberta", "modernbert", "deberta-v2"}:
        return "an encoder: it reads text and writes none"
    return None


def _check_code(settings: dict[str, Any], name: str, where: str, *, code: bool) -> None:
    """Refuse code that is not trusted, and code that transformers would fetch from elsewhere while it loads."""
    if AUTO_MAP not in settings:
        return
    if not code:
        msg = f"{where} needs Python code of its own (auto_map in {name}), which is not run. "
        raise InvalidModel(msg + "Use a model that transformers supports by itself, or set model.trustRemoteCode.")
    if "--" in json.dumps(settings[AUTO_MAP]):
        msg = f"{where} needs Python code of another repository (auto_map in {name}), which is not fetched. "
        raise InvalidModel(msg + "Use a model that brings its code in its own folder.")


def trusts_code(folder: Path) -> bool:
    """Whether transformers may run the Python code of a checked folder: it has some, and the administrator consents."""
    if os.environ.get(REMOTE_CODE_VARIABLE) != "1":
        return False
    configs = (folder / name for name in (CONFIG, TOKENIZER_CONFIG))
    return any(AUTO_MAP in read_json(path, "The model") for path in configs if path.is_file())


def check_safetensors(path: Path, where: str) -> None:
    """Check that a safetensors file is as long as its header says. InvalidModel."""
    size = path.stat().st_size
    remedy = "Copy the file again."
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0  # noqa: PLR2004 - bytes of an unsigned 64-bit
        if not 0 < length <= min(HEADER_LIMIT_BYTES, size - 8):
            msg = f"{where}: {path.name} is no whole safetensors file ({size:,} bytes). {remedy}"
            if b"git-lfs" in prefix + file.read(64):
                msg = f"{where}: {path.name} is a Git LFS pointer, not the weights. Run `git lfs pull`, then copy."
            raise InvalidModel(msg)
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            msg = f"{where}: the header of {path.name} cannot be read. {remedy}"
            raise InvalidModel(msg) from error
    if (expected := 8 + length + end) != size:
        msg = f"{where}: {path.name} has {size:,} bytes, its header says {expected:,}: it was cut off. {remedy}"
        raise InvalidModel(msg)


def read_json(path: Path, where: str) -> dict[str, Any]:
    """A JSON object out of a model's folder. InvalidModel."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        msg = f"{where}: {path.name} is not JSON ({error}). Copy the file again."
        raise InvalidModel(msg) from error
    if not isinstance(value, dict):
        msg = f"{where}: {path.name} is not a JSON object. Copy the file again."
        raise InvalidModel(msg)
    return value


# What is to be known


def describe(folder: Path) -> ModelFacts:
    """The facts of a checked model's folder, from its config: the model is built without weights. InvalidModel."""
    config = _load_config(folder)
    model = _build(config, folder)
    _check_shapes(folder, model)
    _check_complete(folder, config)
    return _facts(model, config, folder)


def describe_config(folder: Path) -> ModelFacts:
    """The same facts from a folder with a config alone, whose weights nobody looks at. InvalidModel."""
    config = _load_config(folder)
    return _facts(_build(config, folder), config, folder)


def _build(config: Any, folder: Path) -> Any:  # noqa: ANN401 - transformers' config, model
    """The model without its weights, on the meta device. InvalidModel."""
    import torch  # noqa: PLC0415 - slow
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, trust_remote_code=trusts_code(folder)
            )
    except Exception as error:
        msg = f"The model cannot be built from its {CONFIG}: {error}. Correct {CONFIG}, or copy the model again."
        raise InvalidModel(msg) from error


def _facts(model: Any, config: Any, folder: Path) -> ModelFacts:  # noqa: ANN401 - a torch module, transformers' config
    names = {module: name for name, module in model.named_modules()}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    linear = {name: module for module, name in names.items() if module is not head and _is_linear(module)}
    experts = dict(_experts(model))
    columns = {name: _input_columns(module) for name, module in linear.items()}
    rows = {name: module.weight.numel() // columns[name] for name, module in linear.items()}
    text = config.get_text_config()
    return ModelFacts(
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_positions=getattr(text, "max_position_embeddings", None),
        linear_layers=columns,
        linear_rows=rows,
        gptq=getattr(config, "quantization_config", None) is not None,
        experts=experts,
        taken_for_experts=_taken_for_experts(config.model_type) if experts else (),
        modules=tuple(name for module, name in names.items() if any(True for _ in module.parameters(recurse=False))),
        has_biases=any(name.endswith(".bias") for name, _ in model.named_parameters()),
        embeddings=names[embeddings],
        vocabulary=embeddings.weight.shape[0],
        head=names.get(head),
        tied=head is not None and head.weight is embeddings.weight,
        adapter=_fitting_adapter(folder / ADAPTER_FOLDER, columns, rows, experts),
        hidden=embeddings.weight.shape[1],
        heads=getattr(text, "num_attention_heads", None) or 0,
        norms={name: module.weight.numel() for module, name in names.items() if _is_norm(module)},
        activation=str(getattr(text, "hidden_act", "")),
        attention_dropout=getattr(text, "attention_dropout", None) or 0.0,
        window=getattr(text, "sliding_window", None),
        biased=tuple(name for name, module in linear.items() if getattr(module, "bias", None) is not None),
        own_code=type(model).__module__.partition(".")[0] != "transformers",
    )


def _is_norm(module: Any) -> bool:  # noqa: ANN401 - a torch module
    return type(module).__name__.endswith("RMSNorm") and getattr(module, "weight", None) is not None


def _experts(model: Any) -> Iterator[tuple[str, tuple[int, ...]]]:  # noqa: ANN401 - a torch module
    """Parameters [experts, ., .] that hold the weights of many experts at once."""
    for name, module in model.named_modules():
        if not type(module).__name__.startswith("Conv"):
            for part, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3:  # noqa: PLR2004 - experts, and the two of a matrix
                    yield f"{name}.{part}", tuple(parameter.shape)


def _taken_for_experts(model_type: str) -> tuple[str, ...]:
    """Names of layers that PEFT (0.21) translates to fused parameters, as adapters of older models had them."""
    from peft.utils import transformers_weight_conversion as conversion  # noqa: PLC0415 - slow

    known: Any = vars(conversion)  # there is no public way to ask
    family = known["_MODEL_TO_CONVERSION_PATTERN"].get(model_type, "")
    return tuple(known["_MOE_TARGET_MODULE_MAPPING"].get(family, ()))


def read_adapter(folder: Path, where: str) -> dict[str, Any]:
    """The settings of an adapter to go on from: LoRA, its weights whole. InvalidModel."""
    for name, what in ((ADAPTER_CONFIG, "is no adapter"), (ADAPTER_WEIGHTS, "has no weights")):
        if not (folder / name).is_file():
            msg = f"{where} {what}: {name} is missing. Give a folder that PEFT saved (save_pretrained)."
            raise InvalidModel(msg)
    check_safetensors(folder / ADAPTER_WEIGHTS, where)
    settings = read_json(folder / ADAPTER_CONFIG, where)
    if settings.get("peft_type") != "LORA":
        msg = f"{where} is of type {settings.get('peft_type')} ({ADAPTER_CONFIG}), only LORA can be gone on from. "
        raise InvalidModel(msg + "Give a LoRA adapter, or drop model.adapter to begin a new one.")
    return settings


def _fitting_adapter(
    folder: Path, columns: dict[str, int], rows: dict[str, int], experts: Iterable[str]
) -> dict[str, Any] | None:
    """The settings of the adapter, if there is one, each part of which is for a layer of the model. InvalidModel."""
    if not folder.is_dir():
        return None
    settings = read_adapter(folder, "model.adapter")
    holders = {name.rpartition(".")[0] for name in experts}
    for name, shape in shapes_in(folder / ADAPTER_WEIGHTS).items():
        found = re.fullmatch(r"base_model\.model\.(.+?)(?:\.base_layer)*\.lora_([AB])\.weight", name)
        if found is None or found[1] in holders:
            continue
        layer, sizes, place = found[1], *((columns, 1) if found[2] == "A" else (rows, 0))
        if layer not in sizes or shape[place] != sizes[layer]:
            what = f"has {shape[place]:,} where it has {sizes[layer]:,}" if layer in sizes else "is none of its layers"
            msg = f"model.adapter is not for this model: {layer} {what}. "
            raise InvalidModel(msg + "Give the base model that the adapter was trained on, or drop model.adapter.")
    return settings


def quiet() -> None:
    """No bars of transformers' own: the report tells how far things are."""
    from transformers.utils import logging  # noqa: PLC0415 - slow

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _load_config(folder: Path) -> Any:  # noqa: ANN401 - any of transformers' configs
    """The model's config, of a type that can write text. InvalidModel."""
    from transformers import AutoConfig, AutoModelForCausalLM, __version__  # noqa: PLC0415 - slow

    model_type = read_json(folder / CONFIG, "The model").get("model_type")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusts_code(folder))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])  # a heading alone says nothing
        msg = f"{CONFIG} (model_type '{model_type}') is not understood by transformers {__version__}: {reason}"
        raise InvalidModel(msg + f" Correct {CONFIG}, or use a model that this version knows.") from error
    brings_class = AutoModelForCausalLM.__name__ in (getattr(config, AUTO_MAP, None) or {})
    if not brings_class and type(config) not in AutoModelForCausalLM._model_mapping:  # noqa: SLF001 - not to be asked otherwise
        msg = f"Models of type '{model_type}' ({CONFIG}) write no text from left to right. "
        raise InvalidModel(msg + "Give a text model, one whose architecture ends in ForCausalLM.")
    return config


def _is_linear(module: Any) -> bool:  # noqa: ANN401 - a torch module
    """A linear layer in PEFT's sense: torch's own, and GPT-2's Conv1D."""
    return any(base.__name__ in {"Linear", "Conv1D"} for base in type(module).__mro__)


def _input_columns(module: Any) -> int:  # noqa: ANN401 - a torch module
    return int(module.in_features) if hasattr(module, "in_features") else int(module.weight.shape[0])


def _check_shapes(folder: Path, model: Any) -> None:  # noqa: ANN401 - a torch module
    """Config and weights must be of the same model: where names agree, shapes must too."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    numbers = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    agreed = 0
    for path in sorted(folder.glob("*.safetensors")):
        kinds = {name: entry["dtype"] for name, entry in _tensors_in(path).items()}
        for name, shape in shapes_in(path).items():
            full = name if name in expected else f"{model.base_model_prefix}.{name}"
            wanted = expected.get(full)
            agreed += wanted is not None
            if wanted == shape and full in numbers and kinds[name][0] in WHOLE_NUMBERS:
                msg = f"{path.name}: {name} is of type {kinds[name]}, and {CONFIG} names no quantization. "
                raise InvalidModel(msg + "Give the original model.")
            if wanted is not None and wanted != shape:
                msg = f"{path.name}: {name} is {list(shape)}, {CONFIG} asks for {list(wanted)}. "
                raise InvalidModel(msg + f"{CONFIG} and weights are of different models: copy both from the same one.")
    if not agreed:
        msg = f"No weight in the safetensors files has a name that {type(model).__name__} knows. "
        raise InvalidModel(msg + f"{CONFIG} and weights are of different models: copy both from the same one.")


def _check_complete(folder: Path, config: Any) -> None:  # noqa: ANN401 - any of transformers' configs
    """Refuse a model that lacks weights, which transformers fills with random ones; name those that are too many.

    The model is loaded onto the meta device: transformers maps and ties names in its own way and reads no weight.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow

    quiet()
    packed = _packed_layers(folder)
    try:
        with _without_warnings("transformers"):  # its own report of what is told here
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=_unquantized(config),
                device_map={"": "meta"},
                local_files_only=True,
                trust_remote_code=trusts_code(folder),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (ValueError, KeyError, RuntimeError) as error:
        msg = f"The weights do not go into the model that {CONFIG} describes: {error}. Copy the model again."
        raise InvalidModel(msg) from error
    model, found = loaded
    if further := _further_blocks(found["unexpected_keys"], config, model):
        msg = f"The weights have {first_of(further)}, which {CONFIG} does not ask for: nobody would use them. "
        raise InvalidModel(msg + f"{CONFIG} and weights are of different models: copy both from the same one.")
    if mismatched := sorted(name for name, *_ in found["mismatched_keys"]):
        msg = f"The weights of {mismatched[0]} are not all there, or not of the shape that {CONFIG} asks for. "
        raise InvalidModel(msg + "Copy the model again, all of it.")
    if missing := sorted(name for name in found["missing_keys"] if name.removesuffix(".weight") not in packed):
        msg = f"The model has no {missing[0]} ({len(missing):,} of the weights that {CONFIG} asks for are missing). "
        raise InvalidModel(msg + "Copy the model again, all of it.")
    if unknown := sorted(name for name in found["unexpected_keys"] if name.rpartition(".")[0] not in packed):
        log.warning("%d weights are left out, which the model does not know: %s", len(unknown), first_of(unknown))


def _further_blocks(unknown: Iterable[str], config: Any, model: Any) -> list[str]:  # noqa: ANN401 - transformers' config, model
    """Blocks, or experts in them, that the weights have and the model does not, beside others of their kind.

    Those that predict further tokens come after the last block in some models, and are left out on purpose.
    """
    if getattr(config, "num_nextn_predict_layers", 0):
        return []
    modules = {name for name, _ in model.named_modules()}
    lists = {name.rpartition(".")[0] for name in modules if name.rpartition(".")[2].isdecimal()}
    full = (start + name for name in unknown for start in ("", f"{model.base_model_prefix}."))
    blocks = {block for name in full for block in _numbered(name)}
    return sorted(block for block in blocks - modules if block.rpartition(".")[0] in lists)


def _numbered(name: str) -> list[str]:
    """`model.layers.3` and `model.layers.3.mlp.experts.7` of model.layers.3.mlp.experts.7.up_proj.weight."""
    return [name[: found.end()] for found in re.finditer(r"\.\d+(?=\.)", name)]


def _packed_layers(folder: Path) -> set[str]:
    """Names of the layers of which the files hold all that GPTQ makes of a weight."""
    names = {name for path in folder.glob("*.safetensors") for name in shapes_in(path)}
    layers = {name.removesuffix(".qweight") for name in names if name.endswith(".qweight")}
    return {layer for layer in layers if all(f"{layer}.{part}" in names for part in GPTQ_TENSORS)}


def _unquantized(config: Any) -> Any:  # noqa: ANN401 - any of transformers' configs
    """The same config for the original weights: layers are looked at, not their packing."""
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    return plain


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a safetensors file, from its header."""
    return {name: tuple(entry["shape"]) for name, entry in _tensors_in(path).items()}


def _tensors_in(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def load_tokenizer(folder: Path) -> Any:  # noqa: ANN401 - any of transformers' tokenizers
    """The model's tokenizer: fast, with an end-of-sequence token. InvalidModel."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts_code(folder))
    except Exception as error:
        msg = f"The tokenizer cannot be read: {first_line(error)}. Copy the tokenizer's files again."
        raise InvalidModel(msg) from error
    if not tokenizer.is_fast:
        msg = "The model has no tokenizer.json. "
        raise InvalidModel(msg + "Save its tokenizer with transformers (save_pretrained) and copy that file.")
    if tokenizer.eos_token_id is None:
        msg = "The tokenizer has no end token, so no answer would ever end. Set eos_token in tokenizer_config.json."
        raise InvalidModel(msg)
    return tokenizer
