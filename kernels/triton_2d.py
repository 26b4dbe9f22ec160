"""The 2-D operator in Triton: routes walked in place on a channels-last map, delta made from its low-rank form.

A program is a block of channels, one sequence of routes (or a chunk of it) and one image. It walks tiles of T steps.
Where on the map a step lies is index arithmetic on its number, done once for a map size by `routes.route_order` and
kept in a table of 4 bytes a step. So a kernel knows no kinds of routes, divides nothing, and walks over the seams
between the routes of a sequence without noticing them. While a tile is computed, the next one's loads are under way,
and the matrix product that makes its delta is the last thing done before it is needed.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import outside_autocast
from .routes import route_order, sequences
from .triton_tiles import (
    CHANNELS,
    INTERPRETED,
    LOG2_E,
    STEPS,
    Chunks,
    carry_chunks,
    cut,
    fetch,
    matrix_precision,
    multiprocessors,
    sigmoid,
    softplus,
    spread,
    stack,
    state_sectors,
    sum_channels,
    to_tf32,
    unstack,
    walk_backward,
    walk_forward,
)

# A new image size is a new value of these, and compiles nothing but the first of its kind: of H·W a multiple of T, or
# not (and, once, the summaries, where few long sequences come).
_SIZES = ["L", "slots", "routes", "sequences", "chunks", "chunk_tiles"]


@triton.jit
def project(low, w_hi, w_lo, bias, C: tl.constexpr, T: tl.constexpr):
    """Delta before its softplus, T vectors (C,): low (T, R) times the weight (R, C).

    A 16-bit low multiplies the weight in two parts of its own kind, which hold it to 2^-17 (bf16) or 2^-22 (fp16).
    """
    if INTERPRETED:  # the interpreter multiplies bf16 matrices wrongly
        raw = tl.dot(low.to(tl.float32), w_hi.to(tl.float32))
        if low.dtype != tl.float32:
            raw += tl.dot(low.to(tl.float32), w_lo.to(tl.float32))
    elif low.dtype == tl.float32:
        raw = tl.dot(low, w_hi, input_precision="tf32x3")
    else:
        raw = tl.dot(low, w_lo, tl.dot(low, w_hi))
    found = ()
    columns = unstack(raw.trans(), C, T)
    for t in tl.static_range(T):
        found = found + (columns[t] + bias,)
    return found


@triton.jit
def load_weight(at, mask, like):
    """The weight of delta's projection (R, C) in two parts, see `project`."""
    w = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    if like == tl.float32:
        return w, w
    w_hi = w.to(like)
    return w_hi, (w - w_hi.to(tl.float32)).to(like)


@triton.jit
def load_positions(table_ptr, T: tl.constexpr):
    """A tile of a table of positions, (T,)."""
    return tl.load(table_ptr + tl.arange(0, T))


@triton.jit
def load_low(p_ptr, at, stride: tl.constexpr, R: tl.constexpr, RP: tl.constexpr):
    """The low-rank form of delta at T positions, (T, RP)."""
    r = tl.arange(0, RP)
    return tl.load(p_ptr + at.to(tl.int64)[:, None] * stride + r[None, :], mask=(r < R)[None, :], other=0.0)


@triton.jit
def state_rows(p_ptr, at, stride: tl.constexpr, R: tl.constexpr, N: tl.constexpr):
    """Pointers to B and C of the first state at T positions, (T, 2)."""
    return p_ptr + (at.to(tl.int64)[:, None] * stride + (R + N * tl.arange(0, 2))[None, :])


@triton.jit
def load_rows(base, at, d, rest, D: tl.constexpr, T: tl.constexpr):
    """A tile of a map, (T, C): channels d of the rows of `base` at T positions; zeros but for the first `rest`."""
    mask = (tl.arange(0, T) < rest)[:, None] & (d < D)[None, :]
    return tl.load(base + (at.to(tl.int64)[:, None] * D + d[None, :]), mask=mask, other=0.0)


@triton.jit
def store_rows(base, at, d, columns, rest, D: tl.constexpr, C: tl.constexpr, T: tl.constexpr):
    """Stores the first `rest` of T vectors (C,) where `load_rows` reads them."""
    narrow = ()
    for t in tl.static_range(T):
        narrow = narrow + (columns[t].to(base.dtype.element_ty),)
    mask = (tl.arange(0, T) < rest)[:, None] & (d < D)[None, :]
    tl.store(base + (at.to(tl.int64)[:, None] * D + d[None, :]), stack(narrow, C, T).trans(), mask=mask)


