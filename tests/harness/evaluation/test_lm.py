import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from harness.evaluation.answers import Answer
from harness.evaluation.lm import RecordedLM
from phatgoose.base import Base
from phatgoose.errors import PhatgooseError
from phatgoose.inference.model import RoutedModel
from phatgoose.pool import Pool
from phatgoose.routers import make_router
from phatgoose.tokenization import encode_pair
from tests.support.answering_lm import AnsweringLM, ask
from tests.support.plain import plain_score
from tests.support.scripted import writing
from tests.support.tiny import make_experts

# Prompts in the style of BIG-bench, with and without a space or newline at the end.
DOCUMENTS = [
    ("Q: Is the lake deep?\nA: ", ["yes", "no"]),
    ("Q: Is the lake deep?\nA:", [" yes", " no"]),
    ("Question: which bird flies in the flock?\nAnswer:  ", ["the goose", "swan", "a"]),
    ("The grey goose flies over the lake, and the", [" swan swims.", " goose", "."]),
    ("two and three is\n", ["five", "nine"]),
    ("two and three is five; four and five is", [" nine", " five", " two", " three", " four"]),
    ("the", ["goose"]),
]
CONTEXTS = [
    "the",
    "Q: Is the lake deep?\nA:",
    "Question: which bird flies in the flock?\nAnswer:",
    "The grey goose flies over the lake, and the swan",
]


def choice_requests(task: str = "choices") -> list[Instance]:
    """Return one request per choice, in lm-eval's order."""
    return [
        Instance("loglikelihood", {}, (context, choice), i, (task, document, 1))
        for document, (context, choices) in enumerate(DOCUMENTS)
        for i, choice in enumerate(choices)
    ]


def generation_requests(
    contexts: Sequence[str], task: str = "generation", **options: Any
) -> list[Instance]:
    return [
        Instance("generate_until", {}, (context, options), 0, (task, document, 1))
        for document, context in enumerate(contexts)
    ]


def language_model(
    base: Base,
    router: str,
    tokens: int,
    targets: dict[str, list[str]] | None = None,
    order: Callable[[list[int]], list[int]] = list,
) -> AnsweringLM:
    """Return what lm-eval sees of a router."""
    pool = Pool.from_experts(make_experts(base, 4))
    return AnsweringLM(base, ask(base, pool, make_router(router), order), tokens, targets)


def shuffled(places: list[int]) -> list[int]:
    assert len(places) > 3  # enough to be shuffled
    return random.Random(0).sample(places, len(places))


@pytest.mark.parametrize("router", ["base", "phatgoose", "merged", "single:e2"])
def test_answers_do_not_depend_on_actors_or_their_order(base: Base, router: str) -> None:
    tokens = 20
    requests = [*choice_requests(), *choice_requests("again")]
    in_order = language_model(base, router, tokens)
    shuffling = language_model(base, router, tokens, order=shuffled)
    expected = in_order.loglikelihood(requests)
    assert shuffling.loglikelihood(requests) == expected  # equal chunks, so identical results
    assert shuffling.scores == in_order.scores
    for task, usage in in_order.usage.items():
        same = shuffling.usage[task]
        assert (same.tokens, same.routed) == (usage.tokens, usage.routed)
        for linear, weights_E in usage.routing.items():
            assert torch.equal(weights_E, same.routing[linear])

    at_once = language_model(base, router, 10**6)
    for (one, one_greedy), (many, many_greedy) in zip(
        at_once.loglikelihood(requests), expected, strict=True
    ):
        assert one == pytest.approx(many, abs=1e-4)
        assert one_greedy == many_greedy
    assert at_once.usage["choices"].tokens == in_order.usage["choices"].tokens
    assert at_once.usage["choices"].routed == in_order.usage["choices"].routed


@pytest.mark.parametrize("router", ["base", "random"])
def test_generated_text_does_not_depend_on_actors_or_their_order(base: Base, router: str) -> None:
    requests = generation_requests(CONTEXTS, max_gen_toks=6)
    one_by_one = language_model(base, router, 1, order=shuffled).generate_until(requests)
    assert one_by_one == language_model(base, router, 1).generate_until(requests)
    assert one_by_one == language_model(base, router, 10**6).generate_until(requests)
    assert any(one_by_one)


