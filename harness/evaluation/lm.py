"""The language model that lm-eval calls. It cuts requests into chunks, and actors answer them."""

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

# A function that answers chunks in any order: it yields each chunk's index and its answer.
Ask = Callable[[Sequence[Chunk]], Iterator[tuple[int, Answer]]]


class Usage:
    """The cost and the routing of a task's answers, summed over its chunks in their order."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tokens = 0
        self.routing: dict[str, Tensor] = {}
        self.routed: dict[str, int] = {}

    def add(self, answer: Answer) -> None:
        """Add the answer to one chunk."""
        self.seconds += answer.seconds
        self.tokens += answer.tokens
        for linear, weights_E in answer.routing.items():
            total_E = self.routing.setdefault(linear, torch.zeros_like(weights_E))
            total_E += weights_E
            self.routed[linear] = self.routed.get(linear, 0) + answer.routed[linear]


class ShardedLM(LM):
    """An lm-eval LM for one router. It stores each choice's full Score and each task's Usage.

    Args:
        ask: a function that answers chunks.
        chunk_characters: see `harness.evaluation.chunks.cut`.
        targets: by task, each document's correct answer as it follows the prompt.
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
        """Return the summed log-likelihood of each choice, and whether greedy decoding gives it.

        The end-of-sequence token is left out. The choices of one document after one context are
        scored together. The full scores are stored in `scores`, by task and document.
        """
        copies, requests = requests, _distinct(requests)
        groups: dict[tuple[str, int, str], list[int]] = {}
        for place, instance in enumerate(requests):
            task, document = _origin(instance)
            groups.setdefault((task, document, instance.args[0]), []).append(place)
        questions = []
        for (task, _, context), places in groups.items():
            choices = tuple(requests[place].args[1] for place in places)
            # A single choice is the correct answer, or the continuation of one of several prompts.
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
        """Return greedy continuations up to the first stop string.

        A document's correct answer, if known, is scored as well, and its score stored in `scores`.
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
        """Raise PhatgooseError: no task of the benchmark measures the perplexity of documents."""
        raise PhatgooseError(
            f"task {requests[0].task_name}: it asks for rolling log-likelihoods, and routed "
            "inference does not compute them. Leave it out of the suite."
        )

    def _answers(
        self, kind: Any, questions: Sequence[tuple[str, Request]]
    ) -> list[tuple[Answer, int]]:
        """Return, for each question, the answer to its chunk and its place in that answer."""
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
    """Return the chunks that a `ShardedLM` would ask for these requests, without asking them.

    Args:
        instances: lm-eval's requests.
        characters, targets: as for `ShardedLM`.
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
    """Suppress lm-eval's progress bars and prints."""
    nowhere = io.StringIO()
    with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


class _Noted(Exception):
    """Raised to end a request once its chunks are known."""


def _distinct(requests: Sequence[Instance]) -> list[Instance]:
    """Return each request once; lm-eval may repeat it, but greedy answers do not vary."""
    return list({id(instance): instance for instance in requests}.values())


def _origin(instance: Instance) -> tuple[str, int]:
    """Return the task and the document of a request."""
    assert instance.task_name is not None
    assert instance.doc_id is not None
    return instance.task_name, instance.doc_id
