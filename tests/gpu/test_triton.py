"""Check the Triton kernels as a GPU runs them; the interpreter's tests try more shapes."""

import pytest
import torch

from phatgoose.ops import standardise, top_k_softmax

pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 only")
from phatgoose.ops import triton_kernels

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def make_case(tokens: int, experts: int, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return inputs of a linear of 256 by 320, and operands in the kernels' layout, on the GPU."""
    generator = torch.Generator().manual_seed(0)
    case = {
        "y_TO": torch.randn(tokens, 320, generator=generator).to(dtype),
        "x_TD": (torch.randn(tokens, 256, generator=generator) + 0.5).to(dtype),
        "lora_A_EDR": (torch.randn(experts, 256, rank, generator=generator) / 16).to(dtype),
        "lora_B_ERO": (torch.randn(experts, rank, 320, generator=generator) / 4).to(dtype),
        "gates_ED": standardise(torch.randn(experts, 256, generator=generator)) / 16,
    }
    return {name: tensor.cuda() for name, tensor in case.items()}


def route_twice(case: dict[str, torch.Tensor], y_TO: torch.Tensor, top_k: int) -> None:
    """Add what the experts say to y, by the kernels for many tokens, then by those for few."""
    x_TD, gates_ED = case["x_TD"], case["gates_ED"]
    factors = case["lora_A_EDR"], case["lora_B_ERO"]
    scores_TE = triton_kernels.scores(x_TD, gates_ED)
    inverse_T = triton_kernels.inverse_std(x_TD)
    weights_TK, indices_TK = triton_kernels.select(scores_TE, top_k, inverse_T)
    triton_kernels.mix_(y_TO, x_TD, *factors, indices_TK, weights_TK)
    triton_kernels.decode_(y_TO, x_TD, gates_ED, *factors, top_k, True)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "rank", "dtype", "tolerance"),
    [
        (1, 3, 1, 5, torch.float32, 1e-4),
        (64, 166, 2, 16, torch.float32, 1e-4),
        (500, 36, 3, 12, torch.bfloat16, 2e-2),
        (4096, 36, 2, 16, torch.bfloat16, 2e-2),
        (300, 1000, 8, 64, torch.bfloat16, 2e-2),
        (200, 20, 2, 16, torch.float16, 4e-3),
    ],
)
def test_the_triton_kernels_match_float64(
    tokens: int, experts: int, top_k: int, rank: int, dtype: torch.dtype, tolerance: float
) -> None:
    case = make_case(tokens, experts, rank, dtype)
    x_TD, y_TO = case["x_TD"].double(), case["y_TO"].double()
    inverse_T1 = 1 / (x_TD.var(dim=1, keepdim=True, correction=0) + 1e-5).sqrt()
    # The input's mean drops out, since each gate's own mean is 0.
    expected_TE = x_TD @ case["gates_ED"].double().T * inverse_T1
    scores_TE = triton_kernels.scores(case["x_TD"], case["gates_ED"])
    inverse_T = triton_kernels.inverse_std(case["x_TD"])
    torch.testing.assert_close(inverse_T.double(), inverse_T1[:, 0], rtol=1e-5, atol=0)
    scaled_TE = scores_TE * inverse_T.unsqueeze(1)
    torch.testing.assert_close(scaled_TE.double(), expected_TE, rtol=0, atol=2e-5)
    weights_TK, indices_TK = triton_kernels.select(scores_TE, top_k, inverse_T)
    expected_TK, chosen_TK = top_k_softmax(scaled_TE, top_k)
    assert torch.equal(indices_TK, chosen_TK)
    torch.testing.assert_close(weights_TK, expected_TK, rtol=1e-5, atol=1e-6)

    A_EDR, B_ERO = case["lora_A_EDR"].double(), case["lora_B_ERO"].double()
    weights_TE = torch.zeros_like(expected_TE).scatter_(1, indices_TK, weights_TK.double())
    added_TO, h_TR = torch.zeros_like(y_TO), torch.zeros(tokens, rank, device="cuda").double()
    for weight_T, A_DR, B_RO in zip(weights_TE.T, A_EDR, B_ERO, strict=True):
        added_TO += weight_T[:, None] * (x_TD @ A_DR @ B_RO)
        h_TR += weight_T[:, None] * (x_TD @ A_DR)
    factored_TO = sum(
        weight_T[:, None] * (h_TR @ B_RO)
        for weight_T, B_RO in zip(weights_TE.T, B_ERO, strict=True)
    )
    factors = case["x_TD"], case["lora_A_EDR"], case["lora_B_ERO"]
    query_T = torch.arange(tokens, device="cuda")

    def check(result_TO: torch.Tensor, expected_TO: torch.Tensor) -> None:
        torch.testing.assert_close(
            result_TO.double(), expected_TO, rtol=tolerance, atol=tolerance * 4
        )

    result_TO = case["y_TO"].clone()
    triton_kernels.mix_(result_TO, *factors, indices_TK, weights_TK)
    check(result_TO, y_TO + added_TO)
    result_TO = case["y_TO"].clone()
    triton_kernels.mix_factors_(result_TO, *factors, indices_TK, weights_TK)
    check(result_TO, y_TO + factored_TO)
    result_TO = case["y_TO"].clone()
    triton_kernels.mix_queries_(result_TO, *factors, query_T, indices_TK, weights_TK)
    check(result_TO, y_TO + added_TO)
    result_TO = case["y_TO"].clone()
    decoded_TK, few_TK = triton_kernels.decode_(
        result_TO, case["x_TD"], case["gates_ED"], *factors[1:], top_k, True
    )
    assert (few_TK == indices_TK).double().mean() > 0.99  # close scores may change places
    same_T = (few_TK == indices_TK).all(dim=1)
    torch.testing.assert_close(decoded_TK[same_T], weights_TK[same_T], rtol=1e-4, atol=1e-5)
    check(result_TO[same_T], (y_TO + added_TO)[same_T])


@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_the_triton_kernels_never_wait_and_repeat_their_bits(tokens: int) -> None:
    case = make_case(tokens, 36, 16, torch.bfloat16)
    results = []
    for _ in range(5):
        y_TO = case["y_TO"].clone()
        torch.cuda.set_sync_debug_mode("error")
        try:
            route_twice(case, y_TO, 2)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        results.append(y_TO)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_a_cuda_graph_routes_new_inputs(tokens: int) -> None:
    case = make_case(tokens, 36, 16, torch.bfloat16)
    y_TO = case["y_TO"].clone()
    route_twice(case, y_TO, 2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        route_twice(case, y_TO, 2)
    for _ in range(3):
        # Other tokens, so other experts: the grid is the same.
        case["x_TD"].copy_(torch.randn_like(case["x_TD"]))
        expected_TO = case["y_TO"].clone()
        route_twice(case, expected_TO, 2)
        y_TO.copy_(case["y_TO"])
        graph.replay()
        assert torch.equal(y_TO, expected_TO)
