"""Run calls on a set of reused actors: replace an actor that died, repeat its call elsewhere."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from phatgoose.errors import PhatgooseError

ATTEMPTS = 3
_TICK_SECONDS = 1.0


@dataclass(frozen=True)
class Failure:
    """What became of a call that was tried `ATTEMPTS` times, or that has no hope."""

    error: str


class Workers:
    """Actors of one kind, started when there is work and reused until `close`.

    Args:
        make: starts an actor and returns its handle.
        count: says how many to have, once there is work.
    """

    def __init__(self, make: Callable[[], Any], count: Callable[[], int]) -> None:
        self._make = make
        self._count = count
        self._actors: list[Any] = []

    def run(
        self, method: str, calls: Sequence[tuple[Any, ...]], tick: Callable[[list[Any]], None]
    ) -> Iterator[tuple[int, Any]]:
        """Yield the index of each call and its result, or a Failure, as they come in.

        Args:
            method: the actors' method to call.
            calls: the arguments of each call; they are started in this order.
            tick: called with the actors that are at work about every second.
        """
        waiting = deque(range(len(calls)))
        attempts = [0] * len(calls)
        running: dict[Any, tuple[int, Any]] = {}
        count = self._count() if calls else 0
        while waiting or running:
            while waiting and len(running) < count:
                index, actor = waiting.popleft(), self._free_actor(running)
                attempts[index] += 1
                running[getattr(actor, method).remote(*calls[index])] = (index, actor)
            done, _ = ray.wait(list(running), num_returns=1, timeout=_TICK_SECONDS)
            tick([actor for _, actor in running.values()])
            for reference in done:
                index, actor = running.pop(reference)
                result = self._result(reference, actor)
                if isinstance(result, _Again) and attempts[index] < ATTEMPTS:
                    waiting.appendleft(index)
                elif isinstance(result, _Again):
                    yield index, Failure(f"{result.error} (tried {ATTEMPTS} times)")
                else:
                    yield index, result

    def close(self) -> None:
        """End the actors."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors.clear()

    def _free_actor(self, running: dict[Any, tuple[int, Any]]) -> Any:
        busy = [actor for _, actor in running.values()]
        for actor in self._actors:
            if not any(actor is other for other in busy):
                return actor
        self._actors.append(self._make())
        return self._actors[-1]

    def _result(self, reference: Any, actor: Any) -> Any:
        try:
            return ray.get(reference)
        except RayActorError as error:
            self._actors.remove(actor)
            return _Again(f"its actor died: {last_line(error)}")
        except RayTaskError as error:
            if isinstance(error.cause, PhatgooseError):
                return Failure(str(error.cause))
            return _Again(last_line(error))
        except RayError as error:
            return _Again(last_line(error))


@dataclass(frozen=True)
class _Again:
    """A call that may succeed when it is repeated."""

    error: str


def last_line(error: Exception) -> str:
    """The last line of an error's text: of a remote traceback, the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
