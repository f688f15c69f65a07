"""The Triton programs that choose experts; `phatgoose.ops.triton_kernels` launches them.

Shape suffixes: T tokens, D input features, O output features, E experts, K experts per token, R
LoRA rank. A suffix names a block of that dimension.

Sums are float32, and offsets that grow with tokens or experts are int64.
"""

import triton
import triton.language as tl

# Below the key of every score.
LOWEST = tl.constexpr(-(2**63))
INDEX_BITS = tl.constexpr(2**31 - 1)


@triton.jit
def inverse_std_program(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    features: tl.tensor,
    stride_t: tl.tensor,
    stride_d: tl.tensor,
    EPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Write one token's `1 / sqrt(variance + EPS)`."""
    token = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + token * stride_t
    tl.store(out_ptr + token, _inverse_std(row_ptr, features, stride_d, EPS, BLOCK_D))


@triton.jit
def _inverse_std(
    row_ptr: tl.tensor,
    features: tl.tensor,
    stride_d: tl.tensor,
    EPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """Return `1 / sqrt(variance + EPS)` of a row.

    The mean first, since x * x loses digits. The mean is rounded too: what the differences from it
    sum to corrects the variance.
    """
    sum_D = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, features, BLOCK_D):
        d_D = start + tl.arange(0, BLOCK_D)
        sum_D += tl.load(row_ptr + d_D * stride_d, mask=d_D < features, other=0).to(tl.float32)
    mean = tl.sum(sum_D, axis=0) / features
    rest_D = tl.zeros([BLOCK_D], tl.float32)
    square_D = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, features, BLOCK_D):
        d_D = start + tl.arange(0, BLOCK_D)
        x_D = tl.load(row_ptr + d_D * stride_d, mask=d_D < features, other=0).to(tl.float32)
        centered_D = tl.where(d_D < features, x_D - mean, 0.0)
        rest_D += centered_D
        square_D += centered_D * centered_D
    rest = tl.sum(rest_D, axis=0) / features
    return 1.0 / tl.sqrt(tl.sum(square_D, axis=0) / features - rest * rest + EPS)


