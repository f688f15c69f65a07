"""Show the progress of a run: `python -m harness.status <run.dir> [--watch]`.

Only the run folder is read, so the run is not disturbed and need not be reachable.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from harness import run_folder
from harness.command_line import Output, count, run_command, table
from harness.extra_routers import SINGLE
from harness.metrics import has_primary, primary_mean
from harness.storage import Folder

_WATCH_SECONDS = 2.0
_SILENT_SECONDS = 60.0  # a driver writes every two seconds
_SHOWN = 10
_MOST_SCORES = 40
_CLEAR = "\x1b[2J\x1b[H"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m harness.status",
        description="Show the progress of a run: jobs, rates, time left, actors, failures.",
    )
    parser.add_argument("run_dir", metavar="run.dir", help="folder of the run, or its URI")
    parser.add_argument(
        "--watch", action="store_true", help="refresh every two seconds until the run ends"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(call=_status)
    arguments = sys.argv[1:] if arguments is None else arguments
    if not parser.parse_args(arguments).watch:
        return run_command(parser, arguments)
    return _watch(parser, [argument for argument in arguments if argument != "--watch"])


def _watch(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int:
    folder = Folder(parser.parse_args(arguments).run_dir)
    try:
        while True:
            if sys.stdout.isatty():
                print(_CLEAR, end="")
            status = run_command(parser, arguments)
            if status or read_status(folder)["state"] != "running":
                return status
            sys.stdout.flush()
            time.sleep(_WATCH_SECONDS)
    except KeyboardInterrupt:
        return 0


def _status(args: argparse.Namespace) -> Output:
    folder = Folder(args.run_dir)
    document = read_status(folder)
    return Output(document, describe(document))


def read_status(folder: Folder) -> dict[str, Any]:
    """Return the status of the run in a folder.

    The keys are `state` (running, silent, stopped, finished or failed), `call` (from run.json),
    `stage` (from status.json; None before the first stage), `jobs` (rows of jobs.parquet),
    `evaluations` (rows of evaluations.parquet), `scores` (means of the routers that are scored) and
    `silent_seconds`.

    Raises:
        PhatgooseError: this is not a run folder, or one of its files is damaged.
    """
    call = run_folder.read_run(folder)["calls"][-1]
    stage = None
    if folder.exists(run_folder.STATUS_FILE):
        stage = run_folder.read_json(folder, run_folder.STATUS_FILE)
    jobs = _rows(folder, run_folder.JOBS_FILE, run_folder.JOBS)
    scores = _rows(folder, run_folder.SCORES_FILE, run_folder.SCORES)
    if stage and stage["written"] < call["started"]:
        stage = None  # from an earlier call
    written = datetime.fromisoformat(stage["written"] if stage else call["started"])
    silent = max(0.0, (datetime.now(UTC) - written).total_seconds())
    if call["finished"]:
        state = "failed" if call["problems"] else "finished"
    elif stage and stage["state"] == "stopped":
        state = "stopped"
    else:
        state = "silent" if silent > _SILENT_SECONDS else "running"
    return {
        "run_dir": str(folder),
        "state": state,
        "silent_seconds": round(silent),
        "call": {key: call.get(key) for key in ("started", "finished", "minutes", "problems")},
        "stage": stage,
        "jobs": jobs,
        "evaluations": _rows(folder, run_folder.EVALUATIONS_FILE, run_folder.EVALUATIONS),
        "scores": _means(scores),
    }


def _rows(folder: Folder, name: str, schema: pa.Schema) -> list[dict[str, Any]]:
    return run_folder.read_table(folder, name, schema).to_pylist() if folder.exists(name) else []


def _means(scores: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, per suite and router, the mean of the primary metrics, the best first."""
    routers: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in scores:
        routers.setdefault((row["suite"], row["router"]), []).append(row)
    means = [
        {
            "suite": suite,
            "router": router,
            "tasks": len({row["task"] for row in rows}),
            "value": primary_mean(rows),
        }
        for (suite, router), rows in routers.items()
        if has_primary(rows)
    ]
    suites = list(dict.fromkeys(mean["suite"] for mean in means))
    return sorted(means, key=lambda mean: (suites.index(mean["suite"]), -mean["value"]))


