# SPDX-License-Identifier: Apache-2.0
"""Gradients of Skiparse attention: one kernel whose tiles own keys, one whose tiles own queries. No atomics.

With ``P = exp(S - lse)`` and ``delta = rowsum(grad * out) - grad_lse``:
``dV = P^T grad``, ``dS = P * (grad V^T - delta)``, ``dK = dS^T Q * scale``, ``dQ = dS K * scale``.
"""

import triton
import triton.language as tl

from ._skiparse_tiles import LOG2_E, load_column, load_rows, rows_of, shown_rows, store_column, store_rows


@triton.jit
def skiparse_delta(
    grad, out, grad_lse, delta, length, heads, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``rowsum(grad * out) - grad_lse``; grad, out (samples, length, heads, D), the others (samples, heads, length)."""
    pid = tl.program_id(0)
    start = pid % tiles * BLOCK_M
    head = pid // tiles % heads
    sample = (pid // tiles // heads).to(tl.int64)
    at = ((sample * length + start) * heads + head) * D
    g = load_rows(grad + at, heads * D, 0, length - start, D, BLOCK_M, BLOCK_D, 1, True).to(tl.float32)
    o = load_rows(out + at, heads * D, 0, length - start, D, BLOCK_M, BLOCK_D, 1, True).to(tl.float32)
    row = (sample * heads + head) * length + start
    shift = load_column(grad_lse + row, 1, length - start, BLOCK_M, 1)
    store_column(delta + row, 1, length - start, tl.sum(g * o, 1) - shift, BLOCK_M, 1)


@triton.jit
def into_keys(k, v, shown, q, grad, lse, delta, grad_k, grad_v, scale, HIDING: tl.constexpr, PRECISION: tl.constexpr):
    """What one tile of queries adds to the gradients of a tile of keys and values. Scores lie transposed."""
    scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    weights = tl.exp2(scores * (scale * LOG2_E) - (lse * LOG2_E)[None, :])
    if HIDING:
        weights = tl.where(shown[:, None], weights, 0.0)
    grad_v += tl.dot(weights.to(grad.dtype), grad, input_precision=PRECISION)
    grad_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[None, :])
    grad_k += tl.dot(grad_scores.to(q.dtype), q, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def into_queries(q, grad, lse, delta, k, v, shown, grad_q, scale, HIDING: tl.constexpr, PRECISION: tl.constexpr):
    """What one tile of keys adds to the gradient of a tile of queries."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    weights = tl.exp2(scores * (scale * LOG2_E) - (lse * LOG2_E)[:, None])
    if HIDING:
        weights = tl.where(shown[None, :], weights, 0.0)
    grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    grad_scores = weights * (grad_weights - delta[:, None])
    grad_q += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)
    return grad_q


