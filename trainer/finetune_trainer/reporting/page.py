"""`report/index.html`: the report for people, one file that needs no other. Pure: the same report, the same bytes.

No script, no font, no picture from elsewhere: its own policy forbids them to the browser as well.
"""

from __future__ import annotations

from datetime import UTC
from itertools import chain
from typing import TYPE_CHECKING

from finetune_trainer.progress import Measured
from finetune_trainer.reporting.charts import Series, line_chart
from finetune_trainer.reporting.html import Html, pairs, table, tag
from finetune_trainer.reporting.style import STYLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime

    from finetune_trainer.progress import DataFacts, Resolved
    from finetune_trainer.reporting.charts import Point
    from finetune_trainer.reporting.record import (
        Gate,
        History,
        JobReport,
        MadeArtifact,
        Part,
        PreviewRow,
        PublishedPlace,
        Sample,
    )

PAGE_NAME = "index.html"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
SHORT_DIGEST = len("sha256:") + 12
TITLES = {
    "eval_loss": "Held-out loss",
    "eval_loss_base": "Before training",
    "perplexity": "Perplexity",
    "kl_divergence": "KL divergence",
    "top1_agreement": "Top-1 agreement",
    "perplexity_increase_percent": "Perplexity increase",
    "preference_accuracy": "Preference accuracy",
}
"""What figures of an artifact are called; others by their own names."""
PERCENT_OF_ONE = ("top1_agreement", "preference_accuracy")
FEW_POINTS = 60
GIB = 2**30


def build_page(report: JobReport) -> str:
    """The page."""
    sections = [
        _section(
            "Artifacts",
            _artifacts(report.artifacts),
            f"Measured on {_held_out(report)}. Losses and KL divergences "
            "are nats a token; an artifact is compared with what it was made from.",
        ),
        _section(
            "Gates",
            _gates(report.gates),
            "A gate judges its artifact when that is made; one of the merge judges those weights alone that it is for.",
        ),
        _section("Calibration", _calibration(report.artifacts), "The rows that a quantizer looked at."),
        _section("Published", _published(report.published), "Compared with what is there."),
        _section("Training", _charts(report)),
        _section("Start of the training", _start(report), "Of the last attempt, up to the end of its first step."),
        _section("GPU memory", _memory(report), "Of one GPU. Not all parts are held at the worst moment of a step."),
        _section("Answers before and after", _samples(report.samples), "To prompts of the held-out rows, greedily."),
        _section("Data", _data(report.data)),
        _section("Rows as trained on", _preview(report.preview), "Marked: what counts in the loss."),
        _section("Serving", _serving(report)),
        _section(
            "Lineage",
            _lineage(report),
            "A digest is that of the folder's manifest, which names every file with its own; that of rows is of the "
            "tokenized rows alone, which lie in data with the tokenizer and the settings.",
        ),
        _section("Settings", _settings(report)),
        _section("Stages", _stages(report)),
    ]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{_name(report)}: fine-tuning report"),
        tag("style", Html(STYLE)),
    )
    body = tag("body", _header(report), tag("main", *sections))
    return "<!DOCTYPE html>\n" + tag("html", head, body, lang="en") + "\n"


def _section(title: str, content: Html, note: str = "") -> Html:
    """A part of the page; empty where there is nothing to show yet."""
    if not content:
        return Html("")
    notes = (tag("p", note, class_="note"),) if note else ()
    return tag("section", tag("h2", title), *notes, content)


# The head


def _header(report: JobReport) -> Html:
    last = report.stages[-1:]
    told = (tag("p", run.message) for run in last)
    when = f"After {last[0].stage}, " if last else ""
    folder = f", folder {report.job}" if report.resource else ""
    tiles = tag("div", *(_tile(*each) for each in _headlines(report)), class_="tiles")
    return tag(
        "header",
        tag("h1", _name(report)),
        tag("p", f"{when}{_time(report.written_at)}{folder}", class_="note"),
        *told,
        tiles,
    )


def _name(report: JobReport) -> str:
    """The FineTuneJob, or the folder of a job that runs without one."""
    return report.resource or report.job


def _tile(name: str, value: str, note: str) -> Html:
    return tag("div", tag("span", name), tag("b", value), tag("small", note), class_="tile")


