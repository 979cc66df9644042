"""The report: after each stage all that is known, in a page that no data can break into, and manifests that serve."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from html import unescape
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from finetune_trainer.config import CLAIM_VARIABLE, JOB_VARIABLE, JobConfig
from finetune_trainer.progress import DataFacts, DatasetFacts, Measured, Published, ResolvedLora, Stage, TrainFacts
from finetune_trainer.reporting import serving
from finetune_trainer.reporting.charts import Series, line_chart, round_ticks
from finetune_trainer.reporting.collect import collect, read_history, read_runs, shortened, thinned, with_run
from finetune_trainer.reporting.html import Html, escape, tag
from finetune_trainer.reporting.page import build_page
from finetune_trainer.reporting.record import (
    Gate,
    History,
    JobReport,
    Machine,
    MadeArtifact,
    Origin,
    Part,
    PreviewRow,
    PublishedPlace,
    Sample,
    Serving,
    StageRun,
)
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.manifest import CalibrationFacts, Made, Result, Target
from finetune_trainer.runtime.work import WorkFolder
from finetune_trainer.training.start import Start, StartPart
from tests.unit.trainer.runs import LINEAR, SETTINGS, replace_settings

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.trainer.conftest import Desk

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LORA = ResolvedLora(r=16, alpha=32, dropout=0.0, target_modules=LINEAR)
HOSTILE = "</pre><script>alert('x')</script><img src=x onerror=alert(1)>\"'&\u202e\x00\ud800"


def make_report(text: str = "plain") -> JobReport:
    """A report in which every text that comes from outside is this one."""
    machine = Machine(system="Linux x86_64", cores=2, memory_bytes=1 << 34, gpus=(text,))
    run = StageRun(
        stage=Stage.TRAIN,
        attempt=1,
        message=text,
        digest="sha256:1",
        finished_at=NOW,
        seconds=61.5,
        peak_memory_bytes=3 << 30,
        machine=machine,
        libraries={"torch": "2.13.0"},
    )
    measured = Measured(eval_loss=1.5, eval_loss_base=2.0, perplexity=4.4817, kl_divergence=1e-4, top1_agreement=0.99)
    artifact = MadeArtifact(
        name=text,
        type="Merged",
        path="merged",
        size_bytes=270_000_000,
        digest="sha256:2",
        measured=measured,
        files=9,
        made_from={"model": "sha256:3"},
        calibration=CalibrationFacts(rows=256, of_rows=1414, seed=42, max_length=1024, tokens=9876),
    )
    lines = tuple(
        {"step": step, "loss": 3 / step, "learning_rate": 1e-4, "tokens_per_second": 100.0 * step} for step in (1, 2, 4)
    )
    counts = {"train_rows": 90, "eval_rows": 10, "dropped_rows": 1, "truncated_rows": 0, "train_tokens": 5000}
    return JobReport(
        job=text,
        resource=f"team-a/{text}",
        written_at=NOW,
        stages=(run,),
        origins=(Origin(field="model", kind="huggingFace", place=text, revision=text),),
        settings=SETTINGS.model_copy(update={"architecture": text}),
        data=DataFacts(
            **counts,
            loss_tokens=2000,
            length_p50=50,
            length_p95=80,
            length_p99=90,
            length_max=99,
            datasets=(DatasetFacts(name=text, **counts),),
        ),
        data_digest="sha256:4",
        training=TrainFacts(steps=8, epochs=1.0, trainable_parameters=10, total_parameters=100),
        start=Start(attempt=1, seconds=61.25, parts=(StartPart(activity=text, seconds=61.25),)),
        history=History(training=lines, measured=({"step": 4, "eval_loss": 1.5},), lines=4),
        artifacts=(artifact,),
        gates=(
            Gate(artifact=text, field="merge.maxKLDivergence", limit=0.002, measured=1e-4, passed=True),
            Gate(artifact=text, field="quantize[0].maxPerplexityIncreasePercent", limit=5.0),
        ),
        published=(
            PublishedPlace(
                name=text, artifact=text, uri=text, digest="sha256:5", size_bytes=9, endpoint="//minio.test:9000"
            ),
        ),
        samples=(Sample(prompt=text, before=text, after=text, expected=text),),
        preview=(PreviewRow(tokens=9, loss_tokens=4, parts=(Part(text=text, learned=True),), rejected=()),),
        serving=(Serving(artifact=text, server="vLLM", refusal=text),),
    )


class Elements(HTMLParser):
    """What a browser makes of a page: elements, their attributes, the text outside of style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes.update(name for name, _ in attrs)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# The page


