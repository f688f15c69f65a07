"""Check clusters of related documents, and intervals that account for them."""

from typing import Any

import numpy as np
import pytest

from harness.reporting.summary import interval, resampled_means
from harness.tasks.clusters import clusters

PASSAGE = (
    "The goose flew over the lake, and the swan, which was grey, swam below it until the night. "
    * 2
)


def row(document: str, prompt: str, **values: Any) -> dict[str, Any]:
    return {"document": document, "input": prompt, "text": "", "cluster": "", **values}


def partition(rows: list[dict[str, Any]]) -> list[list[str]]:
    found: dict[str, list[str]] = {}
    for one, cluster in zip(rows, clusters(rows), strict=True):
        found.setdefault(cluster, []).append(one["document"])
    assert all(name == members[0] for name, members in found.items())
    return list(found.values())


def singles(count: int) -> list[dict[str, Any]]:
    return [row(f"x{i}", f"some words {chr(97 + i) * 5} of its own") for i in range(count)]


def test_documents_of_one_row_are_one_cluster() -> None:
    rows = [row("a", "one", cluster="row 1"), *singles(2), row("b", "two", cluster="row 1")]
    assert partition(rows) == [["a", "b"], ["x0"], ["x1"]]


def test_all_documents_of_one_row_are_one_cluster() -> None:
    """Check that the source decides, for any number of documents."""
    assert partition([row(d, f"text {d}", cluster="row 1") for d in "abc"]) == [["a", "b", "c"]]


def test_documents_with_one_prompt_are_one_cluster() -> None:
    rows = [row("a", "Which is  right?"), row("b", "which is right?"), *singles(3)]
    assert partition(rows)[0] == ["a", "b"]


def test_documents_about_one_passage_are_one_cluster() -> None:
    rows = [
        row("a", f"{PASSAGE}\nWho flew?"),
        row("b", f"{PASSAGE}\nWho swam?"),
        row("c", f"Short line.\n{PASSAGE[:90]}"),
        *singles(3),
    ]
    assert partition(rows) == [["a", "b"], ["c"], ["x0"], ["x1"], ["x2"]]


def test_the_words_of_a_document_count_if_it_has_any() -> None:
    rows = [
        row("a", f"{PASSAGE}\nWho?", text="who is a"),
        row("b", f"{PASSAGE}\nWho?!", text="who is b"),
        *singles(3),
    ]
    assert ["a"] in partition(rows)


def test_documents_that_differ_in_numbers_are_one_cluster() -> None:
    rows = [
        row("a", "31.5 A expressed in units of kA is"),
        row("b", "7 A expressed in units of kA is"),
        row("c", "7 V expressed in units of kV is"),
        row("d", "2 + 3 ="),  # too short to decide
        row("e", "3 + 4 ="),
        *singles(3),
    ]
    found = partition(rows)
    assert found[:4] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_wording_shared_by_most_documents_does_not_make_a_cluster() -> None:
    rows = [row(f"d{i}", f"{PASSAGE}\nquestion {chr(97 + i)}") for i in range(4)]
    assert len(partition([*rows, *singles(2)])) == 6


def test_chains_through_most_documents_do_not_make_a_cluster() -> None:
    lines = [f"{PASSAGE} {chr(97 + i)}" for i in range(7)]
    rows = [row(f"d{i}", f"{lines[i]}\n{lines[i + 1]}") for i in range(6)]
    assert len(partition(rows)) == 6
    assert len(partition([*rows, *singles(6)])) == 7  # half of them here


def test_clusters_of_different_kinds_are_joined() -> None:
    rows = [
        row("a", "one", cluster="row 1"),
        row("b", "two", cluster="row 1"),
        row("c", "two"),
        *singles(4),
    ]
    assert partition(rows)[0] == ["a", "b", "c"]


def test_intervals_without_clusters_are_computed_over_documents() -> None:
    values_N1 = np.random.default_rng(0).normal(size=(30, 1))
    alone = resampled_means(values_N1, np.random.default_rng(1))
    each = resampled_means(values_N1, np.random.default_rng(1), np.arange(30))
    assert np.array_equal(alone, each)


def test_copies_of_documents_do_not_narrow_an_interval() -> None:
    """Check that ten copies of each of 30 documents give the interval of the 30."""
    values_N1 = np.random.default_rng(0).normal(size=(30, 1))
    copies_N1, clusters_N = np.repeat(values_N1, 10, axis=0), np.repeat(np.arange(30), 10)
    (low,), (high,) = interval(resampled_means(values_N1, np.random.default_rng(1)))
    (a,), (b,) = interval(resampled_means(copies_N1, np.random.default_rng(1), clusters_N))
    assert (a, b) == pytest.approx((low, high), abs=1e-12)
    (a,), (b,) = interval(resampled_means(copies_N1, np.random.default_rng(1)))
    assert b - a < (high - low) / 2


def test_every_document_has_the_same_weight() -> None:
    values_N1 = np.array([[0.0], [1.0], [1.0], [1.0]])
    means_B = resampled_means(values_N1, np.random.default_rng(0), np.array([0, 1, 1, 1]))[:, 0]
    # Two clusters are drawn: both the first, one of each, both the second.
    assert {*np.round(means_B, 6)} == {0.0, 0.75, 1.0}


def test_the_standard_error_accounts_for_clusters() -> None:
    """Compare with Miller's formula (arXiv 2411.00640, section 2.2)."""
    rng = np.random.default_rng(3)
    sizes = rng.integers(1, 6, size=400)
    clusters_N = np.repeat(np.arange(400), sizes)
    values_N = rng.normal(size=400)[clusters_N] + 0.5 * rng.normal(size=len(clusters_N))
    means_B = resampled_means(values_N[:, None], rng, clusters_N)[:, 0]
    off_C = np.bincount(clusters_N, weights=values_N - values_N.mean())
    expected = np.sqrt((off_C**2).sum()) / len(values_N)
    assert means_B.std() == pytest.approx(expected, rel=0.05)
