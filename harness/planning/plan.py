"""Decide what a run will do, and check it before anything is written or any actor starts."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.schema import RunConfig
from harness.evaluation.conditions import Conditions
from harness.evaluation.inputs import SuiteInputs
from harness.evaluation.overlap import Overlap, find_overlaps
from harness.evaluation.requests import SuiteRequests
from harness.evaluation.shards import Limits
from harness.planning.estimate import (
    EvaluationWork,
    evaluate_seconds,
    evaluation_work,
    train_seconds,
    training_tokens,
)
from harness.planning.jobs import check_code, check_needs, multitask_job, pool_jobs, with_profiles
from harness.planning.suites import check_lengths, check_suite
from harness.registry import Registry
from harness.run_folder import OVERLAP_FILE, RUN_FILE, read_run
from harness.source_code import TRAINING
from harness.storage import Folder
from harness.tasks import TaskData, TaskSpec
from harness.tasks.sources import SPLIT_ALREADY
from harness.training.job import TrainJob
from phatgoose.architecture import linear_sizes
from phatgoose.base import Base
from phatgoose.card import validate_name
from phatgoose.errors import PhatgooseError
from phatgoose.routers import Router
from phatgoose.routers.interface import needs_profiles

# Tokens that an evaluation actor reads at once, by the kind of device.
_CHUNK_TOKENS = {"cuda": 8192, "mps": 1024, "cpu": 1024}
_SPARE_BYTES = 500 * 2**20
# The number of overlaps or names that are printed.
_SHOWN = 5


@dataclass(frozen=True)
class Plan:
    """The checked plan of a run.

    Attributes:
        config: the configuration.
        folder: the run folder.
        base: the base without its weights.
        base_fingerprint: the base's fingerprint.
        pool: the data of the pool's tasks.
        suites: the data of each suite's tasks, by the suite's name.
        inputs: the requests of each suite, by its name; empty without the stage `evaluate`.
        conditions: the conditions of the answers.
        jobs: one per expert, in the pool's order.
        multitask: the job of the multitask expert, if a router needs it.
        finished: content hash by job id, of experts that need no training.
        tokens: by job id, the number of tokens that the job trains on in all its steps, estimated
            from a sample.
        routers: the routers, by their name in results.
        work: the work of one router, in all suites.
        overlaps: by suite, what its tasks share with training data. None of these stops the run.
        expert_bytes: the size of one expert.
        train_seconds, evaluate_seconds: estimates for one core of this machine.
    """

    config: RunConfig
    folder: Folder
    base: Base
    base_fingerprint: str
    pool: list[TaskData]
    suites: dict[str, list[TaskData]]
    inputs: dict[str, SuiteInputs]
    conditions: Conditions
    jobs: list[TrainJob]
    multitask: TrainJob | None
    finished: dict[str, str]
    tokens: dict[str, int]
    routers: dict[str, Router]
    work: EvaluationWork
    overlaps: dict[str, list[Overlap]]
    expert_bytes: int
    train_seconds: float
    evaluate_seconds: float

    @property
    def open_jobs(self) -> list[TrainJob]:
        """The unfinished jobs, the longest first."""
        jobs = [job for job in self.all_jobs if job.card.job not in self.finished]
        return sorted(jobs, key=lambda job: -self.tokens[job.card.job])

    @property
    def all_jobs(self) -> list[TrainJob]:
        """The pool's jobs and the multitask one."""
        return [*self.jobs, *([self.multitask] if self.multitask else [])]

    @property
    def identity(self) -> dict[str, Any]:
        """The identity that all results in one run folder share."""
        return {
            "base": self.base_fingerprint,
            "experts": {job.card.name: job.card.job for job in self.jobs},
        }

    def describe(self) -> str:
        """Return the plan as text for a terminal."""
        config, done = self.config, len(self.all_jobs) - len(self.open_jobs)
        size = len(self.jobs) * self.expert_bytes / 2**20
        lines = [
            f"base      {config.base.name} ({self.base_fingerprint[:12]}, {config.base.dtype}, on "
            f"{self.conditions.device})",
            f"pool      {config.pool['name']}: {len(self.jobs)} experts, {size:.0f} MiB",
            *(
                f"suite     {name}: {', '.join(data.name for data in tasks)}"
                for name, tasks in self.suites.items()
            ),
            f"routers   {', '.join(config.router)}",
            f"computed  {self.conditions.describe()}",
            f"run.dir   {self.folder}",
        ]
        if "train" in config.stages:
            lines.append(
                f"train     {len(self.open_jobs)} of {len(self.all_jobs)} jobs ({done} done "
                f"before)" + (f", {_minutes(self.train_seconds)}" if self.open_jobs else "")
            )
        if "evaluate" in config.stages:
            lines.append(
                f"evaluate  {len(self.routers)} routers, each on {self.work.requests} requests, "
                f"{_minutes(self.evaluate_seconds)} (less what was answered before)"
            )
        found = [overlap for overlaps in self.overlaps.values() for overlap in overlaps]
        worst = sorted(found, key=lambda overlap: -overlap.share)
        lines += [f"overlap   {overlap}" for overlap in worst[:_SHOWN]]
        if len(worst) > _SHOWN:
            lines.append(f"overlap   {len(worst) - _SHOWN} more pairs, in {OVERLAP_FILE}")
        return "\n".join(lines)


