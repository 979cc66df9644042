"""The fast path on a GPU: kernels in bf16, gradients beside autograd's, the same bits again, and a whole job."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_trainer.fast import ops
from finetune_trainer.fast.block import Plan
from finetune_trainer.fast.model import FastModel
from finetune_trainer.models.loading import import_peft, set_up_torch
from tests.gpu.bench import LLAMA_1B, TOKENIZER, Bench, Outcome, forget, make_job

if TYPE_CHECKING:
    from collections.abc import Callable

BF16_ERROR = 0.004
"""Of a rounding to bf16, relative to what is rounded, as a norm over many numbers: 2⁻⁸."""
COSINE = 0.999
FP8_COSINE = 0.95
"""Of products in FP8, whose factors are rounded by 2.6% of their size."""
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def deterministic() -> None:
    set_up_torch()


def draw(*shape: int) -> torch.Tensor:
    """Columns of a wider buffer, as the blocks have them."""
    return torch.randn(shape[0], shape[1] + 64, device="cuda", dtype=torch.bfloat16)[:, : shape[1]]


def normalize() -> list[torch.Tensor]:
    x, above, residual = draw(300, 4096), draw(300, 4096), draw(300, 4096)
    weight = torch.rand(4096, device="cuda", dtype=torch.bfloat16) + 0.5
    out, below = torch.empty_like(x), torch.empty_like(x)
    factors = ops.normalize(x, weight, 1e-5, out)
    ops.normalize_backward(above, x, weight, factors, below, residual)
    return [out, factors, below]


def rotate() -> list[torch.Tensor]:
    x, angles = draw(300, 40 * 128), torch.randn(100, 128, device="cuda")
    forward, back = torch.empty_like(x), torch.empty_like(x)
    ops.rotate(x, angles.cos(), angles.sin(), forward)
    ops.rotate(x, angles.cos(), angles.sin(), back, back=True)
    return [forward, back]


def gate() -> list[torch.Tensor]:
    both, above = draw(300, 2 * 14_336), draw(300, 14_336)
    out, again = torch.empty_like(above), torch.empty_like(above)
    ops.gate(both, out)
    ops.gate_backward(above, both, again)
    return [out, both, again]


def surprise() -> list[torch.Tensor]:
    logits, targets = 4 * draw(300, 128_256), torch.randint(128_256, (300,), device="cuda")
    targets[::7] = -100
    losses = ops.surprise(logits, targets)
    return [losses, logits]


def narrow() -> list[torch.Tensor]:
    x, heads, tails = draw(300, 14_336), torch.rand(14_000, device="cuda"), torch.rand(336, device="cuda")
    return [each.float() for factors in ((), (heads,), (heads, tails)) for each in ops.narrow(x, 14_400, *factors)]


def shrink() -> list[torch.Tensor]:
    wide = torch.nn.Linear(4096, 6144, bias=False, device="cuda", dtype=torch.bfloat16)
    found = []
    for layer in (wide, to_4_bits(wide)):
        scales = ops.peaks(layer) / 448
        straight = torch.zeros(6144, 4224, device="cuda", dtype=ops.FLOAT8)
        turned = torch.zeros(4096, 6272, device="cuda", dtype=ops.FLOAT8)
        ops.shrink(layer, scales, straight[:, :4096])
        ops.shrink(layer, scales, turned[:, :6144], turned=True)
        adapter, factors = torch.randn(6144, 48, device="cuda", dtype=torch.bfloat16), torch.rand(48, device="cuda") + 1
        ops.place(adapter, scales * 1000, factors, straight[:, 4096 : 4096 + 48])
        ops.place(adapter[:4096], None, factors, turned[:, 6144 : 6144 + 48])
        found += [straight.float(), turned.float()]
    return found


@pytest.mark.parametrize("operation", [normalize, rotate, gate, surprise, narrow, shrink])
def test_a_kernel_gives_what_torch_does(
    operation: Callable[[], list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    by_kernel = operation()
    monkeypatch.setattr(ops, "_by_kernel", lambda _: False)
    torch.manual_seed(0)
    for found, expected in zip(by_kernel, operation(), strict=True):
        assert (found.float() - expected.float()).norm() <= BF16_ERROR * expected.float().norm()


def adapt(form: str, dropout: float = 0.0, blocks: int = 2) -> Any:
    """Blocks as wide as Llama-3.2-1B's with an adapter that is not at its start, and a head of its own."""
    torch.manual_seed(0)
    shape = LLAMA_1B | {"num_hidden_layers": blocks, "vocab_size": 8192, "tie_word_embeddings": False}
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**shape, **TOKENIZER), dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    if form == "NF4":
        _all_to_4_bits(model)
    peft = import_peft()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", lora_dropout=dropout))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float().cuda().normal_(0, 0.02)
    return adapted.train()