def test_each_choice_has_its_own_score(llama: Base) -> None:
    lm = language_model(llama, "single:e0", 100)
    results = lm.loglikelihood(choice_requests())
    RoutedModel(llama, Pool.from_experts(make_experts(llama, 4)), "single:e0")
    place = 0
    for document, (context, choices) in enumerate(DOCUMENTS):
        scores = lm.scores["choices", document]
        assert len(scores) == len(choices)
        for choice, score in zip(choices, scores, strict=True):
            expected = plain_score(llama, *encode_pair(llama, context, choice))
            assert score.loglikelihood == pytest.approx(expected.loglikelihood, abs=1e-4)
            # The metric of the paper: the mean over the tokens of the choice and the end.
            total = expected.loglikelihood + expected.eos_loglikelihood
            assert score.mean == pytest.approx(total / (expected.tokens + 1), abs=1e-4)
            assert results[place] == (score.loglikelihood, score.is_greedy)
            place += 1


def test_a_question_is_asked_once_for_all_its_choices(llama: Base) -> None:
    lm = language_model(llama, "base", 10**6)
    lm.loglikelihood(choice_requests())
    [shard] = lm.shards
    [chunk] = shard.chunks
    asked = [one.request for one in chunk]
    contexts = {request.context: list(request.choices) for request in asked}
    assert contexts == dict(DOCUMENTS)


@pytest.fixture
def reference(llama: Base) -> HFLM:
    """Return lm-eval's own language model over the same base."""
    return HFLM(pretrained=llama.model, tokenizer=llama.tokenizer, batch_size=2, device="cpu")


def test_loglikelihoods_match_lm_eval(llama: Base, reference: HFLM) -> None:
    expected = reference.loglikelihood(choice_requests(), disable_tqdm=True)
    actual = language_model(llama, "base", 100).loglikelihood(choice_requests())
    for (value, greedy), (known, known_greedy) in zip(actual, expected, strict=True):
        assert value == pytest.approx(known, abs=1e-4)
        assert greedy == known_greedy


def test_the_greedy_flag_matches_lm_eval(llama: Base, reference: HFLM) -> None:
    requests = []
    for document, context in enumerate(CONTEXTS):
        options: dict[str, Any] = {"until": [], "max_gen_toks": 3, "do_sample": False}
        [text] = reference.generate_until(
            generation_requests([context], **options), disable_tqdm=True
        )
        for i, choice in enumerate((text, text + " goose")):
            requests.append(Instance("loglikelihood", {}, (context, choice), i, ("t", document, 1)))
    expected = reference.loglikelihood(requests, disable_tqdm=True)
    actual = language_model(llama, "base", 100).loglikelihood(requests)
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    assert any(greedy for _, greedy in actual)
    assert not all(greedy for _, greedy in actual)


def test_generation_matches_lm_eval(llama: Base, reference: HFLM) -> None:
    options: dict[str, Any] = {"until": [], "max_gen_toks": 8, "do_sample": False}
    lm = language_model(llama, "base", 100)
    whole = reference.generate_until(generation_requests(CONTEXTS, **options), disable_tqdm=True)
    assert lm.generate_until(generation_requests(CONTEXTS, **options)) == whole
    assert all(len(text) > 3 for text in whole)
    # Stop strings that occur at different places, inside a token or across two.
    options["until"] = [whole[0][2:4], whole[1][1:2], "never"]
    cut = reference.generate_until(generation_requests(CONTEXTS, **options), disable_tqdm=True)
    assert lm.generate_until(generation_requests(CONTEXTS, **options)) == cut
    assert cut != whole


def test_the_space_after_a_prompt_is_not_part_of_the_answer(llama: Base, reference: HFLM) -> None:
    options: dict[str, Any] = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    lm = language_model(llama, "base", 100)
    bare = reference.generate_until(generation_requests(CONTEXTS, **options), disable_tqdm=True)
    spaced = [context + " " for context in CONTEXTS]
    expected = [text.removeprefix(" ") for text in bare]
    assert lm.generate_until(generation_requests(spaced, **options)) == expected


