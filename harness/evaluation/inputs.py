"""What actors need of a suite, tokenized and stored once for all routers."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from harness.evaluation.encoding import cut_encoded, encode, encoded_shard
from harness.evaluation.requests import SuiteRequests
from harness.evaluation.shards import Kind, Limits, Request, Shard
from phatgoose.base import Base


class SuiteInputs:
    """The inputs of a suite's evaluation.

    Args:
        requests: the suite's requests.
        base: the base; its weights are not needed.
        limits: the sizes of chunks and shards.

    Attributes:
        put: stores an object for all actors, and returns what stands for it in calls, such as
            `ray.put`. By default, objects stand for themselves.
    """

    def __init__(self, requests: SuiteRequests, base: Base, limits: Limits) -> None:
        self.requests, self.suite = requests, requests.suite
        self._base, self._limits = base, limits
        self.put: Callable[[Any], Any] = lambda value: value
        self._stored: dict[str, Any] = {}
        self._last: tuple[str, dict[Kind, list[Request]]] | None = None

    def cut(self) -> None:
        """Build, tokenize and cut all requests; raise PhatgooseError if a task's cannot be."""
        self.shards  # noqa: B018  # computed once, on the first read

    @cached_property
    def shards(self) -> dict[str, list[Shard]]:
        """Return the shards of each task, by the task's name."""
        return {name: self._shards(name) for name in self.requests.tasks}

    def shard(self, shard: Shard) -> Any:
        """Return what stands for an `EncodedShard` in calls."""
        if shard.content not in self._stored:
            asked = self._requests(shard.task)[shard.kind]
            wanted = shard.places
            encoded = encode(self._base, [asked[i] for i in wanted], self._description(shard.task))
            by_place = dict(zip(wanted, encoded, strict=True))
            self._stored[shard.content] = self.put(encoded_shard(shard, by_place))
        return self._stored[shard.content]

    def _shards(self, name: str) -> list[Shard]:
        found = []
        for kind, requests in self._requests(name).items():
            encoded = encode(self._base, requests, self._description(name))
            found += cut_encoded(name, kind, encoded, self._limits)
        return found

    def _requests(self, name: str) -> dict[Kind, list[Request]]:
        """Return a task's requests by kind; those of the last task are kept."""
        if self._last is None or self._last[0] != name:
            asked = self.requests.tasks[name].asked(name)
            found = {kind: [one.request for one in of_kind] for kind, of_kind in asked.items()}
            self._last = name, found
        return self._last[1]

    def _description(self, name: str) -> str:
        return self.requests.descriptions[name]
