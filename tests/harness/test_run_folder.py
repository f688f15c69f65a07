"""Check the parquet files of a run: reading, writing, and refusals."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import run_folder
from harness.storage import Folder
from phatgoose.errors import PhatgooseError

SCORE: dict[str, Any] = {
    "run": "demo",
    "base": "tiny",
    "manifest": "3",
    "router": "phatgoose",
    "top_k": 2,
    "options": "{}",
    "zero_shot": True,
    "side_information": None,
    "dtype": "float32",
    "device": "cpu",
    "versions": "{}",
    "code": "c0de",
    "router_code": None,
    "answers": None,
    "suite": "held_out",
    "task": "plural",
    "metric": "acc",
    "value": 0.5,
    "stderr": None,
    "documents": "0123",
    "n": 4,
    "cut": 0,
    "seconds": 1.5,
    "tokens": 100,
    "expert": None,
}
SAMPLE: dict[str, Any] = {
    "router": "single:plural",
    "suite": "held_out",
    "task": "plural",
    "document": "d1",
    "target": "b",
    "prediction": "a",
    "correct": False,
    "choice_scores": [-1.0, -2.0],
    "cluster": "d0",
    "metrics": {"nll": 2.0, "acc": 0.0},
}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_scores_are_read_as_written(folder: Folder) -> None:
    rows = [SCORE, {**SCORE, "router": "base", "top_k": None, "stderr": 0.1}]
    run_folder.write_table(folder, "scores.parquet", run_folder.SCORES, rows)
    assert run_folder.read_table(folder, "scores.parquet", run_folder.SCORES).to_pylist() == rows


def test_samples_of_all_routers_are_read_together(folder: Folder) -> None:
    for router in ("single:plural", "base"):
        row = {**SAMPLE, "router": router}
        name = run_folder.samples_file("held", router)
        run_folder.write_table(folder, name, run_folder.SAMPLES, [row])
    table = run_folder.read_folder(folder, "samples", run_folder.SAMPLES)
    assert sorted(table["router"].to_pylist()) == ["base", "single:plural"]
    assert dict(table["metrics"].to_pylist()[0]) == {"acc": 0.0, "nll": 2.0}


def test_samples_of_version_0_1_0_get_a_file_per_suite(folder: Folder) -> None:
    rows = [{**SAMPLE, "router": "base", "suite": suite} for suite in ("bbh", "held", "bbh")]
    run_folder.write_table(folder, "samples/base.parquet", run_folder.SAMPLES, rows)
    newer = [{**SAMPLE, "router": "base", "suite": "held", "prediction": "newer"}]
    run_folder.write_table(folder, "samples/held/base.parquet", run_folder.SAMPLES, newer)
    run_folder.split_by_suite(folder)
    run_folder.split_by_suite(folder)
    assert folder.names() == ["samples/bbh/base.parquet", "samples/held/base.parquet"]
    for suite, expected in (("bbh", [rows[0], rows[2]]), ("held", newer)):
        name = run_folder.samples_file(suite, "base")
        found = run_folder.read_table(folder, name, run_folder.SAMPLES).to_pylist()
        assert [{**row, "metrics": dict(row["metrics"])} for row in found] == expected


def test_a_missing_folder_has_no_rows(folder: Folder) -> None:
    table = run_folder.read_folder(folder, "routing", run_folder.ROUTING)
    assert table.num_rows == 0
    assert table.schema == run_folder.ROUTING


def test_equal_rows_are_written_with_equal_bytes(folder: Folder) -> None:
    turned = {**SAMPLE, "metrics": {"acc": 0.0, "nll": 2.0}}
    for name, row in (("a.parquet", SAMPLE), ("b.parquet", turned)):
        run_folder.write_table(folder, name, run_folder.SAMPLES, [row])
    assert folder.read("a.parquet") == folder.read("b.parquet")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"surprise": 1}, "surprise"),
        ({"n": "many"}, "column n"),
        ({"value": None}, "column value"),
    ],
)
def test_rows_that_do_not_match_the_schema_are_refused(
    folder: Folder, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(PhatgooseError, match=named):
        run_folder.write_table(
            folder, "scores.parquet", run_folder.SCORES, [SCORE, {**SCORE, **change}]
        )
    assert not folder.exists("scores.parquet")


def test_a_row_without_a_column_is_refused(folder: Folder) -> None:
    row = {key: value for key, value in SCORE.items() if key != "metric"}
    with pytest.raises(PhatgooseError, match=r"row 0 .*metric"):
        run_folder.write_table(folder, "scores.parquet", run_folder.SCORES, [row])


def test_a_truncated_file_is_named(folder: Folder, tmp_path: Path) -> None:
    run_folder.write_table(folder, "scores.parquet", run_folder.SCORES, [SCORE])
    path = tmp_path / "scores.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(PhatgooseError, match=r"scores\.parquet is damaged"):
        run_folder.read_table(folder, "scores.parquet", run_folder.SCORES)


def test_a_file_with_other_columns_is_named(folder: Folder, tmp_path: Path) -> None:
    pq.write_table(pa.table({"router": ["base"]}), tmp_path / "scores.parquet")
    with pytest.raises(PhatgooseError, match=r"scores\.parquet has different columns"):
        run_folder.read_table(folder, "scores.parquet", run_folder.SCORES)


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted as Linux lists them")
def test_reading_a_table_starts_no_threads(folder: Folder) -> None:
    """Check in a process of its own: one that exits while Arrow's threads end is aborted."""
    run_folder.write_table(folder, "scores.parquet", run_folder.SCORES, [SCORE] * 100)
    code = f"""
import os
from harness.run_folder import SCORES, SCORES_FILE, read_table
from harness.storage import Folder
folder = Folder({str(folder)!r})
folder.read(SCORES_FILE)
before = len(os.listdir("/proc/self/task"))
assert len(read_table(folder, SCORES_FILE, SCORES)) == 100
assert len(os.listdir("/proc/self/task")) == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_missing_file_is_named(folder: Folder) -> None:
    with pytest.raises(PhatgooseError, match=r"scores\.parquet is missing"):
        run_folder.read_table(folder, "scores.parquet", run_folder.SCORES)


@pytest.mark.parametrize(
    "schema",
    [
        run_folder.SCORES,
        run_folder.SUMMARY,
        run_folder.SAMPLES,
        run_folder.ROUTING,
        run_folder.TRAINING,
    ],
)
def test_the_file_describes_its_columns(folder: Folder, schema: pa.Schema) -> None:
    run_folder.write_table(folder, "table.parquet", schema, [])
    read = run_folder.read_table(folder, "table.parquet", schema).schema
    assert all(field.metadata[b"meaning"] for field in read)


names = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,30}", fullmatch=True)


@given(names)
def test_a_name_can_be_recovered_from_its_file(name: str) -> None:
    # So different names never share a file.
    assert run_folder.file_stem(name).replace("@", ":") == name


def test_a_file_stem_is_readable() -> None:
    name = run_folder.samples_file("bbh", "single:plural")
    assert name == "samples/bbh/single@plural.parquet"


@pytest.mark.parametrize("name", ["", ".", "..", ":a", "a/b", "a@b", "a b", "ü", "a\n", "x" * 201])
def test_names_that_are_not_file_names_are_refused(name: str) -> None:
    with pytest.raises(PhatgooseError, match="cannot be used as a file name"):
        run_folder.file_stem(name)


def test_the_run_record_is_read_as_written(folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(PhatgooseError, match="not a run folder"):
        run_folder.read_run(folder)
    run_folder.write_run(folder, {"configuration": {"pool": "demo"}})
    assert run_folder.read_run(folder) == {"configuration": {"pool": "demo"}}
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(PhatgooseError, match="not JSON"):
        run_folder.read_run(folder)
