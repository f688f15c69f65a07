"""A measured figure beside its baseline, and the table of several of them."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One comparison.

    Attributes:
        name: what was measured.
        ours: our value: seconds, or items per second.
        baseline: what it is compared with, in the same unit.
        ratio: the median of the ratios of paired rounds.
        target: what the ratio must reach; None if nothing was set.
        floor: the best ratio that the operations or the bytes allow; None if unknown.
        better: whether a `lower` or a `higher` ratio is better.
        note: what else a reader must know.
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
    width = max([len("measure"), *(len(figure.name) for figure in figures)])
    print(f"{'measure':{width}}  {'ours':>10}  {'baseline':>10}  ratio  target  floor  note")
    for figure in figures:
        target, floor = (
            "-" if value is None else f"{value:.2f}" for value in (figure.target, figure.floor)
        )
        print(
            f"{figure.name:{width}}  {figure.ours:10.4g}  {figure.baseline:10.4g}  "
            f"{figure.ratio:5.2f}  {target:>6}  {floor:>5}  {figure.note}"
        )
