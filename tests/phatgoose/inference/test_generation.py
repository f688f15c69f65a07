"""Check where a generated text ends, and that decoding is always greedy."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from lm_eval.models.utils import postprocess_generated_text

from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.inference import generation, stopping
from phatgoose.inference.generation import answer, fits, generate
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.routed_linear import RoutingLog
from phatgoose.inference.stopping import Ending
from phatgoose.pool import Pool
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.tokenization import encode_context
from tests.support.pools import FakeEncoder, make_pool
from tests.support.scripted import writing
from tests.support.tiny import make_experts

PROMPTS = ["the", "Is the lake deep?", "Question: which bird flies in the flock?\nAnswer:"]


def ids_of(base: Base, text: str) -> list[int]:
    return list(base.tokenizer.encode(text, add_special_tokens=False))


def write(base: Base, text: str, spaces: int = 0, *, stops: Sequence[str] = ()) -> str:
    """Return the output of `generate` if the base writes this text."""
    ids = ids_of(base, text)
    with writing(base, ids):
        (found,) = generate(
            base, [ids_of(base, "the")], len(ids), stops=stops, spaces=[spaces] if spaces else ()
        )
    return found


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("the goose flies", ["\n"], "the goose flies"),
        ("the goose\nflies", ["\n"], "the goose"),
        ("the goose flies", ["oos"], "the g"),  # inside a token
        ("the goose flies", ["e g"], "th"),  # across two tokens
        ("the goose flies", ["the goose flies"], ""),
        ("the goose", ["", "s"], "the goo"),  # an empty one ends nothing
        ("the goose", [""], "the goose"),
        ("xabcy", ["bc", "ab"], "x"),  # the first that is complete ends the generation
        ("xthe goose", [" goose", "the"], "x"),
        ("été ☃ snow", ["☃"], "été "),  # several tokens for one character
        ("the<|end|>goose", [], "the"),
        ("the<s>goose", ["<s>"], "the"),  # special tokens are not part of the text
        ("the<s>goose", ["goose"], "the"),
        ("the lake<s>\nis", ["lake<s>"], "the "),
        ("the lake<s>\nis<s>", ["\nis<s>"], "the lake"),
        ("the goose<s>\nis", ["e<s>\n"], "the goos"),  # begins inside a token
        ("the goose", ["<s>"], "the goose"),
    ],
)
def test_a_text_ends_before_its_stop_string(
    llama: Base, text: str, stops: list[str], expected: str
) -> None:
    assert write(llama, text, stops=stops) == expected


def test_an_end_token_spelled_as_text_ends_generation_as_in_lm_eval(llama: Base) -> None:
    letters = [i for letter in "the<|end|>goose" for i in ids_of(llama, letter)]
    with writing(llama, letters):
        assert generate(llama, [ids_of(llama, "the")], len(letters)) == ["the"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text("ab é\n", min_size=1, max_size=12),
    stops=st.lists(st.text("ab é\n", max_size=3), max_size=3),
)
def test_any_text_ends_where_lm_eval_ends(llama: Base, text: str, stops: list[str]) -> None:
    # A whole text gives the result of its shortest prefix that contains a stop string.
    ids = ids_of(llama, text)
    ends = [
        n
        for n in range(1, len(ids) + 1)
        if any(stop and stop in llama.tokenizer.decode(ids[:n]) for stop in stops)
    ]
    written = llama.tokenizer.decode(ids[: ends[0]] if ends else ids)
    assert write(llama, text, stops=stops) == postprocess_generated_text(written, stops, None)


@pytest.mark.parametrize(
    ("text", "spaces", "stops", "expected"),
    [
        (" goose", 0, [], " goose"),
        (" goose", 1, [], "goose"),
        ("goose", 1, [], "goose"),  # the model need not write it
        ("  goose", 1, [], " goose"),
        ("  goose", 2, [], "goose"),
        (" goose", 2, [], "goose"),
        (" goose flies", 1, [" "], "goose"),  # the moved space does not stop generation
        ("  goose flies", 2, [" "], "goose"),
        ("  goose flies", 1, [" "], ""),
        (" goose flies", 0, [" "], ""),
        (" goose", 1, [" goose"], "goose"),
        ("\n goose", 1, ["\n"], ""),
        (" <s>goose <s>flies", 1, [" <s>"], "goose"),
    ],
)
def test_trailing_prompt_spaces_are_neither_generated_text_nor_stop_strings(
    llama: Base, text: str, spaces: int, stops: list[str], expected: str
) -> None:
    assert write(llama, text, spaces, stops=stops) == expected


def test_each_row_ends_independently(llama: Base) -> None:
    """Check that the tokens of other rows change nothing, and generation ends with the last row."""
    rows = [ids_of(llama, text) for text in ("a\nthe goose flies", "bcd<|end|>the lake", "efgh\n")]
    contexts = [ids_of(llama, prompt) for prompt in PROMPTS]
    with writing(llama, *rows) as steps:
        assert generate(llama, contexts, 30, stops=["\n"]) == ["a", "bcd", "efgh"]
    assert len(steps) == len(rows[2])


def test_rows_that_have_ended_leave_the_batch(llama: Base) -> None:
    rows = [[*ids_of(llama, "abcd"[:n]), llama.tokenizer.eos_token_id] for n in (1, 1, 1, 4)]
    long = ids_of(llama, "the goose flies over the lake and the swan swims, and so on and so on")
    contexts = [ids_of(llama, "the")] * 5
    with writing(llama, *rows, long) as steps:
        texts = generate(llama, contexts, len(long))
    assert texts == ["a", "a", "a", "abcd", llama.tokenizer.decode(long)]
    assert len(long) - 5 >= 8  # the fourth row can save half a batch of two so often
    assert steps[:2] == [5, 5]
    assert steps[2:5] == [2, 2, 2]
    assert steps[5:] == [1] * (len(long) - 5)


@pytest.mark.parametrize("steps", [0, 0.01, 4])  # 0: a call of `generate` for each token
@pytest.mark.parametrize("router", ["base", "phatgoose", "retrieval", "glider"])
def test_leaving_rows_change_nothing(
    base: Base, router: str, steps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check texts, scores and what is counted, where stop strings end rows at different steps."""
    monkeypatch.setattr("phatgoose.sentence_encoder.load_encoder", lambda _: FakeEncoder())
    monkeypatch.setattr("phatgoose.routers.stacked_profiles._embedded", {})
    prompts = [*PROMPTS, "two and three is", "The grey goose flies over the lake, and"]
    queries = [Query(prompt, task=f"task {n}") for n, prompt in enumerate(prompts)]
    asked = [(query.text, (" yes, the swan",), query) for query in queries]
    questions = Question.encode_all(base, asked)
    routed = RoutedModel(base, make_pool(base), router)
    monkeypatch.setattr(stopping, "_STEPS", 10**9)
    whole = routed.generate(queries, 12)
    stops = [text[3 * n + 1] for n, text in enumerate(whole[:2])]  # at different places

    def everything() -> tuple[Any, ...]:
        with routed.recording(RoutingLog()) as of_texts:
            texts = routed.generate(queries, 12, stops=stops)
        with routed.recording(RoutingLog()) as of_answers:
            answers, scores = routed.answer(questions, 12, stops=stops)
        return texts, answers, scores, of_texts, of_answers

    expected = everything()
    monkeypatch.setattr(stopping, "_STEPS", steps)
    found = everything()
    assert len({len(text) for text in expected[0]}) > 1
    assert found[:2] == expected[:2]
    for one, other in zip(found[2], expected[2], strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=1e-4)
        assert one.eos_loglikelihood == pytest.approx(other.eos_loglikelihood, abs=1e-4)
    for log, other in zip(found[3:], expected[3:], strict=True):
        assert log.tokens == other.tokens
        for name, weights_E in other.weights.items():
            torch.testing.assert_close(log.weights[name], weights_E, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("router", ["base", "phatgoose", "retrieval", "glider"])
def test_reading_a_common_beginning_once_changes_nothing(
    base: Base, router: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check texts, scores and counts; routers that look at queries share no tokens."""
    monkeypatch.setattr("phatgoose.sentence_encoder.load_encoder", lambda _: FakeEncoder())
    monkeypatch.setattr("phatgoose.routers.stacked_profiles._embedded", {})
    queries = [
        Query(f"Is the lake dry? no. Is the {end}", task=f"task {n}")
        for n, end in enumerate(["lake deep?", "goose", "swan grey? five and", "goose"])
    ]
    asked = [(query.text, (" yes, the swan",), query) for query in queries]
    questions = Question.encode_all(base, asked)
    routed = RoutedModel(base, make_pool(base), router)
    sizes: list[int] = []
    handle = base.model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: sizes.append(args[0].numel())
    )

    def everything() -> tuple[Any, ...]:
        with routed.recording(RoutingLog()) as of_texts:
            texts = routed.generate(queries, 9)
        with routed.recording(RoutingLog()) as of_answers:
            answers, scores = routed.answer(questions, 9)
        return texts, answers, scores, of_texts, of_answers

    expected, read_alone = everything(), sum(sizes)
    monkeypatch.setattr(generation, "_WORTH", 1)
    sizes.clear()
    found, read_together = everything(), sum(sizes)
    handle.remove()
    columns = zip(*(question.context for question in questions), strict=False)
    common = len(list(takewhile(lambda column: len({*column}) == 1, columns)))
    shares = not base.is_encoder_decoder and router in ("base", "phatgoose")
    assert common > 5
    assert read_alone - read_together == (2 * 3 * common if shares else 0)
    assert found[:2] == expected[:2]
    for one, other in zip(found[2], expected[2], strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, abs=1e-4)
    for log, other in zip(found[3:], expected[3:], strict=True):
        assert log.tokens == other.tokens
        for name, weights_E in other.weights.items():
            torch.testing.assert_close(log.weights[name], weights_E, rtol=1e-3, atol=1e-3)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    stops=st.lists(st.text("abe é☃\n>", min_size=1, max_size=3), min_size=1, max_size=3),
    spaces=st.integers(0, 2),
)
def test_a_row_ends_at_the_first_token_whose_text_holds_a_stop_string(
    base: Base, data: st.DataObject, stops: list[str], spaces: int
) -> None:
    """Compare with the complete text after each token; tokens may be parts of characters."""
    pieces = [ids_of(base, text) for text in (*"abeé☃>", " ", "\n", "<s>", " goose", "ab")]
    random = st.sampled_from(range(len(base.tokenizer))).map(lambda token: [token])
    piece = st.one_of(st.sampled_from(pieces), random)
    # Stop strings themselves as well, token by token of each character.
    whole = st.sampled_from(stops).map(lambda stop: [t for c in stop for t in ids_of(base, c)])
    parts = data.draw(st.lists(st.one_of(piece, whole), min_size=1, max_size=6))
    ids = [token for part in parts for token in part]
    assume(ids)
    ending = Ending(base, stops, [spaces])

    def holds(count: int) -> bool:
        text = str(base.tokenizer.decode(ids[:count]))
        text = text[min(spaces, len(text) - len(text.lstrip(" "))) :]
        return any(stop and stop in text for stop in stops)

    for count in range(1, len(ids) + 1):
        assert ending.is_reached(0, ids[:count]) == holds(count)
        if holds(count):
            break


def test_tokens_that_cannot_complete_a_stop_string_are_not_decoded_again(
    llama: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []
    decode = type(llama.tokenizer).decode

    def count(self: Any, ids: list[int], **options: Any) -> Any:
        decoded.append(len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(type(llama.tokenizer), "decode", count)
    text = ids_of(llama, "the goose flies over the lake\n")
    ending = Ending(llama, ["\n"], [0])
    reached = [ending.is_reached(0, text[:n]) for n in range(1, len(text) + 1)]
    assert reached == [False] * (len(text) - 1) + [True]
    assert [size for size in decoded if size > 3] == [len(text)]


def test_padding_after_the_end_of_a_row_is_not_text(
    llama: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that this holds even if it is not a special token, which decoding would skip."""
    (z,) = ids_of(llama, "z")
    monkeypatch.setattr(type(llama.tokenizer), "pad_token_id", z, raising=False)
    rows = [ids_of(llama, text) for text in ("a\n", "the goose flies<|end|>", "b<|end|>")]
    contexts = [ids_of(llama, prompt) for prompt in PROMPTS]
    with writing(llama, *rows):
        texts = generate(llama, contexts, 30, stops=["\n", "z"])
    assert texts == ["a", "the goose flies", "b"]
    with writing(llama, *rows):
        assert generate(llama, contexts, 30)[2] == "b"


def test_a_routed_model_does_not_repeat_the_trailing_space_of_a_prompt(base: Base) -> None:
    routed = RoutedModel(base, Pool.from_experts(make_experts(base, 2)))
    whole = routed.generate(PROMPTS, 8)
    for spaces in (1, 2):
        prompts = [prompt + " " * spaces for prompt in PROMPTS]
        expected = [text[min(spaces, len(text) - len(text.lstrip(" "))) :] for text in whole]
        assert routed.generate(prompts, 8) == expected
        questions = [Question.encode(base, prompt, [" yes"]) for prompt in PROMPTS]
        assert routed.answer(questions, 8, spaces=[spaces] * len(PROMPTS))[0] == expected


WISHES: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 3.0, "top_k": 5, "top_p": 0.5},
    {"num_beams": 4, "length_penalty": 2.0},
    {"repetition_penalty": 9.0},
    {"no_repeat_ngram_size": 1},
    {"encoder_repetition_penalty": 9.0},
    {"min_new_tokens": 30, "min_length": 200},
    {"forced_eos_token_id": 3, "forced_bos_token_id": 4},
    {"exponential_decay_length_penalty": (0, 9.0)},
    {"max_length": 3, "max_new_tokens": 2},
    {"max_time": 1e-9},
    {"guidance_scale": 9.0},
    {"stop_strings": ["e", "a", "o"]},
    {"num_return_sequences": 1, "output_scores": True, "output_logits": True},
    {"use_cache": False},
    {"decoder_start_token_id": 5},
]


