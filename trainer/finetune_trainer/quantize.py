"""finetune-trainer quantize --name NAME --config job.json --work DIR: a GPTQ, AWQ or GGUF form of the finished model.

GPTQ rounds each layer column by column and lets the columns not yet rounded make up for the error on rows of the
training set (Frantar et al. 2022, arXiv:2210.17323). AWQ scales up the weights that large activations meet before it
rounds, and takes the scale back in the layer before (Lin et al. 2023, arXiv:2306.00978).

What is written is loaded back, compared with the finished model and made to write an answer, in a process of its own:
gptqmodel changes classes of transformers while it quantizes, and what loads beside it may load for nobody else.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import logging
import math
import os
import random
import shutil
import tempfile
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.config import Calibration, QuantizeMethod
from finetune_trainer.data.tokenized import INPUT_IDS, LENGTHS, TRAIN, read_rows
from finetune_trainer.evaluate import Comparison, compare, finished_dtype, read_token_rows
from finetune_trainer.models import gguf_export
from finetune_trainer.models.awq_clips import clip_by_moments
from finetune_trainer.models.awq_packing import pack_in_groups
from finetune_trainer.models.awq_scales import activation_bytes, search_in_place
from finetune_trainer.models.finished import GENERATION_CONFIG, copy_companions, copy_licence, load_quantized
from finetune_trainer.models.folder import CONFIG, load_tokenizer
from finetune_trainer.models.gptq_blocks import round_in_blocks
from finetune_trainer.models.gptq_scales import search_side_by_side
from finetune_trainer.models.loading import GPU_SLACK_BYTES, load_finished, set_up_torch, working_device
from finetune_trainer.progress import Measured
from finetune_trainer.runtime.apart import call_apart
from finetune_trainer.runtime.errors import GateFailed, InvalidConfig, VerificationFailed, translate
from finetune_trainer.runtime.manifest import CalibrationFacts, Made, Manifest, Result
from finetune_trainer.training import samples

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from finetune_trainer.config import JobConfig, Quantize
    from finetune_trainer.evaluate import TokenRow
    from finetune_trainer.progress import ResolvedQuantize
    from finetune_trainer.runtime.context import Context

log = logging.getLogger(__name__)

DEFAULT_SAMPLES, DEFAULT_MAX_LENGTH = 256, 1024
NOT_SHIPPED = ("quant_log.csv",)
ERROR_POWER = 2.0
"""GPTQ takes the scale of each group that has the least sum of errors to this power, of 80 that it tries; by itself
gptqmodel (7.6) takes the one that the largest weight just fits in."""
AWQ_BLOCK_TOKENS, AWQ_BLOCKS = 512, 128
"""What AWQ looks at most: as much as its authors take (https://github.com/mit-han-lab/llm-awq)."""
NEW_TOKENS = 24
COMPARED_TEXTS = 32
"""Held-out rows that two tokenizers must cut alike."""
COMPARED_BYTES = 2 * 2
"""Bytes a parameter on a GPU at most: the finished model and the quantized one, in 16 bits."""


def run(config: JobConfig, context: Context) -> Manifest:
    """Quantize on rows of the training set, write, load back, compare with the finished model, publish."""
    set_up_torch()
    entry, settings = _settings(config, context)

    def build(folder: Path) -> Result:
        facts = None
        if settings.gguf_type is not None:
            export(folder, settings.gguf_type, context)
        else:
            rows, seed = read_calibration_rows(context.work.data), context.resolved.seed
            calibration = choose_calibration(rows, entry, seed)
            tokens = write_with_companions(folder, settings, calibration, context)
            facts = describe_calibration(calibration, rows, entry, seed, tokens)
        found = call_apart(partial(measure, folder=folder), context)
        log.info("it writes: %s", found.answer)
        return judge(entry, settings, found.comparison, facts)

    return context.publish(build)


def export(folder: Path, kind: str, context: Context) -> None:
    """Write the finished model as a GGUF file, its tokenizer and chat template in it."""
    merged = context.work.merged
    gguf_export.write(merged, context.work.tokenizer, folder / gguf_export.file_name(kind), kind, context)
    copy_licence(merged, folder)


def write_with_companions(
    folder: Path, settings: ResolvedQuantize, calibration: list[dict[str, list[int]]], context: Context
) -> int:
    """Write the quantized model and all that belongs to it; returns the tokens that were looked at."""
    merged = context.work.merged
    context.report.begin("loading the finished model")
    tokens = write_quantized(merged, folder, settings, calibration, context)
    copy_companions(merged, context.work.tokenizer, folder)
    shutil.copyfile(merged / GENERATION_CONFIG, folder / GENERATION_CONFIG)
    return tokens


def _settings(config: JobConfig, context: Context) -> tuple[Quantize, ResolvedQuantize]:
    """The entry of the config, and what prepare fixed for it."""
    entry = next(entry for entry in config.quantize or () if entry.name == context.name)
    settings = next((each for each in context.resolved.quantize if each.name == entry.name), None)
    if settings is None:
        msg = f"quantize '{entry.name}' was added after prepare ran. Use a new --work folder for this config."
        raise InvalidConfig(msg)
    return entry, settings


def read_calibration_rows(data: Path) -> list[list[int]]:
    """Tokens of each training row; those that share a sequence stand alone again."""
    table = read_rows(data, TRAIN)
    sequences: list[list[int]] = table.column(INPUT_IDS).to_pylist()
    if LENGTHS not in table.column_names:
        return sequences
    return [
        row
        for ids, lengths in zip(sequences, table.column(LENGTHS).to_pylist(), strict=True)
        for row in _split(ids, lengths)
    ]


def _split(ids: list[int], lengths: list[int]) -> Iterator[list[int]]:
    left = iter(ids)
    return (list(islice(left, length)) for length in lengths)


def choose_calibration(rows: list[list[int]], entry: Quantize, seed: int) -> list[dict[str, list[int]]]:
    """Rows of the training set, whole or their beginnings: never the held-out ones."""
    count, length = _calibration_limits(entry)
    chosen = random.Random(seed).sample(rows, min(count, len(rows)))  # noqa: S311 - a choice, no secret
    return [_whole(row[:length]) for row in chosen]


def _whole(tokens: list[int]) -> dict[str, list[int]]:
    """Tokens that all count, as a plain dict of lists: gptqmodel refuses a BatchEncoding (7.6)."""
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens)}