def test_a_single_stop_string_may_be_given_without_a_list(llama: Base) -> None:
    lm = language_model(llama, "base", 100)
    [text] = lm.generate_until(generation_requests(CONTEXTS[:1], until=[], max_gen_toks=8))
    stop = text[3:5]
    cut = generation_requests(CONTEXTS[:1], until=stop, max_gen_toks=8)
    assert lm.generate_until(cut) == [text.split(stop)[0]]


def test_usage_is_counted_by_task(llama: Base) -> None:
    lm = language_model(llama, "phatgoose", 60)
    lm.loglikelihood(choice_requests("one") + choice_requests("two")[:4])
    one, two = lm.usage["one"], lm.usage["two"]
    assert one.tokens > two.tokens > 0
    for linear in llama.linears:
        # A token's two weights are parts of a softmax over all experts, so they sum to below one.
        assert 0 < float(one.routing[linear].sum()) < one.routed[linear]
        assert one.routed[linear] > two.routed[linear] > 0
    assert not math.isnan(one.seconds)


def test_unsupported_requests_are_refused(llama: Base) -> None:
    lm = language_model(llama, "base", 100)
    with pytest.raises(PhatgooseError, match="task wikitext: it asks for rolling log-likelihoods"):
        RecordedLM([], Answer()).loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, ("text",), 0, ("wikitext", 0, 1))]
        )
    for options in ({"do_sample": True}, {"temperature": 0.7}):
        with pytest.raises(PhatgooseError, match="only greedy"):
            lm.generate_until(generation_requests(CONTEXTS, **options))


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens"])
def test_every_name_of_the_limit_is_honored_as_in_lm_eval(
    llama: Base, reference: HFLM, name: str
) -> None:
    lm = language_model(llama, "base", 100)
    options: dict[str, Any] = {"until": ["zzz"], name: 3, "do_sample": False}
    expected = reference.generate_until(generation_requests(CONTEXTS, **options), disable_tqdm=True)
    assert lm.generate_until(generation_requests(CONTEXTS, **options)) == expected
    longer = {**options, name: 9}
    assert lm.generate_until(generation_requests(CONTEXTS, **longer)) != expected


def test_an_empty_stop_string_is_ignored(base: Base) -> None:
    lm = language_model(base, "base", 100)
    whole = lm.generate_until(generation_requests(CONTEXTS, until=[], max_gen_toks=8))
    for until in ("", [""], None):
        requests = generation_requests(CONTEXTS, until=until, max_gen_toks=8)
        assert lm.generate_until(requests) == whole
    assert any(whole)


@pytest.mark.parametrize("right", [{}, {"generation": [" nine"]}], ids=["alone", "scored"])
def test_a_space_as_stop_string_ends_generation_before_the_second_word(
    llama: Base, right: dict[str, list[str]]
) -> None:
    """Check that the space after the prompt belongs to the prompt, as in lm-eval."""
    lm = language_model(llama, "base", 10**6, right)
    options: dict[str, Any] = {"max_gen_toks": 6, "until": [" "]}
    with writing(llama, llama.tokenizer.encode(" goose flies")):
        assert lm.generate_until(generation_requests(["the "], **options)) == ["goose"]
    with writing(llama, llama.tokenizer.encode(" goose flies")):
        assert lm.generate_until(generation_requests(["the"], **options)) == [""]


def test_requests_of_one_chunk_may_have_different_options(base: Base) -> None:
    """Check different options, which occur if a task makes its own requests."""
    lm = language_model(base, "base", 10**6)
    options: list[dict[str, Any]] = [
        {"max_gen_toks": 2},
        {"max_gen_toks": 9},
        {"max_gen_toks": 9, "until": "e"},
        {},
    ]
    each = [
        lm.generate_until(generation_requests([context], **o))
        for context, o in zip(CONTEXTS, options, strict=True)
    ]
    together = [
        Instance("generate_until", {}, (context, o), 0, ("generation", document, 1))
        for document, (context, o) in enumerate(zip(CONTEXTS, options, strict=True))
    ]
    assert lm.generate_until(together) == [text for (text,) in each]


