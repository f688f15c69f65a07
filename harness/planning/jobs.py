"""The jobs of a run, with the ids of the experts and profiles that the run needs."""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

from harness.config.schema import RunConfig
from harness.extra_routers import MULTITASK
from harness.registry import Registry
from harness.registry.files import Record
from harness.source_code import PROFILES, changes, code_of, digest
from harness.tasks import TaskData
from harness.tasks.adapters import adapter_folder
from harness.training.job import TrainJob, data_fingerprint
from phatgoose.base import Base
from phatgoose.card import Card
from phatgoose.errors import PhatgooseError, listed
from phatgoose.expert import Expert
from phatgoose.routers import Router, all_needs
from phatgoose.routers.interface import NEEDS
from phatgoose.training.recipe import Recipe

# Part of the ids of jobs and profiles since version 0.1.0, so that registries of that version stay
# usable. The code that makes experts and profiles is recorded beside them, see `check_code`.
_FORMAT = 1
_LOG = logging.getLogger(__name__)


def pool_jobs(
    config: RunConfig, base: Base, registry: Registry, pool: Sequence[TaskData]
) -> list[TrainJob]:
    """Return one job per expert of the pool, in its order.

    Raises:
        PhatgooseError: an adapter or an expert of the registry is missing or does not fit.
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
    """Return the job of the router `multitask`; None if there is no such router."""
    recipe, data = config.multitask_recipe, [item for item in pool if item.counts["train"]]
    if recipe is None:
        return None
    if len(data) < len(pool):
        raise PhatgooseError(
            "router=multitask: not every task of the pool has data. Leave out the router or those "
            "tasks."
        )
    card = _card(recipe, base, MULTITASK, data_fingerprint(data))
    return TrainJob(card, tuple(item.spec for item in data), recipe)


def with_profiles(
    config: RunConfig,
    jobs: Sequence[TrainJob],
    pool: Sequence[TaskData],
    registry: Registry,
    finished: Mapping[str, Record],
    encoder_fingerprint: str,
) -> list[TrainJob]:
    """Return the same jobs with the ids of their profiles; a job without data gets none.

    A profile that other source code measured in the same way is used if the configuration accepts
    it. A profile of version 0.1.0, which did not record code, is always used.

    Raises:
        PhatgooseError: there are profiles of other code, and they are not accepted.
    """
    how = [_FORMAT, asdict(config.profile), encoder_fingerprint]
    own = digest(code_of(PROFILES))
    there: dict[tuple[str, str], list[str]] = {}
    for content, profile_id in registry.profiles():
        there.setdefault((content, profile_id.partition("-")[0]), []).append(profile_id)
    told = []
    others: dict[str, str] = {}
    for job, data in zip(jobs, pool, strict=True):
        if not data.counts["train"]:
            told.append(replace(job, profile_id=None))
            continue
        key = json.dumps([*how, data.fingerprint, data.description], sort_keys=True)
        measured = hashlib.sha256(key.encode()).hexdigest()[:16]
        profile_id = f"{measured}-{own}"
        record = finished.get(job.card.job)
        found = there.get((record.object, measured), []) if record else []
        if found and profile_id not in found:
            profile_id = max(found)
            others[job.card.name] = profile_id.partition("-")[2]
        told.append(replace(job, profile_id=profile_id))
    check_code("profile", others, PROFILES, config, registry)
    return told


def check_code(
    what: str,
    made_by: Mapping[str, str],
    roots: Sequence[str],
    config: RunConfig,
    registry: Registry,
) -> None:
    """Refuse experts or profiles that other source code made, or warn that they are accepted.

    Args:
        what: `expert` or `profile`.
        made_by: by the expert's name, a digest of the code that made it; empty if unknown.
        roots: the modules whose code makes it now.
        config: the run's configuration.
        registry: the registry that stores the experts.

    Raises:
        PhatgooseError: some were made by other code, and `train.accept_code` is not set.
    """
    now = code_of(roots)
    others = {name: code for name, code in made_by.items() if code not in ("", digest(now))}
    if not others:
        return
    found = [change for code in others.values() for change in changes(registry.code(code), now)]
    named, modules = list(others), list(dict.fromkeys(found))
    again = f"`python -m harness.registry remove {registry.folder} {named[0]}`, and so on"
    if what == "profile":
        again = f"delete their files in {registry.folder}/profiles"
    made = (
        f"{len(others)} {what}s ({listed(named)}) were made by other source code: "
        f"{listed(modules)} changed since."
    )
    if config.accept_code:
        _LOG.warning("%s train.accept_code=true uses them as they are.", made)
        return
    raise PhatgooseError(
        f"{made} Set train.accept_code=true to use them as they are; to make them again: {again}."
    )


def check_needs(
    routers: dict[str, Router], jobs: Sequence[TrainJob], registry: Registry, recipe: Recipe
) -> None:
    """Refuse a router if the experts will not have what it needs, before any work.

    Raises:
        PhatgooseError: the message names the router, the need, the experts without, and the fix.
    """
    ungated = [job.card.name for job in jobs if not _will_have_gates(job, registry, recipe)]
    without_data = [job.card.name for job in jobs if job.profile_id is None]
    for name, router in routers.items():
        for need in all_needs(router):
            lacking = ungated if need == "gates" else without_data
            if lacking:
                shown = ", ".join(lacking[:5]) + (", ..." if len(lacking) > 5 else "")
                raise PhatgooseError(
                    f"router={name}: it needs {need}, and {shown} will not have any. To fix this, "
                    f"{NEEDS[need]}. In a pool's YAML, `members` are an expert's data."
                )


def _will_have_gates(job: TrainJob, registry: Registry, recipe: Recipe) -> bool:
    spec = job.tasks[0]
    if spec.source == "registry":
        expert = registry.load(registry.find(spec.name))
        return all(factors.gate_D is not None for factors in expert.linears.values())
    return recipe.gates is not None and bool(spec.members)


def _card(recipe: Recipe, base: Base, name: str, data: str) -> Card:
    """Return the card of an expert to train."""
    values = recipe.identity()
    determines = {
        "version": _FORMAT,
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
    """Return the job of an imported expert. Its gates are trained if there is data for them.

    Without gates, its job is that of the import alone, and the same for every import.
    """
    assert data.spec.adapter is not None
    folder = adapter_folder(data.spec.adapter)
    imported = Expert.from_peft(folder, base=base, name=data.spec.name).card
    card = imported
    if data.spec.members and recipe.gates is not None:
        # The settings that made the factors are not those of this recipe.
        ours = recipe.identity()
        for other in ("rank", "scale", "init_std", "lora"):
            del ours[other]
        determines = {"adapter": imported.job, "data": data.fingerprint, "recipe": ours}
        job = _digest({"version": _FORMAT, **determines})
        card = replace(imported, job=job, recipe={**imported.recipe, **ours})
    card = replace(card, data_fingerprint=data.fingerprint)
    return TrainJob(card, (data.spec,), recipe, imported=imported.job)


def _digest(determines: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()[:32]
