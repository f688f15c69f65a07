"""python -m tests.chaos: compare repeatedly killed runs with an undisturbed run."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from harness.command_line import table
from harness.scheduling.ray_internals import loopback_only
from tests.chaos.runs import Run, disturbed, environment, undisturbed
from tests.chaos.workload import Workload


def main() -> int:
    """Run the command line; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument(
        "--seed",
        type=int,
        action="append",
        help="seed of a disturbed run, repeatable (default: 1, 2, 3)",
    )
    parser.add_argument(
        "--kills", type=int, default=20, help="kills per run (default: %(default)s)"
    )
    parser.add_argument(
        "--experts", type=int, default=24, help="number of experts (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=160, help="steps per expert (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="keep runs and tables in this new folder")
    options = parser.parse_args()
    folder = options.out or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with loopback_only():
            return chaos(
                folder, options.seed or [1, 2, 3], options.kills, options.experts, options.steps
            )
    finally:
        if not options.out:
            shutil.rmtree(folder)


def chaos(folder: Path, seeds: list[int], kills: int, experts: int, steps: int) -> int:
    """Do all runs and write their tables and parquet files; return 1 if anything is wrong."""
    environment(folder)
    workload = Workload(folder / "inputs", experts, steps)
    workload.folder.mkdir()
    workload.prepare()
    first = undisturbed(workload, folder)
    print(f"undisturbed: {first.seconds:.0f} s, {experts} experts, {first.answers} shards")
    if first.problems:
        print("\n".join(first.problems))
        return 1
    runs: list[Run] = []
    for seed in seeds:
        runs.append(disturbed(workload, folder, seed, kills, first))
        print(f"\nseed {seed}\n{kill_table(runs[-1])}", flush=True)
        print("\n".join(f"WRONG: {line}" for line in runs[-1].problems), flush=True)
    rows = [run.row(first) for run in runs]
    print(f"\n{seed_table(rows)}")
    _write(folder / "kills.parquet", [kill.row() for run in runs for kill in run.kills])
    _write(folder / "seeds.parquet", rows)
    print(f"\n{folder}: kills.parquet, seeds.parquet, and a folder and a log per run")
    return int(any(run.problems for run in runs))


def kill_table(run: Run) -> str:
    """Return a table of the kills of a run."""
    header = ["at s", "killed", "which", "activity", "done", "recovery s", "next result"]
    rows = [
        [
            f"{kill.seconds:.0f}",
            kill.kind,
            kill.victim,
            kill.doing,
            f"{kill.experts} experts, {kill.answers} shards",
            "-" if kill.recovery is None else f"{kill.recovery:.1f}",
            "-" if kill.next_result is None else f"{kill.next_result:.1f}",
        ]
        for kill in run.kills
    ]
    return table(header, rows, right={0, 5, 6})


def seed_table(rows: list[dict[str, Any]]) -> str:
    """Return a table with one line per seed."""
    header = {
        "seed": "seed",
        "kills": "kills",
        "trainer_kills": "trainers",
        "evaluator_kills": "evaluators",
        "registry_kills": "registry",
        "node_kills": "nodes",
        "driver_kills": "drivers",
        "seconds": "s",
        "undisturbed_seconds": "undisturbed s",
        "median_recovery": "median recovery s",
        "longest_recovery": "longest",
        "lost": "trained again",
    }
    shown = [[f"{row[key]}" for key in header] for row in rows]
    wrong = [[str(len(row["problems"]))] for row in rows]
    lines = [one + other for one, other in zip(shown, wrong, strict=True)]
    return table([*header.values(), "wrong"], lines, right=set(range(len(header) + 1)))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


if __name__ == "__main__":
    sys.exit(main())
