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
_EXPECTED = f"{PhatgooseError.__module__}.{PhatgooseError.__qualname__}"


@dataclass(frozen=True)
class Failure:
    """What became of a call that was tried `ATTEMPTS` times, or that has no hope."""

    error: str


class Workers:
    """Actors of one kind, started when there is work and reused until `close`.

    An actor gets a call only once it has started, so that one that finds no room, or cannot start
    on its node, holds nothing up while others are at work.

    Args:
        make: starts an actor and returns its handle.
        count: says how many to have, once there is work.
    """

    def __init__(self, make: Callable[[], Any], count: Callable[[], int]) -> None:
        self._make = make
        self._count = count
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._running: dict[Any, tuple[int, Any]] = {}

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
        failed_starts, why = 0, ""  # after ATTEMPTS of them, no more actors are made
        room = self._count() if calls else 0
        while waiting or self._running:
            while self._idle and waiting:
                index, actor = waiting.popleft(), self._idle.pop()
                attempts[index] += 1
                reference = getattr(actor, method).remote(*calls[index])
                self._running[reference] = (index, actor)
            have = len(self._idle) + len(self._starting) + len(self._running)
            for _ in range(min(room - have, len(waiting)) if failed_starts < ATTEMPTS else 0):
                actor = self._make()
                self._starting[actor.__ray_ready__.remote()] = actor
            references = [*self._running, *self._starting]
            if not references:
                yield from ((index, Failure(why)) for index in waiting)
                return
            done, _ = ray.wait(references, num_returns=1, timeout=_TICK_SECONDS)
            tick([actor for _, actor in self._running.values()])
            for reference in done:
                if reference in self._starting:
                    error = self._started(reference)
                    if error:
                        failed_starts, why = failed_starts + 1, error
                    continue
                index, actor = self._running.pop(reference)
                result = self._result(reference, actor)
                if isinstance(result, _Again) and attempts[index] < ATTEMPTS:
                    waiting.appendleft(index)
                elif isinstance(result, _Again):
                    yield index, Failure(f"{result.error} (tried {ATTEMPTS} times)")
                else:
                    yield index, result

    def close(self) -> None:
        """End the actors."""
        at_work = [actor for _, actor in self._running.values()]
        for actor in [*self._idle, *self._starting.values(), *at_work]:
            ray.kill(actor)
        self._idle.clear()
        self._starting.clear()
        self._running.clear()

    def _started(self, reference: Any) -> str | None:
        """Take in an actor that has started; else say why it has not."""
        actor = self._starting.pop(reference)
        try:
            ray.get(reference)
        except RayError as error:
            ray.kill(actor)  # where it was only out of reach, it would keep its cores
            # Of what an actor's constructor raised, Ray keeps the text only.
            reason = last_line(error)
            _, expected, message = reason.partition(f"{_EXPECTED}: ")
            return message if expected else f"no actor could be started: {reason}"
        self._idle.append(actor)
        return None

    def _result(self, reference: Any, actor: Any) -> Any:
        try:
            result = ray.get(reference)
        except RayActorError as error:
            ray.kill(actor)  # where it was only out of reach, it would keep its cores
            return _Again(f"its actor died: {last_line(error)}")
        except RayTaskError as error:
            self._idle.append(actor)
            if isinstance(error.cause, PhatgooseError):
                return Failure(str(error.cause))
            return _Again(last_line(error))
        except RayError as error:
            self._idle.append(actor)
            return _Again(last_line(error))
        self._idle.append(actor)
        return result


@dataclass(frozen=True)
class _Again:
    """A call that may succeed when it is repeated."""

    error: str


def last_line(error: Exception) -> str:
    """The last line of an error's text: of a remote traceback, the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