def _minutes(seconds: float) -> str:
    return f"about {max(1, round(seconds / 60))} min of one core's time"


@dataclass(frozen=True)
class Prepared:
    """The results of preparing a run before it is planned, see `harness.driver.prepare`.

    Attributes:
        base: the base without its weights, to check what fits it.
        pool: the data of the pool's tasks.
        suites: the data of each suite's tasks, by the suite's name.
        encoder_fingerprint: the fingerprint of the sentence encoder; None if no profile is needed.
    """

    base: Base
    pool: list[TaskData]
    suites: dict[str, list[TaskData]]
    encoder_fingerprint: str | None


def check_before_preparing(config: RunConfig) -> None:
    """Refuse invalid folders, names and suites before any download.

    Raises:
        PhatgooseError: the first problem that would stop the run later.
    """
    pool = config.pool_tasks()
    suites = [config.suite_tasks(suite) for suite in config.suites]
    for uri in (config.run.dir, config.registry):
        _check_can_be_made(Folder(uri))
    for spec in pool:
        validate_name(spec.name)
    for suite in suites:
        _check_held_out(pool, suite)


def wants_profiles(config: RunConfig) -> bool:
    """Return whether a run measures profiles: for its experts, or for a router."""
    if "train" in config.stages:
        return True
    routers = config.routers([spec.name for spec in config.pool_tasks()])
    return "evaluate" in config.stages and needs_profiles(routers.values())


def make_plan(config: RunConfig, prepared: Prepared, device: str = "cpu") -> Plan:
    """Check configuration, data, base, registry and disk; write nothing but the cache.

    Args:
        config: the configuration.
        prepared: the results of preparing the run.
        device: the kind of device that evaluation actors will have: `cpu`, `cuda` or `mps`.

    Raises:
        PhatgooseError: the first problem that would stop the run later.
    """
    base, pool, suites = prepared.base, prepared.pool, prepared.suites
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    for suite in config.suites:
        check_suite(base, suite, suites[suite["name"]])
    overlaps = {name: find_overlaps(pool, tasks) for name, tasks in suites.items()}
    for suite in config.suites:
        _check_overlaps(suite, config.overlap.limit, overlaps[suite["name"]])
    registry = Registry(config.registry, base.fingerprint)
    jobs = pool_jobs(config, base, registry, pool)
    multitask = multitask_job(config, base, pool)
    routers = config.routers([job.card.name for job in jobs])
    evaluates = "evaluate" in config.stages
    records = registry.records(job.card.job for job in [*jobs, *([multitask] if multitask else [])])
    made_by = {
        job.card.name: records[job.card.job].code
        for job in [*jobs, *([multitask] if multitask else [])]
        # Experts that a pool takes from the registry by name are used unchanged.
        if job.card.job in records and job.steps and job.tasks[0].source != "registry"
    }
    check_code("expert", made_by, TRAINING, config, registry)
    if prepared.encoder_fingerprint is not None:
        encoder = prepared.encoder_fingerprint
        jobs = with_profiles(config, jobs, pool, registry, records, encoder)
    inputs = {}
    if evaluates:
        check_needs(routers, jobs, registry, config.train)
        limits = _limits(config, device)
        for name, data in suites.items():
            inputs[name] = SuiteInputs(SuiteRequests(name, data), base, limits)
            inputs[name].cut()
    for suite in config.suites:
        if evaluates and suite.get("too_long") == "refuse":
            check_lengths(base, inputs[suite["name"]].requests)
    all_jobs = [*jobs, *([multitask] if multitask else [])]
    finished = {job: record.object for job, record in records.items()}
    tokens = training_tokens(base, all_jobs, pool)
    unfinished = sum(count for job, count in tokens.items() if job not in finished)
    tasks = [data for tasks in suites.values() for data in tasks]
    work = evaluation_work(tasks)
    plan = Plan(
        config=config,
        folder=Folder(config.run.dir),
        base=base,
        base_fingerprint=base.fingerprint,
        pool=pool,
        suites=suites,
        inputs=inputs,
        conditions=Conditions.here(base.fingerprint, config.base.dtype, device),
        jobs=jobs,
        multitask=multitask,
        finished=finished,
        tokens=tokens,
        routers=routers,
        work=work,
        overlaps=overlaps,
        expert_bytes=_expert_bytes(base, config.train.rank),
        train_seconds=train_seconds(unfinished, parameters),
        evaluate_seconds=evaluate_seconds(work, len(routers), parameters),
    )
    _check_same_run(plan)
    _check_disk(plan, registry.folder)
    plan.folder.check_writable(creates=False)
    registry.folder.check_writable()
    return plan


