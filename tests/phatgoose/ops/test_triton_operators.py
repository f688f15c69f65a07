"""Check how the Triton kernels are registered as operators, and what they refuse."""

from typing import Any

import pytest
import torch
from torch import Tensor

from phatgoose.errors import PhatgooseError
from tests.support.triton_cases import DEVICE, generator_of, make_case

pytest.importorskip("triton", reason="Triton has wheels for Linux on x86-64 only")
from phatgoose.ops import triton_kernels


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
