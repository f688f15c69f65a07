"""The summary of a run computed plainly: every sample a dictionary, every metric drawn for itself.

It is slow and keeps everything in memory, and shares no code with the report.
"""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

Row = dict[str, Any]
# (suite, task, router) -> document -> metric -> value
Answered = dict[tuple[str, str, str], dict[str, dict[str, float]]]

RESAMPLES = 10_000


def plain_summary(scores: pa.Table, samples: pa.Table) -> list[Row]:
    """Return the rows of summary.parquet; ValueError if scores and samples differ."""
    answered: Answered = {}
    clusters: dict[tuple[str, str, str], str] = {}
    scored = set(scores["router"].to_pylist())
    for row in samples.to_pylist():
        suite, task, router, document = (row[k] for k in ("suite", "task", "router", "document"))
        answered.setdefault((suite, task, router), {})[document] = dict(row["metrics"])
        if row["cluster"] and router in scored:
            clusters[suite, task, document] = row["cluster"]
    rows: list[Row] = []
    for suite in dict.fromkeys(scores["suite"].to_pylist()):
        of_suite = [row for row in scores.to_pylist() if row["suite"] == suite]
        rows += _suite_rows(suite, of_suite, answered, clusters)
    return rows


def _suite_rows(
    suite: str, scores: list[Row], answered: Answered, clusters: dict[tuple[str, str, str], str]
) -> list[Row]:
    tasks = list(dict.fromkeys(row["task"] for row in scores))
    kept: dict[str, dict[str, dict[str, tuple[float, np.ndarray]]]] = {}
    known: dict[str, dict[str, Row]] = {}
    places: dict[str, np.ndarray] = {}
    comparable = _comparable(scores)
    for task in tasks:
        kept[task], known[task] = {}, {}
        documents: list[str] | None = None
        for row in (row for row in scores if row["task"] == task):
            router, metric = row["router"], row["metric"]
            derived = router in ("oracle", "best_individual")
            source = f"single:{row['expert']}" if derived else router
            found = answered.get((suite, task, source), {})
            if documents is None:
                documents = sorted(found)
                names = [clusters.get((suite, task, d), d) for d in documents]
                order = list(dict.fromkeys(names))
                places[task] = np.array([order.index(name) for name in names], dtype=np.int64)
            file = f"samples/{suite}/{source.replace(':', '@')}.parquet"
            if set(found) != set(documents):
                raise ValueError(
                    f"{file}: the documents of task {task} differ from another router's. "
                    "Delete scores.parquet and samples/, and run again."
                )
            if not any(metric in metrics for metrics in found.values()):
                continue
            values_N = np.array([found[d].get(metric, np.nan) for d in documents])
            if not np.isclose(values_N.mean(), row["value"], rtol=1e-6, atol=1e-9):
                raise ValueError(
                    f"{file}: task {task}, metric {metric}: the samples' mean differs from "
                    "scores.parquet. Delete both files, and run again."
                )
            kept[task].setdefault(metric, {})[router] = (row["value"], values_N)
            known[task][router] = {
                "zero_shot": row["zero_shot"],
                "side_information": row["side_information"],
                "comparable": router in comparable,
            }
    metrics = list(dict.fromkeys(metric for task in tasks for metric in kept[task]))
    rows = []
    for metric in ["primary", *metrics]:
        rows += _metric_rows(suite, metric, tasks, kept, known, places)
    return rows


def _metric_rows(
    suite: str,
    metric: str,
    tasks: list[str],
    kept: dict[str, dict[str, dict[str, tuple[float, np.ndarray]]]],
    known: dict[str, dict[str, Row]],
    places: dict[str, np.ndarray],
) -> list[Row]:
    rows: list[Row] = []
    parts: dict[str, list[dict[str, Any]]] = {}
    having = 0
    latest: dict[str, Row] = {}
    for i, task in enumerate(tasks):
        name = _primary(set(kept[task])) if metric == "primary" else metric
        if name not in kept[task]:
            continue
        having += 1
        latest |= known[task]
        values = kept[task][name]
        columns = {(router, False): values_N for router, (_, values_N) in values.items()}
        if "merged" in values:
            for router, (_, values_N) in values.items():
                if router != "merged" and known[task][router]["comparable"]:
                    columns[router, True] = values_N - values["merged"][1]
        rng = np.random.default_rng([42, i])
        means_BM = _resampled(np.stack(list(columns.values()), axis=1), places[task], rng)
        drawn = dict(zip(columns, means_BM.T, strict=True))
        for router, (value, values_N) in values.items():
            part = {"task": task, "value": value, "drawn": drawn[router, False]}
            part |= {"n": len(values_N), "clusters": len(set(places[task]))}
            if (router, True) in drawn:
                change = value - values["merged"][0]
                part |= {"difference": change, "changes": drawn[router, True]}
            parts.setdefault(router, []).append(part)
            rows.append({"router": router, "task": task, **_columns([part])})
    rows += [
        {"router": router, "task": None, **_columns(of_router)}
        for router, of_router in parts.items()
        if len(of_router) == having
    ]
    return [{"suite": suite, "metric": metric, **latest[row["router"]], **row} for row in rows]


def _columns(parts: list[Row]) -> Row:
    row: Row = {key: sum(part[key] for part in parts) for key in ("n", "clusters")}
    for number, draws in (("value", "drawn"), ("difference", "changes")):
        names = ("low", "high") if number == "value" else ("difference_low", "difference_high")
        row |= dict.fromkeys((number, *names))
        if all(number in part for part in parts):
            row[number] = sum(part[number] for part in parts) / len(parts)
            total_B = sum(part[draws] for part in parts) / len(parts)
            row |= zip(names, np.quantile(total_B, [0.025, 0.975]).tolist(), strict=True)
    return row


def _resampled(
    values_NM: np.ndarray, clusters_N: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the means of RESAMPLES draws of clusters. Only for few documents: one block."""
    sizes_C = np.bincount(clusters_N)
    sums_CM = np.zeros((len(sizes_C), values_NM.shape[1]))
    np.add.at(sums_CM, clusters_N, values_NM)
    drawn_BC = rng.integers(len(sizes_C), size=(RESAMPLES, len(sizes_C)))
    counts_BC = (drawn_BC[:, :, None] == np.arange(len(sizes_C))).sum(axis=1)
    return np.asarray(counts_BC @ sums_CM / (counts_BC @ sizes_C)[:, None])


def _primary(metrics: set[str]) -> str | None:
    for metric in ("rouge_l", "acc", "exact_match"):
        if metric in metrics:
            return metric
    others = sorted(metrics - {"nll", "acc_norm", "acc_paper", "bigbench_normalized"})
    return others[0] if others else "acc_paper" if "acc_paper" in metrics else None


def _comparable(scores: list[Row]) -> set[str]:
    found: dict[str, set[tuple[str | None, ...]]] = {}
    for row in scores:
        conditions = tuple(row[key] for key in ("dtype", "device", "versions", "code"))
        found.setdefault(row["router"], set()).add(conditions)
    counted = Counter(c for conditions in found.values() for c in conditions)
    usual = found.get("merged", {counted.most_common(1)[0][0]})
    return {router for router, conditions in found.items() if conditions == usual}
