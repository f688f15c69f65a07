import dataclasses
import hashlib
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.tasks import store
from harness.tasks.records import Record, Split, document_id
from phatgoose.errors import PhatgooseError


def record(prompt: str, **changes: object) -> Record:
    values = {"targets": ["yes"], "choices": [], "correct": [], **changes}
    return Record("some_task", document_id("some_task", prompt), prompt, **values)  # type: ignore[arg-type]


def write(
    folder: Path, train: list[Record], evaluation: list[Record], **options: object
) -> store.TaskFile:
    stream: Iterator[tuple[Split, Record]] = (
        (split, r)  # type: ignore[misc]
        for split, records in (("train", train), ("evaluation", evaluation))
        for r in records
    )
    store.write_task(folder, "some_task", stream, **options)  # type: ignore[arg-type]
    return store.read_task(folder)


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    train = [record("ça va ?\nA: ", targets=["oui", "yes"]), record("and you?", text="you")]
    graded = record("pick", targets=["b"], choices=["a", "b"], correct=[1], grades=[0.0, 0.7])
    folder = tmp_path / "task"
    file = write(folder, train, [graded], description="d", origin={"canary": "GUID 1"})
    by_document = sorted(train, key=lambda r: r.document)
    assert store.read_records(folder / "train") == by_document
    assert store.read_records(folder / "train", limit=1) == by_document[:1]
    assert store.read_records(folder / "evaluation") == [graded]
    assert file.counts == {"train": 2, "evaluation": 1}
    assert (file.description, file.origin["canary"]) == ("d", "GUID 1")
    lengths = [len(r.input) + len(r.targets[0]) for r in train]
    assert file.characters == sum(lengths) / 2
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


@given(st.lists(st.integers(0, 30), min_size=1), st.sampled_from([1, 3, 7, 1000]))
def test_any_stream_is_sorted_and_deduplicated_for_any_buffer_size(
    numbers: list[int], in_memory: int
) -> None:
    """Compare with a plain dictionary, for many sizes of the buffer and of the shards."""
    import tempfile

    records = [record(f"question {n}", targets=[str(i)]) for i, n in enumerate(numbers)]
    first: dict[str, Record] = {}
    for r in records:
        first.setdefault(r.document, r)
    expected = [first[document] for document in sorted(first)]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(store, "_ROWS_IN_MEMORY", in_memory)
        patch.setattr(store, "_ROWS_PER_SHARD", in_memory)
        file = write(Path(folder) / "task", records, [])
        assert store.read_records(Path(folder) / "task" / "train") == expected
        assert file.counts["train"] == len(expected)


def test_the_fingerprint_covers_the_training_data(tmp_path: Path) -> None:
    """Check by hand: the first six fields of each record, as JSON lists, split by split."""
    one, two = record("one"), record("two")
    expected = hashlib.sha256(b"evaluation\n")
    expected.update(json.dumps(list(dataclasses.astuple(two))[:6]).encode() + b"\n")
    expected.update(b"train\n" + json.dumps(list(dataclasses.astuple(one))[:6]).encode() + b"\n")
    prints = [
        write(tmp_path / "a", [one], [two]).fingerprint,
        write(tmp_path / "b", [dataclasses.replace(one, text="else")], [two]).fingerprint,
        write(tmp_path / "c", [one, two], []).fingerprint,
        write(tmp_path / "d", [record("one", targets=["no"])], [two]).fingerprint,
    ]
    assert prints[0] == prints[1] == expected.hexdigest()
    assert len(set(prints)) == 3


def test_shards_do_not_exceed_their_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_ROWS_PER_SHARD", 100)
    write(tmp_path / "task", [record(f"question {i}") for i in range(1000)], [])
    shards = store.shards(tmp_path / "task" / "train")
    sizes = [len(store.read_table(shard)) for shard in shards]
    assert sum(sizes) == 1000
    assert max(sizes) <= 100
    assert len(store.shards(tmp_path / "task" / "evaluation")) == 1


def test_a_large_task_is_never_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that of 40 MB of text, Python holds only a few at a time."""
    monkeypatch.setattr(store, "_ROWS_IN_MEMORY", 100)
    stream: Iterator[tuple[Split, Record]] = (
        ("train", record(f"{i} " + "word " * 4000)) for i in range(2_000)
    )
    tracemalloc.start()
    store.write_task(tmp_path / "task", "some_task", stream)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert store.read_task(tmp_path / "task").counts["train"] == 2_000
    assert peak < 25e6


@pytest.mark.parametrize(
    ("train", "evaluation", "reason"),
    [
        ([], [], "has no examples"),
        ([], [record("x"), record("y", choices=["yes"], correct=[0])], "mixes"),
        ([record("x"), record("y", choices=["yes"], correct=[0])], [], "mixes"),
    ],
)
def test_a_task_without_a_kind_is_named_and_leaves_no_files(
    tmp_path: Path, train: list[Record], evaluation: list[Record], reason: str
) -> None:
    with pytest.raises(PhatgooseError, match=f"some_task.*{reason}"):
        write(tmp_path / "task", train, evaluation)
    assert not list(tmp_path.iterdir())


def test_a_stream_that_fails_leaves_no_files(tmp_path: Path) -> None:
    def stream() -> Iterator[tuple[Split, Record]]:
        for i in range(50):
            yield "train", record(f"question {i}")
        raise PhatgooseError("line 51")

    with pytest.raises(PhatgooseError, match="line 51"):
        store.write_task(tmp_path / "task", "some_task", stream())
    assert not list(tmp_path.iterdir())


def test_the_first_of_two_writers_wins(tmp_path: Path) -> None:
    first = write(tmp_path / "task", [record("one")], [])
    before = (tmp_path / "task" / "task.json").stat().st_mtime_ns
    assert write(tmp_path / "task", [record("one")], []) == first
    assert (tmp_path / "task" / "task.json").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["task"]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    write(tmp_path / "task", [record(f"question {i}") for i in range(100)], [])
    (shard,) = store.shards(tmp_path / "task" / "train")
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(PhatgooseError, match=r"00000\.parquet cannot be read.*Delete"):
        store.read_records(tmp_path / "task" / "train")
    (tmp_path / "task" / "task.json").write_text("{")
    with pytest.raises(PhatgooseError, match=r"task\.json cannot be read.*Delete"):
        store.read_task(tmp_path / "task")
