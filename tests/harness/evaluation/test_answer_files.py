from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from harness.evaluation.answer_files import AnswerFiles, DamagedAnswer, task_key
from harness.evaluation.answers import Answer, joined
from harness.storage import Folder
from phatgoose.inference.scoring import Score

KEY = "0" * 32


def answer() -> Answer:
    return Answer(
        scores=[
            [Score(-1.25, -0.1, 3, True, False), Score(-1e-30, float("-inf"), 0, False, True)],
            [],
            [],
        ],
        texts=["grüße, 世界 🪿\n", "\ud83e alone", ""],
        tokens=17,
        seconds=0.1,
        routing={
            "model.layers.1.up": torch.tensor([0.1, 2 / 3, 1e-300], dtype=torch.float64),
            "model.layers.0.up": torch.tensor([1.0, 0.0, 5e8], dtype=torch.float64),
        },
        routed={"model.layers.1.up": 5, "model.layers.0.up": 7},
        cut=[0, 2],
    )


def assert_same(a: Answer, b: Answer) -> None:
    for linear, weights_E in a.routing.items():
        assert weights_E.dtype == b.routing[linear].dtype == torch.float64
        assert torch.equal(weights_E, b.routing[linear])
    assert list(a.routing) == list(b.routing)
    assert replace(a, routing={}) == replace(b, routing={})


@pytest.fixture
def files(tmp_path: Path) -> AnswerFiles:
    return AnswerFiles(Folder(tmp_path))


def only_file(folder: Path) -> Path:
    (file,) = (path for path in folder.rglob("*") if path.is_file())
    return file


def test_an_answer_is_read_as_it_was_written(tmp_path: Path, files: AnswerFiles) -> None:
    files.write(KEY, "bbh/task", answer())
    assert files.shards() == {KEY}
    assert_same(AnswerFiles(Folder(tmp_path)).read(KEY), answer())


def test_an_answer_without_routing_is_stored(files: AnswerFiles) -> None:
    plain = Answer(scores=[[]], texts=["yes"], tokens=3)
    files.write(KEY, "bbh/task", plain)
    assert_same(files.read(KEY), plain)


def test_an_answer_with_failures_is_kept_and_does_not_count(files: AnswerFiles) -> None:
    partial = replace(answer(), failed={1: "memory ran out"})
    files.write(KEY, "bbh/task", partial)
    assert files.shards() == set()
    assert_same(files.read(KEY), partial)
    files.write(KEY, "bbh/task", answer())  # asked again
    assert files.shards() == {KEY}
    assert_same(files.read(KEY), answer())


@pytest.mark.parametrize("kept", [0, 5, 8, 40, 0.5, -1])
def test_a_truncated_file_is_named(tmp_path: Path, files: AnswerFiles, kept: float) -> None:
    files.write(KEY, "bbh/task", answer())
    file = only_file(tmp_path)
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if kept == 0.5 else int(kept)])
    with pytest.raises(DamagedAnswer, match=f"{file.name} is damaged"):
        files.read(KEY)


def test_a_file_with_other_content_is_named(tmp_path: Path, files: AnswerFiles) -> None:
    files.write(KEY, "bbh/task", answer())
    file = only_file(tmp_path)
    for data in (b"\0" * 100, b"not this", b"\xff" * 50, b"PAR1PAR1"):
        file.write_bytes(data)
        with pytest.raises(DamagedAnswer, match=f"{file.name} is damaged"):
            files.read(KEY)


