"""Chunks of evaluation requests, their answers, and the journal that no answer is lost from."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from phatgoose.scoring import Score


@dataclass(frozen=True)
class Request:
    """One document's question.

    Attributes:
        context: the prompt.
        choices: what to score after it; empty to generate.
        max_new_tokens: how much to generate.
        until: strings that end what is generated.
        choices_shown: whether the choices are part of the question; False where the only one is
            the right answer, which no router may see.
    """

    context: str
    choices: tuple[str, ...] = ()
    max_new_tokens: int = 0
    until: tuple[str, ...] = ()
    choices_shown: bool = True

    @property
    def characters(self) -> int:
        """Length of its text."""
        return len(self.context) + sum(map(len, self.choices))


@dataclass(frozen=True)
class Chunk:
    """Requests of one task and kind that an actor answers at once."""

    task: str
    kind: Literal["score", "generate"]
    requests: tuple[Request, ...]

    def key(self, identity: Any) -> str:
        """What identifies its answer, given what determines it besides the requests."""
        content = json.dumps([identity, asdict(self)], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:32]


@dataclass
class Answer:
    """What an actor says of a chunk.

    Attributes:
        scores: per request, a Score per choice; kind `generate`: of the right answer, or none.
        texts: per request, what was generated (kind `generate`).
        tokens: tokens run through the model.
        seconds: time it took.
        routing: per linear, the summed routing weight of each expert, float64 [E].
        routed: per linear, how many tokens were routed.
        cut: places of the requests whose prompt was cut to the base's positions.
    """

    scores: list[list[Score]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    routing: dict[str, Tensor] = field(default_factory=dict)
    routed: dict[str, int] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)


class Journal:
    """Answered chunks of a run, one file each, written whole or not at all."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def keys(self) -> set[str]:
        """The keys of all chunks that were answered before."""
        files = self._folder.names("journal/")
        return {PurePosixPath(name).stem for name in files if name.endswith(".safetensors")}

    def read(self, key: str) -> Answer:
        """The answer to a chunk; PhatgooseError, naming the file, if it is damaged."""
        name = _file(key)
        data = self._folder.read(name)
        try:
            return _from_bytes(data)
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise PhatgooseError(
                f"{self._folder}/{name} is damaged: delete it, and the chunk is asked again"
            ) from error

    def write(self, key: str, answer: Answer) -> None:
        """Keep the answer to a chunk."""
        self._folder.write(_file(key), _to_bytes(answer))


def cut(
    task: str, kind: Literal["score", "generate"], requests: Sequence[Request], characters: int
) -> list[tuple[Chunk, list[int]]]:
    """Cut requests into chunks of about so many characters, sorted by length.

    The cut depends on the requests alone, not on how many actors there are.

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


def _file(key: str) -> str:
    return f"journal/{key}.safetensors"


def _to_bytes(answer: Answer) -> bytes:
    linears = list(answer.routing)
    content = {
        "scores": [[asdict(score) for score in scores] for scores in answer.scores],
        "texts": answer.texts,
        "tokens": answer.tokens,
        "seconds": answer.seconds,
        "linears": linears,
        "routed": [answer.routed[linear] for linear in linears],
        "cut": answer.cut,
    }
    weights = [answer.routing[linear] for linear in linears]
    weights_LE = torch.stack(weights) if weights else torch.zeros(0, 0, dtype=torch.float64)
    return save({"routing": weights_LE.contiguous()}, metadata={"answer": json.dumps(content)})


def _from_bytes(data: bytes) -> Answer:
    # The library reads metadata from files only; the header's layout is its published format.
    size = int.from_bytes(data[:8], "little")
    content = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["answer"])
    linears = content["linears"]
    return Answer(
        scores=[[Score(**score) for score in scores] for scores in content["scores"]],
        texts=content["texts"],
        tokens=content["tokens"],
        seconds=content["seconds"],
        routing=dict(zip(linears, load(data)["routing"], strict=True)),
        routed=dict(zip(linears, content["routed"], strict=True)),
        cut=content["cut"],
    )
