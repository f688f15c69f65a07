"""A local Ray for the tests that need one."""

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def two_cores() -> Iterator[None]:
    """A Ray of two cores that only this machine can reach."""
    import ray
    from ray._private import ray_constants

    # Short: the paths of Ray's sockets have a limit of about a hundred characters.
    folder = tempfile.mkdtemp(prefix="ray-")
    old = {name: os.environ.get(name) for name in ("RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED")}
    os.environ.update(RAY_TMPDIR=folder, RAY_USAGE_STATS_ENABLED="0")
    cluster, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()
    ray_constants.ENABLE_RAY_CLUSTER = cluster
    for name, value in old.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
    shutil.rmtree(folder, ignore_errors=True)
