"""What actors need of a suite, tokenized and stored once for all routers."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

from harness.evaluation.encoding import cut_encoded, encode, encoded_shard
from harness.evaluation.requests import SuiteRequests
from harness.evaluation.shards import Limits, Request, Shard
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

    def task(self, name: str) -> Any:
        """Return what stands for a task's `TaskRequests` in calls."""
        if name not in self._stored:
            self._stored[name] = self.put(self.requests.tasks[name])
        return self._stored[name]

    def _shards(self, name: str) -> list[Shard]:
        found = []
        for kind, requests in self._requests(name).items():
            encoded = encode(self._base, requests, self._description(name))
            found += cut_encoded(name, kind, encoded, self._limits)
        return found

    def _requests(self, name: str) -> dict[Any, list[Request]]:
        asked = self.requests.tasks[name].asked(name)
        return {kind: [one.request for one in found] for kind, found in asked.items()}

    def _description(self, name: str) -> str:
        return self.requests.descriptions[name]
