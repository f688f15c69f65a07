"""Compare routing and mixing over a bfloat16 base with float64.

Shape suffixes: T tokens, D input features, O output features, E experts, K experts kept, R rank,
Q queries.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from phatgoose.base import Base, load_base
from phatgoose.inference.model import RoutedModel
from phatgoose.inference.routed_linear import RoutedLinear, RoutingLog
from phatgoose.ops import mix, mix_factors, route
from phatgoose.ops.mixing import _way
from phatgoose.pool import Pool
from phatgoose.question import Question
from phatgoose.routers import ROUTERS, Merge, TokenRouter, Wrapper, make_router
from phatgoose.routers.interface import Probe, generator_for
from tests.support.pools import make_profiles, make_uneven_experts, pool_of
from tests.support.textbook import RULES, Fact, Facts, Rule, facts_of, gate_score, output_norm
from tests.support.tiny import make_experts

EXPERTS = 12
TEXTS = [
    "Question: which bird flies in the flock over the deep grey lake?\nAnswer:",
    "the grey goose flies, the swan swims, the flock answers. Is the lake dry? the lake is",
]


def random_gates(linear: str, inputs: int) -> Tensor:
    return torch.randn(EXPERTS, inputs, generator=generator_for(0, linear)).double()


def random_gate(x_D: Tensor, fact: Fact) -> float:
    assert fact.gate_D is not None
    return gate_score(x_D, fact.gate_D)


CASES: list[tuple[str, dict[str, Any], Rule]] = [
    *((n, {}, r) for n, r in RULES.items() if n not in ("glider", "uniform")),
    ("lag", {"by": "spectral"}, Rule(output_norm, 1)),
    ("random", {}, Rule(random_gate, 2)),
]


def chosen(weights: list[float]) -> set[int]:
    return {e for e, weight in enumerate(weights) if weight > 0}


def surely(rule: Rule, x_D: Tensor, facts: Facts) -> bool:
    """Return whether rounding to float32 cannot change the choice; rounding to bfloat16 may."""
    scores = sorted((s for s in rule.scores(x_D, facts) if s > -torch.inf), reverse=True)
    if len(scores) <= rule.top_k:
        return True
    last, next_ = scores[rule.top_k - 1 : rule.top_k + 1]
    return last - next_ > 2e-5 * max(1.0, abs(last))


def routed_at(
    module: RoutedLinear, x_TD: Tensor, bias_TE: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the weights and the experts of tokens, as a pass through this linear chooses them."""
    assert module._experts is not None
    y_TO = module.base(x_TD)
    _, weights_TK, indices_TK = module._experts.route_and_add(y_TO, x_TD, bias_TE)
    return weights_TK, indices_TK


def test_every_token_router_is_among_the_cases() -> None:
    routers = {name for name, router in ROUTERS.items() if issubclass(router, TokenRouter)}
    # Glider's scores are PHATGOOSE's plus a bias; uniform has no scores.
    assert routers - {"glider", "uniform"} == {name for name, _, _ in CASES}


@pytest.mark.parametrize(("name", "options", "rule"), CASES)
def test_tokens_are_routed_as_in_float64(
    base: Base, name: str, options: dict[str, Any], rule: Rule
) -> None:
    """Check every token at every linear; experts and gates of the textbook are not rounded."""
    experts = make_uneven_experts(base, EXPERTS)
    profiles = make_profiles(experts)
    half = load_base(base.name, dtype="bfloat16")
    routed = RoutedModel(half, pool_of(experts), make_router(name, **options))
    heard: dict[str, Tensor] = {}

    def listen(linear: str, x: Tensor) -> None:
        heard.setdefault(linear, x.flatten(0, 1))

    with routed.listening(listen):
        routed.score([Question.encode(half, text, [" the goose"]) for text in TEXTS])
    assert heard.keys() == set(base.linears)
    checked = 0
    for linear, x_TD in heard.items():
        assert x_TD.dtype == torch.bfloat16
        facts = facts_of(experts, linear, profiles)
        if name == "random":
            for fact, gate_D in zip(facts, random_gates(linear, x_TD.shape[1]), strict=True):
                if fact is not None:
                    fact.gate_D = gate_D
        module = half.model.get_submodule(linear)
        assert isinstance(module, RoutedLinear)
        weights_TK, indices_TK = routed_at(module, x_TD)
        assert weights_TK.dtype == torch.float32
        for x_D, weights_K, indices_K in zip(x_TD.double(), weights_TK, indices_TK, strict=True):
            if not surely(rule, x_D, facts):
                continue
            expected = rule.weights(x_D, facts)
            kept = indices_K[weights_K > 0].tolist()
            assert set(kept) <= chosen(expected)  # a weight may be too small for float32
            assert weights_K.tolist() == pytest.approx(
                [expected[e] for e in indices_K.tolist()], abs=5e-5
            )
            checked += 1
    assert checked > 0.9 * sum(map(len, heard.values()))


