"""From scores and samples to means, confidence intervals and differences between routers.

Every interval is a 95 % percentile bootstrap over clusters of documents: what shares a source row,
a passage or a template is drawn together (Miller, arXiv 2411.00640). The clusters of each task are
drawn with replacement 10,000 times; the tasks stay as they are. All routers see the same draws, so
a difference between two routers is paired document by document.

Rows that were measured with another dtype, device, library version or scoring code than `merged`
(without it, than most routers) are not comparable: they get no difference, and tables mark them.
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
# Draws held at once, so that memory stays small whatever the number of documents.
_DRAWS_AT_ONCE = 2_000_000


def resampled_means(
    values_NM: np.ndarray, rng: np.random.Generator, clusters_N: np.ndarray | None = None
) -> np.ndarray:
    """Return means over clusters drawn with replacement, RESAMPLES times: shape (RESAMPLES, M).

    A draw picks the same documents for all M columns, and weighs each document alike.

    Args:
        values_NM: a value per document and column.
        rng: draws.
        clusters_N: the place of each document's cluster, from 0; each its own if None.
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
    """Lower and upper end of the 95 % percentile interval of each column."""
    low_M, high_M = np.quantile(means_BM, [0.025, 0.975], axis=0)
    return low_M, high_M


@dataclass
class _TaskScores:
    """A task of a suite as all routers answered it."""

    name: str
    documents: list[str]  # their ids, in the order of the values below
    clusters_N: np.ndarray  # the place of each document's cluster
    routers: dict[str, Row]  # name -> zero_shot, side_information and comparable
    scores: dict[tuple[str, str], float]  # (metric, router) -> value
    values: dict[str, dict[str, np.ndarray]]  # metric -> router -> one value per document

    def metric(self, metric: str) -> str | None:
        """The metric of that name; None if `primary` is asked for and the task has none."""
        if metric != PRIMARY:
            return metric
        try:
            return primary_metric(set(self.values))
        except PhatgooseError:  # none of lm-eval's is a mean over documents
            return None


@dataclass
class _Estimate:
    """A number and the same number of every resample; sums of them are sums over tasks."""

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
    difference: _Estimate | None  # to merged; None where merged lacks one of the tasks

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
        """Means over tasks with their intervals, as columns of the summary."""
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
    """The rows of summary.parquet: per suite, metric and router, each task and the mean over tasks.

    `scores` holds the oracle's rows if there is an oracle. A router that lacks one of the tasks
    gets no mean.

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
    """Rows of one metric. The sums over tasks are kept, the draws of a single task are not."""
    having = [(i, task) for i, task in enumerate(tasks) if task.metric(metric) in task.values]
    known = {router: columns for _, task in having for router, columns in task.routers.items()}

    def row(router: str, task: str | None, numbers: _Sum) -> Row:
        names = {"suite": suite, "router": router, "metric": metric, "task": task}
        return {**names, **known[router], **numbers.columns()}

    rows: list[Row] = []
    sums: dict[str, _Sum] = {}
    for i, task in having:
        # One stream per task: tasks are drawn independently, metrics see the same documents.
        rng = np.random.default_rng([_SEED, i])
        name = task.metric(metric)
        assert name is not None
        for router, part in _task_sums(task, name, rng).items():
            rows.append(row(router, task.name, part))
            sums[router] = sums[router] + part if router in sums else part
    whole = {router: total for router, total in sums.items() if total.tasks == len(having)}
    return rows + [row(router, None, total) for router, total in whole.items()]


def _task_sums(task: _TaskScores, metric: str, rng: np.random.Generator) -> dict[str, _Sum]:
    """One task's numbers for every router."""
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
    """The routers' values as columns, then their differences to merged, and where those stand.

    Differences are taken before the means: of two routers with equal answers they are exactly 0.
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
    """Scores and samples put together, per suite; tasks in the order of the scores."""
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
                f"{samples_file(source)}: task {name} has other documents than another router's "
                f"samples; delete {SCORES_FILE} and {SAMPLES_FOLDER}/ and run again"
            )
        if not any(metric in metrics for metrics in answered.values()):
            continue  # it is no mean over documents
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
    """The place of each document's cluster, from 0, in the order in which they first occur."""
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([places[cluster] for cluster in clusters], dtype=np.int64)


def _comparable(scores: pa.Table) -> set[tuple[str, str]]:
    """By suite, the routers that were measured under the conditions of merged, or of most."""
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
    """A score is the mean of its samples, or one of the two files is not of this run."""
    if len(values_N) and np.isclose(values_N.mean(), score["value"], rtol=1e-6, atol=1e-9):
        return
    raise PhatgooseError(
        f"{samples_file(source)}: task {score['task']}, metric {score['metric']}: the samples' "
        f"mean is not the value in {SCORES_FILE}; delete both files and run again"
    )
