"""Compute means, confidence intervals and differences between routers from scores and samples.

Every interval is a 95 % percentile bootstrap over clusters of documents: documents that share a
source row, a passage or a template are drawn together (Miller, arXiv 2411.00640). The clusters of
each task are drawn with replacement 10,000 times; the tasks are fixed. All routers see the same
draws, so a difference between two routers is paired document by document.

Rows are not comparable if they were measured with a different dtype, device, library version or
scoring code than `merged` (without `merged`, than most routers). They have no difference, and
tables mark them.

Legend: N = documents, C = clusters, B = resamples, M = columns: routers and their differences.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from harness.extra_routers import DERIVED, SINGLE
from harness.metrics import PRIMARY, primary_metric
from harness.reporting.tables import Tables
from harness.reporting.task_samples import TaskSamples
from harness.run_folder import CONDITIONS, SAMPLES_FOLDER, SCORES_FILE, samples_file
from phatgoose.errors import PhatgooseError

Row = dict[str, Any]

MERGED = "merged"

RESAMPLES = 10_000
_SEED = 42
# Maximum number of draws in memory at once, to bound memory for any number of documents.
_DRAWS_AT_ONCE = 2_000_000


def resampled_means(
    values_NM: np.ndarray, rng: np.random.Generator, clusters_N: np.ndarray | None = None
) -> np.ndarray:
    """Return means over clusters drawn with replacement RESAMPLES times, shape (RESAMPLES, M).

    A draw picks the same documents for all M columns and gives all documents the same weight.

    Args:
        values_NM: a value per document and column.
        rng: the random generator.
        clusters_N: the index of each document's cluster, from 0; None if each document is its own.
    """
    clusters_N = np.arange(len(values_NM)) if clusters_N is None else clusters_N
    (means_MB,) = resampled_means_of([values_NM], rng, clusters_N)
    return means_MB.T


def resampled_means_of(
    values: Sequence[np.ndarray], rng: np.random.Generator, clusters_N: np.ndarray
) -> list[np.ndarray]:
    """Return the transposed `resampled_means` of several matrices, all with the same draws."""
    sizes_C = np.bincount(clusters_N)
    clusters = len(sizes_C)
    sums = [_sums_of_clusters(values_NM, clusters_N) for values_NM in values]
    means = [np.empty((sums_CM.shape[1], RESAMPLES)) for sums_CM in sums]
    step = max(1, _DRAWS_AT_ONCE // clusters)
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn_BC = rng.integers(clusters, size=(size, clusters))
        drawn_BC += clusters * np.arange(size)[:, None]
        counts = np.bincount(drawn_BC.ravel(), minlength=size * clusters)
        counts_BC = counts.reshape(size, clusters).astype(np.float64)
        documents_B1 = (counts_BC @ sizes_C)[:, None]
        for means_MB, sums_CM in zip(means, sums, strict=True):
            means_MB[:, start : start + size] = (counts_BC @ sums_CM / documents_B1).T
    return means


def _sums_of_clusters(values_NM: np.ndarray, clusters_N: np.ndarray) -> np.ndarray:
    """Return the sums of the columns over the documents of each cluster, shape (clusters, M)."""
    columns = [np.bincount(clusters_N, weights=values_N) for values_N in values_NM.T]
    return np.stack(columns, axis=1)


def interval(means_BM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper ends of the 95 % percentile interval of each column."""
    low_M, high_M = np.quantile(means_BM, [0.025, 0.975], axis=0)
    return low_M, high_M


@dataclass
class _TaskScores:
    """The scores and values of all routers on one task of a suite."""

    name: str
    clusters_N: np.ndarray  # the index of each document's cluster
    routers: dict[str, Row]  # name -> zero_shot, side_information and comparable
    scores: dict[tuple[str, str], float]  # (metric, router) -> value
    values: dict[str, dict[str, np.ndarray]]  # metric -> router -> one value per document

    def primary(self) -> str | None:
        """Return the primary metric; None if no metric of lm-eval is a mean over documents."""
        try:
            return primary_metric(set(self.values))
        except PhatgooseError:
            return None


