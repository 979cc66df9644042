"""What a base model's folder must hold, and what is to be known of the model. Reads headers and config, no weights."""

from __future__ import annotations

import json
import logging
import struct
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.errors import InvalidModel

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")
COMPANIONS = (
    CONFIG,
    "generation_config.json",
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
)
"""Files that belong to a model besides its weights: no code, no pickles."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HEADER_LIMIT_BYTES = 100_000_000
NAMES_SHOWN = 12

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

    @property
    def linear_names(self) -> tuple[str, ...]:
        """The last parts of the linear layers' names, in the order of the model: q_proj, k_proj, ..."""
        return tuple(dict.fromkeys(name.rpartition(".")[2] for name in self.linear_layers))


def check_folder(folder: Path, where: str) -> list[str]:
    """Check that a folder is a causal language model that can be trained; the names of its files. InvalidModel."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    _check_is_a_model(names, where)
    config = read_json(folder / CONFIG, where)
    check_config(config, where)
    if "tokenizer_config.json" in names:
        _refuse_code(read_json(folder / "tokenizer_config.json", where), "tokenizer_config.json", where)
    if not names & set(TOKENIZERS):
        msg = f"{where} has no tokenizer (tokenizer.json is missing). Copy the tokenizer's files beside {CONFIG}."
        raise InvalidModel(msg)
    weights = _weight_files(folder, names, where)
    for name in weights:
        check_safetensors(folder / name, where)
    if INDEX in names and WEIGHTS not in names:
        weights.append(INDEX)
    return sorted(weights + [name for name in COMPANIONS if name in names])


def _check_is_a_model(names: set[str], where: str) -> None:
    if CONFIG in names:
        return
    if "adapter_config.json" in names:
        msg = f"{where} is an adapter, not a model: {CONFIG} is missing. Give the base model that it was trained on."
        raise InvalidModel(msg)
    msg = f"{where} is no model: {CONFIG} is missing ({_listed(names)}). "
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
    msg = (
        f"{where} has no weights: {WEIGHTS} is missing ({_listed(names)}). Copy the safetensors files beside {CONFIG}."
    )
    raise InvalidModel(msg)


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


def check_config(config: dict[str, Any], where: str) -> None:
    """Refuse what is no causal language model in its original precision, each for its own reason. InvalidModel."""
    _refuse_code(config, CONFIG, where)
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown method")
        msg = f"{where} is quantized already ({method}, says {CONFIG}). "
        raise InvalidModel(msg + "Give the original model: it is quantized in training.")
    architecture = next(iter(config.get("architectures") or []), "")
    kind = _other_kind(architecture, config)
    if kind:
        msg = f"{where} is {kind} ({architecture or config.get('model_type')}, says {CONFIG}). "
        raise InvalidModel(msg + "Give a text model that writes, one whose architecture ends in ForCausalLM.")
    if not isinstance(config.get("model_type"), str):
        msg = f"{where}: {CONFIG} has no model_type, so nobody knows what to load. Copy the model's own {CONFIG}."
        raise InvalidModel(msg)


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


def _refuse_code(settings: dict[str, Any], name: str, where: str) -> None:
    if "auto_map" in settings:
        msg = f"{where} needs Python code of its own (auto_map in {name}), which is not run. "
        raise InvalidModel(msg + "Use a model that transformers supports by itself.")


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


def _listed(names: set[str]) -> str:
    if not names:
        return "it is empty"
    shown = sorted(names)[:NAMES_SHOWN]
    return "has " + ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


# What is to be known


def describe(folder: Path) -> ModelFacts:
    """The facts of a checked model's folder, from its config: the model is built without weights. InvalidModel."""
    import torch  # noqa: PLC0415 - slow
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow

    config = _load_config(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    except Exception as error:
        msg = f"The model cannot be built from its {CONFIG}: {error}. Correct {CONFIG}, or copy the model again."
        raise InvalidModel(msg) from error
    _check_shapes(folder, model)
    _check_complete(folder)
    head = model.get_output_embeddings()
    linear = {
        name: _input_columns(module)
        for name, module in model.named_modules()
        if module is not head and _is_linear(module)
    }
    return ModelFacts(
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_positions=getattr(config.get_text_config(), "max_position_embeddings", None),
        linear_layers=linear,
    )


def quiet() -> None:
    """No bars of transformers' own: the report tells how far things are."""
    from transformers.utils import logging  # noqa: PLC0415 - slow

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _load_config(folder: Path) -> Any:  # noqa: ANN401 - any of transformers' configs
    """The model's config, of a type that can write text. InvalidModel."""
    from transformers import AutoConfig, AutoModelForCausalLM, __version__  # noqa: PLC0415 - slow

    model_type = read_json(folder / CONFIG, "The model").get("model_type")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        msg = f"{CONFIG} (model_type '{model_type}') is not understood by transformers {__version__}: {reason}"
        raise InvalidModel(msg + " Use a model that this version knows.") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:  # noqa: SLF001 - there is no public way to ask
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
    agreed = 0
    for path in sorted(folder.glob("*.safetensors")):
        for name, shape in shapes_in(path).items():
            wanted = expected.get(name) or expected.get(f"{model.base_model_prefix}.{name}")
            agreed += wanted is not None
            if wanted is not None and wanted != shape:
                msg = f"{path.name}: {name} is {list(shape)}, {CONFIG} asks for {list(wanted)}. "
                raise InvalidModel(msg + f"{CONFIG} and weights are of different models: copy both from the same one.")
    if not agreed:
        msg = f"No weight in the safetensors files has a name that {type(model).__name__} knows. "
        raise InvalidModel(msg + f"{CONFIG} and weights are of different models: copy both from the same one.")


def _check_complete(folder: Path) -> None:
    """Refuse a model that lacks weights, which transformers fills with random ones; name those that are too many.

    The model is loaded onto the meta device: transformers maps and ties names in its own way and reads no weight.
    """
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow

    quiet()
    try:
        with _without_warnings("transformers"):  # its own report of what is told here
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                device_map={"": "meta"},
                local_files_only=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (ValueError, KeyError, RuntimeError) as error:
        msg = f"The weights do not go into the model that {CONFIG} describes: {error}. Copy the model again."
        raise InvalidModel(msg) from error
    _, found = loaded
    if mismatched := sorted(name for name, *_ in found["mismatched_keys"]):
        msg = f"The weights of {mismatched[0]} are not all there, or not of the shape that {CONFIG} asks for. "
        raise InvalidModel(msg + "Copy the model again, all of it.")
    if missing := sorted(found["missing_keys"]):
        msg = f"The model has no {missing[0]} ({len(missing):,} of the weights that {CONFIG} asks for are missing). "
        raise InvalidModel(msg + "Copy the model again, all of it.")
    if unknown := sorted(found["unexpected_keys"]):
        shown = ", ".join(unknown[:NAMES_SHOWN]) + (", ..." if len(unknown) > NAMES_SHOWN else "")
        log.warning("%d weights are left out, which the model does not know: %s", len(unknown), shown)


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
    with path.open("rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def load_tokenizer(folder: Path) -> Any:  # noqa: ANN401 - any of transformers' tokenizers
    """The model's tokenizer: fast, with an end-of-sequence token. InvalidModel."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - slow

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        msg = f"The tokenizer cannot be read: {reason}. Copy the tokenizer's files again."
        raise InvalidModel(msg) from error
    if not tokenizer.is_fast:
        msg = "The model has no tokenizer.json. "
        raise InvalidModel(msg + "Save its tokenizer with transformers (save_pretrained) and copy that file.")
    if tokenizer.eos_token_id is None:
        msg = "The tokenizer has no end token, so no answer would ever end. Set eos_token in tokenizer_config.json."
        raise InvalidModel(msg)
    return tokenizer
