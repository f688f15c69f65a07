"""Measure the check for overlap: words of training data per second on one core.

    OMP_NUM_THREADS=1 python -m benchmarks.overlap

The baseline stores 8-word sequences as sets of tuples of words, and inputs as a set of texts. It
runs in the same process on the same texts and must find the same overlaps. The floor is the minimum
work of any check: to read the texts from their table, convert them to lower case, and inspect each
byte once.
"""

import random
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from harness.evaluation.overlap import Overlap, SuiteIndex
from harness.tasks.records import normal

_DOCUMENTS, _EXAMPLES, _WORDS, _ROUNDS = 5_000, 20_000, 60, 5
_IS_WORD = np.array([b >= 128 or chr(b).isalnum() for b in range(256)])


def main() -> None:
    """Print rates and ratios for texts in ASCII and in another alphabet."""
    for name, word in (("ASCII", "word"), ("Cyrillic", "слово")):
        print(name)
        compare(word)


def compare(word: str) -> None:
    """Print the three rates, each the best of several rounds, and their ratios to ours."""
    chance = random.Random(0)
    vocabulary = [f"{word}{i}" for i in range(30_000)]

    def texts(count: int) -> list[str]:
        return [", ".join(chance.choices(vocabulary, k=_WORDS)) for _ in range(count)]

    suite, train = texts(_DOCUMENTS), texts(_EXAMPLES)
    planted = range(0, _EXAMPLES, 1000)
    for place, document in zip(planted, suite, strict=False):
        train[place] = document
    index = SuiteIndex({"suite": table(suite)})
    batches = table(train).to_batches(8192)
    everything = [(normal(text), windows(text)) for text in suite]

    seconds: dict[str, list[float]] = {}
    for _ in range(_ROUNDS):
        found = timed(seconds, "ours", lambda: ours(index, batches))
        assert timed(seconds, "sets of tuples", lambda: plain(everything, batches)) == found
        timed(seconds, "floor", lambda: floor(batches))
        assert found == (len(planted), len(planted))
    best = {name: min(times) for name, times in seconds.items()}
    for name, taken in best.items():
        rate = _EXAMPLES * _WORDS / taken / 1e6
        print(f"  {name:15} {rate:7.2f} million words/s, {taken / best['ours']:5.2f} times ours")


def ours(index: SuiteIndex, batches: list[pa.RecordBatch]) -> tuple[int, int]:
    """Return how many documents equal an input, and how many share a sequence."""
    found: list[Overlap] = index.overlaps("expert", batches)
    return found[0].exact, found[0].shared


def plain(
    suite: list[tuple[str, set[tuple[str, ...]]]], batches: list[pa.RecordBatch]
) -> tuple[int, int]:
    """Compute the result of `ours` with sets. These texts have no common wording to exclude."""
    inputs = {text for text, _ in suite}
    sequences = set().union(*(held for _, held in suite))
    seen_inputs: set[str] = set()
    seen: set[tuple[str, ...]] = set()
    for batch in batches:
        for text in batch.column("input").to_pylist():
            seen_inputs |= {normal(text)} & inputs
            seen |= windows(text) & sequences
    exact = sum(text in seen_inputs for text, _ in suite)
    return exact, sum(text in seen_inputs or bool(held & seen) for text, held in suite)


def floor(batches: list[pa.RecordBatch]) -> int:
    """Return the number of bytes that are part of words."""
    count = 0
    for batch in batches:
        for text in batch.column("input").to_pylist():
            count += int(_IS_WORD[np.frombuffer(text.lower().encode(), dtype=np.uint8)].sum())
    return count


def windows(text: str) -> set[tuple[str, ...]]:
    """Return the 8-word sequences of a text."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


def table(texts: list[str]) -> pa.Table:
    """Return examples whose text is their complete input."""
    return pa.table({"text": [""] * len(texts), "input": texts})


def timed(seconds: dict[str, list[float]], name: str, run: Callable[[], Any]) -> Any:
    """Call a function, record its duration, and return its result."""
    started = time.perf_counter()
    result = run()
    seconds.setdefault(name, []).append(time.perf_counter() - started)
    return result


if __name__ == "__main__":
    main()
