"""The language model that lm-eval talks to: it cuts requests into chunks and lets actors answer."""

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from torch import Tensor

from harness.evaluation.chunks import Answer, Chunk, Request, cut
from harness.tasks.generation_options import generation_options
from phatgoose.errors import PhatgooseError
from phatgoose.inference.scoring import Score

# Answers chunks in any order: yields the index of each chunk and its answer.
Ask = Callable[[Sequence[Chunk]], Iterator[tuple[int, Answer]]]


class Usage:
    """What answering a task took, and what was routed: sums over its chunks in their order."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self.routing: dict[str, Tensor] = {}
        self.routed: dict[str, int] = {}

    def add(self, answer: Answer) -> None:
        """Count one chunk."""
        self.seconds += answer.seconds
        self.tokens += answer.tokens
        for linear, weights_E in answer.routing.items():
            total_E = self.routing.setdefault(linear, torch.zeros_like(weights_E))
            total_E += weights_E
            self.routed[linear] = self.routed.get(linear, 0) + answer.routed[linear]


class ShardedLM(LM):
    """An lm-eval LM for one router; it keeps each choice's full Score and each task's Usage.

    Args:
        ask: answers chunks.
        chunk_characters: see `harness.evaluation.journal.cut`.
        targets: by task, each document's right answer as it follows the prompt.
    """

    def __init__(
        self, ask: Ask, chunk_characters: int, targets: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        super().__init__()
        self._ask = ask
        self._targets = targets or {}
        self._characters = chunk_characters
        self.scores: dict[tuple[str, int], list[Score]] = {}
        self.usage: dict[str, Usage] = {}
        self.cut: set[tuple[str, int]] = set()  # documents with a prompt that was cut

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Summed log-likelihood, end-of-sequence left out, and whether greedy decoding gives it.

        The choices of one document under one context are scored together. The full scores stay in
        `scores` by task and document.
        """
        copies, requests = requests, _distinct(requests)
        groups: dict[tuple[str, int, str], list[int]] = {}
        for place, instance in enumerate(requests):
            task, document = _origin(instance)
            groups.setdefault((task, document, instance.args[0]), []).append(place)
        questions = []
        for (task, _, context), places in groups.items():
            choices = tuple(requests[place].args[1] for place in places)
            # A single choice is the right answer, or what follows one of several prompts.
            shown = len(choices) > 1
            questions.append((task, Request(context, choices, choices_shown=shown)))
        found: list[Score | None] = [None] * len(requests)
        answers = self._answers("score", questions)
        for (group, places), (answer, i) in zip(groups.items(), answers, strict=True):
            for place, score in zip(places, answer.scores[i], strict=True):
                found[place] = score
            if i in answer.cut:
                self.cut.add(group[:2])
        results = {}
        for instance, known in zip(requests, found, strict=True):
            assert known is not None
            self.scores.setdefault(_origin(instance), []).append(known)
            results[id(instance)] = (known.loglikelihood, known.is_greedy)
        return [results[id(instance)] for instance in copies]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy continuations up to the first stop string.

        Where the document's right answer is known, it is scored as well, into `scores`.
        """
        copies, requests = requests, _distinct(requests)
        questions = []
        for instance in requests:
            context, given = instance.args
            options = generation_options(str(instance.task_name), given)
            task, document = _origin(instance)
            target = (self._targets[task][document],) if task in self._targets else ()
            request = Request(
                context, target, options.max_new_tokens, options.until, choices_shown=False
            )
            questions.append((task, request))
        texts = {}
        for instance, (answer, i) in zip(
            requests, self._answers("generate", questions), strict=True
        ):
            texts[id(instance)] = answer.texts[i]
            if answer.scores[i]:
                self.scores[_origin(instance)] = answer.scores[i]
            if i in answer.cut:
                self.cut.add(_origin(instance))
        return [texts[id(instance)] for instance in copies]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not supported: no task of the benchmark measures the perplexity of whole documents."""
        raise PhatgooseError(
            f"task {requests[0].task_name} asks for rolling log-likelihoods, which routed "
            "inference does not offer: leave it out of the suite"
        )

    def _answers(
        self, kind: Any, questions: Sequence[tuple[str, Request]]
    ) -> list[tuple[Answer, int]]:
        """For each question the answer of its chunk, and its place in that answer."""
        by_task: dict[str, list[int]] = {}
        for place, (task, _) in enumerate(questions):
            by_task.setdefault(task, []).append(place)
        chunks: list[tuple[Chunk, list[int]]] = []
        for task, places in by_task.items():
            requests = [questions[place][1] for place in places]
            for chunk, order in cut(task, kind, requests, self._characters):
                chunks.append((chunk, [places[i] for i in order]))
        answers = dict(self._ask([chunk for chunk, _ in chunks]))
        found: dict[int, tuple[Answer, int]] = {}
        for index, (chunk, places) in enumerate(chunks):
            self.usage.setdefault(chunk.task, Usage()).add(answers[index])
            for i, place in enumerate(places):
                found[place] = (answers[index], i)
        return [found[place] for place in range(len(questions))]


def list_chunks(
    instances: Sequence[Instance], characters: int, targets: Mapping[str, Sequence[str]]
) -> list[Chunk]:
    """Return the chunks that lm-eval will ask a `ShardedLM` for these requests; asks nothing.

    Args:
        instances: lm-eval's requests.
        characters, targets: as of `ShardedLM`.
    """
    found: list[Chunk] = []

    def note(chunks: Sequence[Chunk]) -> Iterator[tuple[int, Answer]]:
        found.extend(chunks)
        raise _Noted

    lm = ShardedLM(note, characters, targets)
    by_type: dict[str, list[Instance]] = {}
    for instance in instances:
        by_type.setdefault(instance.request_type, []).append(instance)
    for kind, asked in by_type.items():
        with contextlib.suppress(_Noted):
            getattr(lm, kind)(asked)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what lm-eval draws, a bar per task, and prints."""
    nowhere = io.StringIO()
    with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


class _Noted(Exception):
    """There is no answer: only what is asked was to be known."""


def _distinct(requests: Sequence[Instance]) -> list[Instance]:
    """Return each request once, where lm-eval asks it `repeats` times: greedy answers are alike."""
    return list({id(instance): instance for instance in requests}.values())


def _origin(instance: Instance) -> tuple[str, int]:
    """The task and the document that a request belongs to."""
    assert instance.task_name is not None
    assert instance.doc_id is not None
    return instance.task_name, instance.doc_id
