"""What lies in host memory meanwhile changes no bit, whatever the copies' pace, and leaves the plain model whole."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from finetune_trainer.fast import host
from finetune_trainer.fast import model as fast_model
from finetune_trainer.fast.block import Block, Plan
from finetune_trainer.fast.host import Host, HostEmbedding, Sent
from finetune_trainer.fast.model import FastModel
from finetune_trainer.models.census import count_layers, totals
from tests.unit.trainer.fast.test_model import (
    COUNT,
    adapt,
    assert_same_bits,
    by_autograd,
    by_hand,
    make_base,
    make_batch,
    pack_rows,
    take_gradients,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.unit.trainer.fast.test_model import Gradients

CPU = torch.device("cpu")
BLOCKS = 4


class Late(Host):
    """Copies as late as may be, and spoils at once what must not be read: what is fetched, and what may be gone."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._late: list[Callable[[], None]] = []

    def send(self, tensor: Tensor) -> Sent:
        sent = super().send(torch.full_like(tensor, torch.nan))

        def copy() -> None:
            for place, piece in zip(sent.places, host._pieces(tensor), strict=True):
                place[: len(piece)].copy_(piece)
            tensor.fill_(torch.nan)

        self._late.append(copy)
        return sent

    def fetch(self, sent: Sent) -> Tensor:
        tensor = super().fetch(sent).fill_(torch.nan)

        def copy() -> None:
            for place, piece in zip(sent.places, host._pieces(tensor), strict=True):
                piece.copy_(place[: len(piece)])

        self._late.append(copy)
        return tensor

    def settle(self) -> None:
        super().settle()
        for copy in self._late:
            copy()
        self._late.clear()


def adapt_deep(**settings: Any) -> Any:
    return adapt(make_base(num_hidden_layers=BLOCKS), lora_dropout=0.3, **settings)


def step(model: FastModel, adapted: Any, batch: dict[str, Any]) -> tuple[Tensor, Gradients]:
    torch.manual_seed(1)
    loss = model.loss(batch, COUNT)
    torch.autograd.backward(loss)
    return loss.detach(), take_gradients(adapted)


def batches() -> list[dict[str, Any]]:
    return [make_batch(11, 8), pack_rows(make_batch(5, 9, 2)), make_batch(3), make_batch(12, 12, 4), make_batch(1)]


@pytest.mark.parametrize("place_bytes", [host.PLACE_BYTES, 1000], ids=["in one place", "in several"])
@pytest.mark.parametrize("kind", [Host, Late], ids=["at once", "late"])
@pytest.mark.parametrize("plan", Plan)
def test_losses_and_gradients_have_the_same_bits(
    plan: Plan, kind: type[Host], place_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_model, "Host", kind)
    monkeypatch.setattr(host, "PLACE_BYTES", place_bytes)
    adapted, torch_batches = adapt_deep(), batches()
    plain = FastModel(adapted, plan, torch.float64)
    expected = [step(plain, adapted, batch) for batch in torch_batches]
    offloading = FastModel(adapted, plan, torch.float64, offload=True)
    for _ in range(2):
        for batch, found in zip(torch_batches, expected, strict=True):
            assert_same_bits(step(offloading, adapted, batch), found)


@pytest.mark.parametrize("kind", [Host, Late], ids=["at once", "late"])
def test_two_forward_passes_come_before_the_first_one_back(kind: type[Host], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_model, "Host", kind)
    adapted, batch, other = adapt_deep(), make_batch(9, 6), make_batch(4)
    plain = FastModel(adapted, Plan.ATTENTION, torch.float64)
    expected = step(plain, adapted, batch)
    model = FastModel(adapted, Plan.ATTENTION, torch.float64, offload=True)
    torch.manual_seed(1)
    loss = model.loss(batch, COUNT)
    model.loss(other, COUNT)
    torch.autograd.backward(loss)
    assert_same_bits((loss.detach(), take_gradients(adapted)), expected)


