"""Compare statistics with closed forms: the bootstrap, derived rows, and comparability."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness import run_folder
from harness.evaluation.derived import best_individual_rows, oracle_rows
from harness.reporting.summary import RESAMPLES, interval, resampled_means
from phatgoose.errors import PhatgooseError
from tests.support.answered import Answers, coin, find, score, summarize, tables


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values_N1 = np.random.default_rng(0).normal(3, 2, (2_000, 1))
    low, high = interval(resampled_means(values_N1, np.random.default_rng(1)))
    error = values_N1.std() / np.sqrt(len(values_N1))
    assert low[0] == pytest.approx(values_N1.mean() - 1.96 * error, abs=0.06 * error)
    assert high[0] == pytest.approx(values_N1.mean() + 1.96 * error, abs=0.06 * error)


def test_bootstrap_draws_the_binomial_distribution() -> None:
    # 2 of 3 documents are right: 3 draws are all right with probability 8/27, all wrong with 1/27.
    means_B1 = resampled_means(np.array([[1.0], [1.0], [0.0]]), np.random.default_rng(0))
    assert means_B1.shape == (RESAMPLES, 1)
    assert np.mean(means_B1 == 1) == pytest.approx(8 / 27, abs=0.02)
    assert np.mean(means_B1 == 0) == pytest.approx(1 / 27, abs=0.01)


def test_bootstrap_does_not_depend_on_the_block_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values_N2 = np.random.default_rng(0).random((7, 2))
    whole = resampled_means(values_N2, np.random.default_rng(1))
    monkeypatch.setattr("harness.reporting.summary._DRAWS_AT_ONCE", 7 * 300)
    np.testing.assert_allclose(resampled_means(values_N2, np.random.default_rng(1)), whole)


def test_paired_differences_have_narrower_intervals_than_unpaired_ones() -> None:
    merged = coin(400, 0.5, seed=0)
    better = merged.copy()
    better[:20] = 1.0
    rows = summarize(*tables({"t": {"merged": {"acc": merged}, "mine": {"acc": better}}}))
    row = find(rows, "mine", "acc", None)
    gains = better - merged
    error = gains.std() / np.sqrt(len(gains))
    assert row["difference"] == pytest.approx(gains.mean())
    assert row["difference_high"] - row["difference_low"] == pytest.approx(3.92 * error, rel=0.1)
    assert row["difference_high"] - row["difference_low"] < (row["high"] - row["low"]) / 2


def test_equal_routers_differ_by_exactly_zero() -> None:
    values = np.random.default_rng(3).random(37)
    answers: Answers = {
        task: {router: {"acc": values, "nll": values * 3} for router in ("merged", "x", "y")}
        for task in ("one", "two")
    }
    for row in summarize(*tables(answers)):
        expected = None if row["router"] == "merged" else 0.0
        assert row["difference"] == row["difference_low"] == row["difference_high"] == expected


def test_tasks_are_drawn_independently_and_weighted_equally() -> None:
    # Equal answers in two tasks: independent draws make the mean's interval narrower by sqrt(2).
    values = coin(300, 0.4, seed=5)
    rows = summarize(*tables({task: {"base": {"acc": values}} for task in ("one", "two")}))
    one, mean = find(rows, "base", "acc", "one"), find(rows, "base", "acc", None)
    ratio = (one["high"] - one["low"]) / (mean["high"] - mean["low"])
    assert ratio == pytest.approx(np.sqrt(2), rel=0.08)

    small: Answers = {
        "small": {"base": {"acc": [1.0, 1.0]}},
        "large": {"base": {"acc": [0.0] * 50}},
    }
    mean = find(summarize(*tables(small)), "base", "acc", None)
    assert (mean["value"], mean["n"]) == (0.5, 52)


def test_primary_is_accuracy_or_exact_match() -> None:
    answers: Answers = {
        "choose": {"base": {"acc": [1.0, 0.0], "acc_norm": [0.0, 0.0], "nll": [1.0, 3.0]}},
        "write": {"base": {"exact_match": [1.0, 1.0], "nll": [0.5, 0.5]}},
    }
    rows = summarize(*tables(answers))
    assert find(rows, "base", "primary", None)["value"] == 0.75
    assert find(rows, "base", "acc", None)["value"] == 0.5
    assert find(rows, "base", "nll", None)["value"] == 1.25


def test_a_router_with_a_missing_task_has_no_mean() -> None:
    answers: Answers = {
        "one": {"base": {"acc": [1.0, 0.0]}, "merged": {"acc": [1.0, 1.0]}},
        "two": {"base": {"acc": [1.0, 0.0]}},
    }
    rows = summarize(*tables(answers))
    means = [row for row in rows if row["task"] is None and row["metric"] == "acc"]
    assert [(row["router"], row["difference"]) for row in means] == [("base", None)]


def test_samples_of_another_run_are_refused() -> None:
    scores, samples = tables({"t": {"base": {"acc": [1.0, 0.0]}, "merged": {"acc": [1.0, 1.0]}}})
    with pytest.raises(
        PhatgooseError, match=r"samples/s/merged\.parquet: the documents of task t differ"
    ):
        summarize(scores, samples.slice(0, 3))
    changed, _ = tables({"t": {"base": {"acc": [1.0, 1.0]}, "merged": {"acc": [1.0, 1.0]}}})
    with pytest.raises(PhatgooseError, match=r"samples/s/base\.parquet: task t, metric acc"):
        summarize(changed, samples)


@settings(deadline=None)
@given(st.data())
def test_the_oracle_is_never_worse_than_a_single_expert(data: st.DataObject) -> None:
    value = st.floats(0, 1)
    answers: Answers = {
        task: {
            f"single:{expert}": {"acc": [data.draw(value)], "nll": [data.draw(value)]}
            for expert in data.draw(st.permutations(["a", "b", "c"]))
        }
        for task in ("one", "two")
    }
    scores, _ = tables(answers)
    oracle = {(row["task"], row["metric"]): row for row in oracle_rows(scores)}
    assert len(oracle) == 4
    for row in scores.to_pylist():
        best = oracle[row["task"], row["metric"]]
        sign = -1 if row["metric"] == "nll" else 1
        assert sign * best["value"] >= sign * row["value"]
        if best["value"] == row["value"]:
            assert "single:" + best["expert"] <= row["router"]
        assert best["router"] == "oracle"
        assert not best["zero_shot"]


def test_the_oracle_uses_the_samples_of_its_experts() -> None:
    shares = {"single:bad": 0.2, "single:good": 0.8, "merged": 0.5}
    answers = {name: {"acc": coin(200, share, seed=7)} for name, share in shares.items()}
    scores, samples = tables({"t": answers})
    scores = pa.concat_tables(
        [scores, pa.Table.from_pylist(oracle_rows(scores), run_folder.SCORES)]
    )
    rows = summarize(scores, samples)
    oracle, chosen = find(rows, "oracle", "acc", "t"), find(rows, "single:good", "acc", "t")
    same = ("value", "low", "high", "difference", "difference_low", "difference_high")
    assert [oracle[key] for key in same] == [chosen[key] for key in same]


def test_the_best_individual_is_best_on_average_and_not_an_oracle() -> None:
    """Check that `a` is best on one task and in nll, and `b` on average over primary metrics."""
    acc = {"one": {"a": 0.9, "b": 0.7, "c": 0.7}, "two": {"a": 0.1, "b": 0.5, "c": 0.5}}
    nll = {"a": 0.1, "b": 2.0, "c": 2.0}
    answers: Answers = {
        task: {f"single:{e}": {"acc": [share], "nll": [nll[e]]} for e, share in shares.items()}
        for task, shares in acc.items()
    }
    rows = best_individual_rows(tables(answers)[0])
    found = {(row["task"], row["metric"]): row["value"] for row in rows}
    expected = {("one", "acc"): 0.7, ("two", "acc"): 0.5, ("one", "nll"): 2.0, ("two", "nll"): 2.0}
    assert found == expected
    for row in rows:
        assert (row["router"], row["expert"], row["zero_shot"]) == ("best_individual", "b", False)
    assert best_individual_rows(tables({"t": {"merged": {"acc": [1.0]}}})[0]) == []


def test_the_best_individual_has_a_score_on_every_task() -> None:
    answers = {
        "one": {"single:a": {"acc": [1.0, 1.0]}, "single:b": {"acc": [0.0, 0.5]}},
        "two": {"single:b": {"acc": [0.0, 0.0]}},
    }
    rows = best_individual_rows(tables(answers)[0])
    assert {(row["task"], row["expert"]) for row in rows} == {("one", "b"), ("two", "b")}


@pytest.mark.parametrize("column", ["dtype", "device", "versions", "code"])
def test_without_merged_the_majority_of_routers_defines_what_is_comparable(column: str) -> None:
    answers = {name: {"acc": [0.0, 1.0, 1.0]} for name in ("a", "b", "c")}
    scores, samples = tables({"t": answers, "u": answers})
    rows = [
        {**row, **dict.fromkeys(("dtype", "device", "versions", "code"), "x")}
        for row in scores.to_pylist()
    ]
    rows = [{**r, column: "y"} if (r["router"], r["task"]) == ("c", "u") else r for r in rows]
    summary = summarize(pa.Table.from_pylist(rows, run_folder.SCORES), samples)
    assert {r["router"]: r["comparable"] for r in summary} == {"a": True, "b": True, "c": False}


def test_clusters_of_samples_are_resampled_together() -> None:
    values = {"merged": {"acc": [0.0, 0.0, 1.0, 1.0] * 6}, "base": {"acc": [0.0, 1.0] * 12}}
    scores, samples = tables({"t": values})
    alone = summarize(scores, samples)
    together = samples.to_pylist()
    for i, row in enumerate(together):
        row["cluster"] = f"c{i % 24 // 12}"
    joined = summarize(scores, pa.Table.from_pylist(together, run_folder.SAMPLES))
    for before, after in zip(alone, joined, strict=True):
        assert after["value"] == before["value"]
        assert (before["clusters"], after["clusters"]) == (24, 2)
        assert (before["low"], before["high"]) != (after["low"], after["high"])


def test_samples_of_version_0_1_0_beside_others_do_not_split_clusters() -> None:
    """Check a file without clusters that stays in the folder when its router is left out."""
    values = {"merged": {"acc": [0.0, 0.0, 1.0, 1.0] * 6}, "old": {"acc": [0.0, 1.0] * 12}}
    scores, samples = tables({"t": values})
    rows = samples.to_pylist()
    for i, row in enumerate(rows):
        row["cluster"] = f"c{i % 24 // 12}" if row["router"] == "merged" else None
    rows.sort(key=lambda row: row["router"])
    kept = scores.filter(pc.equal(scores["router"], "merged"))
    for table in (scores, kept):
        summary = summarize(table, pa.Table.from_pylist(rows, run_folder.SAMPLES))
        assert {row["clusters"] for row in summary} == {2}


def test_a_task_without_a_mean_from_lm_eval_has_the_metric_of_the_paper_or_none() -> None:
    """Check a task whose only metric, MCC, has no value per document."""
    routers = {
        name: {"acc_paper": [0.0, 1.0, 1.0], "nll": [1.0, 2.0, 3.0]} for name in ("base", "merged")
    }
    scores, samples = tables({"cola": routers, "said": {r: {"nll": [1.0, 2.0]} for r in routers}})
    extra = [score(t, r, "mcc", 0.3, 3) for t in ("cola", "said") for r in routers]
    scores = pa.concat_tables([scores, pa.Table.from_pylist(extra, run_folder.SCORES)])
    rows = summarize(scores, samples)
    primary = {(r["router"], r["task"]): r["value"] for r in rows if r["metric"] == "primary"}
    assert primary == {(r, t): pytest.approx(2 / 3) for r in routers for t in ("cola", None)}
    assert {r["task"] for r in rows if r["metric"] == "nll"} == {"cola", "said", None}
