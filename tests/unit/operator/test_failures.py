"""Why a stage ended: the strongest evidence wins, and each reason has its remedy and its rule."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api import JSON
from finetune_operator.facts import Gang, parse_job, parse_pod
from finetune_operator.failures import Failure, classify, delay
from finetune_operator.reasons import TABLE, Reason, Retry
from finetune_trainer.progress import ExitCode
from finetune_trainer.progress import Reason as Said
from tests.unit.operator.builders import RUNNING, condition, container, ended, pod_body, word


def judged(**status: Any) -> Failure:
    return classify(Gang((parse_pod(pod_body("train", 1, **status)),)), None)


def disrupted(reason: str, status: JSON) -> JSON:
    others = [each for each in status.get("conditions", []) if each["type"] != "DisruptionTarget"]
    return status | {"conditions": [*others, condition("DisruptionTarget", reason, "why")]}


def evicted(message: str) -> JSON:
    """As a kubelet that runs short ends a pod."""
    return disrupted("TerminationByKubelet", {"phase": "Failed", "reason": "Evicted", "message": message})


UNREADY: JSON = RUNNING | {"conditions": [condition("Ready", status="False")]}
DISRUPTED = {"conditions": [condition("DisruptionTarget", "PreemptionByScheduler", "preempted by a greater")]}
SAID = word("train", 1, Said.INVALID_DATASET, "line 3: no JSON.").to_json()


@pytest.mark.parametrize(
    ("status", "reason", "retry"),
    [
        pytest.param(ended(137) | DISRUPTED, "Preempted", Retry.FREE, id="a preempted pod is nobody's fault"),
        pytest.param(ended(137, "OOMKilled") | DISRUPTED, "Preempted", Retry.FREE, id="a drain comes before a kill"),
        pytest.param(ended(137, "OOMKilled"), "OutOfHostMemory", Retry.NEVER, id="killed for memory"),
        pytest.param(ended(137, "OOMKilled", SAID), "OutOfHostMemory", Retry.NEVER, id="a kill comes before a word"),
        pytest.param(ended(11, "Error", SAID), "InvalidDataset", Retry.NEVER, id="the trainer's own word"),
        pytest.param(ended(15, "Error", SAID), "InvalidDataset", Retry.NEVER, id="a word comes before an exit code"),
        pytest.param(ended(15, "Error", "Traceback"), "VolumeFull", Retry.NEVER, id="a reserved exit code"),
        pytest.param(ended(20), "Interrupted", Retry.FREE, id="saved on SIGTERM"),
        pytest.param(ended(1, "Error", "Traceback: x"), "Unknown", Retry.COUNTED, id="an exit code of no meaning"),
        pytest.param(ended(137), "Unknown", Retry.COUNTED, id="killed, nobody knows by whom"),
        pytest.param(ended(0, "Completed", "{}"), "LostWord", Retry.FREE, id="ended well, proves nothing"),
        pytest.param(evicted("The node was low on resource: memory."), "Evicted", Retry.FREE, id="the node ran short"),
        pytest.param(
            {
                "phase": "Failed",
                "reason": "Evicted",
                "message": 'Usage of EmptyDir volume "tmp" exceeds the limit "1Gi".',
            },
            "Evicted",
            Retry.COUNTED,
            id="evicted for what it took itself",
        ),
        pytest.param(disrupted("EvictionByEvictionAPI", ended(20)), "Evicted", Retry.FREE, id="drained"),
        pytest.param(disrupted("DeletionByTaintManager", ended(20)), "Evicted", Retry.FREE, id="a tainted node"),
        pytest.param(disrupted("DeletionByTaintManager", UNREADY), "NodeLost", Retry.FREE, id="a silent node"),
        pytest.param(disrupted("DeletionByPodGC", RUNNING), "NodeLost", Retry.FREE, id="a node that is gone"),
        pytest.param(disrupted("SomethingNew", ended(137)), "Evicted", Retry.FREE, id="a disruption of a later kind"),
        pytest.param(
            {"phase": "Failed", "reason": "OutOfcpu", "message": "Node didn't have enough resource: cpu"},
            "NodeRefused",
            Retry.FREE,
            id="the scheduler was mistaken",
        ),
        pytest.param(
            {"phase": "Failed", "reason": "TaintToleration", "message": "Predicate TaintToleration failed"},
            "NodeRefused",
            Retry.FREE,
            id="a kubelet that has not heard yet that a taint is gone",
        ),
    ],
)
def test_the_strongest_evidence_wins(status: JSON, reason: str, retry: Retry) -> None:
    found = judged(**status)
    assert (found.reason, found.retry) == (reason, retry)


def test_a_success_without_a_digest_proves_nothing() -> None:
    claimed = word("train", 1, manifest_digest=None).to_json()
    assert judged(**ended(0, "Completed", claimed)).reason == Reason.LOST_WORD


@pytest.mark.parametrize("code", [code for code in ExitCode if code not in {ExitCode.COMPLETED, ExitCode.UNKNOWN}])
def test_every_reserved_exit_code_has_a_rule_and_a_remedy(code: ExitCode) -> None:
    found = judged(**ended(code.value))
    assert found.reason == code.reason
    assert TABLE[code.reason].remedy in found.message


@pytest.mark.parametrize("reason", Said)
def test_everything_the_trainer_can_say_has_a_rule(reason: Said) -> None:
    assert reason is Said.COMPLETED or reason in TABLE


@pytest.mark.parametrize("words", ["", "x" * 4096, "\x00\udcff", "{", "null", "[]", "Traceback\n" * 300])
@pytest.mark.parametrize("code", [0, 1, 137, 255])
def test_no_last_line_is_too_odd_to_be_told(words: str, code: int) -> None:
    assert 0 < len(judged(**ended(code, "Error", words)).message) <= 1024


def a_stage_job(**status: Any) -> JSON:
    return {**pod_body("train", 1), "status": status}


@pytest.mark.parametrize(
    ("job", "reason"),
    [
        (None, Reason.JOB_DELETED),
        (a_stage_job(conditions=[condition("Complete")]), Reason.LOST_WORD),
        (a_stage_job(conditions=[condition("Failed")]), Reason.POD_LOST),
    ],
)
def test_without_a_pod_the_job_tells_what_it_can(job: JSON | None, reason: str) -> None:
    found = classify(Gang(), parse_job(job) if job else None)
    assert (found.reason, found.retry) == (reason, Retry.FREE)


def waits(reason: str, message: str = "why") -> JSON:
    return {"containerStatuses": container(waiting={"reason": reason, "message": message})}


def unscheduled(message: str) -> JSON:
    return {"conditions": [condition("PodScheduled", "Unschedulable", message, "False")]}


@pytest.mark.parametrize(
    ("status", "warnings", "reason", "deadline"),
    [
        (waits("ErrImagePull"), (), "ImagePullFailed", True),
        (waits("ImagePullBackOff"), (), "ImagePullFailed", True),
        (waits("InvalidImageName"), (), "ImagePullFailed", True),
        (waits("CreateContainerConfigError", 'secret "hf" not found'), (), "CannotStart", True),
        (unscheduled('persistentvolumeclaim "models" not found'), (), "VolumeUnbound", True),
        (unscheduled("pod has unbound immediate PersistentVolumeClaims"), (), "VolumeUnbound", True),
        (unscheduled("0/1 nodes are available: 1 Insufficient nvidia.com/gpu."), (), "Unschedulable", False),
        (waits("ContainerCreating"), ('FailedMount: secret "hf" not found',), "MountFailed", True),
        (waits("ContainerCreating"), ('FailedCreatePodSandBox: no runtime for "kata"',), "CannotStart", True),
    ],
)
def test_what_keeps_a_pod_from_starting_is_told(
    status: JSON, warnings: tuple[str, ...], reason: str, deadline: bool
) -> None:
    found = delay(parse_pod(pod_body(**status)), warnings)
    assert found is not None
    assert (found.reason, found.deadline) == (reason, deadline)


@pytest.mark.parametrize(
    ("warning", "reason", "deadline"),
    [
        ("FailedCreate: pods is forbidden: exceeded quota: gpus", "QuotaExceeded", False),
        ("FailedCreate: pods is forbidden: violates PodSecurity", "PodRefused", True),
    ],
)
def test_a_pod_that_is_refused_is_told(warning: str, reason: str, deadline: bool) -> None:
    found = delay(None, (warning,))
    assert found is not None
    assert (found.reason, found.deadline) == (reason, deadline)


ROOM = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
UNBOUND = "0/1 nodes are available: pod has unbound immediate PersistentVolumeClaims."


@pytest.mark.parametrize(
    "noise",
    [
        "",
        " preemption: 0/3 nodes are available: 3 No preemption victims found for incoming pod.",
        " no new claims to deallocate, preemption: 0/3 nodes are available: 3 Preemption is not helpful.",
        " still not schedulable, preemption: 0/3 nodes are available: 3 No preemption victims found.",
    ],
)
def test_the_schedulers_word_is_cut_before_what_helps_nobody(noise: str) -> None:
    full, unbound = (delay(parse_pod(pod_body(**unscheduled(said + noise))), ()) for said in (ROOM, UNBOUND))
    assert full is not None
    assert full.message.startswith(f"No node can take the pod: {ROOM} It waits until")
    assert unbound is not None
    assert unbound.message.startswith(f"A claim has no volume yet: {UNBOUND} Check that")


def test_a_claim_that_is_missing_and_one_without_a_volume_are_told_apart() -> None:
    missing = delay(parse_pod(pod_body(**unscheduled('0/1: persistentvolumeclaim "nowhere" not found.'))), ())
    assert missing is not None
    assert missing.message.startswith("PersistentVolumeClaim 'nowhere' is not there. Create it")


@pytest.mark.parametrize(
    ("claims", "told"),
    [(("work",), "Claim work has no volume yet"), (("work", "data"), "One of the claims work, data has no volume yet")],
)
def test_a_claim_without_a_volume_is_named(claims: tuple[str, ...], told: str) -> None:
    body = pod_body(**unscheduled(f"{UNBOUND} not found. preemption: 0/1 nodes are available: 1 Not helpful."))
    volumes = [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in claims]
    found = delay(parse_pod(body | {"spec": {"volumes": [*volumes, {"name": "config", "configMap": {}}]}}), ())
    assert found is not None
    assert found.message == f"{told}: {UNBOUND} Check that the claim's StorageClass exists and can make volumes."


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("no PriorityClass with name nope was found", "Correct pod.priorityClassName."),
        ('pod rejected: RuntimeClass "nope" not found', "Correct pod.runtimeClassName."),
        ('violates PodSecurity "restricted:latest"', "Ask who administers the namespace's policies."),
    ],
)
def test_a_pod_that_is_refused_for_a_name_says_which_field_to_correct(said: str, remedy: str) -> None:
    found = delay(None, (f'FailedCreate: Error creating: pods "demo-prepare-1-" is forbidden: {said}',))
    assert found is not None
    assert found.message.endswith(f"{said}. {remedy}")


def test_killed_for_memory_names_the_field_to_raise() -> None:
    assert "pod.resources.limits.memory" in judged(**ended(137, "OOMKilled")).message


def test_a_container_killed_for_memory_before_it_began_is_told_as_one_killed_later() -> None:
    told = "failed to create task: container init was OOM-killed (memory limit too low?)"
    assert judged(**ended(128, "StartError", told)).reason == "OutOfHostMemory"


def test_a_pod_that_just_starts_is_no_obstacle() -> None:
    assert delay(parse_pod(pod_body(**waits("ContainerCreating"))), ()) is None
