"""Compare the summary, which reads one task at a time, with one computed plainly."""

import re
import tracemalloc
import weakref
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness import run_folder
from harness.reporting import summary
from harness.reporting.summary import summary_rows
from harness.reporting.task_samples import TaskSamples
from harness.storage import Folder
from phatgoose.errors import PhatgooseError
from tests.support.answered import (
    coin,
    sample,
    score,
    stored_samples,
    summarize,
    tables,
    write_samples,
)
from tests.support.plain_summary import plain_summary

Row = dict[str, Any]
ROUTERS = ("merged", "base", "phatgoose", "single:a", "single:b")
METRICS = ("acc", "nll", "acc_norm", "acc_paper")


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Row], list[Row]]:
    """Draw the rows of scores and samples of a run.

    Routers answer some of the tasks, in an order of their own, and may answer a document twice.
    Some tasks have no metric per document: `mcc` is none.
    Samples of a router that is not scored stay in the folder, as those of an earlier call do.
    """
    scores: list[Row] = []
    samples: list[Row] = []
    routers = draw(st.lists(st.sampled_from(ROUTERS), min_size=1, unique=True))
    codes = {router: draw(st.sampled_from(["x", "x", "y"])) for router in routers}
    for suite in draw(st.sampled_from([("s",), ("s", "other")])):
        for task in draw(st.permutations(["t", "u", "v"])):
            documents = [f"d{i}" for i in range(draw(st.integers(1, 5)))]
            metrics = draw(st.lists(st.sampled_from(METRICS), unique=True))
            for router in [*draw(st.permutations(routers)), "left_out"]:
                if router == "left_out":
                    answered = ["d0", "unknown"]
                elif draw(st.integers(0, 4)) == 0:
                    continue
                else:
                    answered = draw(st.permutations(documents))
                    answered += draw(st.lists(st.sampled_from(documents), max_size=1))
                values: dict[str, dict[str, float]] = {}
                for document in answered:
                    values[document] = {m: draw(st.sampled_from([0.0, 0.3, 1.0])) for m in metrics}
                    row = sample(task, router, document, values[document])
                    cluster = draw(st.sampled_from([None, "", "c0", "c1", document]))
                    samples.append({**row, "suite": suite, "cluster": cluster})
                if router == "left_out":
                    continue
                told = draw(st.sampled_from([None, "the task"]))
                for metric in [*metrics, "mcc"]:
                    mean = float(np.mean([v.get(metric, 0.5) for v in values.values()]))
                    row = {**score(task, router, metric, mean, 1), "code": codes[router]}
                    row["side_information"] = told
                    names: list[tuple[str, str | None]] = [(router, None)]
                    if router.startswith("single:"):
                        names.append(("oracle", router.removeprefix("single:")))
                    # A later row of the oracle would replace the first: one expert has it.
                    names = names[: 1 if router == "single:b" else 2]
                    scores += [
                        {**row, "suite": suite, "router": name, "expert": expert}
                        for name, expert in names
                    ]
    return scores, samples


def store(folder: Folder, samples: pa.Table, layout: str) -> None:
    """Write samples in a layout: as today, in other row groups, or as version 0.1.0 did."""
    if layout == "today":
        return write_samples(folder, samples)
    for router in samples["router"].unique().to_pylist():
        rows = samples.filter(pc.equal(samples["router"], router))
        name = f"samples/{run_folder.file_stem(router)}.parquet"
        if layout == "0.1.0":
            rows = rows.drop_columns("cluster")
        sink = pa.BufferOutputStream()
        pq.write_table(
            rows, sink, row_group_size=2 if layout == "small row groups" else None,
            write_statistics=layout != "no statistics",
        )  # fmt: skip
        folder.write(name, sink.getvalue().to_pybytes())
    return None


LAYOUTS = ("today", "one row group", "small row groups", "no statistics", "0.1.0")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=40)
@given(runs(), st.sampled_from(LAYOUTS))
def test_every_number_is_that_of_the_plain_computation(
    run: tuple[list[Row], list[Row]], layout: str
) -> None:
    """Check equal bits, and the same rows in the same order."""
    scores = pa.Table.from_pylist(run[0], run_folder.SCORES)
    folder = Folder("memory:///run")
    store(folder, pa.Table.from_pylist(run[1], run_folder.SAMPLES), layout)
    whole = run_folder.read_folder(folder, "samples", run_folder.SAMPLES)
    assert summary_rows(scores, stored_samples(folder)) == plain_summary(scores, whole)


