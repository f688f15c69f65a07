"""Create the report of a run: confidence intervals, tables for the terminal, and plots.

Tables are plain text, at most WIDTH columns wide unless names are unusually long.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from harness.command_line import aligned
from harness.extra_routers import BEST_INDIVIDUAL, MULTITASK, SINGLE
from harness.metrics import LOWER_IS_BETTER, PRIMARY, primary_metric
from harness.reporting.plots import plot_routers, plot_routing
from harness.reporting.summary import RESAMPLES, summary_rows
from harness.reporting.tables import Tables
from harness.run_folder import (
    ROUTING,
    ROUTING_FOLDER,
    SAMPLES,
    SAMPLES_FOLDER,
    SCORES,
    SCORES_FILE,
    SUMMARY,
    SUMMARY_FILE,
    TRAINING,
    TRAINING_FOLDER,
    read_folder,
    read_table,
    write_table,
)
from harness.storage import Folder
from harness.tasks.metrics import NORMALIZED
from phatgoose.errors import reason_of

WIDTH = 120
_NAME_WIDTH = 10
_NONE = "-"


def make_report(folder: Folder) -> str:
    """Create the report of a run folder, and return its text.

    Write summary.parquet and, if possible, the plots in plots/. A second call writes the same
    files. Missing parts are named and omitted.

    Raises:
        PhatgooseError: a file of the run is damaged, or the files do not belong together.
    """
    training = read_folder(folder, TRAINING_FOLDER, TRAINING)
    # The multitask expert is not a member of the pool and has no task of its own.
    training = training.filter(pc.not_equal(training["expert"], MULTITASK))
    parts = [
        experts_table(training)
        if len(training)
        else "no training curves in this run folder: its experts were not trained here"
    ]
    if folder.exists(SCORES_FILE):
        scores = read_table(folder, SCORES_FILE, SCORES)
        parts += _router_parts(folder, scores)
        parts.append("\n".join([*_draw(folder), f"results: {folder}"]))
    else:
        parts.append("nothing has been evaluated yet")
    return "\n\n".join(parts) + "\n"


def _router_parts(folder: Folder, scores: pa.Table) -> list[str]:
    """Write the summary, and return the tables of every suite."""
    summary = summary_rows(scores, Tables(folder, SAMPLES_FOLDER, SAMPLES))
    write_table(folder, SUMMARY_FILE, SUMMARY, summary)
    suites = dict.fromkeys(row["suite"] for row in summary)
    present = {row["metric"] for row in summary}
    return [
        routers_table(summary, suite, metric)
        for suite, metric in itertools.product(suites, (PRIMARY, NORMALIZED, "nll"))
        if metric in present
    ]


def experts_table(training: pa.Table) -> str:
    """Return a table of the experts, measured on the evaluation splits of their own tasks.

    Its columns are the loss of the base and the expert, exact match of both, and the loss with
    gates at zero and after their training. The last line is the mean over experts.
    """
    measured: dict[str, dict[tuple[str, int], dict[str, Any]]] = {}
    for row in training.to_pylist():
        if row["split"] == "evaluation":
            measured.setdefault(row["expert"], {})[row["stage"], row["step"]] = row
    lines = [
        [
            *_first_and_last(rows, "lora", "loss"),
            *_first_and_last(rows, "lora", "exact_match"),
            *_first_and_last(rows, "gates", "loss"),
        ]
        for rows in measured.values()
    ]
    formats = ["{:.3f}", "{:.3f}", "{:.1%}", "{:.1%}", "{:.3f}", "{:.3f}"]
    body = [
        [name, *map(_cell, formats, line)]
        for name, line in [
            *sorted(zip(measured, lines, strict=True)),
            ("mean", [_mean(column) for column in zip(*lines, strict=True)]),
        ]
    ]
    header = ["expert", "nll\nbase", "nll\nexpert", "exact match\nbase", "exact match\nexpert"]
    header += ["gates: nll\nat zero", "gates: nll\ntrained"]
    title = "experts on the evaluation split of their own task (nll in nats per token)"
    return f"{title}\n\n{_aligned(header, body, ruled_last=True)}"


def _first_and_last(
    rows: dict[tuple[str, int], dict[str, Any]], stage: str, column: str
) -> tuple[float | None, float | None]:
    """Return a column at the first and last step of a stage; None where it was not measured."""
    steps = {step: row[column] for (its_stage, step), row in rows.items() if its_stage == stage}
    last = max(steps, default=0)
    return steps.get(0), steps[last] if last else None


def routers_table(summary: Sequence[dict[str, Any]], suite: str, metric: str) -> str:
    """Return a table of routers by tasks for one suite and metric, sorted by mean, best first.

    `metric` is `primary` or the name of a metric. Single experts are not listed; the best one is
    named below the table.
    """
    rows = [row for row in summary if row["suite"] == suite and row["metric"] == metric]
    tasks = [task for task in dict.fromkeys(row["task"] for row in rows) if task is not None]
    cells = {(row["router"], row["task"]): row for row in rows}
    sign = 1 if metric in LOWER_IS_BETTER else -1
    means = sorted((row for row in rows if row["task"] is None), key=lambda r: sign * r["value"])
    routers = dict.fromkeys([row["router"] for row in [*means, *rows]])
    first = {row["router"]: row for row in reversed(rows)}

    percent = metric != "nll"
    body = []
    for router in routers:
        if router.startswith(SINGLE):
            continue
        mean = cells.get((router, None))
        line = [f"{router} {_mark(first[router])}".strip(), _with_half_width(mean, percent)]
        line.append(_difference(mean, percent))
        for task in tasks:
            cell = cells.get((router, task))
            line.append(_number(cell["value"] if cell else None, percent))
        body.append(line)

    header = ["router", "mean ±", "difference to\nmerged [95 %]"]
    header += [_task_header(summary, suite, metric, task) for task in tasks]
    unit = "%, higher is better" if percent else "nats per token, lower is better"
    best = next((row for row in means if row["router"].startswith(SINGLE)), None)
    title = f"suite {suite}: {metric}{' metric' if metric == PRIMARY else ''} ({unit})"
    listed = [first[router] for router in routers if not router.startswith(SINGLE)]
    return f"{title}\n\n{_aligned(header, body, fixed=3)}\n\n{_notes(listed, best, percent)}"


def _mark(row: dict[str, Any]) -> str:
    """Return the marks that refer to notes below the table."""
    marks = "*" if not row["zero_shot"] else "+" if row["side_information"] else ""
    return marks + ("!" if row["comparable"] is False else "")


def _notes(listed: Sequence[dict[str, Any]], best: dict[str, Any] | None, percent: bool) -> str:
    """Return the notes below a table of routers, one per line."""
    notes = [
        f"± and [ ]: 95 % intervals, {RESAMPLES:,} resamples of the documents within each task "
        "(those that share a row,\n  passage or template together); tasks fixed, differences paired"
    ]
    if any(row["comparable"] is False for row in listed):
        notes.append(
            "! measured with a different dtype, device, library version or code: not comparable "
            "with the others;\n  evaluate it again"
        )
    if any("*" in _mark(row) for row in listed):
        notes.append(
            "* not zero-shot, chosen on these documents: oracle is the best single expert per\n"
            "  task and metric, an upper bound; best_individual is the best one on average"
        )
    notes += [
        f"+ {row['router']} also uses {row['side_information']}"
        for row in listed
        if "+" in _mark(row)
    ]
    if best and not any(row["router"] == BEST_INDIVIDUAL for row in listed):
        name = best["router"].removeprefix(SINGLE)
        mean = _with_half_width(best, percent)
        notes.append(f"best single expert by this mean: {name}, {mean} (not zero-shot)")
    return "\n".join(notes)


def _task_header(summary: Sequence[dict[str, Any]], suite: str, metric: str, task: str) -> str:
    """Return the header of a task: wrapped name, primary metric, number of documents."""
    rows = [row for row in summary if (row["suite"], row["task"]) == (suite, task)]
    lines = _wrapped(task)
    if metric == PRIMARY:
        lines.append(primary_metric({row["metric"] for row in rows}))
    return "\n".join([*lines, f"n={rows[0]['n']}"])


def _wrapped(name: str) -> list[str]:
    """Split a name into lines of at most _NAME_WIDTH characters, after `_` where possible."""
    lines = [""]
    for word in name.replace("_", "_ ").split():
        if len(lines[-1] + word.rstrip("_")) > _NAME_WIDTH and lines[-1]:
            lines.append("")
        lines[-1] += word
        while len(lines[-1].rstrip("_")) > _NAME_WIDTH:
            lines[-1:] = [lines[-1][:_NAME_WIDTH], lines[-1][_NAME_WIDTH:]]
    return [*(line.rstrip("_") for line in lines[:-1]), lines[-1]]


def _number(value: float | None, percent: bool, sign: str = "") -> str:
    if value is None:
        return _NONE
    return f"{100 * value:{sign}.1f}" if percent else f"{value:{sign}.3f}"


def _with_half_width(row: dict[str, Any] | None, percent: bool) -> str:
    if row is None:
        return _NONE
    half = (row["high"] - row["low"]) / 2
    return f"{_number(row['value'], percent)} ± {_number(half, percent)}"


def _difference(row: dict[str, Any] | None, percent: bool) -> str:
    if row is None or row["difference"] is None:
        return ""
    ends = ("difference", "difference_low", "difference_high")
    middle, low, high = (_number(row[end], percent, "+") for end in ends)
    return f"{middle} [{low}, {high}]"


def _cell(form: str, value: float | None) -> str:
    return _NONE if value is None else form.format(value)


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean, or None if a value is missing: means of different experts mislead."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present and len(present) == len(values) else None


def _aligned(
    header: list[str], body: list[list[str]], fixed: int = 1, ruled_last: bool = False
) -> str:
    """Return a table as text: the first column is left-aligned, the others are right-aligned.

    Header cells may have several lines. If the table is wider than WIDTH, the columns after the
    first `fixed` ones continue in more blocks. Each block repeats the first column.
    """
    columns = [list(column) for column in zip(header, *body, strict=True)]
    widths = [max(len(line) for cell in column for line in cell.split("\n")) for column in columns]
    blocks = [list(range(fixed))]
    for i in range(fixed, len(columns)):
        if sum(widths[j] + 2 for j in [*blocks[-1], i]) - 2 > WIDTH:
            blocks.append([0])
        blocks[-1].append(i)
    return "\n\n".join(_block(header, body, block, ruled_last) for block in blocks)


def _block(header: list[str], body: list[list[str]], block: list[int], ruled_last: bool) -> str:
    heads = [header[i].split("\n") for i in block]
    height = max(map(len, heads))
    padded = [[""] * (height - len(head)) + head for head in heads]
    lines = [*zip(*padded, strict=True), *([line[i] for i in block] for line in body)]
    rules = [height, *([len(lines) - 1] if ruled_last else [])]
    return aligned(lines, right=range(1, len(block)), rules=rules)


def _draw(folder: Folder) -> list[str]:
    """Draw the plots; return a line for each, with the reason if it failed."""
    plots: list[Callable[[Folder], Path]] = [plot_routers]
    if len(Tables(folder, ROUTING_FOLDER, ROUTING)):
        plots.append(plot_routing)
    lines = []
    for plot in plots:
        try:
            lines.append(f"plot: {plot(folder)}")
        except Exception as error:  # a run must not fail because of a plot
            lines.append(f"no plot ({plot.__name__}): {reason_of(error)}")
    return lines