def _all_to_4_bits(model: Any) -> None:
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            parent, _, own = name.rpartition(".")
            setattr(model.model.get_submodule(parent), own, to_4_bits(layer))
    model.is_loaded_in_4bit = True


def to_4_bits(layer: torch.nn.Linear) -> Any:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit  # noqa: PLC0415 - slow

    narrow = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    narrow.weight = Params4bit(layer.weight.data.cpu(), requires_grad=False, quant_type="nf4")
    return narrow.cuda()


def take(adapted: Any, loss: torch.Tensor) -> Gradients:
    """The gradients of a loss, which are gone from the model then."""
    torch.autograd.backward(loss)
    found = {name: each.grad.clone() for name, each in adapted.named_parameters() if each.grad is not None}
    adapted.zero_grad()
    return found


def cosine(some: Gradients, others: Gradients) -> float:
    left, right = (torch.cat([each[name].flatten() for name in some]) for each in (some, others))
    return float(left @ right / (left.norm() * right.norm()))


def rows(length: int = 300) -> dict[str, torch.Tensor]:
    """Four rows, one of them padded."""
    ids = torch.randint(8192, (4, length), generator=torch.Generator().manual_seed(1)).cuda()
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def count(batch: dict[str, Any]) -> torch.Tensor:
    counted: torch.Tensor = (batch["labels"][:, 1:] != -100).sum()
    return counted


@pytest.mark.parametrize("form", ["NF4", "BF16"])
@pytest.mark.parametrize("plan", list(Plan))
def test_gradients_are_autograds(form: str, plan: Plan) -> None:
    adapted, batch = adapt(form), rows()
    with torch.autocast("cuda", torch.bfloat16):
        plain = adapted(**batch, num_items_in_batch=count(batch)).loss
    expected = take(adapted, plain)
    loss = FastModel(adapted, plan, torch.bfloat16).loss(batch, count(batch))
    assert float(loss) == pytest.approx(float(plain), rel=1e-3)
    assert cosine(take(adapted, loss), expected) >= COSINE


@pytest.mark.parametrize("form", ["NF4", "BF16"])
@pytest.mark.parametrize("plan", list(Plan))
def test_gradients_in_fp8_have_nearly_the_direction_of_those_in_bf16(form: str, plan: Plan) -> None:
    adapted, batch = adapt(form), rows()
    plain = FastModel(adapted, plan, torch.bfloat16).loss(batch, count(batch))
    expected = take(adapted, plain)
    loss = FastModel(adapted, plan, torch.bfloat16, float8=True).loss(batch, count(batch))
    assert float(loss) == pytest.approx(float(plain), rel=0.01)
    assert cosine(take(adapted, loss), expected) >= FP8_COSINE


def pack(batch: dict[str, torch.Tensor], lengths: list[int]) -> dict[str, Any]:
    """The tokens as sequences of these lengths, one after another."""
    ids = batch["input_ids"].reshape(1, -1)[:, : sum(lengths)]
    limits = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).cuda()
    labels = ids.clone()
    labels[0, limits[:-1].long()] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None].cuda()
    return {
        "input_ids": ids, "labels": labels, "position_ids": positions, "cu_seq_lens_q": limits,
        "max_length_q": max(lengths),
    }  # fmt: skip


def test_packed_sequences_are_each_alone() -> None:
    adapted, packed = adapt("BF16"), pack(rows(), [100, 37, 400, 3])
    limits = packed["cu_seq_lens_q"].tolist()
    alone = []
    for start, end in pairwise(limits):
        some = packed["input_ids"][:, start:end]
        with torch.autocast("cuda", torch.bfloat16):
            alone.append(adapted(input_ids=some, labels=some, num_items_in_batch=count(packed)).loss)
    expected = take(adapted, torch.stack(alone).sum())
    loss = FastModel(adapted, Plan.INPUT, torch.bfloat16).loss(packed, count(packed))
    assert float(loss) == pytest.approx(float(torch.stack(alone).sum()), rel=1e-3)
    assert cosine(take(adapted, loss), expected) >= COSINE