LONG = "the grey goose flies over the lake, and the swan swims. " * 40 + "Is the lake deep?"


def test_a_prompt_that_is_too_long_is_truncated_as_in_lm_eval_and_counted(
    llama: Base, reference: HFLM
) -> None:
    assert len(encode_pair(llama, LONG, "x")[0]) > 512
    lm = language_model(llama, "base", 10**6)
    choices = [
        Instance("loglikelihood", {}, (context, choice), i, ("choices", document, 1))
        for document, context in enumerate(["the", LONG, "Is the lake deep?"])
        for i, choice in enumerate((" yes", " it is not deep", " no"))
    ]
    expected = reference.loglikelihood(choices, disable_tqdm=True)
    for (value, greedy), (known, known_greedy) in zip(
        lm.loglikelihood(choices), expected, strict=True
    ):
        assert value == pytest.approx(known, abs=1e-4)
        assert greedy == known_greedy
    options: dict[str, Any] = {"until": ["zzz"], "max_gen_toks": 8, "do_sample": False}
    generation = generation_requests(["the", LONG], **options)
    written = [reference.generate_until([request], disable_tqdm=True)[0] for request in generation]
    assert lm.generate_until(generation) == written
    assert lm.cut == {("choices", 1), ("generation", 1)}


def test_the_answer_after_a_prompt_that_is_too_long_is_scored(base: Base) -> None:
    right = {"generation": [" yes", " yes"]}
    lm = language_model(base, "phatgoose", 10**6, right)
    base.model.config.n_positions = 64
    lm.generate_until(generation_requests([LONG, "the"], max_gen_toks=4))
    assert lm.cut == {("generation", 0)}
    for document, context in enumerate((LONG, "the")):
        request = Instance("loglikelihood", {}, (context, " yes"), 0, ("alone", document, 1))
        lm.loglikelihood([request])
        (expected,) = lm.scores["alone", document]
        (found,) = lm.scores["generation", document]
        assert found.mean == pytest.approx(expected.mean, abs=1e-4)


def test_a_query_router_sees_the_truncated_prompt(base: Base) -> None:
    base.model.config.n_positions = 64
    lm = language_model(base, "logo", 10**6)
    requests = [
        Instance("loglikelihood", {}, (context, choice), i, ("choices", document, 1))
        for document, context in enumerate([LONG, "the"])
        for i, choice in enumerate((" yes", " it is not"))
    ]
    found = lm.loglikelihood(requests)
    alone = [
        language_model(base, "logo", 1).loglikelihood([request])[0] for request in requests[2:]
    ]
    assert [value for value, _ in found[2:]] == pytest.approx([v for v, _ in alone], abs=1e-4)
    assert lm.cut == {("choices", 0)}


def test_a_prompt_truncated_only_for_its_answer_is_counted(llama: Base) -> None:
    right = {"generation": [" the grey goose flies over"]}
    context, target = encode_pair(llama, LONG, right["generation"][0])
    assert len(target) > 4
    llama.model.config.max_position_embeddings = len(context) + 1
    lm = language_model(llama, "base", 10**6, right)
    lm.generate_until(generation_requests([LONG], max_gen_toks=1))
    assert lm.cut == {("generation", 0)}


def test_no_router_reads_more_positions_than_the_base_has(base: Base) -> None:
    base.model.config.n_positions = 64
    longest = 0

    def measure(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        nonlocal longest
        longest = max(longest, kwargs["input_ids"].shape[1])

    inner = base.model.get_encoder() if base.is_encoder_decoder else base.model.base_model
    inner.register_forward_pre_hook(measure, with_kwargs=True)
    lm = language_model(base, "logo", 10**6)  # it probes the base before each batch
    lm.generate_until(generation_requests([LONG], max_gen_toks=4))
    assert 32 < longest <= 64
    lm.loglikelihood([Instance("loglikelihood", {}, (LONG, " yes"), 0, ("choices", 0, 1))])
    assert longest == 64