def test_no_text_of_a_job_becomes_an_element_of_the_page() -> None:
    plain, hostile = Elements(build_page(make_report())), Elements(build_page(make_report(HOSTILE)))
    assert hostile.names == plain.names
    assert hostile.attributes == plain.attributes
    assert not {"script", "img", "link", "iframe", "a", "form"} & hostile.names
    assert hostile.links == []
    build_page(make_report(HOSTILE)).encode()


def test_hostile_text_is_shown_as_it_is() -> None:
    texts = "".join(Elements(build_page(make_report(HOSTILE))).texts)
    assert texts.count("<script>alert('x')</script>") > 10, "every place that shows a text"


def test_the_page_needs_nothing_but_itself() -> None:
    page = build_page(make_report())
    assert "default-src 'none'" in unescape(page)
    for outside in ("http:", "https:", "url(", "@import", "src="):
        assert outside not in page, outside


def test_the_same_report_gives_the_same_page() -> None:
    assert build_page(make_report()) == build_page(make_report())


def test_the_page_tells_losses_figures_and_lineage() -> None:
    texts = " ".join(Elements(build_page(make_report())).texts)
    for told in ("1.5000", "2.0000 before training", "99.00%", "61.5 s", "257.5 MiB", "sha256:3", "Learning rate"):
        assert told in texts, told


@pytest.mark.parametrize(
    "told",
    [
        pytest.param("team-a/plain", id="namespace and name of the job"),
        pytest.param(
            "Held-out loss of plain 1.5000 2.0000 before training, on 10 held-out rows", id="whose loss, on what"
        ),
        pytest.param("plain merge.maxKLDivergence passed 0.0001 0.002", id="a gate with figure and limit"),
        pytest.param("plain quantize[0].maxPerplexityIncreasePercent not judged 5", id="a gate of what is not there"),
        pytest.param("plain drawn from 1,414 training rows with seed 42 256 1,024 9,876", id="calibration"),
        pytest.param("plain //minio.test:9000 9 bytes", id="the service of a bucket"),
        pytest.param("plain 61.2 s together 61.2 s", id="what the start took"),
        pytest.param("rows sha256:0", id="the digest of the rows"),
        pytest.param("data sha256:4 rows (sha256:0)", id="the digest of data, which has them"),
    ],
)
def test_the_page_says(told: str) -> None:
    assert told in " ".join(Elements(build_page(make_report())).texts)


def test_an_empty_job_has_a_page() -> None:
    report = JobReport(job="new", written_at=NOW, stages=(), origins=())
    assert "<h1>new</h1>" in build_page(report)


def test_only_text_marked_as_html_is_not_escaped() -> None:
    assert tag("p", "<b>", Html("<i></i>"), class_='"') == '<p class="&quot;">&lt;b&gt;<i></i></p>'
    assert escape("a\u202eb\x07\n") == "a\ufffdb\ufffd\n"


# Charts


@pytest.mark.parametrize(
    ("numbers", "ticks"),
    [
        pytest.param([0.9, 3.1], [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5], id="losses"),
        pytest.param([2.0, 2.0], [1.8, 1.9, 2.0, 2.1, 2.2], id="one value stands in the middle"),
        pytest.param([0.0], [-1.0, -0.5, 0.0, 0.5, 1.0], id="zero"),
        pytest.param([1e-5, 2e-4], [0.0, 5e-5, 1e-4, 1.5e-4, 2e-4], id="learning rates"),
    ],
)
def test_ticks_are_round_and_hold_all_numbers(numbers: list[float], ticks: list[float]) -> None:
    assert round_ticks(numbers) == ticks


def test_a_chart_has_a_line_a_series_and_is_told_in_words() -> None:
    series = [
        Series("training", ((1, 3.0), (2, 2.0))),
        Series("held out", ((2, 2.5),), marked=True),
        Series("none", ()),
    ]
    chart = line_chart("Loss", series, lambda value: f"{value:.1f}")
    assert chart.count("<path") == 1
    assert chart.count("<circle") == 1, "one point is a dot"
    assert "training from 3.0 at step 1 to 2.0 at step 2; held out from 2.5 at step 2 to 2.5 at step 2" in chart
    assert line_chart("Nothing", [Series("none", ())], str) == ""


# What is collected