@triton.jit
def skiparse_grad_keys(
    q, k, v, text_q, mask, grad, lse, delta, grad_text, text_lse, text_delta, grad_k, grad_v,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    text_q_batch, text_q_token, text_q_head,
    tokens, text, text_queries, heads, sparse_n, columns, tiles, places,
    place_group, place_row, token_group, token_row, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OF_TEXT: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, HAS_TEXT: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OF_TEXT: k, v and mask are the text's, and each group leaves a part of their gradients; else the tokens'."""
    pid = tl.program_id(0)
    tile = pid % tiles
    rest = pid // tiles
    OWN_COLUMNS: tl.constexpr = 1 if OF_TEXT else COLUMNS
    group = rest % sparse_n
    rest = rest // sparse_n
    head = rest % heads
    batch = (rest // heads).to(tl.int64)

    if OF_TEXT:
        start = tile * BLOCK_N
        rows = text - start
        place = start
        key_step = 1
        shown = shown_rows(mask + batch * text + start, 1, rows, BLOCK_N, 1, HAS_MASK)
        grad_at = (((batch * sparse_n + group) * text + start) * heads + head) * D
    else:
        column = tile % columns
        start = tile // columns * BLOCK_N
        first = group * token_group + column
        rows = rows_of(tokens, first, token_row, COLUMNS) - start
        place = group * place_group + column + start // COLUMNS * place_row
        key_step = place_row
        token = first + start // COLUMNS * token_row
        shown = shown_rows(mask + batch * tokens + token, token_row, rows, BLOCK_N, COLUMNS, HAS_MASK)
        grad_at = ((batch * places + place) * heads + head) * D
    at = place.to(tl.int64)
    key_at = k + batch * k_batch + head * k_head + at * k_token
    value_at = v + batch * v_batch + head * v_head + at * v_token
    key = load_rows(key_at, key_step * k_token, k_token, rows, D, BLOCK_N, BLOCK_D, OWN_COLUMNS, True)
    value = load_rows(value_at, key_step * v_token, v_token, rows, D, BLOCK_N, BLOCK_D, OWN_COLUMNS, True)
    sum_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    q_at = q + batch * q_batch + head * q_head
    out_at = grad + (batch * tokens * heads + head) * D
    lse_row = (batch * heads + head) * tokens
    out_token = heads * D
    whole = tokens // token_row * COLUMNS // BLOCK_M
    for i in range(0, columns * whole):
        column_i = i // whole
        start_i = i % whole * BLOCK_M
        place_i = (group * place_group + column_i + start_i // COLUMNS * place_row).to(tl.int64)
        token_i = (group * token_group + column_i + start_i // COLUMNS * token_row).to(tl.int64)
        query = load_rows(
            q_at + place_i * q_token, place_row * q_token, q_token, BLOCK_M, D, BLOCK_M, BLOCK_D, COLUMNS, False
        )
        upstream = load_rows(
            out_at + token_i * out_token, token_row * out_token, out_token, BLOCK_M, D, BLOCK_M, BLOCK_D, COLUMNS, False
        )
        lse_i = load_column(lse + lse_row + token_i, token_row, BLOCK_M, BLOCK_M, COLUMNS)
        delta_i = load_column(delta + lse_row + token_i, token_row, BLOCK_M, BLOCK_M, COLUMNS)
        sum_k, sum_v = into_keys(
            key, value, shown, query, upstream, lse_i, delta_i, sum_k, sum_v, scale, HAS_MASK, PRECISION
        )
    if not EVEN:
        for column_i in range(0, columns):
            start_i = whole * BLOCK_M
            first_i = group * token_group + column_i
            rows_i = rows_of(tokens, first_i, token_row, COLUMNS) - start_i
            place_i = (group * place_group + column_i + start_i // COLUMNS * place_row).to(tl.int64)
            token_i = (first_i + start_i // COLUMNS * token_row).to(tl.int64)
            query = load_rows(
                q_at + place_i * q_token, place_row * q_token, q_token, rows_i, D, BLOCK_M, BLOCK_D, COLUMNS, True
            )
            upstream = load_rows(
                out_at + token_i * out_token,
                token_row * out_token,
                out_token,
                rows_i,
                D,
                BLOCK_M,
                BLOCK_D,
                COLUMNS,
                True,
            )
            # Queries that are not there add nothing: all of theirs is zero.
            lse_i = load_column(lse + lse_row + token_i, token_row, rows_i, BLOCK_M, COLUMNS)
            delta_i = load_column(delta + lse_row + token_i, token_row, rows_i, BLOCK_M, COLUMNS)
            sum_k, sum_v = into_keys(
                key, value, shown, query, upstream, lse_i, delta_i, sum_k, sum_v, scale, HAS_MASK, PRECISION
            )
    if HAS_TEXT:
        sample = batch * sparse_n + group
        for start_i in range(0, text_queries, BLOCK_M):
            rows_i = text_queries - start_i
            query_at = text_q + batch * text_q_batch + head * text_q_head + start_i * text_q_token
            query = load_rows(query_at, text_q_token, 0, rows_i, D, BLOCK_M, BLOCK_D, 1, True)
            upstream_at = grad_text + ((sample * text_queries + start_i) * heads + head) * D
            upstream = load_rows(upstream_at, out_token, 0, rows_i, D, BLOCK_M, BLOCK_D, 1, True)
            row_i = (sample * heads + head) * text_queries + start_i
            lse_i = load_column(text_lse + row_i, 1, rows_i, BLOCK_M, 1)
            delta_i = load_column(text_delta + row_i, 1, rows_i, BLOCK_M, 1)
            sum_k, sum_v = into_keys(
                key, value, shown, query, upstream, lse_i, delta_i, sum_k, sum_v, scale, HAS_MASK, PRECISION
            )

    store_rows(grad_k + grad_at, key_step * heads * D, heads * D, rows, sum_k * scale, D, BLOCK_N, BLOCK_D, OWN_COLUMNS)
    store_rows(grad_v + grad_at, key_step * heads * D, heads * D, rows, sum_v, D, BLOCK_N, BLOCK_D, OWN_COLUMNS)


@triton.jit
def skiparse_grad_queries(
    q, k, v, text_k, text_v, mask, text_mask, grad, lse, delta, grad_q,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    text_k_batch, text_k_token, text_k_head, text_v_batch, text_v_token, text_v_head,
    tokens, text, text_queries, heads, sparse_n, columns, tiles, places,
    place_group, place_row, token_group, token_row, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    OF_TEXT: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr, HAS_TEXT: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_TEXT_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OF_TEXT: the queries are the text's, and each group leaves a part of their gradient; else the group's tokens."""
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
        upstream_at = ((sample * text_queries + start) * heads + head) * D
        upstream_step = heads * D
        grad_q_at = grad_q + upstream_at
        grad_q_step = heads * D
        row = (sample * heads + head) * text_queries + start
        row_step = 1
    else:
        column = tile % columns
        start = tile // columns * BLOCK_M
        first = group * token_group + column
        rows = rows_of(tokens, first, token_row, COLUMNS) - start
        place = group * place_group + column + start // COLUMNS * place_row
        token = first + start // COLUMNS * token_row
        q_at = q + batch * q_batch + head * q_head + place.to(tl.int64) * q_token
        q_step = place_row * q_token
        upstream_at = ((batch * tokens + token) * heads + head) * D
        upstream_step = token_row * heads * D
        grad_q_at = grad_q + ((batch * places + place) * heads + head) * D
        grad_q_step = place_row * heads * D
        row = (batch * heads + head) * tokens + token
        row_step = token_row

    query = load_rows(q_at, q_step, q_token, rows, D, BLOCK_M, BLOCK_D, OWN_COLUMNS, True)
    upstream = load_rows(grad + upstream_at, upstream_step, heads * D, rows, D, BLOCK_M, BLOCK_D, OWN_COLUMNS, True)
    lse_q = load_column(lse + row, row_step, rows, BLOCK_M, OWN_COLUMNS)
    delta_q = load_column(delta + row, row_step, rows, BLOCK_M, OWN_COLUMNS)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_at = k + batch * k_batch + head * k_head
    v_at = v + batch * v_batch + head * v_head

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
        acc = into_queries(query, upstream, lse_q, delta_q, key, value, shown, acc, scale, HAS_MASK, PRECISION)
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
            acc = into_queries(query, upstream, lse_q, delta_q, key, value, shown, acc, scale, True, PRECISION)
    if HAS_TEXT:
        for start_i in range(0, text, BLOCK_N):
            key_at = text_k + batch * text_k_batch + head * text_k_head + start_i * text_k_token
            value_at = text_v + batch * text_v_batch + head * text_v_head + start_i * text_v_token
            key = load_rows(key_at, text_k_token, 0, text - start_i, D, BLOCK_N, BLOCK_D, 1, True)
            value = load_rows(value_at, text_v_token, 0, text - start_i, D, BLOCK_N, BLOCK_D, 1, True)
            shown = shown_rows(text_mask + batch * text + start_i, 1, text - start_i, BLOCK_N, 1, HAS_TEXT_MASK)
            acc = into_queries(query, upstream, lse_q, delta_q, key, value, shown, acc, scale, True, PRECISION)

    store_rows(grad_q_at, grad_q_step, heads * D, rows, acc * scale, D, BLOCK_M, BLOCK_D, OWN_COLUMNS)
