"""Compare the overlap with a plain computation on sets of word tuples."""

import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.evaluation.overlap import Overlap, SuiteIndex, find_overlaps, windows
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


def test_eight_words_in_a_row_are_found_regardless_of_case_and_punctuation() -> None:
    suite = {"t": table([f"Zero. {EIGHT} nine", "something else"])}
    assert overlaps(suite, ["no", f"x {EIGHT.upper().replace(' ', ', ')}!"]) == {"t": (2, 0, 1)}
    assert overlaps(suite, ["one two three four five six seven"]) == {}
    assert overlaps(suite, [EIGHT.replace("four", "4")]) == {}


def test_other_alphabets_are_compared_too() -> None:
    text = "мама мыла раму а папа читал газету вслух"
    assert overlaps({"t": table([text])}, [text + " сегодня"]) == {"t": (1, 0, 1)}


def test_an_equal_input_counts_at_any_length_but_only_with_its_prompt() -> None:
    suite = {"t": table(["dog", "cat"])}
    assert overlaps(suite, ["dog"], ["q:  DOG a:"]) == {"t": (2, 1, 1)}
    assert overlaps(suite, ["dog"], ["Plural of dog:"]) == {}


@pytest.mark.parametrize(
    ("held", "trained", "same"),
    [
        ("The dog", "the\n DOG ", True),
        ("the dog.", "the dog", False),
        ("3 + 4 =", "3 - 4 =", False),
        ("What is 😀?", "What is 😭?", False),
        ("я ем", "Я  ЕМ", True),
        # Texts without words never match, not even each other.
        ("", "", False),
        (" \n", "", False),
        ("?! 😀", "?! 😀", False),
    ],
)
def test_equal_inputs_may_differ_in_case_and_spacing(held: str, trained: str, same: bool) -> None:
    suite = {"t": table([""], [held])}
    assert overlaps(suite, [""], [trained]) == ({"t": (1, 1, 1)} if same else {})


def test_every_document_with_the_same_prompt_is_found() -> None:
    """Check documents with separate texts, and those that differ only in case and spacing."""
    suite = {
        "one prompt": table(["dog", "cat", "cow"], ["Which?", "Which?", "What?"]),
        "twins": table(["", "", ""], ["a b", "A  b", "a c"]),
    }
    assert overlaps(suite, ["", ""], ["which?", "a b"]) == {
        "one prompt": (3, 2, 2),
        "twins": (3, 2, 2),
    }


def test_nothing_is_found_in_empty_texts() -> None:
    assert overlaps({}, [EIGHT]) == {}
    assert overlaps({"t": table([EIGHT])}, []) == {}
    assert overlaps({"t": table(["", "short"])}, ["", EIGHT], ["", EIGHT]) == {}


def test_sequences_do_not_cross_examples() -> None:
    words = EIGHT.split()
    suite = {"t": table([EIGHT])}
    assert overlaps(suite, [" ".join(words[:4]), " ".join(words[4:])], ["", ""]) == {}
    # Nor between documents of the suite.
    split = {"t": table([" ".join(words[:4]), " ".join(words[4:])], ["a", "b"])}
    assert overlaps(split, [EIGHT], [EIGHT]) == {}


def test_sequences_in_many_documents_are_the_wording_of_the_task() -> None:
    """Check six documents that begin alike, and a seventh that shares its own words."""
    own = "k l m n o p q r"
    texts = [f"{EIGHT} is number {i}" for i in range(6)] + [f"{EIGHT} {own}"]
    suite = {"t": table(texts)}
    assert overlaps(suite, [EIGHT]) == {}
    assert overlaps(suite, [own]) == {"t": (7, 0, 1)}
    few = {"t": table(texts[:5])}
    assert overlaps(few, [EIGHT]) == {"t": (5, 0, 5)}


def test_prompts_of_one_document_count_as_one_document() -> None:
    suite = {"t": table([EIGHT] * 20, [f"prompt {i} {EIGHT}" for i in range(20)])}
    assert overlaps(suite, [EIGHT]) == {"t": (1, 0, 1)}


def test_the_prompt_counts_for_a_document_without_text() -> None:
    suite = {"t": table(["", ""], [EIGHT, "short"])}
    assert overlaps(suite, [""], [f"x {EIGHT}"]) == {"t": (2, 0, 1)}


def test_a_text_longer_than_a_hashing_block_is_processed_completely() -> None:
    long = " ".join(f"w{i}" for i in range(400_000))  # 2.7 MB
    hashes, documents = windows(["short", long, f"x {EIGHT}"])
    assert len(np.unique(hashes)) == len(hashes) == 400_000 - 7 + 2
    assert np.bincount(documents).tolist() == [0, 400_000 - 7, 2]
    assert hashes[-1] == windows([EIGHT])[0][0]
    assert hashes[1000] == windows([" ".join(f"w{i}" for i in range(1000, 1008))])[0][0]


@pytest.mark.parametrize("size", [1, 7, 30, 1000])
def test_block_borders_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["", f"{EIGHT}, {EIGHT}", "x" * 100, "это, и так далее: " * 9, "?", f"{EIGHT} 9"]
    hashes, documents = windows(texts)
    monkeypatch.setattr("harness.evaluation.overlap._PART", size)
    cut_hashes, cut_documents = windows(texts)
    assert hashes.tolist() == cut_hashes.tolist()
    assert documents.tolist() == cut_documents.tolist()
    assert np.bincount(documents).tolist() == [0, 9, 0, 4 * 9 - 7, 0, 2]


def sequences(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}


