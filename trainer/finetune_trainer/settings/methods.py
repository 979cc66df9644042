"""What of a model trains and how the rest is held, fixed once. Pure: the same config and model, the same method.

What PEFT, bitsandbytes and GaLore cannot do together is refused here, before a GPU is held. Every refusal names the
field in camelCase and the way out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from finetune_trainer.config import (
    EIGHT_BIT,
    FLOATING,
    FORMATS,
    Attention,
    BaseFormat,
    ComputeDtype,
    GaLore,
    GradientCheckpointing,
    JobConfig,
    Lora,
    LoraBias,
    LoraInit,
    MethodType,
    ObjectiveType,
    Optimizer,
)
from finetune_trainer.progress import Resolved, ResolvedGaLore, ResolvedLora
from finetune_trainer.runtime.errors import InvalidConfig, InvalidModel
from finetune_trainer.runtime.wording import first_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from finetune_trainer.models.folder import ModelFacts

T = TypeVar("T")

ALL_LINEAR = "all-linear"
DEFAULT_RANK = 16
DEFAULT_GALORE_RANK = 256
LAYER_NAMES_SHOWN = 16
"""A block of experts has more of them than a list of names usually shows."""
STARTS: dict[str, Any] = {
    LoraInit.DEFAULT: True,
    LoraInit.GAUSSIAN: "gaussian",
    LoraInit.ORTHOGONAL: "orthogonal",
}
"""PEFT's words for how an adapter begins. One that is gone on from must have begun so: other ways change the base's
weights, which are not in its files."""
KINDS = {
    "targetModules": "linear layer",
    "excludeModules": "linear layer",
    "modulesToSave": "module",
    "targetParameters": "parameter of fused experts",
}
BIASES: dict[str, Any] = {LoraBias.NONE: "none", LoraBias.ALL: "all", LoraBias.LORA_ONLY: "lora_only"}
"""PEFT's words for the biases that train."""


def or_default(value: T | None, default: T) -> T:
    """The value, or the default where it is unset."""
    return default if value is None else value


def check_method(config: JobConfig, model: ModelFacts) -> None:
    """All of a method that can be refused before the rows are read. InvalidConfig or InvalidModel."""
    held = resolve_base_format(config)
    _check_precision(held, model)
    resolve_compute_dtype(config)
    resolve_optimizer(config)
    resolve_attention(config)
    resolve_galore(config, model)
    resolve_lora(config, model)


def _check_precision(held: BaseFormat, model: ModelFacts) -> None:
    """A GPTQ model exactly where GPTQ is asked for."""
    if model.gptq and held is not BaseFormat.GPTQ:
        msg = (
            f"method.baseWeights.format is {held}, but the model is quantized already (GPTQ, says config.json). Give "
            "the original model: it is quantized in training; or set method.type to QLoRA and the format to GPTQ."
        )
        raise InvalidModel(msg)
    if held is BaseFormat.GPTQ and not model.gptq:
        msg = (
            "method.baseWeights.format is GPTQ, but the model is not quantized. "
            "Give a GPTQ model of 4 bits, or set the format to NF4: the model is quantized in training then."
        )
        raise InvalidModel(msg)


# How the base is held, and what is computed in


def resolve_base_format(config: JobConfig) -> BaseFormat:
    """How the base is held: NF4 for QLoRA; else BF16 on a GPU and FP32 on CPU; for Full FP32, which AdamW needs."""
    weights, kind = config.method.base_weights if config.method else None, config.method_type
    asked = weights.format if weights else None
    if asked is BaseFormat.FP16 and config.gpus_per_node == 0:
        msg = "method.baseWeights.format FP16 needs a GPU, parallelism.gpusPerNode is 0. Set it to FP32 or BF16."
        raise InvalidConfig(msg)
    if asked is not None:
        return asked
    if kind is MethodType.QLORA:
        return FORMATS[kind][0]
    return BaseFormat.FP32 if kind is MethodType.FULL or config.gpus_per_node == 0 else BaseFormat.BF16