@triton.jit
def scores_program(
    x_ptr: tl.tensor,
    gates_ptr: tl.tensor,
    out_ptr: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    experts: tl.tensor,
    stride_t: tl.tensor,
    stride_d: tl.tensor,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Write a block of gates . x over `SPAN` features, as accurate as a product in float32.

    A bfloat16 input times float32 gates is three products of the tensor cores: three bfloat16
    numbers hold the 24 bits of a float32.
    """
    e_E = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    t_T = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(2).to(tl.int64)
    first = tl.program_id(2) * SPAN
    score_ET = tl.zeros([BLOCK_E, BLOCK_T], tl.float32)
    gates_ptr_E1 = gates_ptr + e_E.to(tl.int64)[:, None] * features
    x_ptr_1T = x_ptr + t_T.to(tl.int64)[None, :] * stride_t
    for start in range(first, tl.minimum(first + SPAN, features), BLOCK_D):
        d_D = start + tl.arange(0, BLOCK_D)
        mask_ED = (e_E < experts)[:, None] & (d_D < features)[None, :]
        gate_ED = tl.load(gates_ptr_E1 + d_D[None, :], mask=mask_ED, other=0.0)
        mask_DT = (d_D < features)[:, None] & (t_T < tokens)[None, :]
        x_DT = tl.load(x_ptr_1T + d_D[:, None] * stride_d, mask=mask_DT, other=0)
        if x_ptr.dtype.element_ty == tl.bfloat16:
            for _ in tl.static_range(3):
                piece_ED = gate_ED.to(tl.bfloat16)
                score_ET = tl.dot(piece_ED.to(OPERAND), x_DT.to(OPERAND), score_ET)
                gate_ED -= piece_ED.to(tl.float32)
        else:
            x_DT = x_DT.to(tl.float32)
            score_ET = tl.dot(gate_ED, x_DT, score_ET, input_precision=PRECISION)
    row_1T = (part * tokens + t_T)[None, :]
    mask_ET = (e_E < experts)[:, None] & (t_T < tokens)[None, :]
    tl.store(out_ptr + row_1T * experts + e_E[:, None], score_ET, mask=mask_ET)


@triton.jit
def select_program(
    scores_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    absent_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    experts: tl.tensor,
    stride_t: tl.tensor,
    stride_e: tl.tensor,
    bias_stride_t: tl.tensor,
    bias_stride_e: tl.tensor,
    EPS: tl.constexpr,
    TOP_K: tl.constexpr,
    EQUAL: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Choose one token's experts."""
    token = tl.program_id(0).to(tl.int64)
    e_E = tl.arange(0, BLOCK_E)
    score_ptr_E = scores_ptr + token * stride_t + e_E * stride_e
    score_E = tl.load(score_ptr_E, mask=e_E < experts, other=0.0)
    if inverse_ptr is not None:
        score_E *= tl.load(inverse_ptr + token)
    if bias_ptr is not None:
        bias_ptr += token * bias_stride_t
    weight_K, index_K = _choose(
        score_E, bias_ptr, bias_stride_e, absent_ptr, experts, EPS, TOP_K, EQUAL, ABSOLUTE, BLOCK_K
    )
    k_K = tl.arange(0, BLOCK_K)
    tl.store(weights_ptr + token * TOP_K + k_K, weight_K, mask=k_K < TOP_K)
    tl.store(indices_ptr + token * TOP_K + k_K, index_K.to(tl.int64), mask=k_K < TOP_K)


@triton.jit
def _choose(
    score_E: tl.tensor,
    bias_ptr: tl.tensor,
    bias_stride_e: tl.tensor,
    absent_ptr: tl.tensor,
    experts: tl.tensor,
    EPS: tl.constexpr,
    TOP_K: tl.constexpr,
    EQUAL: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the weights and indices of the `TOP_K` best, best first, of equals the lowest index.

    Scores become integers in the same order with the index in the lower bits, so each maximum is a
    single expert, also among equal or infinite scores and those that are not a number.
    """
    e_E = tl.arange(0, score_E.shape[0])
    if ABSOLUTE:
        score_E = tl.abs(score_E)
    if bias_ptr is not None:
        bias_E = tl.load(bias_ptr + e_E * bias_stride_e, mask=e_E < experts, other=0)
        score_E += bias_E.to(tl.float32)
    if absent_ptr is not None:
        absent_E = tl.load(absent_ptr + e_E, mask=e_E < experts, other=0)
        score_E = tl.where(absent_E != 0, -float("inf"), score_E)
    score_E = tl.where(e_E < experts, score_E, -float("inf"))

    # One kind of zero, and one of not a number: the largest, as for `torch.topk`.
    clean_E = tl.where(score_E == 0.0, 0.0, tl.where(score_E == score_E, score_E, float("nan")))
    bits_E = clean_E.to(tl.int32, bitcast=True)
    key_E = (bits_E ^ ((bits_E >> 31) & INDEX_BITS)).to(tl.int64) << 32
    key_E = tl.where(e_E < experts, key_E + (e_E ^ INDEX_BITS), LOWEST)

    k_K = tl.arange(0, BLOCK_K)
    index_K = tl.zeros([BLOCK_K], tl.int32)
    kept_K = tl.full([BLOCK_K], -float("inf"), tl.float32)
    for k in tl.static_range(TOP_K):
        best = tl.max(key_E, axis=0)
        key_E = tl.where(key_E == best, LOWEST, key_E)
        index_K = tl.where(k_K == k, ((best & INDEX_BITS) ^ INDEX_BITS).to(tl.int32), index_K)
        key = (best >> 32).to(tl.int32)
        kept = (key ^ ((key >> 31) & INDEX_BITS)).to(tl.float32, bitcast=True)
        kept_K = tl.where(k_K == k, kept, kept_K)

    if EQUAL:
        # Not `weight > 0`: a large gap between scores makes a small weight 0.
        share_K = tl.where(kept_K > -float("inf"), 1.0, 0.0)
        weight_K = share_K / tl.sum(share_K, axis=0)
    else:
        highest = tl.max(score_E, axis=0)
        share_K = tl.exp(kept_K - highest) / tl.sum(tl.exp(score_E - highest), axis=0)
        share_K = tl.where(k_K < TOP_K, share_K, 0.0)
        weight_K = share_K / (tl.sum(share_K, axis=0) + EPS)
    if absent_ptr is not None:
        # Where every expert is absent the weights above are not numbers.
        absent_K = tl.load(absent_ptr + index_K, mask=k_K < TOP_K, other=0)
        weight_K = tl.where(absent_K != 0, 0.0, weight_K)
    return weight_K, index_K


@triton.jit
def decode_program(
    y_ptr: tl.tensor,
    x_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    lora_A_ptr: tl.tensor,
    lora_B_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    absent_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    tokens: tl.tensor,
    features: tl.tensor,
    outputs: tl.tensor,
    experts: tl.tensor,
    y_stride_t: tl.tensor,
    y_stride_o: tl.tensor,
    x_stride_t: tl.tensor,
    x_stride_d: tl.tensor,
    bias_stride_t: tl.tensor,
    bias_stride_e: tl.tensor,
    STANDARDISE_EPS: tl.constexpr,
    EPS: tl.constexpr,
    STANDARDISE: tl.constexpr,
    TOP_K: tl.constexpr,
    EQUAL: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    RANK: tl.constexpr,
    PARTS: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """Choose one token's experts, and add to `SPAN` of its outputs what they say."""
    token = tl.program_id(0).to(tl.int64)
    x_ptr += token * x_stride_t
    e_E = tl.arange(0, BLOCK_E)
    score_E = tl.zeros([BLOCK_E], tl.float32)
    for part in range(PARTS):
        score_ptr_E = scores_ptr + (part * tokens + token) * experts + e_E
        score_E += tl.load(score_ptr_E, mask=e_E < experts, other=0.0)
    if STANDARDISE:
        score_E *= _inverse_std(x_ptr, features, x_stride_d, STANDARDISE_EPS, BLOCK_D)
    if bias_ptr is not None:
        bias_ptr += token * bias_stride_t
    weight_K, index_K = _choose(
        score_E, bias_ptr, bias_stride_e, absent_ptr, experts, EPS, TOP_K, EQUAL, ABSOLUTE, BLOCK_K
    )
    k_K = tl.arange(0, BLOCK_K)
    if tl.program_id(1) == 0:
        tl.store(weights_ptr + token * TOP_K + k_K, weight_K, mask=k_K < TOP_K)
        tl.store(indices_ptr + token * TOP_K + k_K, index_K.to(tl.int64), mask=k_K < TOP_K)

    r_R = tl.arange(0, BLOCK_R)
    h_KR = tl.zeros([BLOCK_K, BLOCK_R], tl.float32)
    for k in tl.static_range(TOP_K):
        expert = tl.sum(tl.where(k_K == k, index_K, 0), axis=0).to(tl.int64)
        a_ptr_1R = lora_A_ptr + expert * RANK * features + r_R[None, :]
        product_DR = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
        for start in range(0, features, BLOCK_D):
            d_D = start + tl.arange(0, BLOCK_D)
            x_D = tl.load(x_ptr + d_D * x_stride_d, mask=d_D < features, other=0).to(tl.float32)
            mask_DR = (d_D < features)[:, None] & (r_R < RANK)[None, :]
            a_DR = tl.load(a_ptr_1R + d_D[:, None] * RANK, mask=mask_DR, other=0)
            product_DR += x_D[:, None] * a_DR.to(tl.float32)
        h_KR = tl.where(k_K[:, None] == k, tl.sum(product_DR, axis=0)[None, :], h_KR)
    h_KR *= weight_K[:, None]

    first = tl.program_id(1) * SPAN
    for start in range(first, tl.minimum(first + SPAN, outputs), BLOCK_O):
        o_O = start + tl.arange(0, BLOCK_O)
        y_ptr_O = y_ptr + token * y_stride_t + o_O * y_stride_o
        y_O = tl.load(y_ptr_O, mask=o_O < outputs, other=0).to(tl.float32)
        for k in tl.static_range(TOP_K):
            expert = tl.sum(tl.where(k_K == k, index_K, 0), axis=0).to(tl.int64)
            h_R = tl.sum(tl.where(k_K[:, None] == k, h_KR, 0.0), axis=0)
            b_ptr_RO = lora_B_ptr + expert * RANK * outputs + r_R[:, None] * outputs + o_O[None, :]
            mask_RO = (r_R < RANK)[:, None] & (o_O < outputs)[None, :]
            b_RO = tl.load(b_ptr_RO, mask=mask_RO, other=0).to(tl.float32)
            y_O += tl.sum(h_R[:, None] * b_RO, axis=0)
        tl.store(y_ptr_O, y_O.to(y_ptr.dtype.element_ty), mask=o_O < outputs)
