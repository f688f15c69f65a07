"""Check the order of examples, and the order by length, against plain Python."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phatgoose.base import Base
from phatgoose.training.batches import batches, batches_by_length
from tests.support import interrupted


def lengths(examples: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 50, (examples,), generator=generator).tolist()


def take(order: Iterator[list[int]], count: int) -> list[list[int]]:
    return list(itertools.islice(order, count))


def by_length(
    examples: int, size: int, window: int, seed: int, skip: int = 0
) -> Iterator[list[int]]:
    random = functools.partial(batches, examples, size, seed)
    return batches_by_length(random, lengths(examples).__getitem__, window, seed, skip)


@given(
    examples=st.integers(1, 30),
    size=st.integers(1, 6),
    window=st.integers(2, 5),
    seed=st.integers(0, 5),
    skip=st.integers(0, 12),
)
def test_skipped_batches_are_those_that_were_read(
    examples: int, size: int, window: int, seed: int, skip: int
) -> None:
    whole = take(by_length(examples, size, window, seed), skip + 7)
    assert take(by_length(examples, size, window, seed, skip), 7) == whole[skip:]


@given(
    examples=st.integers(1, 30),
    size=st.integers(1, 6),
    window=st.integers(2, 5),
    seed=st.integers(0, 5),
)
def test_each_window_holds_the_same_examples_sorted(
    examples: int, size: int, window: int, seed: int
) -> None:
    length = lengths(examples)
    random = take(batches(examples, size, seed), 3 * window)
    found = take(by_length(examples, size, window, seed), 3 * window)
    assert {len(batch) for batch in found} == {size}
    for start in range(0, 3 * window, window):
        before = sorted(itertools.chain(*random[start : start + window]))
        after = found[start : start + window]
        assert sorted(itertools.chain(*after)) == before
        in_order = sorted(after, key=lambda batch: [length[index] for index in batch])
        flat = [length[index] for batch in in_order for index in batch]
        assert flat == sorted(flat)


def test_windows_come_in_different_orders_that_the_seed_determines() -> None:
    """A growing length in every window would be a curriculum."""
    length = lengths(4000)

    def orders(seed: int) -> list[tuple[int, ...]]:
        found = take(by_length(4000, 4, 8, seed), 80)
        mean = [sum(length[index] for index in batch) for batch in found]
        windows = [mean[start : start + 8] for start in range(0, 80, 8)]
        return [tuple(sorted(range(8), key=window.__getitem__)) for window in windows]

    assert len(set(orders(0))) > 8
    assert orders(0) == orders(0)
    assert orders(0) != orders(1)


@pytest.mark.parametrize("at", [[7], [19, 3]])
def test_an_interrupted_job_reads_the_rest_of_its_window(llama: Base, at: list[int]) -> None:
    recipe = dataclasses.replace(interrupted.RECIPE, sort_window=4)
    expected, rows = interrupted.train(llama, recipe=recipe)
    expert, resumed, _ = interrupted.train_interrupted(llama, at, recipe=recipe)
    assert interrupted.timeless(resumed) == interrupted.timeless(rows)
    assert expert.content_hash() == expected.content_hash()
    plain, _ = interrupted.train(llama)
    assert expert.content_hash() != plain.content_hash()
