"""Answer a shard of requests with a routed model: the computation of an evaluation actor."""

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from harness.evaluation.answers import Answer, joined
from harness.evaluation.encoding import EncodedRequest, EncodedShard
from phatgoose.base import Base
from phatgoose.devices import memory_errors
from phatgoose.errors import OutOfMemory, PhatgooseError, reason_of
from phatgoose.inference.generation import fits
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.routed_linear import RoutingLog
from phatgoose.tokenization import prompt_room, spaces_moved

_LOG = logging.getLogger(__name__)
# So many requests that fail, and none that does not, are no accident of one document.
_HOPELESS = 8


def answer_shard(
    base: Base,
    model: RoutedModel,
    shard: EncodedShard,
    beat: Callable[[], None] = lambda: None,
) -> Answer:
    """Answer a shard, chunk by chunk.

    A chunk for which memory runs out, or that fails for another reason, is answered in halves. A
    request that fails alone is noted in the answer.

    Args:
        base: the base.
        model: the base with its experts.
        shard: the requests.
        beat: called after each chunk.

    Raises:
        PhatgooseError: the router cannot answer, or no request of the shard can be answered.
        Exception: of another type, in the same case.
    """
    parts = []
    errors: list[Exception] = []
    answered = 0
    for chunk in shard.chunks:
        part = _answered(base, model, shard, chunk, errors)
        answered += len(chunk) - len(part.failed)
        if not answered and len(errors) >= _HOPELESS:
            raise errors[0]
        parts.append(part)
        beat()
    if errors and not answered:
        raise errors[0]
    return joined(parts)


def _answered(
    base: Base,
    model: RoutedModel,
    shard: EncodedShard,
    requests: Sequence[EncodedRequest],
    errors: list[Exception],
) -> Answer:
    """Answer a chunk at once, or in halves; add the error of each request that fails alone."""
    respond = _score if shard.kind == "score" else _generate
    count, longest = len(requests), max(one.tokens for one in requests)
    try:
        with memory_errors(
            f"in {count} requests of up to {longest} tokens",
            "use a device with more memory, or a base in a smaller dtype",
        ):
            return respond(base, model, requests)
    except Exception as error:
        if isinstance(error, PhatgooseError) and not isinstance(error, OutOfMemory):
            raise
        if "CUDA error" in str(error):  # no document's fault: the device answers nothing more
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the failed pass
        _LOG.warning("task %s: %s", shard.task, reason_of(error))
        if count == 1:
            _LOG.exception("task %s: a request cannot be answered", shard.task)
            errors.append(error)
            return Answer(scores=[[]], texts=[""], failed={0: reason_of(error)})
    middle = count // 2
    halves = requests[:middle], requests[middle:]
    return joined(_answered(base, model, shard, half, errors) for half in halves)


def split_chunks(shard: EncodedShard, times: int) -> EncodedShard:
    """Return a shard with each chunk cut into halves, so often."""
    chunks = shard.chunks
    for _ in range(times):
        chunks = [half for chunk in chunks for half in _halves(chunk)]
    return EncodedShard(shard.task, shard.kind, chunks)


def _halves(chunk: list[EncodedRequest]) -> Iterator[list[EncodedRequest]]:
    middle = len(chunk) // 2
    if middle:
        yield chunk[:middle]
    yield chunk[middle:]


def _score(base: Base, model: RoutedModel, requests: Sequence[EncodedRequest]) -> Answer:
    questions = [one.question for one in requests if one.question is not None]
    with model.recording(RoutingLog()) as log:
        scores = model.score(questions)
    return Answer(
        scores=scores,
        texts=[""] * len(requests),
        tokens=sum(part.length for question in questions for part in question.parts(base)),
        routing=_on_cpu(log.weights),
        routed=log.tokens,
        cut=[place for place, question in enumerate(questions) if question.is_cut(base)],
    )


def _generate(base: Base, model: RoutedModel, requests: Sequence[EncodedRequest]) -> Answer:
    """Continue each prompt, and score its correct answer if that is known."""
    # Requests with the same limit and stop strings are generated together.
    groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
    for place, one in enumerate(requests):
        groups.setdefault((one.request.max_new_tokens, one.request.until), []).append(place)
    count = len(requests)
    answer = Answer(scores=[[] for _ in range(count)], texts=[""] * count)
    with model.recording(RoutingLog()) as log:
        for places in groups.values():
            _generate_alike(base, model, {place: requests[place] for place in places}, answer)
    answer.cut.sort()
    answer.routing, answer.routed = _on_cpu(log.weights), log.tokens
    return answer


def _generate_alike(
    base: Base, model: RoutedModel, asked: Mapping[int, EncodedRequest], answer: Answer
) -> None:
    """Fill in `answer` for requests, by place, that share a limit and stop strings."""
    first = next(iter(asked.values())).request
    limit, stops = first.max_new_tokens, first.until
    room = prompt_room(base, limit)
    questions = {place: one.question for place, one in asked.items() if one.question is not None}
    # White space at the end of a prompt belongs to a scored answer. A generation keeps it in the
    # prompt, except spaces. So the two prompts differ after a line break, for example.
    together = len(questions) == len(asked) and all(
        question.context == asked[place].prompt and fits(base, question, limit)
        for place, question in questions.items()
    )
    if together:
        spaces = [spaces_moved(one.request.context) for one in asked.values()]
        texts, found = model.answer(list(questions.values()), limit, stops=stops, spaces=spaces)
        scores = [[score] for score in found]
    else:
        scores = model.score(list(questions.values())) if questions else []
        with model.recording(None):
            queries = [one.query for one in asked.values()]
            texts = model.generate(queries, limit, stops=stops)
    for place, text in zip(asked, texts, strict=True):
        answer.texts[place] = text
    for place, score in zip(questions, scores, strict=True):
        answer.scores[place] = score
    for place, one in asked.items():
        question = questions.get(place)
        if len(one.prompt) > room or (question is not None and question.is_cut(base)):
            answer.cut.append(place)
        answer.tokens += min(len(one.prompt), room) + limit
        answer.tokens += len(question.choices[0]) if question is not None else 0


def _on_cpu(routing: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU, because other machines may have no GPU."""
    return {linear: weights_E.cpu() for linear, weights_E in routing.items()}
