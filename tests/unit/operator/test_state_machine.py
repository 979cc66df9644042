"""Decisions under random histories: what holds whatever becomes of pods, Jobs, the API server and the operator.

The operator is woken as in life: by what a watch tells, or when its own last decision asked for it. At the end of each
history all goes well and time passes: a job that never ends then was never looked at again.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from finetune_operator import names
from finetune_operator.api import JSON, Status, format_time
from finetune_operator.facts import Facts, Refusal, after, parse_pods
from finetune_operator.journal import Journal, alive
from finetune_operator.status import Decision, Start, Stop, decide
from finetune_trainer.progress import ExitCode, Progress, Reason, Stage
from tests.unit.operator.builders import (
    GANG,
    RUNNING,
    SPEC,
    UID,
    WHOLE,
    Cluster,
    condition,
    container,
    ended,
    position,
    word,
)

GRACE_SECONDS = 120
LONGEST_BACKOFF_SECONDS = 150
"""Of the queue, after a pass that the API server refused something."""

LONGEST_PAUSE_SECONDS = 301
"""Before a stage is run again."""

SETTLED_PASSES = 8
LAST_MOVES = 600
IDLE_LOOKS, IDLE_WRITES = 30, 4
"""Deadlines and retries are news, also late."""

HISTORIES, ALL_HISTORIES = 40, 1000
DISRUPTED = [condition("DisruptionTarget", "PreemptionByScheduler", "Needed for others.")]
WORDS = tuple(reason for reason in Reason if reason is not Reason.COMPLETED)
ENDINGS: dict[str, JSON] = {
    "crashed": ended(1, "Error", "Traceback: boom " * 200),
    "killed": ended(137),
    "out of memory": ended(137, "OOMKilled"),
    "out of memory at once": ended(128, "StartError", "container init was OOM-killed"),
    "no last word": ended(0, "Completed", "no JSON"),
    "evicted": {"phase": "Failed", "reason": "Evicted", "message": "The node was low on memory."},
    "disrupted": ended(143) | {"conditions": DISRUPTED},
    "rejected": {"phase": "Failed", "reason": "UnexpectedAdmissionError"},
    **{f"exit code {code.value}": ended(code) for code in ExitCode if code is not ExitCode.COMPLETED},
}
NO_ROOM = {"conditions": [condition("PodScheduled", "Unschedulable", "0/3 nodes: Insufficient memory", "False")]}
OBSTACLES: dict[str, JSON] = {
    "no image": {"containerStatuses": container(waiting={"reason": "ImagePullBackOff", "message": "no such image"})},
    "no secret": {"containerStatuses": container(waiting={"reason": "CreateContainerConfigError"})},
    "no room": NO_ROOM,
    "none": {},
}
WARNINGS = ("FailedMount: no such claim", "FailedCreate: exceeded quota: pods", "FailedCreate: denied by a webhook")
REFUSALS = (
    Refusal("Job", "demo-x", 403, "exceeded quota: jobs"),
    Refusal("Job", "demo-x", 500, "failed calling webhook"),
    Refusal("Job", "demo-x", 422, "makes no sense"),
)
IN_TIME = {"activeDeadlineSeconds": 300, "startDeadlineSeconds": 300, "stallTimeoutSeconds": 60}
TO_BE_DELETED = {"ttlSecondsAfterFinished": 100}
JOBS: tuple[JSON, ...] = (
    *(spec | {"runPolicy": policy} for spec in (WHOLE, GANG) for policy in ({}, IN_TIME, TO_BE_DELETED)),
    *(spec | {"runPolicy": TO_BE_DELETED | {"stopAfter": "Prepare"}} for spec in (SPEC, GANG)),
)
SECONDS = (1, 9, 31, 155, 301, 4000)


@dataclass
class World(Cluster):
    """Kubernetes and the operator's queue."""

    refusal: Refusal | None = None
    """What becomes of the next things to be made."""
    awake: bool = True
    """Something has changed that a watch tells."""
    due: datetime | None = None
    """When the last decision asked for the next."""
    proved: set[str] = field(default_factory=set)
    """Steps whose pods have in truth ended with the proof."""
    lost_node: bool = False
    """Pods that are told to leave are never seen to have left."""

    # --- the operator

    @property
    def facts(self) -> Facts:
        """As a pass sees it: what is refused is known once it was tried."""
        facts = super().facts
        if self.refusal is None:
            return facts
        tried = decide(facts, self.settings, self.now).actions
        return replace(facts, refusal=self.refusal) if any(isinstance(each, Start) for each in tried) else facts

    def look(self) -> bool:
        """One pass, if anything calls for it."""
        if not self.awake and (self.due is None or self.now < self.due):
            return False
        self._forget_what_nobody_saw()
        before, killed, refused = self._observable(), self.lose_status, self.facts.refusal is not None
        decision = self.step()
        self._check(decision)
        seconds = LONGEST_BACKOFF_SECONDS if refused else decision.requeue_after_seconds
        self.due = None if seconds is None else after(self.now, seconds)
        self.awake = killed or self._observable() != before
        return True

    def settle(self, limit: int = SETTLED_PASSES) -> Decision:
        """Looks, as a resync brings it, and again until none is called for now."""
        self.awake = True
        for _ in range(limit):
            if not self.look():
                break
        else:
            raise AssertionError("the decisions never come to rest")
        decision = decide(self.facts, self.settings, self.now)
        assert decision.status.to_dict() == self.status, "it is not at rest"
        assert not any(isinstance(action, Start | Stop) for action in decision.actions), "it is not at rest"
        return decision

    def idle(self) -> None:
        """Nothing happens for long: the operator looks when it wants to, and in the end has nothing new to say."""
        writes = []
        for _ in range(IDLE_LOOKS):
            if self.due is not None:
                self.now = max(self.now, self.due)
            self.look()
            writes.append(self.writes)
        assert writes[-1] - writes[IDLE_LOOKS // 2] <= IDLE_WRITES, "the status is written again and again"

    def _observable(self) -> tuple[JSON, set[str]]:
        return copy.deepcopy(self.status), set(self.jobs)

    def _check(self, decision: Decision) -> None:
        """What each decision must be."""
        told = decision.status.to_dict()
        assert Status.model_validate(told).to_dict() == told
        assert (decision.status.retries or 0) <= self.job.valid_spec.max_retries
        assert sum(each.completion_time is None for each in decision.status.attempts or ()) <= 1
        if decision.status.finished:
            assert not any(alive(pod, self.now) for pod in self.facts.pods), "the end is told before the last pod's"
            assert not any(isinstance(action, Start | Stop) for action in decision.actions)
        if decision.status.phase == "Succeeded":
            assert self.proved == {step.key for step in self.line}

    def _create(self, action: Start) -> None:
        assert not any(self.spec.get(wish) for wish in ("suspend", "cancel")), f"{action} against the user's wish"
        before = self.line[: self.line.index(action.step)]
        assert self.proved >= {step.key for step in before}, f"{action} before the proof of what it builds on"
        assert not [name for name in self.jobs if self._may_bring_pods(name)], f"{action} beside a Job that may work"
        super()._create(action)

    def _may_bring_pods(self, name: str) -> bool:
        size = self.jobs[name]["spec"].get("completions") or 1
        return "status" not in self.jobs[name] and len(self.pods_of(name)) < size

    def _forget_what_nobody_saw(self) -> None:
        """A name is free again if neither a Job, a pod nor the status has ever told of it."""
        known = Journal.remembered(self.job).position
        self.created = [
            name for name in self.created if name in self.jobs or self.pods_of(name) or position(name) <= known
        ]

    # --- Kubernetes

    @property
    def line(self) -> tuple[names.Step, ...]:
        return names.line(self.job.valid_spec)

    def pods_of(self, name: str) -> list[str]:
        return [pod for pod in self.pods if pod.partition("/")[0] == name]

    def working(self) -> list[str]:
        """Pods that have not ended, and whose Job is there."""
        return [pod for pod in self.pods if pod.partition("/")[0] in self.jobs and not over(self.pods[pod])]

    def leaving(self) -> list[str]:
        return [pod for pod, body in self.pods.items() if "deletionTimestamp" in body["metadata"] and not over(body)]

    def end(self, pod: str, status: JSON) -> None:
        self.pods[pod]["status"] = told = copy.deepcopy(status)
        for each in told.get("containerStatuses", ()):
            each["state"].get("terminated", {})["finishedAt"] = format_time(self.now)
        self.awake = True
        self._note_proof(pod.partition("/")[0])

    def say_word(self, pod: str, reason: Reason = Reason.COMPLETED) -> None:
        """The trainer's own last word."""
        labels = self.pods[pod]["metadata"]["labels"]
        step, attempt = (labels[f"finetune.dev/{key}"] for key in ("stage", "attempt"))
        code = next((code for code in ExitCode if code.reason is reason), 1)
        said = word(step, int(attempt), reason, "It is as it is. " * 60)
        self.end(pod, ended(code, "Error" if code else "Completed", said.to_json()))

    def crash(self) -> None:
        """The stage that is due is begun, and all its pods crash."""
        self.look()
        self.later(LONGEST_PAUSE_SECONDS)
        self.look()
        for pod in self.working():
            self.end(pod, ENDINGS["crashed"])
        self.tell_jobs()

    def _note_proof(self, name: str) -> None:
        pods = parse_pods([self.pods[pod] for pod in self.pods_of(name)], UID)
        size = self.jobs[name]["spec"].get("completions") or 1 if name in self.jobs else 1
        leader = next((pod for pod in pods if pod.index == 0), None)
        well = len(pods) >= size and all(pod.exit_code == 0 for pod in pods)
        if leader is not None and leader.last_word is not None and leader.last_word.succeeded and well:
            self.proved.add(leader.step)

    def tell_jobs(self) -> bool:
        """The Job controller: a Job is complete or failed as its pods are; of one that fails all are told to leave."""
        told = False
        for name, body in self.jobs.items():
            pods = [self.pods[pod] for pod in self.pods_of(name)]
            whole = len(pods) >= (body["spec"].get("completions") or 1)
            well = whole and all(pod["status"].get("phase") == "Succeeded" for pod in pods)
            failed = not whole or any(pod["status"].get("phase") == "Failed" for pod in pods)
            if "status" in body or not (well or failed):
                continue
            body["status"] = {"conditions": [condition("Complete" if well else "FailureTarget")]}
            self.dismiss(self.pods_of(name))
            told = self.awake = True
        return told

    def dismiss(self, pods: list[str]) -> None:
        """Pods are told to leave: those that have ended stay, others go when they have had their time."""
        for pod in pods:
            if not over(self.pods[pod]):
                gone_by = after(self.now, GRACE_SECONDS)
                self.pods[pod]["metadata"].setdefault("deletionTimestamp", format_time(gone_by))
        self.awake = True

    def stop(self, name: str) -> None:
        self.delete(name)

    def delete(self, name: str) -> None:
        """The Job is gone at once, its pods follow."""
        self.dismiss(self.pods_of(name))
        self.jobs.pop(name, None)
        self.pods = {pod: body for pod, body in self.pods.items() if pod.partition("/")[0] != name or not over(body)}

    def clear_away(self) -> bool:
        """Pods that were told to leave have left, but for those of a lost node."""
        left = [] if self.lost_node else self.leaving()
        for pod in left:
            del self.pods[pod]
        self.awake |= bool(left)
        return bool(left)

    def wish(self, **changed: Any) -> None:
        super().wish(**changed)
        self.awake = True

    # --- the end

    def play_on(self) -> None:
        """Nothing goes wrong or is held back any more, time passes, and the job ends."""
        self.refusal, self.warnings = None, ()  # no watch tells of it
        self.wish(suspend=False)
        for _ in range(LAST_MOVES):
            if self.removed or (self.job.status.finished and self.job.valid_spec.ttl_seconds is None):
                return
            if self.look() or self.tell_jobs() or self.clear_away():
                continue
            if staying := [pod for pod in self.working() if pod not in self.leaving()]:
                self.say_word(staying[0])
                continue
            assert self.due is not None, "nothing will ever bring the next look"
            self.now = max(self.now, self.due)
        raise AssertionError("the job never ends")


def over(pod: JSON) -> bool:
    return pod["status"].get("phase") in {"Succeeded", "Failed"}


class Histories(RuleBasedStateMachine):
    """What may happen, in any order."""

    world: World
    terminal: JSON | None = None

    @initialize(spec=st.sampled_from(JOBS), retries=st.integers(0, 3))
    def begin(self, spec: JSON, retries: int) -> None:
        self.world = World(spec=spec | {"runPolicy": {"maxRetries": retries, **spec["runPolicy"]}})

    # --- the operator

    @rule()
    def the_operator_looks(self) -> None:
        self.world.look()

    @rule()
    def the_operator_comes_to_rest(self) -> None:
        self.world.settle()

    @rule()
    def nothing_happens_for_long(self) -> None:
        self.world.idle()

    @rule()
    def the_operator_is_killed_before_it_writes_the_status(self) -> None:
        self.world.lose_status = self.world.awake = True
        self.world.look()

    @rule(seconds=st.sampled_from(SECONDS))
    def time_passes(self, seconds: int) -> None:
        self.world.later(seconds)

    # --- pods

    @precondition(lambda self: self.world.working())
    @rule(data=st.data())
    def a_pod_runs(self, data: st.DataObject) -> None:
        self.world.end(self._one(data), RUNNING)

    @precondition(lambda self: self.world.working())
    @rule(data=st.data(), how=st.sampled_from(sorted(ENDINGS)))
    def a_pod_ends_badly(self, data: st.DataObject, how: str) -> None:
        self.world.end(self._one(data), ENDINGS[how])

    @rule(times=st.integers(1, 5))
    def a_stage_crashes_again_and_again(self, times: int) -> None:
        for _ in range(times):
            self.world.crash()

    @precondition(lambda self: self.world.working())
    @rule(data=st.data(), reason=st.sampled_from(WORDS))
    def a_trainer_says_why_it_failed(self, data: st.DataObject, reason: Reason) -> None:
        self.world.say_word(self._one(data), reason)

    @precondition(lambda self: self.world.working())
    @rule()
    def all_pods_succeed(self) -> None:
        for pod in self.world.working():
            self.world.say_word(pod)

    @precondition(lambda self: self.world.working())
    @rule(data=st.data())
    def a_pod_succeeds(self, data: st.DataObject) -> None:
        self.world.say_word(self._one(data))

    @precondition(lambda self: self.world.working())
    @rule(data=st.data(), what=st.sampled_from(sorted(OBSTACLES)))
    def a_pod_cannot_start(self, data: st.DataObject, what: str) -> None:
        self.world.end(self._one(data), {"phase": "Pending", **OBSTACLES[what]})

    @precondition(lambda self: self.world.working())
    @rule(data=st.data(), why=st.sampled_from([None, "EvictionByEvictionAPI", "DeletionByTaintManager"]))
    def a_pod_is_told_to_leave(self, data: st.DataObject, why: str | None) -> None:
        pod = self._one(data)
        self.world.dismiss([pod])
        if why is not None:
            self.world.pods[pod]["status"]["conditions"] = [condition("DisruptionTarget", why)]

    @precondition(lambda self: self.world.pods)
    @rule(data=st.data())
    def a_pod_vanishes(self, data: st.DataObject) -> None:
        del self.world.pods[data.draw(st.sampled_from(sorted(self.world.pods)))]
        self.world.awake = True

    @rule()
    def pods_leave(self) -> None:
        self.world.clear_away()

    @rule(lost=st.booleans())
    def a_node_is_lost_or_comes_back(self, lost: bool) -> None:
        self.world.lost_node = lost

    # --- the rest of Kubernetes

    @rule()
    def the_job_controller_looks(self) -> None:
        self.world.tell_jobs()

    @precondition(lambda self: self.world.jobs)
    @rule(data=st.data())
    def somebody_deletes_a_job(self, data: st.DataObject) -> None:
        self.world.delete(data.draw(st.sampled_from(sorted(self.world.jobs))))

    @rule(warning=st.none() | st.sampled_from(WARNINGS))
    def a_warning_is_told(self, warning: str | None) -> None:
        self.world.warnings = () if warning is None else (warning,)

    @rule(refusal=st.none() | st.sampled_from(REFUSALS))
    def the_api_server_refuses(self, refusal: Refusal | None) -> None:
        self.world.refusal = refusal

    @rule(done=st.integers(0, 40))
    def progress_is_told(self, done: int) -> None:
        self.world.progress = Progress(stage=Stage.TRAIN, attempt=1, activity="training", done=done, total=40)

    def _one(self, data: st.DataObject) -> str:
        return data.draw(st.sampled_from(sorted(self.world.working())))

    # --- the user

    @rule(suspend=st.booleans())
    def the_user_suspends_or_resumes(self, suspend: bool) -> None:
        self.world.wish(suspend=suspend)

    @rule(sure=st.integers(0, 2))
    def the_user_cancels(self, sure: int) -> None:
        if sure == 2:  # rarely: there is not much to see afterwards
            self.world.wish(cancel=True)
            self.world.look()

    @rule(seconds=st.sampled_from([0, 1000]))
    def the_user_changes_how_long_the_end_stays(self, seconds: int) -> None:
        self.world.wish(runPolicy=self.world.spec["runPolicy"] | {"ttlSecondsAfterFinished": seconds})

    # --- what holds

    @invariant()
    def an_end_is_for_good(self) -> None:
        if self.terminal is not None:
            assert self.world.status == self.terminal
        elif self.world.job.status.finished:
            self.terminal = copy.deepcopy(self.world.status)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.play_on()
            self.an_end_is_for_good()


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_whatever_happens_the_decisions_keep_their_word(request: pytest.FixtureRequest, full_trials: bool) -> None:
    """At most one attempt at work, each stage after its predecessor's proof, no end taken back, and always an end."""
    seeded = seed(request.config.getoption("--seed"))(Histories)
    limits = settings(
        max_examples=ALL_HISTORIES if full_trials else HISTORIES,
        stateful_step_count=50,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(seeded, settings=limits)