def _headlines(report: JobReport) -> Iterator[tuple[str, str, str]]:
    """What everybody looks for first: name, value, and what it is compared with."""
    settings, artifact = report.settings, _trained(report)
    if settings is not None:
        yield "Model", f"{settings.parameters:,}", f"parameters, {settings.architecture}"
        yield "Method", settings.method, f"{settings.objective}, base in {settings.base_format}"
    if report.data is not None:
        yield "Rows", f"{report.data.train_rows:,}", f"to train on, {report.data.eval_rows:,} held out"
    if report.training is not None:
        yield "Steps", f"{report.training.steps:,}", f"{report.training.epochs:.6g} epochs"
    if artifact is not None and (measured := artifact.measured) is not None and measured.eval_loss is not None:
        before = f"{measured.eval_loss_base:.4f} before training, on {_held_out(report)}"
        yield f"Held-out loss of {artifact.name}", f"{measured.eval_loss:.4f}", before


def _trained(report: JobReport) -> MadeArtifact | None:
    """The weights that training left, as they were measured: compared with those before it."""
    return next((each for each in report.artifacts if each.measured and each.measured.eval_loss_base), None)


def _held_out(report: JobReport) -> str:
    rows = "the" if report.data is None else f"{report.data.eval_rows:,}"
    return f"{rows} held-out rows"


# Artifacts


def _artifacts(artifacts: Sequence[MadeArtifact]) -> Html:
    if not artifacts:
        return Html("")
    figures = [name for name in Measured.model_fields if any(_figure(each, name) for each in artifacts)]
    rows = (
        [
            each.name,
            each.type,
            *(_figure(each, name) for name in figures),
            _bytes(each.size_bytes),
            _digest(each.digest),
        ]
        for each in artifacts
    )
    titles = [TITLES.get(name, _words(name)) for name in figures]
    return table(["Artifact", "Type", *titles, "Size", "Digest of its manifest"], rows, numbers=2)


def _figure(artifact: MadeArtifact, name: str) -> str:
    value = getattr(artifact.measured, name, None)
    if value is None:
        return ""
    if name in PERCENT_OF_ONE:
        return f"{value:.2%}"
    return f"{value:+.2f}%" if name.endswith("_percent") else _plain(value)


def _gates(gates: Sequence[Gate]) -> Html:
    if not gates:
        return Html("")
    verdicts = {True: "passed", False: "failed", None: "not judged"}
    rows = (
        [
            each.artifact,
            each.field,
            verdicts[each.passed],
            "" if each.measured is None else _plain(each.measured),
            _plain(each.limit),
        ]
        for each in gates
    )
    return table(["Artifact", "Gate", "Verdict", "Measured", "At most"], rows, numbers=3)


def _calibration(artifacts: Sequence[MadeArtifact]) -> Html:
    rows = [
        [each.name, f"drawn from {facts.of_rows:,} training rows with seed {facts.seed}"]
        + [_grouped(figure) for figure in (facts.rows, facts.max_length, facts.tokens)]
        for each in artifacts
        if (facts := each.calibration) is not None
    ]
    return (
        table(["Artifact", "Which rows", "Rows", "Tokens a row at most", "Tokens"], rows, numbers=2)
        if rows
        else Html("")
    )


def _published(entries: Sequence[PublishedPlace]) -> Html:
    if not entries:
        return Html("")
    rows = (
        [each.name, each.artifact, each.uri, each.endpoint or "", _bytes(each.size_bytes), _digest(each.digest)]
        for each in entries
    )
    return table(["Entry", "Artifact", "Place", "Service", "Size", "Digest of its manifest"], rows, numbers=4)


# Training


def _charts(report: JobReport) -> Html:
    history = report.history
    if history is None:
        return Html("")
    few = len(history.measured) <= FEW_POINTS
    trained = _trained(report)
    base = trained.measured.eval_loss_base if trained and trained.measured else None
    start = () if base is None else ((0.0, base),)
    losses = [
        Series("training", _points(history.training, "loss")),
        Series("held out", start + _points(history.measured, "eval_loss"), marked=few),
    ]
    charts = [line_chart("Loss", losses, _plain), *_single_charts(history)]
    return tag("div", *charts, class_="charts")


