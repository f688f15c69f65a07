"""Check the rows derived from single experts, and the errors of a summary."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from harness import run_folder
from harness.evaluation.derived import best_individual_rows, oracle_rows
from harness.metrics import better, primary_metric
from harness.reporting.summary import interval, resampled_means
from phatgoose.errors import PhatgooseError
from tests.support.answered import find, score, summarize, tables


def scores_of(*rows: tuple[str, str, str, float]) -> pa.Table:
    """Return scores of (router, task, metric, value)."""
    made = [score(task, router, metric, value, 4) for router, task, metric, value in rows]
    return pa.Table.from_pylist(made, run_folder.SCORES)


def value_of(rows: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, str]]:
    return {(row["task"], row["metric"]): (row["value"], row["expert"]) for row in rows}


def test_the_oracle_is_the_best_expert_of_each_task_and_metric() -> None:
    scores = scores_of(
        ("single:b", "t", "acc", 0.5), ("single:a", "t", "acc", 0.5), ("single:c", "t", "acc", 0.4),
        ("single:a", "t", "nll", 1.0), ("single:b", "t", "nll", 0.9), ("single:c", "t", "nll", 0.9),
        ("single:a", "u", "acc", 0.1), ("single:b", "u", "acc", 0.3), ("merged", "u", "acc", 0.9),
    )  # fmt: skip
    rows = oracle_rows(scores)
    assert value_of(rows) == {
        ("t", "acc"): (0.5, "a"),  # the first of equals by name
        ("t", "nll"): (0.9, "b"),  # lower is better
        ("u", "acc"): (0.3, "b"),  # other routers are ignored
    }
    before = scores.to_pylist()[1]
    (row,) = [row for row in rows if (row["task"], row["metric"]) == ("t", "acc")]
    assert row == {**before, "router": "oracle", "zero_shot": False, "expert": "a"}
    assert oracle_rows(scores_of(("merged", "u", "acc", 0.9))) == []


def test_the_best_individual_is_one_expert_for_the_whole_suite() -> None:
    """Check that only the sum of the primary metrics of single experts counts."""
    scores = scores_of(
        ("single:a", "t", "acc", 0.9), ("single:b", "t", "acc", 0.5), ("merged", "t", "acc", 1.0),
        ("single:a", "t", "acc_norm", 0.0), ("single:b", "t", "acc_norm", 1.0),
        ("single:a", "u", "exact_match", 0.1), ("single:b", "u", "exact_match", 0.6),
        ("single:a", "u", "nll", 9.0), ("single:b", "u", "nll", 1.0),
    )  # fmt: skip
    rows = best_individual_rows(scores)
    assert value_of(rows) == {
        ("t", "acc"): (0.5, "b"),
        ("t", "acc_norm"): (1.0, "b"),
        ("u", "exact_match"): (0.6, "b"),
        ("u", "nll"): (1.0, "b"),
    }
    for row in rows:
        assert row.keys() == set(run_folder.SCORES.names)
        assert (row["router"], row["zero_shot"], row["expert"]) == ("best_individual", False, "b")


def test_the_first_by_name_of_equally_good_individuals_is_chosen() -> None:
    scores = scores_of(("single:b", "t", "acc", 0.5), ("single:a", "t", "acc", 0.5))
    assert value_of(best_individual_rows(scores)) == {("t", "acc"): (0.5, "a")}
    assert best_individual_rows(scores_of(("merged", "t", "acc", 1.0))) == []


def test_each_suite_has_its_own_best_individual() -> None:
    table = scores_of(("single:a", "t", "acc", 0.9), ("single:b", "t", "acc", 0.5))
    other = scores_of(("single:a", "t", "acc", 0.2), ("single:b", "t", "acc", 0.5))
    moved = [{**row, "suite": "other"} for row in other.to_pylist()]
    both = pa.Table.from_pylist([*table.to_pylist(), *moved], run_folder.SCORES)
    found = {row["suite"]: row["expert"] for row in best_individual_rows(both)}
    assert found == {"s": "a", "other": "b"}
    assert {row["suite"]: row["expert"] for row in oracle_rows(both)} == found


@pytest.mark.parametrize(
    ("metrics", "primary"),
    [
        ({"rouge_l", "acc", "exact_match", "bleu"}, "rouge_l"),
        ({"acc", "exact_match", "bleu", "nll"}, "acc"),
        ({"exact_match", "exact_match_strict_match", "bleu"}, "exact_match"),
        ({"exact_match_strict_match", "bleu", "exact_match_flexible"}, "exact_match_strict_match"),
        ({"f1", "bleu", "nll", "acc_norm", "acc_paper", "bigbench_normalized"}, "bleu"),
    ],
)
def test_the_primary_metric_is_chosen(metrics: set[str], primary: str) -> None:
    assert primary_metric(metrics) == primary


def test_our_own_metrics_are_never_primary() -> None:
    own = {"nll", "acc_norm", "acc_paper", "bigbench_normalized"}
    assert primary_metric(own) == "acc_paper"  # if lm-eval gives no mean over documents
    assert primary_metric({*own, "word_f1"}) == "word_f1"
    own.remove("acc_paper")
    with pytest.raises(PhatgooseError) as caught:
        primary_metric(own)
    assert str(caught.value) == f"a task has no metric from lm-eval; it has {sorted(own)}"


def test_equal_values_are_not_better() -> None:
    assert better("acc", 0.5, 0.4)
    assert better("nll", 0.4, 0.5)
    for metric in ("acc", "nll"):
        assert not better(metric, 0.5, 0.5)
    assert not better("acc", 0.4, 0.5)
    assert not better("nll", 0.5, 0.4)


def test_an_interval_covers_ninety_five_percent() -> None:
    """Check 0 to 1000 and ten times these numbers: 25 of a thousand are cut off at either end."""
    means_BM = np.arange(1001.0)[:, None] * [1.0, 10.0]
    low_M, high_M = interval(means_BM)
    assert low_M.tolist() == pytest.approx([25.0, 250.0])
    assert high_M.tolist() == pytest.approx([975.0, 9750.0])


def test_columns_are_resampled_together() -> None:
    values_N2 = np.array([[0.0, 1.0], [1.0, 0.0], [0.25, 0.75]])
    means_BM = resampled_means(values_N2, np.random.default_rng(0))
    assert means_BM.sum(axis=1) == pytest.approx(1.0)
    assert means_BM[:, 0].std() > 0.1


def test_a_mean_over_tasks_weights_tasks_equally_and_sums_their_documents() -> None:
    answers = {
        "t": {"merged": {"acc": [1.0] * 8 + [0.0] * 2}, "mine": {"acc": [1.0] * 10}},
        "u": {"merged": {"acc": [0.0, 0.0]}, "mine": {"acc": [1.0, 0.0]}},
    }
    rows = summarize(*tables(answers))
    mine = find(rows, "mine", "acc", None)
    assert (mine["n"], mine["value"], mine["difference"]) == (12, 0.75, pytest.approx(0.35))
    merged = find(rows, "merged", "acc", None)
    assert (merged["n"], merged["value"]) == (12, 0.4)
    assert merged["difference"] is merged["difference_low"] is merged["difference_high"] is None
    assert find(rows, "mine", "acc", "u")["n"] == 2
    assert mine["low"] <= mine["value"] <= mine["high"]
    assert mine["difference_low"] <= mine["difference"] <= mine["difference_high"]


def test_no_difference_is_given_without_merged() -> None:
    rows = summarize(*tables({"t": {"mine": {"acc": [1.0, 0.0]}}}))
    for row in rows:
        assert row["difference"] is row["difference_low"] is row["difference_high"] is None


def test_the_mean_has_no_difference_if_merged_has_a_missing_task() -> None:
    answers = {
        "t": {"merged": {"acc": [1.0, 0.0]}, "mine": {"acc": [1.0, 1.0]}},
        "u": {"mine": {"acc": [1.0, 0.0]}},
    }
    rows = summarize(*tables(answers))
    assert find(rows, "mine", "acc", "t")["difference"] == 0.5
    whole = find(rows, "mine", "acc", None)
    assert (whole["value"], whole["difference"]) == (0.75, None)
    assert not [row for row in rows if (row["router"], row["task"]) == ("merged", None)]


def test_a_router_without_one_of_the_tasks_has_no_mean() -> None:
    answers = {
        "t": {"merged": {"acc": [1.0, 0.0]}, "mine": {"acc": [1.0, 1.0]}},
        "u": {"merged": {"acc": [1.0, 0.0]}},
    }
    rows = summarize(*tables(answers))
    assert {row["router"] for row in rows if row["task"] is None} == {"merged"}
    assert find(rows, "merged", "acc", None)["value"] == 0.5


def test_a_metric_is_averaged_over_the_tasks_that_have_it() -> None:
    answers = {
        "t": {"mine": {"acc": [1.0, 0.0], "acc_norm": [1.0, 1.0]}},
        "u": {"mine": {"acc": [1.0, 1.0]}},
    }
    rows = summarize(*tables(answers))
    assert find(rows, "mine", "acc_norm", None)["value"] == 1.0
    assert find(rows, "mine", "acc_norm", None)["n"] == 2
    assert find(rows, "mine", "primary", None)["value"] == find(rows, "mine", "acc", None)["value"]
    assert {row["task"] for row in rows if row["metric"] == "acc_norm"} == {"t", None}


def test_rows_record_the_side_information_of_a_router() -> None:
    scores, samples = tables({"t": {"mine": {"acc": [1.0, 0.0]}, "single:a": {"acc": [1.0, 1.0]}}})
    told = [
        {**row, "side_information": "the task"} if row["router"] == "mine" else row
        for row in scores.to_pylist()
    ]
    rows = summarize(pa.Table.from_pylist(told, run_folder.SCORES), samples)
    for row in rows:
        mine = row["router"] == "mine"
        assert row["zero_shot"] is mine
        assert row["side_information"] == ("the task" if mine else None)


def test_a_derived_router_is_summarized_from_the_samples_of_its_experts() -> None:
    scores, samples = tables(
        {"t": {"single:a": {"acc": [1.0, 0.0]}, "merged": {"acc": [0.0, 0.0]}}}
    )
    derived = [*oracle_rows(scores), *best_individual_rows(scores)]
    both = pa.Table.from_pylist([*scores.to_pylist(), *derived], run_folder.SCORES)
    rows = summarize(both, samples)
    single = find(rows, "single:a", "acc", None)
    for router in ("oracle", "best_individual"):
        row = find(rows, router, "acc", None)
        keys = ("n", "value", "low", "high", "difference", "difference_low", "difference_high")
        assert [row[key] for key in keys] == [single[key] for key in keys]
        assert row["zero_shot"] is False


def test_samples_of_other_documents_are_named() -> None:
    scores, samples = tables({"t": {"a": {"acc": [1.0, 0.0]}, "b": {"acc": [1.0, 0.0]}}})
    kept = [r for r in samples.to_pylist() if (r["router"], r["document"]) != ("b", "d1")]
    with pytest.raises(PhatgooseError, match=r"samples.*b.*: the documents of task t differ from"):
        summarize(scores, pa.Table.from_pylist(kept, run_folder.SAMPLES))


@pytest.mark.parametrize("value", [0.5001, 0.4999])
def test_a_score_that_is_not_the_mean_of_its_samples_is_named(value: float) -> None:
    scores, samples = tables({"t": {"a": {"acc": [1.0, 0.0]}}})
    changed = [{**row, "value": value} for row in scores.to_pylist()]
    with pytest.raises(PhatgooseError, match=r"task t, metric acc: the samples' mean differs"):
        summarize(pa.Table.from_pylist(changed, run_folder.SCORES), samples)
    almost = [{**row, "value": 0.5 + 1e-7} for row in scores.to_pylist()]
    assert summarize(pa.Table.from_pylist(almost, run_folder.SCORES), samples)


def test_a_score_without_samples_of_its_metric_is_left_out() -> None:
    """Check a corpus score, which is not a mean over documents."""
    scores, samples = tables({"t": {"a": {"acc": [1.0, 0.0]}}})
    more = [*scores.to_pylist(), score("t", "a", "bleu", 0.3, 2)]
    rows = summarize(pa.Table.from_pylist(more, run_folder.SCORES), samples)
    assert {row["metric"] for row in rows} == {"primary", "acc"}