def describe_calibration(
    chosen: list[dict[str, list[int]]], rows: list[list[int]], entry: Quantize, seed: int, tokens: int
) -> CalibrationFacts:
    """What there is to say of the rows that were chosen, of which `tokens` were looked at."""
    _, length = _calibration_limits(entry)
    return CalibrationFacts(rows=len(chosen), of_rows=len(rows), seed=seed, max_length=length, tokens=tokens)


def _calibration_limits(entry: Quantize) -> tuple[int, int]:
    """How many rows at most, and of how many tokens at most."""
    wanted = entry.calibration or Calibration()
    return wanted.samples or DEFAULT_SAMPLES, wanted.max_length or DEFAULT_MAX_LENGTH


def in_blocks(rows: list[dict[str, list[int]]], limit: int) -> list[dict[str, list[int]]]:
    """The rows one after another, cut in blocks of one length of at most `limit` tokens, for AWQ; a rest is dropped.

    Of rows of several lengths gptqmodel (7.6) would look at the last one alone.
    """
    tokens = [token for row in rows for token in row["input_ids"]]
    length = min(AWQ_BLOCK_TOKENS, limit, len(tokens))
    starts = range(0, len(tokens) - length + 1, length)[:AWQ_BLOCKS]
    return [_whole(tokens[start : start + length]) for start in starts]


def write_quantized(
    finished: Path,
    folder: Path,
    settings: ResolvedQuantize,
    calibration: list[dict[str, list[int]]],
    context: Context,
) -> int:
    """Quantize `finished` into `folder`, in the format that transformers, vLLM and gptqmodel read.

    Returns the tokens that were looked at: AWQ leaves out what fills no block, and what is too much.
    On a GPU gptqmodel holds a layer at a time, which is less than the slack that is asked for; what AWQ looks at stays
    there too, if there is room. Short rows count as well: by itself gptqmodel drops those of up to 10 tokens and
    divides by the number of the others (7.6; the argument of `quantize` that says otherwise does nothing).
    """
    with tempfile.TemporaryDirectory(prefix="quantize-") as aside, redirect_stdout(io.StringIO()):
        gptqmodel = import_gptqmodel(Path(aside))
        quicken(gptqmodel)
        device = working_device(0)
        model = gptqmodel.GPTQModel.load(str(finished), build_settings(gptqmodel, settings, device, aside))
        shape = model.model.config.get_text_config()
        layers = int(shape.num_hidden_layers)
        if settings.method == QuantizeMethod.AWQ:
            calibration = in_blocks(calibration, getattr(shape, "max_position_embeddings", AWQ_BLOCK_TOKENS))
            needed = activation_bytes(model.model, _count_tokens(calibration))
            model.quantize_config.scale_search_chunked_activations = not _has_room(device, needed)
        context.report.begin(f"quantizing to {settings.bits} bits on {len(calibration)} rows", layers, "layers")
        model.layer_callback = LayerCallback(context)
        model.prepare_dataset = partial(model.prepare_dataset, calibration_data_min_length=0)
        with _beating_with_modules(context):
            model.quantize(calibration, batch_size=1, backend=_packer(gptqmodel, settings))
        context.raise_if_stopping()
        model.save(str(folder))
        del model
        _release_memory()
    clean(folder)
    return _count_tokens(calibration)


