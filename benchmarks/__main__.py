"""Measure every figure of docs/performance.md, and print one table.

    python -m benchmarks [--output FOLDER] [--threads 2] [--only routing packs]

The table, with the machine and the versions, is also written to `benchmarks.parquet` in the folder.
Nothing else should run meanwhile. The ways that are compared alternate in one process, so a ratio
holds where the machine's speed drifts; absolute times do not. On a GPU see benchmarks/gpu.sh.
"""

import argparse
import importlib
import importlib.metadata
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.figures import Figure, print_table
from harness.scheduling.hardware import processor, usable_cores
from phatgoose.ops.routed import way_on

# Modules with a function `measure(threads)`.
NAMES = (
    "routing",
    "linear",
    "arrow",
    "scoring",
    "generation",
    "training",
    "packs",
    "registry",
    "report",
)
LIBRARIES = ("torch", "transformers", "peft", "lm_eval", "deepspeed")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/bench"), help="where benchmarks.parquet goes"
    )
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch; one linear has one")
    parser.add_argument(
        "--only", nargs="+", choices=NAMES, default=NAMES, help="modules; all if left out"
    )
    arguments = parser.parse_args()
    machine = {
        "processor": processor(),
        "cores": str(usable_cores()),
        "kernel": way_on("cpu"),  # rows name their way of mixing
        **{name: importlib.metadata.version(name) for name in LIBRARIES},
    }
    print("\n".join(f"{name}: {value}" for name, value in machine.items()), flush=True)
    figures: list[Figure] = []
    for name in arguments.only:
        started = time.monotonic()
        measure = importlib.import_module(f"benchmarks.{name}").measure
        # In a process of its own: what one module leaves in memory would speed up another.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            found = process.submit(measure, threads=arguments.threads).result()
        figures += found
        print(f"\n{name}, {time.monotonic() - started:.0f} s", flush=True)
        print_table(found)
    print("\nall figures")
    print_table(figures)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "benchmarks.parquet"
    table = pa.Table.from_pylist([asdict(figure) for figure in figures])
    pq.write_table(table.replace_schema_metadata(machine), path)
    print(f"written to {path}")


if __name__ == "__main__":
    main()