@pytest.mark.parametrize("form", ["NF4", "BF16"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("float8", [False, True], ids=["BF16 products", "FP8 products"])
def test_the_same_again_gives_the_same_bits(form: str, packed: bool, dropout: float, float8: bool) -> None:
    adapted = adapt(form, dropout)
    batch: dict[str, Any] = pack(rows(2048), [2000, 500, 3000, 1000]) if packed else rows(2048)
    fast, found = FastModel(adapted, Plan.INPUT, torch.bfloat16, float8=float8), []
    for _ in range(5):
        torch.manual_seed(3)
        found.append(take(adapted, fast.loss(batch, count(batch))))
    assert all(torch.equal(each[name], found[0][name]) for each in found for name in found[0])


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("float8", [False, True], ids=["BF16 products", "FP8 products"])
def test_recorded_passes_among_others_give_the_bits_of_those_that_are_not(
    float8: bool, tight: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tight`: memory does not suffice for a pass beside two recordings."""
    adapted = adapt("NF4")
    fast, plain = (FastModel(adapted, Plan.ATTENTION, torch.bfloat16, float8=float8) for _ in range(2))
    plain.recorder._on = False
    recorded = []
    for number, length in enumerate([300, 200, 300, 200, 400, 300, 200, 400]):
        with torch.no_grad():
            for parameter in fast.trained:
                parameter.mul_(0.99)
        if tight and number == 4:
            monkeypatch.setattr(fast, "take", without_memory_once(fast.take))
        batch = rows(length)
        found, expected = (take(adapted, each.loss(batch, count(batch))) for each in (fast, plain))
        assert all(torch.equal(each, expected[name]) for name, each in found.items())
        recorded.append(len(fast.recorder._recorded))
    assert recorded == ([0, 0, 1, 2, 0, 1, 2, 3] if tight else [0, 0, 1, 2, 2, 2, 2, 3])


def without_memory_once(work: Callable[..., Any]) -> Callable[..., Any]:
    asked = []

    def failing(*arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 1:
            raise torch.OutOfMemoryError
        return work(*arguments)

    return failing


@pytest.mark.parametrize("form", ["NF4", "BF16"])
@pytest.mark.parametrize("plan", list(Plan))
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("float8", [False, True], ids=["BF16 products", "FP8 products"])
def test_what_lies_in_host_memory_meanwhile_changes_no_bit(form: str, plan: Plan, dropout: float, float8: bool) -> None:
    """With blocks enough for copies to be late, and micro-batches of other lengths in between."""
    adapted = adapt(form, dropout, blocks=6)
    batches = [rows(2048), pack(rows(2048), [2000, 500, 3000, 1000]), rows(300), rows(2048)]
    found = []
    for offload in (False, True):
        fast = FastModel(adapted, plan, torch.bfloat16, float8=float8, offload=offload)
        torch.manual_seed(3)
        found.append([take(adapted, fast.loss(batch, count(batch))) for _ in range(3) for batch in batches])
        assert bool(fast.recorder._recorded) == (dropout == 0.0), "passes are recorded with their copies"
    for without, beside in zip(*found, strict=True):
        assert all(torch.equal(beside[name], each) for name, each in without.items())


def peak_of(adapted: Any, plan: Plan, batch: dict[str, Any], *, offload: bool) -> int:
    """Bytes that tensors held at most in three steps."""
    fast = FastModel(adapted, plan, torch.bfloat16, offload=offload)
    forget()
    for _ in range(3):
        take(adapted, fast.loss(batch, count(batch)))
    return torch.cuda.max_memory_allocated()


@pytest.mark.parametrize("plan", [Plan.INPUT, Plan.ATTENTION])
def test_host_memory_takes_from_the_gpu_what_is_counted(plan: Plan) -> None:
    """Of six blocks' tensors two blocks' stay, and the embedding does not."""
    adapted, batch, blocks = adapt("NF4", blocks=6), rows(2048), 6
    words, width = adapted.get_input_embeddings().weight.shape
    sent = 2 * batch["input_ids"].numel() * width * (2 if plan is Plan.ATTENTION else 1)
    before, after = (peak_of(adapted, plan, batch, offload=offload) for offload in (False, True))
    assert before - after == pytest.approx(2 * words * width + (blocks - 2) * sent, rel=0.1)


def test_a_model_with_its_embedding_in_host_memory_is_measured_and_asked_as_before() -> None:
    adapted, batch = adapt("BF16"), rows()
    found = []
    for offload in (False, True):
        FastModel(adapted, Plan.INPUT, torch.bfloat16, offload=offload)
        with torch.no_grad():
            logits = adapted(input_ids=batch["input_ids"]).logits
        words = adapted.generate(input_ids=batch["input_ids"][:1], max_new_tokens=8, do_sample=False)
        found.append((logits, words))
    weight = adapted.get_input_embeddings().weight
    assert weight.is_pinned()
    assert adapted.device.type == "cuda"
    assert all(torch.equal(*each) for each in zip(*found, strict=True))


@pytest.mark.parametrize("method", [{"type": "QLoRA"}, {"type": "LoRA"}], ids=["QLoRA", "LoRA"])
def test_a_job_learns_as_much_as_by_autograd(
    method: dict[str, Any], bench: Bench, told: Callable[[Outcome], Outcome]
) -> None:
    ways = {
        way: told(bench.train(f"{method['type']} {way}", make_job("1b", method, fastPath=way)))
        for way in ("Auto", "Off")
    }
    assert ways["Auto"].first_loss == pytest.approx(ways["Off"].first_loss, rel=0.003)
    assert ways["Auto"].last_loss == pytest.approx(
        ways["Off"].last_loss, rel=0.1
    )  # in steep fall: 20 steps from 12.3 to 1.2
