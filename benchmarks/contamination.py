"""Speed of the check of contamination: words of training data a second, on one core.

    python -m benchmarks.contamination

The baseline keeps 8-word sequences as a set of tuples of words, in the same process, on the same
texts. The floor is to find the words: one regular expression over the text.
"""

import random
import re
import time

import pyarrow as pa

from harness.contamination import SuiteIndex

_EXAMPLES, _WORDS = 20_000, 60


def main() -> None:
    """Print the three rates and their ratios."""
    chance = random.Random(0)
    vocabulary = [f"word{i}" for i in range(30_000)]

    def texts(count: int) -> list[str]:
        return [" ".join(chance.choices(vocabulary, k=_WORDS)) for _ in range(count)]

    suite, train = texts(5_000), texts(_EXAMPLES)
    train[::1000] = suite[: len(train[::1000])]
    total = _EXAMPLES * _WORDS
    blank = [""] * len(suite)
    index = SuiteIndex({"suite": pa.table({"text": blank, "input": suite})})
    table = pa.table({"text": [""] * len(train), "input": train})

    started = time.perf_counter()
    for text in train:
        re.findall(r"\w+", text.lower())
    floor = time.perf_counter() - started

    started = time.perf_counter()
    (found,) = index.overlaps("expert", table.to_batches(8192))
    ours = time.perf_counter() - started

    def windows(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    held = [windows(text) for text in suite]
    everything = set().union(*held)
    started = time.perf_counter()
    seen: set[tuple[str, ...]] = set()
    for text in train:
        seen |= windows(text) & everything
    plain = time.perf_counter() - started
    assert found.shared == sum(bool(document & seen) for document in held)

    for name, seconds in (("floor", floor), ("ours", ours), ("sets of tuples", plain)):
        rate = total / seconds / 1e6
        print(f"{name:15} {rate:6.2f} million words/s, {seconds / ours:5.2f} of ours")


if __name__ == "__main__":
    main()
