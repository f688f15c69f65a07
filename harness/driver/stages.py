"""The stages of a run, on actors of the cluster: train, measure profiles, evaluate."""

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from harness.driver.early_evaluation import EarlyEvaluation
from harness.evaluation.actor import EvalActor
from harness.evaluation.stage import Evaluation, Setting
from harness.planning.available import AvailableRouters, available_routers
from harness.planning.plan import Plan
from harness.registry import Registry
from harness.registry.actor import registry_actor
from harness.registry.packs import Members
from harness.scheduling.actor import code_version
from harness.scheduling.cluster import Cluster, actor_options, check_room, request_nodes, room
from harness.scheduling.progress import StageProgress
from harness.scheduling.settings import ClusterConfig
from harness.scheduling.workers import TICK_SECONDS, Workers
from harness.training.actor import TrainActor, TrainSettings
from harness.training.checkpoints import delete_checkpoints
from harness.training.job import TrainJob
from harness.training.job_table import JobTable
from harness.training.ranks import TrainGroups
from harness.training.stage import Training, measure_profiles
from phatgoose.errors import PhatgooseError, listed

_LOG = logging.getLogger(__name__)
# The number of waiting chunks that suffices to keep all actors busy.
_AHEAD = 20_000
# How often lm-eval sums up the routers whose answers are complete.
_SUM_UP_SECONDS = 30.0


