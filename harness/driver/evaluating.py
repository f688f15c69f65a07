"""The stage `evaluate`: every router on every suite, on evaluation actors and scoring actors."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from harness import run_folder
from harness.driver.early_evaluation import EarlyEvaluation
from harness.evaluation.actor import EvalActor, EvalSettings
from harness.evaluation.inputs import SuiteInputs
from harness.evaluation.scoring import ScoringActor
from harness.evaluation.stage import Evaluation, Setting
from harness.planning.available import AvailableRouters
from harness.planning.plan import Plan
from harness.registry.packs import Members
from harness.scheduling.actor import code_version
from harness.scheduling.cluster import Cluster, actor_options, check_room, request_nodes, room
from harness.scheduling.hardware import usable_cores
from harness.scheduling.progress import StageProgress
from harness.scheduling.workers import TICK_SECONDS, Workers
from harness.storage import Folder
from phatgoose.errors import PhatgooseError

# The number of waiting shards that suffices to keep all actors busy.
_AHEAD = 512
# Scoring takes some of the driver's node: an actor for so many cores, and never more than this.
_CORES_PER_SCORER, _MOST_SCORERS = 4, 16
_WRITE_SECONDS = 5.0
# Results are written so seldom that this share of the time goes into writing them.
_SHARE_OF_WRITING = 0.05


class Evaluating:
    """The evaluation of a run's routers.

    Args:
        plan: the plan of the run.
        cluster: the cluster.
        registry_actor: returns the registry actor.
        max_actors: the most actors of one kind; None for no limit.
        is_training: returns whether training actors want nodes, too.
    """

    def __init__(
        self,
        plan: Plan,
        cluster: Cluster,
        registry_actor: Callable[[], Any],
        max_actors: int | None,
        is_training: Callable[[], bool],
    ) -> None:
        self._plan, self._config, self._cluster = plan, plan.config, cluster
        self._registry_actor, self._max_actors = registry_actor, max_actors
        self._is_training = is_training
        patience = self._config.cluster.patience
        self.evaluators = Workers(
            self._make_evaluator, self._room_to_evaluate, want=self._want_evaluators, **patience
        )
        self.scorers = Workers(self._make_scorer, self._room_to_score, **patience)
        self._setting = Setting(
            plan.folder, self._config.base.name, plan.conditions, self.evaluators, self.scorers
        )

    def close(self) -> None:
        """End the actors."""
        self.evaluators.close()
        self.scorers.close()

    def early(self, experts: Mapping[str, str], trainers: Workers) -> EarlyEvaluation:
        """Return the evaluation that runs during training, over a growing pool."""
        labels = (self._config.cluster.train_nodes, self._config.cluster.evaluate_nodes)
        shared = not all(labels) or all(
            labels[0].get(key, value) == value for key, value in labels[1].items()
        )
        evaluations = [
            Evaluation(self._setting, inputs, Members(experts)) for inputs in self._inputs
        ]
        return EarlyEvaluation(
            evaluations, experts, self._plan.routers, trainers, self.evaluators, shared
        )

    def run(self, served: AvailableRouters) -> list[str]:
        """Evaluate routers on all suites; return what has no score, and why.

        Raises:
            PhatgooseError: no router has a score.
        """
        run_folder.split_by_suite(self._plan.folder)
        evaluations = [
            Evaluation(self._setting, inputs, served.members, served.others)
            for inputs in self._inputs
        ]
        for evaluation in evaluations:
            evaluation.announce(served.routers)
        total = len(served.routers) * sum(evaluation.total for evaluation in evaluations)
        shards = len(served.routers) * sum(len(evaluation.shards) for evaluation in evaluations)
        before = sum(s.requests for e in evaluations for s in e.routers.values())
        results = _Results(self._plan.folder, evaluations, set(self._config.router))
        with StageProgress(
            self._plan.folder, "evaluate", total, "request", shards, before
        ) as progress:
            try:
                while not all(evaluation.is_done for evaluation in evaluations):
                    for evaluation in evaluations:
                        evaluation.ask(_AHEAD)
                        evaluation.score()
                    self._step(evaluations)
                    self._show(progress, evaluations)
                    results.write()
            finally:
                results.write(now=True)
        if not any(evaluation.rows for evaluation in evaluations):
            raise PhatgooseError("; ".join(results.problems))
        return results.problems

    def _step(self, evaluations: list[Evaluation]) -> None:
        """Wait for what the actors have done, and take it."""
        waits = not self.evaluators.is_done
        asks_on = self.evaluators.waiting < _AHEAD and any(e.has_more for e in evaluations)
        for key, result in self.evaluators.step(TICK_SECONDS if waits and not asks_on else 0):
            for evaluation in evaluations:
                if evaluation.awaits(key):
                    evaluation.take(key, result)
        for key, result in self.scorers.step(0 if waits else TICK_SECONDS):
            for evaluation in evaluations:
                if evaluation.awaits_score(key):
                    evaluation.take_score(key, result)

    def _show(self, progress: StageProgress, evaluations: list[Evaluation]) -> None:
        """Report the answers to the stage's progress."""
        states = [state for evaluation in evaluations for state in evaluation.routers.values()]
        running = len(self.evaluators.under_way)
        counts = {
            "waiting": self.evaluators.waiting + sum(len(state.to_ask) for state in states),
            "running": running,
            "done": sum(state.answered for state in states),
            "failed": sum(len(state.to_ask) for state in states if state.state == "failed"),
        }
        requests = sum(state.requests for state in states)
        progress.update(requests, counts, self.evaluators.locations)

    @functools.cached_property
    def _inputs(self) -> list[SuiteInputs]:
        """The suites' requests, as actors get them."""
        for inputs in self._plan.inputs.values():
            inputs.put = self._put
        return list(self._plan.inputs.values())

    def _put(self, value: Any) -> Any:
        self._cluster.connect()
        return ray.put(value)

    def _make_evaluator(self) -> Any:
        config = self._config
        settings = EvalSettings(
            config.base, self._plan.conditions, config.registry, config.run.dir, code_version()
        )
        remote = ray.remote(EvalActor).options(**self._evaluator_options, max_concurrency=2)
        return remote.remote(settings, self._registry_actor())

    def _make_scorer(self) -> Any:
        # On this node, where lm-eval finds what it found when the requests were built. Others may
        # have all their cores taken by evaluation actors, and other files.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote = ray.remote(ScoringActor).options(
            num_cpus=0, max_concurrency=2, scheduling_strategy=here
        )
        return remote.remote(self._config.run.dir, code_version())

    def _room_to_score(self) -> int:
        self._cluster.connect()
        return max(1, min(_MOST_SCORERS, usable_cores() // _CORES_PER_SCORER))

    @property
    def _evaluator_options(self) -> dict[str, Any]:
        """The Ray options of an evaluation actor: GPUs if and only if the plan says so."""
        config = self._config.cluster
        gpus = config.gpus_per_actor or 1 if self._plan.conditions.device == "cuda" else 0.0
        return actor_options(config, config.evaluate_nodes, gpus)

    def _room_to_evaluate(self) -> int:
        self._cluster.connect()
        config = self._config.cluster
        options = self._evaluator_options
        if self._is_training():
            free = room(options, free=True) + self.evaluators.size
            return min(free, self._max_actors or free)
        check_room(config, config.evaluate_nodes, gpus=options["num_gpus"])
        return room(options, self._max_actors)

    def _want_evaluators(self, count: int) -> None:
        """Request nodes for evaluation, but not during training."""
        if not self._is_training():
            self._cluster.connect()
            request_nodes(self._evaluator_options, min(count, self._max_actors or count))


class _Results:
    """What the stage writes while it runs: scores.parquet and evaluations.parquet."""

    def __init__(self, folder: Folder, evaluations: list[Evaluation], derived: set[str]) -> None:
        self._folder, self._evaluations, self._derived = folder, evaluations, derived
        self._scored, self._next = -1, 0.0

    @property
    def problems(self) -> list[str]:
        return [problem for evaluation in self._evaluations for problem in evaluation.problems]

    def write(self, *, now: bool = False) -> None:
        """Write the scores of all routers that are done, and how far the others are."""
        started = time.monotonic()
        if started < self._next and not now:
            return
        scored = sum(len(evaluation.rows) for evaluation in self._evaluations)
        is_there = self._folder.exists(run_folder.SCORES_FILE)
        if (scored != self._scored or now) and (scored or is_there):
            for evaluation in self._evaluations:
                evaluation.write_scores(self._derived if now else ())
            self._scored = scored
        rows = [row for evaluation in self._evaluations for row in evaluation.table()]
        run_folder.write_table(
            self._folder, run_folder.EVALUATIONS_FILE, run_folder.EVALUATIONS, rows
        )
        ended = time.monotonic()
        self._next = ended + max(_WRITE_SECONDS, (ended - started) / _SHARE_OF_WRITING)
