"""Plots of a run: a comparison of its routers, and the routing weights of one router.

Only the functions that draw import matplotlib, since a run without it still has tables.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from harness.extra_routers import SINGLE
from harness.metrics import LOWER_IS_BETTER
from harness.reporting.tables import Tables
from harness.run_folder import (
    ROUTING,
    ROUTING_FOLDER,
    SUMMARY,
    SUMMARY_FILE,
    file_stem,
    read_table,
)
from harness.storage import Folder
from phatgoose.errors import PhatgooseError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Row = dict[str, Any]
# kind of linear -> shares, experts by layers (NaN where a layer has no such linear)
Panels = dict[str, np.ndarray]

_TITLES = {
    "primary": "Accuracy or exact match",
    "nll": "NLL of the correct answer",
    "acc": "Accuracy",
    "acc_norm": "Accuracy, scores per character",
    "acc_paper": "Accuracy, scores per token",
    "exact_match": "Exact match",
}
_ZERO_SHOT, _NOT_ZERO_SHOT, _GRAY = "#2458a6", "#c2691c", "#8a8a8a"
_EQUAL = "#1a9a8a"  # color of the mark for an equal share of every expert


def plot_routers(
    folder: Folder,
    *,
    metrics: Sequence[str] | None = None,
    suite: str | None = None,
    out: Path | None = None,
) -> Path:
    """Plot the routers' means over a suite's tasks with 95 % intervals, one panel per metric.

    Only the single expert with the best mean of a panel is drawn there.

    Args:
        folder: the run folder.
        metrics: one panel for each. The default is the primary metric and nll, if measured.
        suite: the suite of tasks. The default is the first.
        out: the output file. The default is `plots/routers.png` in a local run folder.

    Returns:
        The path of the plot.

    Raises:
        PhatgooseError: matplotlib is not installed, the run has no summary, suite or metric of
            that name, or the run folder is not local and `out` is not given.
    """
    if not folder.exists(SUMMARY_FILE):
        raise PhatgooseError(f"{folder}/{SUMMARY_FILE} is missing. Run the stage report.")
    rows = read_table(folder, SUMMARY_FILE, SUMMARY).to_pylist()
    suite = _choose("suite", suite, [row["suite"] for row in rows])
    rows = [row for row in rows if row["suite"] == suite]
    measured = [row["metric"] for row in rows]
    metrics = metrics or [metric for metric in ("primary", "nll") if metric in measured]
    for metric in metrics:
        _choose("metric", metric, measured)
    picture = _picture(folder, out, "routers.png")
    _draw_routers(rows, suite, metrics, picture)
    return picture


def plot_routing(
    folder: Folder,
    *,
    router: str | None = None,
    task: str | None = None,
    out: Path | None = None,
) -> Path:
    """Plot the routing weights of a router on one task, one panel per kind of linear.

    Args:
        folder: the run folder.
        router: the router. The default is phatgoose, or else the first.
        task: the evaluation task. The default is the first.
        out: the output file. The default is `plots/routing_<router>_<task>.png` in a local run
            folder.

    Returns:
        The path of the plot.

    Raises:
        PhatgooseError: matplotlib is not installed, nothing was routed, there is no router or task
            of that name, or the run folder is not local and `out` is not given.
    """
    tables = Tables(folder, ROUTING_FOLDER, ROUTING)
    if not len(tables):
        raise PhatgooseError(f"{folder}/{ROUTING_FOLDER} has no rows: nothing was routed")
    router = _choose("router", router, tables.distinct("router"), "phatgoose")
    task = _choose("task", task, tables.distinct("task", router=router))
    parts = tables.select(["linear", "expert", "share"], router=router, task=task)
    routing = pa.concat_tables(parts)
    name = f"routing_{file_stem(router)}_{file_stem(task)}.png"
    picture = _picture(folder, out, name)
    _draw_routing(routing, router, task, picture)
    return picture


def _figure(width: float, height: float) -> "Figure":
    """Return an empty figure; PhatgooseError if matplotlib is not installed.

    It is created without pyplot, so it needs no display and does not change the caller's backend.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PhatgooseError(
            "plots need matplotlib. Install it with `pip install 'phatgoose[plots]'`."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _choose(what: str, wanted: str | None, there: Sequence[str], default: str = "") -> str:
    """Return the wanted name, else the default, else the first one."""
    names = list(dict.fromkeys(there))
    if not names or (wanted is not None and wanted not in names):
        raise PhatgooseError(f"no {what} {wanted or ''} in this run; available: {', '.join(names)}")
    return wanted or (default if default in names else names[0])


