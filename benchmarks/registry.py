"""Measure who works how long to publish an expert that a training actor has trained.

    python -m benchmarks.registry [--mebibytes 139] [--rounds 5]

A real training stage publishes random experts of the size of T5-XL's at rank 16, which a real actor
hands over. The baseline is an actor that does not see the registry's folder, so that the registry
actor hashes and writes the expert. `registry actor` is the time its methods take; Ray fetches their
arguments before. `driver` is the time for which the driver waits for it.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch

from benchmarks.figures import Figure, compare, print_table
from harness.registry import Registry, client
from harness.registry.client import RegistryClient, opened_access
from harness.registry.files import Record
from harness.scheduling.progress import StageProgress
from harness.scheduling.ray_internals import local_ray
from harness.scheduling.workers import Workers
from harness.storage import Folder
from harness.tasks import TaskSpec
from harness.training.actor import Trained, hand_over
from harness.training.job import TrainJob
from harness.training.job_table import JobTable
from harness.training.stage import Training
from phatgoose.card import Card, LoraFactors
from phatgoose.expert import Expert
from phatgoose.training.recipe import Recipe, Stage

_BASE = "0" * 64
_LINEARS, _RANK = 432, 16
_WAYS = ("directly", "through the registry actor")
_Rounds = dict[str, list[float]]


class Timed(Registry):
    """A registry that counts the seconds of its methods that publish."""

    seconds = 0.0

    def publish(self, expert: Expert, **options: Any) -> str:
        """Publish an expert."""
        return self._timed(lambda: super(Timed, self).publish(expert, **options))

    def put_record(self, job: str, record: Record) -> Record | None:
        """Record an object."""
        return self._timed(lambda: super(Timed, self).put_record(job, record))

    def _timed(self, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = call()
        self.seconds += time.perf_counter() - started
        return result

    def take_seconds(self) -> float:
        """Return the seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class Trainer:
    """A training actor with a random expert."""

    def __init__(self, mebibytes: int) -> None:
        self._sizes = mebibytes * 2**20 // (_LINEARS * 4 * (2 * _RANK + 1))

    def train(self, number: int, given: RegistryClient, sees: bool) -> tuple[Trained, float]:
        """Hand over a new expert; return the result and the seconds it took."""
        generator = torch.Generator().manual_seed(number)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        size = self._sizes
        linears = {
            f"linear-{index}": LoraFactors(random(_RANK, size), random(size, _RANK), random(size))
            for index in range(_LINEARS)
        }
        own = job(number)
        expert = Expert(own.card, linears)
        client._UNSEEN.clear()
        if not sees:
            client._UNSEEN.add(given.access.token)
        started = time.perf_counter()
        trained = hand_over(given, own, expert, [])
        return trained, time.perf_counter() - started


def job(number: int) -> TrainJob:
    """Return a training job."""
    name = f"expert-{number}"
    card = Card(name, name, "none", _BASE, "0" * 64, f"{number:016x}", 1.0, {}, {})
    stage = Stage(steps=1, lr=0.1)
    recipe = Recipe(rank=_RANK, scale=1.0, lora=stage, gates=None, batch_size=1, micro_batch_size=1)
    return TrainJob(card, (TaskSpec(name, (name,)),), recipe)


def measure(threads: int = 2, rounds: int = 5, mebibytes: int = 139) -> list[Figure]:
    """Return the seconds of the registry actor, the driver and the training actor per expert."""
    del threads  # hashing and writing have one
    quiet = {"log_to_driver": False, "configure_logging": False, "namespace": "phatgoose"}
    with tempfile.TemporaryDirectory() as folder, local_ray(3, 2 * 2**30, **quiet):
        found = _measure(Path(folder), rounds, mebibytes)
    figures = []
    for who, target in (("registry actor", 0.05), ("driver", 0.05), ("training actor", None)):
        ours, baseline = (found[f"{who} {way}"] for way in _WAYS)
        figure = compare(
            f"publishing {mebibytes} MiB: {who}",
            zip(ours, baseline, strict=True),
            note="seconds" + (f", target {target}: twenty a second" if target else ""),
        )
        figures.append(figure)
    ours, baseline = (found[f"processor {way}"] for way in _WAYS)
    figures.append(
        compare(
            f"publishing {mebibytes} MiB: driver's processor",
            zip(ours, baseline, strict=True),
            note="seconds",
        )
    )
    return figures


def _measure(path: Path, rounds: int, mebibytes: int) -> _Rounds:
    folder = Folder(path / "run")
    registry: Any = ray.remote(Timed).remote(path / "registry", _BASE)
    trainer: Any = ray.remote(Trainer).remote(mebibytes)
    workers = Workers(lambda: None, lambda: 0)
    found: _Rounds = {}
    with (
        opened_access(registry) as given,
        StageProgress(folder, "train", 1, "token", 1) as progress,
    ):
        training = Training([], folder, workers, registry, JobTable(folder, [], {}, {}), progress)
        for number in range(2 * (rounds + 1)):
            way = _WAYS[number % 2]
            trained, seconds = ray.get(trainer.train.remote(number, given, number % 2 == 0))
            busy, started = time.process_time(), time.perf_counter()
            training._publish(job(number), trained)
            waited, busy = time.perf_counter() - started, time.process_time() - busy
            took = ray.get(registry.take_seconds.remote())
            del trained
            if number < 2:
                continue  # what is slow only once does not count
            for who, value in (
                ("registry actor", took),
                ("driver", waited),
                ("training actor", seconds),
                ("processor", busy),
            ):
                found.setdefault(f"{who} {way}", []).append(value)
            (
                path / "registry" / "objects" / f"{training.experts[f'expert-{number}']}.arrow"
            ).unlink()
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mebibytes", type=int, default=139)
    parser.add_argument("--rounds", type=int, default=5)
    print_table(measure(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