def _single_charts(history: History) -> Iterator[Html]:
    """Charts of one line each, as far as there are points."""
    rate, norm = _points(history.training, "learning_rate"), _points(history.training, "grad_norm")
    speed, memory = _points(history.training, "tokens_per_second"), _points(history.training, "peak_memory_bytes")
    accuracy = _points(history.measured, "eval_preference_accuracy")
    yield line_chart("Preference accuracy", [Series("held out", accuracy)], _percent)
    yield line_chart("Learning rate", [Series("last", rate)], _plain)
    yield line_chart("Tokens a second", [Series("last", speed)], _grouped, from_zero=True)
    gib = tuple((step, count / GIB) for step, count in memory)
    yield line_chart("Peak memory, GiB", [Series("last", gib)], _plain, from_zero=True)
    yield line_chart("Gradient norm", [Series("last", norm)], _plain)


def _points(lines: Iterable[Mapping[str, float]], name: str) -> tuple[Point, ...]:
    return tuple((line["step"], line[name]) for line in lines if name in line)


def _start(report: JobReport) -> Html:
    """What was done before the first step had ended, with its seconds."""
    if report.start is None:
        return Html("")
    told = {part.activity: part.seconds for part in report.start.parts} | {"together": report.start.seconds}
    return pairs((name, f"{seconds:,.1f} s") for name, seconds in told.items())


def _memory(report: JobReport) -> Html:
    """What was expected, part by part, and what the first steps took."""
    if report.estimate is None:
        return Html("")
    sizes = {name: size for name, size in report.estimate.model_dump().items() if name.endswith("_bytes") and size}
    told = {f"{_words(name.removesuffix('_bytes'))}, estimated": size for name, size in sizes.items()}
    if report.memory is not None:
        told["Peak of the first steps, estimated"] = report.memory.expected_bytes
        told["Peak of the first steps, measured"] = report.memory.measured_bytes
        told["Peak of the largest rows, by that"] = report.memory.peak_bytes
    return pairs((name, _bytes(size)) for name, size in told.items())


# Texts


def _samples(samples: Sequence[Sample]) -> Html:
    return Html("".join(_sample(sample) for sample in samples))


def _sample(sample: Sample) -> Html:
    answers = [("Before training", sample.before), ("After training", sample.after), ("In the data", sample.expected)]
    told = (tag("div", tag("h3", name), _text(text)) for name, text in answers if text is not None)
    return tag("article", tag("h3", "Prompt"), _text(sample.prompt), tag("div", *told, class_="answers"))


def _text(text: str) -> Html:
    return tag("pre", text or "(nothing)", dir="auto", tabindex="0")


def _preview(rows: Sequence[PreviewRow]) -> Html:
    return Html("".join(_row(row, index) for index, row in enumerate(rows, 1)))


def _row(row: PreviewRow, index: int) -> Html:
    title = f"Row {index}: {row.tokens:,} tokens, {row.loss_tokens:,} in the loss"
    other = (tag("h3", "The worse answer"), _masked(row.rejected)) if row.rejected else ()
    return tag("article", tag("h3", title), _masked(row.parts), *other)


def _masked(parts: Sequence[Part]) -> Html:
    return tag(
        "pre", *(tag("mark", part.text) if part.learned else part.text for part in parts), dir="auto", tabindex="0"
    )


# Data


def _data(data: DataFacts | None) -> Html:
    if data is None:
        return Html("")
    lengths = [
        ("p50", data.length_p50),
        ("p95", data.length_p95),
        ("p99", data.length_p99),
        ("longest", data.length_max),
    ]
    facts = pairs(
        [
            ("Rows to train on", _grouped(data.train_rows)),
            ("Rows held out", _grouped(data.eval_rows)),
            ("Rows dropped", _grouped(data.dropped_rows)),
            ("Rows cut", _grouped(data.truncated_rows)),
            ("Tokens", _grouped(data.train_tokens)),
            ("Tokens in the loss", f"{data.loss_tokens:,} ({data.loss_tokens / max(data.train_tokens, 1):.1%})"),
            *([] if data.packed_rows is None else [("Packed into sequences", _grouped(data.packed_rows))]),
        ]
    )
    rows = (
        [
            each.name,
            *map(
                _grouped, (each.train_rows, each.eval_rows, each.dropped_rows, each.truncated_rows, each.train_tokens)
            ),
        ]
        for each in data.datasets
    )
    head = ["Dataset", "Rows to train on", "Held out", "Dropped", "Cut", "Tokens"]
    return tag("div", tag("div", facts, _bars("Tokens a row", lengths), class_="side"), table(head, rows, numbers=1))


