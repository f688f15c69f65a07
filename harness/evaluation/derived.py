"""Rows of scores that are derived from the scores of single experts.

The oracle is, per task and metric, the single expert with the best score on that task. It is chosen
on the data that it is reported on. So it is an optimistic upper bound: a router that cannot see the
answers is not expected to reach it, and its interval ignores the luck of the choice.
"""

from typing import Any

import pyarrow as pa

from harness.extra_routers import BEST_INDIVIDUAL, ORACLE, SINGLE
from harness.metrics import better, primary_metric

Row = dict[str, Any]


def oracle_rows(scores: pa.Table) -> list[Row]:
    """Return the oracle's rows of scores.parquet, from the `single:` routers in `scores`.

    A row is the chosen expert's own row, with router `oracle` and the expert's name. Ties go to the
    first expert by name.
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
    """Return rows of scores.parquet for the single expert that is best over the suite, as a router.

    The best expert has the highest mean of the primary metric over the suite's tasks. Ties go to
    the first expert by name.
    """
    singles = [row for row in scores.to_pylist() if row["router"].startswith(SINGLE)]
    by_task: dict[tuple[str, str], set[str]] = {}
    for row in singles:
        by_task.setdefault((row["suite"], row["task"]), set()).add(row["metric"])
    values: dict[str, dict[str, list[float]]] = {}  # by suite and router
    for row in singles:
        if row["metric"] == primary_metric(by_task[row["suite"], row["task"]]):
            of_suite = values.setdefault(row["suite"], {})
            of_suite.setdefault(row["router"], []).append(row["value"])
    rows = []
    for suite, found in values.items():
        most = max(map(len, found.values()))  # a mean over fewer tasks cannot be compared
        ranked = sorted((-sum(v), router) for router, v in found.items() if len(v) == most)
        best = ranked[0][1]
        rows += [
            {**row, "router": BEST_INDIVIDUAL, "zero_shot": False, "expert": best[len(SINGLE) :]}
            for row in singles
            if (row["suite"], row["router"]) == (suite, best)
        ]
    return rows