def test_places_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PLACE_BYTES", 1000)
    adapted, width = adapt_deep(), 48 * 8
    model = FastModel(adapted, Plan.ATTENTION, torch.float64, offload=True)
    for tokens, most in [((4, 4), 8), ((2,), 8), ((16, 1), 32), ((9, 3), 32), ((16, 2), 32)]:
        step(model, adapted, make_batch(*tokens))
        a_tensor = -(-most * width // 1000)
        assert model._host is not None
        assert len(model._host._free) == (BLOCKS - 1) * 2 * a_tensor


def test_all_but_the_last_block_have_what_they_keep_in_host_memory() -> None:
    adapted = adapt_deep()
    model, seen = FastModel(adapted, Plan.PRODUCTS, torch.float64, offload=True), []
    _, passed = model.forward(make_batch(9, 6))
    for kept in passed.kept:
        assert kept.attended is not None
        seen.append([isinstance(each, Sent) for each in (kept.x, kept.attended.out)])
        assert isinstance(kept.middle, Tensor)
    assert seen == [[True, True]] * (BLOCKS - 1) + [[False, False]]


def test_what_was_sent_is_held_until_it_is_settled() -> None:
    places, tensor = Host(CPU), torch.randn(4, 3)
    values, seen = tensor.clone(), weakref.ref(tensor)
    sent = places.send(tensor)
    del tensor
    gc.collect()
    assert seen() is not None
    places.settle()
    assert seen() is None
    assert torch.equal(places.fetch(sent), values)


def test_copies_are_made_beside_blocks_and_waited_for_one_block_later(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noted(kind: type, name: str) -> None:
        work = getattr(kind, name)

        def note(*given: Any) -> Any:
            done.append(f"{kind.__name__} {name}")
            return work(*given)

        monkeypatch.setattr(kind, name, note)

    for kind, names in ((Host, ("send", "fetch", "settle")), (Block, ("forward", "backward"))):
        for name in names:
            noted(kind, name)
    adapted = adapt_deep()
    step(FastModel(adapted, Plan.INPUT, torch.float64, offload=True), adapted, make_batch(9, 6))
    there = ["Host settle", "Block forward", *["Host settle", "Host send", "Block forward"] * 3, "Host settle"]
    back = [*["Host settle", "Host fetch", "Block backward"] * 3, "Host settle", "Block backward"]
    assert done == there + back


@dataclass
class Stream:
    """Stands for one of a GPU's: it notes whom it waits for."""

    name: str
    waits: list[str]

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(f"{self.name} for {other.name}")


def test_streams_wait_for_one_another_and_nobody_else_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[str] = []
    computing, copying, places = Stream("computing", waits), Stream("copying", waits), Host(CPU)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(stream is copying or pytest.fail("another")))
    monkeypatch.setattr(places, "_stream", copying)
    places._free = [torch.empty(host.PLACE_BYTES, dtype=torch.uint8)]
    sent = places.send(torch.randn(4, 3))
    assert waits == ["copying for computing"]
    places.settle()
    assert waits[1:] == ["computing for copying"]
    places.fetch(sent)
    assert waits[2:] == ["copying for computing"]
    places.settle()
    assert waits[3:] == ["computing for copying"]


def test_a_pass_that_is_recorded_begins_and_ends_with_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CUDA graph records may wait for nothing from before, and must leave no stream behind."""
    waits: list[str] = []
    computing, copying = Stream("computing", waits), Stream("copying", waits)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: computing)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    adapted, batch = adapt_deep(), make_batch(9, 6)
    model = FastModel(adapted, Plan.ATTENTION, torch.float64, offload=True)
    step(model, adapted, batch)
    monkeypatch.setattr(model._host, "_stream", copying)  # after a pass that made the places
    step(model, adapted, batch)
    assert waits[0] == "copying for computing"
    assert waits[-1] == "computing for copying"


# The embedding


def embedding_of(adapted: Any) -> Any:
    return adapted.get_base_model().get_input_embeddings()


def test_the_plain_model_is_what_it_was_with_its_embedding_in_host_memory(tmp_path: Path) -> None:
    adapted, batch = adapt(make_base()), make_batch(7, 5)
    before, keys = by_autograd(adapted, batch), list(adapted.state_dict())
    words = adapted.generate(input_ids=batch["input_ids"], max_new_tokens=4, do_sample=False)
    counted = totals(count_layers(adapted))
    adapted.save_pretrained(tmp_path / "before")
    FastModel(adapted, Plan.INPUT, torch.float64, offload=True)
    assert isinstance(embedding_of(adapted), HostEmbedding)
    assert_same_bits(by_autograd(adapted, batch), before)
    assert torch.equal(adapted.generate(input_ids=batch["input_ids"], max_new_tokens=4, do_sample=False), words)
    assert sorted(adapted.state_dict()) == sorted(keys)
    assert totals(count_layers(adapted)) == counted
    adapted.save_pretrained(tmp_path / "after")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("before", "after")]
    assert files[0] == files[1]


def test_it_stays_in_host_memory_wherever_the_model_goes() -> None:
    adapted = adapt(make_base())
    FastModel(adapted, Plan.INPUT, torch.float64, offload=True)
    weight = embedding_of(adapted).weight
    adapted.to("meta")
    assert embedding_of(adapted).weight is weight
    assert adapted.device == torch.device("meta"), "a model is where its parameters are"


@pytest.mark.parametrize(("tied", "trains"), [(True, False), (False, True)], ids=["tied", "trained"])
def test_an_embedding_that_is_more_than_looked_up_stays(tied: bool, trains: bool) -> None:
    adapted, batch = adapt(make_base(tie_word_embeddings=tied)), make_batch(7, 5)
    expected = by_hand(adapted, batch)
    embedding_of(adapted).weight.requires_grad_(trains)
    model = FastModel(adapted, Plan.PRODUCTS, torch.float64, offload=True)
    assert isinstance(embedding_of(adapted), torch.nn.Embedding)
    assert_same_bits(step(model, adapted, batch), expected)
