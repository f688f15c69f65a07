"""How much work a plan is, and about how long it takes on one core of this machine."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from harness.journal import Request, cut
from harness.tasks import TaskData
from harness.tasks.lm_eval_tasks import evaluation_table

# Of what a processor does in a large product, what short texts get.
_EFFICIENCY = 0.5
_CHARACTERS_PER_TOKEN = 4


@dataclass(frozen=True)
class EvaluationWork:
    """What one router has to answer: requests, the chunks they are cut into, and their text."""

    requests: int
    chunks: int
    characters: int


def evaluation_work(tasks: Sequence[TaskData], chunk_characters: int) -> EvaluationWork:
    """The work of one router: a request per document."""
    requests = chunks = characters = 0
    for data in tasks:
        asked = [
            Request(row["input"], tuple(row["choices"] or row["targets"][:1]))
            for row in evaluation_table(data).to_pylist()
        ]
        requests += len(asked)
        chunks += len(cut(data.name, "score", asked, chunk_characters))
        characters += sum(request.characters for request in asked)
    return EvaluationWork(requests, chunks, characters)


def train_seconds(characters: float, parameters: int) -> float:
    """About how long one core trains on texts of so many characters, all steps together."""
    # Forward, and backward through the activations: two operations per parameter each.
    return _seconds(characters, 4 * parameters)


def evaluate_seconds(work: EvaluationWork, routers: int, parameters: int) -> float:
    """About how long one core answers all requests under each router."""
    return _seconds(routers * work.characters, 2 * parameters)


def _seconds(characters: float, operations_per_token: float) -> float:
    tokens = characters / _CHARACTERS_PER_TOKEN
    return tokens * operations_per_token / (_EFFICIENCY * _operations_per_second())


def _operations_per_second() -> float:
    """Floating-point operations per second of one core, from a short product."""
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
