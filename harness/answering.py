"""Answer a chunk of requests with a routed model: what an evaluation actor computes."""

from harness.chunks import Answer, Chunk, Request
from phatgoose.base import Base
from phatgoose.encoding import encode_context
from phatgoose.model import RoutedModel
from phatgoose.query import Query
from phatgoose.routed_linear import RoutingLog
from phatgoose.scoring import Question


def answer_chunk(base: Base, model: RoutedModel, chunk: Chunk, description: str) -> Answer:
    """Answer a chunk; routers that read the task's description are given `description`."""
    respond = _score if chunk.kind == "score" else _generate
    return respond(base, model, chunk, description)


def _score(base: Base, model: RoutedModel, chunk: Chunk, description: str) -> Answer:
    questions = [
        Question.encode(base, r.context, r.choices, query=_query(r, description))
        for r in chunk.requests
    ]
    with model.recording(RoutingLog()) as log:
        scores = model.score(questions)
    return Answer(
        scores=scores,
        tokens=sum(question.length for question in questions),
        routing=log.weights,
        routed=log.tokens,
    )


def _generate(base: Base, model: RoutedModel, chunk: Chunk, description: str) -> Answer:
    requests = chunk.requests
    limit = max(request.max_new_tokens for request in requests)
    stops = sorted({stop for request in requests for stop in request.until})
    queries = [_query(request, description) for request in requests]
    contexts = [encode_context(base, request.context) for request in requests]
    questions = [
        Question.encode(base, request.context, request.choices, query=query)
        for request, query in zip(requests, queries, strict=True)
        if request.choices
    ]
    # With white space at its end, a prompt is one before what is written and another before
    # the answer, to which that space belongs.
    together = [question.context for question in questions] == contexts
    with model.recording(RoutingLog()) as log:
        if together and getattr(base.model.config, "sliding_window", None) is None:
            written, first = model.answer(questions, limit, stops=stops)
            scores = [[score] for score in first]
        else:
            scores = model.score(questions) if questions else []
            with model.recording(None):
                written = model.generate(queries, limit, stops=stops)
    read = sum(map(len, contexts)) + sum(len(q.choices[0]) for q in questions)
    return Answer(
        scores=scores,
        texts=[_cut_text(r, text) for r, text in zip(requests, written, strict=True)],
        tokens=read + sum(request.max_new_tokens for request in requests),
        routing=log.weights,
        routed=log.tokens,
    )


def _query(request: Request, description: str) -> Query:
    """What routers may know of a request: not the right answer that is scored, if that is all."""
    return Query(request.context, request.choices if request.choices_shown else (), description)


def _cut_text(request: Request, text: str) -> str:
    """What was generated, up to the first stop string, without the space moved from the prompt."""
    if request.context.endswith(" "):
        text = text.removeprefix(" ")
    for stop in request.until:
        text = text.split(stop)[0]
    return text
