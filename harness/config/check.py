"""Check a run's configuration without data: values, names, and consistency."""

import re
from pathlib import Path

from harness.config.schema import OF_POOL, OF_POOL_TOO, STAGES, TOO_LONG, RunConfig
from harness.extra_routers import MULTITASK, Multitask
from phatgoose.errors import PhatgooseError, check_known
from phatgoose.ops.frozen_linear import library
from phatgoose.ops.mixing import wanted_way
from phatgoose.routers import all_needs


def check_values(config: RunConfig) -> None:
    """Raise PhatgooseError for the first invalid value, with its fix."""
    for stage in config.stages:
        check_known(stage, STAGES, f"stages: no stage {stage!r}")
    for key, folder in (("run.dir", config.run.dir), ("registry", config.registry)):
        if "://" not in folder and not Path(folder).is_absolute():
            raise PhatgooseError(
                f"{key}={folder}: the path is relative, and a submitted job runs in a temporary "
                "folder. Give an absolute path or a URI."
            )
    for key, tokens in (
        ("chunk_tokens", config.chunk_tokens),
        ("shard_tokens", config.shard_tokens),
    ):
        if tokens is not None and tokens < 1:
            raise PhatgooseError(f"{key}={tokens}: it must be positive")
    if config.cluster.max_actors is not None and config.cluster.max_actors < 1:
        raise PhatgooseError(f"cluster.max_actors={config.cluster.max_actors}: it must be positive")
    # An error of the environment here is better than one on every actor.
    library()
    wanted_way()
    _check_cluster(config)
    _check_ranks(config)
    for key, group in (("pool", config.pool), *(("suite", suite) for suite in config.suites)):
        name, tasks = group.get("name"), group.get("tasks", {})
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name):
            raise PhatgooseError(
                f"{key}.name={name}: invalid name. Use letters, digits, _, . and -."
            )
        if not isinstance(tasks, dict):
            raise PhatgooseError(
                f"{key}.tasks={tasks}: not a mapping. Name tasks as `name: {{members: [...]}}`."
            )
    for key in ("limit", "split", "max_new_tokens", "too_long"):
        if key in config.pool:
            raise PhatgooseError(f"pool.{key}: this is an evaluation option. Set it in a suite.")
    for suite in config.suites:
        too_long = str(suite.get("too_long", TOO_LONG[0]))
        check_known(too_long, TOO_LONG, f"suite.too_long={too_long}: no such choice")
    names = [suite["name"] for suite in config.suites]
    if len({*names}) < len(names):
        raise PhatgooseError(f"suite=[{', '.join(names)}]: names repeat. Give each its own name.")
    for suite in config.suites:
        for key in suite if suite.get("of_pool") else ():
            check_known(key, [*OF_POOL, *OF_POOL_TOO], f"suite.{key}: no such key of this suite")
    experts = [task.name for task in config.pool_tasks()]
    for task in [task for suite in config.suites for task in config.suite_tasks(suite)]:
        if task.adapter or task.source == "registry":
            raise PhatgooseError(
                f"suite task {task.name}: experts belong in a pool, not in a suite"
            )
    if MULTITASK in experts:
        raise PhatgooseError(
            f"pool.tasks.{MULTITASK}: the name is reserved for the multitask expert"
        )
    _ = config.multitask_recipe  # raises if its steps are not a number
    for router in config.routers(experts).values():
        if not isinstance(router, Multitask):
            router.check_experts(experts)
        if "gates" in all_needs(router) and config.train.gates is None:
            raise PhatgooseError(f"router {router.name()} needs gates, and train.gates is null")
    singles = (config.router.get("single") or {}).get("experts", [])
    if not isinstance(singles, list):
        raise PhatgooseError(
            f"router.single.experts={singles}: not a list. Give one, such as [{singles}]."
        )
    for expert in singles:
        check_known(expert, experts, f"router single:{expert}: the pool has no such expert")


def _check_cluster(config: RunConfig) -> None:
    cores, gpus = config.cluster.cpus_per_actor, config.cluster.gpus_per_actor
    if not cores > 0:
        raise PhatgooseError(f"cluster.cpus_per_actor={cores:g}: it must be positive")
    if gpus is not None and not (0 <= gpus <= 1 or gpus == round(gpus) > 0):
        raise PhatgooseError(
            f"cluster.gpus_per_actor={gpus:g}: it must be 0, a fraction of a GPU, or a whole number"
        )
    for key, least in (("lease_seconds", 30), ("wait_seconds", 0), ("checkpoint_seconds", 1)):
        value = getattr(config.cluster, key)
        if not value >= least:  # also catches NaN
            raise PhatgooseError(f"cluster.{key}={value:g}: it must be at least {least}")


def _check_ranks(config: RunConfig) -> None:
    ranks, recipe, gpus = config.ranks.ranks_per_expert, config.train, config.ranks.gpus_per_expert
    if ranks < 1:
        raise PhatgooseError(f"train.ranks_per_expert={ranks}: it must be at least 1")
    if config.ranks.zero_stage not in range(4):
        raise PhatgooseError(f"train.zero_stage={config.ranks.zero_stage}: it must be 0, 1, 2 or 3")
    if recipe.accumulation % ranks:
        raise PhatgooseError(
            f"train.ranks_per_expert={ranks}: it must divide the {recipe.accumulation} "
            f"micro-batches of a batch (train.batch_size={recipe.batch_size} over "
            f"train.micro_batch_size={recipe.micro_batch_size})"
        )
    if gpus is not None and (gpus < 0 or (ranks > 1 and gpus not in (0, ranks))):
        raise PhatgooseError(
            f"train.gpus_per_expert={gpus:g}: with train.ranks_per_expert={ranks} it must be 0 or "
            f"{ranks}. Only a single rank may take a fraction."
        )
    if ranks > 1 and gpus is None and config.cluster.gpus_per_actor not in (None, 0, 1):
        raise PhatgooseError(
            f"cluster.gpus_per_actor={config.cluster.gpus_per_actor:g}: each of several ranks "
            f"takes one GPU or none. Set train.gpus_per_expert={ranks}."
        )
