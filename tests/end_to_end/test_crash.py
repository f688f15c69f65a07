import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness import run_folder
from harness.config.load import load_config
from harness.run import run
from harness.storage import Folder
from tests.support.tiny_encoder import make_encoder
from tests.support.toy import prepare_toys, toy_arguments

SHARDS = Path("answers", "shards")

pytestmark = [pytest.mark.slow(seconds=180), pytest.mark.usefixtures("own_ray")]

DEADLINE = 300.0


class Command:
    """`python -m harness.run ...` as a user starts it, in its own session."""

    def __init__(self, arguments: list[str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "harness.run", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Background tests may ignore SIGINT, and so may the processes they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Wait for an event while the command is running."""
        deadline = time.monotonic() + DEADLINE
        while not happened():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.005)

    def processes(self) -> list[psutil.Process]:
        """Return all processes that the command has started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return the exit status, standard output and standard error."""
        output, error = self.process.communicate(timeout=DEADLINE)
        return self.process.returncode, output, error


@pytest.fixture
def start(tmp_path: Path, llama_folder: Path) -> Iterator[Callable[[str], Command]]:
    """Start the toy run in a folder; kill what is still running at the end."""
    commands: list[Command] = []

    def start(name: str) -> Command:
        given = toy_arguments(llama_folder, tmp_path / name)
        if not commands:
            make_encoder(tmp_path / "encoder")
            config = load_config(given)
            prepare_toys([*config.pool_tasks(), *config.suite_tasks(config.suites[0])], tmp_path)
        commands.append(Command(given))
        return commands[-1]

    yield start
    for command in commands:
        if command.process.poll() is None:
            for process in command.processes():
                process.kill()
            command.process.kill()
            command.process.communicate()


def wait_until_gone(orphans: list[psutil.Process]) -> None:
    """Wait until no process of a run is left, except for Ray's agents, which take a minute."""
    deadline = time.monotonic() + 20
    while alive := [name for name in map(_name, orphans) if name and "Agent" not in name]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.1)


def _name(process: psutil.Process) -> str | None:
    """Return the name of a process; None if it has ended."""
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else process.name()
    except psutil.NoSuchProcess:
        return None


def times(folder: Path) -> dict[str, int]:
    """Return when each file below a folder was written, without the leftovers of killed writers."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return {path.name: path.stat().st_mtime_ns for path in files}


def finished(run_dir: Path) -> dict[str, int]:
    """Return the objects of finished jobs and when they were written."""
    jobs = [path.read_text() for path in (run_dir / "registry" / "jobs").glob("*.json")]
    objects = times(run_dir / "registry" / "objects")
    kept = {n: t for n, t in objects.items() if any(n.partition(".")[0] in job for job in jobs)}
    assert len(kept) == len(jobs)
    return kept


def outcome(run_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what must not depend on how often a run was stopped: scores and experts."""
    rows = run_folder.read_table(
        Folder(run_dir), run_folder.SCORES_FILE, run_folder.SCORES
    ).to_pylist()
    same = [{**row, "run": None, "seconds": None} for row in rows]
    return same, sorted(finished(run_dir))


def test_a_run_killed_repeatedly_gives_the_results_of_an_undisturbed_one(
    start: Callable[[str], Command], tmp_path: Path, llama_folder: Path
) -> None:
    run_dir = tmp_path / "disturbed"
    first = start("disturbed")
    first.wait_for(lambda: bool(times(run_dir / "training")))
    orphans = first.processes()
    first.process.kill()
    first.end()
    trained = finished(run_dir)
    assert len(trained) < 3  # in the middle of training
    assert orphans

    second = start("disturbed")  # immediately, while the first one's Ray may still be running
    # For the experts that exist, answers may come before the last one is trained.
    second.wait_for(lambda: len(finished(run_dir)) == 3 and len(times(run_dir / SHARDS)) >= 3)
    orphans += second.processes()
    second.process.kill()
    _, _, error = second.end()
    # The first run's registry actor may have published one more expert since.
    assert error.count("trained   ") <= 3 - len(trained)
    assert not (run_dir / run_folder.SUMMARY_FILE).exists()  # in the middle of evaluation
    assert len(times(run_dir / SHARDS)) >= 3
    experts = finished(run_dir)
    assert len(experts) == 3
    assert trained.items() <= experts.items()

    status, output, error = start("disturbed").end()
    assert status == 0, error
    assert "0 of 3 jobs" in output
    assert "trained   " not in error
    assert finished(run_dir) == experts
    # What was answered before was not asked again.
    evaluations = run_folder.read_table(
        Folder(run_dir), run_folder.EVALUATIONS_FILE, run_folder.EVALUATIONS
    )
    scores = run_folder.read_table(Folder(run_dir), run_folder.SCORES_FILE, run_folder.SCORES)
    tokens = {
        (row["router"], row["task"]): row["tokens"]
        for row in scores.to_pylist()
        if row["router"] != "oracle"
    }
    assert sum(evaluations["tokens"].to_pylist()) < sum(tokens.values())
    wait_until_gone(orphans)

    run(load_config(toy_arguments(llama_folder, tmp_path / "undisturbed")))
    assert outcome(run_dir) == outcome(tmp_path / "undisturbed")


def test_a_run_stopped_by_ctrl_c_reports_it_in_one_line(
    start: Callable[[str], Command], tmp_path: Path
) -> None:
    command = start("stopped")
    command.wait_for(lambda: bool(times(tmp_path / "stopped" / "training")))
    orphans = command.processes()
    os.killpg(command.process.pid, signal.SIGINT)  # as a terminal does
    status, _, error = command.end()
    assert status == 130
    lines = [line for line in error.splitlines() if line and not line.startswith("trained   ")]
    assert lines == ["stopped; run the same command to resume"]
    wait_until_gone(orphans)
