"""Rows that share a sequence stay apart: the logits of each are those of the row alone."""

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.config import JobConfig
from finetune_trainer.data.pack import KEEPS_ROWS_APART, pack_rows, resolve_packing
from finetune_trainer.data.tokenized import INPUT_IDS, LENGTHS, LOSS_MASK
from finetune_trainer.evaluate import IGNORED
from finetune_trainer.runtime.errors import InvalidConfig
from finetune_trainer.training.collate import Collator
from tests.tiny import make_config
from tests.unit.trainer.runs import SETTINGS, replace_settings

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 4,
    "layer_types": ["full_attention", "full_attention"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ALONE = [[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18], [19, 20]]


def make_model(architecture: str, attention: str) -> Any:
    kind = getattr(transformers, architecture)
    known = kind.config_class()
    config = kind.config_class(**{name: value for name, value in SMALL.items() if hasattr(known, name)})
    torch.manual_seed(0)
    return kind._from_config(config, attn_implementation=attention).eval()


def sequence(*rows: list[int]) -> dict[str, Any]:
    ids = [token for row in rows for token in row]
    mask = [place > 0 for row in rows for place in range(len(row))]
    return {INPUT_IDS: ids, LOSS_MASK: mask, LENGTHS: [len(row) for row in rows]}


def arrays(row: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.tensor(value).numpy() for name, value in row.items()}


SEQUENCES = [arrays(sequence(*ALONE[:3])), arrays(sequence(ALONE[3]))]
PACKED = Collator(replace_settings(SETTINGS, packing=True, attention="SDPA"))
FLAT = Collator(replace_settings(SETTINGS, packing=True, attention="FlashAttention2"))


def logits_of_rows(model: Any, batch: dict[str, Any], places: list[tuple[int, int]]) -> list[torch.Tensor]:
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    return [logits[row, start : start + len(ids)] for ids, (row, start) in zip(ALONE, places, strict=True)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", sorted(KEEPS_ROWS_APART))
@pytest.mark.parametrize(
    ("collate", "places"),
    [
        pytest.param(PACKED, [(0, 0), (0, 7), (0, 10), (1, 0)], id="a micro-batch of sequences"),
        pytest.param(FLAT, [(0, 0), (0, 7), (0, 10), (0, 14)], id="one behind the other"),
    ],
)
def test_logits_of_a_packed_row_are_those_of_the_row_alone(
    architecture: str, attention: str, collate: Collator, places: list[tuple[int, int]]
) -> None:
    if attention == "sdpa" and not getattr(transformers, architecture)._supports_sdpa:
        pytest.skip(f"transformers has no SDPA for {architecture}")
    model = make_model(architecture, attention)
    found = logits_of_rows(model, collate(SEQUENCES), places)
    for ids, packed in zip(ALONE, found, strict=True):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("collate", [PACKED, FLAT], ids=["a micro-batch of sequences", "one behind the other"])
def test_what_counts_of_a_packed_row_is_what_counts_of_the_row(collate: Collator) -> None:
    labels = collate(SEQUENCES)["labels"]
    assert labels[labels != IGNORED].tolist() == [token for row in ALONE for token in row[1:]]


def test_flash_attention_is_told_where_rows_begin() -> None:
    batch = FLAT(SEQUENCES)
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 7, 10, 14, 16]
    assert batch["cu_seq_lens_q"].dtype is torch.int32
    assert batch["max_length_q"] == 7
    assert batch["input_ids"].shape == (1, 16)


def test_rows_that_are_not_packed_are_padded_and_masked() -> None:
    batch = Collator(SETTINGS)([arrays(sequence(row)) for row in ALONE[:2]])
    assert batch["attention_mask"].tolist() == [[1] * 7, [1] * 3 + [0] * 4]
    assert batch["labels"][1].tolist() == [IGNORED, 13, 14, *[IGNORED] * 4]


@given(lengths=st.lists(st.integers(1, 30), max_size=60))
def test_every_row_is_packed_once_and_no_sequence_is_too_long(lengths: list[int]) -> None:
    sequences = pack_rows(lengths, 30)
    assert sorted(row for rows in sequences for row in rows) == list(range(len(lengths)))
    assert all(sum(lengths[row] for row in rows) <= 30 for rows in sequences)
    assert sequences == sorted(sequences)


@given(lengths=st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_rows_are_packed_as_tightly_as_by_trl(lengths: list[int]) -> None:
    from datasets import Dataset  # noqa: PLC0415 - slow
    from trl.data_utils import _pack_bfd  # noqa: PLC0415 - slow

    rows = Dataset.from_dict({"input_ids": [[0] * length for length in lengths]}).data.table
    assert len(pack_rows(lengths, 16)) == len(_pack_bfd(rows, 16))


def config_with(**training: Any) -> JobConfig:
    return JobConfig.model_validate(make_config(training=training))


DPO = JobConfig.model_validate(make_config(objective={"type": "DPO"}))
LLAMA, MAMBA = "LlamaForCausalLM", "MambaForCausalLM"


@pytest.mark.parametrize(
    ("config", "architecture", "steps", "packed"),
    [
        pytest.param(config_with(), LLAMA, 100, True, id="Auto packs a long run"),
        pytest.param(config_with(), LLAMA, 99, False, id="Auto leaves a short run its steps"),
        pytest.param(config_with(), MAMBA, 5000, False, id="Auto leaves a model alone that mixes rows"),
        pytest.param(config_with(shuffle=False), LLAMA, 5000, False, id="Auto leaves rows in the order of the files"),
        pytest.param(config_with(packing="On"), LLAMA, 1, True, id="On packs"),
        pytest.param(config_with(packing="Off"), LLAMA, 5000, False, id="Off does not"),
        pytest.param(DPO, LLAMA, 5000, False, id="pairs are not packed"),
    ],
)
def test_when_rows_are_packed(config: JobConfig, architecture: str, steps: int, packed: bool) -> None:
    assert resolve_packing(config, architecture, steps) is packed


@pytest.mark.parametrize(
    ("config", "architecture", "words"),
    [
        pytest.param(config_with(packing="On"), MAMBA, "MambaForCausalLM is not known .* to Off", id="Mamba"),
        pytest.param(config_with(packing="On", shuffle=False), LLAMA, "shuffle is false. Set packing", id="file order"),
    ],
)
def test_packing_that_cannot_be_is_refused(config: JobConfig, architecture: str, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        resolve_packing(config, architecture, 5000)
