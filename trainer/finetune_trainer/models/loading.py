"""Models in memory: the base as it is trained, the same base dequantized, and finished models."""

from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer.models import sharding
from finetune_trainer.models.folder import trusts_code
from finetune_trainer.runtime.distributed import lead, local_rank
from finetune_trainer.runtime.errors import InvalidConfig, InvalidModel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from finetune_trainer.progress import Resolved
    from finetune_trainer.runtime.context import Context

log = logging.getLogger(__name__)

GPU_SLACK_BYTES = 4 * 2**30
"""Room for what is not weights: CUDA itself, and logits of 1,024 tokens of 150,000 words, several times over."""
MEASURED_TOKENS = 1024
"""Padded tokens a batch of held-out rows: on 2 cores larger ones are no faster, and logits of 50,000 words take 200 KB
a token."""
DTYPES = {"BF16": "bfloat16", "FP16": "float16", "FP32": "float32"}
"""Names of torch's dtypes."""
ATTENTIONS = {"SDPA": "sdpa", "FlashAttention2": "flash_attention_2", "Eager": "eager"}
NOISY = (
    "torch.utils._pytree",
    "bitsandbytes.autograd._functions",  # a line for each product of each 8-bit layer
    "bitsandbytes.backends.cpu.ops",
    "transformers.tokenization_utils_base",
)
"""Loggers that warn of what is meant to be."""
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def set_up_torch() -> None:
    """Settings of the process that must stand before torch is imported: no network, no compiler, deterministic.

    - bitsandbytes and gptqmodel compile pieces of torch at run time, which gains nothing here.
    - Threads: libraries count the machine's cores, not those that the pod may use.
    - cuBLAS is only deterministic with a fixed workspace (torch.use_deterministic_algorithms).
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    import torch  # noqa: PLC0415 - after the environment is set
    from transformers.utils import logging as transformers_logging  # noqa: PLC0415 - slow

    if "torch._dynamo" in sys.modules:  # too late for the environment
        torch._dynamo.config.disable = True  # noqa: SLF001 - there is no public name
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a cost, and nothing here reads such memory
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    transformers_logging.set_tqdm_hook(_hidden_bar)
    for noisy in NOISY:
        logging.getLogger(noisy).setLevel(logging.ERROR)


def _hidden_bar(_: object, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:  # noqa: ANN401 - a tqdm
    """A bar that is not drawn; transformers (5.23) has a stand-in for it that `report.beating_with_bars` cannot see."""
    from tqdm import tqdm  # noqa: PLC0415 - lazy

    return tqdm(*args, **{**settings, "disable": True})


def import_peft() -> Any:  # noqa: ANN401 - a module
    """PEFT, which otherwise imports gptqmodel for each adapter (0.21): 7 s and 150 MB that no stage with PEFT needs.

    Nor torchao, for 1 s: no base of ours is quantized by it.
    """
    import importlib.util  # noqa: PLC0415 - beside its use

    import peft  # noqa: PLC0415 - slow

    find_spec = importlib.util.find_spec
    try:
        importlib.util.find_spec = lambda *_: None
        peft.import_utils.is_gptqmodel_available()  # remembers its first answer, as does the next
        peft.import_utils.is_torchao_available()
    finally:
        importlib.util.find_spec = find_spec
    return peft


def usable_cores(quota: Path = CPU_QUOTA) -> int:
    """Cores that this process may use: affinity and the control group's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        limit, period = quota.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if limit == "max" else max(1, min(cores, math.ceil(int(limit) / int(period))))


def training_device(config_gpus: int) -> torch.device:
    """This rank's GPU, or the CPU where the job asks for none. InvalidConfig if a GPU is asked for and none is seen."""
    import torch  # noqa: PLC0415 - slow

    if config_gpus == 0:
        return torch.device("cpu")
    if local_rank() >= torch.cuda.device_count():
        msg = (
            f"parallelism.gpusPerNode is {config_gpus}, but {torch.cuda.device_count()} are seen here. "
            "Run where there are as many, or set gpusPerNode: 0 to try the job out on CPU."
        )
        raise InvalidConfig(msg)
    return torch.device("cuda", local_rank())


