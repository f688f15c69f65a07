"""Check each way of routing and mixing one linear against a computation in float64.

Shape suffixes: T tokens, D input features, O output features, E experts, K experts kept, R rank.
"""

import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.ops import RoutedExperts, TokenRule, compiled, mixing, routed
from phatgoose.ops.routing import GateScorer, gate_scorer

if importlib.util.find_spec("triton"):
    from phatgoose.ops import triton_experts

KERNEL = compiled.find_kernel()
needs_kernel = pytest.mark.skipif(isinstance(KERNEL, str), reason=f"no kernel, as {KERNEL}")


@dataclass(frozen=True)
class Case:
    """The sizes of a linear and its experts, and the rule of a router."""

    tokens: int = 5
    experts: int = 6
    top_k: int = 2
    rank: int = 4
    inputs: int = 16
    outputs: int = 8
    seed: int = 0
    standardise: bool = True
    absolute: bool = False
    equal: bool = False
    mixes_factors: bool = False
    biased: bool = False
    absent: float = 0.0
    one_expert: bool = False


cases = st.builds(
    Case,
    tokens=st.integers(0, 40),
    experts=st.integers(1, 50),
    top_k=st.integers(1, 8),
    rank=st.integers(1, 70),
    inputs=st.integers(2, 90),
    outputs=st.integers(1, 150),
    seed=st.integers(0, 10**6),
    standardise=st.booleans(),
    absolute=st.booleans(),
    equal=st.booleans(),
    mixes_factors=st.booleans(),
    biased=st.booleans(),
    absent=st.sampled_from([0.0, 0.4, 1.0]),
    one_expert=st.booleans(),
)


@dataclass(frozen=True)
class Operands:
    """What one call reads."""

    x_TD: Tensor
    y_TO: Tensor
    lora_A_ERD: Tensor
    lora_B_EOR: Tensor
    bias_TE: Tensor | None
    rule: TokenRule


