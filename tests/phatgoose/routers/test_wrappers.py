import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from phatgoose.base import Base
from phatgoose.card import LoraFactors
from phatgoose.errors import PhatgooseError
from phatgoose.expert import Expert
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.routed_linear import RoutingLog
from phatgoose.pool import Pool, PoolLinear
from phatgoose.query import Query
from phatgoose.question import Question
from phatgoose.routers import TokenRouter, Wrapper, make_router
from phatgoose.routers.genknowsub import Genknowsub
from phatgoose.routers.random_experts import RandomExperts
from tests.support.plain import plain_logits, plain_score
from tests.support.pools import FakeEncoder, make_profiles, make_uneven_experts, pool_of, without
from tests.support.textbook import RULES, Fact, base_with, facts_of
from tests.support.tiny import make_experts

QUERIES = [
    Query("Question: which bird flies in the flock?\nAnswer:", (" the goose", " swan"), "birds"),
    Query("Is the lake deep?", (" yes", " no"), "lakes"),
]
TOKEN_ROUTERS = ["arrow", "phatgoose", "spectr", "lag", "average_activation", "uniform", "seqr"]


def encode(base: Base) -> list[Question]:
    return [Question.encode(base, q.text, q.choices, query=q) for q in QUERIES]


@torch.no_grad()
def logits(base: Base) -> Tensor:
    return plain_logits(base, [5, 9, 11, 20, 33, 8], [12, 30, 7])


def minus_general(facts: list[Fact | None], general: int) -> list[Fact | None]:
    """Return each expert minus the general one, which itself cannot be chosen."""
    taken = facts[general]
    left: list[Fact | None] = []
    for index, fact in enumerate(facts):
        if fact is None or index == general:
            left.append(None)
        elif taken is None:
            left.append(fact)
        else:
            left.append(
                dataclasses.replace(
                    fact,
                    # The rank of both, as in the pool: each expert's own rank comes first.
                    lora_A_RD=torch.cat([padded(fact.lora_A_RD), padded(taken.lora_A_RD)]),
                    lora_B_OR=torch.cat(
                        [padded(fact.lora_B_OR.T).T, -padded(taken.lora_B_OR.T).T], dim=1
                    ),
                )
            )
    return left


def padded(rows_RN: Tensor, rank: int = 4) -> Tensor:
    return torch.cat([rows_RN, rows_RN.new_zeros(rank - len(rows_RN), rows_RN.shape[1])])


# The general expert: any, one of a lower rank, one that does not adapt some linears.
@pytest.mark.parametrize("general", ["e0", "e1", "e2"])
@pytest.mark.parametrize("router", ["arrow", "phatgoose", "lag"])
def test_genknowsub_routes_among_experts_subtracted_by_hand(
    base: Base, router: str, general: str
) -> None:
    experts = make_uneven_experts(base)
    facts = {
        linear: minus_general(facts_of(experts, linear), int(general[1:]))
        for linear in base.linears
    }
    plain = base_with(base, lambda linear, x_D: RULES[router].added(x_D, facts[linear]))
    routed = RoutedModel(base, pool_of(experts), Genknowsub(general, router))
    questions = encode(base)[:1] if router != "arrow" else encode(base)
    for question, scores in zip(questions, routed.score(questions), strict=True):
        for choice, score in zip(question.choices, scores, strict=True):
            expected = plain_score(plain, question.context, choice)
            assert score.mean == pytest.approx(expected.mean, abs=3e-4)


