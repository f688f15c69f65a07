"""Check the table of jobs and the status of a run, during the run and afterwards."""

import json
import os
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from harness import run_folder
from harness.scheduling.actor import Location
from harness.scheduling.progress import StageProgress
from harness.scheduling.workers import Workers
from harness.status import main, read_status
from harness.storage import Folder
from harness.tasks import TaskSpec
from harness.training.job import TrainJob
from harness.training.job_table import JobTable
from harness.training.stage import Training
from phatgoose.card import Card
from phatgoose.training.recipe import Recipe

HERE = Location("a1b2c3d4" * 7, "10.0.0.1", 77)
THERE = Location("ffeeddcc" * 7, "10.0.0.2", 78)


def job(name: str) -> TrainJob:
    card = Card(name, name, "tiny", "b" * 64, "d" * 64, name * 8, 1.0, {}, {})
    return TrainJob(card, (TaskSpec(name, (name,)),), Recipe())


@pytest.fixture
def jobs() -> dict[str, TrainJob]:
    return {name: job(name) for name in ("aa", "bb", "cc", "dd")}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    made = Folder(tmp_path / "run")
    call = {"started": "2026-11-26T10:00:00+00:00", "finished": None}
    run_folder.write_run(made, {"identity": {}, "calls": [call]})
    return made


def table(folder: Folder, jobs: dict[str, TrainJob], *finished: str) -> JobTable:
    tokens = {job.card.job: 1000 for job in jobs.values()}
    done = {jobs[name].card.job: "0" * 64 for name in finished}
    return JobTable(folder, list(jobs.values()), tokens, done)


def rows(folder: Folder) -> dict[str, dict[str, Any]]:
    found = run_folder.read_table(folder, run_folder.JOBS_FILE, run_folder.JOBS).to_pylist()
    return {row["expert"]: row for row in found}


def test_the_table_has_the_outcome_of_every_job(folder: Folder, jobs: dict[str, TrainJob]) -> None:
    made = table(folder, jobs, "aa")
    made.start(jobs["bb"], HERE)
    made.put_back(jobs["bb"], "its actor died: gone", "Traceback ...")
    made.start(jobs["bb"], THERE)
    made.end(jobs["bb"])
    made.start(jobs["cc"], HERE)
    made.end(jobs["cc"], "ValueError: no", "Traceback of no")
    made.start(jobs["dd"], THERE)
    assert made.counts() == {"waiting": 0, "running": 1, "done": 2, "failed": 1}
    made.save(now=True)
    found = rows(folder)
    assert {name: row["state"] for name, row in found.items()} == {
        "aa": "done",
        "bb": "done",
        "cc": "failed",
        "dd": "running",
    }
    assert found["bb"]["errors"] == ["its actor died: gone"]
    assert (found["bb"]["starts"], found["bb"]["address"]) == (2, "10.0.0.2")
    assert found["cc"]["errors"] == ["ValueError: no"]
    assert found["cc"]["traceback"] == "Traceback of no"
    assert found["aa"]["starts"] == 0

    # The driver dies here. The next one finds bb done, and cc, whose expert another driver made.
    again = table(folder, jobs, "aa", "bb", "cc")
    again.save(now=True)
    found = rows(folder)
    assert [row["state"] for row in found.values()] == ["done", "done", "done", "waiting"]
    assert found["bb"]["errors"] == ["its actor died: gone"]  # its outcome at that time


