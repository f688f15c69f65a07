import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import resolve_max_length

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.tokenization import (
    cut_context,
    encode_context,
    encode_contexts,
    encode_pair,
    max_length,
    spaces_moved,
)
from tests.support.tiny import llama_tokenizer


def encode_as_lm_eval(base: Base, context: str, target: str) -> tuple[list[int], list[int]]:
    """Encode a pair with a non-empty context as lm-evaluation-harness does."""

    def tok_encode(text: str, **options: Any) -> list[int]:
        return list(base.tokenizer.encode(text, **options))

    backend = "seq2seq" if base.is_encoder_decoder else "causal"
    lm = SimpleNamespace(backend=backend, tok_encode=tok_encode)
    pair: tuple[list[int], list[int]] = TemplateLM._encode_pair(lm, context, target)
    return pair


@pytest.fixture
def starting_llama(llama: Base) -> Base:
    """Return a base whose tokenizer adds <s>."""
    return dataclasses.replace(llama, tokenizer=llama_tokenizer(start=True))


PAIRS = [
    ("Is the lake deep?", " yes"),
    ("Is the lake deep? ", "yes"),
    ("Is the lake deep?  ", "no"),
    ("Answer:\n", "the goose"),
    ("Answer: \n ", "the goose"),
    (" leading", " spaces "),
    ("Is the lake deep?<|end|>", " yes"),
    ("Is the lake deep?<|end|>\n", "yes<|end|>"),
    ("Is the lake deep?</s>", "yes"),
]


@pytest.mark.parametrize(("context", "target"), PAIRS)
@pytest.mark.parametrize("which", ["llama", "t5", "starting_llama"])
def test_a_pair_is_split_as_in_lm_eval(
    request: pytest.FixtureRequest, which: str, context: str, target: str
) -> None:
    base: Base = request.getfixturevalue(which)
    expected = encode_as_lm_eval(base, context, target)
    context_ids, target_ids = encode_pair(base, context, target)
    assert context_ids == expected[0]
    assert target_ids == [*expected[1], base.tokenizer.eos_token_id]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(context=st.text("the goose?\n ", min_size=1), target=st.text("these goose\n", min_size=1))
def test_any_pair_of_a_decoder_is_split_as_in_lm_eval_or_by_the_rule(
    llama: Base, context: str, target: str
) -> None:
    tokenizer = llama.tokenizer
    before, after = encode_as_lm_eval(llama, context, target)
    bare = context.rstrip()
    moved = context[len(bare) :] + target
    if tokenizer.encode(bare + moved) != before + after or not after:
        after = tokenizer.encode(moved)
    context_ids, target_ids = encode_pair(llama, context, target)
    assert context_ids == (before or [tokenizer.bos_token_id])
    assert target_ids == [*after, tokenizer.eos_token_id]
    assert tokenizer.decode(target_ids[:-1]) == moved


def test_a_target_whose_tokens_merge_with_the_prompt_is_encoded_on_its_own(
    llama: Base, t5: Base, starting_llama: Base
) -> None:
    goose = llama.tokenizer.encode(" goose")
    assert len(goose) == 1  # so that it does not begin with " goo"
    for base in (llama, starting_llama, t5):
        own = base.tokenizer.encode("se", add_special_tokens=False)
        context_ids, target_ids = encode_pair(base, "the goo", "se")
        assert context_ids == encode_context(base, "the goo")
        assert target_ids == [*own, base.tokenizer.eos_token_id]


@pytest.mark.parametrize("context", ["", "  "])
def test_an_empty_context_becomes_a_single_start_token(starting_llama: Base, context: str) -> None:
    tokenizer = starting_llama.tokenizer
    context_ids, target_ids = encode_pair(starting_llama, context, "the goose")
    assert context_ids == encode_context(starting_llama, context) == [tokenizer.bos_token_id]
    text = tokenizer.encode(context + "the goose", add_special_tokens=False)
    assert target_ids == [*text, tokenizer.eos_token_id]