def resolve_compute_dtype(config: JobConfig) -> str:
    """The dtype of the base where it is of 16 bits; else FP32 on CPU, BF16 on a GPU.

    Prepare holds no GPU, so it cannot see one without bf16; there the train stage takes FP16 where BF16 stands.
    """
    asked = or_default(config.method.compute_dtype if config.method else None, ComputeDtype.AUTO)
    held, on_cpu = resolve_base_format(config), config.gpus_per_node == 0
    if asked is ComputeDtype.FP16 and on_cpu:
        msg = (
            "method.computeDtype FP16 needs a GPU, parallelism.gpusPerNode is 0. Leave computeDtype unset, or set FP32."
        )
        raise InvalidConfig(msg)
    if asked is ComputeDtype.FP32 and held in (BaseFormat.BF16, BaseFormat.FP16):
        msg = (
            f"method.computeDtype FP32 does not go with a base that is held in {held}, whose products are of 16 bits. "
            "Set method.baseWeights.format to FP32 as well, or leave computeDtype unset."
        )
        raise InvalidConfig(msg)
    if asked is not ComputeDtype.AUTO:
        return asked.value
    if held in (BaseFormat.BF16, BaseFormat.FP16):
        return held.value
    return (ComputeDtype.FP32 if on_cpu else ComputeDtype.BF16).value


def resolve_attention(config: JobConfig) -> Attention:
    """As asked for; Auto is settled where the model is loaded, which sees the GPU and its libraries."""
    asked = or_default(config.model.attention, Attention.AUTO)
    if asked is not Attention.FLASH_ATTENTION_2:
        return asked
    if config.gpus_per_node == 0:
        msg = "model.attention FlashAttention2 needs a GPU, parallelism.gpusPerNode is 0. Leave it unset, or set SDPA."
        raise InvalidConfig(msg)
    if resolve_compute_dtype(config) == ComputeDtype.FP32:
        msg = "model.attention FlashAttention2 computes in 16 bits, method.computeDtype is FP32. Set attention to SDPA."
        raise InvalidConfig(msg)
    return asked


def resolve_gradient_checkpointing(config: JobConfig) -> GradientCheckpointing:
    """Full on a GPU, where memory is short; off on CPU, where time is."""
    asked = or_default(config.training.gradient_checkpointing if config.training else None, GradientCheckpointing.AUTO)
    if asked is not GradientCheckpointing.AUTO:
        return asked
    return GradientCheckpointing.FULL if config.gpus_per_node else GradientCheckpointing.OFF


# What moves the weights


def resolve_optimizer(config: JobConfig) -> Optimizer:
    """AdamW unless set; GaLore is AdamW on projected gradients."""
    asked = config.training.optimizer if config.training else None
    if config.method_type is MethodType.GALORE and asked not in (None, Optimizer.ADAMW):
        msg = f"training.optimizer {asked} does not go with GaLore, which is AdamW itself. Leave it unset."
        raise InvalidConfig(msg)
    return or_default(asked, Optimizer.ADAMW)


def resolve_galore(config: JobConfig, model: ModelFacts) -> ResolvedGaLore | None:
    """The projection of GaLore; its rank is below that of the largest layer, or nothing would be projected."""
    if config.method_type is not MethodType.GALORE:
        return None
    asked = (config.method.galore if config.method else None) or GaLore()
    largest = max(_ranks(model, model.linear_layers), default=0)
    if not largest:
        msg = f"method.type GaLore: {model.architecture} has no linear layers to project. Use method.type Full."
        raise InvalidConfig(msg)
    if asked.rank is not None and asked.rank > largest:
        msg = (
            f"method.galore.rank is {asked.rank:,}, no layer of {model.architecture} has more than {largest:,}. "
            f"Set it to {largest:,} or less, a quarter of it to save memory; or use method.type Full."
        )
        raise InvalidConfig(msg)
    return ResolvedGaLore(
        rank=or_default(asked.rank, min(DEFAULT_GALORE_RANK, largest)),
        update_interval=or_default(asked.update_interval, 200),
        scale=or_default(asked.scale, 0.25),
    )