def _count_tokens(calibration: list[dict[str, list[int]]]) -> int:
    return sum(len(row["input_ids"]) for row in calibration)


def _has_room(device: torch.device, needed: int) -> bool:
    """Whether the device is a GPU with so many bytes free, and slack for the rest."""
    import torch  # noqa: PLC0415 - slow

    return device.type == "cuda" and needed + GPU_SLACK_BYTES <= torch.cuda.mem_get_info(device)[0]


def _release_memory() -> None:
    """Of the host and of the GPU: the process that measures wants both."""
    import torch  # noqa: PLC0415 - slow

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _beating_with_modules(context: Context) -> Iterator[None]:
    """Beat with each forward pass of a module: on a CPU a layer takes many minutes, and nothing else tells of them."""
    from torch.nn.modules.module import register_module_forward_pre_hook  # noqa: PLC0415 - slow

    hook = register_module_forward_pre_hook(context.report.beat)
    try:
        yield
    finally:
        hook.remove()


def build_settings(gptqmodel: Any, settings: ResolvedQuantize, device: torch.device, aside: str) -> Any:  # noqa: ANN401 - a module of gptqmodel and its config
    """The settings in gptqmodel's terms. `aside`: a folder that is gone afterwards."""
    common = {
        "bits": settings.bits,
        "group_size": settings.group_size,
        "sym": settings.symmetric,
        "device": str(device),
        "offload_to_disk_path": aside,
    }
    if settings.method == QuantizeMethod.AWQ:
        return gptqmodel.quantization.config.AWQConfig(format="gemm", **common)
    return gptqmodel.QuantizeConfig(
        desc_act=settings.act_order, damp_percent=settings.dampening_frac, mse=ERROR_POWER, **common
    )


def _packer(gptqmodel: Any, settings: ResolvedQuantize) -> Any:  # noqa: ANN401 - a module of gptqmodel and its name of a kernel
    """The kernel to pack with; the one of AWQ that needs no GPU must be asked for."""
    return gptqmodel.BACKEND.AWQ_TORCH if settings.method == QuantizeMethod.AWQ else gptqmodel.BACKEND.AUTO


class LayerCallback:
    """Progress, a layer at a time; leaves if asked to."""

    def __init__(self, context: Context) -> None:
        """`context`: the report, and the wish to stop."""
        self._context = context

    def layer_complete(self, *, layer_idx: int, submodule_finalized: bool) -> None:
        """What gptqmodel calls after each layer, and again when its weights are packed."""
        if not submodule_finalized:
            self._context.raise_if_stopping()
            self._context.report.update(done=layer_idx + 1)


