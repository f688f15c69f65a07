"""The scheduler: calls on reused actors, wherever the cluster has room, until each has a result.

    waiting ──► an idle actor ──► result
       ▲             │ dies, or shows no progress for the length of its lease
       └─────────────┘ the call returns to the front of the queue

New nodes are used, nodes that are about to leave get no new calls, and an actor that died is
replaced. A call holds a lease on its actor. Every sign of progress renews the lease: actors count
their work, and only this process's monotonic clock measures time, so clocks that jump or differ do
no harm. The durable state of calls is elsewhere, in the registry, the answers and the checkpoints
of jobs. So a driver that dies loses only unfinished calls.
"""

import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from harness.scheduling.actor import Heartbeat, Location, Refused
from harness.scheduling.ray_internals import draining_nodes
from phatgoose.errors import OutOfMemory, PhatgooseError

ATTEMPTS = 3  # of a call that raises unexpected errors
DEATHS = 10  # of actors, during a call without progress; often their nodes are the cause
_FAILED_STARTS = 10  # of actors in a row, for example because their nodes died
TICK_SECONDS = 1.0
_AWAY_SECONDS = 10.0  # a step and the handling of its results take less
_LOOK_SECONDS = 5.0  # between two looks at the cluster, and two heartbeats of an actor
_EXPECTED = f"{PhatgooseError.__module__}."


@dataclass(frozen=True)
class Failure:
    """The result of a call that was given up.

    Attributes:
        error: the error, in one line.
        traceback: the traceback of the last error, if it is known.
        refused: whether every call with such arguments would fail, see `Refused`.
    """

    error: str
    traceback: str = field(default="", compare=False)
    refused: bool = field(default=False, compare=False)


class Killed(OutOfMemory):
    """Ray killed an actor because its node was about to run out of memory."""


class Watch:
    """Callbacks for submitted calls. `key` is a call's place in the order of submission."""

    def started(self, key: int, location: Location) -> None:
        """Handle the start of a call on an actor."""

    def went_back(self, key: int, error: str, traceback: str) -> None:
        """Handle the return of a call that has to run again."""

    def revise(self, key: int, error: PhatgooseError) -> tuple[Any, ...] | None:
        """Return new arguments for a call that raised an expected error; None to give it up."""
        return None


@dataclass(eq=False)
class _Call:
    key: int
    method: str
    arguments: tuple[Any, ...]
    watch: Watch
    errors: int = 0
    deaths: int = 0  # since it last made progress
    steps: int = 0  # the most that it ever reached


@dataclass(eq=False)
class _Actor:
    """An actor: starting (it has no location), idle (no reference) or working (a call)."""

    handle: Any
    reference: Any  # of its start, then of its call
    location: Location | None = None
    call: _Call | None = None
    heartbeat: Any = None  # the reference of a pending heartbeat
    asked: float = 0.0
    count: int = -1  # of its last heartbeat
    steps: int = 0
    progress: float = field(default_factory=time.monotonic)  # the time of its last progress


