"""The model card: what people, and the hub, read of a model, written from the run itself. Pure.

The front matter is the hub's (https://huggingface.co/docs/hub/model-cards). No time in it: the same run writes the
same card, and a second publishing has nothing new.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from finetune_trainer.config import FOUR_BIT, PublishedArtifact
from finetune_trainer.publishing.licence import OTHER
from finetune_trainer.reporting.record import JobReport

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from finetune_trainer.progress import DatasetFacts, ResolvedQuantize
    from finetune_trainer.publishing.licence import Licence
    from finetune_trainer.reporting.record import MadeArtifact, Origin, StageRun

HUB = "huggingFace"
GGUF = "GGUF"
RELATIONS = {
    PublishedArtifact.ADAPTER: "adapter",
    PublishedArtifact.MERGED: "finetune",
    PublishedArtifact.QUANTIZED: "quantized",
}
"""What the hub calls it in the base's family tree."""
FIGURES = (
    ("Held-out loss", "eval_loss", "{:.4f}"),
    ("before training", "eval_loss_base", "{:.4f}"),
    ("Perplexity", "perplexity", "{:.3f}"),
    ("KL divergence", "kl_divergence", "{:.2e}"),
    ("Top-1 agreement", "top1_agreement", "{:.2%}"),
    ("Perplexity increase", "perplexity_increase_percent", "{:+.2f}%"),
    ("Preference accuracy", "preference_accuracy", "{:.2%}"),
)
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "gptqmodel")


@dataclass(frozen=True)
class Card:
    """What a card is written from."""

    artifact: PublishedArtifact
    path: str
    """The artifact's folder, relative to the work folder."""
    place: str
    """What to load it by: the repository's name, or a folder that it was fetched into."""
    report: JobReport
    licence: Licence
    quantized: ResolvedQuantize | None = None
    files: tuple[str, ...] = ()

    @property
    def base(self) -> Origin | None:
        """Where the base model came from."""
        return next((origin for origin in self.report.origins if origin.field == "model"), None)

    @property
    def base_name(self) -> str:
        """The base model, as one would ask for it."""
        return self.base.place if self.base else "the base model"


def title(card: Card) -> str:
    """What it is, in a few words."""
    method = card.report.settings.method if card.report.settings else "fine-tuning"
    what = {
        PublishedArtifact.ADAPTER: f"{method} adapter for",
        PublishedArtifact.MERGED: "Fine-tuned",
        PublishedArtifact.QUANTIZED: f"{card.quantized.method if card.quantized else 'Quantized'} form of fine-tuned",
    }[card.artifact]
    return f"{what} {card.base_name.rpartition('/')[2]}"


def build_card(card: Card) -> str:
    """README.md."""
    sections = (
        ("", [_introduction(card)]),
        ("How to load it", _loading(card)),
        ("Quality", _quality(card)),
        ("Data", _data(card)),
        ("Training", _training(card)),
        ("Made with", _machines(card.report.stages)),
        ("License", [_licence(card)]),
        ("Proof", [_proof()]),
    )
    body = "\n\n".join(
        "\n\n".join([*([f"## {head}"] if head else [f"# {title(card)}"]), *parts]) for head, parts in sections if parts
    )
    return f"---\n{front_matter(card)}---\n\n{body}\n"