@dataclass
class _Estimate:
    """A number and its value in every resample. Sums of estimates are sums over tasks."""

    value: float
    resampled_B: np.ndarray

    def __add__(self, other: "_Estimate") -> "_Estimate":
        return _Estimate(self.value + other.value, self.resampled_B + other.resampled_B)


@dataclass
class _Sum:
    """Sums over tasks for one router."""

    tasks: int
    documents: int
    clusters: int
    value: _Estimate
    difference: _Estimate | None  # to merged; None if merged is missing one of the tasks

    def __add__(self, other: "_Sum") -> "_Sum":
        difference = None
        if self.difference is not None and other.difference is not None:
            difference = self.difference + other.difference
        return _Sum(
            self.tasks + other.tasks,
            self.documents + other.documents,
            self.clusters + other.clusters,
            self.value + other.value,
            difference,
        )

    def columns(self) -> Row:
        """Return means over tasks with their intervals, as columns of the summary."""
        row: Row = {"n": self.documents, "clusters": self.clusters}
        names = ("value", "low", "high"), ("difference", "difference_low", "difference_high")
        for keys, estimate in zip(names, (self.value, self.difference), strict=True):
            numbers: tuple[float | None, ...] = (None, None, None)
            if estimate is not None:
                low, high = interval(estimate.resampled_B / self.tasks)
                numbers = (estimate.value / self.tasks, float(low), float(high))
            row.update(zip(keys, numbers, strict=True))
        return row


def summary_rows(scores: pa.Table, samples: Tables) -> list[Row]:
    """Return the rows of summary.parquet.

    For each suite, metric and router there is a row per task and one for the mean over tasks.
    `scores` contains the oracle's rows if there is an oracle. A router without scores for one of
    the tasks has no mean. The samples of one task at a time are in memory.

    Raises:
        PhatgooseError: scores and samples do not belong together, or two routers did not answer
            the same documents.
    """
    scored = {*scores["router"].to_pylist()}
    comparable = _comparable(scores)
    suites: dict[str, dict[str, list[Row]]] = {}
    for score in scores.to_pylist():
        suites.setdefault(score["suite"], {}).setdefault(score["task"], []).append(score)
    rows: list[Row] = []
    for suite, tasks in suites.items():
        metrics = {PRIMARY: _Metric(suite, PRIMARY)}
        for i, (name, asked) in enumerate(tasks.items()):
            task = _task_scores(suite, name, asked, samples, scored, comparable)
            if not task.values:
                continue
            # One random stream per task: tasks are independent.
            sums = _task_sums(task, np.random.default_rng([_SEED, i]))
            for metric, of_routers in sums.items():
                metrics.setdefault(metric, _Metric(suite, metric)).add(task, of_routers)
            if (primary := task.primary()) is not None:
                metrics[PRIMARY].add(task, sums[primary])
        rows += [row for metric in metrics.values() for row in metric.rows()]
    return rows


class _Metric:
    """The rows of one metric of a suite. Of each task, only its share of the sums is kept."""

    def __init__(self, suite: str, metric: str) -> None:
        self._names = {"suite": suite, "metric": metric}
        self._known: dict[str, Row] = {}  # router -> zero_shot, side_information and comparable
        self._tasks = 0
        self._rows: list[Row] = []
        self._sums: dict[str, _Sum] = {}

    def add(self, task: _TaskScores, of_routers: dict[str, _Sum]) -> None:
        """Add the numbers of all routers on a task."""
        self._tasks += 1
        self._known |= task.routers
        for router, part in of_routers.items():
            self._rows.append({"router": router, "task": task.name, **part.columns()})
            self._sums[router] = self._sums[router] + part if router in self._sums else part

    def rows(self) -> list[Row]:
        """Return a row per task and router, and one for each router that has all tasks."""
        means = [
            {"router": router, "task": None, **total.columns()}
            for router, total in self._sums.items()
            if total.tasks == self._tasks
        ]
        return [
            {**self._names, **self._known[row["router"]], **row} for row in [*self._rows, *means]
        ]


