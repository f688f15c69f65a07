"""Ray instances for tests: unreachable from other machines, with no other Ray visible."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def ray_folder() -> Iterator[Path]:
    """Make an empty folder in which this process and its children start a Ray."""
    from harness.scheduling.ray_internals import loopback_only

    # Short, because paths of Ray's sockets are limited to about a hundred characters.
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        with loopback_only():
            yield folder
    shutil.rmtree(folder, ignore_errors=True)


class SharedRay:
    """A Ray of two cores for all tests that do not test how a Ray starts or ends.

    It starts when a test first needs it. A process has one connection, so tests with their own Ray
    stop it, and the next test that needs it starts it again. Its processes keep the environment in
    which it starts, and with it the cache of the session.
    """

    def __init__(self) -> None:
        self._running = contextlib.ExitStack()

    def start(self) -> None:
        """Start the Ray; do nothing if it is running."""
        import ray

        from harness.scheduling.ray_internals import local_ray

        if ray.is_initialized():
            return
        self._running.enter_context(ray_folder())
        quiet = {"log_to_driver": False, "configure_logging": False}
        self._running.enter_context(local_ray(2, 100 * 2**20, namespace="phatgoose", **quiet))

    def stop(self) -> None:
        """Stop the Ray and restore the environment; do nothing if it is not running."""
        self._running.close()
