"""Compare the Triton kernels with float64: on a GPU if there is one, else in Triton's interpreter.

The interpreter runs programs one after the other, so sizes are small. It cuts numbers to bfloat16
where a GPU rounds them: the tolerances allow for that.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.ops import standardise, top_k_softmax

pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 only")
from phatgoose.ops import triton_kernels, triton_operators

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half of a unit in the last place, or all of it where the interpreter cuts.
UNIT = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

# Examples are small, and smaller ones would take the interpreter minutes to find.
UNSHRUNK = [Phase.explicit, Phase.reuse, Phase.generate]
few = settings(deadline=None, max_examples=20, phases=UNSHRUNK)
sizes = st.fixed_dictionaries(
    {
        "tokens": st.integers(1, 12),
        "experts": st.integers(1, 10),
        "top_k": st.integers(1, 4),
        "rank": st.sampled_from([1, 4, 5, 16, 17, 64]),
        "inputs": st.integers(1, 150),
        "outputs": st.integers(1, 150),
        "seed": st.integers(0, 10**6),
        "dtype": st.sampled_from(DTYPES),
    }
)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_case(
    *, tokens: int, experts: int, top_k: int, rank: int, inputs: int, outputs: int, **rest: Any
) -> tuple[Tensor, ...]:
    """Return y, x, both factors in the kernels' layout, chosen experts, and weights."""
    generator = generator_of(rest.get("seed", 0))
    dtype = rest.get("dtype", torch.float32)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)

    kept_TK = torch.randn(tokens, experts, generator=generator).topk(min(top_k, experts))
    return (
        random(tokens, outputs),
        random(tokens, inputs),
        random(experts, inputs, rank) / math.sqrt(inputs),
        random(experts, rank, outputs),
        kept_TK.indices.to(DEVICE),
        kept_TK.values.softmax(dim=1).to(DEVICE),
    )


