"""KWOK's part: nodes without machines, and pods that run and end with a valid last word without a kubelet."""

from __future__ import annotations

import json
from typing import Any

from finetune_operator.api import Label
from tests.unit.operator.builders import word

JSON = dict[str, Any]
NODES = 4
ROOM = {"cpu": "1M", "memory": "1Pi", "pods": "1M"}
"""Of a node."""

PARALLELISM = 16
RUN_MILLISECONDS = 1000
"""How long a pod runs."""

POD_ADDRESS = "127.0.0.1"
"""Where nobody tells progress: the connection is refused at once, as by a trainer that does not listen yet."""

READY = """
{{ $now := Now }}
phase: Running
conditions:
{{ range NodeConditions }}
- type: {{ .type | Quote }}
  status: {{ .status | Quote }}
  reason: {{ .reason | Quote }}
  message: {{ .message | Quote }}
  lastHeartbeatTime: {{ $now | Quote }}
  lastTransitionTime: {{ $now | Quote }}
{{ end }}
"""

RUNNING = """
{{{{ $now := Now }}}}
phase: Running
startTime: {{{{ $now | Quote }}}}
podIP: {address}
podIPs: [{{ip: {address}}}]
conditions:
- {{type: Initialized, status: "True", lastTransitionTime: {{{{ $now | Quote }}}}}}
- {{type: Ready, status: "True", lastTransitionTime: {{{{ $now | Quote }}}}}}
- {{type: ContainersReady, status: "True", lastTransitionTime: {{{{ $now | Quote }}}}}}
containerStatuses:
{{{{ range .spec.containers }}}}
- name: {{{{ .name | Quote }}}}
  image: {{{{ .image | Quote }}}}
  imageID: ""
  ready: true
  started: true
  restartCount: 0
  state: {{running: {{startedAt: {{{{ $now | Quote }}}}}}}}
{{{{ end }}}}
"""

ENDED = """
{{{{ $now := Now }}}}
{{{{ $begun := .status.startTime }}}}
{{{{ $attempt := or (index .metadata.labels "{attempt_label}") "1" }}}}
phase: Succeeded
containerStatuses:
{{{{ range .spec.containers }}}}
- name: {{{{ .name | Quote }}}}
  image: {{{{ .image | Quote }}}}
  imageID: ""
  ready: false
  started: false
  restartCount: 0
  state:
    terminated:
      exitCode: 0
      reason: Completed
      startedAt: {{{{ $begun | Quote }}}}
      finishedAt: {{{{ $now | Quote }}}}
      message: {{{{ printf {word} $attempt | Quote }}}}
{{{{ end }}}}
"""


def documents() -> list[JSON]:
    """KWOK's configuration."""
    return [_options(), *_stages()]


def _options() -> JSON:
    numbers = {f"{what}Parallelism": PARALLELISM for what in ("podPlayStage", "nodePlayStage", "nodeLease")}
    return {
        "apiVersion": "config.kwok.x-k8s.io/v1alpha1",
        "kind": "KwokConfiguration",
        "metadata": {"name": "kwok"},
        "options": {
            "manageAllNodes": True,
            "nodeLeaseDurationSeconds": 40,
            "podsOnNodeSyncParallelism": 1,
            "cidr": "10.0.0.0/24",
            **numbers,
        },
    }


def _stages() -> list[JSON]:
    present = {"key": ".metadata.deletionTimestamp", "operator": "DoesNotExist"}
    running = RUNNING.format(address=POD_ADDRESS)
    ended = ENDED.format(attempt_label=Label.ATTEMPT, word=_word_format())
    return [
        _stage("pod-runs", "Pod", [present, _phase("Pending")], {"statusTemplate": running}),
        _stage("pod-ends", "Pod", [present, _phase("Running")], {"statusTemplate": ended}, RUN_MILLISECONDS),
        _stage("node-ready", "Node", [{"key": ".status.phase", "operator": "DoesNotExist"}], {"statusTemplate": READY}),
        _stage("pod-goes", "Pod", [{**present, "operator": "Exists"}], {"delete": True}),
    ]


def _word_format() -> str:
    """The last word as a string of Go's, in which the attempt's number is to be printed."""
    text = word("prepare", 1).to_json().replace("%", "%%")
    return json.dumps(text.replace('"attempt":1', '"attempt":%s'))


def _phase(phase: str) -> JSON:
    return {"key": ".status.phase", "operator": "In", "values": [phase]}


def _stage(name: str, kind: str, selector: list[JSON], then: JSON, milliseconds: int = 0) -> JSON:
    spec: JSON = {
        "resourceRef": {"apiGroup": "v1", "kind": kind},
        "selector": {"matchExpressions": selector},
        "next": then,
    }
    if milliseconds:
        spec["delay"] = {"durationMilliseconds": milliseconds}
    return {"apiVersion": "kwok.x-k8s.io/v1alpha1", "kind": "Stage", "metadata": {"name": name}, "spec": spec}


def nodes() -> list[JSON]:
    """Nodes with room for everything. KWOK says that they are ready and renews their leases."""
    status = {"allocatable": ROOM, "capacity": ROOM}
    head = {"apiVersion": "v1", "kind": "Node", "status": status}
    return [head | {"metadata": {"name": f"fake-{number}"}} for number in range(NODES)]
