"""What each stage makes and from what: the one place that knows the order of artifacts.

    prepare   data/               from the config (and model/, which it makes on the way)
    train     adapter/            from model/, data/
    merge     merged/             from model/, adapter/
    quantize  quantized/<name>/   from merged/, data/

An artifact belongs to a config if its manifest has the digests that `build_target` computes. A folder with other
digests is another job's: it is refused, never overwritten and never mixed in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_trainer import manifest
from finetune_trainer.errors import InvalidConfig, NotFound, VerificationFailed
from finetune_trainer.manifest import Manifest, Target, digest_of
from finetune_trainer.progress import Stage

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_trainer.config import JobConfig, Model
    from finetune_trainer.work import WorkFolder


def build_target(stage: Stage, config: JobConfig, work: WorkFolder, name: str | None = None) -> Target:
    """What the stage is to make. Artifacts it is made from must be there (NotFound) and of this config."""
    match stage:
        case Stage.PREPARE:
            return _prepare_target(config, work)
        case Stage.TRAIN:
            return _train_target(config, work)
        case Stage.MERGE:
            return _merge_target(config, work)
        case Stage.QUANTIZE:
            return _quantize_target(config, work, name)


def finished(target: Target) -> Manifest | None:
    """Find the target made already. InvalidConfig if another config's artifact is in its place."""
    if not (target.folder / manifest.MANIFEST_NAME).exists():
        return None
    found = manifest.read(target.folder)
    if target.stage is Stage.PREPARE and not target.inputs and found.inputs and target.has_settings_of(found):
        return None  # the rows are there, their model is not: prepare fetches it and looks again
    if not target.matches(found):
        msg = (
            f"{target.folder} was made from another config or other inputs. "
            f"Use another --work folder for this config, or delete {target.folder} to make it anew."
        )
        raise InvalidConfig(msg)
    return found


def outputs_of(target: Target, work: WorkFolder) -> list[Path]:
    """The folders that a finished stage leaves; the last is its proof."""
    return [work.model, work.data] if target.stage is Stage.PREPARE else [target.folder]


def inputs_of(target: Target, work: WorkFolder) -> dict[str, Path]:
    """The folders that the stage reads: to be verified before it starts."""
    folders = {"model": work.model, "data": work.data, "adapter": work.adapter, "merged": work.merged}
    return {} if target.stage is Stage.PREPARE else {name: folders[name] for name in target.inputs}


def model_target(config: JobConfig, work: WorkFolder) -> Target:
    """The base model in the work folder: depends on its source alone."""
    return Target(Stage.PREPARE, work.model, "model", digest_of({"model": _plain(config.model)}))


def _prepare_target(config: JobConfig, work: WorkFolder) -> Target:
    target = Target(Stage.PREPARE, work.data, "data", digest_of({"prepare": _plain(config)}))
    try:
        model = finished(model_target(config, work))
    except VerificationFailed:
        model = None  # damaged: prepare fetches it again
    return target if model is None else target.with_inputs(model=model.digest)


def _train_target(config: JobConfig, work: WorkFolder) -> Target:
    data = _required(_prepare_target(config, work))
    if data.result.resolved is None:
        msg = f"{work.data} holds no settings. Delete it and run prepare again."
        raise NotFound(msg)
    settings = _plain(data.result.resolved)
    settings.pop("quantize", None)
    return Target(Stage.TRAIN, work.adapter, "adapter", digest_of({"train": settings})).with_inputs(
        model=data.inputs["model"], data=data.digest
    )


def _merge_target(config: JobConfig, work: WorkFolder) -> Target:
    if not config.merges:
        msg = "merge.policy is Never: the job ends with the adapter. Leave merge.policy unset to merge."
        raise InvalidConfig(msg)
    adapter = _required(_train_target(config, work))
    return Target(Stage.MERGE, work.merged, "merged", digest_of({"merge": "Dequantized"})).with_inputs(
        model=adapter.inputs["model"], adapter=adapter.digest
    )


def _quantize_target(config: JobConfig, work: WorkFolder, name: str | None) -> Target:
    entries = {entry.name: entry for entry in config.quantize or ()}
    if name is None or name not in entries:
        there = ", ".join(entries) or "none"
        msg = f"quantize has no entry named '{name}' (has: {there}). Correct --name, or add the entry to the config."
        raise InvalidConfig(msg)
    merged, data = _required(_merge_target(config, work)), _required(_prepare_target(config, work))
    resolved = data.result.resolved
    settings = [_plain(entry) for entry in (resolved.quantize if resolved else ()) if entry.name == name]
    digest = digest_of({"quantize": _plain(entries[name]), "resolved": settings})
    return Target(Stage.QUANTIZE, work.quantized(name), f"quantized/{name}", digest).with_inputs(
        merged=merged.digest, data=data.digest
    )


def _required(target: Target) -> Manifest:
    """The manifest of an artifact that must have been made before."""
    if (found := finished(target)) is None:
        command = f"finetune-trainer {target.stage}"
        msg = f"{target.folder} is not there yet: run `{command}` with this config and --work first."
        raise NotFound(msg)
    return found


def _plain(record: Model) -> dict[str, Any]:
    return record.model_dump(mode="json", by_alias=True, exclude_none=True)
