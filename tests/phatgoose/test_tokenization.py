import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.model import TemplateLM

from phatgoose.base import Base
from phatgoose.tokenization import encode_context, encode_pair
from tests.tiny import llama_tokenizer


def encode_as_lm_eval(base: Base, context: str, target: str) -> tuple[list[int], list[int]]:
    """What lm-evaluation-harness makes of a pair whose context is not empty."""

    def tok_encode(text: str, **options: Any) -> list[int]:
        return list(base.tokenizer.encode(text, **options))

    backend = "seq2seq" if base.is_encoder_decoder else "causal"
    lm = SimpleNamespace(backend=backend, tok_encode=tok_encode)
    pair: tuple[list[int], list[int]] = TemplateLM._encode_pair(lm, context, target)
    return pair


@pytest.fixture
def starting_llama(llama: Base) -> Base:
    """A base whose tokenizer puts <s> in front."""
    return dataclasses.replace(llama, tokenizer=llama_tokenizer(start=True))


PAIRS = [
    ("Is the lake deep?", " yes"),
    ("Is the lake deep? ", "yes"),
    ("Is the lake deep?  ", "no"),
    ("Answer:\n", "the goose"),
    ("Answer: \n ", "the goose"),
    ("the goo", "se"),
    ("the", ""),
    (" leading", " spaces "),
]


@pytest.mark.parametrize(("context", "target"), PAIRS)
@pytest.mark.parametrize("which", ["llama", "t5", "starting_llama"])
def test_a_pair_is_cut_as_lm_eval_cuts_it(
    request: pytest.FixtureRequest, which: str, context: str, target: str
) -> None:
    base: Base = request.getfixturevalue(which)
    expected = encode_as_lm_eval(base, context, target)
    context_ids, target_ids = encode_pair(base, context, target)
    assert context_ids == expected[0]
    assert target_ids == [*expected[1], base.tokenizer.eos_token_id]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(context=st.text("the goose?\n ", min_size=1), target=st.text("yes no\n"))
def test_any_pair_of_a_decoder_is_cut_as_lm_eval_cuts_it(
    llama: Base, context: str, target: str
) -> None:
    expected = encode_as_lm_eval(llama, context, target)
    context_ids, target_ids = encode_pair(llama, context, target)
    assert context_ids == (expected[0] or [llama.tokenizer.bos_token_id])
    assert target_ids == [*expected[1], llama.tokenizer.eos_token_id]


@pytest.mark.parametrize("context", ["", "  "])
def test_an_empty_context_is_the_start_token_once(starting_llama: Base, context: str) -> None:
    tokenizer = starting_llama.tokenizer
    context_ids, target_ids = encode_pair(starting_llama, context, "the goose")
    assert context_ids == encode_context(starting_llama, context) == [tokenizer.bos_token_id]
    text = tokenizer.encode(context + "the goose", add_special_tokens=False)
    assert target_ids == [*text, tokenizer.eos_token_id]


def test_an_empty_context_without_start_token(llama: Base, t5: Base) -> None:
    assert encode_context(llama, "") == [llama.tokenizer.bos_token_id]
    llama.tokenizer.bos_token = None
    assert encode_context(llama, "") == [llama.tokenizer.eos_token_id]
    assert encode_context(t5, "") == [t5.tokenizer.eos_token_id]


def test_a_context_alone_reads_like_that_of_a_pair(base: Base) -> None:
    for context in ("Is the lake deep?", "Is the lake deep? ", "the goose  "):
        assert encode_context(base, context) == encode_pair(base, context, "yes")[0]


def test_long_contexts_lose_their_end_in_an_encoder_and_their_start_in_a_decoder(
    llama: Base, t5: Base
) -> None:
    context = "Question: which bird flies in the flock?"
    whole = encode_context(t5, context)
    assert encode_context(t5, context, 4) == [*whole[:3], t5.tokenizer.eos_token_id]
    assert encode_context(t5, context, len(whole)) == whole
    whole = encode_context(llama, context)
    assert encode_context(llama, context, 4) == whole[-4:]
    assert encode_context(llama, context, len(whole)) == whole


def test_long_targets_keep_their_start_and_the_end_of_sequence(base: Base) -> None:
    eos = base.tokenizer.eos_token_id
    _, whole = encode_pair(base, "Answer:", " the grey goose flies")
    assert whole.count(eos) == 1
    assert encode_pair(base, "Answer:", " the grey goose flies", max_target=3)[1] == [
        *whole[:2],
        eos,
    ]
    assert encode_pair(base, "Answer:", " the grey goose flies", max_target=1)[1] == [eos]
    context_ids, target_ids = encode_pair(base, "Is the lake deep?", " yes", 3, len(whole))
    assert len(context_ids) == 3
    assert target_ids == encode_pair(base, "Is the lake deep?", " yes")[1]