def _task_sums(task: _TaskScores, rng: np.random.Generator) -> dict[str, dict[str, _Sum]]:
    """Return one task's numbers for every metric and router. All metrics see the same draws."""
    comparable = {router for router, columns in task.routers.items() if columns["comparable"]}
    together = {name: _with_differences(v, comparable) for name, v in task.values.items()}
    drawn = resampled_means_of([m for m, _ in together.values()], rng, task.clusters_N)
    clusters = int(task.clusters_N.max()) + 1
    sums: dict[str, dict[str, _Sum]] = {}
    for (metric, (_, places)), means_MB in zip(together.items(), drawn, strict=True):
        of_routers = sums[metric] = {}
        for m, router in enumerate(task.values[metric]):
            value = _Estimate(task.scores[metric, router], means_MB[m])
            difference = None
            if router in places:
                change = value.value - task.scores[metric, MERGED]
                difference = _Estimate(change, means_MB[places[router]])
            of_routers[router] = _Sum(1, len(task.clusters_N), clusters, value, difference)
    return sums


def _with_differences(
    values: dict[str, np.ndarray], comparable: set[str]
) -> tuple[np.ndarray, dict[str, int]]:
    """Return the routers' values and differences to merged as columns, and the latter's indices.

    Differences are taken before the means, so they are exactly 0 for routers with equal answers.
    """
    columns = list(values.values())
    places: dict[str, int] = {}
    if MERGED in values:
        for router in values:
            if router != MERGED and router in comparable:
                places[router] = len(columns)
                columns.append(values[router] - values[MERGED])
    return np.stack(columns, axis=1), places


def _task_scores(
    suite: str,
    name: str,
    asked: list[Row],
    samples: Tables,
    scored: set[str],
    comparable: set[tuple[str, str]],
) -> _TaskScores:
    """Join the scores of one task with its samples."""
    found = TaskSamples(samples, suite, name, _source(asked[0]), scored)
    task = _TaskScores(name, found.clusters_N, {}, {}, {})
    answered: dict[str, dict[str, np.ndarray] | None] = {}
    for score in asked:
        router, metric, source = score["router"], score["metric"], _source(score)
        if source not in answered:
            answered[source] = found.values(source)
        values = answered[source]
        if values is None:
            raise PhatgooseError(
                f"{samples_file(suite, source)}: the documents of task {name} differ from another "
                f"router's. Delete {SCORES_FILE} and {SAMPLES_FOLDER}/, and run again."
            )
        if metric not in values:
            continue  # the metric is not a mean over documents
        task.routers[router] = {
            **{key: score[key] for key in ("zero_shot", "side_information")},
            "comparable": (suite, router) in comparable,
        }
        task.scores[metric, router] = score["value"]
        _check(score, values[metric], source)
        task.values.setdefault(metric, {})[router] = values[metric]
    return task


def _source(score: Row) -> str:
    """Return the router whose samples give a score: for a derived one, its single expert."""
    router: str = score["router"]
    return f"{SINGLE}{score['expert']}" if router in DERIVED else router


def _comparable(scores: pa.Table) -> set[tuple[str, str]]:
    """Return the pairs of suite and router measured under the conditions of merged, or of most."""
    found: dict[str, dict[str, set[tuple[str | None, ...]]]] = {}
    for row in scores.select(["suite", "router", *(f.name for f in CONDITIONS)]).to_pylist():
        conditions = tuple(row[field.name] for field in CONDITIONS)
        found.setdefault(row["suite"], {}).setdefault(row["router"], set()).add(conditions)
    comparable = set()
    for suite, routers in found.items():
        counted = Counter(c for conditions in routers.values() for c in conditions)
        usual = routers.get(MERGED, {counted.most_common(1)[0][0]})
        comparable |= {(suite, router) for router, c in routers.items() if c == usual}
    return comparable


def _check(score: Row, values_N: np.ndarray, source: str) -> None:
    """Raise PhatgooseError unless a score is the mean of its samples."""
    if len(values_N) and np.isclose(values_N.mean(), score["value"], rtol=1e-6, atol=1e-9):
        return
    name = samples_file(score["suite"], source)
    raise PhatgooseError(
        f"{name}: task {score['task']}, metric {score['metric']}: the samples' "
        f"mean differs from {SCORES_FILE}. Delete both files, and run again."
    )