def import_gptqmodel(aside: Path) -> Any:  # noqa: ANN401 - a module
    """Import gptqmodel (7.6) so that it runs in a pod.

    - On 2 cores it asks for 2 workers of a pool of 1 ("Virtual pool 'model_loader:cpu' requests 2 workers").
    - It compiles a packer at run time: half a minute with a compiler, and the same result without.
    - It writes `logs/` into the current folder, which may be read-only.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    gptqmodel = importlib.import_module("gptqmodel")
    loop_processor: Any = importlib.import_module("gptqmodel.looper.loop_processor")
    loop_processor._PROJECT_LOG_DIR = aside  # noqa: SLF001 - there is no setting
    importlib.import_module("logbar").LogBar.shared().setLevel(logging.ERROR)
    return gptqmodel


def quicken(gptqmodel: Any) -> None:  # noqa: ANN401 - a module
    """GPTQ tries scales side by side and rounds a block of columns in one launch.

    AWQ searches scales where the model is, clips by second moments and packs a group of columns at a time.
    """
    search_side_by_side(gptqmodel.quantization.quantizer.Quantizer)
    round_in_blocks(importlib.import_module("gptqmodel.quantization.gptq_cuda"))
    awq: Any = importlib.import_module("gptqmodel.looper.awq_processor")
    search_in_place(awq.AWQProcessor)
    clip_by_moments(awq.AWQProcessor)
    pack_in_groups(awq.AwqTorchLinear)


def clean(folder: Path) -> None:
    """Take this machine's temporary paths out of the configs, and logs out of the folder.

    gptqmodel writes `offload_to_disk_path` into config.json and quantize_config.json (7.6). Of symmetric AWQ it says
    that there are no zero points, but writes them (all 8): vLLM's fast kernel reads only models that say so.
    """
    for name in NOT_SHIPPED:
        (folder / name).unlink(missing_ok=True)
    for name in (CONFIG, "quantize_config.json"):
        path = folder / name
        settings = _without_paths(json.loads(path.read_text(encoding="utf-8")))
        quantization = settings.get("quantization_config", settings)
        if "zero_point" in quantization:
            quantization["zero_point"] = True
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _without_paths(value: Any) -> Any:  # noqa: ANN401 - any JSON value
    if not isinstance(value, dict):
        return value
    dropped = {"offload_to_disk", "offload_to_disk_path", "_name_or_path"}
    return {key: _without_paths(each) for key, each in value.items() if key not in dropped}


@dataclass(frozen=True)
class Found:
    """What the form is worth that was written."""

    answer: str
    """What it writes after a held-out prompt."""
    comparison: Comparison | None
    """With the finished model; None where nothing is held out."""


def measure(context: Context, folder: Path) -> Found:
    """Load what was written, let it write, compare it with the finished model. VerificationFailed."""
    set_up_torch()
    rows = read_token_rows(context.work.data)
    device = working_device(context.resolved.parameters * COMPARED_BYTES)
    context.report.begin("loading the quantized model back")
    quantized = load_quantized(folder, device)
    answer = _write_answer(quantized, rows, context)
    if (path := gguf_export.find_exported(folder)) is not None:
        some = [list(row.input_ids) for row in rows[:COMPARED_TEXTS]]
        gguf_export.verify_tokenizer(path, load_tokenizer(context.work.tokenizer), some)
    if not rows:
        return Found(answer, None)
    finished = load_finished(context.work.merged, device, finished_dtype(device))
    context.report.begin("comparing with the finished model", len(rows), "rows")
    return Found(answer, compare(finished, quantized, rows, context.polled))


def judge(
    entry: Quantize, settings: ResolvedQuantize, found: Comparison | None, calibration: CalibrationFacts | None = None
) -> Result:
    """What there is to say of the form. VerificationFailed if it computes no numbers, GateFailed beyond its gate."""
    what = _described(settings)
    if found is None:
        if entry.max_perplexity_increase_percent is not None:
            msg = f"quantize '{entry.name}' has a gate (maxPerplexityIncreasePercent), and no row was held out. "
            raise GateFailed(msg + "Hold rows out (evaluation), or drop the gate.")
        told = f"{what}; nothing was held out to compare on."
        return Result(message=told, artifact=_made(entry.name, None, calibration))
    if not (math.isfinite(found.loss) and math.isfinite(found.kl)):
        msg = f"{what}: the model computes no numbers (loss {found.loss}). Use another method, or report this as a bug."
        raise VerificationFailed(msg)
    measured = found.measured()
    message = (
        f"{what}: perplexity {measured.perplexity:.2f}, {measured.perplexity_increase_percent:+.1f}% against the "
        f"16-bit model (KL {measured.kl_divergence:.2g} nats a token, same first choice "
        f"{100 * (measured.top1_agreement or 0.0):.1f}%)."
    )
    _enforce_gate(entry, measured, message)
    return Result(message=message, artifact=_made(entry.name, measured, calibration))


def _described(settings: ResolvedQuantize) -> str:
    if settings.gguf_type is not None:
        return f"Exported as GGUF {settings.gguf_type}"
    return f"Quantized to {settings.bits} bits in groups of {settings.group_size} ({settings.method})"


def _enforce_gate(entry: Quantize, measured: Measured, message: str) -> None:
    """GateFailed, with the figures, where the perplexity rose more than the entry allows."""
    limit, increase = entry.max_perplexity_increase_percent, measured.perplexity_increase_percent or 0.0
    if limit is None or increase <= limit:
        return
    msg = (
        f"{message} quantize '{entry.name}' allows {limit:g}% (maxPerplexityIncreasePercent): nothing was published. "
        "Use more bits, a smaller groupSize or calibration rows like those it will meet, or raise the gate."
    )
    raise GateFailed(msg)


def _made(name: str, measured: Measured | None, calibration: CalibrationFacts | None) -> Made:
    return Made(name=name, type="Quantized", measured=measured, calibration=calibration)


def _write_answer(model: Any, rows: Sequence[TokenRow], context: Context) -> str:  # noqa: ANN401 - a causal language model
    """A greedy answer. VerificationFailed if the model cannot write."""
    tokenizer = load_tokenizer(context.work.tokenizer)
    prompts = samples.choose_prompts(rows, 1) or [[tokenizer.bos_token_id or tokenizer.eos_token_id]]
    try:
        return samples.generate(model, tokenizer, prompts, context.polled, NEW_TOKENS)[0]
    except (RuntimeError, ValueError, IndexError) as error:
        if translate(error) is not None:  # memory, for one
            raise
        msg = f"The quantized model was written but cannot write an answer: {error}. Report this as a bug."
        raise VerificationFailed(msg) from error
