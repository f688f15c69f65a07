"""The stages of a run, on actors of the cluster: train, measure profiles, evaluate."""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from harness.driver.early_evaluation import EarlyEvaluation
from harness.driver.evaluating import Evaluating
from harness.planning.available import available_routers
from harness.planning.plan import Plan
from harness.registry import Registry
from harness.registry.actor import registry_actor
from harness.scheduling.actor import code_version
from harness.scheduling.cluster import Cluster, actor_options, check_room, request_nodes, room
from harness.scheduling.progress import StageProgress
from harness.scheduling.workers import Workers
from harness.training.actor import TrainActor, TrainSettings
from harness.training.checkpoints import delete_checkpoints
from harness.training.job import TrainJob
from harness.training.job_table import JobTable
from harness.training.ranks import TrainGroups
from harness.training.stage import Training, measure_profiles
from phatgoose.errors import PhatgooseError, listed

_LOG = logging.getLogger(__name__)


class Driver:
    """The driver of one run. Its stages share the registry actor and the evaluation actors.

    Every stage does what it can, then returns one line for each failure.
    """

    def __init__(self, plan: Plan, cluster: Cluster) -> None:
        self._plan, self._config, self._cluster = plan, plan.config, cluster
        self._is_training = False
        self.table = JobTable(plan.folder, plan.all_jobs, plan.tokens, plan.finished)
        self._evaluating = Evaluating(
            plan,
            cluster,
            lambda: self._registry_actor,
            self._most_actors,
            lambda: self._is_training,
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
            early.finish()
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
        return served.problems + self._evaluating.run(served)

    def close(self) -> None:
        """End the actors."""
        self._evaluating.close()

    def _early(self, training: Training, trainers: Workers) -> EarlyEvaluation:
        """Return the evaluation that runs during training."""
        plan = self._plan
        there = {job.card.name: plan.finished.get(job.card.job) for job in plan.jobs}
        training.experts |= {name: content for name, content in there.items() if content}
        return self._evaluating.early(training.experts, trainers)

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
                **config.cluster.patience,
            )
        groups = TrainGroups(settings, options)
        return Workers(
            groups.make,
            lambda: room(options, most, ranks=ranks),
            ended=groups.ended,
            want=want,
            **config.cluster.patience,
        )

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
