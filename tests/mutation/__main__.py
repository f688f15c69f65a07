"""Sample mutants of the code that computes numbers, and count those that no test notices.

    python -m tests.mutation --seed 1 --count 600 --workers 2

1. Run all fast tests once, and record which lines each of them runs.
2. Draw mutants by the seed.
3. For each mutant, in a forked process, run the tests that cover its lines until one fails.
4. Write build/mutants/report.md: a table by module, and the survivors with their diffs.

The exit status is 1 if more than 15 % survive, equivalent mutants included. A run that takes too
long counts as noticed.
"""

import argparse
import gc
import importlib
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.mutation.runs import (
    LIBRARIES,
    FirstFailure,
    Killed,
    Run,
    install,
    run_tests,
    start,
)

if TYPE_CHECKING:  # imported after the libraries
    from tests.mutation.covered import Covered
    from tests.mutation.mutants import Mutant

MOST_SURVIVORS = 0.15
# Runs without a mutant. They must pass: otherwise every mutant would seem to be noticed.
CONTROLS = 3
FOLDER = Path("build/mutants")
# The mutated code: routing and mixing, scoring, generation, tokenization, training, statistics.
SOURCES = (
    "phatgoose/ops/*.py",
    "phatgoose/routers/*.py",
    "phatgoose/inference/scoring.py",
    "phatgoose/inference/generation.py",
    "phatgoose/question.py",
    "phatgoose/rows.py",
    "phatgoose/tokenization.py",
    "phatgoose/training/batches.py",
    "phatgoose/training/train.py",
    "phatgoose/training/trainer.py",
    "phatgoose/training/curve.py",
    "phatgoose/training/engine.py",
    "phatgoose/training/gated_lora.py",
    "harness/evaluation/derived.py",
    "harness/metrics.py",
    "harness/reporting/summary.py",
    "harness/tasks/clusters.py",
    "harness/tasks/metrics.py",
)
# Tests without a cluster.
TESTS = (
    "tests/phatgoose",
    "tests/harness/evaluation/test_actor.py",
    "tests/harness/evaluation/test_lm.py",
    "tests/harness/reporting/test_report.py",
    "tests/harness/reporting/test_statistics.py",
    "tests/harness/reporting/test_summary.py",
    "tests/harness/tasks/test_clusters.py",
    "tests/harness/tasks/test_metrics.py",
    "tests/harness/evaluation/test_what_routers_see.py",
)


@dataclass
class Outcome:
    """The outcome of one mutant: `killed`, `survived` or `timeout`."""

    name: str
    path: str
    what: str
    by: str | None
    diff: str


