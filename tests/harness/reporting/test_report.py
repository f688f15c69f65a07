"""Check the tables and files at the end of a run."""

import itertools
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harness import run_folder
from harness.evaluation.derived import oracle_rows
from harness.reporting import report
from harness.storage import Folder
from tests.support.answered import Answers, coin, find, summarize, tables


def demo_answers() -> Answers:
    routers = ["base", "phatgoose", "merged", "random", "single:plural", "single:sums"]
    tasks = ["elementary_math_qa", "strategyqa", "logical_deduction", "disambiguation_qa"]
    answers: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for (t, task), (r, router) in itertools.product(enumerate(tasks), enumerate(routers)):
        right = coin(50, 0.3 + 0.05 * r, seed=10 * t + r)
        answers.setdefault(task, {})[router] = {"acc": right, "nll": 3 - right}
    return answers


def training_rows(expert: str, base: float) -> list[dict[str, Any]]:
    evaluated: list[tuple[str, int, float, float | None]]
    evaluated = [("lora", 0, base, 0.0), ("lora", 30, base / 2, 0.25)]
    evaluated += [("gates", 0, base / 1.5, None), ("gates", 10, base / 1.6, None)]
    common = {"expert": expert, "job": "j", "lr": None, "tokens": 1, "seconds": 1.0}
    return [
        {**common, "stage": stage, "split": "evaluation", "step": step, "loss": loss}
        | {"exact_match": exact}
        for stage, step, loss, exact in evaluated
    ] + [
        {**common, "stage": "lora", "split": "train", "step": 40, "loss": 9.0, "exact_match": None}
    ]


def write_run(folder: Folder, answers: Answers) -> None:
    scores, samples = tables(answers)
    rows = scores.to_pylist() + oracle_rows(scores)
    run_folder.write_table(folder, "scores.parquet", run_folder.SCORES, rows)
    by_router: dict[str, list[dict[str, Any]]] = {}
    for row in samples.to_pylist():
        by_router.setdefault(row["router"], []).append({**row, "metrics": dict(row["metrics"])})
    for router, rows in by_router.items():
        name = run_folder.samples_file("held", router)
        run_folder.write_table(folder, name, run_folder.SAMPLES, rows)
    for expert, base in (("plural", 2.0), ("sums", 4.0)):
        rows = training_rows(expert, base)
        run_folder.write_table(folder, run_folder.training_file(expert), run_folder.TRAINING, rows)


def test_report_tables_contain_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_draw", lambda folder: [])
    folder = Folder(tmp_path)
    answers = demo_answers()
    write_run(folder, answers)
    text = report.make_report(folder)
    assert max(map(len, text.splitlines())) <= report.WIDTH

    assert re.search(r"^plural +2\.000 +1\.000 +0\.0% +25\.0% +1\.333 +1\.250$", text, re.M)
    assert re.search(r"^mean +3\.000 +1\.500 +0\.0% +25\.0% +2\.000 +1\.875$", text, re.M)

    rows = run_folder.read_table(folder, "summary.parquet", run_folder.SUMMARY).to_pylist()
    mean = find(rows, "phatgoose", "primary", None)
    expected = 100 * np.mean([np.mean(task["phatgoose"]["acc"]) for task in answers.values()])
    line = next(line for line in text.splitlines() if line.startswith("phatgoose"))
    assert line.split()[1] == f"{expected:.1f}"
    assert f"{100 * mean['difference']:+.1f} [{100 * mean['difference_low']:+.1f}, " in line
    for task in answers.values():
        assert f"{100 * np.mean(task['phatgoose']['acc']):.1f}" in line
    assert re.search(r"^oracle \*", text, re.M)
    assert not re.search(r"^(base|phatgoose|merged|random) \*", text, re.M)
    assert not re.search(r"^single:", text, re.M)
    assert "best single expert by this mean: sums" in text
    assert "elementary" in text
    assert "elementary_math_qa" not in text


def test_reporting_again_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_draw", lambda folder: [])
    folder = Folder(tmp_path)
    write_run(folder, demo_answers())
    texts, files = [], []
    for _ in range(2):
        texts.append(report.make_report(folder))
        files.append((folder.read("scores.parquet"), folder.read("summary.parquet")))
    assert texts[0] == texts[1]
    assert files[0] == files[1]
    scores = run_folder.read_table(folder, "scores.parquet", run_folder.SCORES).to_pylist()
    assert sum(row["router"] == "oracle" for row in scores) == 8


def test_no_difference_is_given_without_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_draw", lambda folder: [])
    folder = Folder(tmp_path)
    write_run(folder, {"t": {"phatgoose": {"acc": [1.0, 0.0]}}})
    text = report.make_report(folder)
    assert re.search(r"^phatgoose +50\.0 ± 50\.0 +50\.0$", text, re.M)
    assert "oracle" not in text


