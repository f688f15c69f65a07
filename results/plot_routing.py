"""Draw where a router sent its weight on one task: experts by layers, one panel per kind of linear.

    python results/plot_routing.py RUN_DIR [--router NAME] [--task NAME] [--out FILE]

Reads RUN_DIR/routing/*.parquet and writes RUN_DIR/plots/routing_<router>_<task>.png.
"""

import argparse
import math
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

# kind of linear -> the shares, experts by layers (NaN where a layer has no such linear)
Panels = dict[str, np.ndarray]

EQUAL = "#1a9a8a"  # colour of the mark where every expert would get the same


def main() -> None:
    """Read the arguments, draw, print where the picture is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path, help="folder of the run")
    parser.add_argument("--router", help="default: phatgoose, or else the first")
    parser.add_argument("--task", help="default: the first")
    parser.add_argument("--out", type=Path, help="picture (default: in RUN_DIR/plots)")
    args = parser.parse_args()

    files = sorted((args.run_dir / "routing").glob("*.parquet"))
    if not files:
        raise SystemExit(f"{args.run_dir / 'routing'} holds no parquet: nothing was routed")
    routing = pa.concat_tables(pq.read_table(file) for file in files)
    routing, router = chosen(routing, "router", args.router, "phatgoose")
    routing, task = chosen(routing, "task", args.task)

    name = f"routing_{router.replace(':', '@')}_{task.replace(':', '@')}.png"
    out = args.out or args.run_dir / "plots" / name
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(routing, router, task, out)
    print(out)


def chosen(
    table: pa.Table, column: str, wanted: str | None, default: str = ""
) -> tuple[pa.Table, str]:
    """The rows of one router or task, and its name; ends the script if it is not there."""
    names = table[column].unique().to_pylist()
    if wanted is not None and wanted not in names:
        raise SystemExit(f"no {column} {wanted} in routing/; there are: {', '.join(names)}")
    name = wanted or (default if default in names else names[0])
    return table.filter(pc.equal(table[column], name)), name


def kind_and_layer(linear: str) -> tuple[str, int]:
    """A linear's kind and layer, from its dotted name.

    `model.layers.3.mlp.up_proj` is an `mlp.up_proj` of layer 3, and
    `decoder.block.3.layer.1.EncDecAttention.k` a `decoder EncDecAttention.k` of layer 3.
    """
    match = re.fullmatch(r"(.*?)\.(\d+)\.(?:layer\.\d+\.)?(.*)", linear)
    if match is None:
        return linear, 0
    part = next((p for p in match[1].split(".") if p in ("encoder", "decoder")), "")
    return f"{part} {match[3]}".strip(), int(match[2])


def panels_of(routing: pa.Table) -> tuple[Panels, list[str]]:
    """The shares, sorted into panels in model order, and the experts in the file's order."""
    experts = routing["expert"].unique().to_pylist()
    places = {linear: kind_and_layer(linear) for linear in routing["linear"].unique().to_pylist()}
    layers = 1 + max(layer for _, layer in places.values())
    panels: Panels = {}
    for linear, expert, share in zip(
        *(routing[name].to_pylist() for name in ("linear", "expert", "share")), strict=True
    ):
        kind, layer = places[linear]
        panel = panels.setdefault(kind, np.full((len(experts), layers), np.nan))
        panel[experts.index(expert), layer] = share
    return panels, experts


def draw(routing: pa.Table, router: str, task: str, out: Path) -> None:
    """All panels on one scale of colours, and the mean over all linears in a last one."""
    panels, experts = panels_of(routing)
    count = len(panels) + 1
    columns = min(count, 4 if count <= 8 else 5)
    rows = math.ceil(count / columns)
    highest = max(float(np.nanmax(panel)) for panel in panels.values())
    panel_height = 0.5 + min(0.19 * len(experts), 4.0)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(2.6 * columns + 1.8, panel_height * rows + 0.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for i, (axis, kind) in enumerate(zip(axes.flat, panels, strict=False)):
        image = draw_panel(axis, kind, panels[kind], experts, highest)
        # Panels without another one below them name the layers.
        axis.tick_params(labelbottom=i + columns >= len(panels))
        axis.set_xlabel("layer" if i + columns >= len(panels) else "", size=8)
    draw_means(axes.flat[len(panels)], panels)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    add_colourbar(figure, image, axes, len(experts))
    figure.suptitle(f"Where {router} routes {task}", x=0.01, ha="left", size=12)
    figure.savefig(out, dpi=160)
    plt.close(figure)


def draw_panel(
    axis: Axes, kind: str, panel: np.ndarray, experts: list[str], highest: float
) -> AxesImage:
    """One kind of linear: x = layer, y = expert, colour = share."""
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


def draw_means(axis: Axes, panels: Panels) -> None:
    """Each expert's mean share over all linears, as bars."""
    means = np.nanmean(np.concatenate(list(panels.values()), axis=1), axis=1)
    axis.barh(range(len(means)), means, height=0.75, color="#b5367a")
    axis.axvline(1 / len(means), color=EQUAL, lw=1.5)
    axis.set_title("mean over all linears", size=9, loc="left", pad=3)
    axis.set_xlabel("share", size=8)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axis.tick_params(length=2, labelsize=7.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#b0b0b0")


def add_colourbar(figure: Figure, image: AxesImage, axes: np.ndarray, experts: int) -> None:
    """The scale, with a mark where every expert would get the same."""
    bar = figure.colorbar(image, ax=axes, shrink=0.9, aspect=18 * len(axes), pad=0.01)
    bar.set_label("share of the routed weight", size=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    bar.ax.axhline(1 / experts, color=EQUAL, lw=1.5)
    bar.ax.text(-0.3, 1 / experts, "equal", color=EQUAL, size=7.5, ha="right", va="center")


if __name__ == "__main__":
    main()