def test_a_history_is_thinned_and_keeps_its_ends(tmp_path: Path) -> None:
    path = tmp_path / "training.jsonl"
    lines: list[dict[str, float]] = [{"step": step, "loss": 1.0} for step in range(1, 2001)]
    lines.append({"step": 2000, "eval_loss": 0.5})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2001, "lo')
    history = read_history(path)
    assert history is not None
    assert (len(history.training), history.lines) == (500, 2001)
    assert (history.training[0]["step"], history.training[-1]["step"]) == (1, 2000)
    assert history.measured == ({"step": 2000, "eval_loss": 0.5},)
    assert read_history(tmp_path / "none.jsonl") is None


def test_few_items_are_all_kept() -> None:
    assert thinned([1, 2, 3]) == [1, 2, 3]
    assert thinned(list(range(10)), 3) == [0, 4, 9]
    assert shortened("abcd", 3) == "abc\u2026"


def test_a_stage_that_was_done_already_keeps_the_run_that_did_it() -> None:
    (first,) = make_report().stages
    again = first.model_copy(update={"attempt": 2, "seconds": 0.1})
    assert with_run([first], again) == [first]
    made_anew = again.model_copy(update={"digest": "sha256:other"})
    assert with_run([first], made_anew) == [made_anew]
    other = made_anew.model_copy(update={"stage": Stage.QUANTIZE, "name": "awq4"})
    assert with_run([first], other) == [first, other]


def test_a_damaged_report_is_begun_anew(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"version": 1, "stages": 7}')
    assert read_runs(tmp_path) == ()


def test_files_of_an_older_trainer_are_left_out(tmp_path: Path, config: dict[str, Any]) -> None:
    report = tmp_path / "report"
    report.mkdir()
    (report / "preview.jsonl").write_text('{"text": "a", "tokens": 1, "lossTokens": 1}\n')
    (report / "samples.json").write_text('[{"prompt": "a"}]')
    found = collect(JobConfig.model_validate(config), WorkFolder(tmp_path), (), NOW)
    assert (found.preview, found.samples, found.settings, found.artifacts) == ((), (), None, ())


def test_it_is_told_where_artifacts_went(tmp_path: Path, config: dict[str, Any]) -> None:
    service = {"endpoint": "https://minio.test/", "credentialsSecretRef": {"name": "s3"}}
    entries = [
        {"name": name, "artifact": "Merged", "s3": {"uri": f"s3://models/{name}", **service}}
        for name in ("here", "later")
    ]
    config["output"] = {"publish": entries}
    work = WorkFolder(tmp_path)
    went = Published(name="here", artifact="merged", uri="s3://models/here", digest="sha256:5", size_bytes=9)
    target = Target(Stage.PUBLISH, work.published("here"), "published/here", "sha256:0")
    manifest.publish(target, 1, lambda _: Result(message="Published.", published=went))
    (told,) = collect(JobConfig.model_validate(config), work, (), NOW).published
    assert told == PublishedPlace(**dict(went), endpoint="https://minio.test")


FIGURES = Measured(kl_divergence=0.01, loss_increase=-0.2)


@pytest.mark.parametrize(
    ("held", "base", "gates"),
    [
        pytest.param(
            "NF4", "Dequantized", {"maxKLDivergence": (0.01, False), "maxLossIncrease": (None, None)}, id="own"
        ),
        pytest.param("NF4", "Original", {"maxKLDivergence": (None, None), "maxLossIncrease": (-0.2, True)}, id="other"),
        pytest.param(
            "BF16", "Original", {"maxKLDivergence": (0.01, False), "maxLossIncrease": (-0.2, True)}, id="both"
        ),
        pytest.param("NF4", None, {"maxKLDivergence": (None, None), "maxLossIncrease": (None, None)}, id="not merged"),
    ],
)
def test_a_gate_has_the_figure_of_the_weights_that_it_is_for(
    held: str, base: str | None, gates: dict[str, Any], tmp_path: Path, config: dict[str, Any]
) -> None:
    config["merge"] = {"maxKLDivergence": 0.009, "maxLossIncrease": 0.1}
    work, settings = WorkFolder(tmp_path), replace_settings(SETTINGS, base_format=held)
    data = Target(Stage.PREPARE, work.data, "data", "sha256:0")
    manifest.publish(data, 1, lambda _: Result(message="Prepared.", resolved=settings))
    if base is not None:
        made = Made(name="merged", type="Merged", measured=FIGURES, base=base)
        target = Target(Stage.MERGE, work.merged, "merged", "sha256:0")
        manifest.publish(target, 1, lambda _: Result(message="Merged.", artifact=made))
    found = collect(JobConfig.model_validate(config), work, (), NOW).gates
    assert {each.field: (each.measured, each.passed) for each in found} == {
        f"merge.{name}": told for name, told in gates.items()
    }


