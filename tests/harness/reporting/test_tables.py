"""Check that only the wanted rows and columns of many parquet files are read."""

import itertools
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import run_folder
from harness.reporting import tables
from harness.reporting.plots import plot_routing
from harness.reporting.tables import Tables
from harness.run_folder import ROUTING, ROUTING_FOLDER, SAMPLES, SAMPLES_FOLDER
from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from tests.support.answered import sample
from tests.support.s3_server import S3Server

Row = dict[str, Any]


@pytest.fixture(params=["local", "memory", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "s3":
        server: S3Server = request.getfixturevalue("s3")
        return Folder(server.uri(tmp_path.name))
    return Folder(tmp_path if request.param == "local" else "memory:///run")


def rows_of(router: str, tasks: list[str], suite: str = "s", value: float = 1.0) -> list[Row]:
    """Return two rows of samples per task."""
    rows = [
        sample(task, router, f"d{i}", {"acc": value})
        for task, i in itertools.product(tasks, (1, 2))
    ]
    return [{**row, "suite": suite, "cluster": None, "metrics": {"acc": value}} for row in rows]


def write(folder: Folder, name: str, rows: list[Row]) -> None:
    run_folder.write_table(folder, name, SAMPLES, rows)


def open_samples(folder: Folder) -> Tables:
    return Tables(folder, SAMPLES_FOLDER, SAMPLES)


def cells(samples: Tables, *columns: str, **wanted: str) -> list[tuple[Any, ...]]:
    parts = samples.select(columns, **wanted)
    return [tuple(row.values()) for part in parts for row in part.to_pylist()]


@settings(deadline=None)
@given(st.lists(st.sampled_from("tuv")))
def test_samples_have_a_row_group_for_each_run_of_a_task(tasks: list[str]) -> None:
    folder = Folder("memory:///run")
    rows = [row for task in tasks for row in rows_of("a", [task])]
    write(folder, "samples/s/a.parquet", rows)
    metadata = pq.read_metadata(pa.BufferReader(folder.read("samples/s/a.parquet")))
    groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    runs = [2 * len(list(same)) for _, same in itertools.groupby(tasks)]
    assert [size for size in groups if size] == runs
    read = run_folder.read_table(folder, "samples/s/a.parquet", SAMPLES).to_pylist()
    assert [row["task"] for row in read] == [row["task"] for row in rows]


def test_scores_have_one_row_group(folder: Folder) -> None:
    """Check that tables whose tasks alternate are not cut into single rows."""
    row = dict.fromkeys(run_folder.TRAINING.names, 1) | {"job": "j", "stage": "lora"}
    rows = [{**row, "expert": name, "split": "train"} for name in "abab"]
    run_folder.write_table(folder, "training/a.parquet", run_folder.TRAINING, rows)
    file = pq.ParquetFile(pa.BufferReader(folder.read("training/a.parquet")))
    assert file.num_row_groups == 1


def test_rows_are_selected_by_router_suite_and_task(folder: Folder) -> None:
    write(folder, "samples/s/b.parquet", rows_of("b", ["t", "u"]))
    write(folder, "samples/s/a.parquet", rows_of("a", ["u", "t"]))
    write(folder, "samples/r/a.parquet", rows_of("a", ["t"], suite="r"))
    samples = open_samples(folder)
    assert len(samples) == 10
    assert cells(samples, "router", "document", suite="s", task="t") == [
        ("a", "d1"), ("a", "d2"), ("b", "d1"), ("b", "d2"),
    ]  # fmt: skip
    assert cells(samples, "task", suite="r") == [("t",), ("t",)]
    assert cells(samples, "task", "suite", router="a", task="u") == [("u", "s")] * 2
    assert cells(samples, "task", suite="r", task="u") == []
    assert samples.distinct("router") == ["a", "b"]
    assert samples.distinct("task", router="a", suite="s") == ["u", "t"]
    assert samples.distinct("suite", router="b") == ["s"]


@pytest.mark.parametrize("statistics", [True, False])
def test_rows_of_several_tasks_in_one_row_group_are_found(folder: Folder, statistics: bool) -> None:
    write(folder, "made.parquet", rows_of("a", ["t", "v"]))
    table = run_folder.read_table(folder, "made.parquet", SAMPLES)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, write_statistics=statistics)
    folder.write("samples/s/a.parquet", sink.getvalue().to_pybytes())
    samples = open_samples(folder)
    assert samples.distinct("task") == ["t", "v"]
    assert samples.distinct("task", task="u") == []  # between the smallest and the largest
    assert cells(samples, "task", "document", task="v") == [("v", "d1"), ("v", "d2")]


def test_a_part_of_each_file_is_read_once(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that a task costs one request per file, of little more than its own bytes."""
    tasks = [f"t{i}" for i in range(20)]
    for router in "ab":
        rows = [row for task in tasks for row in rows_of(router, [task] * 50)]
        write(folder, f"samples/s/{router}.parquet", rows)
    samples = open_samples(folder)
    read: list[tuple[str, int]] = []
    original = Folder.read_part

    def read_part(self: Folder, name: str, start: int, length: int) -> bytes:
        read.append((name, length))
        return original(self, name, start, length)

    monkeypatch.setattr(Folder, "read_part", read_part)
    assert len(cells(samples, "document", "metrics", task="t7")) == 200
    assert sorted(name for name, _ in read) == ["samples/s/a.parquet", "samples/s/b.parquet"]
    whole = len(folder.read("samples/s/a.parquet"))
    assert all(length < whole / 15 for _, length in read)
    read.clear()
    assert samples.distinct("task") == tasks
    assert read == []  # the footers say it


def test_a_footer_larger_than_the_first_request_is_read(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_FOOTER", 16)
    write(folder, "samples/s/a.parquet", rows_of("a", ["t"]))
    assert cells(open_samples(folder), "document") == [("d1",), ("d2",)]


def test_rows_of_version_0_1_0_that_were_scored_again_do_not_count(folder: Folder) -> None:
    """Check a suite with a file of its own beside the old file with all suites."""
    old = [*rows_of("z:z", ["t"], suite="s", value=0.0), *rows_of("z:z", ["t"], suite="o:p")]
    write(folder, "samples/z@z.parquet", [*old, *rows_of("z:z", ["t"], suite="r")])
    write(folder, "samples/s/z@z.parquet", rows_of("z:z", ["u"], suite="s", value=0.5))
    write(folder, "samples/o@p/z@z.parquet", rows_of("z:z", ["u"], suite="o:p"))
    samples = open_samples(folder)
    assert cells(samples, "task", "metrics", suite="s") == [("u", [("acc", 0.5)])] * 2
    assert samples.distinct("task", suite="o:p") == ["u"]
    assert samples.distinct("task", suite="r") == ["t"]
    assert sorted(samples.distinct("suite")) == ["o:p", "r", "s"]
    write(folder, "samples/z@z.parquet", old[:2])  # one suite and task, as the footer says
    assert sorted(open_samples(folder).distinct("task")) == ["u"]


def test_columns_that_a_file_lacks_are_null(folder: Folder) -> None:
    write(folder, "made.parquet", rows_of("a", ["t"]))
    table = run_folder.read_table(folder, "made.parquet", SAMPLES).drop_columns("cluster")
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    folder.write("samples/a.parquet", sink.getvalue().to_pybytes())
    assert cells(open_samples(folder), "document", "cluster") == [("d1", None), ("d2", None)]


def test_a_damaged_file_is_named(folder: Folder) -> None:
    write(folder, "samples/s/a.parquet", rows_of("a", ["t"]))
    data = folder.read("samples/s/a.parquet")
    for damaged in (data[:-20], b"", b"PAR1"):
        folder.write("samples/s/a.parquet", damaged)
        with pytest.raises(PhatgooseError, match=r"samples/s/a\.parquet is damaged"):
            open_samples(folder)
    folder.write("samples/s/a.parquet", data[:4] + bytes(len(data) - 600) + data[-596:])
    with pytest.raises(PhatgooseError, match=r"samples/s/a\.parquet is damaged"):
        cells(open_samples(folder), "document")


def test_a_file_that_shrank_is_an_error(folder: Folder) -> None:
    write(folder, "samples/s/a.parquet", rows_of("a", ["t", "u", "v"]))
    samples = open_samples(folder)
    folder.write("samples/s/a.parquet", folder.read("samples/s/a.parquet")[:50])
    with pytest.raises(PhatgooseError, match=r"samples/s/a\.parquet"):
        cells(samples, "document", task="v")


def test_a_file_with_other_columns_is_named(folder: Folder) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"router": ["base"]}), sink)
    folder.write("samples/s/a.parquet", sink.getvalue().to_pybytes())
    with pytest.raises(PhatgooseError, match=r"samples/s/a\.parquet has different columns"):
        open_samples(folder)


def test_a_routing_plot_reads_one_task_of_one_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Folder(tmp_path)
    for router in ("arrow", "phatgoose"):
        rows = [
            {"router": router, "suite": "s", "task": task, "linear": f"model.layers.{i}.up"}
            | {"expert": expert, "share": 0.5, "tokens": 1, "entropy": 0.5}
            for task, i, expert in itertools.product("tuv", range(2), "ab")
        ]
        run_folder.write_table(folder, f"routing/s/{router}.parquet", ROUTING, rows)
    read: list[tuple[int, int]] = []
    original = pq.ParquetFile.read_row_group

    def read_row_group(self: Any, i: int, *arguments: Any, **options: Any) -> pa.Table:
        table = original(self, i, *arguments, **options)
        read.append((i, len(table)))
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    monkeypatch.setattr(Folder, "read", None)  # no file is read completely
    plot_routing(folder, task="u")
    assert read == [(1, 4)]
    assert Tables(folder, ROUTING_FOLDER, ROUTING).distinct("router") == ["arrow", "phatgoose"]
