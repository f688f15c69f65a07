"""The custom operators of `phatgoose.ops.triton_kernels`: their schemas, launches and fakes.

Shape suffixes: T tokens, D input features, O output features, E experts, K experts per token, Q
queries, R LoRA rank, N = T * K pairs of a token and one of its choices, P parts of a sum, C = K * R
columns of a query's mixture.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from phatgoose.ops.routing import RENORMALISE_EPS, STANDARDISE_EPS
from phatgoose.ops.triton_mixing import expand_program, group_program, shrink_program
from phatgoose.ops.triton_routing import (
    decode_program,
    inverse_std_program,
    scores_program,
    select_program,
)

OPERATORS = torch.ops.phatgoose_triton
_LIBRARY = torch.library.Library("phatgoose_triton", "DEF")
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Products in float32 on the tensor cores round their operands. In three passes (`tf32x3`) an input
# in float16 loses nothing, and the gates 2 of their 24 bits.
_PRECISION = {torch.float32: "ieee", torch.bfloat16: "ieee", torch.float16: "tf32x3"}

# The blocks below follow from shapes alone, which a captured graph repeats.


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """Return a decorator that registers an operator for every device, with a fake."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = schema.partition("(")[0]
        _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"phatgoose_triton::{name}", fake, lib=_LIBRARY)
        return function

    return register


def _operand(dtype: torch.dtype) -> tl.dtype:
    return tl.float32 if triton.knobs.runtime.interpret else _TYPES[dtype]


def _power_of_two(size: int, least: int, most: int) -> int:
    return min(max(triton.next_power_of_2(size), least), most)


def _empty_inverse(x_TD: Tensor) -> Tensor:
    return x_TD.new_empty(x_TD.shape[0], dtype=torch.float32)


@_operator("inverse_std(Tensor x_TD) -> Tensor", _empty_inverse)
def _inverse_std(x_TD: Tensor) -> Tensor:
    tokens, features = x_TD.shape
    inverse_T = _empty_inverse(x_TD)
    if tokens:
        with torch.cuda.device_of(x_TD):
            inverse_std_program[(tokens,)](
                x_TD,
                inverse_T,
                features,
                *x_TD.stride(),
                EPS=STANDARDISE_EPS,
                BLOCK_D=_power_of_two(features, 16, 4096),
            )
    return inverse_T


def _empty_scores(x_TD: Tensor, gates_ED: Tensor) -> Tensor:
    return gates_ED.new_empty(x_TD.shape[0], gates_ED.shape[0])


@_operator("scores(Tensor x_TD, Tensor gates_ED) -> Tensor", _empty_scores)
def _scores(x_TD: Tensor, gates_ED: Tensor) -> Tensor:
    return _score_parts(x_TD, gates_ED, parts=1, block_E=64)[0]


def _score_parts(x_TD: Tensor, gates_ED: Tensor, parts: int, block_E: int) -> Tensor:
    """Return the scores as a sum of at most so many parts, each over some features."""
    (tokens, features), experts = x_TD.shape, gates_ED.shape[0]
    block_D = _power_of_two(features, 16, 64)
    span = triton.cdiv(triton.cdiv(features, parts), block_D) * block_D
    parts = triton.cdiv(features, span)
    scores_PTE = gates_ED.new_empty(parts, tokens, experts)
    # As for `mix_`, blocks in float32 are smaller; so are those of float16, in three passes.
    block_T = _power_of_two(tokens, 16, 64 if x_TD.dtype == torch.bfloat16 else 32)
    if tokens:
        with torch.cuda.device_of(x_TD):
            scores_program[triton.cdiv(experts, block_E), triton.cdiv(tokens, block_T), parts](
                x_TD,
                gates_ED,
                scores_PTE,
                tokens,
                features,
                experts,
                *x_TD.stride(),
                OPERAND=_operand(x_TD.dtype),
                PRECISION=_PRECISION[x_TD.dtype],
                SPAN=span,
                BLOCK_T=block_T,
                BLOCK_E=block_E,
                BLOCK_D=block_D,
            )
    return scores_PTE


def _empty_choice(scores_TE: Tensor, top_k: int, *_: Any) -> tuple[Tensor, Tensor]:
    shape = scores_TE.shape[0], min(top_k, scores_TE.shape[1])
    weights_TK = scores_TE.new_empty(shape, dtype=torch.float32)
    return weights_TK, scores_TE.new_empty(shape, dtype=torch.int64)


