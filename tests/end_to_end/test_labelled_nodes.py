"""Check that training and evaluation run on the nodes labeled for them, on a real Ray."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster as Nodes

from harness.scheduling.cluster import actor_options, check_room, room
from harness.scheduling.settings import ClusterConfig
from phatgoose.errors import PhatgooseError

pytestmark = pytest.mark.slow
TRAIN, EVALUATE = {"group": "train"}, {"group": "evaluate"}


@pytest.fixture
def nodes(own_ray: Path) -> Iterator[None]:
    """Provide a head without work, a training node of two cores and an evaluation node of one."""
    common = {"node_ip_address": "127.0.0.1", "object_store_memory": 100 * 2**20}
    cluster = Nodes(
        initialize_head=True,
        head_node_args={**common, "num_cpus": 0, "include_dashboard": False},
    )
    try:
        cluster.add_node(num_cpus=2, labels=TRAIN, **common)
        cluster.add_node(num_cpus=1, labels=EVALUATE, **common)
        ray.init(address=cluster.address, namespace="phatgoose", log_to_driver=False)
        yield
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_actors_run_on_the_nodes_with_their_labels(nodes: None) -> None:
    groups = {node["NodeID"]: (node["Labels"] or {}).get("group") for node in ray.nodes()}

    class Where:
        def node(self) -> str:
            return str(ray.get_runtime_context().get_node_id())

    remote = ray.remote(Where)
    for labels, size in ((TRAIN, 2), (EVALUATE, 1)):
        assert room(actor_options(ClusterConfig(), labels)) == size
        actors = [
            remote.options(**actor_options(ClusterConfig(), labels)).remote() for _ in range(size)
        ]
        found = [groups[ray.get(actor.node.remote(), timeout=60)] for actor in actors]
        assert found == [labels["group"]] * size
        for actor in actors:
            ray.kill(actor)
    assert room(actor_options(ClusterConfig(), {})) == 3
    with pytest.raises(PhatgooseError, match=r"none of the 3 nodes .* has the labels .*'trian'"):
        check_room(ClusterConfig(wait_seconds=1), {"group": "trian"})
