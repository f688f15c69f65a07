"""Train with a group of ranks under the real scheduler: it works, is killed and is cleaned up."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group_table

from harness import run_folder
from harness.config.schema import RanksConfig, RunConfig
from harness.driver.stages import Driver
from harness.planning.plan import Plan
from harness.registry import Registry
from harness.registry.actor import registry_actor
from harness.registry.client import RegistryClient, opened_access
from harness.scheduling.cluster import room
from harness.scheduling.workers import Failure, Watch, Workers
from harness.storage import Folder
from harness.training.job import TrainJob
from phatgoose.training.recipe import Stage
from tests.support.toy import make_plan, prepare_toys, toy_config

pytestmark = pytest.mark.slow(seconds=50)

DEADLINE = 240.0
STEPS = 20


@pytest.fixture(scope="module")
def two_nodes(own_ray: Path) -> Iterator[None]:
    """Provide two nodes of one core each, so that the ranks are on both."""
    common = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**common, "include_dashboard": False})
    try:
        cluster.add_node(**common)
        ray.init(address=cluster.address, namespace="phatgoose", log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


class Lost(Watch):
    """A listener that remembers why calls were returned to the queue."""

    def __init__(self) -> None:
        self.errors: list[str] = []

    def went_back(self, key: int, error: str, traceback: str) -> None:
        self.errors.append(error)


@pytest.fixture
def plan(tmp_path: Path, llama_folder: Path) -> Plan:
    config: RunConfig = toy_config(llama_folder, tmp_path / "run")
    config.ranks = RanksConfig(ranks_per_expert=2, zero_stage=2)
    config.cluster.checkpoint_seconds = 0
    config.train = replace(
        config.train, lora=Stage(steps=STEPS, lr=1e-2), micro_batch_size=1, gates=None
    )
    config.router = {"base": {}, "merged": {}}
    prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], tmp_path)
    return make_plan(config)


@pytest.fixture
def workers(two_nodes: None, plan: Plan) -> Iterator[Workers]:
    from harness.scheduling.cluster import Cluster as Connection

    workers = Driver(plan, Connection())._trainers(plan.jobs)
    yield workers
    workers.close()
    wait(lambda: not ranks(), "a rank is still running")
    wait(lambda: not groups(), "a placement group still exists")
    wait(lambda: ray.available_resources().get("CPU") == 2, "cores were not released")


@pytest.fixture
def client(workers: Workers, plan: Plan) -> Iterator[RegistryClient]:
    with opened_access(registry_actor(plan.config.registry, plan.base_fingerprint)) as client:
        yield client


def wait(happened: Callable[[], Any], problem: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not happened():
        assert time.monotonic() < deadline, problem
        time.sleep(0.05)


def groups() -> list[str]:
    """Return the existing placement groups."""
    return [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"]


def ranks() -> list[int]:
    """Return the processes of ranks that this test's Ray has started."""
    found = []
    for process in psutil.process_iter(["name", "environ"]):
        ours = (process.info["environ"] or {}).get("RAY_TMPDIR") == os.environ["RAY_TMPDIR"]
        if ours and process.info["name"].startswith("ray::TrainActor"):
            found.append(process.pid)
    return found


def step_until(workers: Workers, happened: Callable[[], Any]) -> list[tuple[int, Any]]:
    """Step the scheduler until a condition holds; return the results."""
    deadline, came = time.monotonic() + DEADLINE, []
    while not happened() and not workers.is_done:
        assert time.monotonic() < deadline
        came += workers.step(0.1)
    return came


def check_expert(came: list[tuple[int, Any]], plan: Plan) -> None:
    """Check that rank 0 has written one complete expert; its curve must have every step once."""
    [(_, result)] = came
    assert not isinstance(result, Failure), result
    assert result.expert is None
    folder = Folder(plan.config.run.dir)
    folder.write("curve.parquet", result.curve)
    rows = run_folder.read_table(folder, "curve.parquet", run_folder.TRAINING).to_pylist()
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(STEPS))
    registry = Registry(plan.config.registry, plan.base_fingerprint)
    assert registry.folder.names("objects/") == [f"objects/{result.content_hash}.arrow"]
    metrics = registry.load(result.content_hash).card.metrics
    assert metrics["nll_lora"] < metrics["nll_base"]


def test_a_killed_rank_costs_only_a_few_steps(
    workers: Workers, client: RegistryClient, plan: Plan, tmp_path: Path
) -> None:
    job: TrainJob = replace(plan.jobs[0], profile_id=None)
    watch = Lost()
    workers.add("train", [(job, client)], watch)
    checkpoint = tmp_path / "run" / "checkpoints" / f"{job.card.job}.safetensors"
    came = step_until(workers, checkpoint.exists)
    assert not came
    assert len(groups()) == 1
    [(location, _)] = workers.locations
    assert location.process in ranks()
    [follower] = [process for process in ranks() if process != location.process]
    os.kill(follower, signal.SIGKILL)
    check_expert(step_until(workers, lambda: False), plan)
    assert len(watch.errors) == 1
    assert "died" in watch.errors[0]
    logs = "".join(f.read_text() for f in (tmp_path / "run" / "logs").glob("train-*"))
    assert "resuming from step" in logs


def test_two_groups_do_not_fit_on_two_cores(workers: Workers, plan: Plan) -> None:
    assert room({"num_cpus": 1, "num_gpus": 0}, ranks=2) == 1
    assert room({"num_cpus": 1, "num_gpus": 0}, ranks=3) == 0
