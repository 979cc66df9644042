"""Lists of names within sentences."""

from __future__ import annotations

import pytest

from finetune_trainer.runtime.wording import first_of, what_is_there


@pytest.mark.parametrize(
    ("names", "told"),
    [
        pytest.param([], "", id="none"),
        pytest.param(["b", "a"], "b, a", id="few stay in their order"),
        pytest.param(["a", "b", "c"], "a, b, c", id="as many as are shown"),
        pytest.param(["a", "b", "c", "d"], "a, b, c, ...", id="one too many"),
    ],
)
def test_of_many_names_the_first_are_told(names: list[str], told: str) -> None:
    assert first_of(iter(names), at_most=3) == told


def test_what_is_there_is_told_in_order_and_an_empty_place_as_such() -> None:
    assert what_is_there({"b", "a"}) == "has a, b"
    assert what_is_there(set()) == "it is empty"
