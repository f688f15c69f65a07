"""Inputs of the Triton kernels: on a GPU if there is one, else for Triton's interpreter.

The interpreter runs programs one after the other, so sizes are small. It cuts numbers to bfloat16
where a GPU rounds them: the tolerances allow for that.
"""

import math
from typing import Any

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor

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
    """Compare, allowing for rounding h and y, and for sums in float32."""
    size_TO = expected_mix(*(t.abs() if t.is_floating_point() else t for t in case))
    bound_TO = 2 * UNIT[y_TO.dtype] * size_TO + 1e-30
    assert y_TO.isfinite().all()
    assert ((y_TO.double() - expected_TO).abs() <= bound_TO).all()