def test_many_tasks_continue_in_further_blocks() -> None:
    answers: Answers = {f"task_number_{i}": {"base": {"acc": [1.0, 0.0]}} for i in range(30)}
    text = report.routers_table(summarize(*tables(answers)), "s", "primary")
    assert max(map(len, text.splitlines())) <= report.WIDTH
    assert len(re.findall(r"^base ", text, re.M)) > 1
    assert text.count("n=2") == 30


def test_the_report_of_an_unfinished_run_names_what_is_missing(tmp_path: Path) -> None:
    text = report.make_report(Folder(tmp_path))
    assert "no training curves" in text
    assert "nothing has been evaluated yet" in text


def test_an_expert_without_gates_or_exact_match_is_reported() -> None:
    rows = [row for row in training_rows("plural", 2.0) if row["stage"] == "lora"]
    table = pa.Table.from_pylist(
        [{**row, "exact_match": None} for row in rows], run_folder.TRAINING
    )
    assert re.search(r"^plural +2\.000 +1\.000( +-){4}$", report.experts_table(table), re.M)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("strategyqa", ["strategyqa"]),
        ("elementary_math_qa", ["elementary", "math_qa"]),
        ("disambiguation_qa", ["disambigua", "tion_qa"]),
        ("snarks", ["snarks"]),
        ("a_", ["a_"]),
    ],
)
def test_long_names_are_wrapped(name: str, lines: list[str]) -> None:
    assert report._wrapped(name) == lines


def test_plots_that_fail_do_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plot_routers(folder: Folder) -> Path:
        raise RuntimeError("no ink\nno paper")

    monkeypatch.setattr(report, "plot_routers", plot_routers)
    folder = Folder(tmp_path / "run")
    write_run(folder, {"t": {"phatgoose": {"acc": [1.0, 0.0]}}})
    assert "no plot (plot_routers): no ink no paper\n" in report.make_report(folder)


def test_a_report_without_matplotlib_explains_how_to_get_plots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = Folder(tmp_path)
    write_run(folder, {"t": {"phatgoose": {"acc": [1.0, 0.0]}}})
    text = report.make_report(folder)
    assert "phatgoose" in text
    assert "no plot (plot_routers): plots need matplotlib. Install it with" in text
    assert not (tmp_path / "plots" / "routers.png").exists()


def test_a_report_draws_into_the_run_folder_and_keeps_the_backend(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    write_run(folder, {"t": {"phatgoose": {"acc": [1.0, 0.0]}}})
    before = matplotlib.get_backend()
    assert f"plot: {tmp_path}/plots/routers.png" in report.make_report(folder)
    assert (tmp_path / "plots" / "routers.png").read_bytes().startswith(b"\x89PNG")
    assert matplotlib.get_backend() == before


def test_a_report_that_is_not_on_a_local_disk_has_no_plots() -> None:
    folder = Folder("memory:///run")
    write_run(folder, {"t": {"phatgoose": {"acc": [1.0, 0.0]}}})
    assert "no plot (plot_routers): memory:///run is not a local" in report.make_report(folder)


def test_a_router_measured_differently_is_marked_and_gets_no_difference(tmp_path: Path) -> None:
    values = {"merged": {"acc": [0, 1, 1, 0]}, "phatgoose": {"acc": [1, 1, 1, 0]}}
    scores, samples = tables({"t": {**values, "old": {"acc": [1, 1, 1, 1]}}})
    rows = scores.to_pylist()
    for row in rows:
        row |= {"dtype": "float32", "device": "cpu", "versions": "1", "code": "a"}
        if row["router"] == "old":
            row["code"] = "b"
    summary = summarize(pa.Table.from_pylist(rows, run_folder.SCORES), samples)
    by_router = {r["router"]: r for r in summary if (r["metric"], r["task"]) == ("acc", None)}
    assert by_router["old"]["comparable"] is False
    assert by_router["old"]["difference"] is None
    assert by_router["old"]["value"] == 1.0
    assert by_router["phatgoose"]["comparable"] is True
    assert by_router["phatgoose"]["difference"] == pytest.approx(0.25)
    text = report.routers_table(summary, "s", "primary")
    assert re.search(r"^old !", text, re.MULTILINE)
    assert "not comparable" in text
    assert not re.search(r"^phatgoose .*!", text, re.MULTILINE)


def test_tables_of_version_0_1_0_are_read(tmp_path: Path) -> None:
    """They do not have the columns for code versions and clusters."""
    scores, samples = tables({"t": {"merged": {"acc": [0.0, 1.0]}, "base": {"acc": [1.0, 1.0]}}})
    folder = Folder(tmp_path)
    new = ("dtype", "device", "versions", "code", "router_code", "answers", "cluster", "cut")
    for name, table in (("scores.parquet", scores), ("samples/base.parquet", samples)):
        kept = [c for c in table.column_names if c not in new]
        sink = pa.BufferOutputStream()
        pq.write_table(table.select(kept), sink)
        folder.write(name, sink.getvalue().to_pybytes())
    text = report.make_report(folder)
    assert "merged" in text
    assert (
        run_folder.read_table(folder, "scores.parquet", run_folder.SCORES)["code"].null_count == 2
    )
