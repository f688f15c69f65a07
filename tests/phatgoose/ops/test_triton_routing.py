"""Compare the Triton kernels that score, select and decode with float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.ops import standardise, top_k_softmax
from tests.support.triton_cases import (
    DEVICE,
    DTYPES,
    assert_close,
    expected_mix,
    few,
    generator_of,
    make_case,
    sizes,
)

pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 only")
from phatgoose.ops import triton_kernels, triton_operators


def expected_choice(scores_TE: Tensor, top_k: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Return weights and indices by the rule's own words, in float64 and row by row."""
    absent_E = options.get("absent_E")
    rows = []
    for t, score_E in enumerate(scores_TE.double().cpu()):
        if options.get("inverse_T") is not None:
            score_E = score_E * options["inverse_T"].double().cpu()[t]
        if options.get("absolute"):
            score_E = score_E.abs()
        if options.get("bias_TE") is not None:
            score_E = score_E + options["bias_TE"].double().cpu()[t]
        absent = torch.zeros(len(score_E), dtype=torch.bool)
        if absent_E is not None:
            absent = absent_E.cpu()
            score_E = score_E.masked_fill(absent, -torch.inf)
        index_K = score_E.sort(descending=True, stable=True).indices[:top_k]
        share_K = score_E.softmax(dim=0)[index_K]
        weight_K = share_K / (share_K.sum() + 1e-6)
        if options.get("equal"):
            kept_K = (score_E[index_K] > -torch.inf).double()
            weight_K = kept_K / kept_K.sum()
        rows.append((weight_K.masked_fill(absent[index_K], 0.0), index_K))
    weights, indices = zip(*rows, strict=True)
    return torch.stack(weights), torch.stack(indices)


@settings(few, max_examples=60)
@given(
    tokens=st.integers(1, 5),
    experts=st.integers(1, 70),
    top_k=st.integers(1, 8),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.1, 3.0, 300.0]),
    used=st.fixed_dictionaries(
        {name: st.booleans() for name in ("inverse_T", "bias_TE", "absent_E", "equal", "absolute")}
    ),
)
def test_selection_follows_the_rule(
    tokens: int, experts: int, top_k: int, seed: int, spread: float, used: dict[str, bool]
) -> None:
    generator = generator_of(seed)
    scores_TE = (torch.randn(tokens, experts, generator=generator) * spread).to(DEVICE)
    options = {
        "inverse_T": torch.rand(tokens, generator=generator).to(DEVICE) + 0.5,
        "bias_TE": torch.randn(tokens, experts, generator=generator).to(DEVICE),
        "absent_E": (torch.rand(experts, generator=generator) < 0.6).to(DEVICE),
        "equal": True,
        "absolute": True,
    }
    arguments: dict[str, Any] = {name: options[name] for name in used if used[name]}
    weights_TK, indices_TK = triton_kernels.select(scores_TE, top_k, **arguments)
    assert weights_TK.dtype == torch.float32
    assert indices_TK.dtype == torch.int64
    expected_TK, chosen_TK = expected_choice(scores_TE, top_k, **arguments)
    assert indices_TK.tolist() == chosen_TK.tolist()
    torch.testing.assert_close(weights_TK.cpu().double(), expected_TK, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 3), (200, 2), (1500, 8)])
def test_selection_equals_the_softmax_of_torch(experts: int, top_k: int) -> None:
    scores_TE = torch.randn(4, experts, generator=generator_of(0)).to(DEVICE)
    weights_TK, indices_TK = triton_kernels.select(scores_TE, top_k)
    expected_TK, chosen_TK = top_k_softmax(scores_TE, top_k)
    assert torch.equal(indices_TK, chosen_TK)
    torch.testing.assert_close(weights_TK, expected_TK, rtol=2e-6, atol=1e-7)


@few
@given(
    values=st.lists(
        st.lists(
            st.sampled_from([-math.inf, -1.5, -0.0, 0.0, 2.0, 1e-38, -1e38]), min_size=9, max_size=9
        ),
        min_size=1,
        max_size=4,
    ),
    top_k=st.integers(1, 9),
)
def test_of_equal_scores_the_lowest_index_is_first(values: list[list[float]], top_k: int) -> None:
    scores_TE = torch.tensor(values)
    _, indices_TK = triton_kernels.select(scores_TE.to(DEVICE), top_k)
    assert indices_TK.cpu().equal(expected_choice(scores_TE, top_k)[1])


