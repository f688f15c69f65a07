import contextlib
import itertools
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from harness.scheduling import workers as jobs
from harness.scheduling.actor import Actor, Location, Refused, code_version
from harness.scheduling.cluster import Cluster, actor_options, check_room, room
from harness.scheduling.settings import ClusterConfig
from harness.scheduling.workers import ATTEMPTS, DEATHS, Failure, Watch, Workers
from phatgoose.errors import PhatgooseError

# Actors cannot import a test module, so it is pickled by value.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [
    pytest.mark.slow(seconds=60),
    pytest.mark.usefixtures("two_cores"),
]


class Worker(Actor):
    """An actor that follows instructions and leaves a file for every start and every call."""

    def __init__(self, folder: Path, failing: str | None = None) -> None:
        super().__init__(code_version())
        self.folder = folder
        starts = self.note("started")
        if failing == "expected":
            raise PhatgooseError("this node has another base: put the same files on every node")
        if failing == "unexpected" or (failing == "later" and starts > 1):
            raise ValueError("no such device")

    def note(self, name: str) -> int:
        """Leave a file; return how many there are of this name."""
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
        if attempt <= times and fails == "refused":
            raise Refused(f"{name} cannot be anywhere")
        if attempt <= times and fails == "hangs":
            threading.Event().wait()
        while fails == "waits" and not (self.folder / "go").exists():
            time.sleep(0.01)
        if attempt <= times and fails == "unexpected":
            raise ValueError(f"{name} went wrong")
        return f"done {name}"


Make = Callable[..., Workers]


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Return a function that makes Workers over two actors; close them at the end."""
    made = []

    def workers(failing: str | None = None, **options: Any) -> Workers:
        remote = ray.remote(num_cpus=1, max_concurrency=2)(Worker)
        made.append(Workers(lambda: remote.remote(tmp_path, failing), lambda: 2, **options))
        return made[-1]

    yield workers
    for one in made:
        one.close()


def run(workers: Workers, *calls: tuple[Any, ...]) -> list[Any]:
    """Return the results in the order of the calls; each must arrive exactly once."""
    found = list(workers.run("work", calls))
    assert sorted(index for index, _ in found) == list(range(len(calls)))
    return [dict(found)[index] for index in range(len(calls))]


def notes(folder: Path) -> Counter[str]:
    return Counter(file.name.partition("@")[0] for file in folder.iterdir())


def test_calls_share_the_actors(make: Make, tmp_path: Path) -> None:
    workers = make()
    assert run(workers, *[(f"a{i}",) for i in range(6)]) == [f"done a{i}" for i in range(6)]
    assert run(workers, *[(f"b{i}",) for i in range(3)]) == [f"done b{i}" for i in range(3)]
    counts = notes(tmp_path)
    assert counts.pop("started") <= 2  # actors are reused, also between runs
    assert set(counts.values()) == {1}


def test_nothing_starts_without_work(make: Make, tmp_path: Path) -> None:
    assert run(make()) == []
    assert notes(tmp_path) == {}


def test_a_call_is_repeated_if_its_actor_dies(make: Make, tmp_path: Path) -> None:
    calls = [("a",), ("b", "dies", 1), ("c",), ("d", "dies", 2), ("e",)]
    assert run(make(), *calls) == [f"done {name}" for name in "abcde"]
    counts = notes(tmp_path)
    assert counts["b"] == 2
    assert counts["d"] == 3
    assert counts["a"] == counts["c"] == counts["e"] == 1
    assert 2 < counts["started"] <= 2 + 3  # no more than one new actor for each that died


def test_a_call_that_always_kills_its_actor_does_not_stop_others(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "DEATHS", 3)
    first, bad, *others = run(make(), ("a",), ("b", "dies"), ("c",), ("d",), ("e",))
    assert isinstance(bad, Failure)
    assert "its actor died 3 times" in bad.error
    assert "\n" not in bad.error
    assert notes(tmp_path)["b"] == 3
    assert [first, *others] == ["done a", "done c", "done d", "done e"]


def test_an_unexpected_error_is_retried(make: Make, tmp_path: Path) -> None:
    once, always = run(make(), ("a", "unexpected", 1), ("b", "unexpected"))
    assert once == "done a"
    assert isinstance(always, Failure)
    assert "ValueError: b went wrong" in always.error
    assert notes(tmp_path)["b"] == ATTEMPTS
    # Their devices may be broken, so each try is in another process.
    processes = {file.name.split("@")[1].split("-")[0] for file in tmp_path.glob("b@*")}
    assert len(processes) == ATTEMPTS


class Remembers(Watch):
    """A listener that records events and retries refused calls under another name."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def started(self, key: int, location: Location) -> None:
        assert location.process != os.getpid()
        self.told.append(("started", key))

    def went_back(self, key: int, error: str, traceback: str) -> None:
        assert "\x1b" not in traceback
        self.told.append(("went back", key, error, traceback.count("Traceback") + 1))

    def revise(self, key: int, error: PhatgooseError) -> tuple[Any, ...] | None:
        revised = any(told[0] == "revised" for told in self.told)
        self.told.append(("revised", key, str(error)))
        return None if revised else ("better",)


