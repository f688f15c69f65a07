import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.base import Base, load_base
from phatgoose.card import Card, LoraFactors
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.inference.model import RoutedModel
from phatgoose.pool import Pool, PoolLinear
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.routers import TokenRouter, make_router
from phatgoose.routers.glider import Glider
from phatgoose.routers.lag import Lag
from phatgoose.routers.random import Random
from tests.support.plain import plain_generate, plain_score
from tests.support.pools import (
    FakeEncoder,
    fake_embedding,
    make_profiles,
    make_uneven_experts,
    pool_of,
    queries_of,
)
from tests.support.textbook import (
    RULES,
    Fact,
    Rule,
    arrow,
    arrow_of_the_phatgoose_paper,
    base_with,
    facts_of,
    output_norm,
    phatgoose,
    phatgoose_half_as_warm,
    phatgoose_raw_gates,
    phatgoose_raw_input,
    projection_norm,
)

LINEAR = "layers.0.q"
CASES: list[tuple[str, dict[str, Any], Rule]] = [
    *((name, {}, rule) for name, rule in RULES.items()),
    ("phatgoose", {"top_k": 1}, Rule(phatgoose, 1)),
    ("phatgoose", {"top_k": 50}, Rule(phatgoose, 50)),
    ("phatgoose", {"temperature": 0.5}, Rule(phatgoose_half_as_warm, 2)),
    ("phatgoose", {"standardise_input": False}, Rule(phatgoose_raw_input, 2)),
    ("phatgoose", {"standardise_gates": False}, Rule(phatgoose_raw_gates, 2)),
    ("average_activation", {"top_k": 3}, dataclasses.replace(RULES["average_activation"], top_k=3)),
    ("arrow", {"top_k": 1}, Rule(arrow, 1)),
    (
        "arrow",
        {"top_k": 2, "temperature": 10, "divide_by_sqrt_d": True, "mix": "outputs"},
        Rule(arrow_of_the_phatgoose_paper, 2),
    ),
    ("spectr", {"top_k": 2, "weights": "softmax"}, Rule(output_norm, 2)),
    ("lag", {"candidates": 2}, Rule(projection_norm, 1, candidates=2)),
    ("lag", {"candidates": 2, "by": "spectral"}, Rule(output_norm, 1, candidates=2)),
    ("lag", {"by": "spectral"}, Rule(output_norm, 1)),
    ("glider", {"top_k": 3}, Rule(phatgoose, 3)),
]

sizes = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 5),
        "inputs": st.integers(8, 20),
        "outputs": st.integers(1, 20),
        "ranks": st.lists(st.integers(0, 5), min_size=1, max_size=7).filter(any),
        "seed": st.integers(0, 10**6),
    }
)


