"""The weighted sum of each token's chosen experts: y_TO = sum_k w_k * scale * B_k A_k x.

Shape suffixes: T tokens, D input features, O output features, E experts in the pool, K experts per
token, R LoRA rank, N = T * K pairs of a token and an expert, sorted by expert.

                x_TD                       pairs sorted by expert: [e0 e0 e0 | e1 | e3 e3 ...]
                  |   gather rows                                   \\________/ one product each
                x_ND  --A_e-->  h_NR  --* w-->  --B_e-->  y_NO  --scatter, sum over K-->  y_TO

Where a token's choice is a good part of the pool, sorting does not pay: all experts' A at once,
then each expert's B, with a weight of zero for those that were not chosen.

In half precision the operands of a matrix product are rounded. Weights, and all sums over experts,
are in float32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# From each expert's run of rows and that expert's matrix to their products.
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


# The sizes of the groups are data: a compiled model runs these two as they are.
@torch.compiler.disable
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
    top_k, way = indices_TK.shape[1], _way(lora_A_ERD, lora_B_EOR, indices_TK)
    weights_TK = weights_TK.to(_sum_dtype(x_TD.dtype))
    if way == "dense":
        weights_TE1 = _dense_weights(weights_TK * scale, indices_TK, len(lora_A_ERD))
        h_TER = F.linear(x_TD, lora_A_ERD.flatten(0, 1)).unflatten(1, lora_A_ERD.shape[:2])
        return _sum_experts(h_TER * weights_TE1, lora_B_EOR)
    order_N, counts_E = _sort(indices_TK, len(lora_A_ERD))
    product = _PRODUCTS[way]
    weights_N = weights_TK.flatten()[order_N] * scale
    h_NR = product(x_TD[order_N // top_k], lora_A_ERD, counts_E) * weights_N.unsqueeze(-1)
    y_NO = product(h_NR.to(x_TD.dtype), lora_B_EOR, counts_E)
    return _sum_pairs(y_NO, order_N, top_k)


@torch.compiler.disable
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
    top_k, way = indices_TK.shape[1], _way(lora_A_ERD, lora_B_EOR, indices_TK)
    weights_TK = weights_TK.to(_sum_dtype(x_TD.dtype))
    if way == "dense":
        weights_TE1 = _dense_weights(weights_TK, indices_TK, len(lora_A_ERD))
        h_TER = F.linear(x_TD, lora_A_ERD.flatten(0, 1)).unflatten(1, lora_A_ERD.shape[:2])
        h_TR = (h_TER * weights_TE1).sum(dim=1)
        return _sum_experts(h_TR.unsqueeze(1) * (weights_TE1 * scale), lora_B_EOR)
    order_N, counts_E = _sort(indices_TK, len(lora_A_ERD))
    product = _PRODUCTS[way]
    weights_N1 = weights_TK.flatten()[order_N].unsqueeze(-1)
    h_NR = product(x_TD[order_N // top_k], lora_A_ERD, counts_E) * weights_N1
    h_TR = _sum_pairs(h_NR, order_N, top_k)
    h_NR = (h_TR[order_N // top_k] * (weights_N1 * scale)).to(x_TD.dtype)
    return _sum_pairs(product(h_NR, lora_B_EOR, counts_E), order_N, top_k)


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
    """Return the fastest of the methods that support these shapes: `dense`, `grouped` or `loop`.

    The borders were measured (benchmarks/mix.py).
    """
    experts, rank, inputs = lora_A_ERD.shape
    # Up to four experts for one that is chosen, sorting takes longer than evaluating them all.
    if experts <= 4 * indices_TK.shape[1]:
        return "dense"
    # The grouped product looks at every expert, chosen or not: with few pairs in a large pool the
    # loop over those that were chosen wins, from a fifth as many pairs as experts on it loses.
    if indices_TK.numel() * 5 < experts:
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


def _sum_experts(h_TER: Tensor, lora_B_EOR: Tensor) -> Tensor:
    """Return sum_e B_e h_e for every token, in the dtype of the B's."""
    if h_TER.dtype != lora_B_EOR.dtype:
        # One product over experts and ranks: adding expert by expert would round each sum.
        lora_B_ON = lora_B_EOR.transpose(0, 1).flatten(1)
        return F.linear(h_TER.flatten(1).to(lora_B_EOR.dtype), lora_B_ON)
    y_TO = h_TER.new_zeros(len(h_TER), lora_B_EOR.shape[1])  # no copy of the B's
    for h_TR, lora_B_OR in zip(h_TER.unbind(1), lora_B_EOR, strict=True):
        y_TO.addmm_(h_TR, lora_B_OR.T)
    return y_TO


def _sort(indices_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Return the order of the pairs sorted by expert, and how many pairs each expert has."""
    experts_N, order_N = indices_TK.flatten().sort(stable=True)
    return order_N, torch.bincount(experts_N, minlength=experts)


def _sum_pairs(y_NO: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    """Put the pairs back in their tokens' order, and sum over each token's experts.

    Sums of half precision are rounded once: `torch.sum` takes them in float32.
    """
    y_TKO = torch.empty_like(y_NO).index_copy_(0, order_N, y_NO).unflatten(0, (-1, top_k))
    return y_TKO.sum(dim=1)


def _product_grouped(x_ND: Tensor, weight_EOD: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply each expert's run of rows by that expert's matrix, in one call."""
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_ND, weight_EOD.transpose(1, 2), offs=offsets_E)


def _product_loop(x_ND: Tensor, weight_EOD: Tensor, counts_E: Tensor) -> Tensor:
    """Multiply the same way, with one product for each expert that has rows."""
    y_NO = x_ND.new_empty(x_ND.shape[0], weight_EOD.shape[1])
    start = 0
    for expert, rows in enumerate(counts_E.tolist()):
        if rows:
            torch.mm(
                x_ND[start : start + rows], weight_EOD[expert].T, out=y_NO[start : start + rows]
            )
            start += rows
    return y_NO


_PRODUCTS: dict[str, Product] = {"grouped": _product_grouped, "loop": _product_loop}