def test_a_task_of_many_documents_is_drawn_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the draws of all metrics and of the plain computation stay the same."""
    rng = np.random.default_rng(0)
    routers = ("merged", "base", "phatgoose")
    answers = {
        "t": {r: {"acc": coin(90, 0.5, i), "nll": rng.random(90)} for i, r in enumerate(routers)}
    }
    scores, samples = tables(answers)
    assert summary._DRAWS_AT_ONCE // 90 > summary.RESAMPLES
    expected = plain_summary(scores, samples)
    assert summarize(scores, samples) == expected
    monkeypatch.setattr(summary, "_DRAWS_AT_ONCE", 90 * 3_000)
    for row, plain in zip(summarize(scores, samples), expected, strict=True):
        assert row.keys() == plain.keys()
        for key, value in plain.items():
            number = isinstance(value, float)
            assert row[key] == (pytest.approx(value, rel=1e-9, abs=1e-12) if number else value)


ANSWERS = {
    task: {router: {"acc": [1.0, 0.0, 1.0], "nll": [1.0, 2.0, 4.0]} for router in ("a", "b")}
    for task in ("t", "u")
}


def damaged(fault: str) -> tuple[pa.Table, pa.Table]:
    """Return scores and samples that do not belong together."""
    scores, samples = tables(ANSWERS)
    rows, kept = scores.to_pylist(), samples.to_pylist()
    place = next(i for i, r in enumerate(kept) if (r["router"], r["task"]) == ("b", "u"))
    if fault == "missing document":
        del kept[place]
    elif fault == "other document":
        kept[place]["document"] = "d9"
    elif fault == "further document":
        kept.append({**kept[place], "document": "d9"})
    elif fault == "document twice":
        kept[place]["document"] = kept[place + 1]["document"]
    elif fault == "no samples":
        kept = [r for r in kept if (r["router"], r["task"]) != ("b", "u")]
    elif fault == "no value":
        kept[place]["metrics"] = [("nll", 1.0)]
    else:
        change = {"larger mean": 1e-5, "smaller mean": -1e-5}[fault]
        rows = [{**r, "value": r["value"] + change * (r["metric"] == "nll")} for r in rows]
    return (
        pa.Table.from_pylist(rows, run_folder.SCORES),
        pa.Table.from_pylist(kept, run_folder.SAMPLES),
    )


@pytest.mark.parametrize(
    "fault",
    [
        "missing document",
        "other document",
        "further document",
        "document twice",
        "no samples",
        "no value",
        "larger mean",
        "smaller mean",
    ],
)
def test_the_error_is_that_of_the_plain_computation(fault: str) -> None:
    scores, samples = damaged(fault)
    with pytest.raises(ValueError, match="samples/s/") as expected:
        plain_summary(scores, samples)
    with pytest.raises(PhatgooseError, match=f"^{re.escape(str(expected.value))}$"):
        summarize(scores, samples)


def many_tasks(tasks: int) -> tuple[pa.Table, Folder]:
    answers = {
        f"t{t}": {
            router: {"acc": coin(2_000, 0.5, t), "nll": coin(2_000, 0.4, t)} for router in ROUTERS
        }
        for t in range(tasks)
    }
    scores, samples = tables(answers)
    folder = Folder("memory:///run")
    write_samples(folder, samples)
    return scores, folder


def test_the_samples_of_one_task_are_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check what is read and what is kept: each row group once, and nothing of an earlier task."""
    read: list[tuple[int, tuple[str, ...]]] = []
    original = pq.ParquetFile.read_row_group

    def read_row_group(self: Any, i: int, columns: list[str], **options: Any) -> pa.Table:
        read.append((i, tuple(columns)))
        return original(self, i, columns, **options)

    earlier: list[weakref.ref[TaskSamples]] = []
    allocated: list[int] = []

    class Observed(TaskSamples):
        def __init__(self, *arguments: Any) -> None:
            assert all(reference() is None for reference in earlier)
            allocated.append(pa.total_allocated_bytes())
            super().__init__(*arguments)
            earlier.append(weakref.ref(self))

    scores, folder = many_tasks(4)
    whole = run_folder.read_folder(folder, "samples", run_folder.SAMPLES).nbytes
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", read_row_group)
    monkeypatch.setattr(summary, "TaskSamples", Observed)
    monkeypatch.setattr(Folder, "read", None)  # no file is read completely
    before = pa.total_allocated_bytes()
    summary_rows(scores, stored_samples(folder))
    assert [index for index, _ in read] == [t for t in range(4) for _ in ROUTERS]
    wanted = ("router", "suite", "task", "document", "metrics", "cluster")
    assert {columns for _, columns in read} == {wanted}
    assert len(earlier) == 4
    assert max(allocated) - before < whole / 100


def test_draws_of_earlier_tasks_are_not_kept() -> None:
    """Check that a summary of four times the tasks needs hardly more memory."""
    peaks = []
    for tasks in (2, 8):
        scores, folder = many_tasks(tasks)
        samples = stored_samples(folder)
        tracemalloc.start()
        summary_rows(scores, samples)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]
