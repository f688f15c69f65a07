"""Compute means, confidence intervals and differences between routers from scores and samples.

Every interval is a 95 % percentile bootstrap over clusters of documents: documents that share a
source row, a passage or a template are drawn together (Miller, arXiv 2411.00640). The clusters of
each task are drawn with replacement 10,000 times; the tasks are fixed. All routers see the same
draws, so a difference between two routers is paired document by document.

Rows are not comparable if they were measured with a different dtype, device, library version or
scoring code than `merged` (without `merged`, than most routers). They have no difference, and
tables mark them.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from harness.extra_routers import DERIVED, SINGLE
from harness.metrics import PRIMARY, primary_metric
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
    sizes_C = np.bincount(clusters_N)
    sums_CM = np.zeros((len(sizes_C), values_NM.shape[1]))
    np.add.at(sums_CM, clusters_N, values_NM)
    clusters = len(sizes_C)
    means_BM = np.empty((RESAMPLES, values_NM.shape[1]))
    step = max(1, _DRAWS_AT_ONCE // clusters)
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn_BC = rng.integers(clusters, size=(size, clusters))
        drawn_BC += clusters * np.arange(size)[:, None]
        counts = np.bincount(drawn_BC.ravel(), minlength=size * clusters)
        counts_BC = counts.reshape(size, clusters)
        means_BM[start : start + size] = counts_BC @ sums_CM / (counts_BC @ sizes_C)[:, None]
    return means_BM


def interval(means_BM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lower and upper ends of the 95 % percentile interval of each column."""
    low_M, high_M = np.quantile(means_BM, [0.025, 0.975], axis=0)
    return low_M, high_M


@dataclass
class _TaskScores:
    """The scores and values of all routers on one task of a suite."""

    name: str
    documents: list[str]  # their ids, in the order of the values below
    clusters_N: np.ndarray  # the index of each document's cluster
    routers: dict[str, Row]  # name -> zero_shot, side_information and comparable
    scores: dict[tuple[str, str], float]  # (metric, router) -> value
    values: dict[str, dict[str, np.ndarray]]  # metric -> router -> one value per document

    def metric(self, metric: str) -> str | None:
        """Return the metric's name; None if it is `primary` and the task has no primary metric."""
        if metric != PRIMARY:
            return metric
        try:
            return primary_metric(set(self.values))
        except PhatgooseError:  # no metric of lm-eval is a mean over documents
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


def summary_rows(scores: pa.Table, samples: pa.Table) -> list[Row]:
    """Return the rows of summary.parquet.

    For each suite, metric and router there is a row per task and one for the mean over tasks.
    `scores` contains the oracle's rows if there is an oracle. A router without scores for one of
    the tasks has no mean.

    Raises:
        PhatgooseError: scores and samples do not belong together, or two routers did not answer
            the same documents.
    """
    rows: list[Row] = []
    for suite, tasks in _collect(scores, samples).items():
        metrics = dict.fromkeys(metric for task in tasks for metric in task.values)
        for metric in (PRIMARY, *metrics):
            rows += _metric_rows(suite, metric, tasks)
    return rows


def _metric_rows(suite: str, metric: str, tasks: list[_TaskScores]) -> list[Row]:
    """Return the rows of one metric. Only sums over tasks are kept, not the draws of each task."""
    having = [(i, task) for i, task in enumerate(tasks) if task.metric(metric) in task.values]
    known = {router: columns for _, task in having for router, columns in task.routers.items()}

    def row(router: str, task: str | None, numbers: _Sum) -> Row:
        names = {"suite": suite, "router": router, "metric": metric, "task": task}
        return {**names, **known[router], **numbers.columns()}

    rows: list[Row] = []
    sums: dict[str, _Sum] = {}
    for i, task in having:
        # One random stream per task: tasks are independent, and metrics see the same documents.
        rng = np.random.default_rng([_SEED, i])
        name = task.metric(metric)
        assert name is not None
        for router, part in _task_sums(task, name, rng).items():
            rows.append(row(router, task.name, part))
            sums[router] = sums[router] + part if router in sums else part
    whole = {router: total for router, total in sums.items() if total.tasks == len(having)}
    return rows + [row(router, None, total) for router, total in whole.items()]


def _task_sums(task: _TaskScores, metric: str, rng: np.random.Generator) -> dict[str, _Sum]:
    """Return one task's numbers for every router."""
    comparable = {router for router, columns in task.routers.items() if columns["comparable"]}
    matrix_NM, places = _with_differences(task.values[metric], comparable)
    means_BM = resampled_means(matrix_NM, rng, task.clusters_N)
    clusters = int(task.clusters_N.max()) + 1
    sums: dict[str, _Sum] = {}
    for m, router in enumerate(task.values[metric]):
        value = _Estimate(task.scores[metric, router], means_BM[:, m])
        difference = None
        if router in places:
            change = value.value - task.scores[metric, MERGED]
            difference = _Estimate(change, means_BM[:, places[router]])
        sums[router] = _Sum(1, len(matrix_NM), clusters, value, difference)
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


def _collect(scores: pa.Table, samples: pa.Table) -> dict[str, list[_TaskScores]]:
    """Join scores and samples per suite, with tasks in the order of the scores."""
    answers: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    clusters: dict[tuple[str, str], dict[str, str]] = {}
    scored = {*scores["router"].to_pylist()}
    for sample in samples.to_pylist():
        key = (sample["suite"], sample["task"], sample["router"])
        answers.setdefault(key, {})[sample["document"]] = dict(sample["metrics"])
        together = clusters.setdefault(key[:2], {})
        if sample["cluster"] and sample["router"] in scored:
            together[sample["document"]] = sample["cluster"]
    comparable = _comparable(scores)

    suites: dict[str, dict[str, _TaskScores]] = {}
    for score in scores.to_pylist():
        suite, name, router, metric = (score[k] for k in ("suite", "task", "router", "metric"))
        source = SINGLE + score["expert"] if router in DERIVED else router
        answered = answers.get((suite, name, source), {})
        task = suites.setdefault(suite, {}).get(name)
        if task is None:
            documents = sorted(answered)
            together = clusters.get((suite, name), {})
            places_N = _places([together.get(document, document) for document in documents])
            task = suites[suite][name] = _TaskScores(name, documents, places_N, {}, {}, {})
        if answered.keys() != set(task.documents):
            raise PhatgooseError(
                f"{samples_file(suite, source)}: the documents of task {name} differ from another "
                f"router's. Delete {SCORES_FILE} and {SAMPLES_FOLDER}/, and run again."
            )
        if not any(metric in metrics for metrics in answered.values()):
            continue  # the metric is not a mean over documents
        task.routers[router] = {
            **{key: score[key] for key in ("zero_shot", "side_information")},
            "comparable": (suite, router) in comparable,
        }
        task.scores[metric, router] = score["value"]
        values_N = np.array([answered[document].get(metric, np.nan) for document in task.documents])
        _check(score, values_N, source)
        task.values.setdefault(metric, {})[router] = values_N
    return {suite: list(tasks.values()) for suite, tasks in suites.items()}


def _places(clusters: list[str]) -> np.ndarray:
    """Return the index of each document's cluster, from 0, in the order of first occurrence."""
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([places[cluster] for cluster in clusters], dtype=np.int64)


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