def make_experts(*, inputs: int, outputs: int, ranks: list[int], seed: int) -> list[Expert]:
    """Return experts of these ranks; one of rank 0 adapts only another linear."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    experts = []
    for index, rank in enumerate(ranks):
        own = LoraFactors(random(rank, inputs), random(outputs, rank), random(inputs))
        other = LoraFactors(random(2, 6), random(3, 2), random(6))
        linears = {"layers.1.o": other, **({LINEAR: own} if rank else {})}
        card = Card(
            f"e{index}", "", "", "base", "", "", scale=1 / (index + 1), recipe={}, metrics={}
        )
        experts.append(Expert(card, linears))
    return experts


def weights_of(router: TokenRouter, pool: Pool, x_TD: Tensor, bias_TE: Tensor | None) -> Tensor:
    """Check the invariants of every rule; return the weights of all experts, float64 [T, E]."""
    weights_TK, indices_TK = router.rule(pool, LINEAR)(x_TD, bias_TE)
    experts = len(pool.experts)
    assert weights_TK.shape == indices_TK.shape == (len(x_TD), min(router.top_k, experts))
    assert all(len(set(row)) == len(row) for row in indices_TK.tolist())
    assert weights_TK.dtype == x_TD.dtype
    weights_TE = torch.zeros(len(x_TD), experts, dtype=torch.float64)
    return weights_TE.scatter(1, indices_TK, weights_TK.double())


@pytest.mark.parametrize(("name", "options", "rule"), CASES)
@settings(deadline=None, max_examples=12, derandomize=True)
@given(sizes)
def test_rules_match_the_textbook(
    name: str, options: dict[str, Any], rule: Rule, sizes: dict[str, Any]
) -> None:
    sizes = dict(sizes)
    tokens = sizes.pop("tokens")
    experts = make_experts(**sizes)
    facts = facts_of(experts, LINEAR, make_profiles(experts))
    router = make_router(name, **options)
    assert isinstance(router, TokenRouter)
    generator = torch.Generator().manual_seed(sizes["seed"] + 1)
    x_TD = torch.randn(tokens, sizes["inputs"], generator=generator)
    bias_TE = torch.randn(tokens, len(experts), generator=generator)
    added_TE = bias_TE if name == "glider" else None
    weights_TE = weights_of(router, pool_of(experts), x_TD, added_TE)
    for token, x_D in enumerate(x_TD.double()):
        bias = bias_TE[token].tolist() if name == "glider" else None
        if rule.clear_cut(x_D, facts, bias):
            expected = rule.weights(x_D, facts, bias)
            # 1e-6 is added to the sum of the kept shares, as the authors do.
            assert weights_TE[token].tolist() == pytest.approx(expected, abs=5e-5)


def test_the_cases_differ() -> None:
    """Check that each case gives different weights on one pool, so that each tests its own rule."""
    experts = make_experts(inputs=12, outputs=9, ranks=[3, 4, 0, 5, 2, 4, 5, 3], seed=1)
    x_TD = torch.randn(40, 12, generator=torch.Generator().manual_seed(2))
    bias_TE = torch.randn(40, 8, generator=torch.Generator().manual_seed(3))
    seen: dict[str, str] = {}
    for name, options, _ in CASES:
        router = make_router(name, **options)
        assert isinstance(router, TokenRouter)
        added_TE = bias_TE if name == "glider" else None
        weights_TE = weights_of(router, pool_of(experts), x_TD, added_TE)
        assert not weights_TE[:, 2].any()  # it does not adapt the linear
        key = str([[round(weight, 3) for weight in row] for row in weights_TE.tolist()])
        assert key not in seen, (name, options, seen[key])
        seen[key] = f"{name} {options}"


@pytest.mark.parametrize("name", [*RULES, "random"])
def test_all_weights_are_zero_where_no_expert_is_present(name: str) -> None:
    experts = make_experts(inputs=12, outputs=9, ranks=[3, 4, 2], seed=0)
    pool = pool_of(experts)
    gone = dataclasses.replace(pool.linears[LINEAR], absent_E=torch.ones(3, dtype=torch.bool))
    pool = dataclasses.replace(pool, linears={**pool.linears, LINEAR: gone})
    router = make_router(name)
    assert isinstance(router, TokenRouter)
    bias_TE = torch.zeros(4, 3) if router.is_biased else None
    assert not weights_of(router, pool, torch.randn(4, 12), bias_TE).any()


def test_equal_weights_stay_equal_where_scores_are_far_apart() -> None:
    experts = make_experts(inputs=12, outputs=9, ranks=[3, 4, 2, 4, 4], seed=0)
    router = make_router("spectr", top_k=3)
    assert isinstance(router, TokenRouter)
    x_TD = 1e4 * torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    weights_TE = weights_of(router, pool_of(experts), x_TD, None)
    assert ((weights_TE - 1 / 3).abs() < 1e-6).sum(dim=1).tolist() == [3] * 6


def test_lag_considers_only_the_candidates_of_arrow() -> None:
    """Check by hand: if A has orthogonal rows and B is the identity, the rows are the spectrum."""
    e = torch.eye(5)
    spectra = [(e[1], 0.9 * e[2], 0.8 * e[3]), (2 * e[0],), (10 * e[4], 9 * e[0], 9 * e[1])]
    lora_A_ERD = torch.zeros(3, 3, 5)
    for expert, rows in enumerate(spectra):
        lora_A_ERD[expert, : len(rows)] = torch.stack(rows)
    pool = Pool("", ("a", "b", "c"), {LINEAR: PoolLinear(lora_A_ERD, torch.eye(3).repeat(3, 1, 1))})
    x_1D = torch.tensor([[3.0, 2.0, 2.0, 2.0, 0.0]])

    def chosen(candidates: int, by: str) -> int:
        return int(Lag(candidates, by).rule(pool, LINEAR)(x_1D, None)[1])

    assert chosen(1, "projection") == chosen(1, "spectral") == 1  # leading directions: 2, 3 and 0
    assert chosen(2, "projection") == 0  # sqrt(12) against 3
    assert chosen(2, "spectral") == 1  # sqrt(9.8) against 6
    assert chosen(3, "projection") == chosen(3, "spectral") == 2  # sqrt(13), and 9 sqrt(13)


def test_seqr_scores_each_expert_by_its_own_measure() -> None:
    experts = make_experts(inputs=12, outputs=9, ranks=[3, 3], seed=0)
    loud = dataclasses.replace(experts[0].card, scale=100.0)
    experts[0] = Expert(loud, experts[0].linears)
    profiles = make_profiles(experts)
    norms = [torch.tensor([1e4, 10.0]), torch.tensor([1.0, 1.0])]
    profiles = [
        dataclasses.replace(p, norms={LINEAR: n}) for p, n in zip(profiles, norms, strict=True)
    ]
    x_TD = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    pool = Pool.from_experts(experts).with_profiles(profiles)
    for name, winner in (("spectr", 0), ("seqr", 1)):
        router = make_router(name)
        assert isinstance(router, TokenRouter)
        assert router.rule(pool, LINEAR)(x_TD, None)[1][:, 0].tolist() == [winner] * 20


def test_random_gates_have_the_expected_distribution() -> None:
    experts = make_experts(inputs=40, outputs=9, ranks=[2] * 6, seed=0)
    pool = pool_of(experts)
    x_TD = torch.randn(3000, 40, generator=torch.Generator().manual_seed(0))
    shares = torch.stack([weights_of(Random(seed=s), pool, x_TD, None).mean(0) for s in range(8)])
    assert float((shares.mean(dim=0) - 1 / 6).abs().max()) < 0.02  # no expert is preferred
    # Standardized gates and inputs: the scores are normal, the best of six is 1.27 on average, the
    # second best 0.64, and the softmax of two that differ by 0.63 gives the first 0.65.
    best_T = weights_of(Random(), pool, x_TD, None).max(dim=1).values
    assert float(best_T.mean()) == pytest.approx(0.65, abs=0.03)


def encode(base: Base) -> list[Question]:
    texts = [
        ("Question: which bird flies in the flock?\nAnswer:", (" the goose", " swan", " a")),
        ("Is the lake deep?", (" yes", " no")),
        ("", ("the",)),
    ]
    queries = [Query(text, choices, f"task {i}") for i, (text, choices) in enumerate(texts)]
    return [Question.encode(base, q.text, q.choices, query=q) for q in queries]


MODEL_CASES = [
    *((name, {}, rule) for name, rule in RULES.items() if name not in ("glider", "uniform")),
    (
        "arrow",
        {"top_k": 2, "temperature": 10, "divide_by_sqrt_d": True, "mix": "outputs"},
        Rule(arrow_of_the_phatgoose_paper, 2),
    ),
]


@pytest.mark.parametrize(("name", "options", "rule"), MODEL_CASES)
def test_a_routed_model_matches_the_textbook_in_every_linear(
    base: Base, name: str, options: dict[str, Any], rule: Rule
) -> None:
    experts = make_uneven_experts(base)
    facts = {n: facts_of(experts, n, make_profiles(experts)) for n in base.linears}
    plain = base_with(base, lambda linear, x_D: rule.added(x_D, facts[linear]))
    routed = RoutedModel(base, pool_of(experts), make_router(name, **options))
    questions = encode(base)
    for question, scores in zip(questions, routed.score(questions), strict=True):
        for choice, actual in zip(question.choices, scores, strict=True):
            expected = plain_score(plain, question.context, choice)
            assert actual.loglikelihood == pytest.approx(expected.loglikelihood, abs=3e-4)
            assert actual.eos_loglikelihood == pytest.approx(expected.eos_loglikelihood, abs=3e-4)
            assert actual.is_greedy == expected.is_greedy
    if name == "arrow":
        texts = routed.generate(queries_of(questions[:2]), 4)
        for question, text in zip(questions, texts, strict=False):
            ids = plain_generate(plain, question.context, 4)
            assert text == base.tokenizer.decode(ids, skip_special_tokens=True)


def gliding(
    facts: dict[str, list[Fact | None]], bias: list[float]
) -> Callable[[str, Tensor], Tensor]:
    """Return GLIDER's addition to each linear's output for a token, for one query."""
    return lambda linear, x_D: RULES["glider"].added(x_D, facts[linear], bias)


def test_glider_adds_the_task_bias_to_the_tokens_of_each_query(
    base: Base, encoder: FakeEncoder
) -> None:
    experts = make_uneven_experts(base)
    pool = pool_of(experts)
    routed = RoutedModel(base, pool, make_router("glider", gamma=1.5))
    questions = encode(base)
    together = routed.score(questions)
    assert pool.profiles is not None
    about = [fake_embedding(profile.description) for profile in pool.profiles]
    facts = {n: facts_of(experts, n) for n in base.linears}
    for question, scores in zip(questions, together, strict=True):
        (query,) = queries_of([question])
        task_S = fake_embedding(query.task)
        bias = [1.5 * float(task_S @ expert_S) for expert_S in about]
        plain = base_with(base, gliding(facts, bias))
        for choice, actual in zip(question.choices, scores, strict=True):
            expected = plain_score(plain, question.context, choice)
            assert actual.mean == pytest.approx(expected.mean, abs=3e-4)
        (text,) = routed.generate([query], 3)
        ids = plain_generate(plain, question.context, 3)
        assert text == base.tokenizer.decode(ids, skip_special_tokens=True)


def test_glider_requires_the_task(llama: Base, encoder: FakeEncoder) -> None:
    pool = pool_of(make_uneven_experts(llama))
    routed = RoutedModel(llama, pool, "glider")
    untold = Question.encode(llama, "Is the lake deep?", [" yes"])
    with pytest.raises(PhatgooseError, match="router glider needs a description of the evaluation"):
        routed.score([*encode(llama), untold])
    with pytest.raises(PhatgooseError, match="`task` of the query"):
        routed.generate(["Is the lake deep?"], 2)


def test_a_large_bias_does_not_hide_the_local_scores(llama: Base, encoder: FakeEncoder) -> None:
    """Check bfloat16, where 1000 equals 1003: with one description for all, the gates decide."""
    experts = make_uneven_experts(llama)
    alike = [dataclasses.replace(p, description="the same") for p in make_profiles(experts)]
    half = load_base(llama.name, dtype="bfloat16")
    routed = RoutedModel(half, Pool.from_experts(experts).with_profiles(alike), "phatgoose")
    questions = encode(half)
    expected = [s.mean for scores in routed.score(questions) for s in scores]
    routed.set_router(Glider(gamma=1000.0))
    means = [s.mean for scores in routed.score(questions) for s in scores]
    assert means == pytest.approx(expected, abs=0.05)
