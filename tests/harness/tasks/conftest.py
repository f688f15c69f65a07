"""Shared fixtures: a tiny archive in the layout of BIG-bench, and a separate cache."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("PHATGOOSE_CACHE", str(folder))
    return folder


@pytest.fixture
def archive(tmp_path: Path) -> Callable[[dict[str, Any]], Path]:
    """Return a function that writes an archive of tasks: member -> content of its task.json."""

    def write(tasks: dict[str, Any]) -> Path:
        path = tmp_path / "bigbench-1.0.0.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            for member, definition in tasks.items():
                for file, text in (("README.md", "a task"), ("task.json", json.dumps(definition))):
                    name = f"bigbench-1.0.0/bigbench/benchmark_tasks/{member}/{file}"
                    info = tarfile.TarInfo(name)
                    info.size = len(text.encode())
                    tar.addfile(info, io.BytesIO(text.encode()))
        return path

    return write
