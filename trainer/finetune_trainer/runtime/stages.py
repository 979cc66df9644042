"""What each stage makes and from what: the one place that knows the order of artifacts.

    prepare   data/               from the config (and model/ and original/, which it makes on the way)
    train     adapter/            from model/, data/     (QLoRA, LoRA)
              merged/             from model/, data/     (Full, GaLore: the model itself is trained)
    merge     merged/             from adapter/, data/, and model/ or original/
    quantize  quantized/<name>/   from merged/, data/
    publish   published/<name>/   from adapter/, merged/ or quantized/<name>/

An artifact belongs to a config if its manifest has the digests that `build_target` computes. A folder with other
digests is another job's: it is refused, never overwritten and never mixed in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finetune_trainer.config import PublishedArtifact
from finetune_trainer.progress import Stage
from finetune_trainer.runtime import manifest
from finetune_trainer.runtime.errors import InvalidConfig, NotFound, VerificationFailed
from finetune_trainer.runtime.manifest import Manifest, Target, digest_of

if TYPE_CHECKING:
    from pathlib import Path

    from finetune_trainer.config import JobConfig, Model, Publish
    from finetune_trainer.runtime.work import WorkFolder


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
        case Stage.PUBLISH:
            return _publish_target(config, work, name)


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
    if target.stage is not Stage.PREPARE:
        return [target.folder]
    return [*(_folder(name, work) for name in target.inputs), work.data]


def inputs_of(target: Target, work: WorkFolder) -> dict[str, Path]:
    """The folders that the stage reads: to be verified before it starts."""
    return {} if target.stage is Stage.PREPARE else {name: _folder(name, work) for name in target.inputs}


def _folder(name: str, work: WorkFolder) -> Path:
    """The folder of an artifact that others are made from."""
    return work.root / name


def model_target(config: JobConfig, work: WorkFolder) -> Target:
    """The base model in the work folder: depends on its source alone."""
    return Target(Stage.PREPARE, work.model, "model", digest_of({"model": _plain(config.model)}))


def original_target(config: JobConfig, work: WorkFolder) -> Target | None:
    """The model that the adapter is merged into, where the config names one (merge.original)."""
    if config.merge is None or config.merge.original is None:
        return None
    return Target(Stage.PREPARE, work.original, "original", digest_of({"original": _plain(config.merge.original)}))


def fetched_targets(config: JobConfig, work: WorkFolder) -> dict[str, Target]:
    """Everything that prepare fetches and keeps, by the name of its folder."""
    original = original_target(config, work)
    return {"model": model_target(config, work)} | ({} if original is None else {"original": original})


def _prepare_target(config: JobConfig, work: WorkFolder) -> Target:
    """Without inputs as long as one of them is missing or damaged: prepare fetches it, then.

    Where artifacts go out to changes nothing of them: places may be added to a run that is done.
    """
    settings = _plain(config.model_copy(update={"output": None}))
    target = Target(Stage.PREPARE, work.data, "data", digest_of({"prepare": settings}))
    try:
        fetched = {name: finished(each) for name, each in fetched_targets(config, work).items()}
    except VerificationFailed:
        return target
    digests = {name: found.digest for name, found in fetched.items() if found is not None}
    return target.with_inputs(**digests) if len(digests) == len(fetched) else target


def _train_target(config: JobConfig, work: WorkFolder) -> Target:
    """The adapter, or the model itself: named by what it is, the same for all that comes after."""
    data = _required(_prepare_target(config, work))
    settings = _plain(manifest.settings_in(work.data))
    for later in ("merge", "quantize"):
        settings.pop(later, None)
    folder, path = (work.adapter, "adapter") if config.trains_adapter else (work.merged, "merged")
    return Target(Stage.TRAIN, folder, path, digest_of({"train": settings})).with_inputs(
        model=data.inputs["model"], data=data.digest
    )


def _merge_target(config: JobConfig, work: WorkFolder) -> Target:
    if not config.trains_adapter:
        msg = f"method.type {config.method_type} trains the model itself: there is nothing to merge. Run quantize next."
        raise InvalidConfig(msg)
    if not config.merges:
        msg = "merge.policy is Never: the job ends with the adapter. Leave merge.policy unset to merge."
        raise InvalidConfig(msg)
    adapter, data = _required(_train_target(config, work)), _required(_prepare_target(config, work))
    settings = manifest.settings_in(work.data).merge
    digest = digest_of({"merge": None if settings is None else _plain(settings)})
    return Target(Stage.MERGE, work.merged, "merged", digest).with_inputs(
        **{name: data.inputs[name] for name in fetched_targets(config, work)}, data=data.digest, adapter=adapter.digest
    )


def _quantize_target(config: JobConfig, work: WorkFolder, name: str | None) -> Target:
    entries = {entry.name: entry for entry in config.quantize or ()}
    if name is None or name not in entries:
        there = ", ".join(entries) or "none"
        msg = f"quantize has no entry named '{name}' (has: {there}). Correct --name, or add the entry to the config."
        raise InvalidConfig(msg)
    data = _required(_prepare_target(config, work))
    merged = _required(_finished_target(config, work))
    settings = [_plain(entry) for entry in manifest.settings_in(work.data).quantize if entry.name == name]
    digest = digest_of({"quantize": _plain(entries[name]), "resolved": settings})
    return Target(Stage.QUANTIZE, work.quantized(name), f"quantized/{name}", digest).with_inputs(
        merged=merged.digest, data=data.digest
    )


def _finished_target(config: JobConfig, work: WorkFolder) -> Target:
    """The finished model, whatever stage makes it."""
    return _merge_target(config, work) if config.trains_adapter else _train_target(config, work)


def _publish_target(config: JobConfig, work: WorkFolder, name: str | None) -> Target:
    entries = {entry.name: entry for _, _, entry in config.destinations()}
    if name is None or name not in entries:
        there = ", ".join(entries) or "none"
        msg = f"output.publish has no entry named '{name}' (has: {there}). Correct --name, or add the entry."
        raise InvalidConfig(msg)
    entry = entries[name]
    artifact = _required(_artifact_target(entry, config, work))
    target = Target(Stage.PUBLISH, work.published(name), f"published/{name}", digest_of({"publish": _plain(entry)}))
    return target.with_inputs(**{artifact_path(entry): artifact.digest})


def _artifact_target(entry: Publish, config: JobConfig, work: WorkFolder) -> Target:
    match entry.artifact:
        case PublishedArtifact.ADAPTER:
            return _train_target(config, work)
        case PublishedArtifact.MERGED:
            return _finished_target(config, work)
        case PublishedArtifact.QUANTIZED:
            return _quantize_target(config, work, entry.quantize_name)


def artifact_path(entry: Publish) -> str:
    """The folder of what an entry publishes, relative to the work folder."""
    match entry.artifact:
        case PublishedArtifact.ADAPTER:
            return "adapter"
        case PublishedArtifact.MERGED:
            return "merged"
        case PublishedArtifact.QUANTIZED:
            return f"quantized/{entry.quantize_name}"


def _required(target: Target) -> Manifest:
    """The manifest of an artifact that must have been made before."""
    if (found := finished(target)) is None:
        command = f"finetune-trainer {target.stage}"
        msg = f"{target.folder} is not there yet: run `{command}` with this config and --work first."
        raise NotFound(msg)
    return found


def _plain(record: Model) -> dict[str, Any]:
    return record.model_dump(mode="json", by_alias=True, exclude_none=True)