def test_a_target_may_contain_the_start_token_if_there_is_no_context(llama: Base, t5: Base) -> None:
    """Check decoders as in lm-eval; a T5-like base has no start token and keeps the text."""
    end, a = llama.tokenizer.encode("<|end|>a")
    assert encode_pair(llama, "", "<|end|>a") == ([end], [a, end])
    assert encode_pair(llama, "", "<|end|><|end|>a") == ([end], [end, a, end])
    assert encode_pair(llama, "the", "<|end|>a")[1] == [end, a, end]
    end = t5.tokenizer.eos_token_id
    written = t5.tokenizer.encode("</s>a", add_special_tokens=False)
    assert written[0] == end
    assert encode_pair(t5, "", "</s>a") == ([end], [*written, end])


def test_only_trailing_spaces_are_removed_from_a_generation_prompt(base: Base) -> None:
    ids = base.tokenizer.encode("Is the lake deep?\n")
    assert encode_context(base, "Is the lake deep?\n  ") == ids
    assert ids != base.tokenizer.encode("Is the lake deep?")
    assert [spaces_moved(text) for text in ("a\n  ", "a ", "a", " a", " ", "a \n")] == [
        *(2, 1, 0, 0, 1, 0)
    ]


def test_an_empty_context_without_a_start_token_becomes_the_end_token(
    llama: Base, t5: Base
) -> None:
    assert encode_context(llama, "") == [llama.tokenizer.bos_token_id]
    llama.tokenizer.bos_token = None
    assert encode_context(llama, "") == [llama.tokenizer.eos_token_id]
    assert encode_context(t5, "") == [t5.tokenizer.eos_token_id]


def test_a_context_alone_is_encoded_like_that_of_a_pair(base: Base) -> None:
    for context in ("Is the lake deep?", "Is the lake deep? ", "the goose  "):
        assert encode_context(base, context) == encode_pair(base, context, "yes")[0]