def working_device(weights_bytes: int) -> torch.device:
    """A GPU if there is one with room for so many bytes of weights: merging and quantizing need none."""
    import torch  # noqa: PLC0415 - slow

    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if (needed := weights_bytes + GPU_SLACK_BYTES) <= free:
        return torch.device("cuda", 0)
    log.info("the GPU has %.1f GiB free, %.1f are needed: working on the CPU", free / 2**30, needed / 2**30)
    return torch.device("cpu")


def compute_dtype(resolved: Resolved, device: torch.device) -> torch.dtype:
    """What products are computed in; FP16 in place of BF16 on a GPU that lacks it (prepare sees no GPU)."""
    import torch  # noqa: PLC0415 - slow

    dtype: torch.dtype = getattr(torch, DTYPES[resolved.compute_dtype])
    if (
        dtype is torch.bfloat16
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        log.warning("the GPU has no bf16: computing in fp16")
        return torch.float16
    return dtype


def load_base(folder: Path, resolved: Resolved, device: torch.device, dtype: torch.dtype) -> Any:  # noqa: ANN401 - any of transformers' models
    """The base as it is trained: held in its format, the rows of added tokens in place. `dtype`: what is computed in.

    What a quantizer leaves alone (embeddings, norms, head) is held in `dtype`; beside 8-bit layers in fp32, as
    `prepare_model_for_kbit_training` of PEFT has it: in fp16 they overflow.
    """
    import torch  # noqa: PLC0415 - slow

    held = {"Int8": torch.float32, "BF16": torch.bfloat16, "FP16": torch.float16, "FP32": torch.float32}
    model = _load(
        folder,
        held.get(resolved.base_format, dtype),
        device,
        attn_implementation=choose_attention(folder, resolved, device, dtype),
        **quantization_of(resolved, dtype),
        **sharding.loading_options(folder, resolved, dtype),
    )
    keep_weights_on_cpu(model)
    extend_embeddings(model, resolved.added_tokens)
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    return model


def quantization_of(resolved: Resolved, dtype: torch.dtype) -> dict[str, Any]:
    """How transformers quantizes while it loads; nothing for bases of 16 and 32 bits."""
    import torch  # noqa: PLC0415 - slow
    from transformers import BitsAndBytesConfig, GPTQConfig  # noqa: PLC0415 - slow

    match resolved.base_format:
        case "NF4" | "FP4":
            quantization: Any = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
                load_in_4bit=True,
                bnb_4bit_quant_type=resolved.base_format.lower(),
                bnb_4bit_use_double_quant=resolved.double_quantization,
                bnb_4bit_compute_dtype=dtype,
                bnb_4bit_quant_storage=dtype if sharding.is_to_shard(resolved) else torch.uint8,
            )
        case "Int8":
            quantization = BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
        case "FP8":
            from finetune_trainer.models.float8 import Float8Config  # noqa: PLC0415 - slow

            quantization = Float8Config()
        case "GPTQ":
            let_peft_see_gptq()
            # The kernel that is written in torch has gradients, and needs no compiler; exllama's has none.
            quantization = GPTQConfig(bits=4, backend="torch")
        case _:
            return {}
    return {"quantization_config": quantization}


def let_peft_see_gptq() -> None:
    """Undo what `import_peft` does: adapters on GPTQ layers are gptqmodel's business."""
    import peft  # noqa: PLC0415 - slow

    peft.import_utils.is_gptqmodel_available.cache_clear()
    peft.import_utils.is_gptqmodel_available()


def choose_attention(folder: Path, resolved: Resolved, device: torch.device, dtype: torch.dtype) -> str | None:
    """The kernel of attention, by transformers' name; None lets the model choose between SDPA and eager.

    InvalidConfig where FlashAttention2 is asked for and not to be had.
    """
    import torch  # noqa: PLC0415 - slow
    from transformers import utils  # noqa: PLC0415 - slow

    if resolved.attention not in {"Auto", "FlashAttention2"}:
        return ATTENTIONS[resolved.attention]
    installed = device.type == "cuda" and dtype is not torch.float32 and utils.is_flash_attn_2_available()  # type: ignore[attr-defined]
    if installed and _supports_flash_attention(folder):
        return ATTENTIONS["FlashAttention2"]
    if resolved.attention == "FlashAttention2":
        what = "has no such kernel" if installed else "cannot use it here: no GPU, no package flash_attn, or no 16 bits"
        msg = f"model.attention FlashAttention2: the model {what}. Leave attention unset, or set SDPA."
        raise InvalidConfig(msg)
    return None


