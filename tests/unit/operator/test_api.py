"""The models: what they refuse, and how they read what is stored."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from pydantic import ValidationError

from finetune_operator.api import (
    JSON,
    FineTuneJob,
    InvalidJobError,
    Spec,
    Status,
    TrainingStatus,
    cut,
    format_time,
    spec,
)
from finetune_operator.settings import Settings, SettingsError
from finetune_trainer import config
from finetune_trainer.config import JobConfig, Model
from tests.apiserver.cases import BAD, FINE
from tests.unit.operator.builders import SPEC, START, WHOLE, a_job, job_body


@pytest.mark.parametrize("case", BAD)
def test_the_models_refuse_what_the_api_server_refuses(case: str) -> None:
    with pytest.raises(ValidationError):
        Spec.model_validate(BAD[case][0])


VALIDATORS = {
    "_may_be_set": "a token in the open",
    "_variables_are_set_once": "a variable twice",
    "_alternatives": "warm-up twice",
    "_an_adapter_continues_an_adapter": "an adapter for Full",
    "_exactly_one": "two volumes",
    "_batch_is_shared_evenly": "a batch that does not divide",
    "_betas_are_used": "a first beta of SGD",
    "_code_is_pinned": "code of a branch",
    "_datasets_have_names_of_their_own": "two datasets of one name",
    "_divergence_is_from_what_was_trained": "a gate of divergence for other weights than were trained on",
    "_dpo_compares_whole_rows": "packed pairs",
    "_entries_stand_apart": "two things below one prefix",
    "_epoch_or_interval": "epochs and steps of saving",
    "_exactly_one_place": "two places to publish to",
    "_exactly_one_source": "two sources",
    "_fields_are_of_the_method": "AWQ of 8 bits",
    "_files_or_split": "files and a split",
    "_fp8_products_have_their_path": "products in FP8 by autograd",
    "_fsdp_settings_for_fsdp": "settings of FSDP for DDP",
    "_goes_together": "QLoRA on 16 bits",
    "_gpus_are_counted_once": "GPUs among the resources",
    "_inside_the_claim": "a path that leaves the claim",
    "_measured_rows_are_held_out": "a loss measured on no rows",
    "_measured_rows_have_no_weight": "a weight of measured rows",
    "_nodes_share_a_volume": "nodes on a claim of the default mode",
    "_offload_has_its_path": "offload by autograd",
    "_one_interval": "two intervals of saving",
    "_one_template": "two chat templates",
    "_original_is_merged_into": "an original to merge into the dequantized",
    "_percent_or_datasets": "percent and datasets",
    "_quantize_needs_a_finished_model": "quantize without merge",
    "_quantized_is_named": "a quantized form without its name",
    "_response_needs_a_prompt": "a response without a prompt",
    "_settings_of_a_merge": "a gate of what is not merged",
    "_settings_of_its_type": "SFT's settings for DPO",
    "_special_tokens_are_read": "special tokens in a conversation",
    "_smoothing_is_used": "smoothing that the loss does not use",
    "_true_is_no_number": "a number that is true",
    "_weights_can_be_sharded": "sharded GPTQ weights",
    "_what_is_published_is_made": "a merged model that is not merged",
}
"""Every rule of the models, and a case that breaks it and that the API server is tried with too."""


def models(kind: type[Model] = Model) -> Iterator[type[Model]]:
    """All models of a spec."""
    for model in kind.__subclasses__():
        if model.__module__.startswith((config.__name__, spec.__name__)):
            yield model
        yield from models(model)


def test_no_rule_of_the_models_is_left_out_of_what_the_api_server_is_tried_with() -> None:
    rules = [model.__pydantic_decorators__ for model in models()]
    names = {name for rule in rules for name in (*rule.model_validators, *rule.field_validators)}
    assert names == VALIDATORS.keys(), "write the rule's twin into rules.py, a case into cases.py and its name here"
    assert set(VALIDATORS.values()) <= BAD.keys()


@pytest.mark.parametrize("case", FINE)
def test_the_models_take_what_the_api_server_takes(case: str) -> None:
    assert Spec.model_validate(FINE[case])


def test_the_trainers_configuration_is_the_trainers_half_of_the_spec() -> None:
    spec = Spec.model_validate(WHOLE | {"pod": {"nodeSelector": {"a": "b"}}, "runPolicy": {"maxRetries": 1}})
    assert json.loads(spec.config.to_json()) == WHOLE
    assert JobConfig.model_validate_json(spec.config.to_json()).quantize


def test_an_invalid_spec_is_told_field_by_field() -> None:
    job = a_job(SPEC | {"pause": True, "training": {"maxSteps": 0}})
    assert job.spec is None
    assert job.problem is not None
    assert "spec.pause: unknown to this version of the operator" in job.problem
    assert "spec.training.maxSteps" in job.problem
    with pytest.raises(InvalidJobError):
        _ = job.valid_spec


@pytest.mark.parametrize("name", ["a" * 41, "a.b"])
def test_a_name_that_the_schema_of_another_version_let_through_is_a_problem(name: str) -> None:
    assert FineTuneJob.parse(job_body(name=name)).problem


def test_a_status_of_another_version_is_read_as_far_as_it_goes() -> None:
    status = a_job(status={"phase": "Training", "attempts": "many", "future": 1}).status
    assert (status.phase, status.attempts) == ("Training", None)


def condition(kind: str, **more: str) -> JSON:
    told = {"type": kind, "status": "True", "reason": "x", "message": "x", "lastTransitionTime": format_time(START)}
    return told | more


def test_of_a_list_only_the_entry_that_cannot_be_read_is_dropped() -> None:
    stored = [condition("Accepted"), {"type": "Odd"}, condition("Finished"), 7, condition("Future", since="later")]
    status = a_job(status={"conditions": stored, "training": {"step": 3, "future": 1}}).status
    assert [c.type for c in status.conditions or ()] == ["Accepted", "Finished", "Future"]
    assert status.finished, "a job that has ended is never begun again"
    assert status.training is not None
    assert status.training.step == 3


def test_what_is_stored_is_not_changed_by_reading_it() -> None:
    stored = {"conditions": [{"type": "Odd"}]}
    assert a_job(status=stored).stored_status == {"conditions": [{"type": "Odd"}]}


def test_a_training_of_which_nothing_is_known_is_left_out_of_what_is_stored() -> None:
    assert Status(phase="Training", training=TrainingStatus()).to_dict() == {"phase": "Training"}


def test_a_long_message_is_cut_to_the_limit() -> None:
    assert len(cut("x" * 5000)) == 1024


def test_a_missing_image_is_told_by_the_variables_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FINETUNE_TRAINER_IMAGE", raising=False)
    with pytest.raises(SettingsError, match="FINETUNE_TRAINER_IMAGE is not set"):
        Settings.from_environment()


def test_a_wrong_setting_is_told_by_the_variables_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_TRAINER_IMAGE", "x")
    monkeypatch.setenv("FINETUNE_WORKERS", "none")
    with pytest.raises(SettingsError, match="FINETUNE_WORKERS is wrong"):
        Settings.from_environment()
