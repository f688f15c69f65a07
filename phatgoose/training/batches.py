"""The order in which training reads its examples."""

import itertools
from collections.abc import Callable, Iterator

import torch


def batches(examples: int, batch_size: int, seed: int, skip: int = 0) -> Iterator[list[int]]:
    """Yield endless batches of indices: all examples in a new order in each epoch.

    Args:
        examples: how many there are.
        batch_size: indices per batch; a batch may reach into the next epoch.
        seed: of the orders.
        skip: batches to leave out at the start, as they have been read.
    """
    generator = torch.Generator().manual_seed(seed)
    rounds, position = divmod(skip * batch_size, examples)
    for _ in range(rounds):
        torch.randperm(examples, generator=generator)
    batch: list[int] = []
    while True:
        for index in torch.randperm(examples, generator=generator).tolist()[position:]:
            batch.append(index)
            if len(batch) == batch_size:
                yield batch
                batch = []
        position = 0


def batches_by_length(
    random: Callable[[int], Iterator[list[int]]],
    length: Callable[[int], int],
    window: int,
    seed: int,
    skip: int = 0,
) -> Iterator[list[int]]:
    """Yield the batches of another order with examples of similar length put together.

    The examples of so many batches are sorted by length and cut into batches again, which come in a
    random order. So an example moves by less than a window.

    Args:
        random: the other order, from the batch of the given number on.
        length: returns the length of the example of an index.
        window: batches that are sorted together.
        seed: of the order of the new batches.
        skip: batches to leave out at the start, as they have been read.
    """
    number, done = divmod(skip, window)
    order = random(number * window)
    while True:
        read = list(itertools.islice(order, window))
        indices = sorted(itertools.chain(*read), key=length)
        size = len(read[0])
        cut = [indices[start : start + size] for start in range(0, len(indices), size)]
        # Each window has its own generator, so that skipped ones need not be drawn.
        generator = torch.Generator().manual_seed(seed + number)
        for place in torch.randperm(window, generator=generator).tolist()[done:]:
            yield cut[place]
        number, done = number + 1, 0
