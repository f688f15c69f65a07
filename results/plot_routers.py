"""Draw the routers of a run: mean over tasks with 95 % intervals, one panel per metric.

    python results/plot_routers.py RUN_DIR [--metric primary nll] [--suite NAME] [--out FILE]

Reads RUN_DIR/summary.parquet and writes RUN_DIR/plots/routers.png. Of the single experts only the
best by each panel's mean is drawn.
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

Row = dict[str, Any]

LOWER_IS_BETTER = {"nll"}
TITLES = {
    "primary": "Accuracy or exact match",
    "nll": "NLL of the right answer",
    "acc": "Accuracy",
    "acc_norm": "Accuracy, scores per character",
    "acc_paper": "Accuracy, scores per token",
    "exact_match": "Exact match",
}
ZERO_SHOT, NOT_ZERO_SHOT, GREY = "#2458a6", "#c2691c", "#8a8a8a"


def main() -> None:
    """Read the arguments, draw, print where the picture is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--metric", nargs="+", default=["primary", "nll"], help="one panel each")
    parser.add_argument("--suite", help="suite of tasks (default: the first)")
    parser.add_argument("--out", type=Path, help="picture (default: RUN_DIR/plots/routers.png)")
    args = parser.parse_args()

    path = args.run_dir / "summary.parquet"
    if not path.exists():
        raise SystemExit(f"{path} is not there: the report stage of a run writes it")
    rows = pq.read_table(path).to_pylist()
    suite = choose("suite", args.suite, [row["suite"] for row in rows])
    rows = [row for row in rows if row["suite"] == suite]
    for metric in args.metric:
        choose("metric", metric, [row["metric"] for row in rows])

    out = args.out or args.run_dir / "plots" / "routers.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, suite, args.metric, out)
    print(out)


def choose(what: str, wanted: str | None, there: list[str]) -> str:
    """What was asked for, or else the first there is; ends the script if it is not there."""
    names = list(dict.fromkeys(there))
    if not names or (wanted is not None and wanted not in names):
        raise SystemExit(f"no {what} {wanted or ''} in this run; there are: {', '.join(names)}")
    return wanted or names[0]


def draw(rows: list[Row], suite: str, metrics: list[str], out: Path) -> None:
    """One panel per metric, side by side."""
    panels = [listed(rows, metric) for metric in metrics]
    height = 1.5 + 0.36 * max(map(len, panels))
    figure, axes = plt.subplots(
        1, len(metrics), figsize=(5.2 * len(metrics), height), squeeze=False, layout="constrained"
    )
    for axis, metric, panel in zip(axes[0], metrics, panels, strict=True):
        tasks = {row["task"] for row in rows if row["metric"] == metric} - {None}
        draw_panel(axis, metric, panel)
        axis.set_title(f"{TITLES.get(metric, metric)} ({len(tasks)} tasks)", size=11, loc="left")
    figure.suptitle(f"Suite {suite}: means over tasks, 95 % intervals", x=0.01, ha="left", size=12)
    handles = [
        Line2D([], [], color=ZERO_SHOT, marker="o", label="zero-shot"),
        Line2D([], [], color=NOT_ZERO_SHOT, marker="D", mfc="white", label="not zero-shot"),
        Line2D([], [], color=GREY, linestyle="--", label="merged"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=160)
    plt.close(figure)


def listed(rows: list[Row], metric: str) -> list[Row]:
    """The means of one metric, worst first: all routers, and the best single expert."""
    means = [row for row in rows if row["metric"] == metric and row["task"] is None]
    means.sort(key=lambda row: row["value"], reverse=metric in LOWER_IS_BETTER)
    singles = [row for row in means if row["router"].startswith("single:")]
    return [row for row in means if row not in singles[:-1]]


def draw_panel(axis: Axes, metric: str, panel: list[Row]) -> None:
    """Routers as points with error bars, the best on top."""
    factor = 1 if metric == "nll" else 100
    for y, row in enumerate(panel):
        value, low, high = (factor * row[key] for key in ("value", "low", "high"))
        # The best single expert was picked by these very scores.
        zero_shot = row["zero_shot"] and not row["router"].startswith("single:")
        colour = ZERO_SHOT if zero_shot else NOT_ZERO_SHOT
        marker, inside = ("o", colour) if zero_shot else ("D", "white")
        error = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axis.errorbar(
            value, y, xerr=error, color=colour, fmt=marker, mfc=inside, ms=6, lw=1.6, capsize=3
        )
        if row["router"] == "merged":
            axis.axvline(value, color=GREY, linestyle="--", lw=1, zorder=1)
    axis.set_yticks(range(len(panel)), [label(row) for row in panel])
    axis.set_ylim(-0.6, len(panel) - 0.4)
    unit = "nats per token, lower is better" if metric == "nll" else "%, higher is better"
    axis.set_xlabel(unit)
    axis.grid(axis="x", color="#e3e3e3", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def label(row: Row) -> str:
    """Return a router's name as read on the axis, marked where it cannot be compared."""
    name = str(row["router"])
    if name.startswith("single:"):
        name = f"best single\n{name.removeprefix('single:')}"
    return name if row["comparable"] is not False else f"{name}\n(measured otherwise)"


if __name__ == "__main__":
    main()