def front_matter(card: Card) -> str:
    """What the hub reads, as YAML."""
    import yaml  # noqa: PLC0415 - only here

    settings, licence = card.report.settings, card.licence
    gguf = card.quantized is not None and card.quantized.method == GGUF
    told = {
        "base_model": card.base.place if card.base and card.base.kind == HUB else None,
        "base_model_relation": RELATIONS[card.artifact] if card.base and card.base.kind == HUB else None,
        "datasets": sorted({each.place for each in _datasets(card) if each.kind == HUB}),
        "library_name": "peft" if card.artifact is PublishedArtifact.ADAPTER else None if gguf else "transformers",
        "license": licence.identifier,
        "license_name": licence.name if licence.identifier == OTHER else None,
        "license_link": licence.link if licence.identifier == OTHER else None,
        "pipeline_tag": "text-generation",
        "tags": sorted(
            {"finetune-operator"}
            | ({settings.method.lower(), settings.objective.lower()} if settings else set())
            | ({card.quantized.method.lower()} if card.quantized else set())
            | ({f"{card.quantized.bits}-bit"} if card.quantized and card.quantized.bits else set())
        ),
    }
    return str(yaml.safe_dump({key: value for key, value in told.items() if value}, sort_keys=True, allow_unicode=True))


def _introduction(card: Card) -> str:
    base, settings = card.base, card.report.settings
    where = (
        f"[{base.place}](https://huggingface.co/{base.place})" if base and base.kind == HUB else f"`{card.base_name}`"
    )
    pinned = f" at `{base.revision}`" if base and base.revision else ""
    how = f", trained with {settings.method} ({settings.objective})" if settings else ""
    what = {
        PublishedArtifact.ADAPTER: "An adapter for",
        PublishedArtifact.MERGED: "A fine-tuned form of",
        PublishedArtifact.QUANTIZED: "A quantized form of the fine-tuned",
    }[card.artifact]
    return f"{what} {where}{pinned}{how}."


# How to load it


def _loading(card: Card) -> list[str]:
    if card.artifact is PublishedArtifact.ADAPTER:
        return [_code("python", _with_peft(card)), _code("sh", _adapter_with_vllm(card))]
    if card.quantized is not None and card.quantized.method == GGUF:
        file = next((name for name in card.files if name.endswith(".gguf")), "model.gguf")
        return [_code("sh", f"llama-server --model {file}")]
    return [_code("python", _with_transformers(card)), _code("sh", f"vllm serve {card.place}")]


def _with_peft(card: Card) -> str:
    """The base is named here: an adapter's own config says where it lay when it was trained."""
    settings, base = card.report.settings, card.base
    revision = f', revision="{base.revision}"' if base and base.kind == HUB and base.revision else ""
    four_bit = settings is not None and settings.base_format in FOUR_BIT
    quantized = ", quantization_config=bits" if four_bit else ""
    bits = (
        'bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="'
        f'{settings.base_format.lower()}", bnb_4bit_use_double_quant={settings.double_quantization})\n'
        if settings is not None and four_bit
        else ""
    )
    names = "AutoModelForCausalLM, AutoTokenizer" + (", BitsAndBytesConfig" if four_bit else "")
    return (
        f"from peft import PeftModel\nfrom transformers import {names}\n\n{bits}"
        f'base = AutoModelForCausalLM.from_pretrained("{card.base_name}"{revision}{quantized})\n'
        f'model = PeftModel.from_pretrained(base, "{card.place}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{card.place}")'
    )


def _adapter_with_vllm(card: Card) -> str:
    rank = card.report.settings.lora.r if card.report.settings and card.report.settings.lora else 16
    return f"vllm serve {card.base_name} --enable-lora --max-lora-rank {rank} --lora-modules tuned={card.place}"


def _with_transformers(card: Card) -> str:
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{card.place}", dtype="auto")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{card.place}")'
    )


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


# What is known of it


def _quality(card: Card) -> list[str]:
    """All artifacts of the run side by side, with the figures that any of them has."""
    made = [artifact for artifact in card.report.artifacts if artifact.measured is not None]
    heads = [each for each in FIGURES if any(_figure(artifact, each) for artifact in made)]
    if not heads:
        return []
    rows = [
        [
            f"**{artifact.path}**" if artifact.path == card.path else artifact.path,
            *(_figure(artifact, each) for each in heads),
        ]
        for artifact in made
    ]
    note = (
        "On rows that were held out from training. Losses and divergences in nats a token; divergence, agreement and "
        "increase against the model that each was made from. In bold: what is here."
    )
    return [note, _table(["Artifact", *(head for head, _, _ in heads)], rows)]