def test_glider_adds_its_bias_to_unrounded_scores(llama: Base) -> None:
    experts = make_experts(llama, EXPERTS)
    half = load_base(llama.name, dtype="bfloat16")
    linear = llama.linears[0]
    x_TD = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    bias_TE = 3 * torch.randn(200, EXPERTS, generator=torch.Generator().manual_seed(1))
    routed = RoutedModel(half, pool_of(experts), "glider")
    module = half.model.get_submodule(linear)
    assert isinstance(module, RoutedLinear)
    assert routed.router == make_router("glider")
    weights_TK, indices_TK = routed_at(module, x_TD, bias_TE)
    rule, facts = RULES["glider"], facts_of(experts, linear)
    for x_D, bias_E, weights_K, indices_K in zip(
        x_TD.double(), bias_TE.double(), weights_TK, indices_TK, strict=True
    ):
        if rule.clear_cut(x_D, facts, bias_E.tolist()):
            expected = rule.weights(x_D, facts, bias_E.tolist())
            assert [expected[e] for e in indices_K.tolist()] == pytest.approx(
                weights_K.tolist(), abs=5e-5
            )


def test_the_operation_scores_in_float32() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(2000, 64, generator=generator).bfloat16()
    gates_ED = torch.randn(40, 64, generator=generator)
    for gates in (gates_ED, gates_ED.bfloat16()):
        weights_TK, indices_TK = route(x_TD, gates, 2)
        assert weights_TK.dtype == torch.float32
        expected_TK, kept_TK = route_in_float64(x_TD.double(), gates.double(), 2)
        differ = (indices_TK.sort().values != kept_TK.sort().values).any(dim=1)
        assert int(differ.sum()) <= 1  # two scores that are equal up to the last bits of float32
        torch.testing.assert_close(
            weights_TK[~differ].double(), expected_TK[~differ], rtol=1e-4, atol=1e-5
        )


