"""Sample mutants of the code that computes numbers, and count those that no test notices.

    python -m tests.mutation --seed 1 --count 600 --workers 2

1. Run all fast tests once, and note which lines each of them runs.
2. Draw mutants by the seed.
3. For each, in a forked process, run the tests that run its lines, until one fails.
4. Write build/mutants/report.md: a table by module, and the survivors with their diffs.

The exit status is 1 if more than 15 % survive, equivalent mutants included. A run that takes too
long counts as noticed: a mutant that never ends is.
"""

import argparse
import gc
import importlib
import os
import random
import sys
import time
from collections import defaultdict, deque
from dataclasses import dataclass
from pathlib import Path

MOST_SURVIVORS = 0.15
FOLDER = Path("build/mutants")
# What is mutated: routing and mixing, scoring, generation, tokenization, training, statistics.
SOURCES = (
    "phatgoose/ops/*.py",
    "phatgoose/routers/*.py",
    "phatgoose/scoring.py",
    "phatgoose/generation.py",
    "phatgoose/encoding.py",
    "phatgoose/training.py",
    "phatgoose/training_job.py",
    "phatgoose/curve.py",
    "phatgoose/engine.py",
    "phatgoose/gated_lora.py",
    "harness/summary.py",
)
# Tests without a cluster.
TESTS = (
    "tests/phatgoose",
    "tests/harness/test_eval_actor.py",
    "tests/harness/test_lm.py",
    "tests/harness/test_report.py",
    "tests/harness/test_summary.py",
    "tests/harness/test_what_routers_see.py",
)


@dataclass
class Outcome:
    """What became of one mutant: `killed`, `survived` or `timeout`."""

    name: str
    path: str
    what: str
    by: str | None
    diff: str


def main() -> int:
    """Do all of it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="mutate only files whose path has this in it")
    options = parser.parse_args()
    started = time.monotonic()
    _import_libraries()

    from tests.mutation.covered import Covered, measure, read
    from tests.mutation.mutants import Mutant, Mutants
    from tests.mutation.runs import FirstFailure, Killed, Run, install, run_tests, start

    sources = [path for pattern in SOURCES for path in _files(pattern)]
    tests = [path for path in TESTS if Path(path).exists()]
    run = start("", lambda folder: measure(tests, sources, folder), FOLDER / "all", 1800)
    while (status := run.status()) is None:
        time.sleep(0.1)
    found = run.result()
    if status or found is None:
        print(f"the tests fail without any mutant: {found and found['failed']}")
        return 2
    covered: Covered = read(found)
    print(
        f"{len(covered.seconds)} tests without a mutant: {time.monotonic() - started:.0f} s",
        flush=True,
    )

    files = [Mutants(path) for path in sources if options.only in path]
    population = [(file, index) for file in files for index in range(len(file))]
    count = min(options.count, len(population))
    sample = random.Random(options.seed).sample(population, count)
    print(f"{count} of {len(population)} mutants, seed {options.seed}", flush=True)

    killers: dict[tuple[str, range | None], list[str]] = defaultdict(list)
    outcomes: list[Outcome] = []
    waiting = deque(sample)
    running: list[Run] = []
    places = {f"w{i}" for i in range(options.workers)}

    def finish(mutant: Mutant, what: str, by: str | None = None) -> None:
        outcomes.append(Outcome(mutant.name, mutant.path, what, by, mutant.diff()))
        if by:
            killers[mutant.path, mutant.function].append(by)
        if len(outcomes) % 20 == 0:
            survived = sum(outcome.what == "survived" for outcome in outcomes)
            passed = time.monotonic() - started
            print(f"{len(outcomes)} mutants, {survived} survived, {passed:.0f} s", flush=True)

    while waiting or running:
        while waiting and len(running) < options.workers:
            file, index = waiting.popleft()
            mutant = file[index]
            chosen = covered.tests_of(mutant, killers[mutant.path, mutant.function])
            if not chosen:
                finish(mutant, "survived")
                continue

            def work(folder: Path, mutant: Mutant = mutant, chosen: list[str] = chosen) -> int:
                install({str(Path(mutant.path).resolve()): mutant.source})
                return run_tests(chosen, folder, FirstFailure(folder), "-x")

            (place, *_) = places - {run.folder.name for run in running}
            seconds = 20 + 4 * sum(covered.seconds[test] for test in chosen)
            running.append(start(mutant, work, FOLDER / place, seconds))
        time.sleep(0.02)
        for run in list(running):
            try:
                status = run.status()
            except Killed:
                finish(run.what, "timeout")
            else:
                if status is None:
                    continue
                by = run.result()
                finish(run.what, "survived" if status == 0 else "killed", by)
            running.remove(run)
    return _report(outcomes, options.seed, time.monotonic() - started)


def _import_libraries() -> None:
    """Import what is slow to import, once; forked runs have it."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from tests.mutation.runs import LIBRARIES

    for library in LIBRARIES:
        importlib.import_module(library)
    import torch

    torch.set_num_threads(1)
    # The first run compiles the tests, the others read that.
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(FOLDER.resolve() / "pycache")
    gc.collect()
    gc.freeze()  # runs share these objects, and need not look at them
    ours = [name for name in sys.modules if name.split(".")[0] in ("phatgoose", "harness")]
    assert not ours, f"{ours} would be imported without the mutant"


def _files(pattern: str) -> list[str]:
    """Return the files of a pattern; there must be some."""
    found = sorted(map(str, Path().glob(pattern)))
    if not found:
        raise SystemExit(f"{pattern}: no such file. Name the files to mutate in {__file__}.")
    return found


def _report(outcomes: list[Outcome], seed: int, seconds: float) -> int:
    """Print the table, write it with the survivors, and return the exit status."""
    kinds = ("killed", "survived", "timeout")
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(kinds, 0))
    for outcome in outcomes:
        counts[outcome.path][outcome.what] += 1
        counts["all"][outcome.what] += 1
    lines = ["| module | mutants | killed | survived | timeouts |", "|---|---|---|---|---|"]
    for path in [*sorted(counts.keys() - {"all"}), "all"]:
        numbers = [sum(counts[path].values()), *(counts[path][kind] for kind in kinds)]
        lines.append(f"| {path} | {' | '.join(map(str, numbers))} |")
    share = counts["all"]["survived"] / len(outcomes)
    lines += ["", f"Seed {seed}: {share:.1%} survived, in {seconds / 60:.0f} minutes."]
    print("\n".join(lines))
    survivors = [outcome for outcome in outcomes if outcome.what == "survived"]
    for outcome in sorted(survivors, key=lambda outcome: outcome.name):
        lines += ["", f"## {outcome.name}", "", "```diff", outcome.diff.rstrip("\n"), "```"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "report.md").write_text("\n".join(lines) + "\n")
    noticed = [f"{o.name}\t{o.what}\t{o.by or ''}" for o in outcomes]
    (FOLDER / "mutants.tsv").write_text("\n".join(noticed) + "\n")
    print(f"the survivors: {FOLDER / 'report.md'}")
    return int(share > MOST_SURVIVORS)


if __name__ == "__main__":
    sys.exit(main())
