"""The model card: what it says of the run, and what the hub reads of it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.config import JobConfig, PublishedArtifact
from finetune_trainer.progress import ResolvedQuantize
from finetune_trainer.publishing.card import Card, build_card
from finetune_trainer.publishing.licence import Licence, find_licence, read_front_matter
from finetune_trainer.reporting.collect import collect
from finetune_trainer.runtime import manifest
from tests.unit.trainer.publishing.conftest import APACHE, Shop, make_job
from tests.unit.trainer.sources.standins import COMMIT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.unit.trainer.sources.servers import Registry


def card_of(shop: Shop, registry: Registry, artifact: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    place = {"oci": {"reference": registry.reference(f"cards/{artifact.lower()}:v1"), "plainHttp": True}}
    shop.publish({"name": "out", "artifact": artifact, **place, **fields})
    path = shop.work.published("out") / "README.md"
    return path.read_text(), read_front_matter(path)


def test_the_hub_reads_base_licence_data_and_kind(shop: Shop, registry: Registry) -> None:
    text, told = card_of(shop, registry, "Adapter")
    assert told == {
        "base_model": "acme/base",
        "base_model_relation": "adapter",
        "datasets": ["acme/rows"],
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["finetune-operator", "qlora", "sft"],
    }
    assert f"[acme/base](https://huggingface.co/acme/base) at `{COMMIT}`" in text


def test_people_read_how_it_was_made_and_how_good_all_artifacts_are(shop: Shop, registry: Registry) -> None:
    text, told = card_of(shop, registry, "Quantized", quantizeName="gptq4")
    assert told["base_model_relation"] == "quantized"
    assert {"4-bit", "gptq"} <= set(told["tags"])
    assert "| adapter | 1.5000 | 2.5000 | 4.482 |" in text
    assert "| **quantized/gptq4** | 1.5010 |" in text
    assert f"| `acme/rows` | {COMMIT} | 90 | 10 | 9,000 |" in text
    assert "| LoRA | r 4, alpha 8, dropout 0.1 |" in text
    assert "| Steps | 8 (2.5 epochs) |" in text
    assert "vllm serve ./out" in text


def test_products_in_fp8_are_told(shop: Shop) -> None:
    report = collect(JobConfig.model_validate(make_job()), shop.work, (), datetime(2026, 1, 1, tzinfo=UTC))
    assert report.settings is not None
    for asked in (False, True):
        settings = report.settings.model_copy(update={"fp8_products": asked})
        told = report.model_copy(update={"settings": settings})
        text = build_card(Card(PublishedArtifact.ADAPTER, "adapter", "acme/fox", told, Licence(), None, ()))
        assert ("products in FP8" in text) == asked


def test_a_gguf_file_is_loaded_by_llama_cpp(shop: Shop) -> None:
    report = collect(JobConfig.model_validate(make_job()), shop.work, (), datetime(2026, 1, 1, tzinfo=UTC))
    gguf = ResolvedQuantize(name="gptq4", method="GGUF", gguf_type="Q8_0")
    kind, path = PublishedArtifact.QUANTIZED, "quantized/gptq4"
    text = build_card(Card(kind, path, "acme/fox", report, Licence(), gguf, ("model-Q8_0.gguf",)))
    (shop.work.root / "card").write_text(text)
    told = read_front_matter(shop.work.root / "card")
    assert "llama-server --model model-Q8_0.gguf" in text
    assert "library_name" not in told
    assert told["tags"] == ["finetune-operator", "gguf", "qlora", "sft"]


def test_an_adapter_is_loaded_on_the_base_as_it_was_held(shop: Shop, registry: Registry) -> None:
    text, _ = card_of(shop, registry, "Adapter")
    code = text.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")
    assert f'from_pretrained("acme/base", revision="{COMMIT}", quantization_config=bits)' in code
    assert 'bnb_4bit_quant_type="nf4"' in code
    assert "--enable-lora --max-lora-rank 4 --lora-modules tuned=./out" in text


@pytest.mark.parametrize(
    ("files", "identifier"),
    [
        pytest.param({"README.md": b"---\nlicense: mit\n---\n", "LICENSE": APACHE}, "mit", id="its card"),
        pytest.param({"LICENSE": APACHE}, "apache-2.0", id="its text"),
        pytest.param({"README.md": b"---\n: [\n---\n", "LICENSE.txt": b"Mine alone"}, "other", id="a text of its own"),
        pytest.param({"README.md": b"# No front matter"}, None, id="nothing"),
    ],
)
def test_the_licence_is_what_the_base_says(tmp_path: Path, files: dict[str, bytes], identifier: str | None) -> None:
    for name, body in files.items():
        (tmp_path / name).write_bytes(body)
    assert find_licence(tmp_path).identifier == identifier


def test_a_place_may_be_added_to_a_run_that_is_done(shop: Shop, registry: Registry) -> None:
    before = manifest.read(shop.work.data).digest
    card_of(shop, registry, "Merged")
    assert manifest.read(shop.work.data).digest == before


REFUSED = {
    "a form that is not made": ({"artifact": "Quantized", "quantizeName": "awq4"}, {}, "no entry named 'awq4'"),
    "a merged model that is not made": ({"artifact": "Merged"}, {"merge": {"policy": "Never"}}, "publish Adapter"),
    "an adapter that is not trained": ({"artifact": "Adapter"}, {"method": {"type": "Full"}}, "publish Merged"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_published_is_what_the_job_makes(case: str) -> None:
    entry, job, words = REFUSED[case]
    config = {
        "model": {"huggingFace": {"repo": "acme/base"}},
        "datasets": [{"huggingFace": {"repo": "acme/rows"}}],
        "output": {"publish": [{"name": "out", "oci": {"reference": "registry.example/fox"}, **entry}]},
        **job,
    }
    with pytest.raises(ValueError, match=words):
        JobConfig.model_validate(config)
