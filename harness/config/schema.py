"""The schema of a run's configuration, composed from the YAML groups in `conf/`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from harness.extra_routers import DERIVED, MULTITASK, Multitask
from harness.scheduling.settings import BaseConfig, ClusterConfig
from harness.tasks import TaskSpec, task_specs
from phatgoose.errors import PhatgooseError
from phatgoose.profile import ProfileConfig
from phatgoose.routers import Router, make_router
from phatgoose.training.recipe import Recipe

STAGES = ("train", "evaluate", "report")
# Entries of `router` that evaluate single experts.
_OF_SINGLES = ("single", *DERIVED)
# Keys of a suite that evaluates the pool's tasks. `OF_POOL_TOO` are fields that it may override.
OF_POOL = ("name", "of_pool", "too_long")
# What to do with a prompt that is longer than the base's positions: `suite.too_long`.
TOO_LONG = ("cut", "refuse")
OF_POOL_TOO = ("limit", "max_new_tokens", "metric", "style")


@dataclass
class RanksConfig:
    """Processes and GPUs that train one expert. They are not part of the expert's identity.

    Attributes:
        ranks_per_expert: number of processes that train one expert together.
        zero_stage: what ZeRO partitions among them, from 0 (nothing) to 3 (the base's weights too).
        gpus_per_expert: GPUs for all ranks together; None: one per rank if the cluster has GPUs.
    """

    ranks_per_expert: int = 1
    zero_stage: int = 0
    gpus_per_expert: float | None = None

    def gpus_per_rank(self, cluster: ClusterConfig) -> float | None:
        """Return the number of GPUs per rank; None means one if there are any."""
        if self.gpus_per_expert is None:
            return cluster.gpus_per_actor
        return self.gpus_per_expert / self.ranks_per_expert


@dataclass
class OverlapConfig:
    """The share of a suite task's documents that may occur in an expert's training data."""

    limit: float = 0.05

    def __post_init__(self) -> None:
        """Raise PhatgooseError if the limit is not a share."""
        if not 0 <= self.limit <= 1:
            raise PhatgooseError(
                f"overlap.limit={self.limit}: not a share of the documents. Give one from 0 to 1."
            )


@dataclass
class RunSection:
    """The location of the run's files."""

    dir: str


@dataclass
class RunConfig:
    """The configuration of a run, as `conf/config.yaml` and its groups describe it.

    `accept_code` is set under `train` there. It allows experts and profiles that were made by
    different source code.
    """

    base: BaseConfig
    pool: dict[str, Any]
    suites: list[dict[str, Any]]
    router: dict[str, Any]
    train: Recipe
    profile: ProfileConfig
    cluster: ClusterConfig
    run: RunSection
    registry: str
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    chunk_tokens: int | None = None
    shard_tokens: int = 65536
    accept_code: bool = False
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)

    def pool_tasks(self) -> list[TaskSpec]:
        """Return the pool's tasks, one per expert."""
        return task_specs(self.pool)

    def suite_tasks(self, suite: Mapping[str, Any]) -> list[TaskSpec]:
        """Return a suite's tasks; with `of_pool`, the pool's tasks on their evaluation splits."""
        if not suite.get("of_pool"):
            return task_specs(suite)
        changes = {
            key: value
            for key, value in suite.items()
            if key in OF_POOL_TOO and (value is not None or key == "limit")
        }
        own = [spec for spec in self.pool_tasks() if spec.has_data]
        if not own:
            raise PhatgooseError(f"suite {suite['name']}: no task of the pool has data")
        return [replace(spec, adapter=None, split="evaluation", **changes) for spec in own]

    def routers(self, experts: Sequence[str]) -> dict[str, Router]:
        """Return the routers to evaluate by their name in results.

        `oracle` and `best_individual` add one single-expert router per expert. Their own rows are
        derived from the rows of these routers. An entry's `kind` is the router it is a variant of.
        """
        routers: dict[str, Router] = {}
        for name, entry in self.router.items():
            options = dict(entry or {})
            if name in _OF_SINGLES:
                for expert in options.get("experts") or experts:
                    routers.setdefault(f"single:{expert}", make_router(f"single:{expert}"))
            elif name == MULTITASK:
                routers[name] = Multitask(MULTITASK)
            else:
                routers[name] = make_router(options.pop("kind", name), **options)
        return routers

    @property
    def multitask_recipe(self) -> Recipe | None:
        """The recipe of the expert of the router `multitask`; None if there is no such router."""
        if MULTITASK not in self.router:
            return None
        steps = (self.router[MULTITASK] or {}).get("steps")
        if steps is None:
            steps = len(self.pool_tasks()) * self.train.lora.steps
        if not isinstance(steps, int):
            raise PhatgooseError(f"router.multitask.steps={steps}: not a whole number")
        return replace(self.train, lora=replace(self.train.lora, steps=steps), gates=None)
