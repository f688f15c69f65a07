"""One expert to be made, and what a training actor computes to make it.

What is not computing, such as Ray, checkpoints and ranks, is in
`harness.training.actor`: the code of this module is part of what identifies an expert.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.tasks import TaskData, TaskSpec
from harness.training.examples import job_examples
from phatgoose.base import Base
from phatgoose.card import Card
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.training.recipe import Recipe
from phatgoose.training.train import Hooks, train_expert, train_gates


@dataclass(frozen=True)
class TrainJob:
    """One expert to be made: its card without metrics, and the tasks it is made for.

    Attributes:
        card: what it will say of itself.
        tasks: one; all of the pool's for the multitask expert.
        recipe: how to train it.
        profile_id: in which way its profile is to be measured; None if it gets none.
        imported: the id of the import that the task's adapter must be, if it has one.
    """

    card: Card
    tasks: tuple[TaskSpec, ...]
    recipe: Recipe
    profile_id: str | None = None
    imported: str | None = None

    @property
    def steps(self) -> int:
        """Optimiser steps that it takes: of the gates alone for an adapter, if there is data."""
        if self.imported is None:
            return self.recipe.steps
        gates = self.recipe.gates if self.tasks[0].members else None
        return 0 if gates is None else gates.steps


def make_expert(
    base: Base,
    job: TrainJob,
    data: Callable[[], Sequence[TaskData]],
    hooks: Hooks,
) -> Expert:
    """Make the expert of a job.

    Args:
        base: the base.
        job: what to make.
        data: returns the data of its tasks; not called for an adapter that is not trained.
        hooks: what the training calls.
    """
    imported = None if job.imported is None else _import(base, job)
    if imported is not None and not job.steps:
        return imported  # an adapter without data is published as it is
    train, evaluation = job_examples(base, data(), job.recipe, job.steps, hooks.heartbeat)
    if imported is None:
        return train_expert(base, job.card, train, evaluation, job.recipe, hooks)
    return train_gates(base, imported, train, evaluation, job.recipe, hooks)


def data_fingerprint(data: Sequence[TaskData]) -> str:
    """What identifies the data of one task or of several."""
    if len(data) == 1:
        return data[0].fingerprint
    return hashlib.sha256("".join(item.fingerprint for item in data).encode()).hexdigest()


def _import(base: Base, job: TrainJob) -> Expert:
    """The expert of the job's adapter, which must be that of the plan."""
    adapter = job.tasks[0].adapter
    assert adapter is not None
    expert = Expert.from_peft(adapter, base=base, name=job.card.name)
    if expert.card.job != job.imported:
        raise PhatgooseError(
            f"expert {job.card.name}: the adapter {adapter} on this node is not the one that "
            "the plan was made with: put the same files on every node, and start again"
        )
    return Expert(job.card, expert.linears)
