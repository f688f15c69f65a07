"""Routed inference on CUDA: the functions behind `phatgoose.ops`, as custom operators.

Shape suffixes: T tokens, D input features, O output features, E experts, K experts per token, Q
queries, R LoRA rank, N = T * K pairs of a token and one of its choices.

    scores, inverse_std          x_TD read once each; float32 accuracy on the tensor cores
    select                       one program a token: top-k and softmax in registers
    mix_      group              pairs in the order of their experts, and blocks of them
              shrink             h_N = w_N * x A      one program a block: gathers rows of x
              expand             h_N B                all choices of a token but the last
              expand             y += h_N B + those   the last choice
    decode_   scores             one program an expert block and a part of D
              decode             one program a token and a block of O: all that remains

Nothing waits for the device: grids follow from shapes alone (`group_program` says how), and the
programs of blocks without work return at once. So passes can be captured in CUDA graphs.

Several experts add to one token, in an order that must not depend on timing, so without atomic
additions. Adding choice after choice to y would round K times. Here the outputs of all choices but
the last are written in float32; the last is kept in registers while they and y are added to it, so
a sum is rounded once.

One launch for all of `decode_` would need a barrier across its programs between the scores and the
choice. Triton has none: programs that wait for a counter need all of them resident at the same
time, which nothing checks, and which Triton's interpreter, running one after the other, never
offers. Hence two launches.
"""

import torch
from torch import Tensor

from phatgoose.errors import PhatgooseError
from phatgoose.ops.triton_operators import OPERATORS


def inverse_std(x_TD: Tensor) -> Tensor:
    """Return `1 / sqrt(variance + STANDARDISE_EPS)` of each token, `inverse_T` in float32."""
    return OPERATORS.inverse_std(x_TD)


def scores(x_TD: Tensor, gates_ED: Tensor) -> Tensor:
    """Return `x_TD . gates_ED`, `scores_TE` in float32 and as accurate, for any dtype of `x_TD`.

    Args:
        x_TD: inputs of the linear.
        gates_ED: prepared gates, float32 and contiguous.
    """
    _check_dtype(x_TD)
    _check_gates(gates_ED)
    return OPERATORS.scores(x_TD, gates_ED)