def test_a_run_is_described_while_it_is_running(
    folder: Folder, jobs: dict[str, TrainJob], capsys: pytest.CaptureFixture[str]
) -> None:
    made = table(folder, jobs, "aa")
    made.start(jobs["bb"], HERE)
    made.put_back(jobs["cc"], "its actor died: lost", "")
    made.save(now=True)
    with StageProgress(folder, "train", 4000, "token", 4, 1000) as progress:
        progress._written = -1e9
        progress.update(2000, made.counts(), [(HERE, True), (HERE, False), (THERE, True)])
        before = {name: folder.read(name) for name in folder.names()}
        assert main([str(folder)]) == 0
        text = capsys.readouterr().out
        assert main([str(folder), "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert {name: folder.read(name) for name in folder.names()} == before
    assert "running since 2026-11-26T10:00:00" in text
    assert "train: 50% of 4,000 tokens" in text
    assert "1 done, 1 running, 2 waiting, 0 failed" in text
    assert "10.0.0.1 (a1b2c3): 2 actors, 1 working" in text
    assert "10.0.0.2 (ffeedd): 1 actor, 1 working" in text
    assert "process 77" in text
    assert "cc: 1 error, last one: its actor died: lost" in text
    assert document["state"] == "running"
    assert document["stage"]["rate"] > 0
    assert document["stage"]["seconds_left"] is not None
    assert document["stage"]["driver"]["process"] == os.getpid()
    assert read_status(folder)["stage"]["state"] == "finished"


def test_experts_trained_by_earlier_calls_stay_done(
    folder: Folder, jobs: dict[str, TrainJob]
) -> None:
    idle = Workers(lambda: None, lambda: 0)
    with StageProgress(folder, "train", 4000, "token", 4, 3000) as progress:
        made = table(folder, jobs, "aa")
        training = Training([jobs["bb"]], folder, idle, None, made, progress)
        progress._written = -1e9
        training.show()
        stage = json.loads(folder.read(run_folder.STATUS_FILE))
    assert stage["done"] == 3000
    assert stage["rate"] == 0


def test_a_silent_driver_is_noticed(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress(folder, "train", 10, "token", 1):
        pass
    status = run_folder.read_json(folder, run_folder.STATUS_FILE)
    long_ago = datetime.now(UTC) - timedelta(minutes=10)
    old = {**status, "state": "running", "written": long_ago.isoformat()}
    run_folder.write_json(folder, run_folder.STATUS_FILE, old)
    assert read_status(folder)["state"] == "silent"
    assert main([str(folder), "--watch"]) == 0  # nothing to wait for
    assert "no heartbeat for 10 min" in capsys.readouterr().out
    ahead = {**old, "written": (datetime.now(UTC) + timedelta(hours=1)).isoformat()}
    run_folder.write_json(folder, run_folder.STATUS_FILE, ahead)
    assert read_status(folder)["state"] == "running"  # another clock


def test_a_stopped_and_a_finished_run_are_distinguished(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt), StageProgress(folder, "train", 10, "token", 1):
        raise KeyboardInterrupt
    assert read_status(folder)["state"] == "stopped"
    record = run_folder.read_run(folder)
    record["calls"][-1] |= {"finished": "now", "minutes": 3.5, "problems": ["expert aa: no"]}
    run_folder.write_run(folder, record)
    assert main([str(folder)]) == 0
    text = capsys.readouterr().out
    assert "with 1 problem" in text
    assert "expert aa: no" in text


def score(router: str, task: str, metric: str, value: float) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(run_folder.SCORES.names, None)
    row |= {"router": router, "task": task, "metric": metric, "value": value, "suite": "held"}
    texts = ("run", "base", "manifest", "options", "documents")
    numbers = ("n", "seconds", "tokens")
    return row | dict.fromkeys(texts, "") | dict.fromkeys(numbers, 1) | {"zero_shot": True}


def test_an_evaluation_shows_states_scores_and_tracebacks(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    states = {"base": "done", "phatgoose": "done", "merged": "scoring", "arrow": "failed"}
    error, traceback = "held/t: no rank", "Traceback:\n  ValueError: no rank"
    rows = [
        {"router": router, "suite": "held", "state": state, "shards": 4, "answered": 4}
        | {"tokens": 9, "seconds": 1.0, "errors": [error] if state == "failed" else []}
        | {"traceback": traceback if state == "failed" else None}
        for router, state in states.items()
    ]
    run_folder.write_table(folder, "evaluations.parquet", run_folder.EVALUATIONS, rows)
    scores = [
        score("base", "one", "acc", 0.25),
        score("base", "one", "nll", 9.0),
        score("base", "two", "exact_match", 0.75),
        score("phatgoose", "one", "acc", 0.75),
        score("phatgoose", "two", "exact_match", 1.0),
        score("single:e0", "one", "acc", 0.9),
    ]
    run_folder.write_table(folder, "scores.parquet", run_folder.SCORES, scores)
    with StageProgress(folder, "evaluate", 100, "request", 16, 20) as progress:
        counts = {"waiting": 9, "running": 1, "done": 6, "failed": 0}
        progress.update(40, counts, [(HERE, True)])
        progress._write(now=True)
        assert main([str(folder)]) == 0
    text = capsys.readouterr().out
    assert "evaluate: 40% of 100 requests" in text
    assert "shards    6 done, 1 running, 9 waiting" in text
    assert "routers   2 done, 1 scoring, 1 failed" in text
    lines = [line.split() for line in text.splitlines()]
    first, second = (
        lines.index(["held", router, "2", value])
        for router, value in (("phatgoose", "87.5"), ("base", "50.0"))
    )
    assert first < second
    assert "single:e0" not in text
    assert f"failed    router arrow, {error}" in text
    assert "ValueError: no rank" in text
    means = {mean["router"]: mean["value"] for mean in read_status(folder)["scores"]}
    assert means == {"phatgoose": 0.875, "base": 0.5, "single:e0": 0.9}


def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "nothing")]) == 2
    assert "this is not a run folder" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("two_cores")
def test_prometheus_can_scrape_the_progress(folder: Folder) -> None:
    """Scrape the agent of a real Ray's node, as Prometheus does."""
    import urllib.request

    import ray

    (node,) = ray.nodes()
    address = f"http://127.0.0.1:{node['MetricsExportPort']}/metrics"
    with StageProgress(folder, "train", 4000, "token", 4, 1000) as progress:
        counts = {"waiting": 2, "running": 1, "done": 1, "failed": 0}
        wanted = ("ray_phatgoose_queue_length{", "ray_phatgoose_tokens_per_second{")
        deadline, text = time.monotonic() + 60, ""
        while not all(name in text for name in wanted):
            assert time.monotonic() < deadline, text[:2000]
            progress._written = -1e9
            progress.update(2000, counts, [(HERE, True)])
            with urllib.request.urlopen(address, timeout=10) as page:
                text = page.read().decode()
    (line,) = [line for line in text.splitlines() if line.startswith(wanted[0])]
    assert 'stage="train"' in line
    assert line.endswith(" 2.0")
