import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.evaluation.chunks import Answer, Chunk, Request, cut
from harness.evaluation.journal import DamagedAnswer, Journal
from harness.storage import Folder
from phatgoose.inference.scoring import Score

TEXT = st.text(max_size=40)
REQUESTS = st.lists(
    st.builds(Request, context=TEXT, choices=st.lists(TEXT, max_size=3).map(tuple)), max_size=30
)
KEY = "0" * 32


@given(REQUESTS, st.integers(1, 200))
def test_chunks_partition_the_requests_in_order_of_length(
    requests: list[Request], characters: int
) -> None:
    chunks = cut("task", "score", requests, characters)
    places = [place for _, group in chunks for place in group]
    assert sorted(places) == list(range(len(requests)))
    for chunk, group in chunks:
        assert chunk.requests == tuple(requests[place] for place in group)
        assert (chunk.task, chunk.kind) == ("task", "score")
    lengths = [requests[place].characters for place in places]
    assert lengths == sorted(lengths)


@given(REQUESTS, st.integers(1, 200))
def test_a_chunk_is_as_large_as_allowed(requests: list[Request], characters: int) -> None:
    sizes = [
        [request.characters for request in chunk.requests]
        for chunk, _ in cut("task", "score", requests, characters)
    ]
    for size in sizes:
        assert size
        assert sum(size) <= characters or len(size) == 1  # one that is too long is alone
    for size, following in itertools.pairwise(sizes):
        assert sum(size) + following[0] > characters


@given(REQUESTS, st.integers(1, 200))
def test_chunks_depend_only_on_the_requests(requests: list[Request], characters: int) -> None:
    assert cut("t", "score", requests, characters) == cut("t", "score", requests, characters)


def test_a_larger_limit_gives_larger_chunks() -> None:
    requests = [Request("x" * 10) for _ in range(8)]
    assert len(cut("t", "generate", requests, 20)) == 4
    assert len(cut("t", "generate", requests, 80)) == 1
    assert cut("t", "generate", [], 80) == []


def test_a_key_changes_with_everything_that_changes_the_answer() -> None:
    request = Request("context", ("a", "b"), max_new_tokens=4, until=("\n",))
    chunk = Chunk("task", "score", (request, Request("other")))
    identity = [1, "pool", "base", "Phatgoose", {"top_k": 2}]
    others = [
        chunk.key([1, "pool", "base", "Phatgoose", {"top_k": 1}]),
        chunk.key([2, "pool", "base", "Phatgoose", {"top_k": 2}]),
        replace(chunk, task="other").key(identity),
        replace(chunk, kind="generate").key(identity),
        replace(chunk, requests=chunk.requests[::-1]).key(identity),
        replace(chunk, requests=chunk.requests[:1]).key(identity),
    ]
    for field, value in {
        "context": "context ",
        "choices": ("b", "a"),
        "max_new_tokens": 5,
        "until": (".",),
    }.items():
        changed = replace(request, **{field: value})  # type: ignore[arg-type]
        others.append(replace(chunk, requests=(changed, *chunk.requests[1:])).key(identity))
    keys = [chunk.key(identity), *others]
    assert len(set(keys)) == len(keys)
    assert chunk.key(identity) == keys[0]
    # The border between two texts counts.
    ends = (
        Chunk("t", "score", (Request("ab", ("c",)),)),
        Chunk("t", "score", (Request("a", ("bc",)),)),
    )
    assert ends[0].key(identity) != ends[1].key(identity)


def answer() -> Answer:
    return Answer(
        scores=[[Score(-1.25, -0.1, 3, True, False), Score(-1e-30, float("-inf"), 0, False, True)]],
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


def test_an_answer_is_read_as_it_was_written(tmp_path: Path) -> None:
    Journal(Folder(tmp_path)).write(KEY, answer())
    journal = Journal(Folder(tmp_path))
    assert journal.keys() == {KEY}
    assert_same(journal.read(KEY), answer())


def test_an_answer_without_routing_is_stored(tmp_path: Path) -> None:
    journal = Journal(Folder(tmp_path))
    plain = Answer(texts=["yes"], tokens=3)
    journal.write(KEY, plain)
    assert_same(journal.read(KEY), plain)


@pytest.mark.parametrize("kept", [0, 5, 8, 40, 0.5, -1])
def test_a_truncated_file_is_named(tmp_path: Path, kept: float) -> None:
    journal = Journal(Folder(tmp_path))
    journal.write(KEY, answer())
    [file] = (tmp_path / "journal").iterdir()
    data = file.read_bytes()
    file.write_bytes(data[: int(kept * len(data)) if kept == 0.5 else int(kept)])
    with pytest.raises(DamagedAnswer, match=f"{file.name} is damaged"):
        journal.read(KEY)


def test_a_file_with_other_content_is_named(tmp_path: Path) -> None:
    journal = Journal(Folder(tmp_path))
    journal.write(KEY, answer())
    [file] = (tmp_path / "journal").iterdir()
    for data in (b"\0" * 100, b"not this", b"\xff" * 50, b"\x02\0\0\0\0\0\0\0{}"):
        file.write_bytes(data)
        with pytest.raises(DamagedAnswer, match=f"{file.name} is damaged"):
            journal.read(KEY)


@pytest.mark.parametrize("old", [b"-1.25", b"17", b"alone", b"up"])
def test_an_edited_number_or_word_is_noticed(tmp_path: Path, old: bytes) -> None:
    journal = Journal(Folder(tmp_path))
    journal.write(KEY, answer())
    [file] = (tmp_path / "journal").iterdir()
    data = file.read_bytes()
    assert data.count(old) >= 1
    file.write_bytes(data.replace(old, old[:-1] + bytes([old[-1] ^ 1]), 1))
    with pytest.raises(DamagedAnswer):
        journal.read(KEY)


def test_an_edited_routing_weight_is_noticed(tmp_path: Path) -> None:
    journal = Journal(Folder(tmp_path))
    journal.write(KEY, answer())
    [file] = (tmp_path / "journal").iterdir()
    data = bytearray(file.read_bytes())
    data[-3] ^= 1  # in the last weight
    file.write_bytes(bytes(data))
    with pytest.raises(DamagedAnswer):
        journal.read(KEY)


def test_the_answer_to_another_chunk_is_noticed(tmp_path: Path) -> None:
    """Check a file that was copied or renamed."""
    journal = Journal(Folder(tmp_path))
    journal.write(KEY, answer())
    [file] = (tmp_path / "journal").iterdir()
    other = "1" * 32
    file.rename(file.with_name(f"{other}.safetensors"))
    with pytest.raises(DamagedAnswer):
        journal.read(other)
