"""lm-eval's view of a router: a language model whose answers are known already."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from harness.evaluation.answers import Answer
from harness.evaluation.shards import Kind, Request, Shard
from harness.tasks.generation_options import generation_options
from phatgoose.errors import PhatgooseError
from phatgoose.inference.scoring import Score

# The kind of request that each of lm-eval's methods makes.
KINDS: dict[str, Kind] = {"loglikelihood": "score", "generate_until": "generate"}


@dataclass(frozen=True)
class Asked:
    """A request, and which of lm-eval's instances it answers.

    Attributes:
        request: the request.
        document: the place of the document.
        places: the places of the instances in lm-eval's list: one for each choice.
    """

    request: Request
    document: int
    places: list[int]


def requests_of(
    kind: Kind, instances: Sequence[Instance], targets: Sequence[str] = ()
) -> list[Asked]:
    """Return the requests that answer a task's instances of one kind.

    The choices of a document after one context are one request. A document's correct answer, if
    known, is scored together with the generation.

    Args:
        kind: the kind of the instances.
        instances: lm-eval's instances, each once.
        targets: each document's correct answer as it follows the prompt.

    Raises:
        PhatgooseError: an option of the generation is not supported.
    """
    if kind == "generate":
        return [_generation(i, place, targets) for place, i in enumerate(instances)]
    groups: dict[tuple[int, str], list[int]] = {}
    for place, instance in enumerate(instances):
        groups.setdefault((_document(instance), instance.args[0]), []).append(place)
    found = []
    for (document, context), places in groups.items():
        choices = tuple(instances[place].args[1] for place in places)
        # A single choice is the correct answer, or the continuation of one of several prompts.
        request = Request(context, choices, choices_shown=len(choices) > 1)
        found.append(Asked(request, document, places))
    return found


def by_kind(task: str, instances: Sequence[Instance]) -> dict[Kind, list[Instance]]:
    """Return a task's instances by kind.

    Raises:
        PhatgooseError: the task asks for something else than choices and texts.
    """
    found: dict[Kind, list[Instance]] = {}
    for instance in instances:
        if instance.request_type not in KINDS:
            raise _unsupported(task)
        found.setdefault(KINDS[instance.request_type], []).append(instance)
    return found


def _generation(instance: Instance, place: int, targets: Sequence[str]) -> Asked:
    context, given = instance.args
    options = generation_options(str(instance.task_name), given)
    document = _document(instance)
    target = (targets[document],) if targets else ()
    request = Request(context, target, options.max_new_tokens, options.until, choices_shown=False)
    return Asked(request, document, [place])


class RecordedLM(LM):
    """An lm-eval LM that gives the recorded answers of a router to one task.

    Args:
        shards: how the task's requests were asked.
        answer: the answer to all of them, in this order.
        targets: as for `requests_of`.

    Attributes:
        scores: by document, the Score of each choice, or of its correct answer.
        cut: documents with a prompt that was cut.
    """

    def __init__(
        self, shards: Sequence[Shard], answer: Answer, targets: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self._order = [(shard.kind, place) for shard in shards for place in shard.places]
        self._answer, self._targets = answer, targets
        self.scores: dict[int, list[Score]] = {}
        self.cut: set[int] = set()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return the summed log-likelihood of each choice, and whether greedy decoding gives it.

        The end-of-sequence token is left out.
        """
        found: dict[int, Score] = {}
        distinct = _distinct(requests)
        for asked, scores, _ in self._recorded("score", distinct):
            found |= {id(distinct[i]): s for i, s in zip(asked.places, scores, strict=True)}
        for instance in distinct:
            self.scores.setdefault(_document(instance), []).append(found[id(instance)])
        known = [found[id(instance)] for instance in requests]
        return [(score.loglikelihood, score.is_greedy) for score in known]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return greedy continuations up to the first stop string."""
        found = {}
        distinct = _distinct(requests)
        for asked, scores, text in self._recorded("generate", distinct):
            found[id(distinct[asked.places[0]])] = text
            if scores:
                self.scores[asked.document] = scores
        return [found[id(instance)] for instance in requests]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Raise PhatgooseError: no task of the benchmark measures the perplexity of documents."""
        raise _unsupported(str(requests[0].task_name))

    def _recorded(
        self, kind: Kind, instances: Sequence[Instance]
    ) -> Iterator[tuple[Asked, list[Score], str]]:
        """Yield each request with its scores and its text."""
        asked = requests_of(kind, instances, self._targets)
        answer, cut = self._answer, {*self._answer.cut}
        for i, (its_kind, place) in enumerate(self._order):
            if its_kind == kind:
                if i in cut:
                    self.cut.add(asked[place].document)
                yield asked[place], answer.scores[i], answer.texts[i]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress lm-eval's progress bars and prints."""
    nowhere = io.StringIO()
    with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


def _unsupported(task: str) -> PhatgooseError:
    return PhatgooseError(
        f"task {task}: it asks for rolling log-likelihoods, and routed inference does not compute "
        "them. Leave it out of the suite."
    )


def _distinct(requests: Sequence[Instance]) -> list[Instance]:
    """Return each request once; lm-eval may repeat it, but greedy answers do not vary."""
    return list({id(instance): instance for instance in requests}.values())


def _document(instance: Instance) -> int:
    document: Any = instance.doc_id
    assert isinstance(document, int)
    return document