@pytest.mark.parametrize("router", TOKEN_ROUTERS)
def test_genknowsub_equals_its_router_over_a_pool_of_dense_differences(
    llama: Base, router: str
) -> None:
    """Check against dense deltas, stored as pairs of factors whose A is the identity."""
    pool = pool_of(make_experts(llama, 5))
    name = llama.linears[1]
    factors = pool.linears[name]
    delta_EOD = factors.lora_B_EOR @ factors.lora_A_ERD
    others = [0, 1, 2, 4]
    by_hand = PoolLinear(
        lora_A_ERD=torch.eye(delta_EOD.shape[2]).repeat(4, 1, 1),
        lora_B_EOR=delta_EOD[others] - delta_EOD[3],
        gate_ED=None if factors.gate_ED is None else factors.gate_ED[others],
    )
    assert pool.profiles is not None
    dense = Pool(
        pool.base_fingerprint,
        tuple(pool.experts[i] for i in others),
        {name: by_hand},
        tuple(pool.profiles[i] for i in others),
    )
    wrapper, inner = Genknowsub("e3", router), make_router(router)
    assert isinstance(inner, TokenRouter)
    assert wrapper.inner == inner
    x_TD = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    changed = wrapper.change(pool)
    assert changed.experts == pool.experts
    weights_TE = spread(inner.rule(changed, name)(x_TD, None), 5)
    assert not weights_TE[:, 3].any()
    expected_TE = spread(inner.rule(dense, name)(x_TD, None), 4)
    torch.testing.assert_close(weights_TE[:, others], expected_TE, rtol=1e-3, atol=1e-4)


def spread(routed: tuple[Tensor, Tensor], experts: int) -> Tensor:
    """Return the weights of all experts, [T, E]."""
    weights_TK, indices_TK = routed
    return weights_TK.new_zeros(len(weights_TK), experts).scatter(1, indices_TK, weights_TK)


@pytest.mark.parametrize("router", [*TOKEN_ROUTERS, "glider", "random"])
def test_no_token_goes_to_the_general_expert(base: Base, encoder: FakeEncoder, router: str) -> None:
    routed = RoutedModel(base, pool_of(make_uneven_experts(base)), Genknowsub("e3", router))
    with routed.recording(RoutingLog()) as log:
        routed.score(encode(base))
    for name in base.linears:
        weights_E = log.weights[name]
        assert float(weights_E[3]) == 0.0
        assert float(weights_E.sum()) == pytest.approx(log.tokens[name], rel=1e-3)


def test_nothing_is_added_where_only_the_general_expert_acts(base: Base) -> None:
    """Check a linear that only the general expert adapts, so that no expert can be chosen."""
    general, *others = make_experts(base, 3)
    ending = base.linears[-1].split(".")[-1]
    experts = [general, *(without(expert, ending) for expert in others)]
    fewer = [without(expert, ending) for expert in experts]
    routed = RoutedModel(base, pool_of(experts), Genknowsub("e0"))
    actual, scores = logits(base), routed.score(encode(base))
    routed.detach()
    routed = RoutedModel(base, pool_of(fewer), Genknowsub("e0"))
    torch.testing.assert_close(actual, logits(base))
    assert not actual.isnan().any()
    means = [s.mean for question in scores for s in question]
    expected = [s.mean for question in routed.score(encode(base)) for s in question]
    assert means == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (3, {}, r"router genknowsub: name the general expert.*e0, e1, e2"),
        (3, {"general": "e9"}, "no expert 'e9': .*it has e0, e1, e2"),
        (1, {"general": "e0"}, "no expert but the general one"),
    ],
)
def test_genknowsub_refuses_pools_it_cannot_subtract_from(
    llama: Base, count: int, options: dict[str, Any], message: str
) -> None:
    routed = RoutedModel(llama, pool_of(make_experts(llama, count)))
    before = logits(llama)
    with pytest.raises(PhatgooseError, match=message):
        routed.set_router(make_router("genknowsub", **options))
    assert torch.equal(logits(llama), before)


@pytest.mark.parametrize("router", ["merged", "retrieval", "base", "random_experts"])
def test_genknowsub_wraps_only_token_routers(router: str) -> None:
    with pytest.raises(PhatgooseError, match=f"router genknowsub: {router} does not route tokens"):
        make_router("genknowsub", general="e0", router=router)