def describe(status: dict[str, Any]) -> str:
    """Format a status for the terminal."""
    lines = [f"{status['run_dir']}: {_state(status)}"]
    stage, jobs = status["stage"], status["jobs"]
    if stage and stage["state"] == "running":
        lines += _describe_stage(stage)
    if jobs:
        states = Counter(job["state"] for job in jobs)
        named = ("done", "running", "waiting", "failed")
        lines.append(f"experts   {', '.join(f'{states[s]} {s}' for s in named if states[s])}")
    running = [job for job in jobs if job["state"] == "running"]
    if running and status["state"] == "running":
        rows = [
            [j["expert"], f"{j['seconds'] or 0:.0f} s", str(j["starts"]), _location(j)]
            for j in running[:_SHOWN]
        ]
        lines += ["", table(["running", "for", "starts", "where"], rows, right={1, 2})]
        lines += _more(running, _SHOWN, run_folder.JOBS_FILE)
    if not stage or stage["stage"] == "evaluate":  # else they are of an earlier call
        lines += _describe_evaluations(status["evaluations"], status["scores"])
    troubled = [job for job in jobs if job["errors"]]
    if troubled:
        lines.append("")
        for job in troubled[:_SHOWN]:
            again = f"{count(len(job['errors']), 'error')}, last one:"
            lines.append(f"{job['state']:9} {job['expert']}: {again} {job['errors'][-1]}")
        lines += _more(troubled, _SHOWN, run_folder.JOBS_FILE)
    return "\n".join([*lines, *(f"problem   {line}" for line in status["call"]["problems"] or ())])


def _describe_evaluations(
    evaluations: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]]
) -> list[str]:
    """Return the state of the routers, their scores so far, and why some have none."""
    lines = []
    states = Counter(row["state"] for row in evaluations)
    if evaluations:
        named = ("done", "scoring", "asking", "failed")
        counts = ", ".join(f"{states[state]} {state}" for state in named if states[state])
        lines.append(f"routers   {counts}")
    shown = [mean for mean in scores if not mean["router"].startswith(SINGLE)]
    if shown and states["done"] < len(evaluations):
        rows = [
            [m["suite"], m["router"], str(m["tasks"]), f"{100 * m['value']:.1f}"]
            for m in shown[:_MOST_SCORES]
        ]
        header = ["suite", "router", "tasks", "mean of primary metrics (%)"]
        lines += ["", table(header, rows, right={2, 3})]
        lines += _more(shown, _MOST_SCORES, run_folder.SCORES_FILE)
    troubled = [row for row in evaluations if row["errors"]]
    for row in troubled[:_SHOWN]:
        error = f"router {row['router']}, {row['errors'][0]}"
        lines.append(f"{row['state']:9} {error}")
        if row["traceback"]:
            lines += [f"          {line}" for line in row["traceback"].splitlines()]
    return lines + _more(troubled, _SHOWN, run_folder.EVALUATIONS_FILE)


def _state(status: dict[str, Any]) -> str:
    call = status["call"]
    problems = count(len(call["problems"] or ()), "problem")
    return {
        "running": f"running since {call['started']}",
        "silent": f"no heartbeat for {_duration(status['silent_seconds'])}: the driver or its node "
        "may have died; run the same command to resume",
        "stopped": "stopped; run the same command to resume",
        "finished": f"finished {call['finished']}, after {call['minutes']} min",
        "failed": f"finished {call['finished']} with {problems}",
    }[status["state"]]


def _describe_stage(stage: dict[str, Any]) -> list[str]:
    share = stage["done"] / stage["total"] if stage["total"] else 1.0
    unit, jobs, left = stage["unit"], stage["jobs"], stage["seconds_left"]
    what = "shards" if stage["stage"] == "evaluate" else "jobs"
    lines = [
        f"stage     {stage['stage']}: {share:.0%} of {count(stage['total'], unit)}, "
        f"{stage['rate']:.4g} {unit}s/s, {_duration(left)} left",
        f"{what:9} {jobs['done']} done, {jobs['running']} running, {jobs['waiting']} waiting, "
        f"{jobs['failed']} failed; {stage['jobs_per_hour']:.4g} per hour",
    ]
    nodes: dict[tuple[str, str], list[bool]] = {}
    for actor in stage["actors"]:
        nodes.setdefault((actor["address"], actor["node"]), []).append(actor["works"])
    lines += [
        f"node      {address} ({node[:6]}): {count(len(works), 'actor')}, {sum(works)} working"
        for (address, node), works in sorted(nodes.items())
    ]
    return lines


def _location(job: dict[str, Any]) -> str:
    return f"{job['address']} ({(job['node'] or '')[:6]}), process {job['process']}"


def _more(rows: Sequence[Any], shown: int, file: str) -> list[str]:
    more = len(rows) - shown
    return [f"... and {more} more, in {file}"] if more > 0 else []


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "an unknown time"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    sys.exit(main())
