"""Shared fixtures: no network, one thread, a separate cache, and two tiny bases."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from phatgoose.base import Base
    from tests.support.own_ray import SharedRay
    from tests.support.s3_server import S3Server

# Set before anything imports torch or huggingface_hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Set before anything imports triton: without a GPU its programs run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest slow modules first, to end together, and those that share a Ray last."""

    def order(item: pytest.Item) -> tuple[int, float]:
        slow = item.get_closest_marker("slow")
        if slow is None:
            return 0, 0.0
        shares = "two_cores" in getattr(item, "fixturenames", ())
        return 1 + shares, -float(slow.kwargs.get("seconds", 0))

    items.sort(key=order)


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["PHATGOOSE_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def session_ray(_session_cache: None) -> "Iterator[SharedRay]":
    """Return the Ray that tests share, to be started or stopped."""
    from tests.support.own_ray import SharedRay

    ray = SharedRay()
    yield ray
    ray.stop()


@pytest.fixture(scope="module")
def two_cores(session_ray: "SharedRay") -> None:
    """Provide a running Ray of two cores, shared with other modules, unreachable from outside."""
    session_ray.start()


@pytest.fixture(scope="module")
def own_ray(session_ray: "SharedRay") -> Iterator[Path]:
    """Return a folder in which a module starts its own Ray; no other Ray is running or visible."""
    from tests.support.own_ray import ray_folder

    session_ray.stop()
    with ray_folder() as folder:
        yield folder


@pytest.fixture(scope="session")
def s3() -> "Iterator[S3Server]":
    """Provide an S3-compatible server on this machine, with its credentials in the environment."""
    from tests.support.s3_server import s3_server

    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that `load_base` reads as a tiny Llama-like base."""
    from tests.support.tiny import make_llama

    return make_llama(tmp_path_factory.mktemp("bases") / "llama")


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that `load_base` reads as a tiny T5-like base."""
    from tests.support.tiny import make_t5

    return make_t5(tmp_path_factory.mktemp("bases") / "t5")


@pytest.fixture
def llama(llama_folder: Path) -> "Base":
    """Return a fresh tiny Llama-like base in float32; tests attach experts to it."""
    from phatgoose.base import load_base

    return load_base(str(llama_folder))


@pytest.fixture
def t5(t5_folder: Path) -> "Base":
    """Return a fresh tiny T5-like base in float32."""
    from phatgoose.base import load_base

    return load_base(str(t5_folder))


@pytest.fixture(params=["llama", "t5"])
def base(request: pytest.FixtureRequest) -> "Base":
    """Return each of the tiny bases."""
    loaded: Base = request.getfixturevalue(request.param)
    return loaded