@pytest.mark.parametrize("wish", WISHES, ids=lambda wish: next(iter(wish)))
def test_generation_is_greedy_regardless_of_the_configuration(
    base: Base, wish: dict[str, Any]
) -> None:
    contexts = [encode_context(base, prompt) for prompt in PROMPTS]
    expected = generate(base, contexts, 8)
    own = base.model.generation_config
    first = ids_of(base, expected[0])[0]
    for key, value in {**wish, "suppress_tokens": [first], "bad_words_ids": [[first]]}.items():
        setattr(own, key, value)
    assert generate(base, contexts, 8) == expected
    assert base.model.generation_config is own
    with pytest.raises(PhatgooseError):
        generate(base, contexts, 0)
    assert base.model.generation_config is own


def test_a_question_that_is_too_long_is_not_answered_in_one_pass(base: Base) -> None:
    question = Question.encode(base, "the goose flies", [" yes"])
    longest = len(question.context) + (0 if base.is_encoder_decoder else 8)
    base.model.config.n_positions = longest
    assert fits(base, question, 8)
    answer(base, [question], 8)
    base.model.config.n_positions = longest - 1
    assert not fits(base, question, 8)
    with pytest.raises(PhatgooseError, match="too long for the base"):
        answer(base, [question], 8)


def test_an_answer_longer_than_the_generation_limit_does_not_fit(llama: Base) -> None:
    question = Question.encode(llama, "the goose flies", [" over the lake"])
    answer_tokens = len(question.choices[0]) - 1
    llama.model.config.max_position_embeddings = len(question.context) + answer_tokens
    assert fits(llama, question, 1)
    llama.model.config.max_position_embeddings -= 1
    assert answer_tokens > 2
    assert not fits(llama, question, 1)