def test_a_gate_of_a_quantized_form_is_told_with_the_rows_that_the_form_was_calibrated_on(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    config["quantize"] = [
        {"name": name, "method": "GPTQ", "maxPerplexityIncreasePercent": 5} for name in ("small", "later")
    ]
    facts = CalibrationFacts(rows=8, of_rows=32, seed=42, max_length=64, tokens=400)
    measured = Measured(perplexity_increase_percent=1.5)
    made = Made(name="small", type="Quantized", measured=measured, calibration=facts)
    work = WorkFolder(tmp_path)
    target = Target(Stage.QUANTIZE, work.quantized("small"), "quantized/small", "sha256:0")
    manifest.publish(target, 1, lambda _: Result(message="Quantized.", artifact=made))
    found = collect(JobConfig.model_validate(config), work, (), NOW)
    assert [(each.artifact, each.field, each.limit, each.measured, each.passed) for each in found.gates] == [
        ("small", "quantize[0].maxPerplexityIncreasePercent", 5.0, 1.5, True),
        ("later", "quantize[1].maxPerplexityIncreasePercent", 5.0, None, None),
    ]
    assert [each.calibration for each in found.artifacts] == [facts]


# Serving


POD = ("containers", "securityContext", "volumes")


def plan(root: Path, *, kind: str = "Merged", claim: str | None = "work", **settings: Any) -> list[serving.Plan]:
    """What is planned for an artifact of a job that was trained with these settings."""
    name, path = {
        "Merged": ("merged", "merged"),
        "Adapter": ("adapter", "adapter"),
        "Quantized": ("awq4", "quantized/awq4"),
    }[kind]
    for folder in ("model", path):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "config.json").write_text('{"dtype": "bfloat16", "max_position_embeddings": 4096}')
        (root / folder / "chat_template.jinja").write_text("{{ messages }}")
    report = make_report()
    artifact = report.artifacts[0].model_copy(update={"name": name, "path": path, "type": kind})
    chosen = replace_settings(SETTINGS, **({"lora": LORA} | settings))
    report = report.model_copy(update={"job": "Support_Bot-1a2b", "artifacts": (artifact,), "settings": chosen})
    return serving.plan_serving(report, root, claim)


def loaded(plans: list[serving.Plan]) -> dict[str, dict[str, Any]]:
    """The manifests by their kind."""
    return {each["kind"]: each for one in plans for each in yaml.safe_load_all(one.text or "")}


def pods(manifests: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        manifests["Deployment"]["spec"]["template"]["spec"],
        {name: manifests["InferenceService"]["spec"]["predictor"][name] for name in POD},
    ]


def test_a_merged_model_is_served_as_it_was_made(tmp_path: Path) -> None:
    plans = plan(tmp_path)
    assert [each.told.file for each in plans] == ["serve/merged-vllm.yaml", "serve/merged-kserve.yaml"]
    manifests = loaded(plans)
    assert sorted(manifests) == ["Deployment", "InferenceService", "Service"]
    assert "*id" not in (plans[0].text or ""), "people edit these"
    deployment, service = manifests["Deployment"], manifests["Service"]
    assert {each["metadata"]["name"] for each in manifests.values()} == {"support-bot-1a2b-merged"}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert labels == deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"]
    for pod in pods(manifests):
        (container,) = pod["containers"]
        assert container["command"] == ["vllm", "serve", "/job/merged"]
        assert container["args"] == [
            "--served-model-name=merged",
            "--dtype=bfloat16",
            "--max-model-len=4096",
            "--chat-template=/job/merged/chat_template.jinja",
            "--port=8000",
        ]
        _, _, version = container["image"].partition(":v")
        assert version.replace(".", "").isdigit(), "a version, not latest"
        assert container["readinessProbe"]["httpGet"]["port"] == service["spec"]["ports"][0]["targetPort"]
        assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "work", "readOnly": True}
        assert container["volumeMounts"][0]["subPath"] == "Support_Bot-1a2b"
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "1"}


@pytest.mark.parametrize("kind", ["Merged", "Adapter", "Quantized"])
def test_no_server_is_root_and_each_has_a_home_that_it_can_write_to(kind: str, tmp_path: Path) -> None:
    for pod in pods(loaded(plan(tmp_path, kind=kind))):
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        (home,) = [each["value"] for each in container["env"] if each["name"] == "HOME"]
        (scratch,) = [each["name"] for each in container["volumeMounts"] if each["mountPath"] == home]
        assert {"name": scratch, "emptyDir": {}} in pod["volumes"]


