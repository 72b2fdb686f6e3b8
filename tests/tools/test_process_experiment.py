"""The parts of the process-reward experiment that decide what it says."""

import random

import pytest

from ppomax.engine.data.chat import Turn
from ppomax.engine.rewards.functions import Response
from ppomax.tools.process_experiment import first_at, solution, step_rewards


def rewards(prompt: str, *lines: str) -> list[float]:
    response = Response((Turn("human", prompt),), "\n".join(lines), "", 0, True, lines)
    return step_rewards([response])[0]


def test_a_line_is_right_where_it_goes_on_from_the_line_before() -> None:
    assert rewards("3 5 2", "3+5=8", "8+2=0") == [1, 1]
    assert rewards("3 5 2", "3+5=9", "9+2=1") == [0, 1]  # right, though it starts from a wrong result
    assert rewards("3 5 2", "3+5=8", "3+2=5") == [1, 0]
    assert rewards("3 5 2", "3+5=8", "8+2=0", "0+0=0") == [1, 1, 0]  # one too many
    assert rewards("3 5 2", "3+5=", "0+2=2") == [0, 1]  # no result counts as 0


@pytest.mark.parametrize(("wrong", "expected"), [(0.0, 1.0), (1.0, 0.1)])
def test_as_many_lines_are_right_as_the_data_should_have(wrong: float, expected: float) -> None:
    draw, found = random.Random(0), []
    for _ in range(300):
        digits = [draw.randrange(10) for _ in range(7)]
        found += rewards(" ".join(map(str, digits)), *solution(digits, draw, wrong).split("\n"))
    assert len(found) == 1800
    assert sum(found) / len(found) == pytest.approx(expected, abs=0.03)


def test_the_first_point_at_a_level_lies_on_the_line_to_it() -> None:
    assert first_at([0, 2, 4], [0.1, 0.4, 0.6], 0.5) == pytest.approx(3.0)
    assert first_at([0, 2, 4], [0.5, 0.4, 0.6], 0.5) == 0.0
    assert first_at([0, 2, 4], [0.1, 0.2, 0.3], 0.5) is None
