"""What an evaluation actor does with one chunk when memory runs out."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from harness.evaluation.answering import answer_chunk
from harness.evaluation.chunks import Answer, Chunk, Request
from phatgoose.base import Base
from phatgoose.errors import OutOfMemory
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
def chunk(request: pytest.FixtureRequest) -> Chunk:
    return Chunk("birds", request.param, SCORED if request.param == "score" else GENERATED)


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
    base: Base, model: RoutedModel, chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer_chunk(base, model, chunk, "")
    if not base.is_encoder_decoder:
        assert expected.cut == [4]  # it is longer than the base's positions
    device = SmallDevice(model, 1, monkeypatch)
    found = answer_chunk(base, model, chunk, "")
    assert set(device.sizes) == {1}
    close(found, expected)


def test_one_request_that_is_too_large_is_an_error(
    base: Base, model: RoutedModel, chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallDevice(model, 0, monkeypatch)
    with pytest.raises(OutOfMemory) as caught:
        answer_chunk(base, model, chunk, "")
    assert str(caught.value) == (
        f"memory ran out in 1 requests of up to {chunk.requests[0].characters} characters (so "
        "much): use a device with more memory, or a base in a smaller dtype"
    )


def test_other_errors_are_unchanged(
    base: Base, model: RoutedModel, chunk: Chunk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes differ")

    for name in ("score", "generate", "answer"):
        monkeypatch.setattr(model, name, broken)
    with pytest.raises(RuntimeError, match=r"^shapes differ$"):
        answer_chunk(base, model, chunk, "")
