"""The base model brought into the work folder: copied from a volume, converted from GGUF, or downloaded from a hub."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer import manifest, model, stages
from finetune_trainer.errors import AccessDenied, InvalidModel, NotFound, TrainerError, VerificationFailed, VolumeFull
from finetune_trainer.manifest import Manifest, Result, Target
from finetune_trainer.work import read_token, resolve_volume

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finetune_trainer.config import HuggingFaceSource, JobConfig
    from finetune_trainer.context import Context

log = logging.getLogger(__name__)

CHUNK_BYTES = 16 << 20
SPARE_BYTES = 64 << 20
"""Kept free beside the model, for the rows and the manifests."""
GGUF_MAGIC = b"GGUF"
REVISION_FILE = "source.json"
"""In the model's folder: where it came from, with the commit of a hub's model."""
HELD_EXACTLY = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""GGUF types of weights that safetensors hold as they are."""
QUANTIZED_SAVED_AS = "bfloat16"
"""Weights of the k-bit types: bf16's rounding (2^-9) is far below the steps of 8 bits and fewer, at half the size."""


def fetch_model(config: JobConfig, context: Context) -> Manifest:
    """The manifest of the model in the work folder, fetched unless an earlier attempt did so."""
    target = stages.model_target(config, context.work)
    if (found := reusable(target, context)) is not None:
        return found

    def build(folder: Path) -> Result:
        if config.model.hugging_face is not None:
            source = _download(config.model.hugging_face, context, folder)
        else:
            source = _from_volume(config, context, folder)
        (folder / REVISION_FILE).write_text(json.dumps(source, sort_keys=True) + "\n")
        context.report.begin("proving the model", unit="bytes")
        return Result(message="The base model, as it was given.")

    made = manifest.publish(target, context.attempt, build, context.report.bytes_progress)
    shutil.rmtree(_download_folder(context), ignore_errors=True)
    return made


def reusable(target: Target, context: Context) -> Manifest | None:
    """What an earlier attempt made of the target, if it is whole; a damaged one is made anew."""
    try:
        if stages.finished(target) is None:
            return None
        context.report.begin(f"{target.path}/ is there already: verifying it", unit="bytes")
        return manifest.verify(target.folder, context.report.bytes_progress)
    except VerificationFailed as error:
        log.warning("%s Making it anew.", error)
        return None


def revision(folder: Path) -> str | None:
    """The commit of a model from a hub; None from a volume."""
    commit: str | None = json.loads((folder / REVISION_FILE).read_text()).get("commit")
    return commit


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """VolumeFull before anything is written that will not fit."""
    free = shutil.disk_usage(folder).free
    if needed_bytes + SPARE_BYTES > free:
        msg = f"{what} needs {_gib(needed_bytes + SPARE_BYTES)} free in the work folder, there are {_gib(free)}. "
        raise VolumeFull(msg + "Make the job's claim larger, or free space on it.")


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB ({count:,} bytes)"


# From a volume


def _from_volume(config: JobConfig, context: Context, folder: Path) -> dict[str, Any]:
    volume = config.model.volume
    if volume is None:
        msg = "a model has one source"
        raise AssertionError(msg)
    path = resolve_volume(context.sources, volume, "model")
    where = f"model: '{volume.path}' (claim '{volume.claim_name}')"
    gguf = _find_gguf(path, where)
    if gguf is not None:
        return _convert_gguf(gguf, where, context, folder)
    names = model.check_folder(path, where)
    sizes = {name: (path / name).stat().st_size for name in names}
    require_space(folder, sum(sizes.values()), where)
    context.report.begin("copying the model", sum(sizes.values()), "bytes")
    for name in names:
        copy(path / name, folder / name, context)
    return {"source": "volume"}


def _find_gguf(path: Path, where: str) -> Path | None:
    """The GGUF file that a source means: itself, or the only one of a folder without a config."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(4) == GGUF_MAGIC:
                return path
        msg = f"{where} is a file, but no GGUF file. "
        raise InvalidModel(msg + "Give a folder with config, tokenizer and safetensors, or a GGUF file.")
    if (path / model.CONFIG).exists():
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        msg = f"{where} has {len(files)} GGUF files ({names}). Name one of them in volume.path."
        raise InvalidModel(msg)
    return _find_gguf(files[0], f"{where}: {files[0].name}") if files else None


def copy(source: Path, target: Path, context: Context) -> None:
    """Copy a file, telling how far it is; leaves on request between two chunks."""
    with source.open("rb") as reader, target.open("wb") as writer:
        while chunk := reader.read(CHUNK_BYTES):
            context.raise_if_stopping()
            writer.write(chunk)
            context.report.advance(len(chunk))


# From GGUF


def _convert_gguf(path: Path, where: str, context: Context, folder: Path) -> dict[str, Any]:
    """Unpack a GGUF file's weights to safetensors, once: left in GGUF blocks they can be neither trained nor saved."""
    kind, count = _gguf_weights(path, where)
    dtype = HELD_EXACTLY.get(kind, QUANTIZED_SAVED_AS)
    require_space(folder, count * (4 if dtype == "float32" else 2), f"{where}, unpacked from {kind} to {dtype},")
    context.report.begin(f"converting {path.name} ({kind}, {count:,} weights) to {dtype} safetensors")
    try:
        _load_and_save_gguf(path, dtype, folder)
    except (TrainerError, OSError, MemoryError):
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        msg = f"{where} cannot be converted: {reason}. Give the model's own folder with safetensors instead."
        raise InvalidModel(msg) from error
    context.raise_if_stopping()
    model.check_folder(folder, f"{where}, converted")
    return {"source": "volume", "gguf": path.name, "ggufType": kind, "savedAs": dtype}


