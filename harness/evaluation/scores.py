"""The file scores.parquet: rows of all routers and suites that are comparable."""

import json
from collections.abc import Callable, Collection, Mapping
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
    folder: Folder,
    rows: list[Row],
    keeps: Callable[[Row], bool],
    derived: Collection[str] = (),
) -> None:
    """Write rows of a suite, and keep earlier rows of other routers and suites.

    Args:
        folder: the run folder.
        rows: the rows.
        keeps: whether to keep an earlier row.
        derived: the routers to derive from the single experts' rows.
    """
    table = pa.Table.from_pylist(rows, run_folder.SCORES)
    if ORACLE in derived:
        rows = rows + oracle_rows(table)
    if BEST_INDIVIDUAL in derived:
        rows = rows + best_individual_rows(table)
    new = {(row["suite"], row["router"]) for row in rows}
    earlier = read_scores(folder)
    kept = [row for row in earlier if (row["suite"], row["router"]) not in new and keeps(row)]
    # The order does not depend on which suite was measured first.
    ordered = sorted(kept + rows, key=lambda row: row["suite"])
    run_folder.write_table(folder, run_folder.SCORES_FILE, run_folder.SCORES, ordered)


def write_marker(
    folder: Folder, suite: str, router: str, results: Mapping[str, str], routes: bool
) -> None:
    """Note of which answers a router's samples and routing are, after both were written.

    Args:
        folder: the run folder.
        suite: the name of the suite.
        router: the name of the router.
        results: a hash of what was scored, by task.
        routes: whether there is a file of routing.
    """
    record = {"results": dict(results), "routing": routes}
    run_folder.write_json(folder, _marker(suite, router), record)


def delete_marker(folder: Folder, suite: str, router: str) -> None:
    """Delete the note, before the samples and the routing change."""
    folder.delete(_marker(suite, router), missing_ok=True)


def is_marked(folder: Folder, suite: str, router: str, results: Mapping[str, str]) -> bool:
    """Return whether the samples and routing in the folder are those of these results."""
    data = folder.find(_marker(suite, router))
    if data is None:
        return False
    try:
        record = json.loads(data)
        there = [run_folder.samples_file(suite, router)]
        there += [run_folder.routing_file(suite, router)] if record["routing"] else []
        return record["results"] == results and all(map(folder.exists, there))
    except (ValueError, LookupError, TypeError):
        return False  # it was altered


def _marker(suite: str, router: str) -> str:
    file = run_folder.router_file(f"{run_folder.ANSWERS_FOLDER}/scored", suite, router)
    return file.removesuffix(".parquet") + ".json"
