"""Metrics of results: the primary metric of a task, and which of two values is better."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from phatgoose.errors import PhatgooseError

PRIMARY = "primary"
LOWER_IS_BETTER = frozenset({"nll"})


def better(metric: str, a: float, b: float) -> bool:
    """Return whether the value `a` of a metric is strictly better than `b`."""
    return a < b if metric in LOWER_IS_BETTER else a > b


def primary_metric(metrics: set[str]) -> str:
    """Return the primary metric of a task with these metrics.

    It is ROUGE-L if the task uses it, else acc, else exact_match (after the strictest filter), else
    the first of lm-eval's metrics by name.

    Raises:
        PhatgooseError: there is no such metric.
    """
    for metric in ("rouge_l", "acc", "exact_match", "exact_match_strict_match"):
        if metric in metrics:
            return metric
    others = sorted(metrics - {"nll", "acc_norm", "acc_paper", "bigbench_normalized"})
    if not others and "acc_paper" in metrics:
        return "acc_paper"  # lm-eval's metrics, such as MCC, are not means over documents
    if not others:
        raise PhatgooseError(f"a task has no metric from lm-eval; it has {sorted(metrics)}")
    return others[0]


def primary_mean(scores: Iterable[Mapping[str, Any]]) -> float:
    """Return the mean over tasks of their primary metrics, from rows of scores of one router."""
    tasks: dict[str, dict[str, float]] = {}
    for row in scores:
        tasks.setdefault(row["task"], {})[row["metric"]] = row["value"]
    return statistics.fmean(values[primary_metric(set(values))] for values in tasks.values())


def has_primary(scores: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether every task in these rows has a primary metric."""
    try:
        primary_mean(scores)
    except PhatgooseError:
        return False
    return True
