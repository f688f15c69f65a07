"""A local Ray for the tests that need one."""

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def two_cores() -> Iterator[None]:
    """A Ray of two cores that only this machine can reach."""
    from harness.scheduling.ray_internals import local_ray

    # Short: the paths of Ray's sockets have a limit of about a hundred characters.
    folder = tempfile.mkdtemp(prefix="ray-")
    old = {name: os.environ.get(name) for name in ("RAY_TMPDIR", "RAY_USAGE_STATS_ENABLED")}
    os.environ.update(RAY_TMPDIR=folder, RAY_USAGE_STATS_ENABLED="0")
    with local_ray(2, 100 * 2**20, log_to_driver=False, configure_logging=False):
        yield
    for name, value in old.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value
    shutil.rmtree(folder, ignore_errors=True)