def expected_mix(
    y_TO: Tensor, x_TD: Tensor, A_EDR: Tensor, B_ERO: Tensor, indices_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """Return y with the mixture added, in float64."""
    A_TKDR, B_TKRO = A_EDR.double()[indices_TK], B_ERO.double()[indices_TK]
    h_TKR = torch.einsum("td,tkdr,tk->tkr", x_TD.double(), A_TKDR, weights_TK.double())
    return y_TO.double() + torch.einsum("tkr,tkro->to", h_TKR, B_TKRO)


def assert_close(y_TO: Tensor, expected_TO: Tensor, *case: Tensor) -> None:
    """Compare, allowing for rounding h, each choice's output, and y, and for sums in float32."""
    size_TO = expected_mix(*(t.abs() if t.is_floating_point() else t for t in case))
    bound_TO = 3 * UNIT[y_TO.dtype] * size_TO + 1e-30
    assert y_TO.isfinite().all()
    assert ((y_TO.double() - expected_TO).abs() <= bound_TO).all()


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


def test_no_tokens_are_no_work() -> None:
    y_TO, x_TD, A_EDR, B_ERO, indices_TK, weights_TK = (
        t[:0] if i not in (2, 3) else t
        for i, t in enumerate(make_case(tokens=1, experts=3, top_k=2, rank=4, inputs=8, outputs=8))
    )
    gates_ED = torch.randn(3, 8, device=DEVICE)
    assert triton_kernels.inverse_std(x_TD).shape == (0,)
    scores_TE = triton_kernels.scores(x_TD, gates_ED)
    assert scores_TE.shape == (0, 3)
    assert [t.shape for t in triton_kernels.select(scores_TE, 2)] == [(0, 2), (0, 2)]
    decoded = triton_kernels.decode_(y_TO, x_TD, gates_ED, A_EDR, B_ERO, 5, True)
    assert [t.shape for t in decoded] == [(0, 3), (0, 3)]
    for function in (triton_kernels.mix_, triton_kernels.mix_factors_):
        function(y_TO, x_TD, A_EDR, B_ERO, indices_TK, weights_TK)
    query_T = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    mixture = indices_TK.new_zeros(1, 2), weights_TK.new_ones(1, 2)
    triton_kernels.mix_queries_(y_TO, x_TD, A_EDR, B_ERO, query_T, *mixture)


def operator_calls() -> dict[str, tuple[Any, ...]]:
    y_TO, x_TD, A_EDR, B_ERO, indices_TK, weights_TK = make_case(
        tokens=3, experts=4, top_k=2, rank=4, inputs=8, outputs=6
    )
    gates_ED = torch.randn(4, 8, generator=generator_of(0)).to(DEVICE)
    scores_TE = torch.randn(3, 4, generator=generator_of(0)).to(DEVICE)
    query_T = torch.tensor([1, 0, 1], device=DEVICE)
    factors = y_TO, x_TD, A_EDR, B_ERO
    return {
        "inverse_std": (x_TD,),
        "scores": (x_TD, gates_ED),
        "select": (scores_TE, 9, torch.ones(3, device=DEVICE), None, None, False, True),
        "mix_": (*factors, indices_TK, weights_TK, True),
        "mix_queries_": (*factors, query_T, indices_TK, weights_TK),
        "decode_": (y_TO, x_TD, gates_ED, A_EDR, B_ERO, 9, True, False, None, None, False),
    }


@pytest.mark.parametrize("name", list(operator_calls()))
def test_the_operators_are_registered_correctly(name: str) -> None:
    operator = getattr(torch.ops.phatgoose_triton, name).default
    torch.library.opcheck(operator, operator_calls()[name])


def test_a_compiled_function_calls_the_operators() -> None:
    y_TO, x_TD, A_EDR, B_ERO, *_ = make_case(
        tokens=3, experts=4, top_k=2, rank=4, inputs=8, outputs=6
    )
    gates_ED = torch.randn(4, 8, generator=generator_of(0)).to(DEVICE)

    def routed(y_TO: Tensor, x_TD: Tensor) -> Tensor:
        scores_TE = triton_kernels.scores(x_TD, gates_ED)
        inverse_T = triton_kernels.inverse_std(x_TD)
        weights_TK, indices_TK = triton_kernels.select(scores_TE, 2, inverse_T)
        y_TO = y_TO * 2
        triton_kernels.mix_(y_TO, x_TD, A_EDR, B_ERO, indices_TK, weights_TK)
        triton_kernels.decode_(y_TO, x_TD, gates_ED, A_EDR, B_ERO, 2, True)
        return y_TO + 1

    compiled = torch.compile(routed, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(y_TO, x_TD), routed(y_TO, x_TD))


def test_what_the_kernels_would_misread_is_refused() -> None:
    y_TO, x_TD, A_EDR, B_ERO, *choice = make_case(
        tokens=3, experts=4, top_k=2, rank=4, inputs=8, outputs=6
    )
    learned_EDR = A_EDR.clone().requires_grad_()
    with pytest.raises(PhatgooseError, match="compute no gradients"):
        triton_kernels.mix_(y_TO, x_TD, learned_EDR, B_ERO, *choice)
    with torch.no_grad():
        triton_kernels.mix_(y_TO, x_TD, learned_EDR, B_ERO, *choice)
    turned_EDR = A_EDR.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(PhatgooseError, match="not contiguous"):
        triton_kernels.mix_(y_TO, x_TD, turned_EDR, B_ERO, *choice)
    with pytest.raises(PhatgooseError, match="bfloat16"):
        triton_kernels.mix_(y_TO, x_TD.bfloat16(), A_EDR, B_ERO, *choice)
    with pytest.raises(PhatgooseError, match="no kernels"):
        triton_kernels.scores(x_TD.double(), torch.randn(4, 8, device=DEVICE))
    with pytest.raises(PhatgooseError, match="gates"):
        triton_kernels.scores(x_TD, torch.randn(8, 4, device=DEVICE).T)
