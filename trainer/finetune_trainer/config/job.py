"""The whole of a job, and what its blocks mean together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from finetune_trainer.config.base import Model
from finetune_trainer.config.data import Dataset, Evaluation
from finetune_trainer.config.method import (
    ADAPTER_METHODS,
    EIGHT_BIT,
    BaseFormat,
    Method,
    MethodType,
    Objective,
    ObjectiveType,
)
from finetune_trainer.config.model import BaseModelSource
from finetune_trainer.config.outcome import Merge, MergeBase, MergePolicy, Quantize
from finetune_trainer.config.pod import Pod
from finetune_trainer.config.publish import Output, Publish, PublishedArtifact
from finetune_trainer.config.tracking import Tracking
from finetune_trainer.config.training import (
    FastPath,
    GradientCheckpointing,
    Offload,
    Packing,
    Parallelism,
    Strategy,
    Training,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune_trainer.config.sources import Source


class JobConfig(Model):
    """What one job is to do: the training half of a FineTuneJob's spec, and the trainer's `--config` file."""

    model: BaseModelSource = Field(description="The base model.")
    datasets: tuple[Dataset, ...] = Field(min_length=1, max_length=16, description="What to train on.")
    evaluation: Evaluation | None = Field(default=None, description="What to measure on.")
    method: Method | None = Field(default=None, description="What is trained and how the base is held.")
    objective: Objective | None = Field(default=None, description="What training is for.")
    training: Training | None = Field(default=None, description="Hyperparameters of the optimization.")
    parallelism: Parallelism | None = Field(default=None, description="How many devices train, and how they share it.")
    merge: Merge | None = Field(default=None, description="What becomes of the adapter.")
    quantize: tuple[Quantize, ...] | None = Field(
        default=None, max_length=8, description="Quantized forms of the finished model; names are unique. Default none."
    )
    output: Output | None = Field(default=None, description="Where the results go.")
    tracking: Tracking | None = Field(default=None, description="Where the run is followed besides the status.")
    pod: Pod | None = Field(default=None, description="What the stages run on.")

    @model_validator(mode="after")
    def _measured_rows_are_held_out(self) -> Self:
        percent = self.evaluation.percent if self.evaluation else None
        if percent == 0 and (fields := self.measured_fields):
            msg = f"evaluation.percent 0 holds nothing out: drop {fields[0]} or hold rows out"
            raise ValueError(msg)
        return self

    @property
    def measured_fields(self) -> tuple[str, ...]:
        """Fields that are set and rest on a measure of held-out rows."""
        training = self.training or Training()
        gates = [entry.max_perplexity_increase_percent for entry in self.quantize or ()]
        asking = {
            "training.eval": training.eval is not None,
            "training.restoreBest": bool(training.restore_best),
            "training.earlyStopping": training.early_stopping is not None,
            **{f"merge.{gate}": True for gate in (self.merge.gates if self.merge else ())},
            "quantize[].maxPerplexityIncreasePercent": any(gate is not None for gate in gates),
        }
        return tuple(field for field, asked in asking.items() if asked)

    @model_validator(mode="after")
    def _dpo_compares_whole_rows(self) -> Self:
        training = self.training or Training()
        if self.objective_type is not ObjectiveType.DPO:
            return self
        if training.packing is Packing.ON:
            msg = "training.packing: rows of DPO are not packed, leave it unset or Off"
            raise ValueError(msg)
        if training.neftune_noise_alpha is not None:
            msg = "training.neftuneNoiseAlpha is for objective SFT"
            raise ValueError(msg)
        if self.method is not None and self.method.lora is not None and self.method.lora.dropout:
            msg = "method.lora.dropout is for objective SFT: DPO compares model and reference without noise, drop it"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _fp8_products_have_their_path(self) -> Self:
        fast = self.training is None or self.training.fast_path is not FastPath.OFF
        sft = self.objective_type is ObjectiveType.SFT
        one_gpu = self.gpus_per_node == 1 and self.world_size == 1
        if self.method is not None and self.method.fp8_products and not (fast and sft and one_gpu):
            msg = (
                "method.fp8Products is for SFT on one GPU (parallelism.numNodes and gpusPerNode 1) by the fast path "
                "(training.fastPath Auto): drop it, or change the others"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _offload_has_its_path(self) -> Self:
        training = self.training or Training()
        if training.offload is not Offload.ON:
            return self
        computed_again = training.gradient_checkpointing is not GradientCheckpointing.OFF
        sft = self.objective_type is ObjectiveType.SFT
        one_gpu = self.gpus_per_node == 1 and self.world_size == 1
        fast = training.fast_path is not FastPath.OFF and self.trains_adapter
        if not (fast and sft and one_gpu and computed_again):
            msg = (
                "training.offload On is for SFT of adapters on one GPU (parallelism.numNodes and gpusPerNode 1) by the "
                "fast path (training.fastPath Auto), with gradientCheckpointing Auto, Full or Selective: drop it, or "
                "change the others"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _batch_is_shared_evenly(self) -> Self:
        training = self.training or Training()
        total, micro = training.global_batch_size, training.per_device_train_batch_size
        if total is not None and total % ((micro or 1) * self.world_size):
            msg = (
                "training: perDeviceTrainBatchSize times the number of devices "
                "(parallelism.numNodes x gpusPerNode) must divide globalBatchSize"
            )
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _weights_can_be_sharded(self) -> Self:
        if self.parallelism is None or self.parallelism.strategy is not Strategy.FSDP:
            return self
        weights = self.method.base_weights if self.method else None
        held = weights.format if weights else None
        if held in (BaseFormat.GPTQ, *EIGHT_BIT):
            msg = f"parallelism.strategy FSDP cannot shard {held} weights: use DDP, or baseWeights NF4 or BF16"
            raise ValueError(msg)
        if self.method_type is MethodType.GALORE:
            msg = "parallelism.strategy FSDP does not go with GaLore, which needs whole gradients: use DDP"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _quantize_needs_a_finished_model(self) -> Self:
        entries = self.quantize or ()
        if self.merge is not None and self.method_type not in ADAPTER_METHODS:
            msg = f"merge is for adapters: {self.method_type} trains the model itself, drop merge"
            raise ValueError(msg)
        if entries and self.merge is not None and self.merge.policy is MergePolicy.NEVER:
            msg = "quantize needs the merged model: leave merge.policy unset or drop quantize"
            raise ValueError(msg)
        names = [entry.name for entry in entries]
        if len(set(names)) < len(names):
            msg = "quantize: each entry needs a name of its own"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _divergence_is_from_what_was_trained(self) -> Self:
        weights, merge = self.method.base_weights if self.method else None, self.merge or Merge()
        quantized = self.method_type is MethodType.QLORA or (weights and weights.format in EIGHT_BIT)
        if quantized and merge.base is MergeBase.ORIGINAL and merge.max_kl_divergence is not None:
            msg = "merge.maxKLDivergence says nothing of base Original of a quantized base: set merge.maxLossIncrease"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _what_is_published_is_made(self) -> Self:
        made = {entry.name for entry in self.quantize or ()}
        for _, field, entry in self.destinations():
            if entry.artifact is PublishedArtifact.QUANTIZED and entry.quantize_name not in made:
                there = ", ".join(sorted(made)) or "none"
                msg = f"{field}.quantizeName: quantize has no entry named '{entry.quantize_name}' (has: {there})"
                raise ValueError(msg)
            if entry.artifact is PublishedArtifact.ADAPTER and not self.trains_adapter:
                msg = f"{field}: {self.method_type} trains the model itself, publish Merged"
                raise ValueError(msg)
            if entry.artifact is PublishedArtifact.MERGED and self.trains_adapter and not self.merges:
                msg = f"{field}: merge.policy is Never, publish Adapter"
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _datasets_have_names_of_their_own(self) -> Self:
        for datasets, what in ((self.datasets, "datasets"), (self._evaluation_datasets, "evaluation.datasets")):
            names = [dataset.name for dataset in datasets if dataset.name is not None]
            if len(set(names)) < len(names):
                msg = f"{what}: each name at most once"
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _an_adapter_continues_an_adapter(self) -> Self:
        if self.model.adapter is not None and self.method_type not in ADAPTER_METHODS:
            msg = f"model.adapter is for QLoRA and LoRA, method.type is {self.method_type}"
            raise ValueError(msg)
        return self

    @property
    def method_type(self) -> MethodType:
        """What is trained."""
        return (self.method.type if self.method else None) or MethodType.QLORA

    @property
    def objective_type(self) -> ObjectiveType:
        """What training is for."""
        return (self.objective.type if self.objective else None) or ObjectiveType.SFT

    @property
    def trains_adapter(self) -> bool:
        """Whether an adapter is trained; otherwise the model itself."""
        return self.method_type in ADAPTER_METHODS

    @property
    def merges(self) -> bool:
        """Whether the job has a merge stage."""
        return self.trains_adapter and (self.merge is None or self.merge.policy is not MergePolicy.NEVER)

    @property
    def num_nodes(self) -> int:
        """Pods of the train stage."""
        return (self.parallelism or Parallelism()).num_nodes or 1

    @property
    def gpus_per_node(self) -> int:
        """GPUs a pod of the train stage holds."""
        if self.parallelism is None or self.parallelism.gpus_per_node is None:
            return 1
        return self.parallelism.gpus_per_node

    @property
    def world_size(self) -> int:
        """Processes of the train stage."""
        return (self.parallelism or Parallelism()).world_size

    @property
    def gpu_memory_bytes(self) -> int | None:
        """Memory of each GPU of the train stage; None where it is not known, or none is asked for."""
        return self.pod.gpu_memory_bytes if self.pod is not None and self.gpus_per_node else None

    @property
    def _evaluation_datasets(self) -> tuple[Dataset, ...]:
        return (self.evaluation.datasets or ()) if self.evaluation else ()

    def destinations(self) -> Iterator[tuple[str, str, Publish]]:
        """Every place that artifacts go to: a slot (folder of its secrets), its field, the entry."""
        for index, entry in enumerate((self.output.publish if self.output else None) or ()):
            yield f"publish-{index}", f"output.publish[{index}]", entry

    def destinations_seen_early(self) -> Iterator[tuple[str, str, Publish]]:
        """Those whose credentials prepare is given, to refuse what is missing before a GPU is held.

        None where code that the model brings runs beside them: that must not see what may write elsewhere.
        """
        return iter(()) if self.model.trust_remote_code else self.destinations()

    def sources(self) -> Iterator[tuple[str, str, Source]]:
        """Everything that prepare fetches: a slot (folder of its secrets and downloads), its field, the source."""
        yield "model", "model", self.model
        if self.model.adapter is not None:
            yield "adapter", "model.adapter", self.model.adapter
        if self.merge is not None and self.merge.original is not None:
            yield "original", "merge.original", self.merge.original
        for index, dataset in enumerate(self.datasets):
            yield f"dataset-{index}", f"datasets[{index}]", dataset
        for index, dataset in enumerate(self._evaluation_datasets):
            yield f"evaluation-{index}", f"evaluation.datasets[{index}]", dataset