def test_a_manifest_without_a_claim_says_what_to_fill_in_and_cannot_be_applied(tmp_path: Path) -> None:
    plans = plan(tmp_path, claim=None)
    for pod in pods(loaded(plans)):
        claim = pod["volumes"][0]["persistentVolumeClaim"]["claimName"]
        assert claim != claim.lower(), "Kubernetes takes small letters only"
    assert "# FILL IN claimName" in (plans[0].text or "")


@pytest.mark.parametrize(
    ("settings", "options"),
    [
        pytest.param({}, ["--max-lora-rank=16", "--quantization=bitsandbytes"], id="NF4 is made as in training"),
        pytest.param({"base_format": "BF16", "compute_dtype": "BF16"}, ["--max-lora-rank=16"], id="16 bits"),
        pytest.param({"base_format": "GPTQ"}, ["--max-lora-rank=16"], id="GPTQ stands in the base's config"),
        pytest.param(
            {"lora": LORA.model_copy(update={"r": 33}), "base_format": "BF16"}, ["--max-lora-rank=64"], id="rank"
        ),
    ],
)
def test_an_adapter_is_served_on_the_base_that_it_was_trained_on(
    tmp_path: Path, settings: dict[str, Any], options: list[str]
) -> None:
    for pod in pods(loaded(plan(tmp_path, kind="Adapter", **settings))):
        (container,) = pod["containers"]
        assert container["command"] == ["vllm", "serve", "/job/model"]
        assert container["args"] == [
            "--served-model-name=base",
            "--dtype=bfloat16",
            "--max-model-len=4096",
            "--tokenizer=/job/adapter",
            "--chat-template=/job/adapter/chat_template.jinja",
            "--enable-lora",
            "--lora-modules=adapter=/job/adapter",
            *options,
            "--port=8000",
        ]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        pytest.param({"lora": LORA.model_copy(update={"use_dora": True})}, "DoRA", id="DoRA"),
        pytest.param({"added_tokens": (320,)}, "added tokens", id="added tokens"),
        pytest.param({"base_format": "FP4"}, "a base held in FP4", id="another model than was trained"),
        pytest.param({"double_quantization": False}, "NF4 without double quantization", id="other NF4"),
        pytest.param({"lora": LORA.model_copy(update={"r": 1024})}, "a rank above 512", id="rank"),
    ],
)
def test_an_adapter_that_vllm_cannot_serve_has_a_reason_and_no_manifest(
    tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    (only,) = plan(tmp_path, kind="Adapter", **settings)
    assert only.text is None
    assert told in (only.told.refusal or "")


def test_a_gguf_file_is_served_by_llama_cpp(tmp_path: Path) -> None:
    for folder in ("merged", "quantized/awq4"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "merged" / "config.json").write_text('{"max_position_embeddings": 2048}')
    (tmp_path / "quantized" / "awq4" / "model-Q8_0.gguf").write_bytes(b"GGUF")
    plans = plan(tmp_path, kind="Quantized")
    assert [each.told.file for each in plans] == ["serve/awq4-llamacpp.yaml", "serve/awq4-kserve.yaml"]
    for pod in pods(loaded(plans)):
        (container,) = pod["containers"]
        assert container["image"].partition(":server-b")[2].isdigit(), "a build, not the newest"
        assert container["command"] == ["/app/llama-server"]
        assert "--model=/job/quantized/awq4/model-Q8_0.gguf" in container["args"]
        assert "--ctx-size=2048" in container["args"]
        assert "limits" not in container["resources"], "no GPU"


def test_names_fit_kubernetes_and_keep_the_artifact() -> None:
    assert serving.dns_label("a" * 60, "awq4") == "a" * 45 + "-awq4"
    assert serving.dns_label("7up", "merged") == "model-7up-merged"
    assert serving.dns_label("My Work.dir", "merged") == "my-work-dir-merged"


# From the stages


def read(desk: Desk) -> JobReport:
    return JobReport.model_validate_json((desk.work / "report" / "report.json").read_bytes())


def timeless(report: JobReport) -> dict[str, Any]:
    """What must be the same whenever the job runs, and however fast."""
    plain = report.model_dump(mode="json", exclude={"written_at", "job"})
    for part in (plain["start"], *plain["start"]["parts"]) if plain["start"] else ():
        part.pop("seconds")
    for run in plain["stages"]:
        for name in ("finished_at", "seconds", "peak_memory_bytes", "peak_gpu_memory_bytes"):
            run.pop(name)
    for line in (plain["history"] or {}).get("training", ()):
        for name in ("tokens_per_second", "peak_memory_bytes"):
            line.pop(name)
    return plain


@pytest.fixture
def job(config: dict[str, Any]) -> dict[str, Any]:
    training = {"globalBatchSize": 8, "maxSteps": 4, "loggingSteps": 1, "learningRate": 0.01}
    return config | {"training": training, "evaluation": {"percent": 20}}


def test_each_stage_adds_what_it_knows(desk: Desk, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CLAIM_VARIABLE, "the-claim")
    monkeypatch.setenv(JOB_VARIABLE, "team-a/support-bot")
    folder = desk.work / "report"
    assert desk.run("prepare", job)[0] == 0
    first = read(desk)
    assert [run.stage for run in first.stages] == ["prepare"]
    assert (first.resource, first.job) == ("team-a/support-bot", desk.work.name)
    assert first.settings is not None
    assert first.data is not None
    assert first.data.train_rows == 32
    assert [(each.field, each.place) for each in first.origins] == [
        ("model", "models/tiny"),
        ("datasets[0]", "datasets/rows.jsonl"),
    ]
    assert "".join(part.text for part in first.preview[0].parts if part.learned).startswith("It is")
    assert first.artifacts == ()

    assert desk.run("train", job)[0] == 0
    second = read(desk)
    assert [run.stage for run in second.stages] == ["prepare", "train"]
    assert second.stages[0] == first.stages[0]
    assert second.history is not None
    assert [line["step"] for line in second.history.training] == [1, 2, 3, 4]
    assert {"loss", "learning_rate", "tokens_per_second", "peak_memory_bytes"} <= second.history.training[0].keys()
    assert second.history.measured[-1]["step"] == 4
    assert len(second.samples) == 4
    assert all(sample.expected is not None and sample.expected.startswith("It is") for sample in second.samples)
    (adapter,) = second.artifacts
    assert adapter.made_from == {"data": second.data_digest, "model": second.settings.model_digest}  # type: ignore[union-attr]

    assert desk.run("merge", job)[0] == 0
    third = read(desk)
    merged = third.artifacts[1]
    assert merged.measured is not None
    assert merged.measured.kl_divergence is not None
    assert merged.made_from["adapter"] == adapter.digest
    assert f"Merged into the {(merged.base or '').lower()} weights" in third.stages[-1].message
    assert {each.file for each in third.serving if each.artifact == "merged"} == {
        "serve/merged-vllm.yaml",
        "serve/merged-kserve.yaml",
    }
    text = (folder / "serve" / "merged-vllm.yaml").read_text()
    assert "claimName: the-claim" in text
    page = Elements((folder / "index.html").read_text())
    assert "Perplexity" in page.texts
    assert {path.name for path in folder.iterdir() if path.name.startswith(".")} == set(), "nothing half written"
    assert (folder / "index.html").stat().st_mode & 0o777 == 0o644


def test_the_same_job_has_the_same_report_but_for_times(desk: Desk, job: dict[str, Any]) -> None:
    reports = []
    for turn in range(2):
        for stage in ("prepare", "train"):
            assert desk.run(stage, job)[0] == 0
        reports.append(timeless(read(desk)))
        desk.work.rename(desk.root / f"turn-{turn}")
    assert reports[0] == reports[1]


def test_a_report_that_cannot_be_written_fails_no_stage(
    desk: Desk, job: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    (desk.work / "report" / "index.html").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        assert desk.run("prepare", job)[0] == 0
    assert (desk.work / "data" / "manifest.json").is_file()
    assert not (desk.work / "report" / "report.json").exists()


def test_an_attempt_that_was_overtaken_writes_no_report(
    desk: Desk, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert desk.run("prepare", job)[0] == 0
    before = (desk.work / "report" / "report.json").read_bytes()
    described = "finetune_trainer.reporting.machine.describe_machine"
    machine = make_report().stages[0].machine

    def overtaken() -> Machine:
        (desk.work / ".live-attempt").write_text("9\n")
        return machine

    monkeypatch.setattr(described, overtaken)
    assert desk.run("prepare", job)[0] == 0, "what it made is whole"
    assert (desk.work / "report" / "report.json").read_bytes() == before
