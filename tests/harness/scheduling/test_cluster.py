import os

import psutil
import pytest
import ray

from harness.scheduling.cluster import Cluster, _running
from harness.scheduling.hardware import usable_cores

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_ray")]


def listening() -> set[str]:
    """Return the addresses on which this process and its children accept connections."""
    this = psutil.Process(os.getpid())
    found = set()
    for process in (this, *this.children(recursive=True)):
        for connection in process.net_connections(kind="inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.add(connection.laddr.ip.removeprefix("::ffff:"))
    return found


def test_a_local_cluster_is_unreachable_from_outside_and_ends_with_its_run() -> None:
    with Cluster() as cluster:
        assert not ray.is_initialized()  # nothing is started before it is needed
        cluster.connect()
        cluster.connect()
        assert ray.cluster_resources()["CPU"] == usable_cores()

        @ray.remote(num_cpus=0)
        def works() -> str:
            return os.environ.get("RAY_USAGE_STATS_ENABLED", "")

        assert ray.get(works.remote()) == "0"
        assert listening() == {"127.0.0.1"}
        assert _running() is None  # no other run may join it as a shared Ray
    assert not ray.is_initialized()