def main() -> int:
    """Run the whole procedure; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="mutate only files whose path has this in it")
    options = parser.parse_args()
    started = time.monotonic()
    _import_libraries()
    from tests.mutation.mutants import Mutants

    sources = [path for pattern in SOURCES for path in _files(pattern)]
    questions = Questions(_measure(sources), options.workers)
    print(f"All tests without a mutant: {time.monotonic() - started:.0f} s", flush=True)

    files = [Mutants(path) for path in sources if options.only in path]
    population = [(file, index) for file in files for index in range(len(file))]
    if not population:
        raise SystemExit(f"--only={options.only}: no file to mutate. Give a part of one's path.")
    count = min(options.count, len(population))
    sample = random.Random(options.seed).sample(population, count)
    controls = (file[index].undone() for file, index in sample[:CONTROLS])
    if any(outcome.what != "survived" for outcome in questions.ask(controls)):
        raise SystemExit("Tests that pass together fail alone without any mutant: run them alone.")

    print(f"{count} of {len(population)} mutants, seed {options.seed}", flush=True)
    outcomes: list[Outcome] = []
    for outcome in questions.ask(file[index] for file, index in sample):
        outcomes.append(outcome)
        if len(outcomes) % 20 == 0:
            _, _, last = _write(outcomes, options.seed, time.monotonic() - started)
            print(f"{len(outcomes)} mutants. {last}", flush=True)
    share, table, last = _write(outcomes, options.seed, time.monotonic() - started)
    print("\n".join([*table, "", last, f"The survivors: {FOLDER / 'report.md'}"]))
    return int(share > MOST_SURVIVORS)


def _measure(sources: list[str]) -> "Covered":
    """Run all tests once."""
    from tests.mutation.covered import measure, read

    if gone := [path for path in TESTS if not Path(path).exists()]:
        raise SystemExit(f"No such tests: {', '.join(gone)}. Correct TESTS in {__file__}.")
    tests = list(TESTS)
    run = start("", lambda folder: measure(tests, sources, folder), FOLDER / "all", 1800)
    while (status := run.status()) is None:
        time.sleep(0.1)
    found = run.result()
    if status or found is None:
        raise SystemExit(f"Tests fail without any mutant: {found and found['failed']}. Fix them.")
    return read(found)


class Questions:
    """Run the tests of several mutants at a time.

    Args:
        covered: which tests run which lines.
        workers: how many mutants at a time.
    """

    def __init__(self, covered: "Covered", workers: int) -> None:
        self._covered, self._workers = covered, workers
        # By function: tests that have noticed a mutant are likely to notice the next one.
        self._killers: dict[tuple[str, range | None], list[str]] = defaultdict(list)

    def ask(self, mutants: Iterable["Mutant"]) -> Iterator[Outcome]:
        """Yield the outcome of each mutant as soon as it is known."""
        waiting = iter(mutants)
        running: list[Run] = []
        while True:
            places = {f"w{i}" for i in range(self._workers)} - {run.folder.name for run in running}
            for place, mutant in zip(sorted(places), waiting):  # noqa: B905 (what is left waits)
                running.append(self._start(mutant, FOLDER / place))
            if not running:
                return
            time.sleep(0.02)
            for run in list(running):
                outcome = self._outcome(run)
                if outcome is not None:
                    running.remove(run)
                    yield outcome

    def _start(self, mutant: "Mutant", folder: Path) -> Run:
        chosen = self._covered.tests_of(mutant, self._killers[mutant.path, mutant.function])

        def work(folder: Path) -> int:
            if not chosen:
                return 0
            install({str(Path(mutant.path).resolve()): mutant.source})
            return run_tests(chosen, folder, FirstFailure(folder), "-x")

        seconds = 20 + 4 * sum(self._covered.seconds[test] for test in chosen)
        return start(mutant, work, folder, seconds)

    def _outcome(self, run: Run) -> Outcome | None:
        """Return the outcome of a mutant; None while its tests run."""
        mutant, by, what = run.what, None, "timeout"
        try:
            status = run.status()
        except Killed:
            pass
        else:
            if status is None:
                return None
            by = run.result()
            unnoticed = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
            what = "survived" if status in unnoticed else "killed"
        if by:
            self._killers[mutant.path, mutant.function].append(by)
        return Outcome(mutant.name, mutant.path, what, by, mutant.diff())


def _import_libraries() -> None:
    """Import slow modules once, so that forked runs have them."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for library in LIBRARIES:
        importlib.import_module(library)
    import torch

    torch.set_num_threads(1)
    # The first run compiles the tests, and the others read the result.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(FOLDER.resolve() / "pycache")
    gc.collect()
    gc.freeze()  # runs share these objects, so the collector need not visit them
    ours = [name for name in sys.modules if name.split(".")[0] in ("phatgoose", "harness")]
    assert not ours, f"{ours} would be imported without the mutant"


def _files(pattern: str) -> list[str]:
    """Return the files of a pattern; fail if there are none."""
    found = sorted(map(str, Path().glob(pattern)))
    if not found:
        raise SystemExit(f"{pattern}: no such file. Name the files to mutate in {__file__}.")
    return found


def _write(outcomes: list[Outcome], seed: int, seconds: float) -> tuple[float, list[str], str]:
    """Write the reports; return the share that survived, the table, and a sentence."""
    kinds = ("killed", "survived", "timeout")
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(kinds, 0))
    for outcome in outcomes:
        counts[outcome.path][outcome.what] += 1
        counts["all"][outcome.what] += 1
    table = ["| module | mutants | killed | survived | timeouts |", "|---|---|---|---|---|"]
    for path in [*sorted(counts.keys() - {"all"}), "all"]:
        numbers = [sum(counts[path].values()), *(counts[path][kind] for kind in kinds)]
        table.append(f"| {path} | {' | '.join(map(str, numbers))} |")
    share = counts["all"]["survived"] / len(outcomes)
    last = f"Seed {seed}: {share:.1%} survived, in {seconds / 60:.0f} minutes."
    lines = [*table, "", last]
    survivors = [outcome for outcome in outcomes if outcome.what == "survived"]
    for outcome in sorted(survivors, key=lambda outcome: outcome.name):
        lines += ["", f"## {outcome.name}", "", "```diff", outcome.diff.rstrip("\n"), "```"]
    (FOLDER / "report.md").write_text("\n".join(lines) + "\n")
    noticed = [f"{o.name}\t{o.what}\t{o.by or ''}" for o in outcomes]
    (FOLDER / "mutants.tsv").write_text("\n".join(noticed) + "\n")
    return share, table, last


if __name__ == "__main__":
    sys.exit(main())
