"""The actor that trains experts: one job after the other, over one base."""

from dataclasses import asdict, dataclass
from typing import Any

import ray
import torch

from harness.cluster import log_to_run_folder
from harness.config import BaseConfig
from harness.tasks import TaskSpec, prepare
from harness.tasks.records import Record, read_records
from phatgoose.base import load_base
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Card
from phatgoose.recipe import Recipe, recipe_from_dict
from phatgoose.training import Example, Progress, train_expert


@dataclass(frozen=True)
class TrainJob:
    """One expert to be trained: its card without metrics, and its task."""

    card: Card
    task: TaskSpec

    @property
    def recipe(self) -> Recipe:
        """How to train it."""
        return recipe_from_dict(self.card.recipe)


class TrainActor:
    """Trains experts in a process of its own.

    Args:
        base: which base to load.
        fingerprint: what it must be.
        run_dir: where to write the log.
    """

    def __init__(self, base: BaseConfig, fingerprint: str, run_dir: str) -> None:
        log_to_run_folder(run_dir, "train")
        from harness.deepspeed_engine import DeepSpeedEngine, start_deepspeed  # slow to import

        start_deepspeed()
        self._engine = DeepSpeedEngine
        self._base = load_base_on_actor(base, fingerprint)
        self._steps = 0

    def train(self, job: TrainJob) -> tuple[list[dict[str, Any]], ray.ObjectRef]:
        """Train one expert; returns its training curve and a reference to the expert."""
        data = prepare(job.task)
        if data.fingerprint != job.card.data_fingerprint:
            raise PhatgooseError(
                f"task {job.task.name}: the data on this node is {data.fingerprint[:12]}, the plan "
                f"was made with {job.card.data_fingerprint[:12]}: empty the cache on the one that "
                "is out of date"
            )
        rows: list[dict[str, Any]] = []
        self._steps = 0

        def report(progress: Progress) -> None:
            rows.append({"expert": job.card.name, "job": job.card.job, **asdict(progress)})
            self._steps += progress.split == "train"

        print(f"training {job.card.name} (job {job.card.job})", flush=True)
        expert = train_expert(
            self._base,
            job.card,
            _examples(read_records(data.train)),
            _examples(read_records(data.evaluation)),
            job.recipe,
            engine=self._engine,
            report=report,
        )
        print(f"trained {job.card.name}: {expert.card.metrics}", flush=True)
        self._steps = 0
        return rows, ray.put(expert)

    def steps(self) -> int:
        """Optimiser steps done of the job under way."""
        return self._steps


def load_base_on_actor(config: BaseConfig, fingerprint: str) -> Any:
    """Load the base on the device that Ray gave this actor, and check that it is the plan's."""
    cores = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    torch.set_num_threads(max(1, int(cores)))
    base = load_base(
        config.name,
        dtype=config.dtype,
        device="cuda" if ray.get_gpu_ids() else "cpu",
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
    )
    if base.fingerprint != fingerprint:
        raise PhatgooseError(
            f"base {config.name} on this node is {base.fingerprint[:12]}, the plan was made with "
            f"{fingerprint[:12]}: put the same files on every node"
        )
    return base


def _examples(records: list[Record]) -> list[Example]:
    return [Example(record.input, record.targets[0]) for record in records]
