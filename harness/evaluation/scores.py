"""The file scores.parquet: rows of all routers and suites that are comparable."""

from collections.abc import Collection
from typing import Any

import pyarrow as pa

from harness import run_folder
from harness.evaluation.derived import best_individual_rows, oracle_rows
from harness.extra_routers import BEST_INDIVIDUAL, ORACLE
from harness.storage import Folder

Row = dict[str, Any]


def read_scores(folder: Folder) -> list[Row]:
    """Return the rows; none if nothing was evaluated yet."""
    name = run_folder.SCORES_FILE
    if not folder.exists(name):
        return []
    rows: list[Row] = run_folder.read_table(folder, name, run_folder.SCORES).to_pylist()
    return rows


def write_scores(
    folder: Folder, suite: str, rows: list[Row], derived: Collection[str] = ()
) -> None:
    """Write the rows of a suite, and keep earlier rows that are comparable.

    These are the rows of other suites, and of other routers on the same documents, with this pool.

    Args:
        folder: the run folder.
        suite: the name of the suite.
        rows: its rows; at least one.
        derived: the routers to derive from the single experts' rows.
    """
    table = pa.Table.from_pylist(rows, run_folder.SCORES)
    if ORACLE in derived:
        rows = rows + oracle_rows(table)
    if BEST_INDIVIDUAL in derived:
        rows = rows + best_individual_rows(table)
    routers = {row["router"] for row in rows}
    documents = {(row["task"], row["documents"]) for row in rows}
    manifest = rows[0]["manifest"]
    kept = [
        row
        for row in read_scores(folder)
        if row["manifest"] == manifest
        and (
            row["suite"] != suite
            or (row["router"] not in routers and (row["task"], row["documents"]) in documents)
        )
    ]
    # The order does not depend on which suite was measured first.
    ordered = sorted(kept + rows, key=lambda row: row["suite"])
    run_folder.write_table(folder, run_folder.SCORES_FILE, run_folder.SCORES, ordered)
