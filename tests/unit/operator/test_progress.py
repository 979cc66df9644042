"""What is heard of a running stage, and for how long it has been so."""

from __future__ import annotations

import pytest

from finetune_operator.facts import StagePod, parse_pods
from finetune_operator.progress import ProgressReader
from finetune_trainer.progress import Progress, Stage
from tests.unit.operator.builders import RUNNING, UID, pod_body

(POD,) = parse_pods([pod_body(**RUNNING)], UID)


class Told(ProgressReader):
    """A reader whose pod tells what it is given to tell; None: it does not answer."""

    def __init__(self, told: list[Progress | None]) -> None:
        self.now = 0.0
        self.told = iter(told)
        super().__init__(30, clock=lambda: self.now)

    async def _ask(self, pod: StagePod) -> Progress | None:  # noqa: ARG002 - of its one pod
        return next(self.told)


def a_pulse(number: int, still: float = 0.0) -> Progress:
    return Progress(stage=Stage.TRAIN, attempt=1, activity="training", pulse=number, still_seconds=still)


async def test_an_old_answer_is_no_sign_that_nothing_moves() -> None:
    reader = Told([a_pulse(number) for number in range(3)])
    await reader.read(POD, 10)
    reader.now = 10.0
    assert (await reader.read(POD, 10))[1] == 0


async def test_a_pod_is_asked_once_an_interval() -> None:
    reader = Told([a_pulse(1), a_pulse(2)])
    heard = [await reader.read(POD, 3600) for reader.now in (0.0, 10.0, 29.0)]
    assert [progress.pulse for progress, _ in heard if progress] == [1, 1, 2]


@pytest.mark.parametrize(
    "later", [[a_pulse(1, 30.0), a_pulse(1, 60.0)], [None, None]], ids=["it stands still", "it does not answer"]
)
async def test_what_does_not_move_or_answer_grows_old(later: list[Progress | None]) -> None:
    reader = Told([a_pulse(1), *later])
    heard = [await reader.read(POD, 3600) for reader.now in (0.0, 30.0, 60.0)]
    assert [still for _, still in heard] == [0.0, 30.0, 60.0]
    assert heard[-1][0] == (later[-1] or a_pulse(1))


async def test_an_operator_that_was_away_hears_for_how_long_nothing_moved() -> None:
    assert (await Told([a_pulse(7, 1790.0)]).read(POD, 1800))[1] == 1790.0


async def test_a_pod_that_answers_again_tells_itself_for_how_long_nothing_moved() -> None:
    reader = Told([a_pulse(1), None, a_pulse(9, 5.0)])
    heard = [await reader.read(POD, 3600) for reader.now in (0.0, 30.0, 60.0)]
    assert [still for _, still in heard] == [0.0, 30.0, 5.0]
