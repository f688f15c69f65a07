import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import harness.conf
from harness.tasks import TaskData, TaskSpec, prepare_all, task_specs
from harness.tasks.records import Record
from harness.tasks.store import read_records
from phatgoose.errors import PhatgooseError
from tests.support.toy import from_archive

Archive = Callable[[dict[str, Any]], Path]

TASKS: dict[str, Any] = {
    "sums/1": {
        "canary": "canary GUID 1",
        "examples": [{"input": f"{i} plus 1?", "target": str(i + 1)} for i in range(30)],
    },
    "sums/2": {
        "canary": "canary GUID 2",
        "examples": [{"input": f"{i} plus 1?", "target": str(i + 1)} for i in range(20, 40)],
    },
    "colors": {
        "examples": [
            {"input": f"Is {i} red?", "target_scores": {"Yes": i % 2, "No": 1 - i % 2}}
            for i in range(20)
        ]
    },
    "broken": {"examples": [{"input": "x", "target_scores": {"Yes": 0, "No": 0}}]},
}
SUMS = TaskSpec("sums", ("sums/1", "sums/2"))
COLORS = TaskSpec("colors", ("colors",))


def prepare(spec: TaskSpec, path: Path) -> TaskData:
    return prepare_all([spec], from_archive(path))[0]


def all_records(data: TaskData) -> list[Record]:
    return read_records(data.train) + read_records(data.evaluation)


def test_prepare_writes_both_splits_of_all_members(archive: Archive) -> None:
    sums, colors = prepare_all([SUMS, COLORS], from_archive(archive(TASKS)))
    assert (sums.name, sums.kind, colors.kind) == ("sums", "generation", "multiple_choice")
    assert sum(sums.counts.values()) == 40  # the ten examples in both members count once
    assert sums.counts == {
        "train": len(read_records(sums.train)),
        "evaluation": len(read_records(sums.evaluation)),
    }
    for record in all_records(sums):
        assert record.task == "sums"
        assert record.input == f"\nQ: {int(record.targets[0]) - 1} plus 1?\nA: "
    assert all(r.choices == ["Yes", "No"] for r in all_records(colors))


def test_canaries_are_stored_with_the_data(archive: Archive) -> None:
    data = prepare(SUMS, archive(TASKS))
    assert data.origin is not None
    assert data.origin["canary"] == "canary GUID 1\ncanary GUID 2"


def test_preparing_again_does_not_need_the_archive(archive: Archive, tmp_path: Path) -> None:
    first = prepare_all([SUMS, COLORS], from_archive(archive(TASKS)))
    assert prepare_all([SUMS, COLORS], from_archive(tmp_path / "missing")) == first


def test_an_interrupted_preparation_is_repeated(archive: Archive) -> None:
    path = archive(TASKS)
    first = prepare(SUMS, path)
    rows = all_records(first)
    shutil.rmtree(first.train)
    (first.train.parent / "task.json").unlink()
    assert prepare(SUMS, path) == first
    assert all_records(first) == rows


@pytest.mark.parametrize(
    "changed",
    [
        TaskSpec("sums", ("sums/1",)),
        TaskSpec("sums", ("sums/1", "sums/2"), style="paper"),
        TaskSpec("plus", ("sums/1", "sums/2")),
    ],
)
def test_everything_that_changes_records_changes_the_fingerprint(
    archive: Archive, changed: TaskSpec
) -> None:
    path = archive(TASKS)
    first, other = prepare_all([SUMS, changed], from_archive(path))
    assert first.fingerprint != other.fingerprint
    assert first.train != other.train


def test_how_a_task_is_evaluated_does_not_change_its_data(archive: Archive) -> None:
    limited = TaskSpec("sums", ("sums/1", "sums/2"), split="all", limit=3)
    first, other = prepare_all([SUMS, limited], from_archive(archive(TASKS)))
    assert (first.train, first.fingerprint) == (other.train, other.fingerprint)


def test_an_invalid_task_is_named_and_leaves_no_files(archive: Archive, cache: Path) -> None:
    with pytest.raises(
        PhatgooseError,
        match="task odd: BIG-bench task broken, example 1: none of the choices is correct",
    ):
        prepare(TaskSpec("odd", ("broken",)), archive(TASKS))
    assert not list(cache.rglob("*.parquet"))


def test_an_archive_with_another_hash_is_never_read(archive: Archive, cache: Path) -> None:
    (cache / "downloads").mkdir(parents=True)
    archive(TASKS).rename(cache / "downloads" / "bigbench-1.0.0.tar.gz")
    with pytest.raises(PhatgooseError, match=r"bigbench-1\.0\.0\.tar\.gz is damaged .* delete it"):
        prepare_all([SUMS])
    assert not list(cache.rglob("*.parquet"))


def test_task_specs_inherit_defaults_from_the_group() -> None:
    group = {
        "name": "small",
        "limit": 40,
        "tasks": {"a": {"members": ["x"]}, "b": {"members": ["y", "z"], "limit": 5}},
    }
    assert task_specs(group) == [
        TaskSpec("a", ("x",), limit=40),
        TaskSpec("b", ("y", "z"), limit=5),
    ]


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ({"members": ["x"], "styl": "paper"}, "'styl'; did you mean style"),
        ({"members": ["x"], "style": "papr"}, "'papr'; did you mean paper"),
        ({"members": ["x"], "split": "train"}, "split"),
        ({"members": ["x"], "load_opts": {"noappend": True}}, "did you mean no_append"),
        (
            {"members": ["x"], "load_opts": {"no_append": "false"}},
            "no_append='false': its type must match False",
        ),
        ({"members": ["x"], "limit": 0}, "limit must be a positive number"),
        ({"members": []}, "members (must be a list|are missing)"),
        ({"members": "x"}, "members (must be a list|are missing)"),
        (None, "members (must be a list|are missing)"),
    ],
)
def test_an_error_in_a_task_names_the_task(task: dict[str, Any] | None, reason: str) -> None:
    with pytest.raises(PhatgooseError, match=reason) as caught:
        task_specs({"name": "small", "tasks": {"sums": task}})
    assert "sums" in str(caught.value)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".hidden"])
def test_names_that_could_become_other_paths_are_refused(name: str) -> None:
    with pytest.raises(PhatgooseError, match="is not a valid task name"):
        TaskSpec(name, ("x",))


def test_the_demo_does_not_evaluate_on_training_data() -> None:
    folder = Path(harness.conf.__path__[0])
    pool, suite = (
        task_specs(yaml.safe_load((folder / group / "demo.yaml").read_text()))
        for group in ("pool", "suite")
    )
    assert (len(pool), len(suite)) == (8, 6)
    assert not {m for s in pool for m in s.members} & {m for s in suite for m in s.members}