def _gguf_weights(path: Path, where: str) -> tuple[str, int]:
    """The type of most of the weights, and how many weights there are. InvalidModel if the file is damaged."""
    from gguf import GGUFReader  # noqa: PLC0415 - slow

    try:
        tensors = GGUFReader(path).tensors
        counts: dict[str, int] = {}
        for tensor in tensors:
            kind = tensor.tensor_type.name
            counts[kind] = counts.get(kind, 0) + int(tensor.n_elements)
    except Exception as error:
        msg = f"{where} is damaged or cut off: it cannot be read as GGUF ({error}). Copy the file again."
        raise InvalidModel(msg) from error
    if not counts:
        msg = f"{where} holds no weights. Give a GGUF file of a whole model."
        raise InvalidModel(msg)
    return max(counts, key=counts.__getitem__), sum(counts.values())


def _load_and_save_gguf(path: Path, dtype: str, folder: Path) -> None:
    import torch  # noqa: PLC0415 - slow
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig  # noqa: PLC0415 - slow

    model.quiet()
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
    )
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# From a hub


def _download(source: HuggingFaceSource, context: Context, folder: Path) -> dict[str, Any]:
    """Download a repository at the commit its revision is now. Goes on where an earlier attempt broke off."""
    from huggingface_hub import HfApi  # noqa: PLC0415 - slow

    where = f"model: '{source.repo}'"
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, token=read_token(context.secrets))
    context.report.begin(f"looking up {source.repo}")
    with _told_apart(source):
        found = api.model_info(source.repo, revision=source.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or []}
    names = _wanted(set(sizes), where)
    cache = _download_folder(context) / f"{source.repo.replace('/', '--')}@{found.sha}"
    cache.mkdir(parents=True, exist_ok=True)
    total = sum(sizes[name] for name in names)
    require_space(folder, total - _size_of(cache), f"{where} at {found.sha}")
    context.report.begin(f"downloading {source.repo}", total, "bytes")
    with _watching(cache, context):
        for name in names:
            context.raise_if_stopping()
            with _told_apart(source):
                api.hf_hub_download(source.repo, name, revision=found.sha, local_dir=cache)
    for name in model.check_folder(cache, where):
        _take(cache / name, folder / name)
    return {"source": "huggingFace", "repo": source.repo, "commit": found.sha}


def _download_folder(context: Context) -> Path:
    return context.work.root / ".download"


def _wanted(names: set[str], where: str) -> list[str]:
    """The files of a repository that make up its model; refuses one without safetensors before anything is loaded."""
    weights = {model.WEIGHTS} if model.WEIGHTS in names else {name for name in names if _is_shard(name)}
    if not weights and not any(name.endswith(".safetensors") for name in names):
        msg = f"{where} has no safetensors files. Use a repository that has them, or convert the model yourself."
        raise InvalidModel(msg)
    companions = {name for name in model.COMPANIONS if name in names}
    index = {model.INDEX} & names if model.WEIGHTS not in names else set()
    return [*sorted(companions | index), *sorted(weights)]


def _is_shard(name: str) -> bool:
    return name.startswith("model-") and name.endswith(".safetensors")


@contextmanager
def _told_apart(source: HuggingFaceSource) -> Iterator[None]:
    """The hub's refusals, each with what the user can do."""
    import httpx2  # noqa: PLC0415 - comes with huggingface_hub
    from huggingface_hub import errors  # noqa: PLC0415 - slow

    repo, where = source.repo, f"model: '{source.repo}'"
    try:
        yield
    except errors.GatedRepoError as error:
        msg = f"{where} is gated. Accept its terms on its page, and give the token of that account in tokenSecretRef."
        raise AccessDenied(msg) from error
    except errors.RevisionNotFoundError as error:
        msg = f"{where} has no revision '{source.revision}'. Correct model.huggingFace.revision."
        raise NotFound(msg) from error
    except errors.RepositoryNotFoundError as error:
        if getattr(error.response, "status_code", None) == 401:  # noqa: PLR2004 - HTTP
            msg = f"{where} is private or not there (the hub answers 401). Correct model.huggingFace.repo, "
            raise AccessDenied(msg + "or give a token that may read it in tokenSecretRef.") from error
        msg = f"{where} is not on the hub. Correct model.huggingFace.repo; a private one needs tokenSecretRef."
        raise NotFound(msg) from error
    except errors.RemoteEntryNotFoundError as error:
        msg = f"{where}: a file of '{repo}' is not there any more: {error}"
        raise NotFound(msg) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in {401, 403}:
            msg = f"{where}: the hub refuses the token ({status}). Give one that may read it in tokenSecretRef."
            raise AccessDenied(msg) from error
        msg = f"{where}: the hub answers {status}. It is worth another try later."
        raise TrainerError(msg) from error
    except (httpx2.TransportError, errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, TimeoutError) as error:
        endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
        msg = f"{where}: the hub at {endpoint} cannot be reached ({type(error).__name__}: {error}). "
        raise TrainerError(msg + "Check network, proxy and HF_ENDPOINT, or use a volume source.") from error


@contextmanager
def _watching(folder: Path, context: Context) -> Iterator[None]:
    """Report the bytes that are in a folder, each second, while a library fills it."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(1.0):
            context.report.update(done=_size_of(folder))

    thread = threading.Thread(target=watch, name="download", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _size_of(folder: Path) -> int:
    """Bytes on the disk below a folder; files may come and go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_blocks * 512 if path.is_file() else 0
        except FileNotFoundError:
            continue
    return total


def _take(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
