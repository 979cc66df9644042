"""What a pod is told by its environment: what an administrator decides, where the pods of a stage meet, fire drills."""

from __future__ import annotations

REMOTE_CODE_VARIABLE = "FINETUNE_ALLOW_REMOTE_CODE"
"""`1` where the administrator consents to Python code that a model brings; unset: it is never run."""

RENDEZVOUS_VARIABLE = "FINETUNE_RENDEZVOUS"
"""`host:port` where the pods of a train stage of several nodes meet: the name of the pod of rank 0. Unset: one node."""

NODE_RANK_VARIABLE = "JOB_COMPLETION_INDEX"
"""Which of the nodes a pod is, from 0. Kubernetes sets it in the pods of an Indexed Job."""

RENDEZVOUS_PORT = 29500

RENDEZVOUS_TIMEOUT_VARIABLE = "FINETUNE_RENDEZVOUS_TIMEOUT_SECONDS"
"""How long the processes of several nodes wait for each other. Unset: a quarter of an hour."""

DRILL_OUT_OF_MEMORY_VARIABLE = "FINETUNE_DRILL_OUT_OF_MEMORY"
"""A fire drill: `step=3,micro-batch=2` has train run out of GPU memory from step 3 on, unless the micro-batch is at
most 2 (0: never); with `,checkpointing=Full` behind it, nor while gradient checkpointing is Full. Unset: no drill."""

JOB_VARIABLE = "FINETUNE_JOB"
"""`namespace/name` of the FineTuneJob, for the report. Unset, as on a workstation: it has the work folder's name."""

CLAIM_VARIABLE = "FINETUNE_CLAIM"
"""Name of the claim that the work folder lies in, for the serving manifests of the report; the folder's path in the
claim is its own name. Unset, as on a workstation: they have a value to fill in."""
