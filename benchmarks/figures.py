"""One measured figure of a benchmark, and a table of several."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """A measured figure.

    Attributes:
        name: what was measured.
        ours: the value of this project.
        baseline: the value that it is compared with.
        ratio: the median ratio of paired rounds.
        target: the ratio to reach; None without a target.
        floor: the ratio that the number of operations, or of bytes, allows; None if unknown.
        better: `lower` or `higher`: which ratios are better.
        note: what else to know.
    """

    name: str
    ours: float
    baseline: float
    ratio: float
    target: float | None
    floor: float | None
    better: str
    note: str = ""


def print_table(figures: Sequence[Figure]) -> None:
    """Print one line for each figure."""
    width = max(len(figure.name) for figure in figures)
    print(f"{'':{width}}  {'ours':>9} {'baseline':>9} {'ratio':>7} {'target':>7} {'floor':>7}")
    for figure in figures:
        bounds = [
            "-" if value is None else f"{value:.2f}" for value in (figure.target, figure.floor)
        ]
        print(
            f"{figure.name:{width}}  {figure.ours:9.4g} {figure.baseline:9.4g} "
            f"{figure.ratio:7.2f} {bounds[0]:>7} {bounds[1]:>7}  {figure.note}"
        )
