"""The order in which training reads its examples."""

from collections.abc import Iterator

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
