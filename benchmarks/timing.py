"""Time several ways of one piece of work in rounds that alternate between them."""

import gc
import time
from collections.abc import Callable, Mapping

Times = dict[str, list[float]]


def paired(
    ways: Mapping[str, Callable[[], object]],
    rounds: int,
    before: Mapping[str, Callable[[], object]] | None = None,
) -> Times:
    """Return the seconds of each way in each round, after one round that is not counted.

    Args:
        ways: what to time, by name.
        rounds: how often.
        before: by the same names, what is to be done before each time, untimed.
    """
    times: Times = {name: [] for name in ways}
    gc.collect()
    for _ in range(rounds + 1):
        for name, way in ways.items():
            if before and name in before:
                before[name]()
            started = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - started)
    return {name: values[1:] for name, values in times.items()}
