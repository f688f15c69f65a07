"""Prepare tasks on a real Ray, and check the command line of tasks."""

import json
from pathlib import Path

import pytest

from harness.driver import prepare
from harness.driver.prepare import comparer, preparer
from harness.evaluation import overlap
from harness.scheduling.cluster import Cluster
from harness.tasks import TaskSpec, folder_of, prepare_all
from harness.tasks.__main__ import main
from harness.tasks.store import is_written
from phatgoose.errors import PhatgooseError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_files(folder: Path, count: int) -> list[Path]:
    files = []
    for task in range(count):
        lines = [{"input": f"{task} and {i} is", "target": str(task + i)} for i in range(20)]
        files.append(folder / f"sums{task}.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


def specs(files: list[Path]) -> list[TaskSpec]:
    return [TaskSpec(file.stem, (str(file),), "jsonl") for file in files]


@pytest.mark.slow
def test_many_tasks_are_prepared_on_the_cluster(two_cores: None, tmp_path: Path) -> None:
    wanted = specs(write_files(tmp_path, 6))
    first = prepare_all(wanted[:1])  # one that exists already
    with Cluster() as cluster:
        data = prepare_all(wanted, preparer(cluster))
    assert data[0] == first[0]
    assert [sum(d.counts.values()) for d in data] == [20] * 6
    # The second time, nothing is prepared.
    assert prepare_all(wanted, lambda _: pytest.fail("made again")) == data


@pytest.mark.slow
def test_an_invalid_task_is_reported_after_the_others_are_prepared(
    two_cores: None, tmp_path: Path
) -> None:
    files = write_files(tmp_path, 6)
    files[2].write_text('{"input": "x"}\n')
    with (
        Cluster() as cluster,
        pytest.raises(PhatgooseError, match=r"1 of 6 tasks cannot be.*sums2\.jsonl, line 1"),
    ):
        prepare_all(specs(files), preparer(cluster))
    made = [is_written(folder_of(spec)) for spec in specs(files)]
    assert made == [True, True, False, True, True, True]


@pytest.mark.slow
def test_much_training_data_is_compared_on_the_cluster(
    two_cores: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "_FEW_EXAMPLES", 50)
    pool = prepare_all(specs(write_files(tmp_path, 6)))
    shared = "the grey goose flies over the deep lake, and number is"
    for name in ("birds", "lakes"):
        lines = [{"input": f"{name} {i}: {shared}", "target": "one"} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    pool += prepare_all(specs([tmp_path / "birds.jsonl"]))
    spec = TaskSpec("lakes", (str(tmp_path / "lakes.jsonl"),), "jsonl", split="all")
    suite = prepare_all([spec])
    with Cluster() as cluster:
        comparer(cluster)(pool, suite)
    assert overlap.not_compared(pool, suite) == []
    monkeypatch.setattr(overlap, "SuiteIndex", lambda _: pytest.fail("compared again"))
    assert [found.expert for found in overlap.find_overlaps(pool, suite)] == ["birds"]
    comparer(cluster)(pool, suite)  # nothing to do, so no cluster


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


def test_available_tasks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = call(capsys, "list")
    assert status == 0
    lines = {line.split()[0]: line for line in out.splitlines() if "=" in line}
    assert " 166 " in lines["pool=flan"]
    assert " 22 " in lines["suite=bbh"]
    document = json.loads(call(capsys, "list", "--json")[1])
    assert document["pool=bigbench"]["tasks"] == 115
    assert document["suite=held_in"]["tasks"] is None


def test_a_task_is_shown_as_the_model_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path, 2)
    files = f"pool.files='{tmp_path}/*.jsonl'"
    status, out, _ = call(capsys, "show", "sums1", "pool=jsonl", files, "suite=held_in")
    assert status == 0
    assert "sums1: sums1" in out
    assert "generation, " in out
    assert " is▁\n  → " in out  # the space before the answer is visible
    status, _, err = call(capsys, "show", "sum1", "pool=jsonl", files)
    assert (status, "did you mean sums1 or sums0?" in err) == (2, True)


def test_columns_can_be_named_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sums.csv").write_text("question,answer\n1 and 1 is,2\n2 and 1 is,3\n")
    names = ("+pool.load_opts.input=question", "+pool.load_opts.target=answer")
    files = f"pool.files={tmp_path}/sums.csv"
    status, out, _ = call(capsys, "prepare", "pool=jsonl", files, *names)
    assert (status, "2 examples" in out) == (0, True)


def test_reachability_is_checked_task_by_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_files(tmp_path, 2)
    files = f"pool.files='{tmp_path}/*.jsonl'"
    status, out, _ = call(capsys, "check", "pool=jsonl", files)
    assert (status, out.count("reachable"), "2 of 2 tasks" in out) == (0, 2, True)
    assert call(capsys, "prepare", "pool=jsonl", files)[0] == 0
    assert call(capsys, "check", "pool=jsonl", files)[1].count("prepared") == 2
    status, out, _ = call(capsys, "check", "pool=t0", "--json")
    assert status == 1
    document = json.loads(out)
    assert (document["reachable"], document["of"]) == (0, 36)
    assert document["tasks"]["P3Agnews"] == "missing"
    assert "fancyzhx/ag_news" in document["problems"]["P3Agnews"]