def _bars(title: str, values: Sequence[tuple[str, int]]) -> Html:
    """A number a line, as a bar of its share of the largest."""
    largest = max(1, *(value for _, value in values))
    rows = (
        tag(
            "tr",
            tag("th", name, scope="row"),
            tag("td", tag("meter", "", value=value, max=largest)),
            tag("td", _grouped(value), class_="figure"),
        )
        for name, value in values
    )
    return tag("div", tag("table", tag("caption", title), tag("tbody", *rows), class_="bars"), class_="wide")


# What came from where, and how


def _serving(report: JobReport) -> Html:
    rows = [
        [
            each.artifact,
            each.server,
            tag("code", f"kubectl apply -f report/{each.file}") if each.file else each.refusal or "",
        ]
        for each in report.serving
    ]
    return table(["Artifact", "Server", "How"], rows) if rows else Html("")


def _lineage(report: JobReport) -> Html:
    sources = [
        [each.field if each.name is None else f"{each.field} ({each.name})", each.kind, each.place, each.revision or ""]
        for each in report.origins
    ]
    return Html(
        table(["Source", "Kind", "Place", "Commit or digest"], sources)
        + table(["What", "Digest", "Made from"], _chain(report))
    )


def _chain(report: JobReport) -> Iterator[list[str]]:
    """What was made from what, from the base model on."""
    settings = report.settings
    if settings is not None:
        yield ["model", tag("code", settings.model_digest), ""]
        yield ["rows", tag("code", settings.data_digest), ""]
    if report.data_digest is not None:
        rows = {} if settings is None else {"rows": settings.data_digest}
        yield ["data", tag("code", report.data_digest), _above(rows)]
    for each in report.artifacts:
        yield [each.name, tag("code", each.digest), _above(each.made_from)]


def _above(digests: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({digest[:SHORT_DIGEST]})" for name, digest in sorted(digests.items()))


def _settings(report: JobReport) -> Html:
    return Html("") if report.settings is None else pairs(_flat(report.settings))


def _flat(record: Resolved) -> Iterator[tuple[str, str]]:
    """Every setting by the name it has in the resource, blocks joined by dots; digests are lineage."""
    lineage = {"model_digest", "data_digest"}
    for name, value in record.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=lineage).items():
        yield from _flattened(name, value)


def _flattened(name: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        yield from chain.from_iterable(_flattened(f"{name}.{key}", each) for key, each in value.items())
    elif isinstance(value, list) and any(isinstance(each, dict) for each in value):
        yield from chain.from_iterable(_flattened(f"{name}.{index}", each) for index, each in enumerate(value))
    elif isinstance(value, list):
        yield name, ", ".join(map(str, value)) or "none"
    else:
        yield name, _plain(value) if isinstance(value, float) else str(value)


def _stages(report: JobReport) -> Html:
    runs = report.stages
    if not runs:
        return Html("")
    rows = (
        [
            f"{run.stage} {run.name or ''}".strip(),
            run.message,
            ", ".join(run.machine.gpus) or f"CPU, {run.machine.cores} cores, {run.machine.system}",
            str(run.attempt),
            f"{run.seconds:,.1f} s",
            _bytes(run.peak_gpu_memory_bytes or run.peak_memory_bytes),
            _time(run.finished_at),
        ]
        for run in runs
    )
    head = ["Stage", "What it says", "Machine", "Attempt", "Time", "Peak memory", "Ended"]
    return Html(table(head, rows, numbers=3) + tag("h3", "Libraries") + _libraries(report))


def _libraries(report: JobReport) -> Html:
    """Versions; of a library that stages had in several versions all of them."""
    names = dict.fromkeys(name for run in report.stages for name in run.libraries)
    versions = {
        name: dict.fromkeys(run.libraries[name] for run in report.stages if name in run.libraries) for name in names
    }
    return pairs((name, ", ".join(found)) for name, found in versions.items())


# How values are written


def _plain(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _grouped(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.3g}"  # noqa: PLR2004 - where grouping begins


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:  # noqa: PLR2004 - the next unit
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:,.4g} GiB"


def _digest(digest: str) -> Html:
    return tag("code", digest[:SHORT_DIGEST], title=digest)


def _time(when: datetime) -> str:
    return f"{when.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()