def _ranks(model: ModelFacts, layers: Iterable[str]) -> list[int]:
    """The smaller side of each layer: no matrix of its shape has a higher rank."""
    return [min(model.linear_layers[name], model.linear_rows.get(name, model.linear_layers[name])) for name in layers]


# Adapters


def resolve_lora(config: JobConfig, model: ModelFacts) -> ResolvedLora | None:
    """The adapter; None where the model itself is trained."""
    if not config.trains_adapter:
        return None
    asked = (config.method.lora if config.method else None) or Lora()
    lora = _new_adapter(asked, model) if model.adapter is None else _known_adapter(asked, model.adapter)
    _check_variants(lora, config, model)
    _check_saved_modules(lora, config, model)
    return lora


def _new_adapter(asked: Lora, model: ModelFacts) -> ResolvedLora:
    rank, targets = or_default(asked.r, DEFAULT_RANK), _target_modules(asked, model)
    _check_rank(rank, targets, model)
    return ResolvedLora(
        r=rank,
        alpha=or_default(asked.alpha, 2 * rank),
        dropout=or_default(asked.dropout, 0.0),
        target_modules=targets,
        target_parameters=_target_parameters(asked, model),
        exclude_modules=_excluded(asked, model),
        modules_to_save=_known_names("modulesToSave", asked.modules_to_save or (), model.modules, model),
        bias=or_default(asked.bias, LoraBias.NONE).value,
        use_rslora=or_default(asked.use_rslora, False),
        use_dora=or_default(asked.use_dora, False),
        init_lora_weights=or_default(asked.init_lora_weights, LoraInit.DEFAULT).value,
    )


def _known_adapter(asked: Lora, settings: dict[str, Any]) -> ResolvedLora:
    """The settings of the adapter that is gone on from. InvalidConfig where method.lora says otherwise."""
    if (start := settings.get("init_lora_weights", True)) not in STARTS.values():
        msg = (
            f"model.adapter began as '{start}' (adapter_config.json), which changed weights of the base that are not "
            "in its files. Convert it to plain LoRA with PEFT (path_initial_model_for_weight_conversion) first."
        )
        raise InvalidModel(msg)
    own = ResolvedLora(
        r=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings.get("lora_dropout") or 0.0,
        target_modules=_names(settings.get("target_modules")),
        target_parameters=_names(settings.get("target_parameters")),
        exclude_modules=_names(settings.get("exclude_modules")),
        modules_to_save=_names(settings.get("modules_to_save")),
        bias=next(str(ours) for ours, peft in BIASES.items() if peft == (settings.get("bias") or "none")),
        use_rslora=bool(settings.get("use_rslora")),
        use_dora=bool(settings.get("use_dora")),
    )
    for name in asked.model_fields_set:
        wanted, there = getattr(asked, name), getattr(own, name)
        if wanted is not None and _comparable(wanted) != _comparable(there):
            field = Lora.model_fields[name].alias or name
            msg = f"method.lora.{field} is {_shown(wanted)}, the adapter of model.adapter has {_shown(there)}. "
            raise InvalidConfig(msg + f"Drop {field}: the adapter's own settings hold; or drop model.adapter.")
    return own


