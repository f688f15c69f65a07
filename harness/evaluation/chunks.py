"""Chunks of evaluation requests, and an actor's answer to one."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from phatgoose.inference.scoring import Score


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
class Chunk:
    """Requests of one task and kind that an actor answers in one call."""

    task: str
    kind: Literal["score", "generate"]
    requests: tuple[Request, ...]

    def key(self, identity: Any) -> str:
        """Return the key of its answer, given what determines it besides the requests."""
        content = json.dumps([identity, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


@dataclass
class Answer:
    """An actor's answer to a chunk.

    Attributes:
        scores: per request, a Score per choice. For kind `generate`, the Score of the correct
            answer, or none.
        texts: per request, the generated text (kind `generate`).
        tokens: the number of tokens run through the model.
        seconds: the time taken.
        routing: per linear, the summed routing weight of each expert, float64 [E].
        routed: per linear, the number of routed tokens.
        cut: places of the requests whose prompt was cut to the base's positions.
    """

    scores: list[list[Score]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    routing: dict[str, Tensor] = field(default_factory=dict)
    routed: dict[str, int] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)


def cut(
    task: str, kind: Literal["score", "generate"], requests: Sequence[Request], characters: int
) -> list[tuple[Chunk, list[int]]]:
    """Cut requests into chunks of about `characters` characters, sorted by length.

    The cut depends on the requests alone, not on the number of actors.

    Returns:
        Each chunk with the places of its requests in `requests`.
    """
    order = sorted(range(len(requests)), key=lambda i: (requests[i].characters, i))
    groups: list[list[int]] = []
    room = 0
    for index in order:
        room -= requests[index].characters
        if room < 0 or not groups:
            groups.append([])
            room = characters - requests[index].characters
        groups[-1].append(index)
    return [(Chunk(task, kind, tuple(requests[i] for i in group)), group) for group in groups]