def operands_of(case: Case, dtype: torch.dtype = torch.float32) -> Operands:
    generator = torch.Generator().manual_seed(case.seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    gates_ED = random(case.experts, case.inputs)
    bias_TE = random(case.tokens, case.experts) if case.biased else None
    if case.one_expert:  # every token goes there
        bias_TE = torch.zeros(case.tokens, case.experts)
        bias_TE[:, case.seed % case.experts] = 50.0
    absent_E = torch.rand(case.experts, generator=generator) < case.absent
    score = replace(gate_scorer(gates_ED, of_input=case.standardise), absolute=case.absolute)
    return Operands(
        x_TD=(random(case.tokens, case.inputs) + random(case.tokens, 1)).to(dtype),
        y_TO=random(case.tokens, case.outputs).to(dtype),
        lora_A_ERD=(random(case.experts, case.rank, case.inputs) / case.inputs**0.5).to(dtype),
        lora_B_EOR=(random(case.experts, case.outputs, case.rank) / case.rank**0.5).to(dtype),
        bias_TE=bias_TE,
        rule=TokenRule(
            score=score,
            top_k=case.top_k,
            equal=case.equal,
            biased=bias_TE is not None,
            absent_E=absent_E if case.absent else None,
        ),
    )


def expected_scores(case: Case, on: Operands) -> Tensor:
    """Return the scores in float64, by the formula."""
    assert isinstance(on.rule.score, GateScorer)
    x_TD = on.x_TD.double()
    if case.standardise:
        centred_TD = x_TD - x_TD.mean(1, keepdim=True)
        x_TD = centred_TD / ((centred_TD**2).mean(1, keepdim=True) + 1e-5).sqrt()
    scores_TE = x_TD @ on.rule.score.gates_ED.double().T
    scores_TE = scores_TE.abs() if case.absolute else scores_TE
    if on.bias_TE is not None:
        scores_TE = scores_TE + on.bias_TE.double()
    if on.rule.absent_E is not None:
        scores_TE[:, on.rule.absent_E] = -torch.inf
    return scores_TE


def expected_weights(case: Case, scores_TE: Tensor, kept_TK: Tensor) -> Tensor:
    """Return the weights of the kept experts in float64."""
    kept_scores_TK = scores_TE.gather(1, kept_TK)
    present_TK = (kept_scores_TK > -torch.inf).double()
    if case.equal:
        return present_TK / present_TK.sum(1, keepdim=True).clamp(min=1)
    share_TK = (kept_scores_TK - scores_TE.logsumexp(1, keepdim=True)).exp()
    weights_TK = share_TK / (share_TK.sum(1, keepdim=True) + 1e-6)
    return torch.where(present_TK > 0, weights_TK, 0.0)


def expected_sum(case: Case, on: Operands, weights_TK: Tensor, kept_TK: Tensor) -> Tensor:
    """Return what is added in float64, token by token."""
    rows = []
    for x_D, kept_K, weights_K in zip(on.x_TD.double(), kept_TK, weights_TK.double(), strict=True):
        A_KRD, B_KOR = on.lora_A_ERD[kept_K].double(), on.lora_B_EOR[kept_K].double()
        if case.mixes_factors:
            A_RD = torch.einsum("k,krd->rd", weights_K, A_KRD)
            rows.append(torch.einsum("k,kor->or", weights_K, B_KOR) @ (A_RD @ x_D))
        else:
            rows.append(torch.einsum("k,kor,krd,d->o", weights_K, B_KOR, A_KRD, x_D))
    return torch.stack(rows) if rows else on.y_TO.double()


def check(case: Case, way: str, dtype: torch.dtype = torch.float32, threads: int = 1) -> None:
    """Route and mix one case in one way, and compare."""
    on = operands_of(case, dtype)
    if way == "triton":
        triton = triton_experts.TritonExperts(
            *mixing.packed(on.lora_A_ERD, on.lora_B_EOR),
            on.rule,
            mixes_factors=case.mixes_factors,
        )
        y_TO = on.y_TO.clone()
        compare(case, on, way, (y_TO, *triton.route_and_add(y_TO, on.x_TD, on.bias_TE)))
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHATGOOSE_MIX", way)
        experts = RoutedExperts(
            on.lora_A_ERD, on.lora_B_EOR, on.rule, mixes_factors=case.mixes_factors
        )
        assert (experts._kernel is not None) == (way == "kernel")
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = experts.route_and_add(on.y_TO.clone(), on.x_TD, on.bias_TE)
        finally:
            torch.set_num_threads(before)
    compare(case, on, way, found)


def compare(case: Case, on: Operands, way: str, found: tuple[Tensor, Tensor, Tensor]) -> None:
    """Compare the sum, the weights and the experts of one call with the formula."""
    y_TO, weights_TK, kept_TK = found
    dtype = on.x_TD.dtype
    kept = min(case.top_k, case.experts)
    assert weights_TK.shape == kept_TK.shape == (case.tokens, kept)
    assert (weights_TK.dtype, kept_TK.dtype, y_TO.dtype) == (torch.float32, torch.int64, dtype)
    scores_TE = expected_scores(case, on)
    best_TK = scores_TE.topk(kept, dim=1).values
    tolerance = (
        1e-5 * float(scores_TE[scores_TE.isfinite()].abs().max().clamp(min=1.0))
        if (scores_TE.isfinite().any())
        else 0.0
    )
    torch.testing.assert_close(scores_TE.gather(1, kept_TK), best_TK, rtol=0, atol=tolerance)
    assert all(len(set(row)) == kept for row in kept_TK.tolist())
    expected_TK = expected_weights(case, scores_TE, kept_TK)
    torch.testing.assert_close(weights_TK.double(), expected_TK, rtol=1e-4, atol=2e-5)
    added_TO = expected_sum(case, on, weights_TK, kept_TK)
    if case.tokens == 0:
        return
    expected_TO = on.y_TO.double() + added_TO
    scale = float(on.y_TO.double().abs().max() + added_TO.abs().max())
    # PyTorch's operators round to bfloat16 in between.
    rounding = 2e-6 if dtype == torch.float32 else 2**-8 if way == "kernel" else 2**-6
    torch.testing.assert_close(y_TO.double(), expected_TO, rtol=0, atol=rounding * scale)


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


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Let a test change what decides about the kernel, and forget what was decided."""
    routed._say.cache_clear()
    compiled.find_kernel.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    compiled.find_kernel.cache_clear()


@pytest.mark.parametrize("way", ["dense", "grouped", "loop"])
@pytest.mark.parametrize("mixes_factors", [False, True])
def test_the_environment_chooses_one_of_torchs_ways(
    way: str, mixes_factors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[str] = set()

    def spy(name: str) -> mixing.Product:
        product = mixing._PRODUCTS[name]

        def call(x_ND: Tensor, weight_EOD: Tensor, counts_E: Tensor) -> Tensor:
            used.add(name)
            return product(x_ND, weight_EOD, counts_E)

        return call

    monkeypatch.setattr(mixing, "_PRODUCTS", {name: spy(name) for name in mixing._PRODUCTS})
    check(Case(tokens=20, experts=12, mixes_factors=mixes_factors), way)
    assert used == ({way} if way != "dense" else set())


def test_an_unknown_way_is_refused(forget: pytest.MonkeyPatch) -> None:
    forget.setenv("PHATGOOSE_MIX", "fast")
    with pytest.raises(PhatgooseError, match=r"PHATGOOSE_MIX=fast: it must be one of kernel, "):
        check_default()


def check_default() -> RoutedExperts:
    on = operands_of(Case())
    return RoutedExperts(on.lora_A_ERD, on.lora_B_EOR, on.rule)


@pytest.mark.parametrize("wanted", [None, "kernel"])
def test_without_a_kernel_torch_computes_and_it_is_said_once(
    wanted: str | None, forget: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    forget.setattr(compiled, "_MODULES", {})
    forget.setattr(compiled, "_ANY", "phatgoose_cpu_of_nobody")
    if wanted:
        forget.setenv("PHATGOOSE_MIX", wanted)
        with pytest.raises(
            PhatgooseError, match=r"MIX=kernel: no kernel for the CPU, as .*compiler"
        ):
            check_default()
        return
    forget.delenv("PHATGOOSE_MIX", raising=False)
    with caplog.at_level(logging.WARNING, logger="phatgoose"):
        assert check_default()._kernel is None
        assert check_default()._kernel is None
    assert [record.message for record in caplog.records] == [
        "routing takes longer: no kernel for the CPU, as it was not compiled when phatgoose was "
        "installed. Install phatgoose again where a C++ compiler is."
    ]
    assert routed.way_on("cpu") == "torch"


@needs_kernel
def test_a_kernel_kernel_from_other_source_is_not_used(
    forget: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = tmp_path / "cpu_kernels.cpp"
    other.write_text("// changed since")
    forget.setattr(compiled, "_SOURCES", [other])
    reason = compiled.find_kernel()
    assert isinstance(reason, str)
    assert reason.endswith("was compiled from another version of cpu_kernels.cpp")


@needs_kernel
def test_a_library_that_is_not_the_kernel_is_not_used(
    forget: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "phatgoose_cpu_broken.py").write_text("")
    forget.syspath_prepend(tmp_path)
    forget.setattr(compiled, "_MODULES", {})
    forget.setattr(compiled, "_ANY", "phatgoose_cpu_broken")
    reason = compiled.find_kernel()
    assert isinstance(reason, str)
    assert "cannot be loaded" in reason


@needs_kernel
def test_every_instruction_set_computes_the_formula(forget: pytest.MonkeyPatch) -> None:
    """Check those that this processor understands; the largest is checked elsewhere."""
    order = ["DEFAULT", "AVX2", "AVX512"]
    here = order.index(torch.backends.cpu.get_cpu_capability())
    builds = set()
    for capability in order[: here + 1]:
        forget.setattr(torch.backends.cpu, "get_cpu_capability", lambda now=capability: now)
        compiled.find_kernel.cache_clear()
        kernel = compiled.find_kernel()
        assert not isinstance(kernel, str)
        builds.add(kernel.build)
        for rank, experts, tokens in [(16, 166, 9), (8, 20, 200), (37, 5, 33), (4, 1, 1)]:
            check(Case(tokens, experts, rank=rank, inputs=67, outputs=131), "kernel", threads=2)
    assert len(builds) == here + 1


@pytest.mark.parametrize("way", [pytest.param("kernel", marks=needs_kernel), "torch"])
@pytest.mark.parametrize("of_input", [True, False])
@pytest.mark.parametrize("of_gates", [True, False])
def test_gates_and_inputs_are_standardized_as_asked(
    way: str, of_input: bool, of_gates: bool, forget: pytest.MonkeyPatch
) -> None:
    """Check by the formula, on inputs and gates whose means are far from zero."""
    forget.setenv("PHATGOOSE_MIX", way)
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


@pytest.mark.parametrize("mixes_factors", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_chosen_elsewhere_are_added(mixes_factors: bool, dtype: torch.dtype) -> None:
    """Check indices in any number and order, an expert twice, and weights that sum to anything."""
    on = operands_of(Case(tokens=30, experts=9, inputs=24, outputs=40), dtype)
    experts = RoutedExperts(on.lora_A_ERD, on.lora_B_EOR, mixes_factors=mixes_factors)
    for top_k in (5, 1, 12):
        generator = torch.Generator().manual_seed(top_k)
        indices_TK = torch.randint(9, (30, top_k), generator=generator)
        weights_TK = torch.randn(30, top_k, generator=generator)
        y_TO = experts.add(on.y_TO.clone(), on.x_TD, weights_TK, indices_TK)
        added_TO = expected_sum(Case(mixes_factors=mixes_factors), on, weights_TK, indices_TK)
        expected_TO = on.y_TO.double() + added_TO
        rounding = 2e-6 if dtype == torch.float32 else 2**-7
        scale = float(added_TO.abs().max())
        torch.testing.assert_close(y_TO.double(), expected_TO, rtol=0, atol=rounding * scale)


@needs_kernel
@pytest.mark.parametrize("index", [-1, 6])
def test_an_index_of_no_expert_is_an_error(index: int) -> None:
    on = operands_of(Case())
    experts = RoutedExperts(on.lora_A_ERD, on.lora_B_EOR)
    indices_TK = torch.tensor([[0, 1], [2, index], [3, 4], [5, 0], [1, 2]])
    with pytest.raises(IndexError, match="not one of 6 experts"):
        experts.add(on.y_TO, on.x_TD, torch.ones(5, 2), indices_TK)


def test_gradients_flow_through_inputs_factors_and_gates() -> None:
    # All experts are kept, as another choice would be a jump.
    on = operands_of(Case(tokens=7, experts=5, top_k=5, inputs=6, outputs=5, rank=3))
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
    bias_TE, weights_TK = on.bias_TE.requires_grad_(), torch.ones(5, 2, requires_grad=True)
    own = replace(on.rule, score=lambda x_TD: x_TD @ learned_DE)
    factors = on.lora_A_ERD, on.lora_B_EOR
    by_scorer = RoutedExperts(*factors, own).route_and_add(on.y_TO.clone(), on.x_TD)[0]
    by_bias = RoutedExperts(*factors, on.rule).route_and_add(on.y_TO.clone(), on.x_TD, bias_TE)[0]
    chosen_TK = torch.tensor([[0, 1]]).repeat(5, 1)
    by_weights = RoutedExperts(*factors).add(on.y_TO.clone(), on.x_TD, weights_TK, chosen_TK)
    for y_TO, leaf in ((by_scorer, learned_DE), (by_bias, bias_TE), (by_weights, weights_TK)):
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
