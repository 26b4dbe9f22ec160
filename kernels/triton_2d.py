"""The 2-D operator in Triton: routes walked in place on a channels-last map, delta made from its low-rank form.

A program is a block of channels, one sequence of routes (or a chunk of it) and one image. It walks tiles of T steps;
a table says at which position of the map each step lies, so that a route is known here by its table alone. While a
tile is computed, the next one's loads are under way, and the matrix product that makes its delta is the last thing
done before it is needed.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .routes import ROUTES, route_order, sequences
from .triton_tiles import (
    CHANNELS,
    LOG2_E,
    STEPS,
    Chunks,
    carry_chunks,
    cut,
    load_steps,
    sigmoid,
    softplus,
    stack,
    sum_channels,
    unstack,
    walk_backward,
    walk_forward,
)

# A new image size is a new value of these, and must compile nothing.
_SIZES = ["L", "tiles", "slots", "routes", "sequences", "chunks", "chunk_tiles"]


# The interpreter multiplies bf16 matrices wrongly.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def project(low, w_hi, w_lo, bias, C: tl.constexpr, T: tl.constexpr):
    """Delta before its softplus, T vectors (C,): low (T, R) times the weight (R, C), as exact as float32.

    A 16-bit low multiplies the weight in two parts that together hold what the weight does.
    """
    if INTERPRETED:
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
def load_low(p_ptr, order_ptr, stride: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, T: tl.constexpr):
    """The low-rank form of a tile's delta, (T, RP)."""
    place = tl.load(order_ptr + tl.arange(0, T)).to(tl.int64)
    r = tl.arange(0, RP)
    return tl.load(p_ptr + place[:, None] * stride + r[None, :], mask=(r < R)[None, :], other=0.0)


