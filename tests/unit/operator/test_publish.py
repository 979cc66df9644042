"""What a job sends out, when, and what its status says of it."""

from __future__ import annotations

import pytest

from finetune_operator import names
from finetune_operator.api import JSON, Status
from finetune_trainer.progress import Published, Reason
from tests.unit.operator.builders import BUCKET, SPEC, WHOLE, Cluster, a_job, play, stages_made

TAG: JSON = {"oci": {"reference": "registry.test/demo:1"}}
FORMS = [{"name": name, "method": "GPTQ"} for name in ("b", "a")]
TWICE = SPEC | {
    "quantize": FORMS,
    "output": {
        "publish": [
            {"name": "bucket", "artifact": "Merged", **BUCKET},
            {"name": "tag", "artifact": "Quantized", "quantizeName": "a", **TAG},
        ]
    },
}


def until(cluster: Cluster, stage: str) -> Cluster:
    """Every stage before this one has succeeded, and its pod runs."""
    cluster.settle()
    while not cluster.live.startswith(f"demo-{stage}-"):
        cluster.say()
        cluster.settle()
    cluster.run_pod()
    cluster.settle()
    return cluster


def sent(status: Status) -> dict[str, list[str]]:
    """Names of the places by the artifact that is there."""
    return {each.name: [place.name for place in each.published or ()] for each in status.artifacts or ()}


def test_what_is_published_goes_out_after_everything_is_made_one_entry_after_another() -> None:
    cluster = Cluster(spec=TWICE)
    play(cluster)
    line = ["prepare", "train", "merge", "quantize-0", "quantize-1", "publish-0", "publish-1"]
    assert stages_made(cluster) == line
    assert {name.rpartition("-")[2] for name in cluster.created} == {"1"}, "all under one number"
    assert [stage.name for stage in cluster.job.status.stages or ()][-2:] == ["publish-bucket", "publish-tag"]


def test_however_many_forms_there_are_each_step_has_a_place_of_its_own_in_the_order_of_the_line() -> None:
    forms = [{"name": f"f{index}", "method": "GPTQ"} for index in range(8)]
    entries = [
        {"name": f"p{index}", "artifact": "Merged", "oci": {"reference": f"registry.test/demo:{index}"}}
        for index in range(8)
    ]
    steps = names.line(a_job(SPEC | {"quantize": forms, "output": {"publish": entries}}).valid_spec)
    places = [step.place for step in steps]
    assert len(steps) == 19
    assert places == sorted(set(places))


def test_an_artifact_says_where_it_was_published() -> None:
    cluster = Cluster()
    play(cluster)
    status = cluster.job.status
    assert sent(status) == {"train": [], "merge": ["bucket"], "quantize-0": []}
    merged = next(each for each in status.artifacts or () if each.name == "merge")
    (place,) = merged.published or ()
    assert (place.uri, place.digest, place.size) == ("s3://models/demo", "b" * 64, "1.0 MiB")
    assert status.message == ("All stages are complete and verified: train, merge, quantize-0; published: bucket.")


def test_an_artifact_in_two_places_names_both() -> None:
    cluster = until(Cluster(spec=TWICE), "publish-0")
    cluster.say()
    cluster.settle()
    cluster.say(
        published=Published(name="tag", artifact="merge", uri="registry.test/demo@x", digest="c" * 64, size_bytes=1)
    )
    assert sent(cluster.settle().status)["merge"] == ["bucket", "tag"]


@pytest.mark.parametrize("stage", ["merge", "quantize-0"])
def test_a_gate_that_fires_ends_the_job_with_its_figures_and_nothing_goes_out(stage: str) -> None:
    cluster = until(Cluster(), stage)
    figures = "gptq4: perplexity is 16.57% above the merged model's, maxPerplexityIncreasePercent is 5."
    cluster.say(reason=Reason.GATE_FAILED, message=figures)
    status = cluster.settle().status
    assert (status.phase, status.reason, status.message) == ("Failed", "GateFailed", figures)
    assert status.retries == 0
    cluster.later(4000)
    cluster.settle()
    assert not any("publish" in name for name in cluster.created)
    assert stages_made(cluster).count(stage) == 1, "a measured figure is the same the next time"
    assert not any(sent(cluster.job.status).values())


def test_a_publish_stage_that_fails_is_run_again_and_nothing_before_it() -> None:
    cluster = until(Cluster(), "publish-0")
    cluster.end_pod(1, "the store does not answer", "Error")
    play(cluster)
    assert stages_made(cluster)[-2:] == ["publish-0", "publish-0"]
    assert stages_made(cluster).count("quantize-0") == 1
    assert (cluster.job.status.phase, cluster.job.status.retries) == ("Succeeded", 1)


def test_a_token_that_may_not_write_ends_the_job_and_what_went_out_before_stays_told() -> None:
    cluster = until(Cluster(spec=TWICE), "publish-1")
    cluster.say(reason=Reason.ACCESS_DENIED, message="registry.test says 403. Check the Secret.")
    status = cluster.settle().status
    assert (status.phase, status.reason) == ("Failed", "AccessDenied")
    assert sent(status)["merge"] == ["bucket"]
    assert [stage.state for stage in status.stages or ()][-2:] == ["Succeeded", "Failed"]


def test_a_job_suspended_while_it_publishes_goes_on_with_the_same_attempt() -> None:
    cluster = until(Cluster(), "publish-0")
    assert cluster.job.status.phase == "Publishing"
    cluster.wish(suspend=True)
    assert cluster.settle().status.phase == "Suspended"
    assert "demo-publish-0-1" not in cluster.jobs
    cluster.wish(suspend=False)
    play(cluster)
    assert cluster.created[-1] == "demo-publish-0-1"
    assert cluster.job.status.phase == "Succeeded"


def test_a_job_cancelled_while_it_publishes_sends_nothing_more() -> None:
    cluster = until(Cluster(spec=TWICE), "publish-0")
    cluster.wish(cancel=True)
    status = cluster.settle().status
    assert (status.phase, stages_made(cluster)[-1]) == ("Cancelled", "publish-0")


def test_the_report_is_told_once_a_stage_has_written_it() -> None:
    cluster = Cluster(spec=WHOLE)
    cluster.settle()
    assert cluster.job.status.report is None
    cluster.say()
    assert cluster.settle().status.report == "demo-0123abcd/report/index.html"