def test_scores_that_are_not_numbers_choose_existing_experts() -> None:
    nan = math.nan
    rows = [[nan] * 5, [1.0, nan, 3.0, -nan, 2.0], [math.inf, nan, 0.0, math.inf, 0.0]]
    weights_TK, indices_TK = triton_kernels.select(torch.tensor(rows, device=DEVICE), 3)
    # As for `torch.topk`, what is not a number is the largest; nothing hides it.
    assert indices_TK.tolist() == [[0, 1, 2], [1, 3, 2], [1, 0, 3]]
    assert weights_TK.isnan().all()


def test_absent_experts_have_no_weight_even_where_all_are() -> None:
    scores_TE = torch.tensor([[5.0, 1.0, 3.0]], device=DEVICE)
    for equal in (False, True):
        absent_E = torch.tensor([True, False, True], device=DEVICE)
        weights_TK, indices_TK = triton_kernels.select(scores_TE, 2, None, None, absent_E, equal)
        assert indices_TK.tolist() == [[1, 0]]
        torch.testing.assert_close(weights_TK.cpu(), torch.tensor([[1.0, 0.0]]), rtol=0, atol=2e-6)
        absent_E = torch.ones_like(absent_E)
        weights_TK, indices_TK = triton_kernels.select(scores_TE, 2, None, None, absent_E, equal)
        assert weights_TK.tolist() == [[0.0, 0.0]]
        assert indices_TK.tolist() == [[0, 1]]


def test_a_bias_may_lie_anywhere() -> None:
    scores_TE = torch.randn(3, 6, generator=generator_of(0)).to(DEVICE)
    spread_TE = torch.randn(3, 12, generator=generator_of(1)).to(DEVICE)[:, ::2]
    for bias_TE in (spread_TE, spread_TE[:1].expand(3, 6)):
        weights_TK, indices_TK = triton_kernels.select(scores_TE, 2, None, bias_TE)
        expected_TK, chosen_TK = triton_kernels.select(scores_TE + bias_TE, 2)
        assert torch.equal(indices_TK, chosen_TK)
        torch.testing.assert_close(weights_TK, expected_TK)


@pytest.mark.parametrize("tokens", [1, 20])
def test_decoding_writes_every_block_of_outputs(tokens: int) -> None:
    """Check 1,000 outputs at a rank of 64: one block of 64 a program, or two for more tokens."""
    y_TO, x_TD, A_EDR, B_ERO, *_ = make_case(
        tokens=tokens, experts=3, top_k=2, rank=64, inputs=8, outputs=1000
    )
    gates_ED = torch.randn(3, 8, generator=generator_of(0)).to(DEVICE)
    result_TO = y_TO.clone()
    weights_TK, indices_TK = triton_kernels.decode_(
        result_TO, x_TD, gates_ED, A_EDR, B_ERO, 2, False
    )
    case = y_TO, x_TD, A_EDR, B_ERO, indices_TK, weights_TK
    assert_close(result_TO, expected_mix(*case), *case)


@few
@given(
    tokens=st.integers(1, 4),
    inputs=st.sampled_from([1, 2, 31, 64, 5000]),
    mean=st.sampled_from([0.0, 3.0, 1e4]),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
    seed=st.integers(0, 10**6),
)
def test_the_inverse_std_keeps_its_digits_at_any_mean(
    tokens: int, inputs: int, mean: float, dtype: torch.dtype, seed: int
) -> None:
    x_TD = (torch.randn(tokens, inputs, generator=generator_of(seed)) + mean).to(dtype)
    x_TD = x_TD.float().to(dtype)
    expected_T = 1 / (x_TD.double().var(dim=1, correction=0) + 1e-5).sqrt()
    inverse_T = triton_kernels.inverse_std(x_TD.to(DEVICE)).cpu()
    assert inverse_T.dtype == torch.float32
    torch.testing.assert_close(inverse_T.double(), expected_T, rtol=2e-6, atol=0)


def test_the_rounding_of_a_mean_does_not_reach_the_inverse_std() -> None:
    # Neighbors in float32, whose mean is not a float32.
    x_TD = torch.tensor([[1e6, 1e6 + 0.0625]], device=DEVICE)
    expected = 1 / math.sqrt(0.03125**2 + 1e-5)
    assert float(triton_kernels.inverse_std(x_TD)) == pytest.approx(expected, rel=1e-5)


