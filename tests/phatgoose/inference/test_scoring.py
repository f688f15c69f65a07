from dataclasses import replace

import pytest
import torch
from torch import nn

from phatgoose.base import Base, load_base
from phatgoose.inference.generation import generate
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.routed_linear import RoutingLog
from phatgoose.inference.scoring import Score, logits_at, score
from phatgoose.pool import Pool
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.routers import make_router
from phatgoose.tokenization import encode_context
from tests.support.plain import plain_generate, plain_score
from tests.support.tiny import make_experts

ROUTERS = ["base", "phatgoose", "random", "merged", "single:e1"]
QUESTIONS = [
    ("Question: which bird flies in the flock?\nAnswer:", [" the goose", " swan", ""]),
    ("Is the lake deep?", [" yes", " no"]),
    ("two and three is", [" five", " nine", " four and four and four", " two", " three"]),
    ("", ["the"]),
    ("The grey goose flies over the lake, and the", [""]),
]
CONTEXTS = ["the", "Is the lake deep?", "Question: which bird flies in the flock?\nAnswer:", ""]


def encode(base: Base) -> list[Question]:
    """Encode the questions; an empty choice consists of the end token alone."""
    end = [base.tokenizer.eos_token_id]
    questions = []
    for context, choices in QUESTIONS:
        question = Question.encode(base, context, [choice or "x" for choice in choices])
        ids = [i if c else end for i, c in zip(question.choices, choices, strict=True)]
        questions.append(replace(question, choices=ids))
    return questions


def route(base: Base, router: str) -> RoutedModel:
    routed = RoutedModel(base, Pool.from_experts(make_experts(base, 4)))
    routed.set_router(make_router(router))
    return routed


def assert_same(actual: Score, expected: Score) -> None:
    assert actual.loglikelihood == pytest.approx(expected.loglikelihood, abs=1e-4)
    assert actual.eos_loglikelihood == pytest.approx(expected.eos_loglikelihood, abs=1e-4)
    assert actual.tokens == expected.tokens
    assert actual.is_greedy == expected.is_greedy
    assert actual.ends_greedy == expected.ends_greedy


@pytest.mark.parametrize("router", ROUTERS)
def test_a_batch_scores_like_single_sequences(base: Base, router: str) -> None:
    route(base, router)
    questions = encode(base)
    for question, scores in zip(questions, score(base, questions), strict=True):
        assert len(scores) == len(question.choices)
        for choice, actual in zip(question.choices, scores, strict=True):
            assert_same(actual, plain_score(base, question.context, choice))


@pytest.mark.parametrize("router", ["base", "phatgoose"])
def test_a_question_scores_the_same_alone_and_in_a_batch(base: Base, router: str) -> None:
    route(base, router)
    questions = encode(base)
    for question, scores in zip(questions, score(base, questions), strict=True):
        for together, alone in zip(scores, score(base, [question])[0], strict=True):
            assert_same(together, alone)
        for index, choice in enumerate(question.choices):
            only = score(base, [Question(question.context, [choice])])[0][0]
            assert_same(only, scores[index])


def test_experts_change_the_scores_of_the_base(base: Base) -> None:
    questions = encode(base)
    bare = [s.mean for scores in score(base, questions) for s in scores]
    for router in ROUTERS[1:]:
        routed = route(base, router)
        changed = [s.mean for scores in score(base, questions) for s in scores]
        assert all(abs(a - b) > 1e-3 for a, b in zip(bare, changed, strict=True))
        routed.detach()


def test_scores_of_a_bfloat16_base_are_close(base: Base) -> None:
    half = load_base(base.name, dtype="bfloat16")
    questions = encode(base)
    for full, rounded in zip(score(base, questions), score(half, questions), strict=True):
        for a, b in zip(full, rounded, strict=True):
            assert b.mean == pytest.approx(a.mean, abs=0.15)


def test_the_mean_counts_the_end_of_sequence() -> None:
    assert Score(-3.0, -1.0, 3, False, False).mean == -1.0
    assert Score(0.0, -2.0, 0, True, False).mean == -2.0


def test_the_greedy_flag_matches_greedy_decoding(base: Base) -> None:
    eos = base.tokenizer.eos_token_id
    context = encode_context(base, CONTEXTS[2])
    written = [token for token in plain_generate(base, context, 4) if token != eos]
    other = (written[-1] + 1) % base.model.config.vocab_size
    choices = [[*written, eos], [*written[:-1], other, eos]]
    right, wrong = score(base, [Question(context, choices)])[0]
    assert right.is_greedy
    assert not wrong.is_greedy


@pytest.fixture
def stopping(base: Base) -> Base:
    """Return a base that ends a sequence with the third token generated after `CONTEXTS[1]`."""
    third = plain_generate(base, encode_context(base, CONTEXTS[1]), 3)[2]
    with torch.no_grad():
        weight = base.model.get_output_embeddings().weight
        weight[base.tokenizer.eos_token_id] = weight[third] * 1.05
    return base


