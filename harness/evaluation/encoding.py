"""Tokenize requests once, for all routers, and cut them into shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from harness.evaluation.shards import Kind, Limits, Request, Shard, cut
from phatgoose.base import Base
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.tokenization import encode_contexts


@dataclass(frozen=True)
class EncodedRequest:
    """A request and its token ids.

    Attributes:
        request: the request.
        query: what routers may see of it.
        prompt: the ids of the prompt to continue; empty for kind `score`.
        question: the ids of what is scored; None if nothing is.
    """

    request: Request
    query: Query
    prompt: list[int]
    question: Question | None

    @property
    def tokens(self) -> int:
        """The number of tokens that the model reads, and writes at most."""
        scored = self.question
        if not self.request.max_new_tokens:
            return scored.length if scored else 0
        answer = sum(map(len, scored.choices)) if scored else 0
        return len(self.prompt) + self.request.max_new_tokens + answer


@dataclass(frozen=True)
class EncodedShard:
    """A shard as an actor gets it: its requests, chunk by chunk."""

    task: str
    kind: Kind
    chunks: list[list[EncodedRequest]]


def encode(base: Base, requests: Sequence[Request], description: str) -> list[EncodedRequest]:
    """Tokenize requests of one task; only the base's tokenizer and configuration are used.

    Args:
        base: the base.
        requests: the requests.
        description: the task's description, for routers that read it.
    """
    queries = [query_of(request, description) for request in requests]
    scored = [place for place, request in enumerate(requests) if request.choices]
    asked = [(requests[i].context, requests[i].choices, queries[i]) for i in scored]
    questions = dict(zip(scored, Question.encode_all(base, asked), strict=True))
    written = [place for place, request in enumerate(requests) if request.max_new_tokens]
    contexts = encode_contexts(base, [requests[place].context for place in written])
    prompts = dict(zip(written, contexts, strict=True))
    return [
        EncodedRequest(request, query, prompts.get(place, []), questions.get(place))
        for place, (request, query) in enumerate(zip(requests, queries, strict=True))
    ]


def query_of(request: Request, description: str) -> Query:
    """Return what routers may see of a request: never a correct answer that is its only choice."""
    return Query(request.context, request.choices if request.choices_shown else (), description)


def cut_encoded(
    task: str, kind: Kind, encoded: Sequence[EncodedRequest], limits: Limits
) -> list[Shard]:
    """Cut a task's requests of one kind into shards, see `harness.evaluation.shards.cut`."""
    requests = [one.request for one in encoded]
    return cut(task, kind, requests, [one.tokens for one in encoded], limits)


def encoded_shard(shard: Shard, encoded: Mapping[int, EncodedRequest]) -> EncodedShard:
    """Return what an actor needs of a shard, given its requests by place."""
    chunks = [[encoded[place] for place in chunk] for chunk in shard.chunks]
    return EncodedShard(shard.task, shard.kind, chunks)
