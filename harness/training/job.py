"""One expert to make, and the computation that makes it.

Ray, checkpoints and ranks are in `harness.training.actor`, because the code of this module is part
of what identifies an expert.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.tasks import TaskData, TaskSpec
from harness.tasks.adapters import adapter_folder
from harness.training.examples import job_examples
from phatgoose.base import Base
from phatgoose.card import Card
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.training.recipe import Recipe
from phatgoose.training.train import Hooks, train_expert, train_gates


@dataclass(frozen=True)
class TrainJob:
    """One expert to make: its card, its tasks, and its recipe.

    Attributes:
        card: the expert's card, without metrics.
        tasks: one task; all tasks of the pool for the multitask expert.
        recipe: how to train the expert.
        profile_id: identifies how its profile is measured; None if it gets no profile.
        imported: the id that the import of the task's adapter must have; None without an adapter.
    """

    card: Card
    tasks: tuple[TaskSpec, ...]
    recipe: Recipe
    profile_id: str | None = None
    imported: str | None = None

    @property
    def steps(self) -> int:
        """The number of optimizer steps; for an adapter, those of the gates if there is data."""
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
        job: the expert to make.
        data: returns the data of its tasks. It is not called for an adapter that is not trained.
        hooks: the callbacks of the training.
    """
    imported = None if job.imported is None else _import(base, job)
    if imported is not None and not job.steps:
        return imported  # an adapter without data is published unchanged
    train, evaluation = job_examples(base, data(), job.recipe, job.steps, hooks.heartbeat)
    if imported is None:
        return train_expert(base, job.card, train, evaluation, job.recipe, hooks)
    return train_gates(base, imported, train, evaluation, job.recipe, hooks)


def data_fingerprint(data: Sequence[TaskData]) -> str:
    """Return a fingerprint of the data of one task or of several."""
    if len(data) == 1:
        return data[0].fingerprint
    return hashlib.sha256("".join(item.fingerprint for item in data).encode()).hexdigest()


def _import(base: Base, job: TrainJob) -> Expert:
    """Import the job's adapter, and check that it is the plan's."""
    adapter = job.tasks[0].adapter
    assert adapter is not None
    expert = Expert.from_peft(adapter_folder(adapter), base=base, name=job.card.name)
    if expert.card.job != job.imported:
        raise PhatgooseError(
            f"expert {job.card.name}: the adapter {adapter} on this node is not the one that "
            "the plan was made with. Put the same files on every node, and run the same command "
            "again."
        )
    return Expert(job.card, expert.linears)
