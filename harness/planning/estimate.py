"""Estimate the work of a plan, and the time that it takes on one core of this machine."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harness.tasks import TaskData
from harness.tasks.lm_eval_tasks import evaluation_table
from harness.tasks.store import read_records
from harness.training.job import TrainJob
from phatgoose.base import Base
from phatgoose.tokenization import encode_pairs
from phatgoose.training.recipe import Recipe

# The share of a processor's speed in large products that short texts reach.
_EFFICIENCY = 0.5
_CHARACTERS_PER_TOKEN = 4
# The number of examples of a task that are read to estimate their length.
_SAMPLE = 64


@dataclass(frozen=True)
class EvaluationWork:
    """The work of one router: the number of requests, and of their characters."""

    requests: int
    characters: int


def evaluation_work(tasks: Sequence[TaskData]) -> EvaluationWork:
    """Return the work of one router, with one request per document."""
    requests = characters = 0
    for data in tasks:
        for row in evaluation_table(data).to_pylist():
            requests += 1
            choices = row["choices"] or row["targets"][:1]
            characters += len(row["input"]) + sum(map(len, choices))
    return EvaluationWork(requests, characters)


def training_tokens(
    base: Base, jobs: Sequence[TrainJob], pool: Sequence[TaskData]
) -> dict[str, int]:
    """Estimate the number of tokens that each job trains on in all its steps, by job id.

    The estimate uses the first examples of each task. Examples are in the order of a hash.
    """
    recipes = {spec.name: job.recipe for job in jobs for spec in job.tasks}
    mean = {data.name: _tokens_per_example(base, data, recipes[data.name]) for data in pool}
    return {
        job.card.job: round(
            job.recipe.batch_size
            * job.steps
            * statistics.fmean(mean[spec.name] for spec in job.tasks)
        )
        for job in jobs
    }


def _tokens_per_example(base: Base, data: TaskData, recipe: Recipe) -> float:
    records = read_records(data.train, _SAMPLE) if data.counts["train"] else []
    if not records:
        return 0.0
    pairs = [(record.input, record.targets[0]) for record in records]
    limits = recipe.max_input_tokens, recipe.max_target_tokens
    names = [f"task {data.name}, document {record.document}" for record in records]
    encoded = encode_pairs(base, pairs, *limits, names=names)
    return statistics.fmean(len(context) + len(target) for context, target in encoded)


def train_seconds(tokens: float, parameters: int) -> float:
    """Estimate the time in which one core trains on this many tokens, in all steps together."""
    # Forward, and backward through the activations: two operations per parameter each.
    return _seconds(tokens, 4 * parameters)


def evaluate_seconds(work: EvaluationWork, routers: int, parameters: int) -> float:
    """Estimate the time in which one core answers all requests under each router."""
    return _seconds(routers * work.characters / _CHARACTERS_PER_TOKEN, 2 * parameters)


def _seconds(tokens: float, operations_per_token: float) -> float:
    return tokens * operations_per_token / (_EFFICIENCY * _operations_per_second())


def _operations_per_second() -> float:
    """Measure the floating-point operations per second of one core, with a short product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        matrix = torch.ones(1024, 1024)
        matrix @ matrix
        started = time.perf_counter()
        matrix @ matrix
        return 2 * 1024**3 / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(threads)
