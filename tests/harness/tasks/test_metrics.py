"""Check BIG-bench's own scores: values computed by hand, and invariants."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.tasks.metrics import bigbench_grade, bigbench_low, bigbench_normalized

GRADES = st.lists(st.integers(0, 4).map(lambda n: n / 4), min_size=1, max_size=6)


def test_the_grade_is_the_score_of_the_likeliest_choice() -> None:
    row = {"grades": [0.0, 0.5, 1.0]}
    assert bigbench_grade(row, [-3.0, -1.0, -2.0]) == 0.5
    assert bigbench_grade(row, [-3.0, -2.0, -1.0]) == 1.0
    assert bigbench_grade(row, [-1.0, -2.0, -3.0]) == 0.0


@given(st.permutations(range(5)), st.integers(-50, 50))
def test_neither_the_order_of_choices_nor_a_common_factor_matters(
    order: list[int], shift: int
) -> None:
    grades, scores = [0.0, 0.25, 1.0, 0.5, 0.75], [-9.0, -2.0, -7.0, -4.0, -3.0]
    row = {"grades": [grades[i] for i in order]}
    assert bigbench_grade(row, [scores[i] + shift for i in order]) == 0.25


def test_chance_is_the_mean_grade_of_the_choices() -> None:
    """Check a value computed by hand: (1/2 + 1/4 + (0.5 + 0.3 + 0.2) / 3) / 3."""
    rows: list[dict[str, Any]] = [
        {"grades": [1, 0]},
        {"grades": [0, 0, 1, 0]},
        {"grades": [0.5, 0.3, 0.2]},
    ]
    assert bigbench_low(rows) == pytest.approx(13 / 36)
    assert bigbench_low([{"grades": []}, {"grades": []}]) == 0.0


@given(st.lists(GRADES, min_size=1, max_size=8))
def test_uniform_guessing_scores_chance(grades: list[list[float]]) -> None:
    """Check the expected grade of a guess, with one try for each choice."""
    rows = [{"grades": own} for own in grades]
    expected = [
        sum(bigbench_grade(row, [float(i == j) for j in range(len(own))]) for i in range(len(own)))
        / len(own)
        for row, own in zip(rows, grades, strict=True)
    ]
    assert bigbench_low(rows) == pytest.approx(sum(expected) / len(expected))


@given(st.floats(0, 0.99), st.floats(0, 1), st.floats(0, 1))
def test_the_scale_runs_from_chance_to_the_best(low: float, one: float, two: float) -> None:
    assert bigbench_normalized(low, low) == pytest.approx(0)
    assert bigbench_normalized(1, low) == pytest.approx(1)
    # The scale is linear, so the mean over documents is the score of the mean.
    mean = (bigbench_normalized(one, low) + bigbench_normalized(two, low)) / 2
    assert bigbench_normalized((one + two) / 2, low) == pytest.approx(mean)


def test_worse_than_chance_is_below_zero() -> None:
    """Check two choices, one of three right: (1/3 - 1/2) / (1 - 1/2) is -1/3."""
    assert bigbench_normalized(1 / 3, 0.5) == pytest.approx(-1 / 3)
    assert bigbench_normalized(0.7, 0.0) == pytest.approx(0.7)
