"""A job's finished artifacts, made without a training, and the places that they go to."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from finetune_trainer.config import JobConfig
from finetune_trainer.models.folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from finetune_trainer.progress import (
    DataFacts,
    DatasetFacts,
    LastWord,
    Measured,
    ResolvedMerge,
    ResolvedQuantize,
    Stage,
    TrainFacts,
)
from finetune_trainer.publishing import delivery, s3
from finetune_trainer.runtime import manifest, stages
from finetune_trainer.runtime.manifest import Made, Result
from finetune_trainer.runtime.work import WorkFolder
from tests.unit.trainer.conftest import Desk
from tests.unit.trainer.runs import SETTINGS
from tests.unit.trainer.sources.conftest import (  # noqa: F401 - fixtures
    closed_registry,
    registry,
    registry_relay,
    s3_port,
    s3_relay,
)
from tests.unit.trainer.sources.servers import PART_BYTES, PASSWORD, USER, Bucket, Relay
from tests.unit.trainer.sources.standins import COMMIT

if TYPE_CHECKING:
    from collections.abc import Mapping

WEIGHTS = "model-00001-of-00002.safetensors"
LARGE_BYTES = 2 * PART_BYTES + 1_234_567
"""In parts on S3, in LFS on a hub."""
CARD, MARKER = "README.md", "manifest.json"
APACHE = b"Apache License\nVersion 2.0, January 2004\n"
FACTS = DataFacts(
    train_rows=90,
    eval_rows=10,
    dropped_rows=0,
    train_tokens=9000,
    loss_tokens=5000,
    length_p50=90,
    length_p95=120,
    length_p99=130,
    length_max=140,
    datasets=(
        DatasetFacts(name="0", train_rows=90, eval_rows=10, dropped_rows=0, truncated_rows=0, train_tokens=9000),
    ),
)
TRAINED = TrainFacts(steps=8, epochs=2.5, trainable_parameters=1000, total_parameters=100_000)


def random_bytes(count: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(count)


ADAPTER = {ADAPTER_CONFIG: b'{"peft_type": "LORA"}', ADAPTER_WEIGHTS: random_bytes(300_000, 1)}
MERGED = {
    "LICENSE": APACHE,
    "config.json": b'{"model_type": "llama"}',
    WEIGHTS: random_bytes(LARGE_BYTES, 2),
    "model-00002-of-00002.safetensors": random_bytes(200_000, 3),
    "tokenizer.json": b'{"version": "1.0"}',
}


def make_job(*entries: dict[str, Any]) -> dict[str, Any]:
    """A job that publishes."""
    return {
        "model": {"huggingFace": {"repo": "acme/base"}},
        "datasets": [{"huggingFace": {"repo": "acme/rows"}}],
        "quantize": [{"name": "gptq4", "method": "GPTQ"}],
        "output": {"publish": list(entries)},
    }


@dataclass
class Shop:
    """The work folder of a job that has made everything and published nothing."""

    desk: Desk
    files: dict[str, Mapping[str, bytes]]

    @property
    def work(self) -> WorkFolder:
        return WorkFolder(self.desk.work)

    def publish(self, entry: dict[str, Any], *options: str) -> tuple[int, LastWord]:
        code, word = self.desk.run("publish", make_job(entry), "--name", entry["name"], *options)
        assert word is not None
        return code, word

    def give_secret(self, name: str, text: str, index: int = 0) -> None:
        folder = self.desk.root / "secrets" / f"publish-{index}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    def forget(self, entry: str = "out") -> None:
        """Lose the proof, as if the stage had been broken off right before its end."""
        shutil.rmtree(self.work.published(entry))

    def expected(self, path: str, entry: str) -> dict[str, bytes]:
        """What is to be there once `entry` has published the artifact in `path`."""
        written = self.work.published(entry)
        ours = {CARD: (written / CARD).read_bytes(), MARKER: (written / "remote-manifest.json").read_bytes()}
        licence = {"LICENSE": APACHE}
        return {**self.files[path], **licence, **ours}


def stock(root: Path, merged: Mapping[str, bytes] = MERGED) -> dict[str, Mapping[str, bytes]]:
    """Artifacts with manifests as the stages write them, in a work folder; their files."""
    config, work = JobConfig.model_validate(make_job()), WorkFolder(root)
    settings = SETTINGS.model_copy(
        update={
            "merge": ResolvedMerge(base="Dequantized", dtype="BF16", max_shard_size="5GB"),
            "quantize": (ResolvedQuantize(name="gptq4", method="GPTQ", bits=4, group_size=64, symmetric=True),),
            "data_revisions": (f"0@{COMMIT}",),
        }
    )
    base = {
        "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
        "README.md": b"---\nlicense: apache-2.0\n---\n# Base\n",
        "LICENSE": APACHE,
        "source.json": json.dumps({"source": "HuggingFaceSource", "revision": COMMIT}).encode(),
    }
    before, after = (
        Measured(eval_loss=1.5, eval_loss_base=2.5, perplexity=4.4817),
        Measured(eval_loss=1.501, kl_divergence=1e-4),
    )
    quantized = {**merged, WEIGHTS: random_bytes(100_000, 4)}
    put(stages.model_target(config, work), base, Result(message="The base."))
    put(
        stages.build_target(Stage.PREPARE, config, work),
        {"train.parquet": b"rows"},
        Result(message="Rows.", resolved=settings, data=FACTS),
    )
    put(
        stages.build_target(Stage.TRAIN, config, work),
        ADAPTER,
        Result(message="Trained.", training=TRAINED, artifact=Made(name="adapter", type="Adapter", measured=before)),
    )
    put(stages.build_target(Stage.MERGE, config, work), merged, result_of("merged", "Merged", after))
    put(stages.build_target(Stage.QUANTIZE, config, work, "gptq4"), quantized, result_of("gptq4", "Quantized", after))
    return {"adapter": ADAPTER, "merged": merged, "quantized/gptq4": quantized}


def result_of(name: str, kind: str, measured: Measured) -> Result:
    return Result(message=f"{kind}.", artifact=Made(name=name, type=kind, measured=measured))


def put(target: manifest.Target, files: Mapping[str, bytes], result: Result) -> None:
    def build(folder: Path) -> Result:
        for name, body in files.items():
            (folder / name).write_bytes(body)
        return result

    manifest.publish(replace(target), 1, build)


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.setattr(delivery, "RETRY_PAUSES_SECONDS", (0.0, 0.0))
    monkeypatch.setattr(s3, "PART_BYTES", PART_BYTES)
    desk = Desk(tmp_path)
    return Shop(desk, stock(desk.work))


@pytest.fixture
def bucket(s3_port: int, s3_relay: Relay, shop: Shop, request: pytest.FixtureRequest) -> Bucket:  # noqa: F811 - a fixture
    """A bucket of the test's own, asked through the relay, and its keys in the job's secrets."""
    shop.give_secret("AWS_ACCESS_KEY_ID", USER)
    shop.give_secret("AWS_SECRET_ACCESS_KEY", PASSWORD)
    number = abs(hash(request.node.nodeid)) % 10**12
    Bucket(f"http://127.0.0.1:{s3_port}", f"out-{number}").create()
    return Bucket(s3_relay.url, f"out-{number}")
