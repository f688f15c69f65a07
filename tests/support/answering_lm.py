"""A language model for lm-eval whose requests an actor in this process answers."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from lm_eval.api.instance import Instance

from harness.evaluation.answering import answer_shard
from harness.evaluation.answers import Answer, joined
from harness.evaluation.encoding import EncodedShard, cut_encoded, encode, encoded_shard
from harness.evaluation.lm import KINDS, RecordedLM, requests_of
from harness.evaluation.shards import Limits, Shard
from phatgoose.base import Base
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.scoring import Score
from phatgoose.pool import Pool
from phatgoose.routers import Router

Ask = Callable[[list[EncodedShard]], Iterable[tuple[int, Answer]]]


def ask(
    base: Base,
    pool: Pool,
    router: Router,
    order: Callable[[list[int]], list[int]] = list,
) -> Ask:
    """Return a function that answers shards in some order; the base has no experts afterwards."""

    def answers(shards: list[EncodedShard]) -> Iterable[tuple[int, Answer]]:
        model = RoutedModel(base, pool, router)
        try:
            places = order(list(range(len(shards))))
            return [(place, answer_shard(base, model, shards[place])) for place in places]
        finally:
            model.detach()

    return answers


class AnsweringLM:
    """Answers lm-eval's requests as a run does: cut into shards, answered, and put together.

    Args:
        base: the base.
        ask: answers shards.
        tokens: the size of chunks and of shards.
        targets: by task, each document's correct answer.

    Attributes:
        scores, cut: those of `RecordedLM`, by task and document.
        usage: the answers to all shards of a task.
        shards: all shards that were asked.
    """

    def __init__(
        self,
        base: Base,
        ask: Ask,
        tokens: int,
        targets: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._base, self._ask, self._limits = base, ask, Limits(tokens, tokens)
        self._targets = targets or {}
        self.scores: dict[tuple[str, int], list[Score]] = {}
        self.cut: set[tuple[str, int]] = set()
        self.usage: dict[str, Answer] = {}
        self.shards: list[EncodedShard] = []

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        found: dict[int, tuple[float, bool]] = {}
        for lm, own in self._recorded(requests):
            found |= dict(zip(map(id, own), lm.loglikelihood(own), strict=True))
            self._note(lm, own)
        return [found[id(request)] for request in requests]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        found: dict[int, str] = {}
        for lm, own in self._recorded(requests):
            found |= dict(zip(map(id, own), lm.generate_until(own), strict=True))
            self._note(lm, own)
        return [found[id(request)] for request in requests]

    def _recorded(
        self, requests: Sequence[Instance]
    ) -> Iterable[tuple[RecordedLM, list[Instance]]]:
        tasks: dict[str, list[Instance]] = {}
        for request in requests:
            tasks.setdefault(str(request.task_name), []).append(request)
        for task, own in tasks.items():
            kind, targets = KINDS[own[0].request_type], self._targets.get(task, ())
            asked = [one.request for one in requests_of(kind, own, targets)]
            encoded = encode(self._base, asked, "")
            shards = cut_encoded(task, kind, encoded, self._limits)
            answer = self._answer(
                shards, [encoded_shard(shard, dict(enumerate(encoded))) for shard in shards]
            )
            self.usage[task] = answer
            yield RecordedLM(shards, answer, targets), own

    def _answer(self, shards: list[Shard], encoded: list[EncodedShard]) -> Answer:
        self.shards += encoded
        answers = dict(self._ask(encoded))
        return joined(answers[place] for place in range(len(shards)))

    def _note(self, lm: RecordedLM, own: list[Instance]) -> None:
        task = str(own[0].task_name)
        self.scores |= {(task, document): scores for document, scores in lm.scores.items()}
        self.cut |= {(task, document) for document in lm.cut}
