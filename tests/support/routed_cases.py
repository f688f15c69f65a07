"""Inputs of one routed linear, and what it must compute from them, in float64.

Shape suffixes: T tokens, D input features, O output features, E experts, K experts kept, R rank.
"""

import importlib.util
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.ops import RoutedExperts, TokenRule, compiled, mixing
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