def _picture(folder: Folder, out: Path | None, name: str) -> Path:
    """Return the output path, and create its folder."""
    path = out or folder.local(f"plots/{name}")
    if path is None:
        raise PhatgooseError(f"{folder} is not a local folder. Give an output file with --out.")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _draw_routers(rows: list[Row], suite: str, metrics: Sequence[str], out: Path) -> None:
    """Draw one panel per metric, side by side."""
    panels = [_listed(rows, metric) for metric in metrics]
    height = 1.5 + 0.36 * max(map(len, panels))
    figure = _figure(5.2 * len(metrics), height)
    from matplotlib.lines import Line2D

    axes = figure.subplots(1, len(metrics), squeeze=False)
    for axis, metric, panel in zip(axes[0], metrics, panels, strict=True):
        tasks = {row["task"] for row in rows if row["metric"] == metric} - {None}
        _draw_routers_panel(axis, metric, panel)
        axis.set_title(f"{_TITLES.get(metric, metric)} ({len(tasks)} tasks)", size=11, loc="left")
    figure.suptitle(f"Suite {suite}: means over tasks, 95 % intervals", x=0.01, ha="left", size=12)
    handles = [
        Line2D([], [], color=_ZERO_SHOT, marker="o", label="zero-shot"),
        Line2D([], [], color=_NOT_ZERO_SHOT, marker="D", mfc="white", label="not zero-shot"),
        Line2D([], [], color=_GRAY, linestyle="--", label="merged"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out, dpi=160)


def _listed(rows: list[Row], metric: str) -> list[Row]:
    """Return the means of one metric, worst first: all routers, and the best single expert."""
    means = [row for row in rows if row["metric"] == metric and row["task"] is None]
    means.sort(key=lambda row: row["value"], reverse=metric in LOWER_IS_BETTER)
    singles = [row for row in means if row["router"].startswith(SINGLE)]
    return [row for row in means if row not in singles[:-1]]


def _draw_routers_panel(axis: "Axes", metric: str, panel: list[Row]) -> None:
    """Draw routers as points with error bars, the best on top."""
    factor = 1 if metric == "nll" else 100
    for y, row in enumerate(panel):
        value, low, high = (factor * row[key] for key in ("value", "low", "high"))
        # The best single expert was chosen by these scores.
        zero_shot = row["zero_shot"] and not row["router"].startswith(SINGLE)
        color = _ZERO_SHOT if zero_shot else _NOT_ZERO_SHOT
        marker, inside = ("o", color) if zero_shot else ("D", "white")
        error = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axis.errorbar(
            value, y, xerr=error, color=color, fmt=marker, mfc=inside, ms=6, lw=1.6, capsize=3
        )
        if row["router"] == "merged":
            axis.axvline(value, color=_GRAY, linestyle="--", lw=1, zorder=1)
    axis.set_yticks(range(len(panel)), [_label(row) for row in panel])
    axis.set_ylim(-0.6, len(panel) - 0.4)
    unit = "nats per token, lower is better" if metric == "nll" else "%, higher is better"
    axis.set_xlabel(unit)
    axis.grid(axis="x", color="#e3e3e3", lw=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _label(row: Row) -> str:
    """Return the axis label of a router, with a note if it is not comparable."""
    name = str(row["router"])
    if name.startswith(SINGLE):
        name = f"best single\n{name.removeprefix('single:')}"
    return name if row["comparable"] is not False else f"{name}\n(not comparable)"


def _kind_and_layer(linear: str) -> tuple[str, int]:
    """Return a linear's kind and layer, from its dotted name.

    `model.layers.3.mlp.up_proj` is an `mlp.up_proj` of layer 3, and
    `decoder.block.3.layer.1.EncDecAttention.k` a `decoder EncDecAttention.k` of layer 3.
    """
    match = re.fullmatch(r"(.*?)\.(\d+)\.(?:layer\.\d+\.)?(.*)", linear)
    if match is None:
        return linear, 0
    part = next((p for p in match[1].split(".") if p in ("encoder", "decoder")), "")
    return f"{part} {match[3]}".strip(), int(match[2])


def _panels(routing: pa.Table) -> tuple[Panels, list[str]]:
    """Return the panels of shares in model order, and the experts in file order."""
    experts = routing["expert"].unique().to_pylist()
    places = {linear: _kind_and_layer(linear) for linear in routing["linear"].unique().to_pylist()}
    layers = 1 + max(layer for _, layer in places.values())
    panels: Panels = {}
    for linear, expert, share in zip(
        *(routing[name].to_pylist() for name in ("linear", "expert", "share")), strict=True
    ):
        kind, layer = places[linear]
        panel = panels.setdefault(kind, np.full((len(experts), layers), np.nan))
        panel[experts.index(expert), layer] = share
    return panels, experts


def _draw_routing(routing: pa.Table, router: str, task: str, out: Path) -> None:
    """Draw all panels on one color scale, and a last panel with the mean over all linears."""
    panels, experts = _panels(routing)
    count = len(panels) + 1
    columns = min(count, 4 if count <= 8 else 5)
    rows = math.ceil(count / columns)
    highest = max(float(np.nanmax(panel)) for panel in panels.values())
    panel_height = 0.5 + min(0.19 * len(experts), 4.0)
    figure = _figure(2.6 * columns + 1.8, panel_height * rows + 0.8)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for i, (axis, kind) in enumerate(zip(axes.flat, panels, strict=False)):
        image = _draw_routing_panel(axis, kind, panels[kind], experts, highest)
        # Only the lowest panel of each column has layer labels.
        axis.tick_params(labelbottom=i + columns >= len(panels))
        axis.set_xlabel("layer" if i + columns >= len(panels) else "", size=8)
    _draw_means(axes.flat[len(panels)], panels)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    _add_colorbar(figure, image, axes, len(experts))
    figure.suptitle(f"Where {router} routes {task}", x=0.01, ha="left", size=12)
    figure.savefig(out, dpi=160)


def _draw_routing_panel(
    axis: "Axes", kind: str, panel: np.ndarray, experts: list[str], highest: float
) -> "AxesImage":
    """Draw one kind of linear: x = layer, y = expert, color = share."""
    from matplotlib.ticker import MaxNLocator

    image = axis.imshow(
        panel, aspect="auto", cmap="magma_r", vmin=0, vmax=highest, interpolation="none"
    )
    axis.set_title(kind, size=9, loc="left", pad=3)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    step = max(1, math.ceil(len(experts) / 25))
    axis.set_yticks(range(0, len(experts), step), experts[::step], size=7.5)
    axis.tick_params(length=2, labelsize=7.5)
    axis.spines[:].set_color("#b0b0b0")
    return image


def _draw_means(axis: "Axes", panels: Panels) -> None:
    """Draw each expert's mean share over all linears, as bars."""
    from matplotlib.ticker import MaxNLocator

    means = np.nanmean(np.concatenate(list(panels.values()), axis=1), axis=1)
    axis.barh(range(len(means)), means, height=0.75, color="#b5367a")
    axis.axvline(1 / len(means), color=_EQUAL, lw=1.5)
    axis.set_title("mean over all linears", size=9, loc="left", pad=3)
    axis.set_xlabel("share", size=8)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axis.tick_params(length=2, labelsize=7.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#b0b0b0")


def _add_colorbar(figure: "Figure", image: "AxesImage", axes: np.ndarray, experts: int) -> None:
    """Draw the color scale, with a mark at an equal share of every expert."""
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=18 * len(axes), pad=0.01)
    bar.set_label("share of the routed weight", size=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    bar.ax.axhline(1 / experts, color=_EQUAL, lw=1.5)
    bar.ax.text(-0.3, 1 / experts, "equal", color=_EQUAL, size=7.5, ha="right", va="center")
