from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.tasks.records import (
    Record,
    distinct,
    document_id,
    fingerprint_of,
    kind_of,
    read_metadata,
    read_records,
    split_of,
    write_records,
)
from phatgoose.errors import PhatgooseError


def record(text: str, **changes: object) -> Record:
    values = {"targets": ["yes"], "choices": [], "correct": [], **changes}
    return Record("some_task", document_id("some_task", text), text, **values)  # type: ignore[arg-type]


def test_split_and_document_are_fixed_for_ever() -> None:
    """By hand: `printf 'plural\\nthis is a boy' | sha256sum`; its last 8 digits are 3 modulo 5."""
    assert document_id("plural", "This is  a boy\n") == "3e98c260e9542466"
    assert split_of("plural", "This is  a boy\n") == "train"


@given(st.text(), st.lists(st.text(alphabet="abcXYZ09?+-", min_size=1), min_size=1))
def test_split_ignores_case_and_spacing(task: str, words: list[str]) -> None:
    texts = [" ".join(words), "\n " + "\t".join(words).upper() + " ", "  ".join(words).lower()]
    assert len({split_of(task, text) for text in texts}) == 1
    assert len({document_id(task, text) for text in texts}) == 1


def test_split_keeps_about_one_fifth_for_evaluation_and_depends_on_the_task() -> None:
    splits = {task: [split_of(task, f"What is {i}?") for i in range(2000)] for task in ("a", "b")}
    for split in splits.values():
        assert 340 < split.count("evaluation") < 460
    assert splits["a"] != splits["b"]


def test_punctuation_tells_documents_apart() -> None:
    assert document_id("sums", "5 + 3") != document_id("sums", "5 - 3")


def test_distinct_keeps_the_first_of_each_document_in_a_shuffled_order() -> None:
    texts = [f"question {i}" for i in range(50)]
    records = [record(text) for text in texts]
    again = [record(text.upper(), targets=["no"]) for text in texts]
    kept = distinct(records + again)
    assert sorted(r.input for r in kept) == sorted(texts)
    assert [r.input for r in kept] != texts
    assert kept == distinct(reversed(records))


def test_parquet_gives_back_the_same_records(tmp_path: Path) -> None:
    records = [
        record("ça va ?\nA: ", targets=["oui", "yes"]),
        record("pick", targets=["b"], choices=["a", "b"], correct=[1]),
    ]
    path = tmp_path / "folder" / "train.parquet"
    write_records(path, records, {"canary": "GUID 1"})
    assert read_records(path) == records
    assert read_metadata(path)["canary"] == "GUID 1"
    assert [file.name for file in path.parent.iterdir()] == ["train.parquet"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    write_records(path, [record(f"question {i}") for i in range(100)], {})
    path.write_bytes(path.read_bytes()[:-20])
    for read in (read_records, read_metadata):
        with pytest.raises(PhatgooseError, match=r"train\.parquet cannot be read.*delete"):
            read(path)


def test_fingerprint_follows_content_and_split() -> None:
    one, two = record("one"), record("two")
    prints = [
        fingerprint_of({"train": [one, two], "evaluation": []}),
        fingerprint_of({"train": [one], "evaluation": [two]}),
        fingerprint_of({"train": [one, record("two", targets=["no"])], "evaluation": []}),
    ]
    assert len(set(prints)) == 3
    assert prints[0] == fingerprint_of({"evaluation": [], "train": [record("one"), record("two")]})


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        ([], "no examples"),
        ([record("x", targets=[])], "target is empty"),
        ([record("x", targets=[" "])], "target is empty"),
        ([record("x", choices=["yes", ""], correct=[0])], "one of its choices is empty"),
        ([record("x", choices=["yes", "no"])], "none of its choices is right"),
        ([record("x"), record("y", choices=["yes"], correct=[0])], "mixes"),
    ],
)
def test_faulty_records_name_the_task(records: list[Record], reason: str) -> None:
    with pytest.raises(PhatgooseError, match=reason) as caught:
        kind_of("some_task", records)
    assert "some_task" in str(caught.value)
    assert "\n" not in str(caught.value)
