"""Check, with real processes, that a run folder has one driver at a time."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harness.driver import lease
from harness.driver.lease import RunLease
from harness.storage import Folder
from phatgoose.errors import PhatgooseError

HOLD = """
import sys, time
from harness.driver.lease import RunLease
from harness.storage import Folder
with RunLease(Folder(sys.argv[1]), renew_seconds=0.1) as held:
    held.take()
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def take(folder: Path, **seconds: float) -> RunLease:
    made = RunLease(Folder(folder), **seconds)
    made.__enter__()
    made.take()
    return made


def give_back(held: RunLease) -> None:
    held.__exit__(None, None, None)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "driver").iterdir())


def forged(folder: Path, number: int, **values: Any) -> Path:
    """Write a lease of a driver on another machine."""
    (folder / "driver").mkdir(exist_ok=True)
    path = folder / "driver" / f"{number}.json"
    content = {"machine": "elsewhere", "host": "node7", "process": 4, "since": "noon", **values}
    path.write_text(json.dumps(content))
    return path


def test_the_second_driver_reports_who_holds_the_folder(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    started = time.monotonic()
    with (
        pytest.raises(PhatgooseError, match=rf"process {holder.pid} on .* is using it\. Wait"),
        RunLease(Folder(tmp_path)),
    ):
        pass
    assert time.monotonic() - started < 5
    assert files(tmp_path) == ["1.json"]


def test_the_lease_of_a_dead_local_process_is_taken_over_immediately(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    held = take(tmp_path)
    assert time.monotonic() - started < 5
    assert files(tmp_path) == ["2.json"]
    give_back(held)
    assert files(tmp_path) == []


def test_a_process_that_reuses_a_pid_does_not_hold_the_lease(tmp_path: Path) -> None:
    forged(tmp_path, 1, machine=lease.MACHINE, process=os.getpid(), process_started=1.0)
    give_back(take(tmp_path))


def test_a_remote_lease_that_changes_is_alive(tmp_path: Path) -> None:
    path = forged(tmp_path, 1)
    ended = threading.Event()

    def renew() -> None:
        count = 0
        while not ended.wait(0.05):
            count += 1
            temporary = path.with_name(".new")
            temporary.write_text(json.dumps({**json.loads(path.read_text()), "renewed": count}))
            temporary.replace(path)

    renewing = threading.Thread(target=renew)
    renewing.start()
    try:
        with pytest.raises(PhatgooseError, match="process 4 on node7, since noon"):
            take(tmp_path)
    finally:
        ended.set()
        renewing.join()


@pytest.mark.parametrize("content", [None, "", "[]", "{"], ids=["lease", "empty", "list", "cut"])
def test_a_remote_lease_that_does_not_change_expires(tmp_path: Path, content: str | None) -> None:
    path = forged(tmp_path, 3)
    if content is not None:
        path.write_text(content)
    started = time.monotonic()
    held = take(tmp_path, expire_seconds=1.0)
    assert 1.0 <= time.monotonic() - started < 1.9  # not observed again by `take`
    assert files(tmp_path) == ["4.json"]
    give_back(held)


def test_a_lease_expires_within_half_a_minute() -> None:
    assert lease._EXPIRE_SECONDS + lease._LOOK_SECONDS <= 30
    assert 3 * lease._RENEW_SECONDS < lease._EXPIRE_SECONDS


def test_only_one_of_several_drivers_takes_over(tmp_path: Path) -> None:
    forged(tmp_path, 1, machine=lease.MACHINE, process=2**30)
    barrier = threading.Barrier(4)
    outcomes: list[str] = []

    def race() -> None:
        made = RunLease(Folder(tmp_path))
        made.__enter__()
        barrier.wait()
        try:
            made.take()
            outcomes.append("held")
        except PhatgooseError:
            outcomes.append("refused")

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held", "refused", "refused", "refused"]


def test_a_lease_is_renewed(tmp_path: Path) -> None:
    held = take(tmp_path, renew_seconds=0.05)
    path = tmp_path / "driver" / "1.json"
    before = json.loads(path.read_text())["renewed"]
    ends = time.monotonic() + 20
    while json.loads(path.read_text())["renewed"] < before + 2:
        assert time.monotonic() < ends
    give_back(held)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_driver_that_lost_its_lease_exits(tmp_path: Path, handler: Any) -> None:
    """Check a driver that was suspended while another one took over, also in the background."""

    def work() -> None:
        with RunLease(Folder(tmp_path), renew_seconds=0.05) as held:
            held.take()
            forged(tmp_path, 2)
            threading.Event().wait(60)

    before = signal.signal(signal.SIGINT, handler), signal.getsignal(signal.SIGUSR1)
    started = time.monotonic()
    try:
        with pytest.raises(PhatgooseError, match=r"process 4 on node7, since noon.* took over"):
            work()
    finally:
        signal.signal(signal.SIGINT, before[0])
    assert time.monotonic() - started < 30
    assert signal.getsignal(signal.SIGUSR1) == before[1]
    assert files(tmp_path) == ["1.json", "2.json"]  # the other driver's lease stays


def test_a_driver_releases_only_its_own_lease(tmp_path: Path) -> None:
    held = take(tmp_path)
    forged(tmp_path, 1)
    give_back(held)
    assert files(tmp_path) == ["1.json"]


@pytest.mark.parametrize("follower", ["gone", "of the same number"])
def test_a_driver_exits_even_if_its_successor_has_ended(tmp_path: Path, follower: str) -> None:
    """Check a driver that was suspended while another took over, released the lease, and ended."""

    def work() -> None:
        with RunLease(Folder(tmp_path), renew_seconds=0.5) as held:
            held.take()
            (tmp_path / "driver" / "1.json").unlink()
            if follower != "gone":
                forged(tmp_path, 1)
            threading.Event().wait(60)

    started = time.monotonic()
    with pytest.raises(PhatgooseError, match="took over"):
        work()
    assert time.monotonic() - started < 30
    assert files(tmp_path) == ([] if follower == "gone" else ["1.json"])


def test_a_folder_without_atomic_create_still_has_a_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> bool:
        raise PhatgooseError("no") from NotImplementedError()

    monkeypatch.setattr(Folder, "create", refuse)
    held = take(tmp_path)
    with pytest.raises(PhatgooseError, match="is using it"):
        take(tmp_path)
    give_back(held)
