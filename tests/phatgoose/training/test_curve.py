import math

import pytest

from phatgoose.errors import Diverged
from phatgoose.training.curve import CurveRow, check_curve

VOCABULARY = 1000  # a uniform guess costs 6.9 nats


def curve(losses: list[float], stage: str = "lora", split: str = "train") -> list[CurveRow]:
    return [CurveRow(stage, split, i, loss, None, 1e-3, i, 0.0) for i, loss in enumerate(losses)]


def first_refused(losses: list[float]) -> int | None:
    """Return the step at which losses are refused when they arrive one by one."""
    rows = curve(losses)
    for end in range(1, len(rows) + 1):
        try:
            check_curve(rows[:end], VOCABULARY)
        except Diverged:
            return end - 1
    return None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("split", ["train", "validation", "evaluation"])
def test_a_loss_that_is_not_finite_is_refused_immediately(bad: float, split: str) -> None:
    with pytest.raises(Diverged, match=r"at step 1 of stage gates: lower the recipe's gates\.lr"):
        check_curve(curve([2.0, bad], "gates", split), VOCABULARY)


def test_a_diverging_loss_is_refused_after_a_few_steps() -> None:
    assert first_refused([2.0] * 8 + [50.0] * 5) == 9  # two of five are enough if they are this bad
    assert first_refused([2.0] * 8 + [10.0] * 5) == 12
    with pytest.raises(
        Diverged, match=r"exploded to 10 at step 12 .* began at 2, the limit is 8\.91"
    ):
        check_curve(curve([2.0] * 8 + [10.0] * 5), VOCABULARY)


@pytest.mark.parametrize(
    "losses",
    [
        [2.0, 0.1] * 50,  # noise
        [0.01] * 20 + [8.8] * 20,  # overfitted, then very surprising data
        [30.0] * 10 + [60.0] * 20,  # a base that has never seen the format
        [2.0] * 20 + [30.0] + [2.0] * 20,  # a single batch
        [2.0] * 4 + [1000.0] * 5,  # too few to decide
    ],
)
def test_ordinary_losses_are_not_refused(losses: list[float]) -> None:
    assert first_refused(losses) is None


def test_stages_are_checked_separately() -> None:
    check_curve(curve([1.0] * 10) + curve([40.0] * 30, "gates"), VOCABULARY)


def test_only_training_batches_can_diverge() -> None:
    """Check that an evaluation loss must only be finite, because its rows are not batches."""
    rows = curve([2.0] * 8 + [10.0] * 5)
    for split in ("evaluation", "validation"):
        check_curve([*rows, CurveRow("lora", split, 13, 50.0, 0.0, None, 13, 0.0)], VOCABULARY)


def test_the_limit_is_the_larger_bound() -> None:
    guess = math.log(VOCABULARY) + 2.0
    assert first_refused([2.0] * 5 + [guess - 0.01] * 5) is None
    assert first_refused([2.0] * 5 + [guess + 0.01] * 5) == 9
    assert first_refused([4.0] * 5 + [11.99] * 5) is None
    assert first_refused([4.0] * 5 + [12.01] * 5) == 9
    assert first_refused([4.0] * 4 + [100.0] * 5) is None  # too few to decide


def test_a_loss_that_is_not_finite_is_reported_with_its_split() -> None:
    for split, what in (("train", "loss"), ("evaluation", "evaluation loss")):
        with pytest.raises(Diverged) as caught:
            check_curve(curve([math.inf], "gates", split), VOCABULARY)
        assert str(caught.value) == (
            f"the {what} became inf at step 0 of stage gates: lower the recipe's gates.lr, or "
            "set its retry_lr"
        )
