import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.ops import mix, mix_reference, route, standardise, top_k_softmax
from phatgoose.ops.mixing import _product_grouped, _product_loop, _way, mix_factors

sizes = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 12),
        "experts": st.integers(1, 40),
        "top_k": st.integers(1, 5),
        "rank": st.integers(1, 9),
        "inputs": st.integers(1, 24),
        "outputs": st.integers(1, 24),
        "seed": st.integers(0, 10**6),
    }
)


def make_case(**sizes: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the arguments of `mix` in float32: inputs, factors, chosen experts and weights."""
    generator = torch.Generator().manual_seed(sizes["seed"])
    tokens, experts, top_k = (sizes[name] for name in ("tokens", "experts", "top_k"))
    rank, inputs, outputs = (sizes[name] for name in ("rank", "inputs", "outputs"))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    kept_TK = random(tokens, experts).topk(min(top_k, experts), dim=1)
    factors = random(experts, rank, inputs), random(experts, outputs, rank)
    return random(tokens, inputs), *factors, kept_TK.indices, kept_TK.values.softmax(dim=1)


@settings(deadline=None, max_examples=150)
@given(sizes)
def test_mix_equals_the_reference(sizes: dict[str, int]) -> None:
    x_TD, A_ERD, B_EOR, indices_TK, weights_TK = make_case(**sizes)
    y_TO = mix(x_TD, A_ERD, B_EOR, indices_TK, weights_TK, scale=0.5)
    expected_TO = mix_reference(x_TD, A_ERD, B_EOR, indices_TK, weights_TK, scale=0.5)
    torch.testing.assert_close(y_TO, expected_TO, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=50)
@given(sizes)
def test_mix_in_bfloat16_is_close_to_the_float32_reference(sizes: dict[str, int]) -> None:
    case: list[Any] = [t.bfloat16() if t.is_floating_point() else t for t in make_case(**sizes)]
    y_TO = mix(*case)
    assert y_TO.dtype == torch.bfloat16
    expected_TO = mix_reference(*(t.float() if t.is_floating_point() else t for t in case))
    tolerance = 0.05 * max(1.0, float(expected_TO.abs().max()))
    torch.testing.assert_close(y_TO.float(), expected_TO, rtol=0.05, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[3, 0, 2, 0, 0, 4], [0, 0, 0, 0, 0, 9], [9, 0], [1], [0, 5, 0]])
def test_both_products_agree_where_experts_have_no_rows(
    counts: list[int], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(sum(counts), 16, generator=generator).to(dtype)
    weight_EOD = torch.randn(len(counts), 24, 16, generator=generator).to(dtype)
    expert_N = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    expected_NO = torch.einsum("nd,nod->no", x_ND.float(), weight_EOD[expert_N].float())
    for product in (_product_grouped, _product_loop):
        y_NO = product(x_ND, weight_EOD, torch.tensor(counts))
        assert y_NO.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 0.05
        torch.testing.assert_close(y_NO.float(), expected_NO, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("tokens", "experts", "rank", "way"),
    [
        (8, 9, 4, "grouped"),
        (8, 9, 3, "loop"),
        (1, 40, 4, "loop"),
        (200, 12, 16, "grouped"),
        (16, 8, 3, "dense"),
        (17, 8, 3, "loop"),
        (200, 4, 3, "dense"),
        (257, 8, 4, "loop"),
        (1, 1, 4, "dense"),
    ],
)
def test_every_way_of_mixing_is_used(tokens: int, experts: int, rank: int, way: str) -> None:
    case = make_case(
        tokens=tokens, experts=experts, top_k=2, rank=rank, inputs=16, outputs=8, seed=1
    )
    assert _way(*case[1:4]) == way
    torch.testing.assert_close(mix(*case), mix_reference(*case), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=100)
@given(sizes)
def test_factors_are_mixed_before_they_are_multiplied(sizes: dict[str, int]) -> None:
    x_TD, A_ERD, B_EOR, indices_TK, weights_TK = make_case(**sizes)
    y_TO = mix_factors(x_TD, A_ERD, B_EOR, indices_TK, weights_TK, scale=0.5)
    for t, (chosen, weights) in enumerate(zip(indices_TK, weights_TK, strict=True)):
        A_RD = torch.einsum("k,krd->rd", weights, A_ERD[chosen])
        B_OR = torch.einsum("k,kor->or", weights, B_EOR[chosen])
        expected_O = 0.5 * B_OR @ (A_RD @ x_TD[t])
        torch.testing.assert_close(y_TO[t], expected_O, rtol=1e-4, atol=1e-4)


def test_mix_reads_a_mapped_pool_at_any_address() -> None:
    x_TD, A_ERD, B_EOR, indices_TK, weights_TK = make_case(
        tokens=8, experts=3, top_k=2, rank=4, inputs=16, outputs=8, seed=0
    )
    shifted_ERD = torch.zeros(A_ERD.numel() + 1)[1:].view_as(A_ERD).copy_(A_ERD)
    assert shifted_ERD.data_ptr() % 16
    y_TO = mix(x_TD, shifted_ERD, B_EOR, indices_TK, weights_TK)
    torch.testing.assert_close(y_TO, mix(x_TD, A_ERD, B_EOR, indices_TK, weights_TK))


@pytest.mark.parametrize("rank", [3, 4])
def test_an_expert_that_no_token_chose_is_not_read(rank: int) -> None:
    x_TD, A_ERD, B_EOR, _, _ = make_case(
        tokens=6, experts=6, top_k=1, rank=rank, inputs=16, outputs=8, seed=0
    )
    indices_TK = torch.tensor([[0], [2], [2], [0], [0], [2]])
    A_ERD[1] = B_EOR[1] = float("nan")
    assert mix(x_TD, A_ERD, B_EOR, indices_TK, torch.ones(6, 1)).isfinite().all()


@pytest.mark.parametrize("rank", [3, 4])
def test_no_tokens_give_no_rows(rank: int) -> None:
    A_ERD, B_EOR = torch.zeros(3, rank, 16), torch.zeros(3, 8, rank)
    indices_TK, weights_TK = torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2)
    assert mix(torch.zeros(0, 16), A_ERD, B_EOR, indices_TK, weights_TK).shape == (0, 8)


@settings(deadline=None)
@given(
    experts=st.integers(1, 30),
    top_k=st.integers(1, 35),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_routing_weights_sum_to_one_and_are_sorted(
    experts: int, top_k: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(5, 16, generator=generator).to(dtype)
    gates_ED = torch.randn(experts, 16, generator=generator).to(dtype)
    weights_TK, indices_TK = route(x_TD, gates_ED, top_k)
    assert weights_TK.shape == indices_TK.shape == (5, min(top_k, experts))
    assert weights_TK.dtype == torch.float32
    assert (weights_TK >= 0).all()
    assert (weights_TK.diff(dim=1) <= 0).all()
    assert all(len(set(row)) == len(row) for row in indices_TK.tolist())
    torch.testing.assert_close(weights_TK.sum(dim=1), torch.ones(5), rtol=1e-4, atol=1e-4)


def test_tied_experts_share_the_weight_and_are_kept_once() -> None:
    x_TD, gate_D = (
        torch.randn(4, 16, generator=torch.Generator().manual_seed(0)),
        torch.arange(16.0),
    )
    weights_TK, indices_TK = route(x_TD, gate_D.repeat(5, 1), top_k=2)
    torch.testing.assert_close(weights_TK, torch.full((4, 2), 0.5), rtol=1e-4, atol=0)
    assert (indices_TK[:, 0] != indices_TK[:, 1]).all()


def test_gates_of_zeros_do_not_give_nan() -> None:
    weights_TK, _ = route(torch.randn(3, 8), torch.zeros(4, 8), top_k=2)
    torch.testing.assert_close(weights_TK, torch.full((3, 2), 0.5), rtol=1e-4, atol=0)


def test_large_scores_do_not_overflow() -> None:
    weights_TK, indices_TK = top_k_softmax(torch.tensor([[1e4, -1e4, 9.9e3]]), top_k=2)
    assert indices_TK.tolist() == [[0, 2]]
    torch.testing.assert_close(weights_TK, torch.tensor([[1.0, 0.0]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("shift", "factor"), [(3.0, 1.0), (0.0, 7.0), (-2.0, 0.5)])
def test_routing_ignores_the_offset_and_scale_of_inputs_and_gates(
    shift: float, factor: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(6, 32, generator=generator)
    gates_ED = torch.randn(5, 32, generator=generator)
    weights_TK, indices_TK = route(x_TD, gates_ED, top_k=2)
    for moved in (
        route(x_TD * factor + shift, gates_ED, 2),
        route(x_TD, gates_ED * factor + shift, 2),
    ):
        assert torch.equal(moved[1], indices_TK)
        torch.testing.assert_close(moved[0], weights_TK, rtol=1e-3, atol=1e-4)


def test_standardize_matches_values_computed_by_hand() -> None:
    rows = torch.tensor([[1.0, 3.0]])
    expected = 1 / math.sqrt(1 + 1e-5)
    torch.testing.assert_close(standardise(rows), torch.tensor([[-expected, expected]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mixer", [mix, mix_factors])
@pytest.mark.parametrize("experts", [4, 40])  # dense and sorted
def test_weights_of_any_dtype_are_accepted(
    mixer: Callable[..., Tensor], dtype: torch.dtype, experts: int
) -> None:
    x_TD, A_ERD, B_EOR, indices_TK, weights_TK = make_case(
        tokens=16, experts=experts, top_k=2, rank=4, inputs=16, outputs=8, seed=0
    )
    y_TO = mixer(x_TD, A_ERD, B_EOR, indices_TK, weights_TK.to(dtype))
    assert y_TO.dtype == torch.float32
    expected_TO = mixer(x_TD, A_ERD, B_EOR, indices_TK, weights_TK.to(dtype).float())
    assert torch.equal(y_TO, expected_TO)


def test_weights_are_float32_for_scores_of_any_dtype() -> None:
    scores_TE = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights_TK, indices_TK = top_k_softmax(scores_TE, 3)
    assert weights_TK.dtype == torch.float32
    expected_TK = scores_TE.double().gather(1, indices_TK).softmax(dim=1)
    torch.testing.assert_close(weights_TK.double(), expected_TK, rtol=0, atol=1e-5)