def _limits(config: RunConfig, device: str) -> Limits:
    return Limits(config.chunk_tokens or _CHUNK_TOKENS[device], config.shard_tokens)


def _check_held_out(pool: list[TaskSpec], suite: list[TaskSpec]) -> None:
    """Refuse to evaluate on documents that an expert is trained on."""
    for spec in suite:
        for expert in pool:
            if spec.source != expert.source:
                continue
            shared = set(spec.members) & set(expert.members)
            # A data set with its own splits has the same ones in every task. Otherwise, the split
            # depends on the task's name.
            same = spec.name == expert.name or spec.source in SPLIT_ALREADY
            if shared and (spec.split == "all" or not same):
                raise PhatgooseError(
                    f"suite task {spec.name}: it has documents of {min(shared)} that expert "
                    f"{expert.name} is trained on. Name it {expert.name}, with split: evaluation, "
                    "or leave one of the two out."
                )


def _check_overlaps(suite: Mapping[str, Any], limit: float, overlaps: Sequence[Overlap]) -> None:
    """Refuse to evaluate on documents that an expert of another task has seen.

    The pool's own tasks are not held out, so their overlaps are only reported.
    """
    if suite.get("of_pool"):
        return
    # How much a task's own evaluation split resembles its training data is up to its author.
    over = [o for o in overlaps if o.share > limit and o.suite_task != o.expert]
    if over:
        worst = max(over, key=lambda overlap: overlap.share)
        raise PhatgooseError(
            f"overlap.limit={limit}: {len(over)} pairs of a suite task and an expert have more "
            f"than {limit:.0%} of the task's documents in common. The worst: {worst}. Leave one of "
            "the two out, or set a higher limit."
        )


def _expert_bytes(base: Base, rank: int) -> int:
    """Return the size of an expert of this rank with its gates, in bytes."""
    sizes = [linear_sizes(base.model.get_submodule(name)) for name in base.linears]
    return sum(4 * (rank * (inputs + outputs) + inputs) for inputs, outputs in sizes)


def _check_same_run(plan: Plan) -> None:
    """Refuse to mix the results of two pools in one folder; the same pool may grow."""
    if not plan.folder.exists(RUN_FILE):
        return
    before = read_run(plan.folder).get("identity")
    what = "base"
    if before and before["base"] == plan.base_fingerprint:
        old, new = before["experts"], plan.identity["experts"]
        changed = [name for name in old if new.get(name) != old[name]]
        if not changed:
            return
        same = old.keys() <= new.keys()
        what = f"training recipe or data for {', '.join(changed[:_SHOWN])}" if same else "pool"
    raise PhatgooseError(
        f"run.dir={plan.folder}: it holds a run with another {what}. Choose another run.dir (with "
        f"registry={plan.config.registry}, unchanged experts are not trained again), or use the "
        "configuration and data of its run.json."
    )


def _check_can_be_made(folder: Folder) -> None:
    """Refuse, before any download, a local folder that cannot be created or written to."""
    path = _existing(folder)
    if path is not None and not (path.is_dir() and os.access(path, os.W_OK)):
        raise PhatgooseError(
            f"{folder}: it cannot be written to, because of {path}. Choose another run.dir= or "
            "registry=."
        )


def _existing(folder: Folder) -> Path | None:
    """Return the nearest existing path above a folder; None if it is not a local one."""
    path = folder.local("objects")
    while path is not None and not path.exists():
        path = path.parent
    return path


def _check_disk(plan: Plan, registry: Folder) -> None:
    path = _existing(registry)
    if path is None:
        return
    # Each expert is stored twice: in its object and in the pack.
    needed = 2 * len(plan.jobs) * plan.expert_bytes + _SPARE_BYTES
    free = shutil.disk_usage(path).free
    if free < needed:
        raise PhatgooseError(
            f"registry={registry}: it has {free / 2**30:.1f} GiB free, and the run needs about "
            f"{needed / 2**30:.1f} GiB. Free some space, or choose another registry= and run.dir=."
        )