def _names(value: str | list[str] | None) -> tuple[str, ...]:
    """Names as PEFT writes them: a list, or one pattern."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(sorted(value))


def _comparable(value: Any) -> Any:  # noqa: ANN401 - any setting
    return set(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:  # noqa: ANN401 - any setting
    return ", ".join(value) or "none" if isinstance(value, tuple) else str(value)


def _target_modules(asked: Lora, model: ModelFacts) -> tuple[str, ...]:
    """Names of the layers to adapt, as PEFT takes them: last parts of names, or longer ends of them."""
    if not model.linear_layers:
        msg = f"{model.architecture} has no linear layers that an adapter could be put on. Use another model."
        raise InvalidConfig(msg)
    names = asked.target_modules
    if names is None and asked.target_parameters is not None:
        return ()
    if names in (None, (ALL_LINEAR,)):
        return tuple(name for name in model.linear_names if name not in model.taken_for_experts)
    known = _known_names("targetModules", names or (), model.linear_layers, model)
    for name in known:
        if name.rpartition(".")[2] in model.taken_for_experts:
            experts = ", ".join(model.expert_names)
            msg = f"method.lora.targetModules: PEFT takes '{name}' of {model.architecture} for its fused experts. "
            raise InvalidConfig(msg + f"Leave it out, and set targetParameters to adapt the experts ({experts}).")
    return known


def _target_parameters(asked: Lora, model: ModelFacts) -> tuple[str, ...]:
    """Fused experts are adapted with all linear layers: frozen, most of the model would not learn."""
    if asked.target_parameters is not None:
        return _known_names("targetParameters", asked.target_parameters, model.experts, model)
    if asked.target_modules not in (None, (ALL_LINEAR,)):
        return ()
    return model.expert_names


def _excluded(asked: Lora, model: ModelFacts) -> tuple[str, ...]:
    names = _known_names("excludeModules", asked.exclude_modules or (), model.linear_layers, model)
    targets = _target_modules(asked, model)
    if targets and all(matches(layer, names) for layer in model.linear_layers if matches(layer, targets)):
        msg = "method.lora.excludeModules leaves no layer to adapt. Exclude fewer, or name others in targetModules."
        raise InvalidConfig(msg)
    return names


def matches(layer: str, names: Iterable[str]) -> bool:
    """Whether a full name is, or ends in, one of the names."""
    return any(layer == name or layer.endswith("." + name) for name in names)


def _known_names(field: str, names: tuple[str, ...], there: Iterable[str], model: ModelFacts) -> tuple[str, ...]:
    """The names, each once. InvalidConfig if one of them is nowhere in the model."""
    known = tuple(there)
    ends = tuple(dict.fromkeys(full.rpartition(".")[2] for full in known))
    shown = model.expert_names if field == "targetParameters" else ends
    choice = first_of(shown, LAYER_NAMES_SHOWN)
    way_out = f"Use some of {choice}, or leave {field} unset." if shown else f"Leave {field} unset."
    for name in names:
        if not _matches_any(known, name):
            msg = f"method.lora.{field}: {model.architecture} has no {KINDS[field]} '{name}'. {way_out}"
            raise InvalidConfig(msg)
    return tuple(dict.fromkeys(names))


def _matches_any(known: Iterable[str], name: str) -> bool:
    return any(matches(full, (name,)) for full in known)


def _check_rank(rank: int, targets: tuple[str, ...], model: ModelFacts) -> None:
    """A rank above that of every adapted layer adds weights and no freedom."""
    largest = max(_ranks(model, (name for name in model.linear_layers if matches(name, targets))), default=rank)
    if rank > largest:
        msg = f"method.lora.r is {rank:,}, no adapted layer has a rank above {largest:,}. "
        raise InvalidConfig(msg + f"Set it to {largest:,} or less, or use method.type Full.")


def _check_variants(lora: ResolvedLora, config: JobConfig, model: ModelFacts) -> None:
    """What PEFT 0.21 cannot do on this base or on these parameters."""
    held = resolve_base_format(config)
    with_experts = "experts in one piece (targetParameters)"
    experts_way_out = "or name targetModules, which leaves the experts as they are"
    refusals = (
        (
            lora.use_dora and held in (BaseFormat.GPTQ, *EIGHT_BIT),
            "useDora",
            f"a base held in {held}",
            "drop it, or use NF4 or BF16",
        ),
        (
            lora.bias != LoraBias.NONE and held is BaseFormat.GPTQ,
            "bias",
            "a GPTQ base, whose biases are packed with its weights",
            "drop it, or use NF4",
        ),
        (
            lora.bias != LoraBias.NONE and not model.has_biases,
            "bias",
            f"{model.architecture}, which has no biases",
            "drop it",
        ),
        (
            lora.bias != LoraBias.NONE and config.objective_type is ObjectiveType.DPO,
            "bias",
            "DPO, whose reference is the model without its adapter",
            "drop it",
        ),
        (
            lora.init_lora_weights == LoraInit.ORTHOGONAL and held not in FLOATING,
            "initLoraWeights Orthogonal",
            f"a base held in {held}",
            "drop it, or use method.type LoRA with BF16",
        ),
        (
            lora.init_lora_weights == LoraInit.ORTHOGONAL and lora.r % 2 == 1,
            "initLoraWeights Orthogonal",
            f"an odd rank ({lora.r})",
            "set method.lora.r to an even number",
        ),
        (bool(lora.target_parameters) and lora.dropout > 0, "dropout", with_experts, f"set it to 0, {experts_way_out}"),
        (bool(lora.target_parameters) and lora.use_dora, "useDora", with_experts, f"drop it, {experts_way_out}"),
        (
            bool(lora.target_parameters) and lora.init_lora_weights == LoraInit.ORTHOGONAL,
            "initLoraWeights Orthogonal",
            with_experts,
            f"drop it, {experts_way_out}",
        ),
    )
    for refused, field, what, way_out in refusals:
        if refused:
            msg = f"method.lora.{field} does not go with {what}: {way_out}."
            raise InvalidConfig(msg)


def _check_saved_modules(lora: ResolvedLora, config: JobConfig, model: ModelFacts) -> None:
    """ModulesToSave are copies that train: not of quantized layers, nor of a head that is the embeddings."""
    held = resolve_base_format(config)
    for name in lora.modules_to_save:
        if held not in FLOATING and _matches_any(model.linear_layers, name):
            msg = (
                f"method.lora.modulesToSave: '{name}' is held in {held} and cannot be trained whole. "
                "Adapt it (targetModules), or use method.type LoRA with baseWeights.format BF16."
            )
            raise InvalidConfig(msg)
        if model.tied and model.head is not None and matches(model.head, (name,)):
            msg = (
                f"method.lora.modulesToSave: '{name}' of {model.architecture} is tied to its embeddings. "
                f"Name {model.embeddings.rpartition('.')[2]} instead: both train then."
            )
            raise InvalidConfig(msg)


def check_added_tokens(config: JobConfig, model: ModelFacts, added_tokens: tuple[int, ...]) -> None:
    """Tokens are added with a new adapter, or are those that a known one has trained. InvalidConfig."""
    if model.adapter is None or not config.trains_adapter:
        return
    known = model.adapter.get("trainable_token_indices") or {}
    rows = known if isinstance(known, list) else [row for ids in known.values() for row in ids]
    if set(rows) != set(added_tokens):
        there = f"has trained {len(set(rows))} new tokens" if rows else "has trained no new tokens"
        msg = f"model.tokens.add has {len(added_tokens)} new tokens, the adapter of model.adapter {there}. "
        raise InvalidConfig(msg + "Add the tokens that it was trained with, or drop model.adapter.")


def remedy_for_lost_numbers(resolved: Resolved, *, in_fp16: bool) -> str:
    """What to change where the loss is no number, or 0. `in_fp16`: so it is computed, also for want of bf16."""
    remedies = ["Lower training.learningRate"]
    if resolved.galore is not None:
        remedies.append("lower method.galore.scale")
    held_in_16_bits = resolved.base_format in (BaseFormat.BF16, BaseFormat.FP16)
    fields = "method.baseWeights.format and method.computeDtype" if held_in_16_bits else "method.computeDtype"
    if in_fp16 and resolved.compute_dtype == ComputeDtype.FP16:
        remedies.append(f"set {fields} to BF16")
    elif in_fp16 or resolved.compute_dtype == ComputeDtype.BF16:
        remedies.append(f"set {fields} to FP32")
    return ", or ".join(remedies)
