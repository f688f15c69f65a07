"""A cache and a folder for Ray of its own, for runs that are whole: driver, actors, files."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache, which actors inherit too."""
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """No Ray of this machine is in sight; the folder's path is short, as Ray's sockets need it."""
    from harness.scheduling.ray_internals import loopback_only

    folder = tempfile.mkdtemp(prefix="ray-")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with loopback_only():
        yield folder
    shutil.rmtree(folder, ignore_errors=True)