@few
@given(
    tokens=st.integers(1, 70),
    experts=st.integers(1, 70),
    inputs=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 10**6),
)
def test_scores_are_as_accurate_as_in_float32(
    tokens: int, experts: int, inputs: int, dtype: torch.dtype, seed: int
) -> None:
    generator = generator_of(seed)
    x_TD = torch.randn(tokens, inputs, generator=generator).to(dtype)
    gates_ED = torch.randn(experts, inputs, generator=generator)
    scores_TE = triton_kernels.scores(x_TD.to(DEVICE), gates_ED.to(DEVICE)).cpu()
    error_TE = (scores_TE.double() - x_TD.double() @ gates_ED.double().T).abs()
    assert (error_TE <= 1e-6 * (x_TD.double().abs() @ gates_ED.double().abs().T)).all()


@pytest.mark.parametrize(
    ("dtype", "digits"),
    # On a GPU a float16 input meets the gates in TF32, 22 of the 24 bits.
    [(torch.float32, 0.0), (torch.bfloat16, 0.0), (torch.float16, 2.0**-21)],
)
def test_scores_lose_no_bits_of_a_gate(dtype: torch.dtype, digits: float) -> None:
    gates_ED = torch.randn(5, 40, generator=generator_of(0)).to(DEVICE)
    scores_TE = triton_kernels.scores(torch.eye(40, dtype=dtype, device=DEVICE), gates_ED)
    torch.testing.assert_close(scores_TE.T, gates_ED, rtol=digits, atol=0)


@few
@given(
    sizes=sizes,
    standardised=st.booleans(),
    absolute=st.booleans(),
    biased=st.booleans(),
    some_absent=st.booleans(),
    equal=st.booleans(),
)
def test_decoding_equals_its_steps(
    sizes: dict[str, Any],
    standardised: bool,
    absolute: bool,
    biased: bool,
    some_absent: bool,
    equal: bool,
) -> None:
    y_TO, x_TD, A_EDR, B_ERO, *_ = make_case(**sizes)
    tokens, experts, top_k = sizes["tokens"], sizes["experts"], sizes["top_k"]
    generator = generator_of(sizes["seed"])
    gates_ED = standardise(torch.randn(experts, sizes["inputs"], generator=generator)).to(DEVICE)
    bias_TE = torch.randn(tokens, experts, generator=generator).to(DEVICE) if biased else None
    absent_E = (torch.rand(experts, generator=generator) < 0.4).to(DEVICE) if some_absent else None
    result_TO = y_TO.clone()
    weights_TK, indices_TK = triton_kernels.decode_(
        result_TO,
        x_TD,
        gates_ED,
        A_EDR,
        B_ERO,
        top_k,
        standardised,
        absolute,
        bias_TE,
        absent_E,
        equal,
    )
    inverse_T = triton_kernels.inverse_std(x_TD) if standardised else None
    scores_TE = triton_kernels.scores(x_TD, gates_ED)
    expected_TK, chosen_TK = triton_kernels.select(
        scores_TE, top_k, inverse_T, bias_TE, absent_E, equal, absolute
    )
    assert torch.equal(indices_TK, chosen_TK)
    torch.testing.assert_close(weights_TK, expected_TK, rtol=1e-3, atol=1e-5)
    case = y_TO, x_TD, A_EDR, B_ERO, indices_TK, weights_TK
    assert_close(result_TO, expected_mix(*case), *case)


def test_scores_of_decoding_are_summed_over_parts() -> None:
    """Check 600 features: ten parts of 64, the last one shorter."""
    y_TO, x_TD, A_EDR, B_ERO, *_ = make_case(
        tokens=2, experts=20, top_k=2, rank=4, inputs=600, outputs=30
    )
    gates_ED = torch.randn(20, 600, generator=generator_of(1)).to(DEVICE)
    scores_PTE = triton_operators._score_parts(x_TD, gates_ED, 100, 16)
    assert scores_PTE.shape == (10, 2, 20)
    expected_TE = x_TD.double() @ gates_ED.double().T
    torch.testing.assert_close(scores_PTE.sum(dim=0).double(), expected_TE, rtol=1e-4, atol=1e-4)
    weights_TK, indices_TK = triton_kernels.decode_(
        y_TO.clone(), x_TD, gates_ED, A_EDR, B_ERO, 2, False
    )
    expected_TK, chosen_TK = top_k_softmax(expected_TE.float(), 2)
    assert torch.equal(indices_TK, chosen_TK)
    torch.testing.assert_close(weights_TK, expected_TK, rtol=1e-4, atol=1e-4)
