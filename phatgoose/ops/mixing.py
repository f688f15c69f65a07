"""The weighted sum of each token's chosen experts: y_TO = sum_k w_k * scale * B_k A_k x.

Shape suffixes: T tokens, D input features, O output features, E experts in the pool, K experts per
token, R LoRA rank, N = T * K pairs of a token and an expert, sorted by expert.

                x_TD                       pairs sorted by expert: [e0 e0 e0 | e1 | e3 e3 ...]
                  |   gather rows                                   \\________/ one product each
                x_ND  --A_e-->  h_NR  --* w-->  --B_e-->  y_NO  --scatter, sum over K-->  y_TO

Factors may lie in memory in any way; those that are `packed` are read without a copy: a row of A
for each input feature, and a row of B for each rank.

Where a token's choice is a good part of the pool, sorting does not pay: all experts' A at once,
then each expert's B, with a weight of zero for those that were not chosen.

In half precision the operands of a matrix product are rounded. Weights, and all sums over experts,
are in float32.
"""

import functools
import os
from collections.abc import Callable
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from phatgoose.errors import PhatgooseError

VARIABLE = "PHATGOOSE_MIX"
TORCH_WAYS = ("dense", "grouped", "loop")
WAYS = ("kernel", "torch", *TORCH_WAYS)

_Arguments = ParamSpec("_Arguments")
# From each expert's run of rows and that expert's matrix to their products.
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def wanted_way() -> str | None:
    """Return the way of mixing that the environment asks for, if any.

    Raises:
        PhatgooseError: there is no such way.
    """
    way = os.environ.get(VARIABLE) or None
    if way not in (None, *WAYS):
        raise PhatgooseError(f"{VARIABLE}={way}: it must be one of {', '.join(WAYS)}.")
    return way


