"""Apply one mixture of experts to all tokens of a query, by merging it into the frozen weight.

    y_TO = x_TD (W + sum_k w_k B_k A_k)^T

Shape suffixes: T tokens, D input features, O output features, Q queries, K experts per query,
R LoRA rank, C = K * R columns.

Merging multiplies all K experts' factors once per query; applying them multiplies each token by
them. So merging pays for long prompts only. In half precision the merged weight would be rounded,
and small updates with it, so merging is for float32.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from phatgoose.ops.frozen_linear import FrozenLinear, product
from phatgoose.ops.routed import RoutedExperts

# Merging also reads and writes the weight, which takes about as long as multiplying so many columns
# (measured on linears of 576 x 192 to 2048 x 2048, with 64 and 320 columns).
_WRITING_COLUMNS = 64


def merging_pays(linear: nn.Module, columns: int, query_T: Tensor) -> TypeGuard[nn.Linear]:
    """Return whether tokens of these queries cost less with merged weights, and may have them.

    Whoever hooks the linear, or computes it in another way, would not notice what is merged.

    Args:
        linear: the frozen linear.
        columns: the experts of a mixture times their rank.
        query_T: each token's query, ascending.
    """
    if not isinstance(linear, nn.Linear) or type(linear) not in (nn.Linear, FrozenLinear):
        return False
    outputs, inputs = linear.weight.shape
    per_token = columns * (inputs + outputs)
    per_query = (columns + _WRITING_COLUMNS) * inputs * outputs
    most_queries = len(query_T) * per_token / per_query
    return (
        most_queries >= 1
        and linear.weight.device.type == "cpu"
        and linear.weight.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not (linear._forward_hooks or linear._forward_pre_hooks)
        and len(query_T.unique_consecutive()) <= most_queries
    )


def merged_output(
    x_TD: Tensor,
    linear: nn.Linear,
    experts: RoutedExperts,
    weights_QK: Tensor,
    indices_QK: Tensor,
    query_T: Tensor,
) -> Tensor:
    """Return the output of a frozen linear and of each query's mixture of experts.

    Args:
        x_TD: inputs of the linear.
        linear: the frozen linear.
        experts: all that the mixtures are of.
        weights_QK: each query's weights.
        indices_QK: each query's experts.
        query_T: each token's query, ascending.

    Returns:
        `y_TO`.
    """
    queries, counts = query_T.unique_consecutive(return_counts=True)
    parts = []
    for query, part_TD in zip(queries.tolist(), x_TD.split(counts.tolist()), strict=True):
        indices_K = indices_QK[query]
        lora_A_CD = experts.lora_A_ERD.index_select(0, indices_K).flatten(0, 1)
        lora_B_KRO = experts.lora_B_EOR.transpose(1, 2).index_select(0, indices_K)
        lora_B_CO = (lora_B_KRO * weights_QK[query].to(lora_B_KRO).view(-1, 1, 1)).flatten(0, 1)
        weight_OD = product(lora_B_CO.t(), lora_A_CD.t()).add_(linear.weight)
        parts.append(product(part_TD, weight_OD, linear.bias))
    return torch.cat(parts) if len(parts) > 1 else parts[0]