def select(
    scores_TE: Tensor,
    top_k: int,
    inverse_T: Tensor | None = None,
    bias_TE: Tensor | None = None,
    absent_E: Tensor | None = None,
    equal: bool = False,
    absolute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Choose every token's experts as `top_k_softmax` does; of equal scores the lowest index.

    Args:
        scores_TE: float32.
        top_k: experts kept per token.
        inverse_T: what a token's scores are multiplied by first, float32.
        bias_TE: what is added to the scores, last.
        absent_E: True for experts that no token may go to; their weight is 0.
        equal: give the kept experts equal weights instead of the softmax.
        absolute: take the absolute value of the scores, before the bias.

    Returns:
        `weights_TK` (float32) and `indices_TK` (int64, best first).
    """
    return OPERATORS.select(scores_TE, top_k, inverse_T, bias_TE, absent_E, equal, absolute)


def mix_(
    y_TO: Tensor,
    x_TD: Tensor,
    lora_A_EDR: Tensor,
    lora_B_ERO: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
) -> None:
    """Add the chosen experts' outputs to y: `y += sum_k w_k (x A_k) B_k`.

    Args:
        y_TO: the frozen linear's output.
        x_TD: inputs of the linear, in the dtype of the factors.
        lora_A_EDR: every expert's A, contiguous.
        lora_B_ERO: every expert's B times its scale, contiguous.
        indices_TK: chosen experts.
        weights_TK: their weights.
    """
    _check(y_TO, x_TD, lora_A_EDR, lora_B_ERO, weights_TK)
    OPERATORS.mix_(y_TO, x_TD, lora_A_EDR, lora_B_ERO, indices_TK, weights_TK, False)


def mix_factors_(
    y_TO: Tensor,
    x_TD: Tensor,
    lora_A_EDR: Tensor,
    lora_B_ERO: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
) -> None:
    """Add `(sum_k w_k B_k) (sum_k w_k A_k) x` to y; the arguments are those of `mix_`."""
    _check(y_TO, x_TD, lora_A_EDR, lora_B_ERO, weights_TK)
    OPERATORS.mix_(y_TO, x_TD, lora_A_EDR, lora_B_ERO, indices_TK, weights_TK, True)


def mix_queries_(
    y_TO: Tensor,
    x_TD: Tensor,
    lora_A_EDR: Tensor,
    lora_B_ERO: Tensor,
    query_T: Tensor,
    indices_QK: Tensor,
    weights_QK: Tensor,
) -> None:
    """Add one mixture of experts per query to y, the same for all its tokens.

    The factors of a query's experts count as one of rank `K * R`, so y is read and written once.

    Args:
        y_TO: as for `mix_`, as are `x_TD` and the factors.
        x_TD: see above.
        lora_A_EDR: see above.
        lora_B_ERO: see above.
        query_T: each token's query.
        indices_QK: each query's experts.
        weights_QK: their weights.
    """
    _check(y_TO, x_TD, lora_A_EDR, lora_B_ERO, weights_QK)
    OPERATORS.mix_queries_(y_TO, x_TD, lora_A_EDR, lora_B_ERO, query_T, indices_QK, weights_QK)


def decode_(
    y_TO: Tensor,
    x_TD: Tensor,
    gates_ED: Tensor,
    lora_A_EDR: Tensor,
    lora_B_ERO: Tensor,
    top_k: int,
    standardise: bool,
    absolute: bool = False,
    bias_TE: Tensor | None = None,
    absent_E: Tensor | None = None,
    equal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Route few tokens (up to 64) and add what their experts say to y, in two launches.

    The arguments are those of `scores`, `select` and `mix_`; `standardise` says whether scores are
    multiplied by `inverse_std(x_TD)`.

    Returns:
        `weights_TK` and `indices_TK`, as `select` gives them.
    """
    _check(y_TO, x_TD, lora_A_EDR, lora_B_ERO, gates_ED)
    _check_gates(gates_ED)
    return OPERATORS.decode_(
        y_TO,
        x_TD,
        gates_ED,
        lora_A_EDR,
        lora_B_ERO,
        top_k,
        standardise,
        absolute,
        bias_TE,
        absent_E,
        equal,
    )


def _check(y_TO: Tensor, x_TD: Tensor, lora_A_EDR: Tensor, lora_B_ERO: Tensor, w: Tensor) -> None:
    """Raise PhatgooseError for arguments that the programs would misread."""
    if torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (y_TO, x_TD, lora_A_EDR, lora_B_ERO, w)
    ):
        raise PhatgooseError(
            "mix=triton: the CUDA kernels compute no gradients. Use mix=torch, or torch.no_grad()."
        )
    if not (lora_A_EDR.is_contiguous() and lora_B_ERO.is_contiguous()):
        raise PhatgooseError("mix=triton: the factors are not contiguous. Pack them again.")
    _check_dtype(x_TD)
    if not (x_TD.dtype == lora_A_EDR.dtype == lora_B_ERO.dtype):
        raise PhatgooseError(
            f"mix=triton: inputs are {x_TD.dtype} and factors {lora_A_EDR.dtype}. Load the pool "
            "in the dtype of the base."
        )


def _check_dtype(x_TD: Tensor) -> None:
    if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise PhatgooseError(f"mix=triton: there are no kernels for {x_TD.dtype}. Use mix=torch.")


def _check_gates(gates_ED: Tensor) -> None:
    if gates_ED.dtype != torch.float32 or not gates_ED.is_contiguous():
        raise PhatgooseError("mix=triton: gates are not contiguous float32. Prepare them again.")
