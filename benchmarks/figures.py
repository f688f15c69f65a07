"""A measured figure beside its baseline, and the table of several of them."""

import statistics
from collections.abc import Iterable, Sequence
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
        lowest, highest: of the ratios of paired rounds; None if there was one measurement.
    """

    name: str
    ours: float
    baseline: float
    ratio: float
    target: float | None
    floor: float | None
    better: str
    note: str = ""
    lowest: float | None = None
    highest: float | None = None


def compare(
    name: str,
    rounds: Iterable[tuple[float, float]],
    *,
    better: str = "lower",
    target: float | None = None,
    floor: float | None = None,
    note: str = "",
) -> Figure:
    """Return the figure of rounds, each of which gave our value and the baseline's."""
    ours, baseline = zip(*rounds, strict=True)
    ratios = [own / other for own, other in zip(ours, baseline, strict=True)]
    return Figure(
        name=name,
        ours=statistics.median(ours),
        baseline=statistics.median(baseline),
        ratio=statistics.median(ratios),
        target=target,
        floor=floor,
        better=better,
        note=note,
        lowest=min(ratios),
        highest=max(ratios),
    )


def print_table(figures: Sequence[Figure]) -> None:
    """Print one line for each figure."""
    width = max([len("measure"), *(len(figure.name) for figure in figures)])
    print(
        f"{'measure':{width}}  {'ours':>10}  {'baseline':>10}  ratio  {'of rounds':>13}  target  "
        "floor  note"
    )
    for figure in figures:
        values = (figure.target, figure.floor, figure.lowest, figure.highest)
        target, floor, low, high = ("-" if value is None else f"{value:.2f}" for value in values)
        print(
            f"{figure.name:{width}}  {figure.ours:10.4g}  {figure.baseline:10.4g}  "
            f"{figure.ratio:5.2f}  {f'{low} to {high}':>13}  {target:>6}  {floor:>5}  {figure.note}"
        )