@triton.jit
def decay_rate(A_log):
    """A * log2(e), where A = -exp(A_log)."""
    return -tl.exp2(A_log.to(tl.float32) * LOG2_E) * LOG2_E


@triton.jit(do_not_specialize=_SIZES)
def scan_2d_forward(
    x_ptr,
    p_ptr,
    positions_ptr,
    places_ptr,
    plan_ptr,
    weight_ptr,
    bias_ptr,
    A_log_ptr,
    skip_ptr,
    y_ptr,
    saved_ptr,
    starts_ptr,
    reach_ptr,
    L,
    slots,
    routes,
    sequences,
    chunks,
    chunk_tiles,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    RP: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    SUMMARY: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Forward; or, as SUMMARY, what each chunk makes of a zero state, and its sum of Δ.

    Args:
        x_ptr: (B, L, D).
        p_ptr: (B, L, S, R + 2N), the columns [dt_low, B, C].
        positions_ptr: on the map, of each step of each sequence, the last one repeated up to the end of its tile.
        places_ptr: the same in (routes, L), where outputs and their gradients lie.
        plan_ptr: first tile, number of steps, weight set of each sequence, (sequences, 3).
        weight_ptr, bias_ptr, A_log_ptr, skip_ptr: (S, D, R), (S, D), (S, N, D), (S, D).
        y_ptr: (B, routes, L, D).
        saved_ptr: states after each tile of a sequence but its last, (B, slots, N, D).
        starts_ptr: states with which chunks begin, (B, sequences, chunks, N, D); as SUMMARY, those they make of zero.
        reach_ptr: sums of Δ, (B, sequences, chunks, D).
    """
    BLOCKS: tl.constexpr = (D + C - 1) // C
    W: tl.constexpr = R + 2 * N
    pid = tl.program_id(0)
    d = pid % BLOCKS * C + tl.arange(0, C)
    row = pid // BLOCKS  # of (B, sequences, chunks)
    chunk = row % chunks
    sequence = row // chunks % sequences
    b = (row // chunks // sequences).to(tl.int64)
    first_tile = tl.load(plan_ptr + 3 * sequence)
    length = tl.load(plan_ptr + 3 * sequence + 1)
    weights = tl.load(plan_ptr + 3 * sequence + 2)
    end = (length + T - 1) // T
    i0 = chunk * chunk_tiles
    i1 = tl.minimum(i0 + chunk_tiles, end)
    if i0 >= end:
        return

    mask = d < D
    r = tl.arange(0, RP)
    x_ptr += b * L * D
    p_ptr += b * L * (S * W) + weights * W
    y_ptr += b * routes * L * D
    positions_ptr += first_tile * T
    places_ptr += first_tile * T
    saved_ptr += (b * slots + first_tile - sequence) * N * D + d
    starts_ptr += row.to(tl.int64) * N * D + d
    A_log_ptr += weights * N * D + d
    bias = tl.load(bias_ptr + weights * D + d, mask=mask, other=0.0).to(tl.float32)
    skip = tl.load(skip_ptr + weights * D + d, mask=mask, other=0.0).to(tl.float32)
    w_hi, w_lo = load_weight(
        weight_ptr + (weights * D + d)[None, :] * R + r[:, None],
        mask[None, :] & (r < R)[:, None],
        p_ptr.dtype.element_ty,
    )
    h = tl.zeros((C,), tl.float32)
    reach = tl.zeros((C,), tl.float32)
    if N == 1:
        A2 = decay_rate(tl.load(A_log_ptr, mask=mask, other=0.0))
        if not SUMMARY:
            h = tl.load(starts_ptr, mask=d < tl.where(chunks > 1, D, 0), other=0.0)

    if N == 1:
        at = load_positions(positions_ptr + i0 * T, T)
        x_tile = load_rows(x_ptr, at, d, T, D, T)
        BC = tl.load(state_rows(p_ptr, at, S * W, R, N))
        raws = project(load_low(p_ptr, at, S * W, R, RP), w_hi, w_lo, bias, C, T)
        at = load_positions(positions_ptr + tl.minimum(i0 + 1, i1 - 1) * T, T)
        next_at = load_positions(positions_ptr + tl.minimum(i0 + 2, i1 - 1) * T, T)
        low = load_low(p_ptr, at, S * W, R, RP)
    state_ptr = saved_ptr + i0.to(tl.int64) * (N * D)  # what is saved behind tile i
    for i in range(i0, i1):
        if N == 1:
            # The next tile's loads, of delta's low-rank form the one's after it, since that tile's delta is made at the
            # end of this one; from positions loaded before. Behind the last one, the last one's again.
            next_x = load_rows(x_ptr, at, d, T, D, T)
            next_BC = tl.load(state_rows(p_ptr, at, S * W, R, N))
            next_low = load_low(p_ptr, next_at, S * W, R, RP)
            at = next_at
            next_at = load_positions(positions_ptr + tl.minimum(i + 3, i1 - 1) * T, T)
        else:
            # This tile's: other warps' states take longer than its loads, and registers are short.
            at = load_positions(positions_ptr + i * T, T)
            x_tile = load_rows(x_ptr, at, d, T, D, T)
            states = state_rows(p_ptr, at, S * W, R, N)
            BC = tl.load(states)
            raws = project(load_low(p_ptr, at, S * W, R, RP), w_hi, w_lo, bias, C, T)
        to = load_positions(places_ptr + i * T, T)

        xs = unstack(x_tile.trans(), C, T)
        steps = ()
        inputs = ()
        ys = ()
        for t in tl.static_range(T):
            x = xs[t].to(tl.float32)
            step = softplus(raws[t], EXACT)
            steps = steps + (step,)
            inputs = inputs + (step * x,)
            ys = ys + (skip * x,)
            reach += step
        if N == 1:
            Bs, Cs = spread(BC, T)
            ys, h = walk_forward(steps, inputs, Bs, Cs, A2, h, ys, T)
            if not SUMMARY:
                if i + 1 < end:
                    tl.store(state_ptr, h, mask=mask)
        else:
            # What state 0 begins the tile with, and what the others do while the one before is computed.
            known = i > i0
            if not SUMMARY:
                known = known | (chunks > 1)
            began = tl.where(i > i0, state_ptr - N * D, starts_ptr)
            known = d < tl.where(known, D, 0)
            h = tl.load(began, mask=known, other=0.0)
            A_log = tl.load(A_log_ptr, mask=mask, other=0.0)
            for n in range(0, N):
                next_n = tl.minimum(n + 1, N - 1)
                BC_of_next = tl.load(states + next_n)
                h_of_next = tl.load(began + next_n * D, mask=known, other=0.0)
                A_log_of_next = tl.load(A_log_ptr + next_n * D, mask=mask, other=0.0)
                A2 = decay_rate(A_log)
                Bs, Cs = spread(BC, T)
                ys, h = walk_forward(steps, inputs, Bs, Cs, A2, h, ys, T)
                if i + 1 < end:
                    tl.store(state_ptr + n * D, h, mask=mask)
                if SUMMARY:
                    if i + 1 == i1:
                        tl.store(starts_ptr + n * D, h, mask=mask)
                BC = BC_of_next
                h = h_of_next
                A_log = A_log_of_next
            tl.debug_barrier()  # the tile that follows reads the states written here, perhaps from other threads
        if not SUMMARY:
            store_rows(y_ptr, to, d, ys, length - i * T, D, C, T)
        if N == 1:
            raws = project(low, w_hi, w_lo, bias, C, T)
            x_tile = next_x
            BC = next_BC
            low = next_low
        state_ptr += N * D
    if SUMMARY:
        tl.store(reach_ptr + row.to(tl.int64) * D + d, reach, mask=mask)
        if N == 1:
            tl.store(starts_ptr, h, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def scan_2d_backward(
    dy_ptr,
    x_ptr,
    p_ptr,
    positions_ptr,
    places_ptr,
    plan_ptr,
    weight_ptr,
    bias_ptr,
    A_log_ptr,
    skip_ptr,
    saved_ptr,
    dx_ptr,
    dp_ptr,
    dweight_ptr,
    dbias_ptr,
    dA_ptr,
    dskip_ptr,
    ends_ptr,
    reach_ptr,
    L,
    slots,
    routes,
    sequences,
    chunks,
    chunk_tiles,
    D: tl.constexpr,
    R: tl.constexpr,
    N: tl.constexpr,
    S: tl.constexpr,
    RP: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    SUMMARY: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
):
    """Backward; or, as SUMMARY, the adjoint that each chunk makes of a zero one behind it, and its sum of Δ.

    Args, beyond those of `scan_2d_forward`:
        dy_ptr: (B, routes, L, D).
        dx_ptr: (B, routes, L, D), each route's part, rounded as its output is.
        dp_ptr: float32, (blocks of channels, B, routes, L, R + 2N), each block's part of a sum.
        dweight_ptr, dbias_ptr, dA_ptr, dskip_ptr: (B, sequences, chunks, ...), float32: (D, R), (D,), (N, D), (D,),
            each program's part of a sum; dA is that of A, and holds zeros before where N > 1.
        ends_ptr: adjoints that reach chunks from behind, (B, sequences, chunks, N, D), zeros where none does; where
            N > 1 they are used up. Not read where N = 1 and there is one chunk; SUMMARY overwrites them.
    """
    BLOCKS: tl.constexpr = (D + C - 1) // C
    W: tl.constexpr = R + 2 * N
    pid = tl.program_id(0)
    block = pid % BLOCKS
    d = block * C + tl.arange(0, C)
    row = pid // BLOCKS  # of (B, sequences, chunks)
    chunk = row % chunks
    sequence = row // chunks % sequences
    b = (row // chunks // sequences).to(tl.int64)
    first_tile = tl.load(plan_ptr + 3 * sequence)
    length = tl.load(plan_ptr + 3 * sequence + 1)
    weights = tl.load(plan_ptr + 3 * sequence + 2)
    end = (length + T - 1) // T
    i0 = chunk * chunk_tiles
    i1 = tl.minimum(i0 + chunk_tiles, end)
    if i0 >= end:
        return

    mask = d < D
    r = tl.arange(0, RP)
    steps_of_tile = tl.arange(0, T)
    eight = tl.arange(0, 8)
    wide_row = row.to(tl.int64)
    x_ptr += b * L * D
    p_ptr += b * L * (S * W) + weights * W
    dy_ptr += b * routes * L * D
    dx_ptr += b * routes * L * D
    batch = tl.num_programs(0) // BLOCKS // chunks // sequences
    dp_ptr += (block * batch + b) * routes * L * W
    positions_ptr += first_tile * T
    places_ptr += first_tile * T
    saved_ptr += (b * slots + first_tile - sequence) * N * D
    if N > 1:
        state_lines = state_sectors(saved_ptr + block * C, D, N, C)
    saved_ptr += d
    ends_ptr += wide_row * N * D + d
    dA_ptr += wide_row * N * D + d
    A_log_ptr += weights * N * D + d
    bias = tl.load(bias_ptr + weights * D + d, mask=mask, other=0.0).to(tl.float32)
    skip = tl.load(skip_ptr + weights * D + d, mask=mask, other=0.0).to(tl.float32)
    weight_at = weight_ptr + (weights * D + d)[None, :] * R + r[:, None]
    weight_mask = mask[None, :] & (r < R)[:, None]
    w_hi, w_lo = load_weight(weight_at, weight_mask, p_ptr.dtype.element_ty)
    weight = tl.load(
        weight_ptr + (weights * D + d)[:, None] * R + r[None, :], mask=mask[:, None] & (r < R)[None, :], other=0.0
    ).to(tl.float32)
    s = tl.zeros((C,), tl.float32)
    reach = tl.zeros((C,), tl.float32)
    dA = tl.zeros((C,), tl.float32)
    dbias = tl.zeros((C,), tl.float32)
    dskip = tl.zeros((C,), tl.float32)
    dweight = tl.zeros((C, RP), tl.float32)
    if N == 1:
        A2 = decay_rate(tl.load(A_log_ptr, mask=mask, other=0.0))
        if not SUMMARY:
            s = tl.load(ends_ptr, mask=d < tl.where(chunks > 1, D, 0), other=0.0)

    last = i1 - 1
    state_ptr = saved_ptr + (last - 1).to(tl.int64) * (N * D)  # what is saved before tile i
    if N == 1:
        at = load_positions(positions_ptr + last * T, T)
        x_tile = load_rows(x_ptr, at, d, T, D, T)
        low = load_low(p_ptr, at, S * W, R, RP)
        to = load_positions(places_ptr + last * T, T)
        dy_tile = load_rows(dy_ptr, to, d, length - last * T, D, T)
        BC = tl.load(state_rows(p_ptr, at, S * W, R, N))
        h = tl.load(state_ptr, mask=d < tl.where(last > 0, D, 0), other=0.0)
        following = tl.maximum(last - 1, i0) * T
        at = load_positions(positions_ptr + following, T)
        next_to = load_positions(places_ptr + following, T)
        next_low = load_low(p_ptr, at, S * W, R, RP)
        next_at = load_positions(positions_ptr + tl.maximum(last - 2, i0) * T, T)
        raws = project(low, w_hi, w_lo, bias, C, T)
    for back in range(0, i1 - i0):
        i = last - back
        # As in the forward. Of all tiles only the sequence's last can have steps behind its end, and their dy = 0:
        # nothing comes from them.
        if N == 1:
            next_x = load_rows(x_ptr, at, d, T, D, T)
            next_dy = load_rows(dy_ptr, next_to, d, T, D, T)
            next_BC = tl.load(state_rows(p_ptr, at, S * W, R, N))
            next_h = tl.load(state_ptr - N * D, mask=d < tl.where(i > 1, D, 0), other=0.0)
            later_low = load_low(p_ptr, next_at, S * W, R, RP)
            later_to = load_positions(places_ptr + tl.maximum(i - 2, i0) * T, T)
            at = next_at
            next_at = load_positions(positions_ptr + tl.maximum(i - 3, i0) * T, T)
        else:
            at = load_positions(positions_ptr + i * T, T)
            to = load_positions(places_ptr + i * T, T)
            x_tile = load_rows(x_ptr, at, d, T, D, T)
            dy_tile = load_rows(dy_ptr, to, d, length - i * T, D, T)
            low = load_low(p_ptr, at, S * W, R, RP)
            states = state_rows(p_ptr, at, S * W, R, N)
            BC = tl.load(states)
            known = d < tl.where(i > 0, D, 0)
            h = tl.load(state_ptr, mask=known, other=0.0)
            fetch(state_lines + tl.maximum(i - 2, 0).to(tl.int64) * (N * D))
            raws = project(low, w_hi, w_lo, bias, C, T)
        xs = unstack(x_tile.trans(), C, T)
        dys = unstack(dy_tile.trans(), C, T)

        wide_dys = ()
        steps = ()
        inputs = ()
        dinputs = ()
        dsteps = ()
        for t in tl.static_range(T):
            x = xs[t].to(tl.float32)
            dy = dys[t].to(tl.float32)
            step = softplus(raws[t], EXACT)
            wide_dys = wide_dys + (dy,)
            steps = steps + (step,)
            inputs = inputs + (step * x,)
            dinputs = dinputs + (tl.zeros((C,), tl.float32),)
            dsteps = dsteps + (tl.zeros((C,), tl.float32),)
            reach += step
            dskip += dy * x
        dp_rows = dp_ptr + to.to(tl.int64) * W
        rest = length - i * T
        in_route = steps_of_tile < rest
        if N == 1:
            Bs, Cs = spread(BC, T)
            s, _, dinputs, dsteps, dA_tile, into_B, into_C = walk_backward(
                steps, inputs, Bs, Cs, wide_dys, A2, h, s, wide_dys, dinputs, dsteps, 0, rest, FULL, T
            )
            dA += dA_tile
            if not SUMMARY:
                sums = sum_channels(into_B, tl.zeros((T, 8), tl.float32), 0, C, T, PRECISION)
                sums = sum_channels(into_C, sums, 1, C, T, PRECISION)
                columns_done = in_route[:, None] & (eight < 2)[None, :]
                tl.store(dp_rows[:, None] + (R + eight)[None, :], sums, mask=columns_done)
        else:
            dBs = tl.zeros((T, 8), tl.float32)
            dCs = tl.zeros((T, 8), tl.float32)
            s = tl.load(ends_ptr, mask=mask, other=0.0)
            A_log = tl.load(A_log_ptr, mask=mask, other=0.0)
            for n in range(0, N):
                Bs, Cs = spread(BC, T)
                A2 = decay_rate(A_log)
                if SUMMARY:
                    s = tl.where(back > 0, s, 0.0)
                else:
                    dA = tl.load(dA_ptr + n * D, mask=mask, other=0.0)
                next_n = tl.minimum(n + 1, N - 1)
                BC = tl.load(states + next_n)
                h_of_next = tl.load(state_ptr + next_n * D, mask=known, other=0.0)
                s_of_next = tl.load(ends_ptr + next_n * D, mask=mask, other=0.0)
                A_log = tl.load(A_log_ptr + next_n * D, mask=mask, other=0.0)
                s, _, dinputs, dsteps, dA_tile, into_B, into_C = walk_backward(
                    steps, inputs, Bs, Cs, wide_dys, A2, h, s, wide_dys, dinputs, dsteps, 0, rest, FULL, T
                )
                tl.store(ends_ptr + n * D, s, mask=mask)
                if not SUMMARY:
                    tl.store(dA_ptr + n * D, dA + dA_tile, mask=mask)
                    dBs = sum_channels(into_B, dBs, n % 8, C, T, PRECISION)
                    dCs = sum_channels(into_C, dCs, n % 8, C, T, PRECISION)
                    if (n % 8 == 7) | (n == N - 1):
                        first = n // 8 * 8
                        columns_done = in_route[:, None] & (first + eight < N)[None, :]
                        tl.store(dp_rows[:, None] + (R + first + eight)[None, :], dBs, mask=columns_done)
                        tl.store(dp_rows[:, None] + (R + N + first + eight)[None, :], dCs, mask=columns_done)
                        dBs = tl.zeros((T, 8), tl.float32)
                        dCs = tl.zeros((T, 8), tl.float32)
                h = h_of_next
                s = s_of_next
            tl.debug_barrier()  # the tile that follows reads the states written here, perhaps from other threads
        if not SUMMARY:
            into_raw = ()
            dxs = ()
            for t in tl.static_range(T):
                x = xs[t].to(tl.float32)
                dx = steps[t] * dinputs[t] + skip * wide_dys[t]
                draw = (x * dinputs[t] + dsteps[t]) * sigmoid(raws[t], steps[t])
                dbias += draw
                into_raw = into_raw + (draw,)
                dxs = dxs + (dx,)
            store_rows(dx_ptr, to, d, dxs, length - i * T, D, C, T)
            draws = stack(into_raw, C, T)
            if PRECISION == "tf32":
                draws = to_tf32(draws)  # delta's projection has its gradient in float32
            dlow = tl.dot(draws.trans(), weight, input_precision=PRECISION)
            tl.store(dp_rows[:, None] + r[None, :], dlow, mask=in_route[:, None] & (r < R)[None, :])
            dweight = tl.dot(draws, low.to(tl.float32), dweight, input_precision=PRECISION)
        if N == 1:
            raws = project(next_low, w_hi, w_lo, bias, C, T)
            low = next_low
            next_low = later_low
            x_tile = next_x
            dy_tile = next_dy
            BC = next_BC
            h = next_h
            to = next_to
            next_to = later_to
        state_ptr -= N * D
    if SUMMARY:
        tl.store(reach_ptr + wide_row * D + d, reach, mask=mask)
        if N == 1:
            tl.store(ends_ptr, s, mask=mask)
    else:
        tl.store(dbias_ptr + wide_row * D + d, dbias, mask=mask)
        tl.store(dskip_ptr + wide_row * D + d, dskip, mask=mask)
        at_weight = dweight_ptr + (wide_row * D + d)[:, None] * R + r[None, :]
        tl.store(at_weight, dweight, mask=mask[:, None] & (r < R)[None, :])
        if N == 1:
            tl.store(dA_ptr, dA, mask=mask)


class Plan(NamedTuple):
    """How a map's routes are walked.

    Attributes:
        positions: on the map, of each step of each sequence; the last one is repeated up to the end of its tile.
        places: the same in (routes, H * W).
        sequences: first tile, number of steps and weight set of each sequence, (Q, 3).
        sets: the weight set of each sequence.
        tiles: of each sequence.
        slots: tiles of all sequences but their last ones, whose states are saved.
    """

    positions: Tensor
    places: Tensor
    sequences: Tensor
    sets: tuple[int, ...]
    tiles: tuple[int, ...]
    slots: int


@outside_autocast
def selective_scan_2d(
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    routes: Sequence[tuple[str, int]],
    carry_state: bool,
) -> tuple[Tensor, Tensor]:
    """As `parallel.selective_scan_2d`."""
    tensors = [t.contiguous() for t in (x, x_dbl, dt_weight, dt_bias, A_log, D_skip)]
    x, x_dbl, dt_weight, dt_bias, A_log, D_skip = tensors
    batch, height, width, channels = x.shape
    d_state = A_log.shape[2]
    with torch.cuda.device_of(x):
        plan = _plan(tuple(routes), carry_state, height, width, x.device)
        by_state = A_log.mT.contiguous()
        out = x.new_empty(batch, len(routes), height, width, channels)
        saved = x.new_empty(batch * plan.slots * d_state * channels, dtype=torch.float32)
        chunks, starts, reach = _cut(plan, x, d_state, saved)

        def launch(summary: bool) -> None:
            grid = (batch * len(plan.sets) * chunks.count * -(-channels // CHANNELS),)
            scan_2d_forward[grid](
                x,
                x_dbl,
                plan.positions,
                plan.places,
                plan.sequences,
                dt_weight,
                dt_bias,
                by_state,
                D_skip,
                out,
                saved,
                starts,
                reach,
                *_sizes(plan, chunks, x, len(routes)),
                **_constants(x, x_dbl, dt_weight, d_state),
                SUMMARY=summary,
                num_warps=1,
                num_stages=1,
            )

        if chunks.count > 1:
            launch(summary=True)
            _carry(plan, chunks, starts, reach, A_log, reverse=False)
        launch(summary=False)
    return out, saved


@outside_autocast
def selective_scan_2d_backward(
    dy: Tensor,
    saved: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    routes: Sequence[tuple[str, int]],
    carry_state: bool,
) -> tuple[Tensor, ...]:
    """As `parallel.selective_scan_2d_backward`. Programs write their parts of sums side by side; torch adds them up."""
    tensors = [t.contiguous() for t in (dy, x, x_dbl, dt_weight, dt_bias, A_log, D_skip)]
    dy, x, x_dbl, dt_weight, dt_bias, A_log, D_skip = tensors
    batch, height, width, channels = x.shape
    sets, _, rank = dt_weight.shape
    d_state, count = A_log.shape[2], len(routes)
    blocks = -(-channels // CHANNELS)
    with torch.cuda.device_of(x):
        plan = _plan(tuple(routes), carry_state, height, width, x.device)
        by_state = A_log.mT.contiguous()
        chunks, ends, reach = _cut(plan, x, d_state, saved)
        if d_state > 1 and chunks.count == 1:
            ends = _zeros(x, batch, len(plan.sets), chunks.count, d_state, channels)

        def parts(*shape: int) -> Tensor:
            # A sequence shorter than the longest leaves its last chunks out.
            fill = torch.zeros if chunks.count > 1 else torch.empty
            return fill(batch, len(plan.sets), chunks.count, *shape, dtype=torch.float32, device=x.device)

        dx = x.new_empty(batch, count, height, width, channels)
        dp = torch.empty(blocks, batch, count, height, width, x_dbl.shape[-1], dtype=torch.float32, device=x.device)
        dweight, dbias, dskip = parts(channels, rank), parts(channels), parts(channels)
        dA = parts(d_state, channels) if d_state == 1 else _zeros(x, *ends.shape)

        def launch(summary: bool) -> None:
            grid = (batch * len(plan.sets) * chunks.count * blocks,)
            scan_2d_backward[grid](
                dy,
                x,
                x_dbl,
                plan.positions,
                plan.places,
                plan.sequences,
                dt_weight,
                dt_bias,
                by_state,
                D_skip,
                saved,
                dx,
                dp,
                dweight,
                dbias,
                dA,
                dskip,
                ends,
                reach,
                *_sizes(plan, chunks, x, count),
                **_constants(x, x_dbl, dt_weight, d_state),
                SUMMARY=summary,
                PRECISION=matrix_precision(x, x_dbl),
                FULL=height * width % STEPS == 0,
                num_warps=1,
                num_stages=1,
            )

        if chunks.count > 1:
            launch(summary=True)
            _carry(plan, chunks, ends, reach, A_log, reverse=True)
        launch(summary=False)
        route_sets = [weight_set for _, weight_set in routes]
        return (
            dx.squeeze(1) if count == 1 else dx.sum(1),
            _by_set(dp.sum(0), 1, route_sets, sets).movedim(1, 3).to(x_dbl.dtype),
            _by_set(dweight.sum((0, 2)), 0, plan.sets, sets).to(dt_weight.dtype),
            _by_set(dbias.sum((0, 2)), 0, plan.sets, sets).to(dt_bias.dtype),
            # A = -exp(A_log), so dA/dA_log = A.
            (_by_set(dA.sum((0, 2)), 0, plan.sets, sets).mT * -A_log.float().exp()).to(A_log.dtype),
            _by_set(dskip.sum((0, 2)), 0, plan.sets, sets).to(D_skip.dtype),
        )


def saved_numel_2d(shape: Sequence[int], d_state: int, routes: Sequence[tuple[str, int]], carry_state: bool) -> int:
    """The number of states that `selective_scan_2d` saves for x of shape (B, H, W, D): one a tile, but the last."""
    batch, height, width, channels = shape
    walked = sequences(tuple(weight_set for _, weight_set in routes), carry_state)
    slots = sum(-(-len(sequence) * height * width // STEPS) - 1 for sequence in walked)
    return batch * slots * d_state * channels


_PLANS: dict[tuple, Plan] = {}
"""Kept for good: a captured CUDA graph may go on reading one."""


def _plan(
    routes: tuple[tuple[str, int], ...], carry_state: bool, height: int, width: int, device: torch.device
) -> Plan:
    key = routes, carry_state, height, width, device
    if key not in _PLANS:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            # What is made now belongs to the graph that is being captured.
            return _make_plan(*key)
        # In a thread of its own, whose memory belongs to no graph that this thread may be warming up for; and on the
        # CPU first, so that it is there, whichever stream asks for it next.
        with ThreadPoolExecutor(1) as elsewhere:
            _PLANS[key] = elsewhere.submit(_make_kept_plan, *key).result()
    return _PLANS[key]


def _make_kept_plan(
    routes: tuple[tuple[str, int], ...], carry_state: bool, height: int, width: int, device: torch.device
) -> Plan:
    plan = _make_plan(routes, carry_state, height, width, torch.device("cpu"))
    return plan._replace(
        positions=plan.positions.to(device), places=plan.places.to(device), sequences=plan.sequences.to(device)
    )


def _make_plan(
    routes: tuple[tuple[str, int], ...], carry_state: bool, height: int, width: int, device: torch.device
) -> Plan:
    length = height * width
    order = [route_order(name, height, width, device) for name, _ in routes]
    positions: list[Tensor] = []
    places: list[Tensor] = []
    facts: list[int] = []
    tiles: list[int] = []
    walked = sequences(tuple(weight_set for _, weight_set in routes), carry_state)
    sets = tuple(routes[sequence[0]][1] for sequence in walked)
    for sequence, weight_set in zip(walked, sets, strict=True):
        steps = len(sequence) * length
        facts += [sum(tiles), steps, weight_set]
        tiles.append(-(-steps // STEPS))
        filling = tiles[-1] * STEPS - steps
        positions += [*(order[route] for route in sequence), order[sequence[-1]][-1:].expand(filling)]
        places += [*(route * length + order[route] for route in sequence), positions[-1] + sequence[-1] * length]
    table = torch.empty(len(facts), dtype=torch.int32, device=device)
    for number, fact in enumerate(facts):
        table[number].fill_(fact)  # nothing is copied from the CPU, which a captured graph must not
    slots = sum(tiles) - len(tiles)
    return Plan(torch.cat(positions).int(), torch.cat(places).int(), table, sets, tuple(tiles), slots)


def _cut(plan: Plan, x: Tensor, d_state: int, unread: Tensor) -> tuple[Chunks, Tensor, Tensor]:
    """The chunks, and where there are several the states with which they begin and their sums of Δ, else `unread`."""
    batch, channels = x.shape[0], x.shape[3]
    chunks = cut(batch * len(plan.sets) * -(-channels // CHANNELS), max(plan.tiles), multiprocessors(x.device))
    if chunks.count == 1:
        return chunks, unread, unread
    values = _zeros(x, batch, len(plan.sets), chunks.count, d_state, channels)
    return chunks, values, _zeros(x, batch, len(plan.sets), chunks.count, channels)


def _carry(plan: Plan, chunks: Chunks, values: Tensor, reach: Tensor, A_log: Tensor, reverse: bool) -> None:
    batch, _, _, d_state, channels = values.shape
    A2 = (A_log.float().exp() * -LOG2_E.value).mT
    grid = (batch * len(plan.sets), -(-channels // CHANNELS), d_state)
    carry_chunks[grid](
        values,
        reach,
        torch.stack([A2[weight_set] for weight_set in plan.sets]),
        values,
        len(plan.sets),
        chunks.count,
        channels,
        d_state,
        C=CHANNELS,
        HAS_INITIAL=False,
        REVERSE=reverse,
        num_warps=1,
    )


def _sizes(plan: Plan, chunks: Chunks, x: Tensor, routes: int) -> tuple[int, ...]:
    return x.shape[1] * x.shape[2], plan.slots, routes, len(plan.sets), chunks.count, chunks.tiles


def _constants(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, d_state: int) -> dict[str, int | bool]:
    sets, channels, rank = dt_weight.shape
    return {
        "D": channels,
        "R": rank,
        "N": d_state,
        "S": sets,
        "RP": max(16, 1 << (rank - 1).bit_length()),
        "C": CHANNELS,
        "T": STEPS,
        "EXACT": torch.float32 in (x.dtype, x_dbl.dtype),
    }


def _zeros(x: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=x.device)


def _by_set(parts: Tensor, dim: int, owners: Sequence[int], sets: int) -> Tensor:
    """Adds up along `dim`, in order, what belongs to the same weight set."""
    if list(owners) == list(range(sets)):
        return parts
    if sets == 1:
        return parts.sum(dim, keepdim=True)
    single = parts.unbind(dim)
    zero = torch.zeros_like(single[0])
    totals = [sum((t for t, owner in zip(single, owners, strict=True) if owner == s), zero) for s in range(sets)]
    return torch.stack(totals, dim)
