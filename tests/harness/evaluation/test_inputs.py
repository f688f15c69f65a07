"""Check what evaluation actors get: requests tokenized once, in shards."""

from typing import Any

import pytest

from harness.evaluation.encoding import EncodedShard, encode, query_of
from harness.evaluation.inputs import SuiteInputs
from harness.evaluation.requests import SuiteRequests
from harness.evaluation.shards import Limits, Request
from harness.tasks import TaskData
from phatgoose.base import Base
from phatgoose.question import Question
from phatgoose.tokenization import encode_context

TEXT = "Is the lake deep?"


def test_a_request_is_tokenized_as_the_model_reads_it(base: Base) -> None:
    requests = [
        Request(TEXT, (" yes", " it is not")),
        Request(f"{TEXT} ", (" yes",), 3, choices_shown=False),
        Request(TEXT, (), 5),
    ]
    scored, both, written = encode(base, requests, "about lakes")
    assert scored.question == Question.encode(
        base, TEXT, (" yes", " it is not"), query=query_of(requests[0], "about lakes")
    )
    assert scored.prompt == []
    assert scored.tokens == scored.question.length
    assert both.prompt == written.prompt == encode_context(base, TEXT)
    assert both.question is not None
    assert both.query.choices == ()
    assert both.tokens == len(both.prompt) + 3 + len(both.question.choices[0])
    assert written.question is None
    assert written.tokens == len(written.prompt) + 5
    assert {one.query.task for one in (scored, both, written)} == {"about lakes"}


@pytest.fixture
def stored() -> list[Any]:
    return []


@pytest.fixture
def inputs(tasks: list[TaskData], llama: Base, stored: list[Any]) -> SuiteInputs:
    """Return inputs whose references are places in `stored`."""

    def put(value: Any) -> int:
        stored.append(value)
        return len(stored) - 1

    requests = SuiteRequests("held", tasks)
    inputs = SuiteInputs(requests, llama, Limits(40, 80))
    inputs.put = put
    return inputs


def test_nothing_is_stored_before_it_is_asked_for(inputs: SuiteInputs, stored: list[Any]) -> None:
    assert len(inputs.shards["held/swans"]) > 1
    assert stored == []


def test_each_input_is_stored_once(inputs: SuiteInputs, stored: list[Any]) -> None:
    for _ in range(2):  # for two routers
        for name, shards in inputs.shards.items():
            for shard in shards:
                encoded: EncodedShard = stored[inputs.shard(shard)]
                assert (encoded.task, encoded.kind) == (name, shard.kind)
                assert sum(one.tokens for c in encoded.chunks for one in c) == shard.tokens
    assert len(stored) == sum(map(len, inputs.shards.values()))


def test_shards_contain_every_request_once(inputs: SuiteInputs, stored: list[Any]) -> None:
    for name, shards in inputs.shards.items():
        ((kind, asked),) = inputs.requests.tasks[name].asked(name).items()
        found: dict[int, Request] = {}
        for shard in shards:
            assert shard.kind == kind
            encoded: EncodedShard = stored[inputs.shard(shard)]
            assert [len(chunk) for chunk in encoded.chunks] == [len(c) for c in shard.chunks]
            given = [one.request for chunk in encoded.chunks for one in chunk]
            found |= dict(zip(shard.places, given, strict=True))
        assert [found[place] for place in range(len(asked))] == [one.request for one in asked]