def _figure(artifact: MadeArtifact, figure: tuple[str, str, str]) -> str:
    value = getattr(artifact.measured, figure[1], None)
    return "" if value is None else figure[2].format(value)


def _datasets(card: Card) -> list[Origin]:
    return [origin for origin in card.report.origins if origin.field.startswith("datasets")]


def _data(card: Card) -> list[str]:
    facts = card.report.data
    counted = {each.name: each for each in facts.datasets} if facts else {}
    rows = [
        [f"`{each.place}`", each.revision or "", *_counts(counted.get(each.name or ""))] for each in _datasets(card)
    ]
    return [_table(["Dataset", "Commit", "Rows", "Held out", "Tokens"], rows)] if rows else []


def _counts(facts: DatasetFacts | None) -> list[str]:
    if facts is None:
        return ["", "", ""]
    return [f"{facts.train_rows:,}", f"{facts.eval_rows:,}", f"{facts.train_tokens:,}"]


def _training(card: Card) -> list[str]:
    return [_table(["Setting", "Value"], [[name, value] for name, value in _settings(card.report) if value])]


def _settings(report: JobReport) -> Iterator[tuple[str, str]]:
    settings, training = report.settings, report.training
    if settings is None:
        return
    products = ", products in FP8" if settings.fp8_products else ""
    held = f"base weights in {settings.base_format}, computed in {settings.compute_dtype}{products}"
    yield "Method", f"{settings.method}, {held}"
    yield "Objective", settings.objective
    if settings.lora is not None:
        yield "LoRA", f"r {settings.lora.r}, alpha {settings.lora.alpha}, dropout {settings.lora.dropout:g}"
        yield "Target modules", ", ".join((*settings.lora.target_modules, *settings.lora.target_parameters))
    if settings.galore is not None:
        yield "GaLore", f"rank {settings.galore.rank}, a new projection every {settings.galore.update_interval} steps"
    yield "Learning rate", f"{settings.learning_rate:g}, {settings.lr_scheduler}, {settings.warmup_steps} warm-up steps"
    yield "Optimizer", f"{settings.optimizer}, weight decay {settings.weight_decay:g}"
    yield "Batch", f"{settings.global_batch_size} rows a step, of at most {settings.max_length:,} tokens"
    if training is not None:
        yield "Steps", f"{training.steps:,} ({training.epochs:g} epochs)"
        yield "Trained parameters", f"{training.trainable_parameters:,} of {training.total_parameters:,}"
    yield "Seed", str(settings.seed)


def _machines(runs: Sequence[StageRun]) -> list[str]:
    rows = [
        [
            " ".join(filter(None, (run.stage.value, run.name))),
            _machine(run),
            ", ".join(f"{name} {run.libraries[name]}" for name in LIBRARIES if name in run.libraries),
        ]
        for run in runs
        if run.stage != "publish"
    ]
    return [_table(["Stage", "Machine", "Libraries"], rows)] if rows else []


def _machine(run: StageRun) -> str:
    gpus = run.machine.gpus
    return f"{len(gpus)} x {gpus[0]}" if gpus else f"{run.machine.cores} CPU cores, {run.machine.system}"


def _licence(card: Card) -> str:
    licence = card.licence
    texts = f" Its text is in {', '.join(path.name for path in licence.files)}." if licence.files else ""
    if licence.identifier is None:
        return f"That of the base model, `{card.base_name}`, which came without one: see where it is from."
    called = licence.name if licence.identifier == OTHER and licence.name else licence.identifier
    return f"That of the base model: {called}.{texts}"


def _proof() -> str:
    return (
        "`manifest.json` has the size and the SHA-256 of every file here, and the SHA-256 of the manifest of the "
        "artifact that they were copied from."
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
