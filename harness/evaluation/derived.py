"""The rows of scores that are derived from those of the single experts.

The oracle is, per task and metric, the single expert with the best score on that very task. It is
chosen on the data it is then reported on, so it is an upper bound and an optimistic one: no router
that cannot see the answers should be expected to reach it, and its interval leaves out the luck of
the choice.
"""

from typing import Any

import pyarrow as pa

from harness.extra_routers import BEST_INDIVIDUAL, ORACLE, SINGLE
from harness.metrics import better, primary_metric

Row = dict[str, Any]


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
