"""The Triton programs that mix experts; `phatgoose.ops.triton_kernels` launches them.

Shape suffixes: T tokens, D input features, O output features, K experts per token, R LoRA rank, N
pairs of a token and one of its choices (`pair = token * K + k`), G what one program reads at once
to sort them, C columns: the rank directions of the experts that a group of pairs is sent to. A
suffix names a block of that dimension.

Operands of matrix products have the dtype `OPERAND`: that of the experts' factors, or float32 in
Triton's interpreter, which has no products in bfloat16 (it also cuts to bfloat16 where a GPU
rounds). Sums are float32, and offsets that grow with tokens or experts are int64.
"""

import triton
import triton.language as tl


@triton.jit
def group_program(
    indices_ptr: tl.tensor,
    order_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    tokens: tl.tensor,
    experts: tl.tensor,
    blocks: tl.tensor,
    stride_t: tl.tensor,
    stride_k: tl.tensor,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """List one expert's pairs, and the blocks of up to `BLOCK_N` of them that are work.

    Tokens' last choices are a section of their own, with its own blocks, after all others. An
    expert's blocks begin at `pairs of the experts before it // BLOCK_N + expert`: no two experts
    can collide, and nothing about the others but one count is needed. Blocks between the last one
    used and the next expert's first are marked as empty with an expert of -1.
    """
    expert = tl.program_id(0)
    last = tl.program_id(1) + 1 == tl.num_programs(1)
    others = tokens * (K - 1)
    first_k = tl.where(last, K - 1, 0)
    width = tl.where(last, 1, K - 1)
    items = tokens * width
    section = tl.where(last, others, 0)
    first_block = tl.program_id(1) * (others // BLOCK_N + experts)

    start = 0
    count = 0
    for i in range(0, items, BLOCK_G):
        i_G = i + tl.arange(0, BLOCK_G)
        index_ptr_G = indices_ptr + i_G // width * stride_t + (first_k + i_G % width) * stride_k
        index_G = tl.load(index_ptr_G, mask=i_G < items, other=experts)
        start += tl.sum((index_G < expert).to(tl.int32), axis=0)
        count += tl.sum((index_G == expert).to(tl.int32), axis=0)

    owned = (start + count) // BLOCK_N - start // BLOCK_N + 1
    first_block += start // BLOCK_N + expert
    for b in range(0, owned, BLOCK_G):
        b_G = b + tl.arange(0, BLOCK_G)
        begin_G = b_G * BLOCK_N
        end_G = tl.minimum(begin_G + BLOCK_N, count)
        block_ptr_G = blocks_ptr + first_block + b_G
        mask_G = b_G < owned
        tl.store(block_ptr_G, tl.where(begin_G < count, expert, -1), mask=mask_G)
        tl.store(block_ptr_G + blocks, section + start + begin_G, mask=mask_G)
        tl.store(block_ptr_G + 2 * blocks, section + start + end_G, mask=mask_G)

    if count > 0:
        place = section + start
        for i in range(0, items, BLOCK_G):
            i_G = i + tl.arange(0, BLOCK_G)
            index_ptr_G = indices_ptr + i_G // width * stride_t + (first_k + i_G % width) * stride_k
            index_G = tl.load(index_ptr_G, mask=i_G < items, other=experts)
            mine_G = (index_G == expert).to(tl.int32)
            place_G = place + tl.cumsum(mine_G, axis=0) - mine_G
            pair_G = i_G // width * K + first_k + i_G % width
            tl.store(order_ptr + place_G, pair_G, mask=mine_G != 0)
            place += tl.sum(mine_G, axis=0)


@triton.jit
def shrink_program(
    x_ptr: tl.tensor,
    lora_A_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    mixtures_ptr: tl.tensor,
    order_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    h_ptr: tl.tensor,
    features: tl.tensor,
    blocks: tl.tensor,
    stride_t: tl.tensor,
    stride_d: tl.tensor,
    OPERAND: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Write h = weight * x A for a block of pairs of one expert, or of one query's mixture."""
    block = blocks_ptr + tl.program_id(0)
    group = tl.load(block)
    if group >= 0:
        place_N = tl.load(block + blocks) + tl.arange(0, BLOCK_N)
        mask_N1 = (place_N < tl.load(block + 2 * blocks))[:, None]
        pair_N = tl.load(order_ptr + place_N, mask=place_N < tl.load(block + 2 * blocks), other=0)
        c_C = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_1C = (c_C < COLUMNS)[None, :]
        offset_C = _columns(mixtures_ptr, group, c_C, features, 1, RANK, COLUMNS)
        row_ptr_N1 = x_ptr + (pair_N // K).to(tl.int64)[:, None] * stride_t
        h_NC = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
        for start in range(0, features, BLOCK_D):
            d_D = start + tl.arange(0, BLOCK_D)
            mask_D = d_D < features
            x_ptr_ND = row_ptr_N1 + d_D[None, :] * stride_d
            x_ND = tl.load(x_ptr_ND, mask=mask_N1 & mask_D[None, :], other=0)
            a_ptr_DC = lora_A_ptr + offset_C[None, :] + d_D[:, None] * RANK
            a_DC = tl.load(a_ptr_DC, mask=mask_D[:, None] & mask_1C, other=0)
            h_NC = tl.dot(x_ND.to(OPERAND), a_DC.to(OPERAND), h_NC, input_precision="ieee")
        if mixtures_ptr is None:
            h_NC *= tl.load(weights_ptr + pair_N)[:, None].to(tl.float32)
        else:
            # COLUMNS // RANK experts share the row of weights of a query.
            weight_ptr_C = weights_ptr + group * (COLUMNS // RANK) + c_C // RANK
            h_NC *= tl.load(weight_ptr_C, mask=c_C < COLUMNS, other=0)[None, :].to(tl.float32)
        h_ptr_NC = h_ptr + pair_N.to(tl.int64)[:, None] * COLUMNS + c_C[None, :]
        tl.store(h_ptr_NC, h_NC, mask=mask_N1 & mask_1C)


@triton.jit
def _columns(
    mixtures_ptr: tl.tensor,
    group: tl.tensor,
    c_C: tl.tensor,
    width: tl.tensor,
    stride_r: tl.tensor,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Return where each column's expert and rank direction begin in factors of RANK * width."""
    if mixtures_ptr is None:
        offset_C = group.to(tl.int64) * RANK * width + c_C * stride_r
    else:
        mixture_ptr_C = mixtures_ptr + group * (COLUMNS // RANK) + c_C // RANK
        expert_C = tl.load(mixture_ptr_C, mask=c_C < COLUMNS, other=0).to(tl.int64)
        offset_C = expert_C * RANK * width + c_C % RANK * stride_r
    return offset_C


@triton.jit
def expand_program(
    y_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    h_ptr: tl.tensor,
    lora_B_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    mixtures_ptr: tl.tensor,
    order_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    first_block: tl.tensor,
    outputs: tl.tensor,
    blocks: tl.tensor,
    stride_t: tl.tensor,
    stride_o: tl.tensor,
    OPERAND: tl.constexpr,
    LAST: tl.constexpr,
    FACTORS: tl.constexpr,
    K: tl.constexpr,
    RANK: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """Multiply h by B: into `parts`, or for tokens' last choices into y with all their parts."""
    block = blocks_ptr + first_block + tl.program_id(0)
    group = tl.load(block)
    if group >= 0:
        place_N = tl.load(block + blocks) + tl.arange(0, BLOCK_N)
        mask_N = place_N < tl.load(block + 2 * blocks)
        pair_N = tl.load(order_ptr + place_N, mask=mask_N, other=0).to(tl.int64)
        token_N = pair_N // K
        o_O = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        mask_1O = (o_O < outputs)[None, :]
        sum_NO = tl.zeros([BLOCK_N, BLOCK_O], tl.float32)
        for start in range(0, COLUMNS, BLOCK_C):
            c_C = start + tl.arange(0, BLOCK_C)
            mask_NC = mask_N[:, None] & (c_C < COLUMNS)[None, :]
            if FACTORS:
                h_NC = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
                for k in range(K):
                    row_N = token_N * K + k
                    h_NC += tl.load(
                        h_ptr + row_N[:, None] * COLUMNS + c_C[None, :], mask=mask_NC, other=0.0
                    )
                weight_N = tl.load(weights_ptr + pair_N, mask=mask_N, other=0).to(tl.float32)
                h_NC *= weight_N[:, None]
            else:
                h_ptr_NC = h_ptr + pair_N[:, None] * COLUMNS + c_C[None, :]
                h_NC = tl.load(h_ptr_NC, mask=mask_NC, other=0.0)
            offset_C = _columns(mixtures_ptr, group, c_C, outputs, outputs, RANK, COLUMNS)
            b_ptr_CO = lora_B_ptr + offset_C[:, None] + o_O[None, :]
            b_CO = tl.load(b_ptr_CO, mask=(c_C < COLUMNS)[:, None] & mask_1O, other=0)
            h_NC = h_NC.to(lora_B_ptr.dtype.element_ty).to(OPERAND)
            sum_NO = tl.dot(h_NC, b_CO.to(OPERAND), sum_NO, input_precision="ieee")
        mask_NO = mask_N[:, None] & mask_1O
        if LAST:
            for k in range(K - 1):
                row_N1 = (token_N * (K - 1) + k)[:, None]
                part_ptr_NO = parts_ptr + row_N1 * outputs + o_O[None, :]
                sum_NO += tl.load(part_ptr_NO, mask=mask_NO, other=0).to(tl.float32)
            y_ptr_NO = y_ptr + token_N[:, None] * stride_t + o_O[None, :] * stride_o
            sum_NO += tl.load(y_ptr_NO, mask=mask_NO, other=0).to(tl.float32)
            tl.store(y_ptr_NO, sum_NO.to(y_ptr.dtype.element_ty), mask=mask_NO)
        else:
            row_N1 = (token_N * (K - 1) + pair_N % K)[:, None]
            part_NO = sum_NO.to(parts_ptr.dtype.element_ty)
            tl.store(parts_ptr + row_N1 * outputs + o_O[None, :], part_NO, mask=mask_NO)