class Driver:
    """The driver of one run. Its stages share the registry actor and the evaluation actors.

    Every stage does what it can, then returns one line for each failure.
    """

    def __init__(self, plan: Plan, cluster: Cluster) -> None:
        self._plan, self._config, self._cluster = plan, plan.config, cluster
        self._is_training = False
        self.table = JobTable(plan.folder, plan.all_jobs, plan.tokens, plan.finished)
        self.evaluators = Workers(
            self._make_evaluator,
            self._room_to_evaluate,
            want=self._want_evaluators,
            **self._patience,
        )

    def check(self) -> None:
        """Raise PhatgooseError if the cluster has no room for a training actor."""
        self._cluster.connect()
        cluster, ranks = self._config.cluster, self._config.ranks
        gpus = ranks.gpus_per_rank(cluster)
        check_room(cluster, cluster.train_nodes, ranks.ranks_per_expert, gpus)

    def finish_earlier_jobs(self) -> None:
        """Complete what a crash may have left undone for finished jobs."""
        self._registry.add_to_manifest(self._plan.finished)
        delete_checkpoints(self._plan.folder, self._plan.finished)

    def train(self) -> list[str]:
        """Train the missing experts; meanwhile, evaluate what does not need all of them."""
        plan, jobs = self._plan, self._plan.open_jobs
        total = sum(plan.tokens[job.card.job] for job in plan.all_jobs)
        done = total - sum(plan.tokens[job.card.job] for job in jobs)
        trainers = self._trainers(jobs)
        self._is_training = True
        with StageProgress(
            plan.folder, "train", total, "token", len(plan.all_jobs), done
        ) as progress:
            training = Training(
                jobs, plan.folder, trainers, self._registry_actor, self.table, progress
            )
            early = self._early(training, trainers) if "evaluate" in self._config.stages else None
            try:
                failures = training.run(early.step if early else lambda: None)
            finally:
                trainers.close()
                self._is_training = False
            if early:
                early.finish(training.show)
        return by_reason("expert", failures)

    def measure_profiles(self) -> list[str]:
        """Measure the missing profiles of the pool."""
        plan, registry = self._plan, self._registry
        experts: dict[str, str] = {}
        lacking = []
        recorded = registry.recorded_all(job.card.job for job in plan.jobs)
        profiles = registry.profiles()
        for job in plan.jobs:
            content_hash = recorded.get(job.card.job)
            if content_hash is None or job.profile_id is None:
                continue
            if (content_hash, job.profile_id) not in profiles:
                experts[job.card.name] = content_hash
                lacking.append(job)
        if not lacking:
            return []
        self._cluster.connect()
        trainers = self._trainers(lacking)
        try:
            with StageProgress(
                plan.folder, "profile", len(lacking), "expert", len(lacking)
            ) as progress:
                failures = measure_profiles(
                    lacking, experts, trainers, self._registry_actor, progress
                )
        finally:
            trainers.close()
        return by_reason("profile of expert", failures)

    def evaluate(self) -> list[str]:
        """Evaluate every router that the pool can serve, on every suite."""
        served = available_routers(self._plan, self._registry, self._pool())
        for problem in served.problems:
            _LOG.warning("%s", problem)
        for suite in self._plan.suites:
            served.problems += self._evaluate(suite, served)
        return served.problems

    def close(self) -> None:
        """End the actors."""
        self.evaluators.close()

    def _evaluate(self, suite: str, served: AvailableRouters) -> list[str]:
        """Evaluate the routers on one suite; write scores whenever a router is complete."""
        asked = self._plan.requests[suite]
        evaluation = Evaluation(self._setting, asked, served.members, served.others)
        evaluation.announce(served.routers)
        requests = len(served.routers) * sum(len(chunk.requests) for chunk in evaluation.chunks)
        to_ask, summed_up = dict(served.routers), time.monotonic()
        rows: dict[str, list[dict[str, Any]]] = {}
        chunks = len(served.routers) * len(evaluation.chunks)
        with StageProgress(self._plan.folder, "evaluate", requests, "request", chunks) as progress:
            while evaluation.is_waiting or len(rows) + len(evaluation.failures) < len(
                served.routers
            ):
                while to_ask and self.evaluators.waiting < _AHEAD:
                    name = next(iter(to_ask))
                    evaluation.ask({name: to_ask.pop(name)})
                if evaluation.is_waiting:
                    evaluation.step(TICK_SECONDS)
                self._show(progress, evaluation)
                if evaluation.is_waiting and time.monotonic() - summed_up < _SUM_UP_SECONDS:
                    continue
                known = {*rows, *to_ask, *evaluation.open_routers, *evaluation.failures}
                for name in [name for name in served.routers if name not in known]:
                    try:
                        rows[name] = evaluation.run(name, served.routers[name])
                    except PhatgooseError:
                        if name not in evaluation.failures:
                            raise
                        continue  # an answer that was asked again failed; continue with the others
                    ordered = [row for router in served.routers for row in rows.get(router, ())]
                    evaluation.write_scores(ordered)
                summed_up = time.monotonic()
            ordered = [row for router in served.routers for row in rows.get(router, ())]
            evaluation.write_scores(ordered, derived=set(self._config.router))
        if not rows:
            raise PhatgooseError("; ".join(evaluation.failures.values()))
        return list(evaluation.failures.values())

    def _show(self, progress: StageProgress, evaluation: Evaluation) -> None:
        """Report the answers to the stage's progress."""
        running, waiting = len(self.evaluators.under_way), self.evaluators.waiting
        counts = {
            "waiting": waiting,
            "running": running,
            "done": evaluation.answered,
            "failed": len(evaluation.failures),
        }
        progress.update(evaluation.requests, counts, self.evaluators.locations)

    def _early(self, training: Training, trainers: Workers) -> EarlyEvaluation:
        """Return the evaluation that runs during training."""
        plan = self._plan
        there = {job.card.name: plan.finished.get(job.card.job) for job in plan.jobs}
        training.experts |= {name: content for name, content in there.items() if content}
        evaluations = [
            Evaluation(self._setting, requests, Members(training.experts))
            for requests in plan.requests.values()
        ]
        labels = (self._config.cluster.train_nodes, self._config.cluster.evaluate_nodes)
        shared = not all(labels) or all(
            labels[0].get(key, value) == value for key, value in labels[1].items()
        )
        return EarlyEvaluation(
            evaluations, training.experts, plan.routers, trainers, self.evaluators, shared
        )

    @property
    def _patience(self) -> dict[str, Any]:
        config = self._config.cluster
        return {"lease_seconds": config.lease_seconds, "wait_seconds": config.wait_seconds}

    @functools.cached_property
    def _on_mps(self) -> bool:
        """Whether actors use the GPU of this Mac."""
        return self._cluster.device(self._config.cluster) == "mps"

    @property
    def _most_actors(self) -> int | None:
        """The limit of `cluster.max_actors`; on a Mac's GPU, one actor if that is not set."""
        return self._config.cluster.max_actors or (1 if self._on_mps else None)

    @functools.cached_property
    def _registry(self) -> Registry:
        return Registry(self._config.registry, self._plan.base_fingerprint)

    @functools.cached_property
    def _registry_actor(self) -> Any:
        """The registry actor. It ends with the last of its handles."""
        return registry_actor(self._config.registry, self._plan.base_fingerprint)

    @functools.cached_property
    def _setting(self) -> Setting:
        config = self._config
        return Setting(
            self._plan.folder,
            config.base.name,
            self._plan.conditions,
            self.evaluators,
            config.chunk_characters,
        )

    def _trainers(self, jobs: Sequence[TrainJob]) -> Workers:
        """Return the training actors. They are started when there is work."""
        config = self._config
        profile = config.profile if any(job.profile_id for job in jobs) else None
        ranks, nodes = config.ranks.ranks_per_expert, config.cluster.train_nodes
        gpus = config.ranks.gpus_per_rank(config.cluster)
        options = actor_options(config.cluster, nodes, gpus)
        settings = TrainSettings(
            base=config.base,
            base_fingerprint=self._plan.base_fingerprint,
            run_dir=config.run.dir,
            code=code_version(),
            profile=profile,
            checkpoint_seconds=config.cluster.checkpoint_seconds,
            zero_stage=config.ranks.zero_stage,
            ranks=ranks,
            mps=self._on_mps and ranks == 1,
        )
        most = self._most_actors

        def want(count: int) -> None:
            request_nodes(options, ranks * min(count, most or count))

        if ranks == 1:
            remote = ray.remote(TrainActor).options(**options, max_concurrency=2)
            return Workers(
                lambda: remote.remote(settings),
                lambda: room(options, most),
                want=want,
                **self._patience,
            )
        groups = TrainGroups(settings, options)
        return Workers(
            groups.make,
            lambda: room(options, most, ranks=ranks),
            ended=groups.ended,
            want=want,
            **self._patience,
        )

    def _make_evaluator(self) -> Any:
        config = self._config
        options = self._evaluator_options
        return (
            ray.remote(EvalActor)
            .options(**options, max_concurrency=2)
            .remote(
                config.base,
                self._plan.conditions,
                config.registry,
                self._registry_actor,
                config.run.dir,
                code_version(),
            )
        )

    @property
    def _evaluator_options(self) -> dict[str, Any]:
        """The Ray options of an evaluation actor: GPUs if and only if the plan says so."""
        config = self._config.cluster
        gpus = config.gpus_per_actor or 1 if self._plan.conditions.device == "cuda" else 0.0
        return actor_options(config, config.evaluate_nodes, gpus)

    def _room_to_evaluate(self) -> int:
        self._cluster.connect()
        config: ClusterConfig = self._config.cluster
        options = self._evaluator_options
        if self._is_training:
            free = room(options, free=True) + self.evaluators.size
            return min(free, self._most_actors or free)
        check_room(config, config.evaluate_nodes, gpus=self._evaluator_options["num_gpus"])
        return room(options, self._most_actors)

    def _want_evaluators(self, count: int) -> None:
        """Request nodes for evaluation, but not during training."""
        if not self._is_training:
            self._cluster.connect()
            options = self._evaluator_options
            request_nodes(options, min(count, self._most_actors or count))

    def _pool(self) -> dict[str, str]:
        """Return the content hashes of the trained experts, by name; warn about missing ones."""
        plan, registry = self._plan, self._registry
        found = registry.add_to_manifest(job.card.job for job in plan.jobs)
        jobs = {job.card.name: job.card.job for job in plan.jobs}
        experts = {name: found[job] for name, job in jobs.items() if job in found}
        lacking = [name for name in jobs if name not in experts]
        if not experts:
            raise PhatgooseError(
                f"pool={plan.config.pool['name']}: none of its experts is in the registry "
                f"{registry.folder}. Run the stage train."
            )
        if lacking:
            _LOG.warning("%d experts of the pool are missing: %s", len(lacking), ", ".join(lacking))
        return experts


def by_reason(what: str, failures: Mapping[str, str]) -> list[str]:
    """Return a line for each reason, with the names of those that failed for it."""
    names: dict[str, list[str]] = {}
    for name, error in failures.items():
        names.setdefault(error, []).append(name)
    lines = []
    for error, failed in names.items():
        plural = "s" if len(failed) > 1 else ""
        lines.append(f"{what}{plural} {listed(failed)}: {error}")
    return lines
