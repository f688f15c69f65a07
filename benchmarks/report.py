"""Measure the report of a large run: its seconds and its peak memory.

    python -m benchmarks.report [--routers 190] [--tasks 27] [--documents 2950] [--folder FOLDER]

The run is made up: all routers answered all documents of all tasks, with six metrics. Its samples
take about 0.9 GB. The default is the size of 166 single experts and 24 routers on BIG-Bench Hard.
The bootstrap multiplies in OpenBLAS, which takes its threads from OMP_NUM_THREADS.
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.figures import Figure, print_table
from harness.extra_routers import SINGLE
from harness.reporting.report import make_report
from harness.reporting.summary import MERGED, RESAMPLES
from harness.run_folder import SAMPLES, SCORES, SCORES_FILE, samples_file, write_table
from harness.storage import Folder

SUITE = "bbh"
METRICS = ("acc", "acc_norm", "acc_paper", "bigbench_normalized", "exact_match", "nll")
SECONDS, GIB = 300.0, 2.0


def write_run(path: Path, routers: int, tasks: int, documents: int) -> None:
    """Write scores and samples of a made-up run."""
    folder = Folder(path)
    rng = np.random.default_rng(0)
    names = [MERGED, *(f"{SINGLE}expert_{i}" for i in range(1, routers))]
    shared = [_columns(f"task_{i}", documents, rng) for i in range(tasks)]
    scores: list[dict[str, Any]] = []
    for router in names:
        file = path / samples_file(SUITE, router)
        file.parent.mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(file, SAMPLES, compression="zstd") as writer:
            for i, columns in enumerate(shared):
                values_NM = rng.random((documents, len(METRICS)))
                values_NM[:, :-1] = values_NM[:, :-1] < 0.4  # all but nll are 0 or 1
                made = {
                    "router": pa.repeat(router, documents),
                    "metrics": _maps(values_NM),
                    **columns,
                }
                writer.write_table(pa.table([made[n] for n in SAMPLES.names], schema=SAMPLES))
                means = values_NM.mean(axis=0).tolist()
                for metric, value in zip(METRICS, means, strict=True):
                    scores.append(_score(router, f"task_{i}", metric, value, documents))
    write_table(folder, SCORES_FILE, SCORES, scores)


def _columns(task: str, documents: int, rng: np.random.Generator) -> dict[str, pa.Array]:
    """Return the columns of a task's samples that are the same for all routers."""
    ids = [f"{task}/{i:08x}" for i in rng.permutation(documents)]
    choices = pa.array(rng.random(4 * documents) * -20)
    return {
        "suite": pa.repeat(SUITE, documents),
        "task": pa.repeat(task, documents),
        "document": pa.array(ids),
        "target": pa.array([f"({letter})" for letter in "ABCD" * documents][:documents]),
        "prediction": pa.array([f"({letter})" for letter in "BCDA" * documents][:documents]),
        "correct": pa.array([i % 2 == 0 for i in range(documents)]),
        "choice_scores": pa.ListArray.from_arrays(
            pa.array(np.arange(documents + 1, dtype=np.int32) * 4), choices
        ),
        # Every tenth document shares its cluster with the one before.
        "cluster": pa.array([ids[i - (i % 10 == 9)] for i in range(documents)]),
    }


def _maps(values_NM: np.ndarray) -> pa.MapArray:
    documents, metrics = values_NM.shape
    keys = pa.array(METRICS).take(pa.array(np.tile(np.arange(metrics), documents)))
    offsets = pa.array(np.arange(documents + 1, dtype=np.int32) * metrics)
    return pa.MapArray.from_arrays(offsets, keys, pa.array(values_NM.ravel()))


def _score(router: str, task: str, metric: str, value: float, documents: int) -> dict[str, Any]:
    nothing = dict.fromkeys(SCORES.names)
    names = {"run": "r", "base": "b", "manifest": "m", "router": router, "options": "{}"}
    asked = {"suite": SUITE, "task": task, "metric": metric, "documents": "0", "zero_shot": True}
    numbers = {"value": value, "n": documents, "cut": 0, "seconds": 1.0, "tokens": 1}
    return {**nothing, **names, **asked, **numbers}


def report_cost(path: Path) -> tuple[float, float]:
    """Report a run; return the seconds, and the peak memory of this process in GiB."""
    started = time.monotonic()
    make_report(Folder(path))
    seconds = time.monotonic() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return seconds, peak * (1 if sys.platform == "darwin" else 1024) / 2**30


def seconds_of_products(routers: int, tasks: int, documents: int) -> float:
    """Return the seconds of the matrix products alone: draws by documents by routers, twice."""
    rng = np.random.default_rng(0)
    draws, values = rng.random((500, documents)), rng.random((documents, 2 * routers - 1))
    times = []
    for _ in range(5):
        started = time.perf_counter()
        draws @ values
        times.append(time.perf_counter() - started)
    return float(np.median(times)) * RESAMPLES / len(draws) * tasks * len(METRICS)


def measure(
    threads: int = 2,
    routers: int = 190,
    tasks: int = 27,
    documents: int = 2950,
    folder: Path | None = None,
) -> list[Figure]:
    """Return the figures of a report beside what it may take. `threads` are not used."""
    rows = routers * tasks * documents
    with tempfile.TemporaryDirectory(dir=folder) as made:
        # In processes of their own: the memory of a process counts from its first moment.
        _alone(write_run, Path(made), routers, tasks, documents)
        seconds, gib = _alone(report_cost, Path(made))
    floor = _alone(seconds_of_products, routers, tasks, documents)
    name = f"report of {rows / 1e6:.1f} M samples"
    size = f"{routers} routers, {tasks} tasks, {documents} documents, {len(METRICS)} metrics"
    return [
        Figure(
            f"{name}, seconds", seconds, SECONDS, seconds / SECONDS, 1.0, floor / SECONDS, "lower",
            f"{size}; the floor is the bootstrap's products",
        ),
        Figure(f"{name}, GiB", gib, GIB, gib / GIB, 1.0, None, "lower", "peak of the process"),
    ]  # fmt: skip


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--routers", type=int, default=190)
    parser.add_argument("--tasks", type=int, default=27)
    parser.add_argument("--documents", type=int, default=2950, help="of each task")
    parser.add_argument("--folder", type=Path, help="where the run is written for a while")
    arguments = parser.parse_args()
    print_table(
        measure(
            routers=arguments.routers,
            tasks=arguments.tasks,
            documents=arguments.documents,
            folder=arguments.folder,
        )
    )


if __name__ == "__main__":
    main()