def test_random_experts_have_the_norms_and_ranks_of_the_experts(base: Base) -> None:
    pool = pool_of(make_uneven_experts(base))
    changed = RandomExperts(seed=3).change(pool)
    assert changed.experts == pool.experts
    assert changed.profiles is pool.profiles
    for name, old in pool.linears.items():
        new = changed.linears[name]
        assert new.gate_ED is old.gate_ED
        assert new.absent_E is old.absent_E
        for field in ("lora_A_ERD", "lora_B_EOR"):
            mine, theirs = getattr(new, field), getattr(old, field)
            torch.testing.assert_close(mine.norm(dim=(1, 2)), theirs.norm(dim=(1, 2)))
            ranks = torch.linalg.matrix_rank(theirs)
            assert torch.equal(torch.linalg.matrix_rank(mine), ranks)
            assert int(ranks[1]) == 2
            for one, other in zip(mine, theirs, strict=True):
                if other.any():  # they are unrelated
                    cosine = (one * other).sum() / one.norm() / other.norm()
                    assert abs(float(cosine)) < 5 / one.numel() ** 0.5
    products = {name: f.lora_B_EOR @ f.lora_A_ERD for name, f in changed.linears.items()}
    assert all(int(torch.linalg.matrix_rank(product[1])) == 2 for product in products.values())


def test_random_experts_depend_only_on_the_seed_and_the_linear(llama: Base) -> None:
    pool = pool_of(make_uneven_experts(llama))
    first, other = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    drawn = RandomExperts().change(pool).linears
    torch.manual_seed(7)
    again = RandomExperts(router="arrow").change(pool).linears
    assert torch.equal(drawn[first].lora_A_ERD, again[first].lora_A_ERD)
    assert torch.equal(drawn[first].lora_B_EOR, again[first].lora_B_EOR)
    fewer = dataclasses.replace(pool, linears={first: pool.linears[first]})
    alone = RandomExperts().change(fewer).linears[first]
    assert torch.equal(drawn[first].lora_A_ERD, alone.lora_A_ERD)
    assert not torch.equal(drawn[first].lora_A_ERD, drawn[other].lora_A_ERD)
    changed = RandomExperts(seed=1).change(pool).linears[first]
    assert not torch.equal(drawn[first].lora_A_ERD, changed.lora_A_ERD)


@pytest.mark.parametrize("router", ["merged", "phatgoose", "retrieval", "single:e1", "glider"])
def test_random_experts_are_routed_like_any_others(
    base: Base, encoder: FakeEncoder, router: str
) -> None:
    """Check against the same router over a pool of random experts made by hand."""
    experts = make_uneven_experts(base)
    pool = pool_of(experts)
    drawn = RandomExperts().change(pool)
    by_hand = [
        Expert(
            dataclasses.replace(expert.card, scale=1.0),
            {
                name: LoraFactors(
                    drawn.linears[name].lora_A_ERD[index].clone(),
                    drawn.linears[name].lora_B_EOR[index].clone(),
                    factors.gate_D,
                )
                for name, factors in expert.linears.items()
            },
        )
        for index, expert in enumerate(experts)
    ]
    questions = encode(base)
    routed = RoutedModel(base, pool, make_router("random_experts", router=router))
    wrapped = [s.mean for scores in routed.score(questions) for s in scores]
    routed.set_router(router)
    real = [s.mean for scores in routed.score(questions) for s in scores]
    assert wrapped != pytest.approx(real, abs=1e-2)
    routed.detach()
    routed = RoutedModel(
        base, Pool.from_experts(by_hand).with_profiles(make_profiles(experts)), router
    )
    expected = [s.mean for scores in routed.score(questions) for s in scores]
    assert wrapped == pytest.approx(expected, abs=1e-4)


def test_an_expert_named_by_the_inner_router_must_exist(llama: Base) -> None:
    wrapper = make_router("random_experts", router="single:e9")
    assert isinstance(wrapper, Wrapper)
    with pytest.raises(PhatgooseError, match="no expert 'e9'"):
        wrapper.check(pool_of(make_experts(llama, 2)))
    with pytest.raises(PhatgooseError, match="no expert 'e9'"):
        wrapper.check_experts(["e0", "e1"])


def test_a_wrapper_may_wrap_a_wrapper(base: Base) -> None:
    routed = RoutedModel(base, pool_of(make_uneven_experts(base)))
    inner = make_router("random_experts", router="random_experts")
    routed.set_router(inner)
    assert routed.router == inner
    assert not logits(base).isnan().any()
