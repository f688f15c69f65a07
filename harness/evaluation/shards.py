"""Shards of evaluation requests: the unit of a call, a retry, a file and a sum.

A shard holds requests of one task and kind. An actor reads it chunk by chunk, each in one batch.
What is in a chunk and a shard depends on the requests and the limits alone, so results do not
depend on the number of actors.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Kind = Literal["score", "generate"]


@dataclass(frozen=True)
class Request:
    """One document's question.

    Attributes:
        context: the prompt.
        choices: the texts to score after it; empty to generate.
        max_new_tokens: the maximum number of tokens to generate.
        until: strings that end the generation.
        choices_shown: whether the choices are part of the question. False if the only choice is
            the correct answer, because no router may see it.
    """

    context: str
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 0
    until: tuple[str, ...] = ()
    choices_shown: bool = True

    @property
    def characters(self) -> int:
        """The length of its text."""
        return len(self.context) + sum(map(len, self.choices))


@dataclass(frozen=True)
class Limits:
    """How many tokens a chunk and a shard have at most. A longer request is alone in a chunk."""

    chunk_tokens: int
    shard_tokens: int


@dataclass(frozen=True)
class Shard:
    """Which of a task's requests belong to a shard.

    Attributes:
        task: the task's name.
        kind: whether choices are scored or texts generated.
        chunks: per chunk, the places of its requests among the task's requests of this kind.
        tokens: how many tokens they have.
        content: a hash of the requests and of the borders of the chunks.
    """

    task: str
    kind: Kind
    chunks: tuple[tuple[int, ...], ...]
    tokens: int
    content: str

    @property
    def places(self) -> list[int]:
        """The places of its requests, in their order."""
        return [place for chunk in self.chunks for place in chunk]

    @property
    def requests(self) -> int:
        """The number of requests."""
        return sum(map(len, self.chunks))

    def key(self, identity: str) -> str:
        """Return the key of its answer, given what determines it besides the requests."""
        return hashlib.sha256(f"{self.content} {identity}".encode()).hexdigest()[:32]


def cut(
    task: str, kind: Kind, requests: Sequence[Request], tokens: Sequence[int], limits: Limits
) -> list[Shard]:
    """Cut a task's requests of one kind into shards, the shortest requests first.

    Args:
        task: the task's name.
        kind: the kind of the requests.
        requests: the requests.
        tokens: the number of tokens of each.
        limits: the sizes of chunks and shards.
    """
    order = sorted(range(len(requests)), key=lambda place: (tokens[place], place))
    chunks = _filled(order, tokens, limits.chunk_tokens)
    sizes = [sum(tokens[place] for place in chunk) for chunk in chunks]
    shards = []
    for group in _filled(range(len(chunks)), sizes, limits.shard_tokens):
        own = tuple(tuple(chunks[place]) for place in group)
        content = [[asdict(requests[place]) for place in chunk] for chunk in own]
        text = json.dumps([task, kind, content], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()
        shards.append(Shard(task, kind, own, sum(sizes[place] for place in group), digest))
    return shards


def _filled(places: Sequence[int], sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Return the places in groups of at most `limit`; one that is larger is alone."""
    groups: list[list[int]] = []
    room = 0
    for place in places:
        room -= sizes[place]
        if room < 0 or not groups:
            groups.append([])
            room = limit - sizes[place]
        groups[-1].append(place)
    return groups
