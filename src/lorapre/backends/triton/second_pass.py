"""The second pass over the gradients, with the update of the weights. Imports triton.

Grids and offsets are those of `lorapre.backends.triton.first_pass`.
"""

# Triton's decorators and types are untyped where they are not missing (other platforms than Linux).
# mypy: disable-error-code="untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lorapre.backends.triton.elements import (
    COLUMNS_ALIGNED,
    DECAY,
    FULL_COL,
    FULL_ROW,
    G_COL,
    G_ROW,
    LEFT,
    ON,
    OUTSIDE,
    RATE,
    RIGHT,
    ROWS,
    ROWS_ALIGNED,
    TINY,
    V_COL,
    V_ROW,
    V_SCALE,
    W_COL,
    W_ROW,
    WIDTH,
    A,
    B,
    G,
    P,
    Q,
    W,
    base_of,
    field,
    laid_out_as,
    lines_of,
    mean_of,
    nearest,
    place_in,
    rounded,
    size_of,
    tile_of,
    whole,
)

#: Of the old basis in the new one, in units of the size of what it closes: float32's rounding.
CLOSING = tl.constexpr(8 * 2.0**-23)


@triton.jit
def basis_in(A_base, ranks, cols, q, R: tl.constexpr):
    """m_A in these columns, as float32. To be kept: a loop that stores would have it read again in every turn."""
    return tl.load(
        A_base + (ranks[:, None] * q + cols[None, :]),
        mask=(ranks < R)[:, None] & (cols < q)[None, :],
        other=0.0,
    ).to(tl.float32)


@triton.jit
def tracked(X_base, basis, ranks, rows, p, R: tl.constexpr, PRECISION: tl.constexpr):
    """X A of these rows, and of the columns of ``basis``, transposed."""
    x = tl.load(
        X_base + (rows[:, None] * R + ranks[None, :]), mask=(rows < p)[:, None] & (ranks < R)[None, :], other=0.0
    )
    return tl.dot(tl.trans(basis), tl.trans(x), input_precision=PRECISION)


