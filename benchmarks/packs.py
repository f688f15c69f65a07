"""Measure how long a process takes to open a packed pool that its machine has verified.

    python -m benchmarks.packs [--experts 166]

The pool has random experts for SmolLM2-135M. The baseline hashes the whole file first, as the first
process of a machine does. The file is in the page cache, as where several actors share a machine.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.figures import Figure, compare, print_table
from benchmarks.pools import BASE, random_pool
from benchmarks.timing import paired
from harness.registry import packs
from phatgoose.base import load_base
from phatgoose.pool import Pool


def _open(folder: Path, *, verified: bool) -> Pool:
    if not verified:
        packs._hash(folder / packs.POOL_FILE, lambda: None)
    packs._hash_once(folder / packs.POOL_FILE, lambda: None)
    return Pool.open(folder)


def measure(threads: int = 2, rounds: int = 5, experts: int = 166) -> list[Figure]:
    """Return the time to open a pool, in seconds."""
    del threads  # a file is read by one
    with tempfile.TemporaryDirectory() as folder:
        random_pool(load_base(BASE), experts).save(folder)
        size = (Path(folder) / packs.POOL_FILE).stat().st_size
        times = paired(
            {
                "verified": partial(_open, Path(folder), verified=True),
                "hashed": partial(_open, Path(folder), verified=False),
            },
            rounds,
        )
    return [
        compare(
            f"opening a pack of {experts} experts",
            zip(times["verified"], times["hashed"], strict=True),
            note=f"seconds, target 0.1; {size / 2**30:.1f} GiB mapped",
        )
    ]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--experts", type=int, default=166)
    parser.add_argument("--rounds", type=int, default=5)
    print_table(measure(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
