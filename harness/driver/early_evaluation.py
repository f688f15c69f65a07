"""Evaluate the base and each single expert during training, before the pool is complete."""

from collections.abc import Mapping, Sequence

from harness.evaluation.stage import Evaluation
from harness.scheduling.workers import Workers
from phatgoose.errors import PhatgooseError
from phatgoose.routers import Router
from phatgoose.routers.no_expert import NoExpert
from phatgoose.routers.single import Single

_AHEAD = 64  # shards that wait for an actor


class EarlyEvaluation:
    """The evaluation of the base and of finished experts, while other experts are trained.

    The answers are stored where the stage `evaluate` finds them. Training has priority: on
    nodes that both may use, evaluation actors run only while training needs no more actors.

    Args:
        evaluations: one evaluation per suite, over the growing pool in `experts`.
        experts: content hash by name, of the finished experts. It is read at every step.
        routers: all routers of the run.
        trainers, evaluators: the actors of the two stages.
        shared: whether both may use the same nodes.
    """

    def __init__(
        self,
        evaluations: Sequence[Evaluation],
        experts: Mapping[str, str],
        routers: Mapping[str, Router],
        trainers: Workers,
        evaluators: Workers,
        shared: bool,
    ) -> None:
        self._evaluations, self._experts = evaluations, experts
        self._routers = {n: r for n, r in routers.items() if isinstance(r, (NoExpert, Single))}
        self._trainers, self._evaluators, self._shared = trainers, evaluators, shared
        self._stopped = not self._routers
        evaluators.is_patient = True  # training may need all nodes for hours

    def step(self) -> None:
        """Ask about new experts, and collect answers."""
        if self._stopped or not self._experts:
            return
        self._evaluators.paused = self._shared and self._trainers.wants_more
        ready = {
            name: router
            for name, router in self._routers.items()
            if not isinstance(router, Single) or router.expert in self._experts
        }
        for name in ready:
            del self._routers[name]
        try:
            for evaluation in self._evaluations:
                if ready:
                    evaluation.announce(ready)
                evaluation.ask(_AHEAD)
            self._take(0)
        except PhatgooseError:
            self._stop()

    def finish(self) -> None:
        """Ask nothing more, and collect what actors are answering now."""
        self._evaluators.paused = self._evaluators.is_patient = False
        for evaluation in self._evaluations:
            evaluation.stop_asking()
        try:
            while not self._stopped and not self._evaluators.is_done:
                self._take(1.0)
        except PhatgooseError:
            self._stop()

    def _stop(self) -> None:
        """Stop after an error; the stage `evaluate` will meet it again and report it."""
        self._stopped = True
        self._evaluators.close()

    def _take(self, timeout: float) -> None:
        for key, result in self._evaluators.step(timeout):
            for evaluation in self._evaluations:
                if evaluation.awaits(key):
                    evaluation.take(key, result)
