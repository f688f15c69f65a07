"""From scores and samples to means, confidence intervals and differences between routers.

Every interval is a 95 % percentile bootstrap over documents. The documents of each task are drawn
anew, with replacement, 10,000 times; the tasks stay as they are. All routers see the same draws, so
a difference between two routers is paired document by document.

The oracle is, per task and metric, the single expert with the best score on that very task. It is
chosen on the data it is then reported on, so it is an upper bound and an optimistic one: no router
that cannot see the answers should be expected to reach it, and its interval leaves out the luck of
the choice.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from harness.results import SAMPLES_FOLDER, SCORES_FILE, samples_file
from phatgoose.errors import PhatgooseError

Row = dict[str, Any]

PRIMARY = "primary"
MERGED = "merged"
ORACLE = "oracle"
BEST_INDIVIDUAL = "best_individual"
# Routers whose rows are read off from those of the single experts.
DERIVED = (ORACLE, BEST_INDIVIDUAL)
SINGLE = "single:"
LOWER_IS_BETTER = frozenset({"nll"})

RESAMPLES = 10_000
_SEED = 42
# Draws held at once, so that memory stays small whatever the number of documents.
_DRAWS_AT_ONCE = 2_000_000


def better(metric: str, a: float, b: float) -> bool:
    """Whether the value `a` of a metric is strictly better than `b`."""
    return a < b if metric in LOWER_IS_BETTER else a > b


def primary_metric(metrics: set[str]) -> str:
    """The primary metric of a task with these metrics.

    ROUGE-L where the task asks for it, else acc, else exact_match (after the strictest filter),
    else the first by name of what lm-eval gave.

    Raises:
        PhatgooseError: there is none.
    """
    for metric in ("rouge_l", "acc", "exact_match", "exact_match_strict_match"):
        if metric in metrics:
            return metric
    others = sorted(metrics - {"nll", "acc_norm", "acc_paper", "bigbench_normalized"})
    if not others:
        raise PhatgooseError(f"a task has no metric of lm-eval, only {sorted(metrics)}")
    return others[0]


def oracle_rows(scores: pa.Table) -> list[Row]:
    """The oracle's rows of scores.parquet, from the `single:` routers in `scores`.

    A row is the chosen expert's own row, with router `oracle` and the expert's name; of equally
    good experts the first by name is taken.
    """
    best: dict[tuple[str, str, str], Row] = {}
    singles = [row for row in scores.to_pylist() if row["router"].startswith(SINGLE)]
    for row in sorted(singles, key=lambda row: row["router"]):
        key = (row["suite"], row["task"], row["metric"])
        if key not in best or better(row["metric"], row["value"], best[key]["value"]):
            best[key] = row
    return [
        {**row, "router": ORACLE, "zero_shot": False, "expert": row["router"].removeprefix(SINGLE)}
        for row in best.values()
    ]


def best_individual_rows(scores: pa.Table) -> list[Row]:
    """The rows of scores.parquet of the one expert that is best over the suite, as a router.

    Best by the mean over the suite's tasks of their primary metric; of equals the first by name.
    """
    singles = [row for row in scores.to_pylist() if row["router"].startswith(SINGLE)]
    by_task: dict[tuple[str, str], set[str]] = {}
    for row in singles:
        by_task.setdefault((row["suite"], row["task"]), set()).add(row["metric"])
    totals: dict[tuple[str, str], float] = {}
    for row in singles:
        if row["metric"] == primary_metric(by_task[row["suite"], row["task"]]):
            key = (row["suite"], row["router"])
            totals[key] = totals.get(key, 0.0) + row["value"]
    rows = []
    for suite in dict.fromkeys(suite for suite, _ in totals):
        ranked = sorted((-total, router) for (s, router), total in totals.items() if s == suite)
        best = ranked[0][1]
        rows += [
            {**row, "router": BEST_INDIVIDUAL, "zero_shot": False, "expert": best[len(SINGLE) :]}
            for row in singles
            if (row["suite"], row["router"]) == (suite, best)
        ]
    return rows


def resampled_means(values_NM: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means over N documents drawn with replacement, RESAMPLES times: shape (RESAMPLES, M).

    A draw picks the same documents for all M columns.
    """
    documents = len(values_NM)
    means_BM = np.empty((RESAMPLES, values_NM.shape[1]))
    step = max(1, _DRAWS_AT_ONCE // documents)
    for start in range(0, RESAMPLES, step):
        size = min(step, RESAMPLES - start)
        drawn_BN = rng.integers(documents, size=(size, documents))
        drawn_BN += documents * np.arange(size)[:, None]
        counts = np.bincount(drawn_BN.ravel(), minlength=size * documents)
        means_BM[start : start + size] = counts.reshape(size, documents) @ values_NM / documents
    return means_BM


def interval(means_BM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end of the 95 % percentile interval of each column."""
    low_M, high_M = np.quantile(means_BM, [0.025, 0.975], axis=0)
    return low_M, high_M


@dataclass
class _Task:
    """A task of a suite as all routers answered it."""

    name: str
    documents: list[str]  # their ids, in the order of the values below
    routers: dict[str, Row]  # name -> zero_shot and side_information
    scores: dict[tuple[str, str], float]  # (metric, router) -> value
    values: dict[str, dict[str, np.ndarray]]  # metric -> router -> one value per document

    def metric(self, metric: str) -> str:
        return primary_metric(set(self.values)) if metric == PRIMARY else metric


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
    value: _Estimate
    difference: _Estimate | None  # to merged; None where merged lacks one of the tasks

    def __add__(self, other: "_Sum") -> "_Sum":
        difference = None
        if self.difference is not None and other.difference is not None:
            difference = self.difference + other.difference
        return _Sum(
            self.tasks + other.tasks,
            self.documents + other.documents,
            self.value + other.value,
            difference,
        )

    def columns(self) -> Row:
        """Means over tasks with their intervals, as columns of the summary."""
        row: Row = {"n": self.documents}
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


def _metric_rows(suite: str, metric: str, tasks: list[_Task]) -> list[Row]:
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
        for router, part in _task_sums(task, task.metric(metric), rng).items():
            rows.append(row(router, task.name, part))
            sums[router] = sums[router] + part if router in sums else part
    whole = {router: total for router, total in sums.items() if total.tasks == len(having)}
    return rows + [row(router, None, total) for router, total in whole.items()]


def _task_sums(task: _Task, metric: str, rng: np.random.Generator) -> dict[str, _Sum]:
    """One task's numbers for every router."""
    matrix_NM, places = _with_differences(task.values[metric])
    means_BM = resampled_means(matrix_NM, rng)
    sums: dict[str, _Sum] = {}
    for m, router in enumerate(task.values[metric]):
        value = _Estimate(task.scores[metric, router], means_BM[:, m])
        difference = None
        if router in places:
            change = value.value - task.scores[metric, MERGED]
            difference = _Estimate(change, means_BM[:, places[router]])
        sums[router] = _Sum(1, len(matrix_NM), value, difference)
    return sums


def _with_differences(values: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, int]]:
    """The routers' values as columns, then their differences to merged, and where those stand.

    Differences are taken before the means: of two routers with equal answers they are exactly 0.
    """
    columns = list(values.values())
    places: dict[str, int] = {}
    if MERGED in values:
        for router in values:
            if router != MERGED:
                places[router] = len(columns)
                columns.append(values[router] - values[MERGED])
    return np.stack(columns, axis=1), places


def _collect(scores: pa.Table, samples: pa.Table) -> dict[str, list[_Task]]:
    """Scores and samples put together, per suite; tasks in the order of the scores."""
    answers: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    for sample in samples.to_pylist():
        key = (sample["suite"], sample["task"], sample["router"])
        answers.setdefault(key, {})[sample["document"]] = dict(sample["metrics"])

    suites: dict[str, dict[str, _Task]] = {}
    for score in scores.to_pylist():
        suite, name, router, metric = (score[k] for k in ("suite", "task", "router", "metric"))
        source = SINGLE + score["expert"] if router in DERIVED else router
        answered = answers.get((suite, name, source), {})
        task = suites.setdefault(suite, {}).setdefault(
            name, _Task(name, sorted(answered), {}, {}, {})
        )
        if answered.keys() != set(task.documents):
            raise PhatgooseError(
                f"{samples_file(source)}: task {name} has other documents than another router's "
                f"samples; delete {SCORES_FILE} and {SAMPLES_FOLDER}/ and run again"
            )
        if not any(metric in metrics for metrics in answered.values()):
            continue  # it is no mean over documents
        task.routers[router] = {key: score[key] for key in ("zero_shot", "side_information")}
        task.scores[metric, router] = score["value"]
        values_N = np.array([answered[document].get(metric, np.nan) for document in task.documents])
        _check(score, values_N, source)
        task.values.setdefault(metric, {})[router] = values_N
    return {suite: list(tasks.values()) for suite, tasks in suites.items()}


def _check(score: Row, values_N: np.ndarray, source: str) -> None:
    """A score is the mean of its samples, or one of the two files is not of this run."""
    if len(values_N) and np.isclose(values_N.mean(), score["value"], rtol=1e-6, atol=1e-9):
        return
    raise PhatgooseError(
        f"{samples_file(source)}: task {score['task']}, metric {score['metric']}: the samples' "
        f"mean is not the value in {SCORES_FILE}; delete both files and run again"
    )