def route_in_float64(x_TD: Tensor, gates_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    def standardized(rows: Tensor) -> Tensor:
        variance = rows.var(dim=1, correction=0, keepdim=True)
        return (rows - rows.mean(dim=1, keepdim=True)) / (variance + 1e-5).sqrt()

    scores_TE = standardized(x_TD) @ standardized(gates_ED).T / x_TD.shape[1] ** 0.5
    kept_TK = scores_TE.topk(top_k, dim=1)
    return kept_TK.values.softmax(dim=1), kept_TK.indices


def mixed(x_TD: Tensor, A_ERD: Tensor, B_EOR: Tensor, indices_TK: Tensor, w_TK: Tensor) -> Tensor:
    """Return the sum of the experts' outputs, in float64, token by token."""
    x_TD, A_ERD, B_EOR, w_TK = (t.double() for t in (x_TD, A_ERD, B_EOR, w_TK))
    rows = [
        sum(w * (B_EOR[e] @ (A_ERD[e] @ x_D)) for e, w in zip(chosen_K, w_K, strict=True))
        for x_D, chosen_K, w_K in zip(x_TD, indices_TK.tolist(), w_TK, strict=True)
    ]
    return torch.stack(rows)


def mixed_factors(
    x_TD: Tensor, A_ERD: Tensor, B_EOR: Tensor, indices_TK: Tensor, w_TK: Tensor
) -> Tensor:
    """Return the same with mixed factors."""
    x_TD, A_ERD, B_EOR, w_TK = (t.double() for t in (x_TD, A_ERD, B_EOR, w_TK))
    rows = []
    for x_D, chosen_K, w_K in zip(x_TD, indices_TK, w_TK, strict=True):
        A_RD = torch.einsum("k,krd->rd", w_K, A_ERD[chosen_K])
        rows.append(torch.einsum("k,kor->or", w_K, B_EOR[chosen_K]) @ (A_RD @ x_D))
    return torch.stack(rows)


@pytest.mark.parametrize(("mixer", "expected"), [(mix, mixed), (mix_factors, mixed_factors)])
@pytest.mark.parametrize(
    ("way", "experts", "top_k", "rank"),
    [("dense", 64, 64, 4), ("dense", 8, 8, 4), ("dense", 40, 20, 8),
     ("grouped", 41, 8, 8), ("loop", 41, 8, 5)],
)  # fmt: skip
def test_sums_over_experts_are_not_rounded(
    mixer: Callable[..., Tensor],
    expected: Callable[..., Tensor],
    way: str,
    experts: int,
    top_k: int,
    rank: int,
) -> None:
    """Check that the error is that of the operands and the result, for any number of experts.

    Rounding to bfloat16 once is off by up to 2^-9. If each sum or the weights are rounded too, the
    error is 2.2 to 5.5 times as large.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    x_TD, A_ERD, B_EOR = random(150, 32), random(experts, rank, 32), random(experts, 24, rank)
    indices_TK = torch.rand(150, experts, generator=generator).topk(top_k).indices
    weights_TK = torch.rand(150, top_k, generator=generator)
    weights_TK /= weights_TK.sum(dim=1, keepdim=True)
    assert _way(A_ERD, B_EOR, indices_TK) == way
    y_TO = mixer(x_TD, A_ERD, B_EOR, indices_TK, weights_TK)
    assert y_TO.dtype == torch.bfloat16
    expected_TO = expected(x_TD, A_ERD, B_EOR, indices_TK, weights_TK)
    error = float((y_TO.double() - expected_TO).norm() / expected_TO.norm())
    assert error < 1.9 * 2**-9


def test_the_pool_keeps_its_gates_and_rounds_its_factors(base: Base) -> None:
    experts = make_experts(base, 3)
    pool = Pool.from_experts(experts)
    half = load_base(base.name, dtype="bfloat16")
    routed = RoutedModel(half, pool)
    for name, linear in routed.pool.linears.items():
        assert linear.lora_A_ERD.dtype == linear.lora_B_EOR.dtype == torch.bfloat16
        assert linear.gate_ED is not None
        expected_ED = pool.linears[name].gate_ED
        assert expected_ED is not None
        assert torch.equal(linear.gate_ED, expected_ED)


def test_factors_changed_by_a_wrapper_are_rounded_afterwards(base: Base) -> None:
    """Check that scores use the changed, unrounded factors, and mixing uses bfloat16."""
    experts = make_uneven_experts(base)
    half = load_base(base.name, dtype="bfloat16")
    pool = pool_of(experts)
    router = make_router("random_experts", router="arrow")
    RoutedModel(half, pool, router)
    changed = router.change(pool)  # type: ignore[attr-defined]
    for name in base.linears:
        module = half.model.get_submodule(name)
        assert isinstance(module, RoutedLinear)
        assert module._experts is not None
        assert module._experts.rule is not None
        linear = changed.linears[name]
        assert torch.equal(module._experts.lora_A_ERD, linear.lora_A_ERD.bfloat16())
        assert torch.equal(module._experts.lora_B_EOR, linear.lora_B_EOR.bfloat16())
        inputs = linear.lora_A_ERD.shape[2]
        x_TD = torch.randn(9, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
        weights_TK, indices_TK = module._experts.rule(x_TD)
        expected_TK, kept_TK = router.inner.rule(changed, name)(x_TD.float(), None)  # type: ignore[attr-defined]
        assert torch.equal(indices_TK, kept_TK)
        assert torch.equal(weights_TK, expected_TK)


MERGES = [n for n, r in ROUTERS.items() if issubclass(r, Merge) and n != "single"]


@pytest.mark.parametrize("name", [*MERGES, "single:e1", "random_experts"])
@pytest.mark.parametrize("count", [3, 9])  # `merged` as factors and as a matrix
def test_a_merge_of_unrounded_experts_is_rounded_once(base: Base, name: str, count: int) -> None:
    pool = pool_of(make_uneven_experts(base, count))
    half = load_base(base.name, dtype="bfloat16")
    router = make_router(name)
    RoutedModel(half, pool, router)
    if isinstance(router, Wrapper):
        pool, router = router.change(pool), router.inner
    assert isinstance(router, Merge)
    for linear in base.linears:
        module = half.model.get_submodule(linear)
        assert isinstance(module, RoutedLinear)
        assert module._delta is not None
        matrices = list(router.merge(pool, linear))
        if len(module._delta) < len(matrices):
            matrices = [matrices[1] @ matrices[0]]
        for actual, expected in zip(module._delta, matrices, strict=True):
            assert torch.equal(actual, expected.bfloat16())


@pytest.mark.parametrize("by", ["norm", "entropy"])
def test_logo_weights_are_computed_from_unrounded_experts(llama: Base, by: str) -> None:
    experts = make_experts(llama, 5)
    half = load_base(llama.name, dtype="bfloat16")
    pool = pool_of(experts)
    linear = "model.layers.1.self_attn.q_proj"
    assert linear in pool.linears
    h_QD = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    router = make_router("logo", by=by)
    routed = RoutedModel(half, pool, router)
    acting_pool = routed._acting_pool
    probe = Probe(linear, lambda: h_QD)
    weights_QK, indices_QK = router.mixture(acting_pool, [], probe)  # type: ignore[attr-defined]
    assert weights_QK.dtype == torch.float32
    exact = {e: f for e, f in enumerate(facts_of(experts, linear)) if f is not None}
    for h_D, weights_K, indices_K in zip(h_QD.double(), weights_QK, indices_QK, strict=True):
        scores = []
        for fact in exact.values():
            out_O = fact.delta_OD @ h_D
            p_O = out_O.softmax(dim=0)
            entropy = -(p_O * p_O.log()).sum() + 1e-6
            scores.append(float(out_O.norm() if by == "norm" else 1 / entropy))
        expected = [scores[e] / sum(scores) for e in indices_K.tolist()]
        assert weights_K.tolist() == pytest.approx(expected, rel=1e-4)


def test_the_mixture_of_a_query_is_not_rounded(llama: Base) -> None:
    half = load_base(llama.name, dtype="bfloat16")
    routed = RoutedModel(half, pool_of(make_experts(llama, 5)), make_router("logo"))
    with routed.recording(RoutingLog()) as log:
        routed.score([Question.encode(half, TEXTS[0], [" the goose"])])
    for name, weights_E in log.weights.items():
        assert float(weights_E.sum()) == pytest.approx(log.tokens[name], rel=1e-6)