@pytest.mark.parametrize("router", ["base", "phatgoose", "merged"])
def test_generating_in_a_batch_matches_greedy_decoding_of_each_prompt(
    stopping: Base, router: str
) -> None:
    route(stopping, router)
    contexts = [encode_context(stopping, context) for context in CONTEXTS]
    expected = [plain_generate(stopping, context, 9) for context in contexts]
    texts = stopping.tokenizer.batch_decode(expected, skip_special_tokens=True)
    assert generate(stopping, contexts, 9) == texts
    assert [generate(stopping, [context], 9)[0] for context in contexts] == texts


def test_generating_stops_at_the_end_of_sequence_and_leaves_it_out(stopping: Base) -> None:
    eos = stopping.tokenizer.eos_token_id
    contexts = [encode_context(stopping, context) for context in CONTEXTS]
    expected = [plain_generate(stopping, context, 9) for context in contexts]
    assert expected[1][-1] == eos
    assert len(expected[1]) <= 3
    assert max(len(written) for written in expected) == 9
    assert not any(stopping.tokenizer.eos_token in text for text in generate(stopping, contexts, 9))


def test_generating_is_greedy_regardless_of_the_generation_config(base: Base) -> None:
    contexts = [encode_context(base, context) for context in CONTEXTS]
    expected = generate(base, contexts, 8)
    wishes = base.model.generation_config
    wishes.do_sample, wishes.temperature, wishes.top_k = True, 2.0, 5
    wishes.repetition_penalty = 8.0
    wishes.num_beams = 3
    assert generate(base, contexts, 8) == expected


def test_generating_stops_at_the_end_of_sequence_token_of_the_experts(stopping: Base) -> None:
    contexts = [encode_context(stopping, context) for context in CONTEXTS]
    expected = generate(stopping, contexts, 9)
    stopping.model.generation_config.eos_token_id = None
    assert generate(stopping, contexts, 9) == expected


def test_logits_are_computed_only_where_a_target_is_predicted(base: Base) -> None:
    rows: list[int] = []
    head = base.model.get_output_embeddings()
    questions = encode(base)

    def count(_module: nn.Module, args: tuple[torch.Tensor, ...], _logits: torch.Tensor) -> None:
        rows.append(args[0].shape[:-1].numel())

    handle = head.register_forward_hook(count)
    score(base, questions)
    handle.remove()
    targets = sum(len(choice) for question in questions for choice in question.choices)
    shared = sum(len(question.choices) - 1 for question in questions)
    assert sum(rows) == targets - shared  # the first token of all choices is predicted once


def test_a_context_is_encoded_once(t5: Base) -> None:
    calls: list[int] = []
    handle = t5.model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    score(t5, encode(t5))
    handle.remove()
    assert calls == [1]


def test_logits_at_removes_its_hook_after_an_error(base: Base) -> None:
    place = torch.tensor([0])
    with pytest.raises(RuntimeError, match="on purpose"), logits_at(base, place, place):
        raise RuntimeError("on purpose")
    assert not base.model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("stop", ["o", "is", "e l"])
def test_a_text_ends_before_its_first_stop_string(base: Base, stop: str) -> None:
    contexts = [encode_context(base, context) for context in CONTEXTS]
    whole = generate(base, contexts, 9)
    assert generate(base, contexts, 9, stops=[stop]) == [text.split(stop)[0] for text in whole]


def test_generation_ends_once_every_row_has_its_stop_string(base: Base) -> None:
    context = encode_context(base, CONTEXTS[0])
    text = generate(base, [context], 30)[0]
    passes = []
    handle = base.model.get_output_embeddings().register_forward_hook(lambda *_: passes.append(1))
    generate(base, [context], 30, stops=[text[:1]])
    handle.remove()
    assert 0 < len(passes) < 5


@pytest.mark.parametrize("router", [None, "phatgoose", "logo"])
@pytest.mark.parametrize("limit", [1, 7])
def test_answering_equals_generating_and_scoring(
    base: Base, router: str | None, limit: int
) -> None:
    """Check prompts and answers of any length, including an empty one; counts agree too."""
    texts = ["Is the lake deep?", "the goose", "The grey goose flies over the lake, and"]
    answers = [" yes", "", " the swan swims. five and four"]
    routed = RoutedModel(base, Pool.from_experts(make_experts(base, 4)), router or "base")
    questions = [
        Question.encode(base, text, [answer or "x"], query=Query(text))
        for text, answer in zip(texts, answers, strict=True)
    ]
    questions[1] = replace(questions[1], choices=[[base.tokenizer.eos_token_id]])
    assert [q.context for q in questions] == [encode_context(base, text) for text in texts]
    with routed.recording(RoutingLog()) as log:
        written, scores = routed.answer(questions, limit, stops=["e f"])
    assert written == routed.generate(texts, limit, stops=["e f"])
    with routed.recording(RoutingLog()) as expected:
        separate = [score for (score,) in routed.score(questions)]
    for one, other in zip(scores, separate, strict=True):
        assert one.loglikelihood == pytest.approx(other.loglikelihood, rel=1e-4, abs=1e-4)
        assert one.eos_loglikelihood == pytest.approx(other.eos_loglikelihood, rel=1e-4)
        assert (one.tokens, one.is_greedy) == (other.tokens, other.is_greedy)
        assert one.ends_greedy == other.ends_greedy
    assert log.tokens == expected.tokens
    for name, weights_E in expected.weights.items():
        torch.testing.assert_close(log.weights[name], weights_E, rtol=1e-3, atol=1e-3)