def _supports_flash_attention(folder: Path) -> bool:
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - slow

    known: Any = AutoModelForCausalLM._model_mapping  # noqa: SLF001 - there is no public way to ask
    kind = type(AutoConfig.from_pretrained(folder, trust_remote_code=trusts_code(folder)))
    return kind in known and bool(known[kind]._supports_flash_attn)  # noqa: SLF001 - likewise


def extend_embeddings(model: Any, added_tokens: Sequence[int]) -> None:  # noqa: ANN401 - a transformers model
    """Give added tokens rows in embeddings and head, each the mean of the rows that are known.

    The same in every stage: an adapter that trained these rows is put on rows of the same places. Models have room for
    more tokens than they know (Qwen2.5: 271): rows there were never trained and are set as well.
    """
    import torch  # noqa: PLC0415 - slow

    if not added_tokens:
        return
    known, last = min(added_tokens), max(added_tokens)
    if last >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(last + 1, mean_resizing=False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        if module is not None:
            with torch.no_grad():
                module.weight[list(added_tokens)] = module.weight[:known].float().mean(0).to(module.weight.dtype)


def keep_weights_on_cpu(model: Any) -> None:  # noqa: ANN401 - a torch module
    """Forbid bitsandbytes to repack 4-bit weights in place on a CPU with AVX512-BF16 (0.50.2, Linear4bit.forward).

    It does so at the first evaluation: from then on scales are rounded to bf16, products computed in bf16, and the
    repacked product has no gradient: whoever evaluates before training trains on wrong gradients, silently.
    """
    from bitsandbytes.nn.modules import Linear4bit  # noqa: PLC0415 - slow

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def load_dequantized(folder: Path, resolved: Resolved, device: torch.device, dtype: torch.dtype) -> Any:  # noqa: ANN401 - any of transformers' models
    """The base with its quantized layers widened to `dtype`: the very weights that the adapter was trained on."""
    return load_base(folder, resolved, device, dtype).dequantize()


def load_finished(folder: Path, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:  # noqa: ANN401 - any of transformers' models
    """A model of the work folder, in one piece, merged or quantized."""
    return _load(folder, dtype, device, **options)


def _load(folder: Path, dtype: torch.dtype, device: torch.device, **options: Any) -> Any:  # noqa: ANN401 - any of transformers' models
    return load_placed(folder, dtype, {"": device}, **options)


def load_placed(folder: Path, dtype: torch.dtype, places: Mapping[str, torch.device], **options: Any) -> Any:  # noqa: ANN401 - any of transformers' models
    """A model whose modules are where `places` has them, by name; "" stands for the rest."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=dict(places),
            local_files_only=True,
            trust_remote_code=trusts_code(folder),
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the volume's fault, not the model's
            raise
        msg = f"The model in {folder} cannot be loaded: {error}. Delete {folder} and run the stage that makes it again."
        raise InvalidModel(msg) from error
    return model.eval()


def put_adapter(base: Any, adapter: Path) -> Any:  # noqa: ANN401 - a causal language model
    """The base with an adapter on it, for use."""
    return import_peft().PeftModel.from_pretrained(base, adapter).eval()


def refuse_broken_weights(folder: Path, progress: Callable[[int, int], None]) -> None:
    """InvalidModel names the first weight of a model's files that has NaN or infinite values.

    Reads all of them: for when a loss was lost before any step. `progress(bytes done, bytes in all)`.
    """
    from safetensors import safe_open  # noqa: PLC0415 - slow

    paths, done = sorted(folder.rglob("*.safetensors")), 0
    total = sum(path.stat().st_size for path in paths)
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not tensor.float().isfinite().all():
                    msg = f"{path.relative_to(folder.parent)}: the weight {name} has values that are NaN or infinite. "
                    raise InvalidModel(msg + "Get the model's files again, or use another model.")
                done += tensor.nbytes
                progress(done, total)


def refuse_broken_model(context: Context) -> None:
    """InvalidModel on all ranks if a weight of the base, or of the adapter to go on from, is no number."""
    context.report.begin("looking for weights that are no numbers", unit="bytes")
    lead(lambda: refuse_broken_weights(context.work.model, context.report.bytes_progress))


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: of the GPU, or of the process on CPU."""
    import resource  # noqa: PLC0415 - beside its use

    import torch  # noqa: PLC0415 - slow

    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
