"""Check the rows that hold contexts and choices: shared, with windows, and separate."""

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from phatgoose.architecture import ARCHITECTURES, Architecture
from phatgoose.base import Base
from phatgoose.inference.generation import answer
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.routed_linear import RoutingLog
from phatgoose.inference.scoring import score
from phatgoose.pool import Pool
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.rows import shared_rows
from tests.support.architectures import (
    APART,
    DECODERS,
    QUESTIONS,
    WINDOWED,
    Folders,
    assert_answers_plainly,
    assert_plain,
    assert_same,
)
from tests.support.plain import plain_logits, plain_score
from tests.support.pools import FakeEncoder, make_pool
from tests.support.tiny import (
    make_experts,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> "Folders":
    return Folders(tmp_path_factory.mktemp("architectures"))


@pytest.mark.parametrize("name", DECODERS)
def test_choices_score_the_same_together_and_alone(folders: Folders, name: str) -> None:
    base = folders.load(*DECODERS[name])
    assert base.shares_context == (name not in APART)
    assert_plain(base, score(base, QUESTIONS))
    assert_answers_plainly(base, 4)


@pytest.mark.parametrize("name", DECODERS)
def test_generation_continues_in_several_calls(
    folders: Folders, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check bases whose rows may leave a batch, with a call for each token, and the others."""
    monkeypatch.setattr("phatgoose.inference.stopping._STEPS", 0)
    assert_answers_plainly(folders.load(*DECODERS[name]), 5)


@pytest.mark.parametrize(
    ("name", "window"),
    [*((name, None) for name in DECODERS), *((name, w) for name in WINDOWED for w in (6, 50))],
)
def test_what_prompts_begin_with_may_be_read_once(
    folders: Folders, name: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check prompts of several lengths, one of which the others begin with."""
    monkeypatch.setattr("phatgoose.inference.generation._WORTH", 1)
    kind, changes = DECODERS[name] if window is None else WINDOWED[name]
    base = folders.load(kind, changes if window is None else {**changes, "sliding_window": window})
    shots = [5, 9, 11, 20]
    questions = [
        Question([*shots, *rest], [[30, 7, 0]]) for rest in ([], [33], [8, 64, 12], [33, 40])
    ]
    assert_answers_plainly(base, 5, questions)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("window", [2, 3, 6])
def test_a_sliding_window_is_masked(
    folders: Folders, name: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check windows shorter than prompts, choices and outputs, with and without experts."""
    kind, changes = WINDOWED[name]
    base = folders.load(kind, {**changes, "sliding_window": window})
    assert base.model.config.sliding_window == window
    assert base.shares_context
    wide = folders.load(kind, {**changes, "sliding_window": 50})
    narrow_says, wide_says = (
        plain_logits(b, QUESTIONS[0].context, QUESTIONS[0].choices[0]) for b in (base, wide)
    )
    assert not torch.allclose(narrow_says, wide_says, atol=1e-2)  # the window matters
    assert_plain(base, score(base, QUESTIONS))
    assert_answers_plainly(base, 7)
    with monkeypatch.context() as patch:
        patch.setattr("phatgoose.inference.stopping._STEPS", 0)  # a call for each token
        assert_answers_plainly(base, 7)
    RoutedModel(base, Pool.from_experts(make_experts(base)), "phatgoose")
    assert_plain(base, score(base, QUESTIONS))
    assert_answers_plainly(base, 7)


def test_a_window_that_the_model_does_not_use_is_ignored(folders: Folders) -> None:
    base = folders.load("llama", {"sliding_window": 3})
    assert base.shares_context
    assert_plain(base, score(base, QUESTIONS))
    assert_answers_plainly(base, 5)


@pytest.mark.parametrize("window", [10, 11, 12, 13])
def test_a_window_of_the_length_of_a_row_is_exact(folders: Folders, window: int) -> None:
    """The last position that is read is 11."""
    base = folders.load("mistral", {"sliding_window": window})
    assert_plain(base, score(base, QUESTIONS))


@pytest.mark.parametrize("name", ["mistral", "gemma2"])
@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("window", [12, 13])
def test_answers_at_the_edge_of_a_window_are_exact(
    folders: Folders, name: str, window: int, limit: int
) -> None:
    """Check prompts of at most 8 tokens, targets of 3, and generated tokens."""
    kind, changes = WINDOWED[name]
    base = folders.load(kind, {**changes, "sliding_window": window})
    questions = [Question(q.context, [[30, 7, 0]]) for q in QUESTIONS]
    assert_answers_plainly(base, limit, questions)


def test_a_prompt_within_the_window_is_read_once(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(window: int) -> int:
        base = folders.load("mistral", {"sliding_window": window})
        counted = [0]

        def count(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            counted[0] += args[0].shape[1]

        base.model.get_input_embeddings().register_forward_pre_hook(count)
        answer(base, QUESTIONS, 3)
        return counted[0]

    longest = max(len(question.context) for question in QUESTIONS)
    assert read(100) < read(6)
    assert read(100) <= longest + 3 + max(len(q.choices[0]) for q in QUESTIONS)


@pytest.mark.parametrize("limit", [1, 5])
@pytest.mark.parametrize("kind", ["lfm2", "mpt", "llama", "mistral"])
def test_separate_rows_are_counted_like_shared_rows(
    folders: Folders, kind: str, limit: int
) -> None:
    """Check that contexts and choices count once; `answer` does not count generated tokens."""
    base = folders.load(kind, {"sliding_window": 5} if kind == "mistral" else {})
    routed = RoutedModel(base, Pool.from_experts(make_experts(base, 4)), "phatgoose")
    with routed.recording(RoutingLog()) as log:
        scores = routed.score(QUESTIONS)
    tokens = sum(len(q.context) + sum(len(choice) - 1 for choice in q.choices) for q in QUESTIONS)
    assert set(log.tokens) == set(base.linears)
    assert set(log.tokens.values()) == {tokens}
    assert all(w.sum() == pytest.approx(tokens, rel=1e-4) for w in log.weights.values())
    with routed.recording(RoutingLog()) as log:
        _, first = routed.answer(QUESTIONS, limit)
    assert set(log.tokens.values()) == {
        sum(len(q.context) + len(q.choices[0]) - 1 for q in QUESTIONS)
    }
    for one, (other, *_) in zip(first, scores, strict=True):
        assert_same(one, other)


def test_separate_rows_give_the_results_of_shared_rows(
    llama: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check routers that decide by token, by query, and by a bias for each query."""
    monkeypatch.setattr("phatgoose.sentence_encoder.load_encoder", lambda _: FakeEncoder())
    monkeypatch.setattr("phatgoose.routers.stacked_profiles._embedded", {})
    pool = make_pool(llama)
    apart = dataclasses.replace(llama, shares_context=False)
    questions = [
        dataclasses.replace(question, query=Query(f"query {index}", task=f"task {index}"))
        for index, question in enumerate(QUESTIONS)
    ]
    for router in ("base", "phatgoose", "retrieval", "glider", "merged"):
        found = []
        for base in (llama, apart):
            routed = RoutedModel(base, pool, router)
            with routed.recording(RoutingLog()) as log:
                found.append((routed.score(questions), log))
            routed.detach()
        (shared, shared_log), (separate, separate_log) = found
        for one, other in zip(shared, separate, strict=True):
            for a, b in zip(one, other, strict=True):
                assert_same(a, b)
        assert shared_log.tokens == separate_log.tokens
        for name, weights_E in shared_log.weights.items():
            torch.testing.assert_close(separate_log.weights[name], weights_E, rtol=1e-4, atol=1e-4)


def test_separate_rows_do_not_need_more_memory(llama: Base) -> None:
    """Check that no pass has more tokens than a row for each question would, padding included."""
    many = [
        Question([5] * 30, [[7 + n] * n + [0] for n in range(12)]),
        Question([6] * 3, [[8, 0], [9, 0]]),
    ]
    sizes: list[int] = []
    embeddings = llama.model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    expected = score(llama, many)
    found = score(dataclasses.replace(llama, shares_context=False), many)
    handle.remove()
    shared, *separate = sizes
    longest = 30 + sum(range(12))
    assert len(separate) > 1
    assert max(separate) <= longest * len(many)
    assert shared <= longest * len(many)
    for one, other in zip(expected, found, strict=True):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)


TOKENS = st.integers(5, 6)  # so few that sequences often begin alike
CONTEXTS = st.lists(TOKENS, min_size=1, max_size=6)
CHOICES = st.lists(st.lists(TOKENS, max_size=3), min_size=1, max_size=4)


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    asked=st.lists(st.tuples(CONTEXTS, CHOICES), min_size=1, max_size=5),
    positions=st.sampled_from([1, 8, 2000]),  # the fewer, the more rows
    router=st.sampled_from(["base", "phatgoose"]),
)
def test_sequences_that_begin_alike_score_and_count_as_alone(
    llama: Base, asked: list[tuple[list[int], list[list[int]]]], positions: int, router: str
) -> None:
    questions = [Question(context, [[*c, 0] for c in choices]) for context, choices in asked]
    routed = RoutedModel(llama, Pool.from_experts(make_experts(llama, 4)), router)

    def routing(question: Question, choice: list[int]) -> RoutingLog:
        with routed.recording(RoutingLog()) as log:
            routed.score([Question(question.context, [choice])])
        return log

    try:
        with pytest.MonkeyPatch.context() as patch, routed.recording(RoutingLog()) as log:
            patch.setattr("phatgoose.rows._POSITIONS", positions)
            found = routed.score(questions)
        for question, scores in zip(questions, found, strict=True):
            for choice, actual in zip(question.choices, scores, strict=True):
                assert_same(actual, plain_score(llama, question.context, choice))
        contexts = [routing(question, [0]) for question in questions]
        for name, weights_E in log.weights.items():
            # A context counts once for all choices of its question.
            expected_E, tokens = torch.zeros_like(weights_E), 0
            for question, context in zip(questions, contexts, strict=True):
                expected_E += context.weights[name]
                tokens += context.tokens[name]
                for choice in question.choices:
                    whole = routing(question, choice)
                    expected_E += whole.weights[name] - context.weights[name]
                    tokens += whole.tokens[name] - context.tokens[name]
            assert log.tokens[name] == tokens
            torch.testing.assert_close(weights_E, expected_E, rtol=1e-4, atol=1e-4)
        assert bool(log.weights) == (router == "phatgoose")
    finally:
        routed.detach()


def test_what_questions_begin_with_is_read_once(llama: Base) -> None:
    """Check that a pass has a column for each distinct beginning, and nothing else."""
    shots = list(range(10, 40))
    questions = [
        Question([*shots, 50 + n], [[60, 61, 0], [60, 62, 63, 0], [64, 0]]) for n in range(3)
    ]
    questions.append(Question([*shots, 50, 70], [[71, 0]]))
    questions += [Question([*shots, 80, 81, end], [[71, 0]]) for end in (82, 83)]
    sizes: list[int] = []
    embeddings = llama.model.get_input_embeddings()
    handle = embeddings.register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
    scores = score(llama, questions)
    handle.remove()
    assert sizes == [30 + 3 * (1 + 5) + 2 + 2 + 2 * 2]
    for question, found in zip(questions, scores, strict=True):
        for choice, actual in zip(question.choices, found, strict=True):
            assert_same(actual, plain_score(llama, question.context, choice))


@pytest.mark.parametrize("positions", [1, 2000])
@pytest.mark.parametrize("router", ["retrieval", "glider"])
def test_queries_that_differ_share_no_tokens(
    llama: Base, monkeypatch: pytest.MonkeyPatch, router: str, positions: int
) -> None:
    """Check equal contexts, in one row and in several, under what depends on the query."""
    monkeypatch.setattr("phatgoose.sentence_encoder.load_encoder", lambda _: FakeEncoder())
    monkeypatch.setattr("phatgoose.routers.stacked_profiles._embedded", {})
    monkeypatch.setattr("phatgoose.rows._POSITIONS", positions)
    routed = RoutedModel(llama, make_pool(llama), router)
    choices = [[12, 30, 7, 0], [12, 0]]
    questions = [
        Question([5, 9, 11, 20], choices, Query(f"query {n}", task=f"task {n}")) for n in range(6)
    ]
    rows = shared_rows(llama.model, 0, [(q.context, q.choices) for q in questions], across=False)
    assert rows.queries_BL.flatten().diff().min() >= 0  # tokens of a query are neighbors
    assert rows.counted_BL.sum() == sum(len(q.context) + 4 for q in questions)
    together = routed.score(questions)
    for question, found in zip(questions, together, strict=True):
        for actual, expected in zip(found, routed.score([question])[0], strict=True):
            assert_same(actual, expected)
    assert len({scores[0].loglikelihood for scores in together}) > 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", sorted(APART))
def test_a_base_that_leaks_between_choices_is_detected_and_reported(
    folders: Folders, name: str, dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        base = folders.load(*DECODERS[name], dtype=dtype)
    lines = [r.getMessage() for r in caplog.records if "share a context" in r.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith(f"base={base.name}: choices cannot share a context")
    assert "a row of its own" in lines[0]
    assert "\n" not in lines[0]
    stored = load_file(Path(base.name) / "model.safetensors")  # its weights are unchanged
    weights = dict(base.model.named_parameters())
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    for key, weight in stored.items():
        assert torch.equal(weights[key], weight.to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon with groups", "mixtral"])
def test_a_record_without_a_statement_is_probed(
    folders: Folders,
    name: str,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    kind, changes = DECODERS[name]
    silent = dataclasses.replace(ARCHITECTURES[kind], shares_context=False)
    monkeypatch.setitem(ARCHITECTURES, kind, silent)
    with caplog.at_level(logging.WARNING):
        assert folders.load(kind, changes, dtype=dtype).shares_context
    assert "share a context" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "changes", "record"),
    [
        # A record without the window, one that was not tested, and a window with another name.
        ("mistral", {"sliding_window": 3}, Architecture(r"self_attn\..*|mlp\..*", "q_proj")),
        (
            "mixtral",
            {"sliding_window": 3},
            dataclasses.replace(ARCHITECTURES["mixtral"], shares_context=False),
        ),
        (
            "gpt_neo",
            {"attention_types": [[["global", "local"], 1]], "window_size": 3},
            Architecture(
                linears=r"attention\.([qkv]|out)_proj|mlp\.c_(fc|proj)", query=r"attention\.q_proj"
            ),
        ),
    ],
)
def test_windows_not_covered_by_a_test_use_separate_rows(
    folders: Folders,
    kind: str,
    changes: dict[str, Any],
    record: Architecture,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(ARCHITECTURES, kind, record)
    with caplog.at_level(logging.WARNING):
        base = folders.load(kind, changes)
    assert not base.shares_context
    assert re.search(r"its configuration has .*window.*, which", caplog.text)
    assert_plain(base, score(base, QUESTIONS))
    assert_answers_plainly(base, 5)


def test_layers_with_unknown_masks_use_separate_rows(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Check that this holds even under a record that declares sharing exact."""
    record = dataclasses.replace(ARCHITECTURES["lfm2"], window="layer_types", shares_context=True)
    monkeypatch.setitem(ARCHITECTURES, "lfm2", record)
    with caplog.at_level(logging.WARNING):
        base = folders.load("lfm2", {})
    assert "its layers are of the kinds conv, full_attention" in caplog.text
    assert_plain(base, score(base, QUESTIONS))


@pytest.mark.parametrize("router", ["logo", "phatgoose"])
@pytest.mark.parametrize(
    ("kind", "changes"), [("lfm2", {}), ("mpt", {}), ("mistral", {"sliding_window": 5})]
)
def test_routers_decide_the_same_when_a_prompt_is_read_twice(
    folders: Folders, kind: str, changes: dict[str, Any], router: str
) -> None:
    base = folders.load(kind, changes)
    routed = RoutedModel(base, Pool.from_experts(make_experts(base, 4)), router)
    texts = ["Is the lake deep?", "the goose", "The grey goose flies over the lake, and"]
    questions = [
        Question.encode(base, text, [" yes, the swan"], query=Query(text)) for text in texts
    ]
    written, scores = routed.answer(questions, 6)
    assert written == routed.generate(texts, 6)
    for one, (other,) in zip(scores, routed.score(questions), strict=True):
        assert_same(one, other)


def test_a_base_built_by_hand_uses_separate_rows(folders: Folders) -> None:
    loaded = folders.load("lfm2", {})
    base = Base("a", "b", loaded.model, loaded.tokenizer, loaded.linears)
    assert not base.shares_context
    assert_plain(base, score(base, QUESTIONS))
