"""Against a plain computation with sets of tuples of words."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.contamination import Overlap, SuiteIndex, find_overlaps, windows
from harness.tasks import TaskData, TaskSpec
from harness.tasks.records import Record, Split, document_id
from harness.tasks.store import read_task, write_task

EIGHT = "one two three four five six seven eight"


def table(texts: Sequence[str], inputs: Sequence[str] | None = None) -> pa.Table:
    prompts = list(inputs) if inputs is not None else [f"Q: {text} A:" for text in texts]
    return pa.table({"text": list(texts), "input": prompts})


def overlaps(
    suite: dict[str, pa.Table], train: Sequence[str], inputs: Sequence[str] | None = None
) -> dict[str, tuple[int, int, int]]:
    batches = table(train, inputs).to_batches(max_chunksize=3)
    found = SuiteIndex(suite).overlaps("e", batches)
    return {o.suite_task: (o.documents, o.exact, o.shared) for o in found}


def test_eight_words_in_a_row_are_found_whatever_their_case_and_punctuation() -> None:
    suite = {"t": table([f"Zero. {EIGHT} nine", "something else"])}
    assert overlaps(suite, ["no", f"x {EIGHT.upper().replace(' ', ', ')}!"]) == {"t": (2, 0, 1)}
    assert overlaps(suite, ["one two three four five six seven"]) == {}
    assert overlaps(suite, [EIGHT.replace("four", "4")]) == {}


def test_other_alphabets_count() -> None:
    text = "мама мыла раму а папа читал газету вслух"
    assert overlaps({"t": table([text])}, [text + " сегодня"]) == {"t": (1, 0, 1)}


def test_the_same_input_counts_however_short_but_only_with_its_prompt() -> None:
    suite = {"t": table(["dog", "cat"])}
    assert overlaps(suite, ["dog"], ["q:  DOG a:"]) == {"t": (2, 1, 1)}
    assert overlaps(suite, ["dog"], ["Plural of dog:"]) == {}


def test_a_border_between_examples_makes_no_sequence() -> None:
    words = EIGHT.split()
    suite = {"t": table([EIGHT])}
    assert overlaps(suite, [" ".join(words[:4]), " ".join(words[4:])], ["", ""]) == {}
    # Nor between documents of the suite.
    split = {"t": table([" ".join(words[:4]), " ".join(words[4:])], ["a", "b"])}
    assert overlaps(split, [EIGHT], [EIGHT]) == {}


def test_what_stands_in_many_documents_is_the_wording_of_the_task() -> None:
    """Six documents begin alike; the seventh shares what is its own."""
    own = "k l m n o p q r"
    texts = [f"{EIGHT} is number {i}" for i in range(6)] + [f"{EIGHT} {own}"]
    suite = {"t": table(texts)}
    assert overlaps(suite, [EIGHT]) == {}
    assert overlaps(suite, [own]) == {"t": (7, 0, 1)}
    few = {"t": table(texts[:5])}
    assert overlaps(few, [EIGHT]) == {"t": (5, 0, 5)}


def test_prompts_of_one_document_are_one_document() -> None:
    suite = {"t": table([EIGHT] * 20, [f"prompt {i} {EIGHT}" for i in range(20)])}
    assert overlaps(suite, [EIGHT]) == {"t": (1, 0, 1)}


def test_without_a_text_of_its_own_the_prompt_counts() -> None:
    suite = {"t": table(["", ""], [EIGHT, "short"])}
    assert overlaps(suite, [""], [f"x {EIGHT}"]) == {"t": (2, 0, 1)}


def test_a_text_longer_than_what_is_hashed_at_once_is_whole() -> None:
    long = " ".join(f"w{i}" for i in range(400_000))  # 2.7 MB
    hashes, documents = windows(["short", long, f"x {EIGHT}"])
    assert len(np.unique(hashes)) == len(hashes) == 400_000 - 7 + 2
    assert np.bincount(documents).tolist() == [0, 400_000 - 7, 2]
    assert hashes[-1] == windows([EIGHT])[0][0]
    assert hashes[1000] == windows([" ".join(f"w{i}" for i in range(1000, 1008))])[0][0]


def plain(suite: Sequence[str], train: Sequence[str]) -> int:
    """How many distinct documents share a sequence; wording is left to the other tests."""

    def windows(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    seen = set().union(*map(windows, train))
    prompts = {f"q: {' '.join(text.lower().split())} a:" for text in train}
    documents = dict.fromkeys(suite)
    return sum(
        bool(windows(d) & seen) or f"q: {' '.join(d.lower().split())} a:" in prompts
        for d in documents
    )


TEXTS = st.lists(st.text("ab ", max_size=40), min_size=1, max_size=4)


@settings(deadline=None, max_examples=200)
@given(TEXTS, TEXTS)
def test_any_texts_against_the_plain_computation(suite: list[str], train: list[str]) -> None:
    suite, train = [t.strip() or "x" for t in suite], [t.strip() or "x" for t in train]
    expected = plain(suite, train)
    found = overlaps({"t": table(suite)}, train)
    assert found.get("t", (0, 0, 0))[2] == expected


def test_hashes_are_the_same_in_every_process() -> None:
    code = (
        f"from harness.contamination import windows; print(windows(['{EIGHT} nine'])[0].tolist())"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    hashes, documents = windows([f"{EIGHT} nine"])
    assert said.stdout.strip() == str(hashes.tolist())
    assert documents.tolist() == [0, 0]
    assert len(np.unique(hashes)) == 2


@pytest.fixture
def tasks(tmp_path: Path) -> tuple[list[TaskData], list[TaskData]]:
    def task(name: str, splits: dict[Split, list[str]]) -> TaskData:
        folder = tmp_path / name
        records: list[tuple[Split, Record]] = [
            (split, Record(name, document_id(name, text), text, ["x"], [], []))
            for split, texts in splits.items()
            for text in texts
        ]
        write_task(folder, name, records)
        file = read_task(folder)
        return TaskData(
            TaskSpec(name, ("m",)),
            folder / "train",
            folder / "evaluation",
            file.fingerprint,
            file.counts,
            file.kind,
        )

    pool = [
        task("seen", {"train": [f"well {EIGHT} nine"], "evaluation": ["other"]}),
        task("unseen", {"train": ["nothing of it"], "evaluation": ["x"]}),
    ]
    return pool, [task("held", {"evaluation": [EIGHT, "free of it"], "train": ["y"]})]


def test_pairs_are_found_and_kept(
    tasks: tuple[list[TaskData], list[TaskData]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PHATGOOSE_CACHE", str(tmp_path / "cache"))
    pool, suite = tasks
    expected = [Overlap("held", "seen", 2, 0, 1, EIGHT)]
    assert find_overlaps(pool, suite) == expected
    assert expected[0].share == 0.5
    assert "1 of 2 documents of suite task held" in str(expected[0])
    # The second time, nothing is read.
    monkeypatch.setattr("harness.contamination.read_batches", None)
    assert find_overlaps(pool, suite) == expected
