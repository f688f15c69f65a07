"""Check that nodes joining a busy Ray are used, starting from too small a cluster."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster as Nodes

from harness.scheduling import workers as jobs
from harness.scheduling.actor import Actor, Location, code_version
from harness.scheduling.cluster import actor_options, room
from harness.scheduling.settings import ClusterConfig
from harness.scheduling.workers import Failure, Watch, Workers

# Actors cannot import a test module, so it is pickled by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.slow
NODE = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}
DEADLINE = 120.0


@pytest.fixture
def nodes(own_ray: Path) -> Iterator[Nodes]:
    """Provide a head without work and one node of one core."""
    head = {**NODE, "num_cpus": 0, "include_dashboard": False}
    cluster = Nodes(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(**NODE)
        ray.init(address=cluster.address, namespace="phatgoose", log_to_driver=False)
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


class Meets(Actor):
    """An actor whose calls end only after calls on two actors were running at the same time."""

    def __init__(self, folder: Path) -> None:
        super().__init__(code_version())
        self._folder = folder

    def meet(self, call: int) -> str:
        (self._folder / self.location().node).touch()
        until = time.monotonic() + DEADLINE
        while len(list(self._folder.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        return self.location().node


class Started(Watch):
    """A record of the nodes that have had a call."""

    def __init__(self) -> None:
        self.nodes: set[str] = set()

    def started(self, key: int, location: Location) -> None:
        self.nodes.add(location.node)


def test_a_node_that_joins_is_used(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_LOOK_SECONDS", 0.2)
    options = actor_options(ClusterConfig(), {})
    remote = ray.remote(Meets).options(**options, max_concurrency=2)
    workers = Workers(lambda: remote.remote(tmp_path), lambda: room(options))
    watch = Started()
    workers.add("meet", [(call,) for call in range(4)], watch)
    found, added = [], False
    until = time.monotonic() + DEADLINE
    try:
        while not workers.is_done and time.monotonic() < until:
            found += workers.step(0.2)
            if watch.nodes and not added:
                assert workers.size == 1
                nodes.add_node(**NODE)
                added = True
        assert len(found) == 4
        assert not any(isinstance(result, Failure) for _, result in found)
        assert len({*watch.nodes}) == 2
    finally:
        workers.close()
