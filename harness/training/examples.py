"""The training examples and the evaluation examples of a job."""

import itertools
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from harness.tasks.records import Record
from harness.tasks.store import read_records
from harness.tasks.tokens import tokenize
from phatgoose.base import Base
from phatgoose.training.recipe import Recipe
from phatgoose.training.train import Example, Examples

if TYPE_CHECKING:
    from harness.tasks import TaskData


def job_examples(
    base: Base,
    data: "Sequence[TaskData]",
    recipe: Recipe,
    steps: int,
    beat: Callable[[], None] = lambda: None,
) -> tuple[Examples, Examples]:
    """Return the training and the evaluation examples of a job over these tasks.

    A job that reads every training example gets them as token ids from the cache. A job that reads
    only a part encodes them during training. Several tasks contribute at most an equal share of the
    recipe's `max_examples` each.
    """
    evaluation = [read_records(d.evaluation, recipe.evaluation_examples) for d in data]
    if len(data) > 1:
        share = max(1, recipe.max_examples // len(data))
        train = [read_records(d.train, share) for d in data]
        return _mixed(train, recipe.seed), _in_turn(evaluation)
    if steps * recipe.batch_size >= data[0].counts["train"]:
        train_tokens = tokenize(base, data[0], "train", recipe, beat)
        return train_tokens, _in_turn(evaluation)
    records = read_records(data[0].train, recipe.max_examples)
    return list(map(to_example, records)), _in_turn(evaluation)


def _mixed(tasks: Sequence[Sequence[Record]], seed: int) -> list[Example]:
    """Return the examples of all tasks; shuffle several tasks, so that all are mixed evenly."""
    examples = [to_example(record) for records in tasks for record in records]
    if len(tasks) > 1:
        random.Random(seed).shuffle(examples)
    return examples


def _in_turn(tasks: Sequence[Sequence[Record]]) -> list[Example]:
    """Return one example of each task in turn, until all tasks are used up."""
    rounds = itertools.zip_longest(*tasks)
    return [to_example(r) for records in rounds for r in records if r is not None]


def to_example(record: Record) -> Example:
    """Return a record as a training example, with its first target."""
    return Example(record.input, record.targets[0], tuple(record.choices))
