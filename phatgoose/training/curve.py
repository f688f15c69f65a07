"""A training curve: its rows, and how to detect from them that training diverged."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from phatgoose.errors import Diverged

# An exploding loss: so many batches in a row, on average ...
_BATCHES = 5
# ... this many times the loss of the first so many batches, and ...
_TIMES_THE_START = 3.0
# ... so many nats per token worse than a uniform guess. A model that learns has no such batch: its
# worst loss is the base's own. A base that starts worse than a uniform guess is allowed three times
# its first loss.
_ABOVE_A_GUESS = 2.0


@dataclass(frozen=True)
class CurveRow:
    """One row of a training curve.

    Attributes:
        stage: `lora` or `gates`.
        split: `train` (loss of a step's batch), `validation` (of examples kept out of training) or
            `evaluation` (of the task's evaluation examples).
        step: optimizer steps done before this loss was measured.
        loss: mean token cross-entropy; averaged per example first, except for `train`.
        exact_match: share of examples that greedy decoding gets right; None in training.
        lr: learning rate of the step; None but in training.
        tokens: tokens read so far in this stage.
        seconds: time so far in this stage.
    """

    stage: str
    split: str
    step: int
    loss: float
    exact_match: float | None
    lr: float | None
    tokens: int
    seconds: float


def check_curve(curve: Sequence[CurveRow], vocabulary: int) -> None:
    """Raise Diverged if the newest row shows it, naming stage, step, loss and the fix.

    A loss diverges if it is not finite, or if it explodes: the mean of the last 5 batches is above
    3 times that of the stage's first 5, and 2 nats above that of a uniform guess.
    """
    newest = curve[-1]
    where = f"at step {newest.step} of stage {newest.stage}"
    if not math.isfinite(newest.loss):
        what = "loss" if newest.split == "train" else f"{newest.split} loss"
        raise Diverged(
            f"the {what} became {newest.loss} {where}: lower the recipe's "
            f"{newest.stage}.lr, or set its retry_lr"
        )
    if newest.split != "train":
        return
    losses = [r.loss for r in curve if (r.stage, r.split) == (newest.stage, "train")]
    if len(losses) < 2 * _BATCHES:
        return
    start, now = (sum(part) / _BATCHES for part in (losses[:_BATCHES], losses[-_BATCHES:]))
    limit = max(_TIMES_THE_START * start, math.log(vocabulary) + _ABOVE_A_GUESS)
    if now > limit:
        raise Diverged(
            f"the loss exploded to {now:.3g} {where} (mean of {_BATCHES} batches; it began at "
            f"{start:.3g}, the limit is {limit:.3g}): lower the recipe's "
            f"{newest.stage}.lr, or set its retry_lr"
        )