def with_column(table: pa.Table, name: str, change: Callable[[object], object]) -> pa.Table:
    place = table.schema.get_field_index(name)
    (value,) = table[name].to_pylist()
    changed = pa.array([change(value)], table.schema.field(name).type)
    return table.set_column(place, table.schema.field(name), changed)


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("key", lambda key: "1" + key[1:]),
        ("task", lambda task: task + "2"),
        ("scores", lambda scores: [[{**scores[0][0], "loglikelihood": -1.5}], *scores[1:]]),
        ("texts", lambda texts: [b"x" + texts[0], *texts[1:]]),
        ("texts", lambda texts: [texts[0] + texts[1][:1], texts[1][1:], *texts[2:]]),
        ("tokens", lambda tokens: tokens + 1),
        ("seconds", lambda seconds: 2 * seconds),
        ("cut", lambda cut: cut[:1]),
        ("failed", lambda failed: [{"place": 0, "reason": "no"}]),
        ("linears", lambda linears: linears[::-1]),
        ("routed", lambda routed: routed[::-1]),
        ("routing", lambda routing: bytes([routing[0] ^ 1]) + routing[1:]),
    ],
)
def test_an_edited_value_is_noticed(
    tmp_path: Path, files: AnswerFiles, column: str, change: Callable[[object], object]
) -> None:
    files.write(KEY, "bbh/task", answer())
    file = only_file(tmp_path)
    pq.write_table(with_column(pq.read_table(file), column, change), file)
    with pytest.raises(DamagedAnswer, match=f"{file.name} is damaged"):
        files.read(KEY)


def test_the_answer_to_another_shard_is_noticed(tmp_path: Path, files: AnswerFiles) -> None:
    """Check a file that was copied or renamed."""
    files.write(KEY, "bbh/task", answer())
    file, other = only_file(tmp_path), "1" * 32
    file.rename(file.with_name(f"{other}.parquet"))
    with pytest.raises(DamagedAnswer):
        files.read(other)


def test_a_router_has_one_file_after_scoring(tmp_path: Path, files: AnswerFiles) -> None:
    parts = [replace(answer(), tokens=tokens) for tokens in (3, 4)]
    keys = ["a" * 32, "b" * 32]
    for key, part in zip([*keys, KEY], [*parts, answer()], strict=True):
        files.write(key, "bbh/task", part)
    whole, key = joined(parts), task_key(keys)
    files.compact("bbh", "single:e0", {"bbh/task": (key, whole)}, keys)
    assert files.shards() == {KEY}  # of another router
    assert files.tasks("bbh", "single:e0") == {key}
    assert files.tasks("bbh", "merged") == set()
    assert_same(files.read_tasks("bbh", "single:e0", [key])[key], whole)
    assert files.read_tasks("bbh", "single:e0", ["other"]) == {}
    # Another call may ask for other tasks, or again for the same.
    files.compact("bbh", "single:e0", {"bbh/other": ("k2", answer())}, [])
    files.compact("bbh", "single:e0", {"bbh/other": ("k3", answer())}, [])
    assert files.tasks("bbh", "single:e0") == {key, "k3"}
    assert_same(files.read_tasks("bbh", "single:e0", [key])[key], whole)
    file = tmp_path / "answers" / "tasks" / "bbh" / "single@e0.parquet"
    file.write_bytes(file.read_bytes()[:-9])
    assert files.tasks("bbh", "single:e0") == set()
    assert files.read_tasks("bbh", "single:e0", [key]) == {}


def test_sums_go_in_the_order_of_the_parts() -> None:
    parts = [
        Answer(
            scores=[[Score(-1.0, -1.0, 1, False, False)]] * 2,
            texts=["a", "b"],
            tokens=2,
            seconds=1.0,
            routing={"q": torch.tensor([weight, 1.0], dtype=torch.float64)},
            routed={"q": 2},
            cut=[1],
            failed={0: reason},
        )
        for weight, reason in ((1e16, "x"), (1.0, "y"), (-1e16, "z"))
    ]
    whole = joined(parts)
    assert whole.texts == ["a", "b"] * 3
    assert (whole.tokens, whole.seconds, whole.routed) == (6, 3.0, {"q": 6})
    assert whole.cut == [1, 3, 5]
    assert whole.failed == {0: "x", 2: "y", 4: "z"}
    assert whole.routing["q"].tolist() == [1e16 + 1.0 - 1e16, 3.0]
    assert parts[0].routing["q"].tolist() == [1e16, 1.0]  # unchanged
    assert joined(parts[i] for i in (0, 2, 1)).routing["q"].tolist() == [1.0, 3.0]
