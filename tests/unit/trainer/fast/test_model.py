"""Losses and gradients beside those that autograd finds on the PEFT model itself.

In float64, where loss and norms are the plain formula: transformers computes these in fp32 whatever the dtype is.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.functional import dequantize_4bit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from finetune_trainer.evaluate import IGNORED
from finetune_trainer.fast import model as fast_model
from finetune_trainer.fast.block import Plan
from finetune_trainer.fast.model import FastModel
from finetune_trainer.models.loading import import_peft
from tests.unit.trainer.fast.columns import FEW
from tests.unit.trainer.fast.packed import pack_linear

peft = import_peft()
WORDS = 97
SIZE = {
    "vocab_size": WORDS,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-2,  # large enough to be missed
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
}
SOME = ["q_proj", "v_proj", "down_proj"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COUNT = 7.0
Gradients = dict[str, Tensor]


def norm_plainly(module: Any, x: Tensor) -> Tensor:
    weight: Tensor = module.weight
    epsilon: float = module.variance_epsilon
    return weight * x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt()


def make_base(family: str = "Llama", **changes: Any) -> Any:
    """A model of random values, biases and norms too, in float64 throughout."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZE, **FAMILIES[family], **changes})
    kind: Any = getattr(transformers, f"{family}ForCausalLM")
    model = kind._from_config(config, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(*((-1, 1) if "bias" in name else (0.5, 1.5)))
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(norm_plainly, module)
    return model


def adapt(model: Any, *, blank: bool = False, **settings: Any) -> Any:
    """The model with adapters of random values; blank as training begins."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ALL, **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).train()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            values = torch.zeros_like(parameter) if blank and "lora_B" in name else torch.randn_like(parameter) / 5
            parameter.data = values.double()
    return adapted


def make_batch(*lengths: int, prompt: int = 1) -> dict[str, Tensor]:
    """Random rows of these lengths, padded on the right, the prompts of each without a loss."""
    shape = (len(lengths), max(lengths))
    ids = torch.randint(WORDS, shape)
    mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]).long()
    labels = torch.where(mask.bool(), ids, IGNORED)
    labels[:, :prompt] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pack_rows(batch: dict[str, Tensor]) -> dict[str, Any]:
    """The same rows one behind the other."""
    there = batch["attention_mask"].bool()
    lengths = there.sum(1).tolist()
    return {
        "input_ids": batch["input_ids"][there][None],
        "labels": batch["labels"][there][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        "max_length_q": max(lengths),
    }


def take_gradients(adapted: Any) -> Gradients:
    """Of all parameters that have one, which are let go."""
    found = {name: each.grad.clone() for name, each in adapted.named_parameters() if each.grad is not None}
    adapted.zero_grad()
    return found


def by_autograd(adapted: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Gradients]:
    logits = adapted(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:].flatten()
    loss = functional.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum") / COUNT
    torch.autograd.backward(loss)
    return loss.detach(), take_gradients(adapted)


def by_hand(
    adapted: Any,
    batch: dict[str, Any],
    plan: Plan = Plan.PRODUCTS,
    dtype: torch.dtype = torch.float64,
    *,
    float8: bool = False,
) -> tuple[Tensor, Gradients]:
    loss = FastModel(adapted, plan, dtype, float8=float8).loss(batch, COUNT)
    torch.autograd.backward(loss)
    return loss.detach(), take_gradients(adapted)


def assert_alike(found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients], tolerance: float = 1e-9) -> None:
    """All within a share of the largest value of each."""
    assert found[1].keys() == expected[1].keys()
    for got, want in [(found[0], expected[0]), *((found[1][name], each) for name, each in expected[1].items())]:
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance * want.abs().max().item() + 1e-12)


def assert_same_bits(found: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients]) -> None:
    assert_alike(found, expected, tolerance=0.0)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], each) for name, each in expected[1].items())


BASES = [
    *(pytest.param(family, {}, id=family) for family in FAMILIES),
    pytest.param("Llama", {"tie_word_embeddings": True}, id="tied embeddings"),
    pytest.param("Llama", {"attention_bias": True, "mlp_bias": True}, id="biases everywhere"),
    pytest.param("Llama", {"num_key_value_heads": 4, "head_dim": 6}, id="heads narrower than the model"),
]


@pytest.mark.parametrize("settings", [{}, {"target_modules": SOME}], ids=["all layers", "some layers"])
@pytest.mark.parametrize(("family", "changes"), BASES)
def test_a_model_has_the_losses_and_gradients_of_autograd(
    family: str, changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    adapted, batch = adapt(make_base(family, **changes), **settings), make_batch(11, 8, 1, prompt=3)
    expected = by_autograd(adapted, batch)
    kept = [by_hand(adapted, batch, plan) for plan in Plan]
    for found in kept:
        assert_alike(found, expected)
        assert_same_bits(found, kept[0])


def cosine(found: Gradients, expected: Gradients) -> float:
    left, right = (torch.cat([each[name].flatten() for name in expected]).double() for each in (found, expected))
    return float(functional.cosine_similarity(left, right, dim=0))


@pytest.mark.parametrize(("family", "changes"), BASES[:4])
def test_products_in_fp8_have_gradients_of_nearly_the_same_direction(family: str, changes: dict[str, Any]) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 16, "num_attention_heads": 4}
    adapted = adapt(make_base(family, **wide, **changes)).float()
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "o_proj" in name or "down_proj" in name:
            parameter.data /= 8  # so that embeddings lead, as in trained models: noise grows from block to block
    batch = make_batch(31, 28, 1, prompt=3)
    (loss, expected), kept = by_autograd(adapted, batch), []
    for plan in Plan:
        found = by_hand(adapted, batch, plan, torch.float32, float8=True)
        assert 0.97 < cosine(found[1], expected) < 1 - 1e-7
        torch.testing.assert_close(found[0], loss, rtol=0.01, atol=0)
        kept.append(found)
    for found in kept:
        assert_same_bits(found, kept[0])


def test_in_float32_they_are_those_of_transformers_itself() -> None:
    adapted = adapt(make_base()).float()
    for module in adapted.modules():
        module.__dict__.pop("forward", None)
    batch = make_batch(11, 8)
    loss = adapted(**batch, num_items_in_batch=torch.tensor(COUNT)).loss
    torch.autograd.backward(loss)
    expected = loss.detach(), take_gradients(adapted)
    loss = FastModel(adapted, Plan.PRODUCTS, torch.float32).loss(batch, COUNT)
    torch.autograd.backward(loss)
    assert_alike((loss.detach(), take_gradients(adapted)), expected, tolerance=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"use_rslora": True}, id="rsLoRA"),
        pytest.param({"r": 70}, id="a rank that is no multiple"),
        pytest.param({"target_modules": ["o_proj"]}, id="attention's output alone"),
        pytest.param({"target_modules": ["gate_proj"]}, id="half of SwiGLU"),
        pytest.param({"layers_to_transform": [1]}, id="the second block alone"),
    ],
)
def test_adapters(settings: dict[str, Any]) -> None:
    adapted, batch = adapt(make_base("Qwen2"), **settings), make_batch(6, 4)
    expected = by_autograd(adapted, batch)
    assert_alike(by_hand(adapted, batch), expected)


def pack_weights(model: Any) -> Any:
    """A twin of the model that has the values to which NF4 rounds; the model itself has them in 4 bits from now on."""
    twin = make_base("Qwen2")
    for name, module in list(model.model.layers.named_modules()):
        if isinstance(module, torch.nn.Linear):
            bias = None if module.bias is None else module.bias.data.float()
            packed = pack_linear(module.weight.data.float(), bias)
            model.model.layers.set_submodule(name, packed)
            rounded = twin.model.layers.get_submodule(name)
            rounded.weight.data = dequantize_4bit(packed.weight.data, packed.weight.quant_state).double()
            if bias is not None:
                rounded.bias.data = bias.double()
    model.is_loaded_in_4bit = True
    return twin


@pytest.mark.parametrize("settings", [{}, {"target_modules": SOME}, {"layers_to_transform": [0]}])
@pytest.mark.parametrize("plan", Plan)
def test_a_base_of_4_bits(plan: Plan, settings: dict[str, Any]) -> None:
    base = make_base("Qwen2")
    twin = adapt(pack_weights(base), **settings)
    adapted, batch = adapt(base, **settings), make_batch(11, 8)
    values = dict(twin.named_parameters())
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = values[name].data.clone()
    assert_alike(by_hand(adapted, batch, plan), by_autograd(twin, batch))


@FEW
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans())
def test_sequences_lie_padded_or_packed_as_alone(lengths: list[int], blank: bool) -> None:
    adapted, batch = adapt(make_base(), blank=blank), make_batch(*lengths)
    alone = [
        by_autograd(adapted, {name: each[row : row + 1, :length] for name, each in batch.items()})
        for row, length in enumerate(lengths)
        if length > 1  # of one token nothing is foretold
    ] or [by_hand(adapted, batch)]
    expected = (
        torch.stack([loss for loss, _ in alone]).sum(),
        {name: sum((one[name] for _, one in alone), torch.zeros(())) for name in alone[0][1]},
    )
    assert_alike(by_hand(adapted, batch), expected)
    assert_alike(by_hand(adapted, pack_rows(batch)), expected)


def test_what_stands_in_the_padding_does_not_matter() -> None:
    adapted, batch = adapt(make_base()), make_batch(4, 9)
    expected = by_hand(adapted, batch)
    batch["input_ids"][0, 4:] += 1
    batch["input_ids"] %= WORDS
    assert_same_bits(by_hand(adapted, batch), expected)


def test_logits_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, batch = adapt(make_base()), make_batch(9, 7)
    expected = by_hand(adapted, batch)
    monkeypatch.setattr(fast_model, "HEAD_ROWS", 4)
    assert_alike(by_hand(adapted, batch), expected)


def test_a_count_on_the_device_is_as_good_as_a_number() -> None:
    adapted, batch = adapt(make_base()), make_batch(5)
    expected = by_hand(adapted, batch)
    loss = FastModel(adapted, Plan.PRODUCTS, torch.float64).loss(batch, torch.tensor(COUNT))
    torch.autograd.backward(loss)
    assert_same_bits((loss.detach(), take_gradients(adapted)), expected)


def test_gradients_of_micro_batches_add_up() -> None:
    adapted, batches = adapt(make_base()), [make_batch(5, 3), make_batch(8)]
    model = FastModel(adapted, Plan.ATTENTION, torch.float64)
    (first, some), (second, others) = (by_autograd(adapted, batch) for batch in batches)
    losses = [model.loss(batch, COUNT) for batch in batches]  # both forward passes before the first one back
    for loss in losses:
        torch.autograd.backward(loss)
    expected = {name: some[name] + others[name] for name in some}
    assert_alike(((losses[0] + losses[1]).detach(), take_gradients(adapted)), (first + second, expected))


def test_steps_of_an_optimizer_are_followed() -> None:
    adapted, batch = adapt(make_base()), make_batch(6, 6)
    model = FastModel(adapted, Plan.INPUT, torch.float64)
    optimizer = torch.optim.SGD(model.trained, lr=0.1)
    for _ in range(3):
        expected = by_autograd(adapted, batch)
        loss = model.loss(batch, COUNT)
        torch.autograd.backward(loss)
        found = {name: each.grad.clone() for name, each in adapted.named_parameters() if each.grad is not None}
        assert_alike((loss.detach(), found), expected)
        optimizer.step()
        adapted.zero_grad()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_itself_stays_as_it_is(family: str) -> None:
    adapted, batch = adapt(make_base(family)), make_batch(7, 5)
    before = {name: each.clone() for name, each in adapted.state_dict().items()}
    trained = {name: each for name, each in adapted.named_parameters() if each.requires_grad}
    logits = adapted(**batch).logits
    model = FastModel(adapted, Plan.PRODUCTS, torch.float64)
    torch.autograd.backward(model.loss(batch, COUNT))
    assert torch.equal(adapted(**batch).logits, logits)
    after = adapted.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], each) for name, each in before.items())
    assert {id(each) for each in model.trained} == {id(each) for each in trained.values()}
    assert take_gradients(adapted).keys() == trained.keys()


# Dropout


def by_hand_after_seed(adapted: Any, batch: dict[str, Any], seed: int, plan: Plan) -> tuple[Tensor, Gradients]:
    torch.manual_seed(seed)
    return by_hand(adapted, batch, plan)


def test_dropout_repeats_with_the_state_of_torch_whatever_is_kept() -> None:
    adapted, batch = adapt(make_base(), lora_dropout=0.3), make_batch(9, 6)
    expected = by_hand_after_seed(adapted, batch, 1, Plan.PRODUCTS)
    for plan in Plan:
        assert_same_bits(by_hand_after_seed(adapted, batch, 1, plan), expected)
    assert by_hand_after_seed(adapted, batch, 2, Plan.PRODUCTS)[0] != expected[0]


@pytest.mark.parametrize("settings", [{}, {"target_modules": SOME}], ids=["all layers", "some layers"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_under_dropout_are_the_slopes_of_its_loss(packed: bool, settings: dict[str, Any]) -> None:
    adapted, batch = adapt(make_base("Qwen3"), lora_dropout=0.3, **settings), make_batch(9, 6)
    batch = pack_rows(batch) if packed else batch
    _, gradients = by_hand_after_seed(adapted, batch, 3, Plan.INPUT)
    step = 1e-5
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            way, kept = torch.randn_like(parameter), parameter.data.clone()
            losses = []
            for sign in (1, -1):
                parameter.data = kept + sign * step * way
                torch.manual_seed(3)
                losses.append(FastModel(adapted, Plan.INPUT, torch.float64).loss(batch, COUNT).item())
            parameter.data = kept
            slope = (losses[0] - losses[1]) / (2 * step)
            assert slope == pytest.approx((gradients[name] * way).sum().item(), rel=1e-5, abs=1e-7), name


def test_dropout_touches_adapters_alone() -> None:
    adapted, batch = adapt(make_base(), blank=True, lora_dropout=0.5), make_batch(9, 6)
    adapted.eval()
    expected, _ = by_autograd(adapted, batch)
    loss, _ = by_hand(adapted, batch)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
