"""Check each way of routing and mixing one linear against a computation in float64."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.ops import RoutedExperts, TokenRule, compiled, mix
from phatgoose.ops.routing import GateScorer, gate_scorer
from tests.support.routed_cases import Case, cases, check, expected_sum, needs_kernel, operands_of


@needs_kernel
@settings(deadline=None, max_examples=200)
@given(cases, st.sampled_from([1, 2, 3]), st.sampled_from([torch.float32, torch.bfloat16]))
@example(Case(tokens=9, experts=166, rank=16, inputs=576, outputs=192), 2, torch.float32)
@example(Case(tokens=200, experts=3, rank=64, inputs=40, outputs=70), 2, torch.float32)
@example(Case(tokens=1, experts=1, rank=1, inputs=2, outputs=1), 1, torch.bfloat16)
def test_the_kernel_computes_the_formula(case: Case, threads: int, dtype: torch.dtype) -> None:
    check(case, "kernel", dtype, threads)


@settings(deadline=None, max_examples=150)
@given(cases, st.sampled_from([torch.float32, torch.bfloat16]))
def test_torch_computes_the_formula(case: Case, dtype: torch.dtype) -> None:
    check(case, "torch", dtype)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests of the GPU do this")
@settings(deadline=None, max_examples=10)
@given(cases)
@example(Case(tokens=70, experts=9, rank=5, inputs=20, outputs=18))  # more than are decoded at once
def test_the_kernels_for_cuda_compute_the_formula(case: Case) -> None:
    """Check in Triton's interpreter; a pass of no tokens starts no kernel."""
    check(replace(case, tokens=max(1, case.tokens)), "triton")