@triton.jit
def next_rows(
    matrices,
    matrix,
    C,
    L,
    sums,
    basis,
    left,
    gain,
    ranks,
    cols,
    q,
    on,
    R: tl.constexpr,
    L_IN_STATE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """L = C A + gain ``left``^T in these columns, of which m_A is not needed any more, closed with a share of the old
    basis; returns the size of a row of L at most.
    """
    c = tl.load(
        C + matrix * R * R + (ranks[:, None] * R + ranks[None, :]),
        mask=(ranks < R)[:, None] & (ranks < R)[None, :],
        other=0.0,
    )
    carried = tl.dot(c, basis, input_precision=PRECISION)
    size = tl.sum(tl.sum(c * c, axis=1), axis=0)
    size_of_row = tl.sqrt((size + gain * gain * tl.load(sums + matrix)) / R)
    share = tl.where(size_of_row > 0, CLOSING * size_of_row, 1.0)
    new = carried + gain * tl.trans(left) + share * basis
    column = ranks[:, None] * q + cols[None, :]
    L_base = place_in(L, matrices, matrix, RIGHT, A, L_IN_STATE, ALIGNED)
    ranked = (ranks < R * (on if L_IN_STATE else 1))[:, None]
    tl.store(L_base + column, new, mask=ranked & (cols < q)[None, :])
    return size_of_row


@triton.jit(do_not_specialize=["first_given"])
def update(
    matrices,
    items,
    coefficients,
    U,
    X,
    L,
    C,
    row_sums,
    sums,
    surprises,
    sizes,
    gain,
    beta2,
    eps,
    limit,
    seed,
    sign,
    first_given,
    W_TYPE: tl.constexpr,
    G_TYPE: tl.constexpr,
    S_TYPE: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    RELATIVE: tl.constexpr,
    BOUNDED: tl.constexpr,
    CLIP: tl.constexpr,
    FULL: tl.constexpr,
    GIVEN: tl.constexpr,
    LEAVE_G: tl.constexpr,
    SWEEPS: tl.constexpr,
    ASYNC: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ROUNDS: tl.constexpr,
    X_IN_STATE: tl.constexpr,
    X_ALIGNED: tl.constexpr,
    L_IN_STATE: tl.constexpr,
    W_ORDER: tl.constexpr,
    G_ORDER: tl.constexpr,
    V_ORDER: tl.constexpr,
    MOMENTUM_PRECISION: tl.constexpr,
    LEFT_PRECISION: tl.constexpr,
):
    """Pass 2 over G, a program a block of columns: W in place, L = C A + gain U^T G, and v_col one step on (FULL: v).

    ``sums`` and ``surprises`` are from `lorapre.backends.triton.elements.totals`; ``sizes`` (n) becomes the size of
    a row of L, at most, by which L is closed with a share of the old basis. The products are formed transposed,
    (columns, ranks) and (columns, rows): then what is wide goes along the 64 rows that Hopper's tensor cores want,
    tiles may be narrow, and several programs share a processor and hide each other's latency. Without SWEEPS there
    is no L, and nobody reads U and C. Where GIVEN, which does not sweep, U is the momentum X A itself, (p, q) in
    `lines_of` both, of one matrix after the other from ``first_given`` on, and W and v are all that is stepped; if
    LEAVE_G, G takes the momentum's place, as float32. ASYNC: W comes through shared memory, some turns ahead, where it
    else comes in registers, one turn ahead.
    """
    ALIGNED: tl.constexpr = (G_ORDER == ROWS_ALIGNED) | (G_ORDER == COLUMNS_ALIGNED)
    item = tl.program_id(0)
    matrix = tl.load(items + item * 2).to(tl.int64)
    tile = tl.load(items + item * 2 + 1)
    p = whole(whole(size_of(matrices, matrix, P), G_ORDER, COLUMNS_ALIGNED), W_ORDER, COLUMNS_ALIGNED)
    q = whole(whole(size_of(matrices, matrix, Q), G_ORDER, ROWS_ALIGNED), W_ORDER, ROWS_ALIGNED)
    W_row_stride = size_of(matrices, matrix, W_ROW)
    W_col_stride = size_of(matrices, matrix, W_COL)
    G_row_stride = size_of(matrices, matrix, G_ROW)
    G_col_stride = size_of(matrices, matrix, G_COL)
    cols = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    ranks = tl.arange(0, BLOCK_R)
    row = coefficients + matrix * WIDTH
    on = (tl.load(row + ON) != 0).to(tl.int32)
    live = p * on
    signed = sign * tl.load(row + OUTSIDE)
    v_scale = tl.load(row + V_SCALE)
    rate = tl.load(row + RATE)
    decay = tl.load(row + DECAY)
    W_base = base_of(matrices, matrix, W, W_TYPE, (W_ORDER == ROWS_ALIGNED) | (W_ORDER == COLUMNS_ALIGNED))
    G_base = base_of(matrices, matrix, G, G_TYPE, ALIGNED)
    if FULL:
        V_base = base_of(matrices, matrix, V_ROW, S_TYPE, (V_ORDER == ROWS_ALIGNED) | (V_ORDER == COLUMNS_ALIGNED))
        V_row_stride = size_of(matrices, matrix, FULL_ROW)
        V_col_stride = size_of(matrices, matrix, FULL_COL)
        if RELATIVE:
            mean = mean_of(row_sums + field(matrices, matrix, ROWS), p, 512) / q
    else:
        v_row = base_of(matrices, matrix, V_ROW, S_TYPE)
        col_base = base_of(matrices, matrix, V_COL, S_TYPE, ALIGNED)
        v_col = tl.load(col_base + cols, mask=cols < q, other=0.0).to(tl.float32)
        mean = mean_of(v_row, p, 512)
    squared = tl.load(sums + matrix)
    numel = p.to(tl.float32) * q.to(tl.float32)
    if RELATIVE:
        # The mean of v_hat: its rank-1 part has the mean of the old row means, whatever the columns are, or the old v.
        eps = tl.maximum(eps * tl.sqrt((beta2 * mean + (1.0 - beta2) * (squared / numel)) * v_scale), TINY)
    if CLIP:
        surprise = tl.sqrt(tl.load(surprises + matrix) / numel)
        rate = rate / tl.maximum(surprise, 1.0)
    A_base = base_of(matrices, matrix, A, S_TYPE, ALIGNED)
    X_base = place_in(X, matrices, matrix, LEFT, B, X_IN_STATE, X_ALIGNED)
    U_base = U + field(matrices, matrix, LEFT) // 16 * 16
    U_column = lines_of(p)
    if not FULL:
        mean = tl.where(mean > 0, mean, 1.0)
        fresh = (1.0 - beta2) * v_scale
        old = beta2 * v_scale / mean

    if GIVEN:
        width = lines_of(q)
        U_base = U + (matrix - first_given) * lines_of(p) * width
    else:
        basis = basis_in(A_base, ranks, cols, q, R)

    left = tl.zeros((BLOCK_Q, BLOCK_R), tl.float32)
    if not FULL:
        squares = tl.zeros((BLOCK_P, BLOCK_Q), tl.float32)
    first = tl.arange(0, BLOCK_P)
    inside = (first < live)[:, None] & (cols < q)[None, :]
    if not ASYNC:
        coming = tl.load(tile_of(W_base, first, cols, W_row_stride, W_col_stride, W_ORDER), mask=inside, other=0.0)
    # So is G where its numbers are too small to be copied to shared memory one by one, some turns ahead.
    AHEAD: tl.constexpr = not ALIGNED and (G_TYPE != tl.float32)  # noqa: SIM300 (no constant)
    if AHEAD:
        coming_g = tl.load(tile_of(G_base, first, cols, G_row_stride, G_col_stride, G_ORDER), mask=inside, other=0.0)
    if FULL:  # likewise
        coming_v = tl.load(
            tile_of(V_base, first, cols, V_row_stride, V_col_stride, V_ORDER),
            mask=(first < live)[:, None] & (cols < q)[None, :],
            other=0.0,
        )
    # What is to be multiplied is asked for some turns ahead anyway.
    STAGES: tl.constexpr = 3 if ASYNC or (GIVEN and not LEAVE_G) else None
    for start in tl.range(0, p, BLOCK_P, num_stages=STAGES):
        rows = start + first
        inside = (rows < live)[:, None] & (cols < q)[None, :]
        if not ASYNC:
            here = coming
        after = rows + BLOCK_P
        if FULL:
            here_v = coming_v
            coming_v = tl.load(
                tile_of(V_base, after, cols, V_row_stride, V_col_stride, V_ORDER),
                mask=(after < live)[:, None] & (cols < q)[None, :],
                other=0.0,
            )
        else:  # here, where nobody waits for it yet
            v = tl.load(v_row + rows, mask=rows < p, other=0.0).to(tl.float32) * old
        if AHEAD:
            raw = coming_g
            coming_g = tl.load(
                tile_of(G_base, after, cols, G_row_stride, G_col_stride, G_ORDER),
                mask=(after < live)[:, None] & (cols < q)[None, :],
                other=0.0,
            )
        else:
            raw = tl.load(tile_of(G_base, rows, cols, G_row_stride, G_col_stride, G_ORDER), mask=inside, other=0.0)
        g = raw.to(tl.float32)
        square = g * g
        if not FULL:
            squares += square
        if SWEEPS:
            u = tl.load(
                U_base + (ranks[:, None] * U_column + rows[None, :]),
                mask=(ranks < R)[:, None] & (rows < U_column)[None, :],
                other=0.0,
            )
            # With a factor, whatever it is, the product has G from registers. From shared memory it would have to lie
            # there transposed, written number by number, with eight of a warp's numbers in one bank.
            left = tl.dot(tl.trans(sign * g), tl.trans(u), left, input_precision=LEFT_PRECISION)
        if not GIVEN:
            momentum = tracked(X_base, basis, ranks, rows, p, R, MOMENTUM_PRECISION)
        # Behind the products in this text, or `laid_out_as` moves the wrong one of its operands.
        if ASYNC:
            here = tl.load(tile_of(W_base, rows, cols, W_row_stride, W_col_stride, W_ORDER), mask=inside, other=0.0)
        else:
            coming = tl.load(
                tile_of(W_base, after, cols, W_row_stride, W_col_stride, W_ORDER),
                mask=(after < live)[:, None] & (cols < q)[None, :],
                other=0.0,
            )
        if GIVEN:
            given_at = U_base + (rows[:, None] * width + cols[None, :])
            m = signed * g + tl.load(given_at, mask=inside, other=0.0)
            if LEAVE_G:
                tl.debug_barrier()  # all have read what is overwritten
                tl.store(given_at, g, mask=inside)
        else:
            m = signed * g + laid_out_as(tl.trans(momentum), here)
        if FULL:
            v = beta2 * here_v.to(tl.float32) + (1.0 - beta2) * square
            V_addresses = tile_of(V_base, rows, cols, V_row_stride, V_col_stride, V_ORDER)
            tl.store(V_addresses, nearest(v, S_TYPE), mask=inside)
            denominator = tl.sqrt(v * v_scale) + eps
        else:
            denominator = tl.sqrt(v[:, None] * v_col[None, :] + fresh * square) + eps
        still = denominator <= eps  # where v is 0
        # 1 / x as the square of 1 / sqrt(x): two instructions, of which a division takes ten.
        root = tl.rsqrt(denominator)
        direction = m * (root * root)
        if BOUNDED:
            direction = tl.where(still, 0.0, tl.minimum(tl.maximum(direction, -limit), limit))
        w = here.to(tl.float32) * decay - rate * direction
        W_addresses = tile_of(W_base, rows, cols, W_row_stride, W_col_stride, W_ORDER)
        new = rounded(w, seed, matrices, matrix, coefficients, rows, cols, q, W_TYPE, STOCHASTIC, ROUNDS)
        tl.store(W_addresses, new, mask=inside)

    if SWEEPS:
        size_of_row = next_rows(
            matrices, matrix, C, L, sums, basis, left, gain, ranks, cols, q, on, R, L_IN_STATE, ALIGNED, LEFT_PRECISION
        )
        if tile == 0:
            tl.store(sizes + matrix, size_of_row)
    if not FULL:
        average = v_col + (1.0 - beta2) * (tl.sum(squares, axis=0) / p - v_col)
        tl.store(col_base + cols, nearest(average, S_TYPE), mask=cols < q * on)
