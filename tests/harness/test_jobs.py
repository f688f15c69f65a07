import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from harness.cluster import Cluster, actor_count, actor_options
from harness.config import ClusterConfig
from harness.jobs import ATTEMPTS, Failure, Workers
from phatgoose.errors import PhatgooseError

# Actors cannot import a test module: it travels to them as it is.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("two_cores")]


class Worker:
    """Does as it is told; leaves a file behind for every start and every call."""

    def __init__(self, folder: Path, failing: str | None = None) -> None:
        self.folder = folder
        starts = self.note("started")
        if failing == "expected":
            raise PhatgooseError("this node has another base: put the same files on every node")
        if failing == "unexpected" or (failing == "later" and starts > 1):
            raise ValueError("no such device")

    def note(self, name: str) -> int:
        """Leave a file; says how many of this name there are."""
        thread = f"{os.getpid()}-{threading.get_ident()}"
        there = len(list(self.folder.glob(f"{name}@*")))
        (self.folder / f"{name}@{thread}-{there}").touch()
        return there + 1

    def work(self, name: str, fails: str = "", times: int = 99) -> str:
        attempt = self.note(name)
        if attempt <= times and fails == "dies":
            os._exit(1)
        if attempt <= times and fails == "expected":
            raise PhatgooseError(f"{name} cannot be: choose another")
        if attempt <= times and fails == "unexpected":
            raise ValueError(f"{name} went wrong")
        return f"done {name}"


Make = Callable[..., Workers]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Makes Workers over two actors, and closes them in the end."""
    made = []

    def workers(failing: str | None = None) -> Workers:
        remote = ray.remote(num_cpus=1)(Worker)
        made.append(Workers(lambda: remote.remote(tmp_path, failing), lambda: 2))
        return made[-1]

    yield workers
    for one in made:
        one.close()


def run(workers: Workers, *calls: tuple[Any, ...]) -> list[Any]:
    """The results in the order of the calls; each must come exactly once."""
    found = list(workers.run("work", calls, lambda _: None))
    assert sorted(index for index, _ in found) == list(range(len(calls)))
    return [dict(found)[index] for index in range(len(calls))]


def notes(folder: Path) -> Counter[str]:
    return Counter(file.name.partition("@")[0] for file in folder.iterdir())


def test_calls_share_the_actors(make: Make, tmp_path: Path) -> None:
    workers = make()
    assert run(workers, *[(f"a{i}",) for i in range(6)]) == [f"done a{i}" for i in range(6)]
    assert run(workers, *[(f"b{i}",) for i in range(3)]) == [f"done b{i}" for i in range(3)]
    counts = notes(tmp_path)
    assert counts.pop("started") <= 2  # reused, also from one run to the next
    assert set(counts.values()) == {1}


def test_nothing_starts_without_work(make: Make, tmp_path: Path) -> None:
    assert run(make()) == []
    assert notes(tmp_path) == {}


def test_ticks_name_the_actors_at_work(make: Make) -> None:
    seen: list[int] = []
    workers = make()
    for _ in workers.run("work", [("a",), ("b",), ("c",)], lambda actors: seen.append(len(actors))):
        pass
    assert seen
    assert all(0 <= count <= 2 for count in seen)


def test_a_call_whose_actor_dies_is_repeated(make: Make, tmp_path: Path) -> None:
    calls = [("a",), ("b", "dies", 1), ("c",), ("d", "dies", 2), ("e",)]
    assert run(make(), *calls) == [f"done {name}" for name in "abcde"]
    counts = notes(tmp_path)
    assert counts["b"] == 2
    assert counts["d"] == 3
    assert counts["a"] == counts["c"] == counts["e"] == 1
    assert 2 < counts["started"] <= 2 + 3  # no more than a new actor for each that died


def test_a_call_that_always_kills_its_actor_stops_no_other(make: Make, tmp_path: Path) -> None:
    first, bad, *others = run(make(), ("a",), ("b", "dies"), ("c",), ("d",), ("e",))
    assert isinstance(bad, Failure)
    assert "its actor died" in bad.error
    assert f"tried {ATTEMPTS} times" in bad.error
    assert "\n" not in bad.error
    assert notes(tmp_path)["b"] == ATTEMPTS
    assert [first, *others] == ["done a", "done c", "done d", "done e"]


def test_an_unexpected_error_is_tried_again(make: Make, tmp_path: Path) -> None:
    once, always = run(make(), ("a", "unexpected", 1), ("b", "unexpected"))
    assert once == "done a"
    assert isinstance(always, Failure)
    assert "ValueError: b went wrong" in always.error
    assert notes(tmp_path)["b"] == ATTEMPTS
    assert notes(tmp_path)["started"] <= 2  # the actors live on


def test_an_expected_error_is_not_tried_again(make: Make, tmp_path: Path) -> None:
    bad, good = run(make(), ("a", "expected"), ("b",))
    assert bad == Failure("a cannot be: choose another")
    assert good == "done b"
    assert notes(tmp_path)["a"] == 1


@pytest.mark.parametrize("calls", [1, 3])
def test_actors_that_cannot_start_say_why(make: Make, tmp_path: Path, calls: int) -> None:
    bad = run(make("expected"), *[(f"a{i}",) for i in range(calls)])
    message = "this node has another base: put the same files on every node"
    assert bad == [Failure(message)] * calls
    counts = notes(tmp_path)
    # Two start at once, and Ray repeats a start whose process ends before it heard of the error.
    assert counts.pop("started") <= 2 * (ATTEMPTS + 1)
    assert counts == {}


def test_an_actor_that_fails_to_start_is_started_again(make: Make, tmp_path: Path) -> None:
    [bad] = run(make("unexpected"), ("a",))
    assert isinstance(bad, Failure)
    assert "no such device" in bad.error
    assert "\n" not in bad.error
    # Ray itself may call a constructor again whose process it saw end.
    assert ATTEMPTS <= notes(tmp_path)["started"] <= 2 * ATTEMPTS


def test_calls_fail_when_the_last_actor_died_and_none_starts(make: Make, tmp_path: Path) -> None:
    [bad] = run(make("later"), ("a", "dies"))
    assert isinstance(bad, Failure)
    assert "no such device" in bad.error
    assert notes(tmp_path)["a"] == 1
    assert ATTEMPTS <= notes(tmp_path)["started"] - 1 <= 2 * ATTEMPTS


def test_closing_frees_the_cores(make: Make, tmp_path: Path) -> None:
    first = make()
    run(first, ("a",), ("b",))
    first.close()
    assert run(make(), ("c",), ("d",)) == ["done c", "done d"]  # would wait for ever


def test_actors_are_sized_by_the_cluster() -> None:
    assert actor_options(ClusterConfig(), {}) == {"num_cpus": 1, "num_gpus": 0}
    assert actor_count(ClusterConfig(), {}) == 2
    assert actor_count(ClusterConfig(cpus_per_actor=2), {}) == 1
    assert actor_count(ClusterConfig(cpus_per_actor=0.5), {}) == 4
    assert actor_count(ClusterConfig(cpus_per_actor=0.5, max_actors=3), {}) == 3
    for too_much in (ClusterConfig(cpus_per_actor=3), ClusterConfig(gpus_per_actor=1)):
        with pytest.raises(PhatgooseError, match="has 2 CPU and 0 GPU"):
            actor_count(too_much, {})


def test_a_connection_of_the_caller_is_used_and_left_open() -> None:
    with Cluster() as cluster:
        cluster.connect()
        assert ray.cluster_resources()["CPU"] == 2
    assert ray.is_initialized()