@pytest.mark.parametrize("way", [pytest.param("kernel", marks=needs_kernel), "torch"])
@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("of_gates", [True, False])
def test_gates_and_inputs_are_standardized_as_asked(
    way: str, of_input: bool, of_gates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check by the formula, on inputs and gates whose means are far from zero."""
    monkeypatch.setenv("PHATGOOSE_MIX", way)
    on = operands_of(Case(tokens=40, experts=12, top_k=12))
    gates_ED = torch.randn(12, 16, generator=torch.Generator().manual_seed(3)) + 2
    x_TD = on.x_TD + 3
    score = gate_scorer(gates_ED, 2.0, of_input=of_input, of_gates=of_gates)
    experts = RoutedExperts(on.lora_A_ERD, on.lora_B_EOR, replace(on.rule, score=score))
    _, weights_TK, kept_TK = experts.route_and_add(on.y_TO, x_TD)

    def standard(rows: Tensor) -> Tensor:
        return (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True, correction=0)

    left_TD, right_ED = x_TD.double(), gates_ED.double()
    left_TD = standard(left_TD) if of_input else left_TD
    right_ED = standard(right_ED) if of_gates else right_ED
    scores_TE = left_TD @ right_ED.T / (2 * 4)  # the temperature, and the root of 16
    expected_TK = scores_TE.softmax(1).gather(1, kept_TK)
    torch.testing.assert_close(weights_TK.double(), expected_TK, rtol=1e-4, atol=1e-5)


@needs_kernel
def test_inputs_may_lie_in_memory_in_any_way() -> None:
    on = operands_of(Case(tokens=20, inputs=32))
    experts = RoutedExperts(on.lora_A_ERD, on.lora_B_EOR, on.rule)
    wide_TD = torch.zeros(20, 80)
    rows, columns = wide_TD[:, 5:37], torch.zeros(32, 20).T
    wide_TO = torch.zeros(20, 12)
    plain_TO, *chosen = experts.route_and_add(on.y_TO.clone(), on.x_TD)
    for x_TD in (rows, columns):
        x_TD.copy_(on.x_TD)
        y_TO = wide_TO[:, 3:11].copy_(on.y_TO)
        found_TO, *found = experts.route_and_add(y_TO, x_TD)
        torch.testing.assert_close(found_TO, plain_TO)
        torch.testing.assert_close(found, chosen)
    assert not wide_TO[:, :3].any()
    assert not wide_TO[:, 11:].any()
    assert not wide_TD[:, :5].any()


@needs_kernel
def test_many_tokens_take_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    on = operands_of(Case(tokens=23, biased=True))
    experts = RoutedExperts(on.lora_A_ERD, on.lora_B_EOR, on.rule)
    at_once = experts.route_and_add(on.y_TO.clone(), on.x_TD, on.bias_TE)
    monkeypatch.setattr(compiled, "_MOST_NUMBERS", 2 * 4 * 5)  # of top_k times the rank
    in_parts = experts.route_and_add(on.y_TO.clone(), on.x_TD, on.bias_TE)
    torch.testing.assert_close(in_parts, at_once)


@pytest.mark.parametrize("way", [pytest.param("kernel", marks=needs_kernel), "torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_token_gets_the_mixture_of_its_query(
    way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check experts in any number and order, one twice, and weights that sum to anything."""
    on = operands_of(Case(tokens=30, experts=9, inputs=24, outputs=40), dtype)
    if way != "triton":
        monkeypatch.setenv("PHATGOOSE_MIX", way)
    experts = RoutedExperts(on.lora_A_ERD, on.lora_B_EOR)
    if way == "triton":
        pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 only")
        from phatgoose.ops.triton_experts import TritonExperts

        experts._kernel = TritonExperts(experts.lora_A_ERD, experts.lora_B_EOR)
    assert (experts._kernel is None) == (way == "torch")
    for top_k in (5, 1, 12):
        generator = torch.Generator().manual_seed(top_k)
        indices_QK = torch.randint(9, (7, top_k), generator=generator)
        weights_QK = torch.randn(7, top_k, generator=generator, dtype=torch.float64)
        query_T = torch.randint(7, (30,), generator=generator)
        y_TO = experts.add_mixtures(on.y_TO.clone(), on.x_TD, weights_QK, indices_QK, query_T)
        weights_TK, indices_TK = weights_QK[query_T], indices_QK[query_T]
        added_TO = expected_sum(Case(), on, weights_TK, indices_TK)
        expected_TO = on.y_TO.double() + added_TO
        rounding = 2e-6 if dtype == torch.float32 else 2**-7 * (1 + (way == "triton"))  # it cuts
        scale = float(added_TO.abs().max())
        torch.testing.assert_close(y_TO.double(), expected_TO, rtol=0, atol=rounding * scale)


@needs_kernel
@pytest.mark.parametrize("index", [-1, 6])
def test_an_index_of_no_expert_is_an_error(index: int) -> None:
    on = operands_of(Case())
    experts = RoutedExperts(on.lora_A_ERD, on.lora_B_EOR)
    indices_QK = torch.tensor([[0, 1], [2, index]])
    query_T = torch.tensor([0, 0, 1, 1, 0])
    with pytest.raises(IndexError, match="not one of 6 experts"):
        experts.add_mixtures(on.y_TO, on.x_TD, torch.ones(2, 2), indices_QK, query_T)


@pytest.mark.parametrize("way", [None, "dense", "grouped", "loop"])
def test_gradients_flow_through_inputs_factors_and_gates(
    way: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way:
        monkeypatch.setenv("PHATGOOSE_MIX", way)
    # All experts are kept, as another choice would be a jump.
    on = operands_of(Case(tokens=7, experts=5, top_k=5, inputs=8, outputs=4, rank=4))
    assert isinstance(on.rule.score, GateScorer)
    leaves = [on.x_TD, on.lora_A_ERD, on.lora_B_EOR, on.rule.score.gates_ED]

    def loss(x_TD: Tensor, A_ERD: Tensor, B_EOR: Tensor, gates_ED: Tensor) -> Tensor:
        rule = replace(on.rule, score=GateScorer(gates_ED, standardise=True))
        y_TO, _, _ = RoutedExperts(A_ERD, B_EOR, rule).route_and_add(on.y_TO.clone(), x_TD)
        return y_TO.square().sum()

    for i, leaf in enumerate(leaves):
        asked = [t.clone().requires_grad_(i == j) for j, t in enumerate(leaves)]
        loss(*asked).backward()
        gradient = asked[i].grad
        assert gradient is not None
        step = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1)) * 1e-3
        step -= step.mean(-1, keepdim=True)  # a gate's mean is zero
        ahead = loss(*(t + step if i == j else t for j, t in enumerate(leaves)))
        behind = loss(*(t - step if i == j else t for j, t in enumerate(leaves)))
        torch.testing.assert_close(
            (gradient * step).sum(), (ahead - behind) / 2, rtol=2e-2, atol=2e-3
        )


