"""A run's configuration: what the YAML groups in `conf/` become."""

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
# Entries of `router` that stand for single experts.
_OF_SINGLES = ("single", *DERIVED)
# Keys of a suite that takes the pool's tasks, and what else it may say of them.
OF_POOL = ("name", "of_pool", "too_long")
# What to do with a prompt that is longer than the base's positions: `suite.too_long`.
TOO_LONG = ("cut", "refuse")
OF_POOL_TOO = ("limit", "max_new_tokens", "metric", "style")


@dataclass
class RanksConfig:
    """How many processes train one expert, and on what: no part of what determines the expert.

    Attributes:
        ranks_per_expert: processes that train one expert together.
        zero_stage: what ZeRO partitions among them, from 0, nothing, to 3, the base's weights too.
        gpus_per_expert: for all ranks together; None: one per rank where the cluster has GPUs.
    """

    ranks_per_expert: int = 1
    zero_stage: int = 0
    gpus_per_expert: float | None = None

    def gpus_per_rank(self, cluster: ClusterConfig) -> float | None:
        """How many GPUs each rank takes; None: one where there are any."""
        if self.gpus_per_expert is None:
            return cluster.gpus_per_actor
        return self.gpus_per_expert / self.ranks_per_expert


@dataclass
class OverlapConfig:
    """How much of a suite task may stand in an expert's training data: a share of its documents."""

    limit: float = 0.05

    def __post_init__(self) -> None:
        """Refuse a limit that is not a share."""
        if not 0 <= self.limit <= 1:
            raise PhatgooseError(
                f"overlap.limit={self.limit}: it is a share of the documents. Give one from 0 to 1."
            )


@dataclass
class RunSection:
    """Where the run's files go."""

    dir: str


@dataclass
class RunConfig:
    """A whole run, as `conf/config.yaml` and its groups describe it.

    `accept_code` stands under `train` there: whether experts and profiles that other source code
    made are used.
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
    chunk_characters: int = 4000
    accept_code: bool = False
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)

    def pool_tasks(self) -> list[TaskSpec]:
        """The pool's tasks: one expert each."""
        return task_specs(self.pool)

    def suite_tasks(self, suite: Mapping[str, Any]) -> list[TaskSpec]:
        """A suite's tasks; with `of_pool`, those of the pool, on their own evaluation splits."""
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
        """The routers to evaluate, by the name they have in results.

        `oracle` and `best_individual` stand for a single router per expert; their own rows are
        derived from theirs. An entry's `kind` is the router that it is a variant of.
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
        """How to train the expert of the router `multitask`; None if there is no such router."""
        if MULTITASK not in self.router:
            return None
        steps = (self.router[MULTITASK] or {}).get("steps")
        if steps is None:
            steps = len(self.pool_tasks()) * self.train.lora.steps
        if not isinstance(steps, int):
            raise PhatgooseError(f"router.multitask.steps={steps}: not a whole number")
        return replace(self.train, lora=replace(self.train.lora, steps=steps), gates=None)
