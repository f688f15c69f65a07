"""Run an undisturbed run and one disturbed run per seed; record the kills and the problems."""

import os
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.chaos.checks import differences, faults, published_twice, trained_again
from tests.chaos.killer import KINDS, Kill, Killer, has_every_kind, plan
from tests.chaos.nodes import Nodes, left_in_cluster
from tests.chaos.watch import Watch
from tests.chaos.workload import Workload

_TICK_SECONDS = 0.05
_DEADLINE_SECONDS = 1200.0
_SHOWN_CHARACTERS = 3000


@dataclass
class Run:
    """A finished run; `seed` is None for the undisturbed one.

    Attributes:
        seed, kills: the seed and the kills of the run.
        seconds: the duration over all calls.
        calls: how often the command was started.
        lost: experts that were trained completely and had to be trained again.
        answers: answered shards.
        problems: one line per problem.
    """

    seed: int | None
    seconds: float = 0.0
    calls: int = 0
    lost: int = 0
    answers: int = 0
    kills: list[Kill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def row(self, undisturbed: "Run") -> dict[str, Any]:
        """Return the run as a row of a parquet file."""
        recoveries = [kill.recovery for kill in self.kills if kill.recovery is not None]
        counts = Counter(kill.kind for kill in self.kills)
        return {
            "seed": self.seed,
            "kills": len(self.kills),
            **{f"{kind}_kills": counts[kind] for kind in KINDS},
            "seconds": round(self.seconds, 1),
            "undisturbed_seconds": round(undisturbed.seconds, 1),
            "calls": self.calls,
            "median_recovery": round(statistics.median(recoveries), 1) if recoveries else None,
            "longest_recovery": max(recoveries, default=None),
            "lost": self.lost,
            "problems": self.problems,
        }


def environment(folder: Path) -> None:
    """Return the environment shared by this process, the cluster and the drivers."""
    os.environ.update(
        PHATGOOSE_CACHE=str(folder / "cache"),
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS="1",
        RAY_USAGE_STATS_ENABLED="0",
        # Otherwise Ray takes the external address of this machine for 127.0.0.1.
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    )
    os.environ.pop("RAY_ADDRESS", None)


def undisturbed(workload: Workload, folder: Path) -> Run:
    """Run the reference for the comparison, in `folder/undisturbed`."""
    return _run(workload, folder / "undisturbed", None, lambda nodes, watch: None)


def disturbed(workload: Workload, folder: Path, seed: int, kills: int, first: Run) -> Run:
    """Run with this many kills in `folder/seed-<seed>`, and collect the problems."""
    planned, run_dir = plan(seed, kills), folder / f"seed-{seed}"

    def killer(nodes: Nodes, watch: Watch) -> Killer:
        return Killer(planned, seed, nodes, watch, workload.experts, first.answers)

    run = _run(workload, run_dir, seed, killer)
    if len(run.kills) < kills or (kills >= len(KINDS) and not has_every_kind(run.kills)):
        run.problems.append(f"only {len(run.kills)} of {kills} kills had a victim")
    if (run_dir / "run.json").exists():
        run.problems += differences(run_dir, folder / "undisturbed")
    return run


def _run(
    workload: Workload,
    run_dir: Path,
    seed: int | None,
    make_killer: Callable[[Nodes, Watch], Killer | None],
) -> Run:
    run = Run(seed)
    output = run_dir.with_suffix(".log")
    with Nodes() as nodes:
        watch = Watch(run_dir, nodes)
        killer = make_killer(nodes, watch)
        try:
            status = _drive(workload.arguments(run_dir), nodes, watch, killer, run, output)
        finally:
            watch.close()
        run.seconds, run.answers = watch.seconds, watch.answers
        run.kills = killer.kills if killer else []
        said = output.read_text(errors="replace")
        if status:
            run.problems.append(f"status {status}: {said[-_SHOWN_CHARACTERS:]}")
        run.problems += [f"still in the cluster: {line}" for line in left_in_cluster(nodes.address)]
    run.problems += [f"still running after the cluster: {line}" for line in nodes.left]
    run.lost, found = trained_again(watch, run.kills)
    run.problems += found + published_twice(said) + watch.regressions
    if not status:
        run.problems += faults(run_dir, workload.names)
    return run


def _drive(
    arguments: list[str],
    nodes: Nodes,
    watch: Watch,
    killer: Killer | None,
    run: Run,
    output: Path,
) -> int:
    """Start the command, and restart it whenever it was killed; return its exit status."""
    deadline = time.monotonic() + _DEADLINE_SECONDS
    command = [sys.executable, "-m", "harness.run", *arguments]
    while True:
        run.calls += 1
        with output.open("ab") as file:
            driver = subprocess.Popen(
                command,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**os.environ, "RAY_ADDRESS": nodes.address},
            )
        try:
            while driver.poll() is None:
                if killer:
                    killer.step(driver)
                if time.monotonic() > deadline:
                    return 1
                time.sleep(_TICK_SECONDS)
        finally:
            if driver.poll() is None:
                psutil.Process(driver.pid).kill()
                driver.wait()
        killed = killer is not None and any(
            kill.kind == "driver" and kill.victim == f"process {driver.pid}"
            for kill in killer.kills
        )
        if driver.returncode != -signal.SIGKILL or not killed:
            return driver.returncode