def test_gradients_flow_through_any_scorer_bias_and_weights() -> None:
    on = operands_of(Case(biased=True))
    assert on.bias_TE is not None
    learned_DE = torch.randn(16, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    bias_TE, weights_Q2 = on.bias_TE.requires_grad_(), torch.ones(1, 2, requires_grad=True)
    own = replace(on.rule, score=lambda x_TD: x_TD @ learned_DE)
    factors = on.lora_A_ERD, on.lora_B_EOR
    by_scorer = RoutedExperts(*factors, own).route_and_add(on.y_TO.clone(), on.x_TD)[0]
    by_bias = RoutedExperts(*factors, on.rule).route_and_add(on.y_TO.clone(), on.x_TD, bias_TE)[0]
    query_T, chosen_Q2 = torch.zeros(5, dtype=torch.int64), torch.tensor([[0, 1]])
    by_weights = RoutedExperts(*factors).add_mixtures(
        on.y_TO.clone(), on.x_TD, weights_Q2, chosen_Q2, query_T
    )
    for y_TO, leaf in ((by_scorer, learned_DE), (by_bias, bias_TE), (by_weights, weights_Q2)):
        (gradient,) = torch.autograd.grad(y_TO.square().sum(), leaf)
        assert gradient.abs().sum() > 0


@needs_kernel
def test_the_frozen_output_is_changed_in_place_only_without_gradients() -> None:
    on = operands_of(Case())
    experts = RoutedExperts(on.lora_A_ERD, on.lora_B_EOR, on.rule)
    y_TO = on.y_TO.clone().requires_grad_()
    found_TO, _, _ = experts.route_and_add(y_TO, on.x_TD)
    assert torch.equal(y_TO, on.y_TO)
    assert found_TO.requires_grad
    with torch.no_grad():
        again_TO, _, _ = experts.route_and_add(y_TO, on.x_TD)
    assert again_TO.data_ptr() == y_TO.data_ptr()
    torch.testing.assert_close(again_TO, found_TO)


@pytest.mark.parametrize("way", ["dense", "grouped", "loop"])
def test_second_derivatives_exist(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHATGOOSE_MIX", way)
    on = operands_of(Case(tokens=7, experts=9, inputs=8, outputs=4, rank=4))
    A_ERD = on.lora_A_ERD.requires_grad_()
    y_TO, _, _ = RoutedExperts(A_ERD, on.lora_B_EOR, on.rule).route_and_add(on.y_TO, on.x_TD)
    (first_ERD,) = torch.autograd.grad(y_TO.pow(3).sum(), A_ERD, create_graph=True)
    (second_ERD,) = torch.autograd.grad(first_ERD.square().sum(), A_ERD)
    assert second_ERD.isfinite().all()
    assert second_ERD.abs().sum() > 0


@pytest.mark.parametrize("way", ["grouped", "loop"])
def test_sums_of_half_precision_are_rounded_once(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check on experts whose outputs are exact: one number of each row of B."""
    monkeypatch.setenv("PHATGOOSE_MIX", way)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.ones(50, 8, dtype=torch.bfloat16)
    A_ERD = torch.zeros(40, 8, 8, dtype=torch.bfloat16)
    A_ERD[:, 0, 0] = 1
    B_EOR = torch.randn(40, 64, 8, generator=generator).bfloat16()
    indices_TK = torch.rand(50, 40, generator=generator).topk(8, dim=1).indices
    y_TO = mix(x_TD, A_ERD, B_EOR, indices_TK, torch.ones(50, 8))
    assert torch.equal(y_TO, B_EOR[indices_TK, :, 0].float().sum(dim=1).bfloat16())


@needs_kernel
@torch.no_grad()
def test_the_kernel_reads_operands_in_any_layout() -> None:
    """Check what routers of others, and callers, may give: views, other dtypes, other strides."""
    on = operands_of(Case(tokens=40, experts=12, inputs=24, outputs=16))
    assert isinstance(on.rule.score, GateScorer)
    factors, gates_ED = (on.lora_A_ERD, on.lora_B_EOR), on.rule.score.gates_ED

    def routed(rule: TokenRule, y_TO: Tensor, bias_TE: Tensor | None = None) -> list[Tensor]:
        experts = RoutedExperts(*factors, rule)
        assert experts._kernel is not None
        return list(experts.route_and_add(y_TO, on.x_TD, bias_TE))

    expected = routed(on.rule, on.y_TO.clone())
    plain = replace(on.rule, score=lambda x_TD: on.rule.score(x_TD).T.contiguous().T)
    torch.testing.assert_close(routed(plain, on.y_TO.clone()), expected)
    view_ED = gates_ED.T.contiguous().T.double()
    seen = replace(on.rule, score=GateScorer(view_ED, standardise=True))
    torch.testing.assert_close(routed(seen, on.y_TO.clone()), expected)
    few = slice(0, 5)  # the kernel computes the scores of few tokens itself
    found = RoutedExperts(*factors, seen).route_and_add(on.y_TO[few].clone(), on.x_TD[few])
    torch.testing.assert_close(list(found), [tensor[few] for tensor in expected])
    torch.testing.assert_close(routed(on.rule, on.y_TO.T.contiguous().T), expected)
    row_TO = on.y_TO[:1].expand(40, 16)
    torch.testing.assert_close(routed(on.rule, row_TO), routed(on.rule, row_TO.contiguous()))
    bias_1E = torch.linspace(-3, 3, 12).unsqueeze(0)
    one = routed(on.rule, on.y_TO.clone(), bias_1E)
    torch.testing.assert_close(routed(on.rule, on.y_TO.clone(), bias_1E.expand(40, 12)), one)
    torch.testing.assert_close(one[1], on.rule(on.x_TD, bias_1E)[0])


@needs_kernel
@torch.no_grad()
def test_operands_that_do_not_fit_are_refused() -> None:
    on = operands_of(Case(tokens=6, experts=5, inputs=16, outputs=8))
    experts = RoutedExperts(on.lora_A_ERD, on.lora_B_EOR, on.rule)
    mixture = torch.ones(2, 3), torch.tensor([[0, 1, 2], [3, 4, 0]], dtype=torch.int32)
    by_query = RoutedExperts(on.lora_A_ERD, on.lora_B_EOR)
    query_T = torch.tensor([0, 0, 1, 1, 1, 0])
    with pytest.raises(PhatgooseError, match=r"inputs \[6, 9\].* do not fit experts of 16 x 8"):
        by_query.add_mixtures(on.y_TO, on.x_TD[:, :9], *mixture, query_T)
    with pytest.raises(PhatgooseError, match="and 2 rows of weights do not fit"):
        by_query.add_mixtures(on.y_TO, on.x_TD, *mixture, query_T[:2])
    with pytest.raises(RuntimeError):
        experts.route_and_add(on.y_TO, on.x_TD, torch.zeros(4, 5))
    narrow = replace(on.rule, score=lambda x_TD: x_TD[:, :4])
    with pytest.raises(PhatgooseError, match=r"returned \[6, 4\] scores for 6 tokens and 5 exper"):
        RoutedExperts(on.lora_A_ERD, on.lora_B_EOR, narrow).route_and_add(on.y_TO, on.x_TD)
    # Inputs of another dtype than the factors are PyTorch's to refuse: nothing is overwritten.
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(RuntimeError, match=r"dtype|scalar type"):
            experts.route_and_add(on.y_TO.to(dtype), on.x_TD.to(dtype))
    with pytest.raises(PhatgooseError, match="top_k=0: a token keeps no expert"):
        replace(on.rule, top_k=0)
    with pytest.raises(PhatgooseError, match="factors are mixed by token"):
        RoutedExperts(on.lora_A_ERD, on.lora_B_EOR, mixes_factors=True)


@needs_kernel
def test_threads_may_mix_different_numbers_of_experts() -> None:
    on = operands_of(Case(tokens=2000, experts=24, inputs=64, outputs=64))
    experts = RoutedExperts(on.lora_A_ERD, on.lora_B_EOR)
    query_T = torch.zeros(2000, dtype=torch.int64)

    def mixed(kept: int) -> Tensor:
        indices_QK = torch.arange(kept).unsqueeze(0)
        weights_QK = torch.ones(1, kept)
        return experts.add_mixtures(on.y_TO.clone(), on.x_TD, weights_QK, indices_QK, query_T)

    counts = [2, 20] * 25
    expected = {kept: mixed(kept) for kept in (2, 20)}
    with ThreadPoolExecutor(4) as threads:
        for kept, found in zip(counts, threads.map(mixed, counts), strict=True):
            assert torch.equal(found, expected[kept])


@needs_kernel
@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("absent", [0.0, 0.4])
def test_scores_that_are_not_numbers_give_what_pytorch_gives(equal: bool, absent: float) -> None:
    on = operands_of(Case(tokens=3, experts=6, top_k=2, equal=equal, absent=absent))
    bias_TE = torch.zeros(3, 6)
    bias_TE[0, 2] = torch.nan
    bias_TE[1] = torch.nan
    bias_TE[2] = -torch.inf
    experts = RoutedExperts(on.lora_A_ERD, on.lora_B_EOR, on.rule)
    assert experts._kernel is not None
    _, weights_TK, _ = experts.route_and_add(on.y_TO.clone(), on.x_TD, bias_TE)
    expected_TK, _ = on.rule(on.x_TD, bias_TE)
    rows = slice(0, 2 if absent else 3)  # which of equal scores is kept is up to either
    torch.testing.assert_close(weights_TK[rows], expected_TK[rows], equal_nan=True)