class Workers:
    """Actors of one kind, started when there is work and reused until `close`.

    An actor gets a call only after it has started. So an actor that finds no room, or cannot start
    on its node, does not delay the other actors.

    Args:
        make: starts an actor and returns its handle. The actor's class is a subclass of
            `harness.scheduling.actor.Actor`.
        room: returns the number of actors that the cluster has room for now.
        lease_seconds: an actor without progress for this time is ended, and its call runs again.
        wait_seconds: how long to wait for a node with room while there is no actor.
        want: called from time to time with the number of actors that there is work for, and with
            0 at the end.
        ended: called with the handle of every ended actor, to free its other resources.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        room: Callable[[], int],
        *,
        lease_seconds: float = 900.0,
        wait_seconds: float = 60.0,
        want: Callable[[int], None] = lambda count: None,
        ended: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self._make, self._room, self._ended = make, room, ended
        self._lease_seconds, self._wait_seconds = lease_seconds, wait_seconds
        self._want = want
        self.paused = False  # if true, no actor is started and idle actors are ended
        self.is_patient = False  # if true, calls wait for room without a limit
        self._waiting: deque[_Call] = deque()
        self._actors: list[_Actor] = []
        self._added = 0
        self._looked = self._had_actor = -float("inf")
        self._has_requested = False
        self._stepped = time.monotonic()
        self._has_room = 0
        self._draining: frozenset[str] = frozenset()
        self._failed_starts, self._hopeless_starts, self._why = 0, 0, ""

    @property
    def size(self) -> int:
        """The number of actors, including those that are starting."""
        return len(self._actors)

    @property
    def is_done(self) -> bool:
        """Whether no call is waiting or running."""
        return not self._waiting and all(actor.call is None for actor in self._actors)

    @property
    def waiting(self) -> int:
        """The number of calls that wait for an actor."""
        return len(self._waiting)

    @property
    def under_way(self) -> dict[int, int]:
        """The running calls, and the steps of each that its actor last reported."""
        return {actor.call.key: actor.steps for actor in self._actors if actor.call}

    @property
    def locations(self) -> list[tuple[Location, bool]]:
        """The locations of actors, and whether they are working."""
        return [(a.location, a.call is not None) for a in self._actors if a.location]

    @property
    def wants_more(self) -> bool:
        """Whether there are calls that more actors could take."""
        return bool(self._waiting) or any(a.location is None for a in self._actors)

    def add(
        self, method: str, calls: Sequence[tuple[Any, ...]], watch: Watch | None = None
    ) -> range:
        """Queue calls of one method with these arguments; return their keys."""
        if self.is_done:  # time without work does not count, and the cluster may have changed
            self._looked, self._had_actor = -float("inf"), time.monotonic()
        keys = range(self._added, self._added + len(calls))
        self._added += len(calls)
        watch = watch or Watch()
        self._waiting += [
            _Call(key, method, call, watch) for key, call in zip(keys, calls, strict=True)
        ]
        return keys

    def cancel(self, keys: Collection[int]) -> list[int]:
        """Drop those of these calls that wait for an actor; return their keys."""
        unwanted = {*keys}
        dropped = [call.key for call in self._waiting if call.key in unwanted]
        self._waiting = deque(call for call in self._waiting if call.key not in unwanted)
        return dropped

    def run(
        self,
        method: str,
        calls: Sequence[tuple[Any, ...]],
        tick: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[int, Any]]:
        """Yield the index of each call and its result, or a Failure, as they come in.

        Args:
            method: the actors' method to call.
            calls: the arguments of each call; they are started in this order.
            tick: called at least about every second.
        """
        first = self.add(method, calls).start
        while not self.is_done:
            for key, result in self.step(TICK_SECONDS):
                yield key - first, result
            tick()

    def step(self, timeout: float) -> list[tuple[int, Any]]:
        """Assign calls, wait at most `timeout` seconds, and return the new results by key."""
        if self.paused:
            self._had_actor = time.monotonic()
            for actor in [actor for actor in self._actors if actor.call is None]:
                self._end(actor)
        else:
            self._look()
            self._give_out()
            if not self._start_actors():
                return self._give_up()
        by_reference = {a.reference: a for a in self._actors if a.reference is not None}
        heartbeats = {
            actor.heartbeat: actor for actor in self._actors if actor.heartbeat is not None
        }
        references = [*by_reference, *heartbeats]
        if references:
            ray.wait(references, num_returns=1, timeout=timeout)
            # Take all that are ready, not only the first.
            done, _ = ray.wait(references, num_returns=len(references), timeout=0)
        else:
            time.sleep(min(timeout, TICK_SECONDS) if self._waiting else 0)
            done = []
        came = []
        for reference in done:
            if reference in heartbeats:
                if heartbeats[reference].heartbeat is reference:  # unless its call returned, too
                    self._take_heartbeat(heartbeats[reference])
            elif by_reference[reference].call is None:
                self._take_start(by_reference[reference])
            else:
                came += self._take_result(by_reference[reference])
        return came + self._end_leases()

    def close(self) -> None:
        """End the actors, and drop the waiting calls."""
        for actor in list(self._actors):
            self._end(actor)
        self._waiting.clear()
        if self._has_requested:
            self._want(0)

    def _look(self) -> None:
        """Check, from time to time, how much room the cluster has, and which nodes are leaving."""
        now = time.monotonic()
        if not self._waiting or now - self._looked < _LOOK_SECONDS:
            return
        self._looked, self._has_requested = now, True
        self._want(len(self._waiting) + len(self.under_way))
        self._has_room = self._room()
        self._draining = draining_nodes()
        if any(actor.location for actor in self._actors):
            # Some nodes work. Those where an actor could not start may be fixed or gone by now.
            self._failed_starts = self._hopeless_starts = 0
        for actor in list(self._actors):
            leaves = actor.location is not None and actor.location.node in self._draining
            if leaves and actor.call is None:
                self._end(actor)

    def _give_out(self) -> None:
        for actor in self._actors:
            if not self._waiting:
                return
            if (
                actor.location is None
                or actor.call is not None
                or actor.location.node in self._draining
            ):
                continue
            call = actor.call = self._waiting.popleft()
            actor.reference = getattr(actor.handle, call.method).remote(*call.arguments)
            actor.progress = actor.asked = time.monotonic()
            actor.count, actor.steps, actor.heartbeat = -1, 0, None
            call.watch.started(call.key, actor.location)

    def _start_actors(self) -> bool:
        """Start actors if there is room and work; return False if waiting calls have no chance."""
        some_work = any(actor.location for actor in self._actors)
        if some_work or not self._waiting or self._had_actor < 0:
            self._had_actor = time.monotonic()
        if not self._waiting:
            return True
        hopeless = self._hopeless_starts >= ATTEMPTS or self._failed_starts >= _FAILED_STARTS
        starting = sum(actor.location is None for actor in self._actors)
        if not hopeless:
            leaving = sum(
                bool(a.location and a.location.node in self._draining) for a in self._actors
            )
            room = self._has_room - (len(self._actors) - leaving)
            more = min(room, len(self._waiting) - starting)
            for _ in range(more):
                handle = self._make()
                self._actors.append(_Actor(handle, handle.location.remote()))
        # Wait for a starting actor only if there is a node for it.
        if some_work or (self._actors and self._has_room > 0):
            return True
        waited = time.monotonic() - self._had_actor
        if not hopeless and (self.is_patient or waited < self._wait_seconds):
            return True
        for actor in list(self._actors):
            self._end(actor)
        self._why = self._why or "no node of the Ray cluster has room for an actor any more"
        return False

    def _give_up(self) -> list[tuple[int, Any]]:
        failed = [(call.key, Failure(self._why)) for call in self._waiting]
        self._waiting.clear()
        return failed

    def _end(self, actor: _Actor) -> None:
        """Kill an actor. Even one that is only out of reach would otherwise hold its cores."""
        ray.kill(actor.handle)
        self._ended(actor.handle)
        self._actors.remove(actor)

    def _take_start(self, actor: _Actor) -> None:
        """Register an actor that has started, or find out why it has not."""
        reference, actor.reference = actor.reference, None
        try:
            actor.location = ray.get(reference)
        except RayError as error:
            self._end(actor)
            # Ray keeps only the text of what an actor's constructor raised.
            reason = last_line(error)
            _, expected, message = reason.partition(_EXPECTED)
            self._why = (
                message.partition(": ")[2] if expected else f"no actor could be started: {reason}"
            )
            self._failed_starts += 1
            self._hopeless_starts += getattr(error, "actor_init_failed", False) or bool(expected)
            return
        self._failed_starts, self._hopeless_starts, self._why = 0, 0, ""

    def _take_heartbeat(self, actor: _Actor) -> None:
        reference, actor.heartbeat = actor.heartbeat, None
        try:
            heartbeat: Heartbeat = ray.get(reference)
        except RayError:  # its call will raise it, too
            return
        actor.steps = heartbeat.steps
        if heartbeat.count != actor.count:
            actor.count, actor.progress = heartbeat.count, time.monotonic()

    def _take_result(self, actor: _Actor) -> list[tuple[int, Any]]:
        """Return the result of an actor's call; nothing if the call has to run again."""
        reference, call = actor.reference, actor.call
        assert call is not None
        actor.reference = actor.call = actor.heartbeat = None
        try:
            result = ray.get(reference)
        except OutOfMemoryError as error:  # Ray's memory monitor killed the actor
            self._end(actor)
            error_of_ours = Killed(last_line(error))
            return self._refused(call, error_of_ours, str(error), died_after=actor.steps)
        except RayActorError as error:
            self._end(actor)
            return self._died(call, actor.steps, last_line(error), str(error))
        except RayTaskError as error:
            if isinstance(error.cause, PhatgooseError):
                return self._refused(call, error.cause, str(error))
            self._end(actor)  # its device may be broken
            return self._failed(call, last_line(error), str(error))
        except RayError as error:
            return self._failed(call, last_line(error), str(error))
        return [(call.key, result)]

    def _end_leases(self) -> list[tuple[int, Any]]:
        """Ask working actors for heartbeats; end those that show no progress."""
        now = time.monotonic()
        # Time in which this process did not look, because it was busy or stopped, does not count.
        away = max(0.0, now - self._stepped - _AWAY_SECONDS)
        self._stepped = now
        ended = []
        for actor in [actor for actor in self._actors if actor.reference is not None]:
            actor.progress += away
            if now - actor.progress > self._lease_seconds:
                self._end(actor)
                if actor.call is None:
                    self._failed_starts += 1
                    self._why = f"no actor could be started within {self._lease_seconds:.0f} s"
                    continue
                error = f"no progress for {self._lease_seconds:.0f} s on {actor.location}"
                ended += self._died(actor.call, actor.steps, error, "")
            elif actor.call is None:
                continue
            elif actor.heartbeat is None and now - actor.asked >= _LOOK_SECONDS:
                actor.asked, actor.heartbeat = now, actor.handle.heartbeat.remote()
        return ended

    def _died(self, call: _Call, steps: int, error: str, traceback: str) -> list[tuple[int, Any]]:
        if steps > call.steps:  # a long job may outlive many nodes, as long as it progresses
            call.deaths, call.steps = 0, steps
        call.deaths += 1
        if call.deaths >= DEATHS:
            return [
                (call.key, Failure(f"its actor died {DEATHS} times: {error}", _plain(traceback)))
            ]
        return self._again(call, f"its actor died: {error}", traceback)

    def _failed(self, call: _Call, error: str, traceback: str) -> list[tuple[int, Any]]:
        call.errors += 1
        if call.errors >= ATTEMPTS:
            return [(call.key, Failure(f"{error} (tried {ATTEMPTS} times)", _plain(traceback)))]
        return self._again(call, error, traceback)

    def _refused(
        self,
        call: _Call,
        error: PhatgooseError,
        traceback: str,
        *,
        died_after: int | None = None,
    ) -> list[tuple[int, Any]]:
        """Handle an expected error: only new arguments can avoid it."""
        revised = call.watch.revise(call.key, error)
        if revised is None and died_after is not None:
            return self._died(call, died_after, str(error), traceback)
        if revised is None:
            refused = isinstance(error, Refused)
            return [(call.key, Failure(str(error), _plain(traceback), refused))]
        call.arguments = revised
        return self._again(call, str(error), traceback)

    def _again(self, call: _Call, error: str, traceback: str) -> list[tuple[int, Any]]:
        self._waiting.appendleft(call)
        call.watch.went_back(call.key, error, _plain(traceback))
        return []


def _plain(text: str) -> str:
    """Return a remote traceback without color codes."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def last_line(error: Exception) -> str:
    """Return the last line of an error's text; in a remote traceback, it is the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
