"""What an evaluation actor does with a shard, and when memory runs out or a document is bad."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from harness.evaluation.answering import answer_shard, split_chunks
from harness.evaluation.answers import Answer
from harness.evaluation.encoding import EncodedShard, encode
from harness.evaluation.shards import Kind, Request
from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.inference.model import RoutedModel
from phatgoose.pool import Pool
from tests.support.tiny import make_experts

TEXTS = ("goose", "a duck", "the swan swims", "one heron", "a long neck and a beak " * 40)
SCORED = tuple(Request(text, (" yes", " no way")) for text in TEXTS)
GENERATED = tuple(
    Request(text, (" yes",) if place % 2 else (), max_new_tokens=2 + place % 2, choices_shown=False)
    for place, text in enumerate(TEXTS)
)


@pytest.fixture(params=["score", "generate"])
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


@pytest.fixture
def shard(base: Base, kind: Kind) -> EncodedShard:
    """Return a shard of one chunk."""
    return shard_of(base, kind, SCORED if kind == "score" else GENERATED)


def shard_of(base: Base, kind: Kind, *chunks: Sequence[Request]) -> EncodedShard:
    return EncodedShard("birds", kind, [encode(base, chunk, "") for chunk in chunks])


@pytest.fixture
def model(base: Base) -> RoutedModel:
    return RoutedModel(base, Pool.from_experts(make_experts(base, 3)), "phatgoose")


class SmallDevice:
    """Refuse more than so many requests at once, as an allocator does."""

    def __init__(self, model: RoutedModel, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.most, self.sizes = most, list[int]()
        for name in ("score", "generate", "answer"):
            monkeypatch.setattr(model, name, self._limited(getattr(model, name)))

    def _limited(self, call: Any) -> Any:
        def limited(asked: Sequence[Any], *args: Any, **options: Any) -> Any:
            found = call(asked, *args, **options)  # memory runs out when much is done already
            if len(asked) > self.most:
                raise torch.OutOfMemoryError("so much")
            self.sizes.append(len(asked))
            return found

        return limited


def close(found: Answer, expected: Answer) -> None:
    assert found.texts == expected.texts
    assert found.tokens == expected.tokens
    assert found.cut == expected.cut
    assert [[score.tokens for score in scores] for scores in found.scores] == [
        [score.tokens for score in scores] for scores in expected.scores
    ]
    for scores, wanted in zip(found.scores, expected.scores, strict=True):
        assert [score.loglikelihood for score in scores] == pytest.approx(
            [score.loglikelihood for score in wanted], abs=1e-4
        )
    assert found.routing.keys() == expected.routing.keys()
    for linear, weights_E in expected.routing.items():
        torch.testing.assert_close(found.routing[linear], weights_E, rtol=1e-4, atol=1e-4)


def test_a_chunk_that_is_too_large_is_answered_in_halves(
    base: Base, model: RoutedModel, shard: EncodedShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer_shard(base, model, shard)
    if not base.is_encoder_decoder:
        assert expected.cut == [4]  # it is longer than the base's positions
    device = SmallDevice(model, 1, monkeypatch)
    found = answer_shard(base, model, shard)
    assert set(device.sizes) == {1}
    assert found.failed == {}
    close(found, expected)


@pytest.mark.parametrize("halvings", [0, 1, 2, 5])
def test_chunks_are_cut_into_halves_before(
    base: Base,
    model: RoutedModel,
    shard: EncodedShard,
    halvings: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = answer_shard(base, model, shard)
    split = split_chunks(shard, halvings)
    assert max(map(len, split.chunks)) == [5, 3, 2, 1, 1, 1][halvings]
    assert [one for chunk in split.chunks for one in chunk] == shard.chunks[0]
    close(answer_shard(base, model, split), expected)


def test_one_request_that_is_too_large_is_noted(
    base: Base, model: RoutedModel, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last text is much longer than the others."""
    requests = SCORED if kind == "score" else GENERATED
    shard = shard_of(base, kind, requests[:2], requests[2:])
    expected = answer_shard(base, model, shard)
    longest = shard.chunks[1][2]

    def small(call: Any) -> Any:
        def limited(asked: Sequence[Any], *args: Any, **options: Any) -> Any:
            if longest.question in asked or longest.query in asked:
                raise torch.OutOfMemoryError("so much")
            return call(asked, *args, **options)

        return limited

    for name in ("score", "generate", "answer"):
        monkeypatch.setattr(model, name, small(getattr(model, name)))
    beats: list[None] = []
    found = answer_shard(base, model, shard, lambda: beats.append(None))
    assert len(beats) == 2
    assert found.failed == {
        4: f"memory ran out in 1 requests of up to {longest.tokens} tokens (so much): use a "
        "device with more memory, or a base in a smaller dtype"
    }
    assert (found.scores[4], found.texts[4]) == ([], "")
    assert found.texts[:4] == expected.texts[:4]
    for scores, wanted in zip(found.scores[:4], expected.scores[:4], strict=True):
        assert [score.loglikelihood for score in scores] == pytest.approx(
            [score.loglikelihood for score in wanted], abs=1e-4
        )


def test_an_error_of_all_requests_is_raised_soon(
    base: Base, model: RoutedModel, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def broken(asked: Sequence[Any], *_: Any, **__: Any) -> None:
        calls.append(len(asked))
        raise RuntimeError("shapes differ")

    for name in ("score", "generate", "answer"):
        monkeypatch.setattr(model, name, broken)
    requests = SCORED if kind == "score" else GENERATED
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        answer_shard(base, model, shard_of(base, kind, *[requests[:4]] * 50))
    assert calls.count(1) <= 12
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        answer_shard(base, model, shard_of(base, kind, requests[:1]))


def test_an_error_of_the_device_is_no_document_s(
    base: Base, model: RoutedModel, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = SCORED if kind == "score" else GENERATED
    shard = shard_of(base, kind, requests[:1], requests[1:2])
    answer_shard(base, model, shard)
    calls: list[int] = []

    def dies(call: Any) -> Any:
        def died(asked: Sequence[Any], *args: Any, **options: Any) -> Any:
            calls.append(len(asked))
            if len(calls) > 1:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return call(asked, *args, **options)

        return died

    for name in ("score", "generate", "answer"):
        monkeypatch.setattr(model, name, dies(getattr(model, name)))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        answer_shard(base, model, shard)


def test_an_error_of_the_router_is_raised_at_once(
    base: Base, model: RoutedModel, shard: EncodedShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def refuses(asked: Sequence[Any], *_: Any, **__: Any) -> None:
        calls.append(len(asked))
        raise PhatgooseError("it has no profile")

    for name in ("score", "generate", "answer"):
        monkeypatch.setattr(model, name, refuses)
    with pytest.raises(PhatgooseError, match=r"^it has no profile$"):
        answer_shard(base, model, shard)
    assert len(calls) == 1
