"""Measure the harness's overhead per job: jobs that wait instead of compute, on simulated nodes.

    python -m benchmarks.scheduler --nodes 1 2 4 --jobs 1000 10000 --wait 0.1

Everything around the training is real: a Ray cluster with that many worker nodes (on this machine),
the scheduler, the job table, the progress file, the training curves, and the registry actor with
its objects, records and manifests. Only the training itself is replaced by a wait of that many
seconds, so that more actors than cores can run. The floor, the baseline of every ratio, is
jobs * wait / actors.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import ray
import torch
from ray.cluster_utils import Cluster as Nodes

from harness.registry import Registry
from harness.registry.actor import registry_actor
from harness.registry.client import RegistryClient, opened_access
from harness.scheduling.actor import Actor, code_version
from harness.scheduling.cluster import actor_options, room
from harness.scheduling.progress import StageProgress
from harness.scheduling.ray_internals import loopback_only
from harness.scheduling.settings import ClusterConfig
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
_CORES = 4  # per simulated node
_STEPS = 10  # per job; each step adds a row to its training curve
_ROWS = ("jobs", "nodes", "actors", "seconds", "of floor", "ms/job", "driver ms/job", "driver MiB")


class Waiter(Actor):
    """An actor that waits instead of training, and returns an expert of random numbers."""

    def __init__(self, seconds: float) -> None:
        super().__init__(code_version())
        self._seconds = seconds

    def train(self, job: TrainJob, client: RegistryClient) -> Trained:
        """Wait, and return a result like that of `TrainActor.train`."""
        time.sleep(self._seconds)
        self._done += 1
        generator = torch.Generator().manual_seed(int(job.card.job[:8], 16))
        factors = LoraFactors(
            torch.randn(1, 8, generator=generator),
            torch.randn(8, 1, generator=generator),
            torch.randn(8, generator=generator),
        )
        curve = {"exact_match": None, "lr": 0.1, "tokens": 1, "seconds": self._seconds}
        names = {"expert": job.card.name, "job": job.card.job, "stage": "lora"}
        rows = [
            {**names, **curve, "split": "train", "step": step, "loss": 1.0}
            for step in range(_STEPS)
        ]
        rows += [
            {**names, **curve, "split": "evaluation", "step": step, "loss": 1.0}
            for step in (0, _STEPS)
        ]
        return hand_over(client, job, Expert(job.card, {"linear": factors}), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one row per combination of nodes and jobs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--jobs", type=int, nargs="+", default=[1000])
    parser.add_argument("--wait", type=float, default=0.1, help="seconds per job")
    args = parser.parse_args(arguments)
    print("  ".join(f"{name:>13}" for name in _ROWS))
    for nodes in args.nodes:
        with simulated(nodes), tempfile.TemporaryDirectory() as folder:
            for count in args.jobs:
                measure(Path(folder) / str(count), count, nodes, args.wait)


@contextmanager
def simulated(nodes: int) -> Iterator[None]:
    """Start a head node without cores, and worker nodes with simulated cores."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    common = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}
    head = {**common, "num_cpus": 0, "include_dashboard": False}
    with loopback_only():
        cluster = Nodes(initialize_head=True, head_node_args=head)
        try:
            for _ in range(nodes):
                cluster.add_node(num_cpus=_CORES, **common)
            ray.init(address=cluster.address, namespace="phatgoose", log_to_driver=False)
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


def measure(path: Path, count: int, nodes: int, wait: float) -> None:
    """Run `count` jobs, and print the time they took beyond waiting."""
    folder, process = Folder(path), psutil.Process()
    jobs = [job(index) for index in range(count)]
    tokens = dict.fromkeys((job.card.job for job in jobs), _STEPS)
    options = actor_options(ClusterConfig(gpus_per_actor=0), {})
    remote = ray.remote(Waiter).options(**options, max_concurrency=2)
    workers = Workers(lambda: remote.remote(wait), lambda: room(options))
    registry = registry_actor(path / "registry", _BASE)
    with opened_access(registry) as client:
        ready(workers, client, nodes * _CORES)
    table = JobTable(folder, jobs, tokens, {})
    before = most = process.memory_info().rss
    busy, started = cpu(process), time.monotonic()

    def look() -> None:
        nonlocal most
        most = max(most, process.memory_info().rss)

    with StageProgress(folder, "train", count * _STEPS, "token", count) as progress:
        failures = Training(jobs, folder, workers, registry, table, progress).run(look)
    seconds, busy = time.monotonic() - started, cpu(process) - busy
    actors = len(workers.locations)
    workers.close()
    assert not failures, failures
    assert len(Registry(path / "registry", _BASE).manifest().experts) == count
    floor = count * wait / actors
    overhead = 1000 * (seconds - floor) / count
    values = (count, nodes, actors, seconds, seconds / floor, overhead, 1000 * busy / count)
    print("  ".join(f"{v:13.2f}" if isinstance(v, float) else f"{v:13}" for v in values), end="")
    print(f"  {before / 2**20:.0f} -> {most / 2**20:.0f}")
    print(f"{'':13}  registry: {growth(path / 'registry')}", flush=True)


def ready(workers: Workers, client: RegistryClient, actors: int) -> None:
    """Start all actors before the measurement. Their start time does not depend on the jobs."""
    jobs = [(job(index), client) for index in range(actors)]
    while len(workers.locations) < actors:
        workers.add("train", jobs)
        while not workers.is_done:
            workers.step(0.1)


def job(index: int) -> TrainJob:
    """Return a training job."""
    name = f"expert-{index}"
    card = Card(name, name, "none", _BASE, "0" * 64, f"{index:08x}{'0' * 8}", 1.0, {}, {})
    stage = Stage(steps=_STEPS, lr=0.1)
    recipe = Recipe(rank=1, scale=1.0, lora=stage, gates=None, batch_size=1, micro_batch_size=1)
    return TrainJob(card, (TaskSpec(name, (name,)),), recipe)


def cpu(process: psutil.Process) -> float:
    """Return the processor time of a process in seconds."""
    times = process.cpu_times()
    return float(times.user + times.system)


def growth(registry: Path) -> str:
    """Return the number and size of the registry's files of each kind."""
    said = []
    for kind in ("objects", "jobs", "manifests"):
        sizes = [file.stat().st_size for file in (registry / kind).iterdir()]
        said.append(f"{len(sizes)} {kind}, {sum(sizes) / 2**20:.2f} MiB")
    return "; ".join(said)


if __name__ == "__main__":
    main()