def plain(
    suite: Sequence[tuple[str, str]], train: Sequence[tuple[str, str]]
) -> tuple[int, int, int] | None:
    """Return documents, exact and shared ones of a task; texts and inputs are given in pairs."""

    def same(prompt: str) -> str:
        return " ".join(prompt.lower().split()) if re.search(r"\w", prompt) else ""

    documents = dict.fromkeys(text or prompt for text, prompt in suite)
    count = Counter(sequence for document in documents for sequence in sequences(document))
    own = {sequence for sequence, n in count.items() if n <= max(5, len(documents) / 100)}
    seen = set().union(*(sequences(text) for pair in train for text in pair))
    prompts = {same(prompt) for _, prompt in train} - {""}
    exact = {text or prompt for text, prompt in suite if same(prompt) in prompts}
    shared = {document for document in documents if sequences(document) & own & seen} | exact
    return (len(documents), len(exact), len(shared)) if shared else None


# Phrases that produce equal sequences, between borders of all kinds.
PHRASES = [
    EIGHT,
    "one two three four",
    "five six seven eight",
    "a",
    "B",
    "я ё ǅ",
    "中文 ٣",
    "x_1",
    "é",
]
BORDERS = [" ", ", ", "\n", "-", " 😀 ", "", "…"]
TEXT = st.lists(st.tuples(st.sampled_from(PHRASES), st.sampled_from(BORDERS)), max_size=6).map(
    lambda pairs: "".join(f"{border}{phrase}" for phrase, border in pairs)
)
EXAMPLES = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=12)


@settings(deadline=None, max_examples=150)
@given(first=EXAMPLES, second=EXAMPLES, train=EXAMPLES, size=st.sampled_from([30, 2**17]))
def test_any_texts_give_the_results_of_the_plain_computation(
    first: list[tuple[str, str]],
    second: list[tuple[str, str]],
    train: list[tuple[str, str]],
    size: int,
) -> None:
    suite = {"first": first, "second": second}
    expected = {name: plain(pairs, train) for name, pairs in suite.items()}
    tables = {name: table(*zip(*pairs, strict=True)) for name, pairs in suite.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.evaluation.overlap._PART", size)
        found = overlaps(tables, *zip(*train, strict=True))
    assert found == {name: counts for name, counts in expected.items() if counts}


def test_sequences_in_more_than_a_hundredth_of_many_documents_are_wording() -> None:
    """Check that of 800 documents, 8 may share a sequence and 9 may not."""

    def task(alike: int) -> pa.Table:
        return table([f"{EIGHT} {i}" if i < alike else f"none {i}" for i in range(800)])

    suite = {"eight": task(8), "nine": task(9)}
    assert overlaps(suite, [EIGHT], ["no"]) == {"eight": (800, 0, 8)}


def test_different_words_have_different_hashes() -> None:
    """Check words of one to five letters, each in a separate window."""
    letters = "abcdeéя中"
    words = [
        f"{a}{b}{c}{d}{e}"
        for a in letters
        for b in letters
        for c in letters
        for d in letters
        for e in ["", *letters]
    ]
    hashes, _ = windows([f"{word} 1 2 3 4 5 6 7" for word in words])
    assert len(np.unique(hashes)) == len(words) == 8**4 * 9


def test_many_different_sequences_are_not_mistaken_for_equal_ones() -> None:
    """Check that the first table passes only about one in twenty of them."""
    held, trained = (
        " ".join(f"w{i}" for i in numbers) for numbers in (range(10_000), range(10_000, 60_000))
    )
    suite = {"t": table(["", *held.split()], [held, *held.split()])}
    assert overlaps(suite, [""], [trained]) == {}
    assert overlaps(suite, [""], [f"{trained} {held}"]) == {"t": (10_001, 0, 1)}


def test_hashes_are_the_same_in_every_process() -> None:
    text = f"{EIGHT} девять"
    code = f"from harness.evaluation.overlap import windows; print(windows([{text!r}])[0].tolist())"
    hashes, documents = windows([text])
    assert documents.tolist() == [0, 0]
    assert len(np.unique(hashes)) == 2
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONUTF8": "1"}
        said = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        assert said.stdout.strip() == str(hashes.tolist())


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input() -> None:
    """Check 200,000 examples, 10 MB as text and 30 MB as strings; only a part is held."""
    body = "word " * 6 + "a b"
    before, in_tables = pa.total_allocated_bytes(), 0

    def batches() -> Iterator[pa.RecordBatch]:
        nonlocal in_tables
        for start in range(0, 200_000, 4000):
            in_tables = max(in_tables, pa.total_allocated_bytes() - before)
            inputs = [f"{i} {body} {i}" for i in range(start, start + 4000)]
            yield table([""] * len(inputs), inputs).to_batches()[0]

    index = SuiteIndex({"t": table([f"x {body}"]), "other": table([f"199999 {body[:-2]}"])})
    tracemalloc.start()
    try:
        found = index.overlaps("e", batches())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert [(o.suite_task, o.shared) for o in found] == [("t", 1), ("other", 1)]
    assert peak < 10e6
    assert in_tables < 2e6


def test_a_long_text_takes_little_more_memory_than_its_result() -> None:
    text = "word " * 2_000_000
    windows(["the tables are made"])
    tracemalloc.start()
    try:
        hashes, _ = windows([text])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(hashes) == 2_000_000 - 7
    # The result takes 16 bytes per word, and twice that while it is assembled.
    assert peak < 2 * 16 * len(hashes) + 3 * len(text)


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
    monkeypatch.setattr("harness.evaluation.overlap.read_batches", None)
    assert find_overlaps(pool, suite) == expected