def _without_compiling(function: Callable[_Arguments, Tensor]) -> Callable[_Arguments, Tensor]:
    """Let compiled models run a function as it is: the sizes of its groups are data.

    `torch.compiler.disable` as a decorator would load the compiler into every process, in a second.
    """

    @functools.wraps(function)
    def run(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            uncompiled: Callable[_Arguments, Tensor] = torch.compiler.disable(function)
            return uncompiled(*args, **kwargs)
        return function(*args, **kwargs)

    return run


def packed(lora_A_ERD: Tensor, lora_B_EOR: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same factors as they are read fastest: [E, D, R] and [E, R, O] in memory."""
    return (
        lora_A_ERD.transpose(1, 2).contiguous().transpose(1, 2),
        lora_B_EOR.transpose(1, 2).contiguous().transpose(1, 2),
    )


@_without_compiling
def mix(
    x_TD: Tensor,
    lora_A_ERD: Tensor,
    lora_B_EOR: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Sum the chosen experts' outputs for each token.

    Args:
        x_TD: inputs of the linear.
        lora_A_ERD: every expert's A.
        lora_B_EOR: every expert's B.
        indices_TK: chosen experts, int64.
        weights_TK: their weights, in float32 whatever the dtype of `x_TD`.
        scale: the experts' common LoRA scale.

    Returns:
        `y_TO` in the dtype of `x_TD`: what is added to the frozen linear's output.
    """
    way = _way(lora_A_ERD, lora_B_EOR, indices_TK)
    weights_TK = weights_TK.to(_sum_dtype(x_TD.dtype)) * scale
    if way == "dense":
        weights_TE1 = _dense_weights(weights_TK, indices_TK, len(lora_A_ERD))
        h_TER = _all_ranks(x_TD, lora_A_ERD) * weights_TE1
        return _sum_experts(h_TER, lora_B_EOR)
    pairs = _Pairs(indices_TK, len(lora_A_ERD), _PRODUCTS[way])
    h_NR = pairs.product(x_TD.index_select(0, pairs.token_N), lora_A_ERD)
    h_NR = h_NR * weights_TK.flatten()[pairs.order_N].unsqueeze(-1)
    return pairs.sum(pairs.product(h_NR.to(x_TD.dtype), lora_B_EOR))


@_without_compiling
def mix_factors(
    x_TD: Tensor,
    lora_A_ERD: Tensor,
    lora_B_EOR: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Mix each token's chosen experts factor by factor, as Arrow does (arXiv 2405.11157).

        y = scale * (sum_k w_k B_k) (sum_k w_k A_k) x

    Arguments and result are those of `mix`.
    """
    way = _way(lora_A_ERD, lora_B_EOR, indices_TK)
    weights_TK = weights_TK.to(_sum_dtype(x_TD.dtype))
    if way == "dense":
        weights_TE1 = _dense_weights(weights_TK, indices_TK, len(lora_A_ERD))
        h_TR = (_all_ranks(x_TD, lora_A_ERD) * weights_TE1).sum(dim=1)
        return _sum_experts(h_TR.unsqueeze(1) * (weights_TE1 * scale), lora_B_EOR)
    pairs = _Pairs(indices_TK, len(lora_A_ERD), _PRODUCTS[way])
    weights_N1 = weights_TK.flatten()[pairs.order_N].unsqueeze(-1)
    h_TR = pairs.sum(pairs.product(x_TD.index_select(0, pairs.token_N), lora_A_ERD) * weights_N1)
    h_NR = (h_TR.index_select(0, pairs.token_N) * (weights_N1 * scale)).to(x_TD.dtype)
    return pairs.sum(pairs.product(h_NR, lora_B_EOR))


def mix_reference(
    x_TD: Tensor,
    lora_A_ERD: Tensor,
    lora_B_EOR: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    scale: float = 1.0,
) -> Tensor:
    """Compute `mix` plainly, for tests: every expert for every token, then the sum."""
    weights_TE = x_TD.new_zeros(x_TD.shape[0], lora_A_ERD.shape[0])
    weights_TE.scatter_add_(1, indices_TK, weights_TK.to(x_TD.dtype))
    y_TEO = torch.einsum("td,erd,eor->teo", x_TD, lora_A_ERD, lora_B_EOR)
    return scale * torch.einsum("te,teo->to", weights_TE, y_TEO)


def _way(lora_A_ERD: Tensor, lora_B_EOR: Tensor, indices_TK: Tensor) -> str:
    """Return the way that is wanted, or the fastest of those that support these shapes.

    The borders were measured (benchmarks/linear.py).
    """
    wanted = wanted_way()
    if wanted in TORCH_WAYS:
        return wanted
    experts, rank, inputs = lora_A_ERD.shape
    tokens, top_k = indices_TK.shape
    # With few tokens, or few experts that are not chosen, sorting takes longer than evaluating all.
    if experts <= 2 * top_k or (experts <= 4 * top_k and tokens <= 16):
        return "dense"
    # The grouped product looks at every expert, chosen or not: with few pairs in a large pool the
    # loop over those that were chosen wins. With many pairs for each, its products are faster.
    if tokens * top_k * 5 < experts or tokens * top_k > 64 * experts:
        return "loop"
    # `grouped_mm` has no kernel for Apple's `mps`, and wants rows on 16-byte boundaries.
    if lora_A_ERD.device.type == "mps":
        return "loop"
    widths, size = (inputs, rank, lora_B_EOR.shape[1]), lora_A_ERD.element_size()
    return "grouped" if all(width * size % 16 == 0 for width in widths) else "loop"


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of weights and of sums over experts: float32 for half precision."""
    return torch.promote_types(dtype, torch.float32)


def _dense_weights(weights_TK: Tensor, indices_TK: Tensor, experts: int) -> Tensor:
    """Return the weight of every expert for every token, [T, E, 1]."""
    weights_TE = weights_TK.new_zeros(len(weights_TK), experts)
    return weights_TE.scatter_add_(1, indices_TK, weights_TK).unsqueeze(-1)


def _all_ranks(x_TD: Tensor, lora_A_ERD: Tensor) -> Tensor:
    """Return A_e x for every expert and token, [T, E, R]."""
    if len(lora_A_ERD) == 1:
        return F.linear(x_TD, lora_A_ERD[0]).unsqueeze(1)
    return torch.matmul(x_TD, lora_A_ERD.transpose(1, 2)).transpose(0, 1)


def _sum_experts(h_TER: Tensor, lora_B_EOR: Tensor) -> Tensor:
    """Return sum_e B_e h_e for every token, in the dtype of the B's.

    One product over experts and ranks: adding expert by expert would round each sum.
    """
    lora_B_NO = lora_B_EOR.transpose(1, 2).flatten(0, 1)  # no copy of factors that are packed
    return h_TER.flatten(1).to(lora_B_EOR.dtype) @ lora_B_NO


class _Pairs:
    """The pairs of a token and an expert, sorted by expert.

    Attributes:
        order_N: which pair is at each place.
        token_N: whose token it is.
    """

    def __init__(self, indices_TK: Tensor, experts: int, product: Product) -> None:
        self._shape = indices_TK.shape
        experts_N, self.order_N = indices_TK.flatten().sort(stable=True)
        self.token_N = self.order_N // indices_TK.shape[1]
        places_N = torch.arange(len(self.order_N), device=indices_TK.device)
        self._place_N = torch.empty_like(places_N).index_copy_(0, self.order_N, places_N)
        self._counts_E = torch.bincount(experts_N, minlength=experts)
        self._product = product

    def product(self, x_ND: Tensor, weight_EOD: Tensor) -> Tensor:
        """Multiply each expert's rows by that expert's matrix."""
        return self._product(x_ND, weight_EOD, self._counts_E)

    def sum(self, y_NO: Tensor) -> Tensor:
        """Put the pairs back in their tokens' order, and sum over each token's experts.

        Sums of half precision are rounded once: `torch.sum` takes them in float32. A bag of
        embeddings, which does both at once, would round each, and has no second derivative.
        """
        is_cpu, is_half = y_NO.device.type == "cpu", y_NO.dtype.itemsize < 4
        if is_cpu and not is_half and not y_NO.requires_grad:
            return F.embedding_bag(self._place_N.view(self._shape), y_NO, mode="sum")
        y_TKO = y_NO.index_select(0, self._place_N)
        return y_TKO.view(*self._shape, y_NO.shape[1]).sum(dim=1)


def _product_grouped(x_ND: Tensor, weight_EOD: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply each expert's run of rows by that expert's matrix, in one call."""
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_ND, weight_EOD.transpose(1, 2), offs=offsets_E)


def _product_loop(x_ND: Tensor, weight_EOD: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply the same way, with one product for each expert that has rows."""
    runs = zip(x_ND.split(counts_E.tolist()), weight_EOD, strict=True)
    products = [run_ND @ weight_OD.T for run_ND, weight_OD in runs if len(run_ND)]
    return torch.cat(products or [x_ND.new_empty(0, weight_EOD.shape[1])])


_PRODUCTS: dict[str, Product] = {"grouped": _product_grouped, "loop": _product_loop}