@_operator(
    "select(Tensor scores_TE, int top_k, Tensor? inverse_T, Tensor? bias_TE, Tensor? absent_E, "
    "bool equal, bool absolute) -> (Tensor, Tensor)",
    _empty_choice,
)
def _select(
    scores_TE: Tensor,
    top_k: int,
    inverse_T: Tensor | None,
    bias_TE: Tensor | None,
    absent_E: Tensor | None,
    equal: bool,
    absolute: bool,
) -> tuple[Tensor, Tensor]:
    tokens, experts = scores_TE.shape
    weights_TK, indices_TK = _empty_choice(scores_TE, top_k)
    block_E = _power_of_two(experts, 16, 2**20)
    if tokens:
        with torch.cuda.device_of(scores_TE):
            select_program[(tokens,)](
                scores_TE,
                inverse_T,
                bias_TE,
                absent_E,
                weights_TK,
                indices_TK,
                experts,
                *scores_TE.stride(),
                *_strides(bias_TE),
                EPS=RENORMALISE_EPS,
                TOP_K=weights_TK.shape[1],
                EQUAL=equal,
                ABSOLUTE=absolute,
                BLOCK_E=block_E,
                BLOCK_K=triton.next_power_of_2(weights_TK.shape[1]),
                num_warps=_power_of_two(block_E // 256, 1, 16),
            )
    return weights_TK, indices_TK


def _strides(bias_TE: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if bias_TE is None else bias_TE.stride()


def _empty_decoded(y_TO: Tensor, x_TD: Tensor, gates_ED: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    _, _, top_k, *_ = rest
    return _empty_choice(_empty_scores(x_TD, gates_ED), top_k)


@_operator(
    "decode_(Tensor(a!) y_TO, Tensor x_TD, Tensor gates_ED, Tensor lora_A_EDR, Tensor lora_B_ERO, "
    "int top_k, bool standardise, bool absolute, Tensor? bias_TE, Tensor? absent_E, bool equal) "
    "-> (Tensor, Tensor)",
    _empty_decoded,
)
def _decode_(
    y_TO: Tensor,
    x_TD: Tensor,
    gates_ED: Tensor,
    lora_A_EDR: Tensor,
    lora_B_ERO: Tensor,
    top_k: int,
    standardise: bool,
    absolute: bool,
    bias_TE: Tensor | None,
    absent_E: Tensor | None,
    equal: bool,
) -> tuple[Tensor, Tensor]:
    (tokens, outputs), (experts, features, rank) = y_TO.shape, lora_A_EDR.shape
    # Few programs read at a fraction of the memory's speed: some 200 in either launch.
    block_E = 16
    parts = triton.cdiv(200, triton.cdiv(experts, block_E))
    scores_PTE = _score_parts(x_TD, gates_ED, parts, block_E)
    weights_TK, indices_TK = _empty_choice(scores_PTE[0], top_k)
    block_R = triton.next_power_of_2(rank)
    block_O = _power_of_two(outputs, 16, 4096 // block_R)
    span = triton.cdiv(triton.cdiv(outputs * tokens, 200), block_O) * block_O
    if tokens:
        with torch.cuda.device_of(x_TD):
            decode_program[tokens, triton.cdiv(outputs, span)](
                y_TO,
                x_TD,
                scores_PTE,
                lora_A_EDR,
                lora_B_ERO,
                bias_TE,
                absent_E,
                weights_TK,
                indices_TK,
                tokens,
                features,
                outputs,
                experts,
                *y_TO.stride(),
                *x_TD.stride(),
                *_strides(bias_TE),
                STANDARDISE_EPS=STANDARDISE_EPS,
                EPS=RENORMALISE_EPS,
                STANDARDISE=standardise,
                TOP_K=weights_TK.shape[1],
                EQUAL=equal,
                ABSOLUTE=absolute,
                RANK=rank,
                PARTS=len(scores_PTE),
                SPAN=span,
                BLOCK_D=_power_of_two(features, 16, 8192 // block_R),
                BLOCK_O=block_O,
                BLOCK_E=_power_of_two(experts, 16, 2**20),
                BLOCK_K=triton.next_power_of_2(weights_TK.shape[1]),
                BLOCK_R=block_R,
                num_warps=8,
            )
    return weights_TK, indices_TK


def _nothing(*_: Any) -> None:
    """Stand for an operator that returns nothing."""


@_operator(
    "mix_(Tensor(a!) y_TO, Tensor x_TD, Tensor lora_A_EDR, Tensor lora_B_ERO, Tensor indices_TK, "
    "Tensor weights_TK, bool factors) -> ()",
    _nothing,
)
def _mix_(
    y_TO: Tensor,
    x_TD: Tensor,
    lora_A_EDR: Tensor,
    lora_B_ERO: Tensor,
    indices_TK: Tensor,
    weights_TK: Tensor,
    factors: bool,
) -> None:
    experts = len(lora_A_EDR)
    if y_TO.numel() and indices_TK.numel():
        _mix_groups(
            y_TO, x_TD, lora_A_EDR, lora_B_ERO, indices_TK, experts, weights_TK, None, factors
        )


@_operator(
    "mix_queries_(Tensor(a!) y_TO, Tensor x_TD, Tensor lora_A_EDR, Tensor lora_B_ERO, "
    "Tensor query_T, Tensor indices_QK, Tensor weights_QK) -> ()",
    _nothing,
)
def _mix_queries_(
    y_TO: Tensor,
    x_TD: Tensor,
    lora_A_EDR: Tensor,
    lora_B_ERO: Tensor,
    query_T: Tensor,
    indices_QK: Tensor,
    weights_QK: Tensor,
) -> None:
    groups_T1, mixtures_QK = query_T.unsqueeze(1), indices_QK.contiguous()
    if y_TO.numel() and indices_QK.numel():
        _mix_groups(
            y_TO,
            x_TD,
            lora_A_EDR,
            lora_B_ERO,
            groups_T1,
            len(indices_QK),
            weights_QK,
            mixtures_QK,
            False,
        )


def _group(groups_TK: Tensor, groups: int, block_N: int) -> tuple[Tensor, Tensor, int]:
    """Sort pairs by group.

    Returns:
        The pairs in order, the blocks of `group_program`, and how many blocks come before those of
        the tokens' last choices.
    """
    tokens, top_k = groups_TK.shape
    others = tokens * (top_k - 1) // block_N + groups if top_k > 1 else 0
    blocks = others + tokens // block_N + groups
    order_N = groups_TK.new_empty(tokens * top_k, dtype=torch.int32)
    blocks_3 = groups_TK.new_empty(3, blocks, dtype=torch.int32)
    group_program[groups, min(top_k, 2)](
        groups_TK,
        order_N,
        blocks_3,
        tokens,
        groups,
        blocks,
        *groups_TK.stride(),
        K=top_k,
        BLOCK_N=block_N,
        BLOCK_G=_power_of_two(tokens * top_k, 16, 4096),
        num_warps=8,
    )
    return order_N, blocks_3, others


def _mix_groups(
    y_TO: Tensor,
    x_TD: Tensor,
    lora_A_EDR: Tensor,
    lora_B_ERO: Tensor,
    groups_TK: Tensor,
    groups: int,
    weights: Tensor,
    mixtures_QK: Tensor | None,
    factors: bool,
) -> None:
    """Sort pairs by group, an expert or a query with its mixture of experts, and mix by blocks."""
    (tokens, top_k), (_, features, rank) = groups_TK.shape, lora_A_EDR.shape
    outputs, weights = y_TO.shape[1], weights.contiguous()
    columns = rank * (1 if mixtures_QK is None else mixtures_QK.shape[1])
    # Full blocks where pairs spread evenly; a product has at least 16 rows and columns, and in
    # float32 no tensor core, whose registers the sums of a larger block exceed.
    block_N = _power_of_two(triton.cdiv(tokens, groups), 16, 128 // x_TD.element_size())
    block_C = _power_of_two(columns, 16, 128 // x_TD.element_size())
    h_NC = weights.new_empty(tokens * top_k, columns, dtype=torch.float32)
    parts_NO = h_NC.new_empty(tokens * (top_k - 1), outputs)
    common = {
        "OPERAND": _operand(x_TD.dtype),
        "K": top_k,
        "RANK": rank,
        "COLUMNS": columns,
        "BLOCK_N": block_N,
        "BLOCK_C": block_C,
    }
    with torch.cuda.device_of(x_TD):
        order_N, blocks_3, others = _group(groups_TK, groups, block_N)
        blocks = blocks_3.shape[1]
        shrink_program[blocks, triton.cdiv(columns, block_C)](
            x_TD,
            lora_A_EDR,
            weights,
            mixtures_QK,
            order_N,
            blocks_3,
            h_NC,
            features,
            blocks,
            *x_TD.stride(),
            BLOCK_D=_power_of_two(features, 16, 128),
            **common,
        )
        block_O = _power_of_two(outputs, 16, 128)
        for last, first, count in ((False, 0, others), (True, others, blocks - others)):
            if count:
                expand_program[count, triton.cdiv(outputs, block_O)](
                    y_TO,
                    parts_NO,
                    h_NC,
                    lora_B_ERO,
                    weights,
                    mixtures_QK,
                    order_N,
                    blocks_3,
                    first,
                    outputs,
                    blocks,
                    *y_TO.stride(),
                    LAST=last,
                    FACTORS=factors,
                    BLOCK_O=block_O,
                    **common,
                )
