"""Answer a chunk of requests with a routed model: the computation of an evaluation actor."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from harness.evaluation.chunks import Answer, Chunk, Request
from phatgoose.base import Base
from phatgoose.devices import memory_errors
from phatgoose.errors import OutOfMemory
from phatgoose.inference.generation import fits
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.routed_linear import RoutingLog
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.tokenization import encode_contexts, prompt_room, spaces_moved

_LOG = logging.getLogger(__name__)


def answer_chunk(base: Base, model: RoutedModel, chunk: Chunk, description: str) -> Answer:
    """Answer a chunk; pass `description` to routers that use the task's description.

    Where memory runs out, answer each half of the chunk by itself.

    Raises:
        OutOfMemory: a single request needs more memory than there is.
    """
    respond = _score if chunk.kind == "score" else _generate
    count = len(chunk.requests)
    longest = max((request.characters for request in chunk.requests), default=0)
    try:
        with memory_errors(
            f"in {count} requests of up to {longest} characters",
            "use a device with more memory, or a base in a smaller dtype",
        ):
            return respond(base, model, chunk, description)
    except OutOfMemory as error:
        if count == 1:
            raise
        _LOG.warning("task %s: %s. Its halves are tried", chunk.task, error)
    middle = count // 2
    halves = chunk.requests[:middle], chunk.requests[middle:]
    parts = [replace(chunk, requests=requests) for requests in halves]
    first, second = (answer_chunk(base, model, part, description) for part in parts)
    return _joined(first, second, middle)


def _joined(first: Answer, second: Answer, count: int) -> Answer:
    """Return the answer to both parts of a chunk, of which the first has so many requests."""
    linears = first.routing | second.routing
    parts = first, second
    return Answer(
        scores=first.scores + second.scores,
        texts=first.texts + second.texts,
        tokens=first.tokens + second.tokens,
        routing={
            linear: torch.stack([p.routing[linear] for p in parts if linear in p.routing]).sum(0)
            for linear in linears
        },
        routed={linear: sum(part.routed.get(linear, 0) for part in parts) for linear in linears},
        cut=first.cut + [count + place for place in second.cut],
    )


def _score(base: Base, model: RoutedModel, chunk: Chunk, description: str) -> Answer:
    questions = Question.encode_all(
        base, [(r.context, r.choices, _query(r, description)) for r in chunk.requests]
    )
    with model.recording(RoutingLog()) as log:
        scores = model.score(questions)
    return Answer(
        scores=scores,
        tokens=sum(part.length for question in questions for part in question.parts(base)),
        routing=_on_cpu(log.weights),
        routed=log.tokens,
        cut=[place for place, question in enumerate(questions) if question.is_cut(base)],
    )


def _generate(base: Base, model: RoutedModel, chunk: Chunk, description: str) -> Answer:
    """Continue each prompt, and score its correct answer if that is known."""
    # Requests with the same limit and stop strings are generated together.
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for place, request in enumerate(chunk.requests):
        groups.setdefault((request.max_new_tokens, request.until), []).append(place)
    count = len(chunk.requests)
    answer = Answer(scores=[[] for _ in range(count)], texts=[""] * count)
    with model.recording(RoutingLog()) as log:
        for places in groups.values():
            _generate_alike(base, model, chunk, places, description, answer)
    answer.cut.sort()
    answer.routing, answer.routed = _on_cpu(log.weights), log.tokens
    return answer


def _generate_alike(
    base: Base,
    model: RoutedModel,
    chunk: Chunk,
    places: Sequence[int],
    description: str,
    answer: Answer,
) -> None:
    """Fill in `answer` for the requests at these places; they share a limit and stop strings."""
    requests = [chunk.requests[place] for place in places]
    limit, stops = requests[0].max_new_tokens, requests[0].until
    queries = [_query(request, description) for request in requests]
    prompts = encode_contexts(base, [request.context for request in requests])
    room = prompt_room(base, limit)
    scored = [
        (place, (request.context, request.choices, query))
        for place, request, query in zip(places, requests, queries, strict=True)
        if request.choices
    ]
    encoded = Question.encode_all(base, [asked for _, asked in scored])
    questions = {place: question for (place, _), question in zip(scored, encoded, strict=True)}
    # White space at the end of a prompt belongs to a scored answer. A generation keeps it in the
    # prompt, except spaces. So the two prompts differ after a line break, for example.
    together = [question.context for question in questions.values()] == prompts and all(
        fits(base, question, limit) for question in questions.values()
    )
    if together:
        spaces = [spaces_moved(request.context) for request in requests]
        asked = list(questions.values())
        texts, first = model.answer(asked, limit, stops=stops, spaces=spaces)
        scores = [[score] for score in first]
    else:
        scores = model.score(list(questions.values())) if questions else []
        with model.recording(None):
            texts = model.generate(queries, limit, stops=stops)
    for place, text in zip(places, texts, strict=True):
        answer.texts[place] = text
    for place, score in zip(questions, scores, strict=True):
        answer.scores[place] = score
    for place, prompt in zip(places, prompts, strict=True):
        question = questions.get(place)
        if len(prompt) > room or (question is not None and question.is_cut(base)):
            answer.cut.append(place)
        answer.tokens += min(len(prompt), room) + limit
        answer.tokens += len(question.choices[0]) if question is not None else 0


def _on_cpu(routing: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, because the driver's machine may have no GPU."""
    return {linear: weights_E.cpu() for linear, weights_E in routing.items()}


def _query(request: Request, description: str) -> Query:
    """Return what routers may see of a request: never a correct answer that is its only choice."""
    return Query(request.context, request.choices if request.choices_shown else (), description)
