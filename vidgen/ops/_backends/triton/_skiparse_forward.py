# SPDX-License-Identifier: Apache-2.0
"""Skiparse attention forward: a tile of queries of one group and head visits the keys of its group, then the text's."""

import triton
import triton.language as tl

from ._skiparse_tiles import LOG2_E, load_rows, rows_of, shown_rows, store_column, store_rows

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def visit(q, k, v, shown, most, total, acc, factor, HIDING: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax, in powers of two."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if HIDING:
        scores = tl.where(shown[None, :], scores, float("-inf"))
    now = tl.maximum(most, tl.max(scores, 1) * factor)
    shift = now
    if HIDING:  # of a row that has seen nothing yet: -inf - -inf is no number
        shift = tl.where(now == float("-inf"), 0.0, now)
    weights = tl.exp2(scores * factor - shift[:, None])
    kept = tl.exp2(most - shift)
    total = total * kept + tl.sum(weights, 1)
    acc = acc * kept[:, None]
    acc += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return now, total, acc


@triton.jit
def skiparse_forward(
    q, k, v, text_k, text_v, mask, text_mask, out, lse,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    text_k_batch, text_k_token, text_k_head, text_v_batch, text_v_token, text_v_head,
    tokens, text, text_queries, heads, sparse_n, columns, tiles,
    place_group, place_row, token_group, token_row, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OF_TEXT: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, HAS_TEXT: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_TEXT_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OF_TEXT: the queries are the text's, once per group; else the group's tokens."""
    factor = scale * LOG2_E  # rounded as in the gradient, or its weights would not sum to one
    pid = tl.program_id(0)
    tile = pid % tiles
    rest = pid // tiles
    OWN_COLUMNS: tl.constexpr = 1 if OF_TEXT else COLUMNS
    group = rest % sparse_n
    rest = rest // sparse_n
    head = rest % heads
    batch = (rest // heads).to(tl.int64)

    if OF_TEXT:
        start = tile * BLOCK_M
        rows = text_queries - start
        q_at = q + batch * q_batch + head * q_head + start.to(tl.int64) * q_token
        q_step = q_token
        sample = batch * sparse_n + group
        out_at = out + ((sample * text_queries + start) * heads + head) * D
        out_step = heads * D
        lse_at = lse + (sample * heads + head) * text_queries + start
        lse_step = 1
    else:
        column = tile % columns
        start = tile // columns * BLOCK_M
        first = group * token_group + column
        rows = rows_of(tokens, first, token_row, COLUMNS) - start
        place = group * place_group + column + start // COLUMNS * place_row
        token = first + start // COLUMNS * token_row
        q_at = q + batch * q_batch + head * q_head + place.to(tl.int64) * q_token
        q_step = place_row * q_token
        out_at = out + ((batch * tokens + token) * heads + head) * D
        out_step = token_row * heads * D
        lse_at = lse + (batch * heads + head) * tokens + token
        lse_step = token_row

    queries = load_rows(q_at, q_step, q_token, rows, D, BLOCK_M, BLOCK_D, OWN_COLUMNS, True)
    most = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_at = k + batch * k_batch + head * k_head
    v_at = v + batch * v_batch + head * v_head

    # Tiles that are full in every run of tokens, then what is left over.
    whole = tokens // token_row * COLUMNS // BLOCK_N
    for i in range(0, columns * whole):
        column_i = i // whole
        start_i = i % whole * BLOCK_N
        place_i = (group * place_group + column_i + start_i // COLUMNS * place_row).to(tl.int64)
        key = load_rows(
            k_at + place_i * k_token, place_row * k_token, k_token, BLOCK_N, D, BLOCK_N, BLOCK_D, COLUMNS, False
        )
        value = load_rows(
            v_at + place_i * v_token, place_row * v_token, v_token, BLOCK_N, D, BLOCK_N, BLOCK_D, COLUMNS, False
        )
        token_i = group * token_group + column_i + start_i // COLUMNS * token_row
        shown = shown_rows(mask + batch * tokens + token_i, token_row, BLOCK_N, BLOCK_N, COLUMNS, HAS_MASK)
        most, total, acc = visit(queries, key, value, shown, most, total, acc, factor, HAS_MASK, PRECISION)
    if not EVEN:
        for column_i in range(0, columns):
            start_i = whole * BLOCK_N
            first_i = group * token_group + column_i
            rows_i = rows_of(tokens, first_i, token_row, COLUMNS) - start_i
            place_i = (group * place_group + column_i + start_i // COLUMNS * place_row).to(tl.int64)
            key = load_rows(
                k_at + place_i * k_token, place_row * k_token, k_token, rows_i, D, BLOCK_N, BLOCK_D, COLUMNS, True
            )
            value = load_rows(
                v_at + place_i * v_token, place_row * v_token, v_token, rows_i, D, BLOCK_N, BLOCK_D, COLUMNS, True
            )
            token_i = first_i + start_i // COLUMNS * token_row
            shown = shown_rows(mask + batch * tokens + token_i, token_row, rows_i, BLOCK_N, COLUMNS, HAS_MASK)
            most, total, acc = visit(queries, key, value, shown, most, total, acc, factor, True, PRECISION)
    if HAS_TEXT:
        for start_i in range(0, text, BLOCK_N):
            key_at = text_k + batch * text_k_batch + head * text_k_head + start_i * text_k_token
            value_at = text_v + batch * text_v_batch + head * text_v_head + start_i * text_v_token
            key = load_rows(key_at, text_k_token, 0, text - start_i, D, BLOCK_N, BLOCK_D, 1, True)
            value = load_rows(value_at, text_v_token, 0, text - start_i, D, BLOCK_N, BLOCK_D, 1, True)
            shown = shown_rows(text_mask + batch * text + start_i, 1, text - start_i, BLOCK_N, 1, HAS_TEXT_MASK)
            most, total, acc = visit(queries, key, value, shown, most, total, acc, factor, True, PRECISION)

    nothing = total == 0.0
    total = tl.where(nothing, 1.0, total)
    store_rows(out_at, out_step, heads * D, rows, acc / total[:, None], D, BLOCK_M, BLOCK_D, OWN_COLUMNS)
    result = tl.where(nothing, float("-inf"), (most + tl.log2(total)) * LN_2)
    store_column(lse_at, lse_step, rows, result, BLOCK_M, OWN_COLUMNS)