@triton.jit(do_not_specialize=_SIZES)
def scan_2d_forward(
    x_ptr,
    p_ptr,
    order_ptr,
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
    tiles,
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
    CHUNKED: tl.constexpr,
    SUMMARY: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Forward; or, as SUMMARY, what each chunk makes of a zero state, and its sum of Δ.

    Args:
        x_ptr: (B, L, D).
        p_ptr: (B, L, S, R + 2N), the columns [dt_low, B, C].
        order_ptr: positions on the map, (routes, tiles * T), the last one repeated up to the tile's end.
        plan_ptr: first route, number of routes, weight set of each sequence, (sequences, 3).
        weight_ptr, bias_ptr, A_log_ptr, skip_ptr: (S, D, R), (S, D), (S, D, N), (S, D).
        y_ptr: (B, routes, L, D).
        saved_ptr: states after each tile of a sequence but its last, (B, slots, N, D).
        starts_ptr: states with which chunks begin, (B, sequences, chunks, N, D); as SUMMARY, those they make of zero.
        reach_ptr: sums of Δ, (B, sequences, chunks, D).
    """
    BLOCKS: tl.constexpr = (D + C - 1) // C
    W: tl.constexpr = R + 2 * N
    MASKED: tl.constexpr = D % C != 0
    pid = tl.program_id(0)
    d = pid % BLOCKS * C + tl.arange(0, C)
    row = pid // BLOCKS  # of (B, sequences, chunks)
    chunk = row % chunks
    sequence = row // chunks % sequences
    b = (row // chunks // sequences).to(tl.int64)
    first_route = tl.load(plan_ptr + 3 * sequence)
    end = tl.load(plan_ptr + 3 * sequence + 1) * tiles
    weights = tl.load(plan_ptr + 3 * sequence + 2)
    i0 = chunk * chunk_tiles
    i1 = tl.minimum(i0 + chunk_tiles, end)
    if i0 >= end:
        return

    mask = d < D
    one = tl.arange(0, 1)
    r = tl.arange(0, RP)
    steps_of_tile = tl.arange(0, T)
    x_ptr += b * L * D + d
    p_ptr += b * L * (S * W) + weights * W
    y_ptr += (b * routes + first_route) * L * D + d
    order_ptr += first_route * tiles * T
    saved_ptr += (b * slots + first_route * tiles - sequence) * N * D + d
    starts_ptr += row.to(tl.int64) * N * D + d
    A_log_ptr += (weights * D + d) * N
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
        A2 = -tl.exp2(tl.load(A_log_ptr, mask=mask, other=0.0).to(tl.float32) * LOG2_E) * LOG2_E
        if CHUNKED and not SUMMARY:
            h = tl.load(starts_ptr, mask=mask, other=0.0)

    at = unstack(tl.load(order_ptr + i0 * T + steps_of_tile), 1, T)
    xs = load_steps(x_ptr, at, D, mask, MASKED, T)
    low = load_low(p_ptr, order_ptr + i0 * T, S * W, R, RP, T)
    raws = project(low, w_hi, w_lo, bias, C, T)
    tile = i0 % tiles
    route = i0 // tiles
    for i in range(i0, i1):
        # The next tile's loads; behind the last one, the last one's again.
        following = order_ptr + tl.minimum(i + 1, i1 - 1) * T
        next_at = unstack(tl.load(following + steps_of_tile), 1, T)
        next_xs = load_steps(x_ptr, next_at, D, mask, MASKED, T)
        low = load_low(p_ptr, following, S * W, R, RP, T)
        if N == 1:
            Bs = load_steps(p_ptr + R + one, at, S * W, mask, False, T)
            Cs = load_steps(p_ptr + R + 1 + one, at, S * W, mask, False, T)

        # A step behind the route's end repeats its last one with Δ = 0, which leaves the state as it is.
        rest = L - tile * T
        steps = ()
        inputs = ()
        ys = ()
        for t in tl.static_range(T):
            x = xs[t].to(tl.float32)
            step = tl.where(t < rest, softplus(raws[t], EXACT), 0.0)
            steps = steps + (step,)
            inputs = inputs + (step * x,)
            ys = ys + (skip * x,)
            reach += step
        if N == 1:
            ys, h = walk_forward(steps, inputs, Bs, Cs, A2, h, ys, T)
            if not SUMMARY:
                if i + 1 < end:
                    tl.store(saved_ptr + i * D, h, mask=mask)
        else:
            for n in range(0, N):
                A2 = -tl.exp2(tl.load(A_log_ptr + n, mask=mask, other=0.0).to(tl.float32) * LOG2_E) * LOG2_E
                before = saved_ptr + ((i - 1) * N + n) * D
                if CHUNKED and not SUMMARY:
                    before = tl.where(i > i0, before, starts_ptr + n * D)
                    h = tl.load(before, mask=mask, other=0.0)
                else:
                    h = tl.load(before, mask=d < tl.where(i > i0, D, 0), other=0.0)
                Bs = load_steps(p_ptr + R + n + one, at, S * W, mask, False, T)
                Cs = load_steps(p_ptr + R + N + n + one, at, S * W, mask, False, T)
                ys, h = walk_forward(steps, inputs, Bs, Cs, A2, h, ys, T)
                if i + 1 < end:
                    tl.store(saved_ptr + (i * N + n) * D, h, mask=mask)
                if SUMMARY:
                    if i + 1 == i1:
                        tl.store(starts_ptr + n * D, h, mask=mask)
        if not SUMMARY:
            for t in tl.static_range(T):
                y = ys[t].to(y_ptr.dtype.element_ty)
                if MASKED:
                    tl.store(y_ptr + (route * L + at[t]).to(tl.int64) * D, y, mask=mask)
                else:
                    tl.store(y_ptr + (route * L + at[t]).to(tl.int64) * D, y)
        raws = project(low, w_hi, w_lo, bias, C, T)
        xs = next_xs
        at = next_at
        tile += 1
        if tile == tiles:
            tile = 0
            route += 1
    if SUMMARY:
        tl.store(reach_ptr + row.to(tl.int64) * D + d, reach, mask=mask)
        if N == 1:
            tl.store(starts_ptr, h, mask=mask)


@triton.jit(do_not_specialize=_SIZES)
def scan_2d_backward(
    dy_ptr,
    x_ptr,
    p_ptr,
    order_ptr,
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
    tiles,
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
    CHUNKED: tl.constexpr,
    SUMMARY: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Backward; or, as SUMMARY, the adjoint that each chunk makes of a zero one behind it, and its sum of Δ.

    Args, beyond those of `scan_2d_forward`:
        dy_ptr: (B, routes, L, D).
        dx_ptr: (B, routes, L, D).
        dp_ptr: float32, (blocks of channels, B, L, routes, R + 2N), each block's part of a sum.
        dweight_ptr, dbias_ptr, dA_ptr, dskip_ptr: (B, sequences, chunks, ...), float32: (D, R), (D,), (N, D), (D,),
            each program's part of a sum; dA is that of A, and holds zeros before where N > 1.
        ends_ptr: adjoints that reach chunks from behind, (B, sequences, chunks, N, D), zeros where none does; where
            N > 1 they are used up. Not read where N = 1 and there is one chunk.
    """
    BLOCKS: tl.constexpr = (D + C - 1) // C
    W: tl.constexpr = R + 2 * N
    MASKED: tl.constexpr = D % C != 0
    pid = tl.program_id(0)
    block = pid % BLOCKS
    d = block * C + tl.arange(0, C)
    row = pid // BLOCKS  # of (B, sequences, chunks)
    chunk = row % chunks
    sequence = row // chunks % sequences
    b = (row // chunks // sequences).to(tl.int64)
    first_route = tl.load(plan_ptr + 3 * sequence)
    end = tl.load(plan_ptr + 3 * sequence + 1) * tiles
    weights = tl.load(plan_ptr + 3 * sequence + 2)
    i0 = chunk * chunk_tiles
    i1 = tl.minimum(i0 + chunk_tiles, end)
    if i0 >= end:
        return

    mask = d < D
    one = tl.arange(0, 1)
    r = tl.arange(0, RP)
    steps_of_tile = tl.arange(0, T)
    wide_row = row.to(tl.int64)
    x_ptr += b * L * D + d
    p_ptr += b * L * (S * W) + weights * W
    dy_ptr += (b * routes + first_route) * L * D + d
    dx_ptr += (b * routes + first_route) * L * D + d
    rows_of_block = (block * (tl.num_programs(0) // BLOCKS // chunks // sequences) + b) * L
    dp_ptr += (rows_of_block * routes + first_route) * W
    order_ptr += first_route * tiles * T
    saved_ptr += (b * slots + first_route * tiles - sequence) * N * D + d
    ends_ptr += wide_row * N * D + d
    dA_ptr += wide_row * N * D + d
    A_log_ptr += (weights * D + d) * N
    bias = tl.load(bias_ptr + weights * D + d, mask=mask, other=0.0).to(tl.float32)
    skip = tl.load(skip_ptr + weights * D + d, mask=mask, other=0.0).to(tl.float32)
    weight_at = weight_ptr + (weights * D + d)[None, :] * R + r[:, None]
    weight_mask = mask[None, :] & (r < R)[:, None]
    w_hi, w_lo = load_weight(weight_at, weight_mask, p_ptr.dtype.element_ty)
    weight = tl.load(
        weight_ptr + (weights * D + d)[:, None] * R + r[None, :], mask=mask[:, None] & (r < R)[None, :], other=0.0
    ).to(tl.float32)
    precision: tl.constexpr = "tf32x3" if EXACT else "tf32"
    s = tl.zeros((C,), tl.float32)
    reach = tl.zeros((C,), tl.float32)
    dA = tl.zeros((C,), tl.float32)
    dbias = tl.zeros((C,), tl.float32)
    dskip = tl.zeros((C,), tl.float32)
    dweight = tl.zeros((C, RP), tl.float32)
    if N == 1:
        A2 = -tl.exp2(tl.load(A_log_ptr, mask=mask, other=0.0).to(tl.float32) * LOG2_E) * LOG2_E
        if CHUNKED and not SUMMARY:
            s = tl.load(ends_ptr, mask=mask, other=0.0)

    last = i1 - 1
    tile = last % tiles
    route = last // tiles
    at = unstack(tl.load(order_ptr + last * T + steps_of_tile), 1, T)
    xs = load_steps(x_ptr, at, D, mask, MASKED, T)
    dys = load_steps(dy_ptr + route.to(tl.int64) * L * D, at, D, mask, MASKED, T)
    low = load_low(p_ptr, order_ptr + last * T, S * W, R, RP, T)
    raws = project(low, w_hi, w_lo, bias, C, T)
    for back in range(0, i1 - i0):
        i = last - back
        # The next loads, those of the tile before; before the first one, the first one's again.
        following = order_ptr + tl.maximum(i - 1, i0) * T
        next_tile = tile - 1
        next_route = route
        if next_tile < 0:
            next_tile = tiles - 1
            next_route = route - 1
        next_at = unstack(tl.load(following + steps_of_tile), 1, T)
        next_xs = load_steps(x_ptr, next_at, D, mask, MASKED, T)
        next_dys = load_steps(dy_ptr + tl.maximum(next_route, 0).to(tl.int64) * L * D, next_at, D, mask, MASKED, T)
        next_low = load_low(p_ptr, following, S * W, R, RP, T)
        at = unstack(tl.load(order_ptr + i * T + steps_of_tile), 1, T)
        if N == 1:
            Bs = load_steps(p_ptr + R + one, at, S * W, mask, False, T)
            Cs = load_steps(p_ptr + R + 1 + one, at, S * W, mask, False, T)

        # A step behind the route's end has Δ = 0 and dy = 0: nothing comes from it, and adjoints pass through.
        rest = L - tile * T
        wide_dys = ()
        steps = ()
        inputs = ()
        dinputs = ()
        dsteps = ()
        for t in tl.static_range(T):
            x = xs[t].to(tl.float32)
            dy = tl.where(t < rest, dys[t].to(tl.float32), 0.0)
            step = tl.where(t < rest, softplus(raws[t], EXACT), 0.0)
            wide_dys = wide_dys + (dy,)
            steps = steps + (step,)
            inputs = inputs + (step * x,)
            dinputs = dinputs + (tl.zeros((C,), tl.float32),)
            dsteps = dsteps + (tl.zeros((C,), tl.float32),)
            reach += step
            dskip += dy * x
        place = tl.load(order_ptr + i * T + steps_of_tile).to(tl.int64)
        dp_rows = dp_ptr + (place * routes + route) * W
        in_route = steps_of_tile < rest
        first_row = (tl.arange(0, 16) == 0)[:, None] & in_route[None, :]
        dp_columns = dp_rows[None, :] + tl.arange(0, 16)[:, None]
        if N == 1:
            h = tl.load(saved_ptr + (i - 1) * D, mask=d < tl.where(i > 0, D, 0), other=0.0)
            s, _, dinputs, dsteps, dA_tile, into_B, into_C = walk_backward(
                steps, inputs, Bs, Cs, wide_dys, A2, h, s, wide_dys, dinputs, dsteps, T
            )
            dA += dA_tile
            if not SUMMARY:
                tl.store(dp_columns + R, sum_channels(into_B, C, T, EXACT), mask=first_row)
                tl.store(dp_columns + R + 1, sum_channels(into_C, C, T, EXACT), mask=first_row)
        else:
            for n in range(0, N):
                A2 = -tl.exp2(tl.load(A_log_ptr + n, mask=mask, other=0.0).to(tl.float32) * LOG2_E) * LOG2_E
                h = tl.load(saved_ptr + ((i - 1) * N + n) * D, mask=d < tl.where(i > 0, D, 0), other=0.0)
                s = tl.load(ends_ptr + n * D, mask=mask, other=0.0)
                if SUMMARY:
                    s = tl.where(back > 0, s, 0.0)
                Bs = load_steps(p_ptr + R + n + one, at, S * W, mask, False, T)
                Cs = load_steps(p_ptr + R + N + n + one, at, S * W, mask, False, T)
                s, _, dinputs, dsteps, dA_tile, into_B, into_C = walk_backward(
                    steps, inputs, Bs, Cs, wide_dys, A2, h, s, wide_dys, dinputs, dsteps, T
                )
                tl.store(ends_ptr + n * D, s, mask=mask)
                if not SUMMARY:
                    dA_tile += tl.load(dA_ptr + n * D, mask=mask, other=0.0)
                    tl.store(dA_ptr + n * D, dA_tile, mask=mask)
                    tl.store(dp_columns + R + n, sum_channels(into_B, C, T, EXACT), mask=first_row)
                    tl.store(dp_columns + R + N + n, sum_channels(into_C, C, T, EXACT), mask=first_row)
        if not SUMMARY:
            into_raw = ()
            for t in tl.static_range(T):
                x = xs[t].to(tl.float32)
                dx = steps[t] * dinputs[t] + skip * wide_dys[t]
                draw = (x * dinputs[t] + dsteps[t]) * sigmoid(raws[t], steps[t])
                draw = tl.where(t < rest, draw, 0.0)
                dbias += draw
                into_raw = into_raw + (draw,)
                to = dx_ptr + (route * L + at[t]).to(tl.int64) * D
                tl.store(to, dx.to(dx_ptr.dtype.element_ty), mask=d < tl.where(t < rest, D, 0))
            draws = stack(into_raw, C, T)
            dlow = tl.dot(draws.trans(), weight, input_precision=precision)
            tl.store(dp_rows[:, None] + r[None, :], dlow, mask=in_route[:, None] & (r < R)[None, :])
            dweight = tl.dot(draws, low.to(tl.float32), dweight, input_precision=precision)
        raws = project(next_low, w_hi, w_lo, bias, C, T)
        low = next_low
        xs = next_xs
        dys = next_dys
        tile = next_tile
        route = next_route
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
        order: the position on the map of each step, (routes, tiles * STEPS); the last one is repeated up to the end of
            its tile.
        sequences: first route, number of routes and weight set of each sequence, (Q, 3).
        count: Q.
        longest: routes of the longest sequence.
        tiles: of a route.
    """

    order: Tensor
    sequences: Tensor
    count: int
    longest: int
    tiles: int


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
    x, A_log = tensors[0], tensors[4]
    batch, height, width, channels = x.shape
    d_state = A_log.shape[2]
    with torch.cuda.device_of(x):
        plan = _plan(tuple(routes), carry_state, height, width, x.device)
        out = x.new_empty(batch, len(routes), height, width, channels)
        saved = x.new_empty(saved_numel_2d(x.shape, d_state, routes, carry_state), dtype=torch.float32)
        chunks, starts, reach = _cut(plan, x, d_state)
        walked = [routes[first][1] for first, *_ in _sequences(tuple(routes), carry_state)]

        def launch(summary: bool) -> None:
            grid = (batch * plan.count * chunks.count * triton.cdiv(channels, CHANNELS),)
            scan_2d_forward[grid](
                tensors[0],
                tensors[1],
                plan.order,
                plan.sequences,
                *tensors[2:],
                out,
                saved,
                starts,
                reach,
                *_sizes(plan, chunks, x, len(routes)),
                **_constants(x, x_dbl, dt_weight, d_state),
                CHUNKED=chunks.count > 1,
                SUMMARY=summary,
                num_warps=1,
            )

        if chunks.count > 1:
            launch(summary=True)
            _carry(plan, chunks, starts, reach, A_log, walked, reverse=False)
        launch(summary=False)
    return out, saved


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
    tensors = [t.contiguous() for t in (x, x_dbl, dt_weight, dt_bias, A_log, D_skip)]
    x, x_dbl, dt_weight, dt_bias, A_log, D_skip = tensors
    batch, height, width, channels = x.shape
    sets, _, rank = dt_weight.shape
    d_state, count = A_log.shape[2], len(routes)
    blocks = triton.cdiv(channels, CHANNELS)
    with torch.cuda.device_of(x):
        plan = _plan(tuple(routes), carry_state, height, width, x.device)
        chunks, ends, reach = _cut(plan, x, d_state)
        walked = [routes[first][1] for first, *_ in _sequences(tuple(routes), carry_state)]
        if d_state > 1:
            ends = _zeros(x, batch, plan.count, chunks.count, d_state, channels)

        def parts(*shape: int) -> Tensor:
            # A sequence shorter than the longest leaves its last chunks out.
            fill = torch.zeros if chunks.count > 1 else torch.empty
            return fill(batch, plan.count, chunks.count, *shape, dtype=torch.float32, device=x.device)

        dx = torch.empty(batch, count, height, width, channels, device=x.device, dtype=_part_dtype(x, count))
        dp = torch.empty(blocks, batch, height, width, count, x_dbl.shape[-1], dtype=torch.float32, device=x.device)
        dweight, dbias, dskip = parts(channels, rank), parts(channels), parts(channels)
        dA = parts(d_state, channels) if d_state == 1 else _zeros(x, *ends.shape)

        def launch(summary: bool) -> None:
            grid = (batch * plan.count * chunks.count * blocks,)
            scan_2d_backward[grid](
                dy.contiguous(),
                x,
                x_dbl,
                plan.order,
                plan.sequences,
                dt_weight,
                dt_bias,
                A_log,
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
                CHUNKED=chunks.count > 1,
                SUMMARY=summary,
                num_warps=1,
            )

        if chunks.count > 1:
            launch(summary=True)
            _carry(plan, chunks, ends, reach, A_log, walked, reverse=True)
        launch(summary=False)
        route_sets = [weight_set for _, weight_set in routes]
        return (
            dx[:, 0].to(x.dtype) if count == 1 else dx.sum(1).to(x.dtype),
            _by_set(dp.sum(0), 3, route_sets, sets).to(x_dbl.dtype),
            _by_set(dweight.sum((0, 2)), 0, walked, sets).to(dt_weight.dtype),
            _by_set(dbias.sum((0, 2)), 0, walked, sets).to(dt_bias.dtype),
            # A = -exp(A_log), so dA/dA_log = A.
            (_by_set(dA.sum((0, 2)), 0, walked, sets).mT * -A_log.float().exp()).to(A_log.dtype),
            _by_set(dskip.sum((0, 2)), 0, walked, sets).to(D_skip.dtype),
        )


def saved_numel_2d(shape: Sequence[int], d_state: int, routes: Sequence[tuple[str, int]], carry_state: bool) -> int:
    """The number of states that `selective_scan_2d` saves for x of shape (B, H, W, D): one a tile, but the last."""
    batch, height, width, channels = shape
    slots = len(routes) * -(-height * width // STEPS) - len(sequences(tuple(s for _, s in routes), carry_state))
    return batch * slots * d_state * channels


def _sequences(routes: tuple[tuple[str, int], ...], carry_state: bool) -> list[tuple[int, ...]]:
    return sequences(tuple(weight_set for _, weight_set in routes), carry_state)


def _plan(
    routes: tuple[tuple[str, int], ...], carry_state: bool, height: int, width: int, device: torch.device
) -> Plan:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # What is made now belongs to the graph that is being captured.
        return _make_plan(routes, carry_state, height, width, device)
    return _kept_plan(routes, carry_state, height, width, device)


def _make_plan(
    routes: tuple[tuple[str, int], ...], carry_state: bool, height: int, width: int, device: torch.device
) -> Plan:
    tiles = -(-height * width // STEPS)
    orders = torch.stack([route_order(name, height, width, device) for name, _ in routes]).int()
    orders = torch.cat([orders, orders[:, -1:].expand(-1, tiles * STEPS - height * width)], dim=1)
    walked = _sequences(routes, carry_state)
    longest = max(map(len, walked))
    facts = [[sequence[0], len(sequence), routes[sequence[0]][1]] for sequence in walked]
    table = torch.empty(len(facts), 3, dtype=torch.int32, device=device)
    for number, fact in enumerate(facts):
        for column, value in enumerate(fact):
            table[number, column].fill_(value)
    return Plan(orders.contiguous(), table, len(walked), longest, tiles)


@lru_cache(maxsize=256)
def _kept_plan(
    routes: tuple[tuple[str, int], ...], carry_state: bool, height: int, width: int, device: torch.device
) -> Plan:
    # Made on the CPU, so that it is there, whichever stream asks for it next.
    plan = _make_plan(routes, carry_state, height, width, torch.device("cpu"))
    return plan._replace(order=plan.order.to(device), sequences=plan.sequences.to(device))


def _cut(plan: Plan, x: Tensor, d_state: int) -> tuple[Chunks, Tensor, Tensor]:
    """The chunks, and where there are several the states with which they begin and their sums of Δ."""
    batch, channels = x.shape[0], x.shape[3]
    chunks = cut(batch * plan.count * triton.cdiv(channels, CHANNELS), plan.longest * plan.tiles, x.device)
    if chunks.count == 1:
        none = x.new_empty(0, dtype=torch.float32)
        return chunks, none, none
    values = _zeros(x, batch, plan.count, chunks.count, d_state, channels)
    return chunks, values, _zeros(x, batch, plan.count, chunks.count, channels)


def _carry(
    plan: Plan, chunks: Chunks, values: Tensor, reach: Tensor, A_log: Tensor, sets: list[int], reverse: bool
) -> None:
    batch, _, _, d_state, channels = values.shape
    A2 = (A_log.float().exp() * -LOG2_E.value).mT
    grid = (batch * plan.count, triton.cdiv(channels, CHANNELS), d_state)
    carry_chunks[grid](
        values,
        reach,
        torch.stack([A2[weight_set] for weight_set in sets]),
        values,
        plan.count,
        chunks.count,
        channels,
        d_state,
        C=CHANNELS,
        HAS_INITIAL=False,
        REVERSE=reverse,
        num_warps=1,
    )


def _sizes(plan: Plan, chunks: Chunks, x: Tensor, routes: int) -> tuple[int, ...]:
    length = x.shape[1] * x.shape[2]
    slots = routes * plan.tiles - plan.count
    return length, plan.tiles, slots, routes, plan.count, chunks.count, chunks.tiles


def _constants(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, d_state: int) -> dict[str, int | bool]:
    sets, channels, rank = dt_weight.shape
    return {
        "D": channels,
        "R": rank,
        "N": d_state,
        "S": sets,
        "RP": max(16, triton.next_power_of_2(rank)),
        "C": CHANNELS,
        "T": STEPS,
        "EXACT": torch.float32 in (x.dtype, x_dbl.dtype),
    }


def _part_dtype(x: Tensor, routes: int) -> torch.dtype:
    return x.dtype if routes == 1 else torch.float32


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