def finish(workers: Workers) -> dict[int, Any]:
    found: dict[int, Any] = {}
    while not workers.is_done:
        found.update(workers.step(1.0))
    return found


def test_a_refused_call_may_be_revised(make: Make) -> None:
    workers, watch = make(), Remembers()
    (key,) = workers.add("work", [("a", "expected")], watch)
    assert finish(workers) == {key: "done better"}
    error = "a cannot be: choose another"
    assert [told[:3] for told in watch.told] == [
        ("started", key),
        ("revised", key, error),
        ("went back", key, error),
        ("started", key),
    ]
    (other,) = workers.add("work", [("b", "expected")], watch)
    assert finish(workers) == {other: Failure("b cannot be: choose another")}


def test_an_error_is_kept_with_its_traceback(make: Make) -> None:
    workers, watch = make(), Remembers()
    workers.add("work", [("a", "unexpected")], watch)
    (failure,) = finish(workers).values()
    assert "in work" in failure.traceback
    assert failure.traceback.endswith("ValueError: a went wrong")
    assert [told[0] for told in watch.told] == [*["started", "went back"] * 2, "started"]


def test_an_actor_that_hangs_loses_its_lease(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_LOOK_SECONDS", 0.1)
    workers, watch = make(lease_seconds=10.0), Remembers()
    keys = workers.add("work", [("a", "hangs", 1), ("b",), ("c",)], watch)
    assert finish(workers) == {keys[0]: "done a", keys[1]: "done b", keys[2]: "done c"}
    assert notes(tmp_path)["a"] == 2
    assert notes(tmp_path)["b"] == notes(tmp_path)["c"] == 1
    ((_, key, error, _),) = [told for told in watch.told if told[0] == "went back"]
    assert key == keys[0]
    assert error.startswith("its actor died: no progress for 10 s on 127.0.0.1")


def test_a_stopped_process_loses_its_lease(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check a process that does not answer, like an unreachable machine."""
    monkeypatch.setattr(jobs, "_LOOK_SECONDS", 0.1)
    workers = make(lease_seconds=10.0)
    (key,) = workers.add("work", [("a", "hangs", 1)])
    while not notes(tmp_path)["a"]:
        assert workers.step(0.1) == []
    process = workers.locations[0][0].process
    os.kill(process, signal.SIGSTOP)
    try:
        assert finish(workers) == {key: "done a"}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGCONT)


def test_a_node_that_leaves_gets_no_new_calls(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_LOOK_SECONDS", 0.0)
    workers = make()
    leaving: list[str] = []
    monkeypatch.setattr(workers, "_room", lambda: 2 - len(leaving))
    workers.add("work", [("a",), ("b",)])
    finish(workers)
    here = ray.get_runtime_context().get_node_id()
    leaving += ["core of this node", "core of this node"]
    monkeypatch.setattr(jobs, "draining_nodes", lambda: frozenset({here}))
    (key,) = workers.add("work", [("c",)])
    until = time.monotonic() + 60
    while workers.locations and time.monotonic() < until:  # one may have been starting until now
        assert workers.step(0.1) == []
    for _ in range(3):
        assert workers.step(0.1) == []
    assert workers.locations == []
    leaving.clear()
    monkeypatch.setattr(jobs, "draining_nodes", lambda: frozenset({"another"}))
    assert finish(workers) == {key: "done c"}


def test_paused_workers_start_nothing_and_hold_no_core(make: Make) -> None:
    workers = make()
    keys = workers.add("work", [("a",), ("b",)])
    workers.paused = True
    assert workers.step(0.1) == []
    assert workers.size == 0
    workers.paused = False
    assert finish(workers) == dict(zip(keys, ["done a", "done b"], strict=True))
    workers.paused = True
    workers.step(0)
    assert workers.size == 0


def begin(workers: Workers, *calls: tuple[Any, ...]) -> range:
    """Add calls and step until one is running."""
    keys = workers.add("work", calls)
    until = time.monotonic() + 60
    while not workers.under_way and time.monotonic() < until:
        assert workers.step(0.1) == []
    return keys


def test_a_result_and_a_heartbeat_may_arrive_together(make: Make, tmp_path: Path) -> None:
    workers = make()
    (key,) = begin(workers, ("a", "waits"))
    (actor,) = [actor for actor in workers._actors if actor.call]
    actor.heartbeat = actor.handle.heartbeat.remote()
    (tmp_path / "go").touch()
    done, _ = ray.wait([actor.reference, actor.heartbeat], num_returns=2, timeout=60)
    assert len(done) == 2
    assert workers.step(0) == [(key, "done a")]


def test_time_between_two_steps_does_not_expire_a_lease(make: Make) -> None:
    workers = make(lease_seconds=50.0)
    (key,) = begin(workers, ("a", "hangs"))
    workers._stepped -= 100
    for actor in workers._actors:
        actor.progress -= 100
    assert workers.step(0) == []
    assert key in workers.under_way


def test_nodes_are_requested_while_there_is_work(make: Make) -> None:
    told: list[int] = []
    workers = make(want=told.append)
    assert run(workers, ("a",), ("b",), ("c",)) == ["done a", "done b", "done c"]
    assert told[0] == 3
    workers.close()
    assert told[-1] == 0


def test_calls_fail_if_all_nodes_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_LOOK_SECONDS", 0.0)
    rooms = itertools.chain([1], itertools.repeat(0))
    remote = ray.remote(num_cpus=1, resources={"node that left": 1})(Worker)
    workers = Workers(lambda: remote.remote(tmp_path), lambda: next(rooms), wait_seconds=1.0)
    (failure,) = run(workers, ("a",))
    assert failure == Failure("no node of the Ray cluster has room for an actor any more")
    assert workers.size == 0


def test_failed_starts_are_forgotten_while_an_actor_works(make: Make, tmp_path: Path) -> None:
    modes = itertools.chain([None], ["unexpected"] * 3, itertools.repeat(None))
    remote = ray.remote(num_cpus=1, max_concurrency=2)(Worker)
    workers = Workers(lambda: remote.remote(tmp_path, next(modes)), lambda: 2)
    keys = begin(workers, ("a", "waits"), ("b",), ("c",))
    until = time.monotonic() + 120
    while workers.waiting and time.monotonic() < until:  # only a second actor can run them
        workers.step(0.1)
    (tmp_path / "go").touch()
    assert finish(workers).keys() <= {*keys}
    assert notes(tmp_path)["started"] >= 5
    workers.close()


def test_an_actor_that_does_not_start_is_abandoned(tmp_path: Path) -> None:
    remote = ray.remote(num_cpus=1, resources={"not to be had": 1})(Worker)
    workers = Workers(lambda: remote.remote(tmp_path), lambda: 1, lease_seconds=0.2)
    (failure,) = run(workers, ("a",))
    assert "no actor could be started within 0 s" in failure.error


def test_a_job_that_makes_progress_survives_many_actors() -> None:
    call = jobs._Call(0, "train", (), Watch())
    workers = Workers(lambda: None, lambda: 0)
    for steps in range(1, 3 * DEATHS):
        assert workers._died(call, steps, "its node left", "") == []
    for _ in range(DEATHS - 2):
        assert workers._died(call, 5, "its node left", "") == []
    ((_, failure),) = workers._died(call, 5, "its node left", "")
    assert "died 10 times" in failure.error


def test_clock_jumps_do_not_expire_a_lease(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    jumps = itertools.cycle([now - 10**6, now + 10**6])
    monkeypatch.setattr(time, "time", lambda: next(jumps))
    monkeypatch.setattr(jobs, "_LOOK_SECONDS", 0.1)
    workers, watch = make(lease_seconds=20.0), Remembers()
    keys = workers.add("work", [(f"a{i}",) for i in range(20)], watch)
    assert len(finish(workers)) == len(keys)
    assert watch.told == [("started", key) for key in keys]


def test_time_without_work_is_no_time_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check calls that are added long after the last ones, or wait while others have priority."""
    remote = ray.remote(num_cpus=1, max_concurrency=2)(Worker)
    workers = Workers(lambda: remote.remote(tmp_path), lambda: 0, wait_seconds=5)
    clock = [time.monotonic()]
    monkeypatch.setattr("harness.scheduling.workers.time.monotonic", lambda: clock[0])
    first = workers.add("work", [("a",)])
    workers.is_patient = True
    for _ in range(3):
        clock[0] += 100
        assert workers.step(0) == []
    workers.is_patient, workers.paused = False, True
    clock[0] += 100
    assert workers.step(0) == []
    workers.paused = False
    assert workers.step(0) == []
    assert workers.cancel(first) == [*first]
    clock[0] += 100
    workers.add("work", [("b",)])
    assert workers.step(0) == []
    clock[0] += 6
    ((_, failure),) = workers.step(0)
    assert "no node of the Ray cluster has room" in failure.error


def test_an_actor_with_an_unexpected_error_is_replaced(make: Make, tmp_path: Path) -> None:
    """Its device may be broken."""
    assert run(make(), ("a", "unexpected", 1)) == ["done a"]
    processes = {file.name.split("@")[1].split("-")[0] for file in tmp_path.glob("a@*")}
    assert len(processes) == 2


def test_canceled_calls_are_not_made(make: Make, tmp_path: Path) -> None:
    workers = make()
    keys = workers.add("work", [(f"call{number}", "waits") for number in range(6)])
    while len(workers.under_way) < 2:
        workers.step(0.1)
    assert workers.cancel([*keys[:1], *keys[3:]]) == [*keys[3:]]  # the first two have begun
    (tmp_path / "go").touch()
    found = finish(workers)
    assert found == {key: f"done call{key}" for key in keys[:3]}
    assert not any(notes(tmp_path)[f"call{key}"] for key in keys[3:])


def test_an_expected_error_is_not_retried(make: Make, tmp_path: Path) -> None:
    bad, good, refused = run(make(), ("a", "expected"), ("b",), ("c", "refused"))
    assert bad == Failure("a cannot be: choose another")
    assert not bad.refused
    assert refused == Failure("c cannot be anywhere")
    assert refused.refused
    assert good == "done b"
    assert notes(tmp_path)["a"] == 1


@pytest.mark.parametrize("calls", [1, 3])
def test_the_reason_why_actors_cannot_start_is_reported(
    make: Make, tmp_path: Path, calls: int
) -> None:
    bad = run(make("expected"), *[(f"a{i}",) for i in range(calls)])
    message = "this node has another base: put the same files on every node"
    assert bad == [Failure(message)] * calls
    counts = notes(tmp_path)
    # Two start at the same time, and Ray repeats a start that ends before the error arrives.
    assert counts.pop("started") <= 2 * (ATTEMPTS + 1)
    assert counts == {}


def test_an_actor_that_fails_to_start_is_started_again(make: Make, tmp_path: Path) -> None:
    [bad] = run(make("unexpected"), ("a",))
    assert isinstance(bad, Failure)
    assert "no such device" in bad.error
    assert "\n" not in bad.error
    # Ray itself may repeat a constructor whose process it saw end.
    assert ATTEMPTS <= notes(tmp_path)["started"] <= 2 * ATTEMPTS


def test_calls_fail_if_the_last_actor_died_and_none_starts(make: Make, tmp_path: Path) -> None:
    [bad] = run(make("later"), ("a", "dies"))
    assert isinstance(bad, Failure)
    assert "no such device" in bad.error
    assert notes(tmp_path)["a"] == 1
    assert ATTEMPTS <= notes(tmp_path)["started"] - 1 <= 2 * ATTEMPTS


def test_closing_frees_the_cores(make: Make, tmp_path: Path) -> None:
    first = make()
    run(first, ("a",), ("b",))
    first.close()
    assert run(make(), ("c",), ("d",)) == ["done c", "done d"]  # would wait forever


def test_actor_sizes_follow_the_cluster() -> None:
    assert actor_options(ClusterConfig(), {}) == {"num_cpus": 1, "num_gpus": 0}
    for cores, count in ((1, 2), (2, 1), (0.5, 4), (3, 0)):
        assert room(actor_options(ClusterConfig(cpus_per_actor=cores), {})) == count
    assert room(actor_options(ClusterConfig(), {}), 1) == 1
    check_room(ClusterConfig(), {}, ranks=2)
    for too_much in (ClusterConfig(cpus_per_actor=3), ClusterConfig(gpus_per_actor=1)):
        with pytest.raises(PhatgooseError, match="has 2 CPU and 0 GPU"):
            check_room(too_much, {})
    with pytest.raises(PhatgooseError, match="3 actors ask for 1 and 0 each"):
        check_room(ClusterConfig(), {}, ranks=3)


def test_an_existing_connection_is_used_and_left_open() -> None:
    with Cluster() as cluster:
        cluster.connect()
        assert ray.cluster_resources()["CPU"] == 2
    assert ray.is_initialized()