class _Listening:
    """A tokenizer that notes the texts it reads."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.texts: list[str] = []

    def __call__(self, texts: str | list[str], **options: Any) -> Any:
        self.texts += [texts] if isinstance(texts, str) else texts
        return self._tokenizer(texts, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_a_context_is_tokenized_once_for_all_its_choices(base: Base) -> None:
    tokenizer: Any = _Listening(base.tokenizer)
    context, choices = "Is the lake deep? ", (" yes", " no", "the swan")
    question = Question.encode(dataclasses.replace(base, tokenizer=tokenizer), context, choices)
    assert tokenizer.texts.count("Is the lake deep?") == 1
    pairs = [encode_pair(base, context, choice) for choice in choices]
    assert question.choices == [target for _, target in pairs]
    assert {tuple(ids) for ids, _ in pairs} == {tuple(question.context)}


def test_many_questions_are_encoded_as_one_by_one(base: Base) -> None:
    asked = [
        ("Is the lake deep?", (" yes", " no"), Query("a")),
        ("two and three is", (" five",), Query("b")),
        ("Is the lake deep? ", ("yes", "no", "the goose"), Query("c")),
        ("", ("the goose",), Query("d")),
    ]
    assert Question.encode_all(base, asked) == [
        Question.encode(base, context, choices, query=query) for context, choices, query in asked
    ]
    contexts = [context for context, _, _ in asked]
    assert encode_contexts(base, contexts) == [encode_context(base, text) for text in contexts]


def test_long_contexts_are_truncated_right_in_encoders_and_left_in_decoders(
    llama: Base, t5: Base
) -> None:
    context = "Question: which bird flies in the flock?"
    whole = encode_context(t5, context)
    assert encode_context(t5, context, 4) == [*whole[:3], t5.tokenizer.eos_token_id]
    assert encode_context(t5, context, len(whole)) == whole
    whole = encode_context(llama, context)
    assert encode_context(llama, context, 4) == whole[-4:]
    assert encode_context(llama, context, len(whole)) == whole


def test_a_truncated_context_keeps_its_start_token(starting_llama: Base) -> None:
    context = "Question: which bird flies in the flock?"
    for text in (context, f"<s>{context}"):
        whole = encode_context(starting_llama, text)
        start = starting_llama.tokenizer.bos_token_id
        assert whole.count(start) == 1
        assert encode_context(starting_llama, text, 4) == [start, *whole[-3:]]
        assert encode_pair(starting_llama, text, " the goose", 4)[0] == [start, *whole[-3:]]
        assert cut_context(starting_llama, whole, 4) == [start, *whole[-3:]]
        assert cut_context(starting_llama, whole, 1) == [start]


def test_a_start_token_that_comes_from_the_text_is_kept_too(llama: Base) -> None:
    whole = encode_context(llama, "<|end|>the goose flies")
    start = llama.tokenizer.bos_token_id
    assert whole[0] == start
    assert cut_context(llama, whole, 3) == [start, *whole[-2:]]
    later = encode_context(llama, "the<|end|> goose flies")
    assert cut_context(llama, later, 3) == later[-3:]


def test_a_training_example_is_truncated_to_the_base(llama: Base, t5: Base) -> None:
    """Check that context and target may be one token longer, because the last one is not read."""
    for base in (llama, t5):
        context, target = "the grey goose " * 40, " the swan swims " * 5
        whole = encode_pair(base, context, target)
        assert encode_pair(base, context, target, 10**6) == whole
        length = len(whole[1]) + 5
        base.model.config.n_positions = length
        cut = encode_pair(base, context, target, 10**6)
        assert cut[1] == whole[1]
        if base.is_encoder_decoder:
            assert cut[0] == [*whole[0][: length - 1], whole[0][-1]]
        else:
            assert cut[0] == whole[0][-6:]
        base.model.config.n_positions = 7
        cut = encode_pair(base, context, target, 10**6)
        assert cut[1] == [*whole[1][:6], whole[1][-1]]
        assert len(cut[0]) == (7 if base.is_encoder_decoder else 1)
        assert encode_pair(base, context, target, 10**6, 10**6) == cut
        assert encode_pair(base, context, target) == whole  # scoring truncates independently


@pytest.mark.parametrize(
    ("config", "tokenizer", "length"),
    [
        ({"n_positions": 7, "max_position_embeddings": 8, "n_ctx": 9}, 10, 7),
        ({"max_position_embeddings": 8, "n_ctx": 9}, 10, 8),
        ({"n_ctx": 9}, 10, 9),
        ({}, 10, 10),
        ({}, int(1e30), 2048),
        ({"text_config": SimpleNamespace(n_ctx=5), "n_positions": 7}, 10, 5),
    ],
)
def test_the_longest_row_matches_lm_eval(
    llama: Base, config: dict[str, Any], tokenizer: int, length: int
) -> None:
    llama.tokenizer.model_max_length = tokenizer
    model: Any = SimpleNamespace(config=SimpleNamespace(**config))
    base = dataclasses.replace(llama, model=model)
    assert max_length(base) == length
    assert resolve_max_length(model.config, llama.tokenizer) == length


def test_long_targets_keep_their_start_and_the_end_of_sequence(base: Base) -> None:
    eos = base.tokenizer.eos_token_id
    _, whole = encode_pair(base, "Answer:", " the grey goose flies")
    assert whole.count(eos) == 1
    assert encode_pair(base, "Answer:", " the grey goose flies", max_target=3)[1] == [
        *whole[:2],
        eos,
    ]
    with pytest.raises(PhatgooseError, match="max_target_tokens=1: a target needs a token besides"):
        encode_pair(base, "Answer:", " the grey goose flies", max_target=1)
    context_ids, target_ids = encode_pair(base, "Is the lake deep?", " yes", 3, len(whole))
    assert len(context_ids) == 3
    assert target_ids == encode_pair(base, "Is the lake deep?", " yes")[1]
