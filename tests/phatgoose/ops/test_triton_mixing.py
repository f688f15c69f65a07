"""Compare the Triton kernels that mix with float64."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.triton_cases import (
    DEVICE,
    DTYPES,
    UNIT,
    assert_close,
    expected_mix,
    few,
    generator_of,
    make_case,
    sizes,
)

pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 only")
from phatgoose.ops import triton_kernels, triton_operators


@few
@given(sizes)
def test_mix_adds_the_chosen_experts_outputs(sizes: dict[str, Any]) -> None:
    y_TO, *case = make_case(**sizes)
    result_TO = y_TO.clone()
    triton_kernels.mix_(result_TO, *case)
    assert_close(result_TO, expected_mix(y_TO, *case), y_TO, *case)


@few
@given(sizes)
def test_factors_are_mixed_before_they_are_multiplied(sizes: dict[str, Any]) -> None:
    y_TO, x_TD, A_EDR, B_ERO, indices_TK, weights_TK = make_case(**sizes)
    result_TO = y_TO.clone()
    triton_kernels.mix_factors_(result_TO, x_TD, A_EDR, B_ERO, indices_TK, weights_TK)
    A_TDR = torch.einsum("tk,tkdr->tdr", weights_TK.double(), A_EDR[indices_TK].double())
    B_TRO = torch.einsum("tk,tkro->tro", weights_TK.double(), B_ERO[indices_TK].double())
    added_TO = torch.einsum("td,tdr,tro->to", x_TD.double(), A_TDR, B_TRO)
    size_TO = y_TO.double().abs() + torch.einsum(
        "td,tdr,tro->to",
        x_TD.double().abs(),
        torch.einsum("tk,tkdr->tdr", weights_TK.double(), A_EDR[indices_TK].double().abs()),
        torch.einsum("tk,tkro->tro", weights_TK.double(), B_ERO[indices_TK].double().abs()),
    )
    error_TO = (result_TO.double() - y_TO.double() - added_TO).abs()
    assert (error_TO <= 3 * UNIT[y_TO.dtype] * size_TO).all()


@few
@given(sizes=sizes, queries=st.integers(1, 4))
def test_the_tokens_of_a_query_share_its_mixture(sizes: dict[str, Any], queries: int) -> None:
    y_TO, x_TD, A_EDR, B_ERO, *_ = make_case(**sizes)
    generator = generator_of(sizes["seed"])
    # Tokens of a query need not be neighbors, nor has every query tokens.
    query_T = torch.randint(queries, (sizes["tokens"],), generator=generator).to(DEVICE)
    kept_QK = torch.randn(queries, sizes["experts"], generator=generator).topk(
        min(5 * sizes["top_k"], sizes["experts"])
    )
    indices_QK, weights_QK = kept_QK.indices.to(DEVICE), kept_QK.values.to(DEVICE)
    result_TO = y_TO.clone()
    triton_kernels.mix_queries_(result_TO, x_TD, A_EDR, B_ERO, query_T, indices_QK, weights_QK)
    case = y_TO, x_TD, A_EDR, B_ERO, indices_QK[query_T], weights_QK[query_T]
    assert_close(result_TO, expected_mix(*case), *case)


@pytest.mark.parametrize("top_k", [1, 2])
def test_all_tokens_may_go_to_one_expert(top_k: int) -> None:
    y_TO, x_TD, A_EDR, B_ERO, indices_TK, weights_TK = make_case(
        tokens=75, experts=3, top_k=top_k, rank=4, inputs=20, outputs=17
    )
    indices_TK[:, 0], indices_TK[:, 1:] = 1, 2
    A_EDR[0], B_ERO[0] = float("nan"), float("nan")  # an expert that no token chose is not read
    result_TO = y_TO.clone()
    triton_kernels.mix_(result_TO, x_TD, A_EDR, B_ERO, indices_TK, weights_TK)
    A_EDR[0], B_ERO[0] = 0, 0
    case = y_TO, x_TD, A_EDR, B_ERO, indices_TK, weights_TK
    assert_close(result_TO, expected_mix(*case), *case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_over_choices_is_rounded_once(dtype: torch.dtype) -> None:
    large = 2.0 ** (8 if dtype == torch.bfloat16 else 11)
    A_EDR = torch.ones(2, 16, 2, dtype=dtype, device=DEVICE) / 16
    B_ERO = torch.tensor([[[large], [1.0]], [[-large], [0.0]]], dtype=dtype, device=DEVICE)
    x_TD = torch.ones(3, 16, dtype=dtype, device=DEVICE)
    y_TO = torch.zeros(3, 1, dtype=dtype, device=DEVICE)
    indices_TK = torch.tensor([[0, 1], [1, 0], [0, 1]], device=DEVICE)
    weights_TK = torch.ones(3, 2, device=DEVICE)
    triton_kernels.mix_(y_TO, x_TD, A_EDR, B_ERO, indices_TK, weights_TK)
    assert y_TO.flatten().tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_and_outputs_may_lie_anywhere(dtype: torch.dtype) -> None:
    y_TO, x_TD, A_EDR, B_ERO, *choice = make_case(
        tokens=6, experts=4, top_k=2, rank=4, inputs=20, outputs=10, dtype=dtype
    )
    gates_ED = torch.randn(4, 20, generator=generator_of(0)).to(DEVICE)
    spread_TD = torch.zeros(20, 14, dtype=dtype, device=DEVICE).T[1:13:2]
    spread_TD.copy_(x_TD)
    frame_TO = torch.full((8, 25), 7.0, dtype=dtype, device=DEVICE)
    result_TO = frame_TO[1:7, 2:22:2]
    result_TO.copy_(y_TO)
    assert not spread_TD.is_contiguous()
    assert not result_TO.is_contiguous()
    assert torch.equal(triton_kernels.inverse_std(spread_TD), triton_kernels.inverse_std(x_TD))
    scores_TE = triton_kernels.scores(x_TD, gates_ED)
    assert torch.equal(triton_kernels.scores(spread_TD, gates_ED), scores_TE)
    apart_TE = torch.zeros(6, 8, device=DEVICE)[:, ::2].copy_(scores_TE)
    for one, other in zip(
        triton_kernels.select(apart_TE, 2), triton_kernels.select(scores_TE, 2), strict=True
    ):
        assert torch.equal(one, other)
    triton_kernels.mix_(result_TO, spread_TD, A_EDR, B_ERO, *choice)
    case = y_TO, x_TD, A_EDR, B_ERO, *choice
    assert_close(result_TO, expected_mix(*case), *case)
    result_TO.copy_(y_TO)
    weights_TK, indices_TK = triton_kernels.decode_(
        result_TO, spread_TD, gates_ED, A_EDR, B_ERO, 2, True
    )
    case = y_TO, x_TD, A_EDR, B_ERO, indices_TK, weights_TK
    assert_close(result_TO, expected_mix(*case), *case)
    # The elements around those of the result are as they were.
    result_TO.fill_(7.0)
    assert (frame_TO == 7.0).all()


@settings(few, max_examples=40)
@given(
    tokens=st.integers(1, 90),
    groups=st.integers(1, 9),
    top_k=st.integers(1, 4),
    skew=st.sampled_from([0.0, 3.0, 100.0]),
    seed=st.integers(0, 10**6),
)
def test_every_pair_is_in_one_block_of_its_expert(
    tokens: int, groups: int, top_k: int, skew: float, seed: int
) -> None:
    generator = generator_of(seed)
    chances_E = (torch.rand(groups, generator=generator) * skew).softmax(dim=0)
    choices = chances_E.multinomial(tokens * top_k, replacement=True, generator=generator)
    indices_TK = choices.view(tokens, top_k).to(DEVICE)
    assert_grouped(indices_TK, groups)


def test_pairs_are_sorted_over_several_reads() -> None:
    """Check 10,000 pairs of 5,000 tokens: programs read 4,096 at once."""
    indices_TK = torch.randint(3, (5000, 2), generator=generator_of(0)).to(DEVICE)
    assert_grouped(indices_TK, 3)
    assert_grouped(indices_TK[:, 1:], 3)


def assert_grouped(indices_TK: Tensor, groups: int) -> None:
    top_k = indices_TK.shape[1]
    order_N, blocks_3, others = triton_operators._group(indices_TK, groups, 16)
    order, flat = order_N.tolist(), indices_TK.flatten().tolist()
    assert sorted(order) == list(range(len(flat)))
    seen = []
    for block, (expert, begin, end) in enumerate(blocks_3.T.tolist()):
        if expert < 0:
            continue
        pairs = order[begin:end]
        assert 0 < len(pairs) <= 16
        assert pairs == sorted(pairs)
        assert {flat[pair] for pair in pairs} == {expert}
        # Blocks after the first `others` hold the tokens' last choices, and nothing else does.
        assert {pair % top_k == top_k - 1 for pair in pairs} == {block >= others}
        seen += pairs
    assert sorted(seen) == sorted(order)
