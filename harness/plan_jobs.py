"""The jobs of a run: what determines each expert, and each profile, that the run needs."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

from harness.config import MULTITASK, RunConfig
from harness.registry import Registry
from harness.tasks import TaskData
from harness.train_actor import TrainJob, data_fingerprint
from phatgoose.base import Base
from phatgoose.encoder import load_encoder
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Card, Expert
from phatgoose.recipe import Recipe
from phatgoose.routers import Router, all_needs
from phatgoose.routers.interface import NEEDS

# Raise it whenever the same job would train another expert than before.
_TRAINING_VERSION = 1
# Raise it whenever the same expert would get another profile than before.
_PROFILE_VERSION = 1


def pool_jobs(
    config: RunConfig, base: Base, registry: Registry, pool: Sequence[TaskData]
) -> list[TrainJob]:
    """One job per expert of the pool, in its order.

    Raises:
        PhatgooseError: an adapter or an expert of the registry is not there or does not fit.
    """
    jobs = []
    for data in pool:
        spec = data.spec
        if spec.source == "registry":
            card = registry.load(registry.find(spec.name)).card
            jobs.append(TrainJob(card, (spec,), config.train))
        elif spec.adapter is not None:
            jobs.append(_adapter_job(config.train, base, data))
        else:
            card = _card(config.train, base, spec.name, data.fingerprint)
            jobs.append(TrainJob(card, (spec,), config.train))
    return jobs


def multitask_job(config: RunConfig, base: Base, pool: Sequence[TaskData]) -> TrainJob | None:
    """The job of the router `multitask`; None if there is no such router."""
    recipe, data = config.multitask_recipe, [item for item in pool if item.counts["train"]]
    if recipe is None:
        return None
    if len(data) < len(pool):
        raise PhatgooseError("router multitask: not every task of the pool comes with data")
    card = _card(recipe, base, MULTITASK, data_fingerprint(data))
    return TrainJob(card, tuple(item.spec for item in data), recipe)


def with_profiles(
    config: RunConfig, jobs: Sequence[TrainJob], pool: Sequence[TaskData]
) -> list[TrainJob]:
    """The same jobs, told in which way their profiles are measured; those without data get none."""
    encoder = load_encoder(config.profile.encoder)
    how = [_PROFILE_VERSION, asdict(config.profile), encoder.fingerprint]
    told = []
    for job, data in zip(jobs, pool, strict=True):
        key = json.dumps([*how, data.fingerprint, data.description], sort_keys=True)
        has_data = data.counts["train"] > 0
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        told.append(replace(job, profile_id=digest if has_data else None))
    return told


def check_needs(
    routers: dict[str, Router], jobs: Sequence[TrainJob], registry: Registry, recipe: Recipe
) -> None:
    """Refuse a router that the pool will lack something for, before any work.

    Raises:
        PhatgooseError: naming the router, what it needs, the experts without, and the mend.
    """
    ungated = [job.card.name for job in jobs if not _will_have_gates(job, registry, recipe)]
    without_data = [job.card.name for job in jobs if job.profile_id is None]
    for name, router in routers.items():
        for need in all_needs(router):
            lacking = ungated if need == "gates" else without_data
            if lacking:
                shown = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
                raise PhatgooseError(
                    f"router {name} needs {need}, which {shown} will not have: {NEEDS[need]}; in a "
                    "pool's YAML, `members` are an expert's data"
                )


def _will_have_gates(job: TrainJob, registry: Registry, recipe: Recipe) -> bool:
    spec = job.tasks[0]
    if spec.source == "registry":
        expert = registry.load(registry.find(spec.name))
        return all(factors.gate_D is not None for factors in expert.linears.values())
    return recipe.gates is not None and bool(spec.members)


def _card(recipe: Recipe, base: Base, name: str, data: str) -> Card:
    """The card of an expert that is trained."""
    values = asdict(recipe)
    determines = {
        "version": _TRAINING_VERSION,
        "name": name,
        "base": base.fingerprint,
        "data": data,
        "recipe": values,
    }
    return Card(
        name=name,
        task=name,
        base=base.name,
        base_fingerprint=base.fingerprint,
        data_fingerprint=data,
        job=_digest(determines),
        scale=recipe.scale,
        recipe=values,
        metrics={},
    )


def _adapter_job(recipe: Recipe, base: Base, data: TaskData) -> TrainJob:
    """The job of an imported expert, whose gates are trained here if there is data for them.

    Without gates its job is that of the import alone, wherever that is done.
    """
    assert data.spec.adapter is not None
    imported = Expert.from_peft(data.spec.adapter, base=base, name=data.spec.name).card
    card = imported
    if data.spec.members and recipe.gates is not None:
        # Of the recipe, what made the factors was somebody else's.
        ours = asdict(recipe)
        for other in ("rank", "scale", "init_std", "lora"):
            del ours[other]
        determines = {"adapter": imported.job, "data": data.fingerprint, "recipe": ours}
        job = _digest({"version": _TRAINING_VERSION, **determines})
        card = replace(imported, job=job, recipe={**imported.recipe, **ours})
    card = replace(card, data_fingerprint=data.fingerprint)
    return TrainJob(card, (data.spec,), recipe, imported=imported.job)


def _digest(determines: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()[:32]
