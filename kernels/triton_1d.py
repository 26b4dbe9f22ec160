"""The 1-D operator in Triton: Mamba's layout, time last.

A program is a block of channels of one group, one sequence (or a chunk of it). As in `triton_2d.py` it walks tiles of T
steps, here read along time, so that a thread finds the steps of its channel side by side.

Memory moves whole sectors. Where the length is no multiple of one, rows begin anywhere in a sector, and tiles that all
begin with the row would share one at either end. So a program takes every CLASSES-th channel, whose rows all begin at
the same place of a sector, and begins its tiles with the sector: `shift` steps before the row (see `_split` for when).
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .precision import outside_autocast
from .triton_tiles import (
    CHANNELS,
    LOG2_E,
    STEPS,
    Chunks,
    carry_chunks,
    cut,
    finite_rate,
    matrix_precision,
    multiprocessors,
    sigmoid,
    softplus,
    spread,
    stack,
    sum_channels,
    unstack,
    walk_backward,
    walk_forward,
)

AT_ONCE = tl.constexpr(2)
"""Tiles that the forward reads at once: longer reads of a row, and earlier."""

VECTORS = (8, 4)
"""Steps that a thread reads at once: the first that divides the length, or 8 where a tile begins with a sector. Where
neither is so, threads share 8 steps one by one."""

SECTOR = 32
"""Bytes of a sector."""

ALIKE_AT_LEAST = 4
"""Steps of a sector with a multiple of which rows begin, where channels are dealt out in classes. Ends of rows are
stored as many steps at once; with fewer this costs more than shared sectors do."""

# A new length is a new value of these, and compiles nothing but the first of its kind: a multiple of T, of 8, of 4, of
# 2, another (and, once, the summaries, where few long sequences come).
_SIZES = ["L", "batch", "groups", "chunks", "chunk_tiles"]


@triton.jit
def first_row(b, groups, group, in_group, shift, L, D: tl.constexpr, PER: tl.constexpr, SHIFTED: tl.constexpr):
    """Where the tiles of each channel begin, `shift` steps before its row."""
    rows = (b * groups * D + group * D + in_group) * L - shift
    if SHIFTED:
        rows = rows // PER * PER  # as they are, but now the compiler knows
    return rows


@triton.jit
def readable(rows, batch, groups, L, D: tl.constexpr, PER: tl.constexpr, SHIFTED: tl.constexpr):
    """How many steps may be read from `first_row` on: to the end of the row, or shifted to that of the tensor.

    Shifted at most 2^24 sectors are: 2^27 steps of float32.
    """
    if SHIFTED:
        room = tl.minimum((batch.to(tl.int64) * groups * D * L - rows) // PER, 1 << 24).to(tl.int32) * PER
        room = room[:, None]
    else:
        room = L
    return room


@triton.jit
def saved_slots(kind, L, CLASSES: tl.constexpr, PER: tl.constexpr, T: tl.constexpr):
    """How many states the classes before `kind` save, and all of them."""
    kinds = tl.arange(0, CLASSES)
    slots = (L + kinds * (L % PER) % PER + (T - 1)) // T - 1
    return tl.sum(tl.where(kinds < kind, slots, 0)), tl.sum(slots)


@triton.jit
def decay_rate(A):
    """A * log2(e), finite."""
    return finite_rate(A.to(tl.float32) * LOG2_E)


@triton.jit
def load_tile(row_ptr, at, room, mask, T: tl.constexpr, V: tl.constexpr):
    """T steps of C rows, as they lie in memory: a tuple of (C, V). Zeros behind `room`."""
    found = ()
    for part in tl.static_range(T // V):
        t = at + part * V + tl.arange(0, V)[None, :]
        found = found + (tl.load(row_ptr[:, None] + t, mask=mask[:, None] & (t < room), other=0.0),)
    return found


@triton.jit
def within(parts, at, shift, L, T: tl.constexpr, V: tl.constexpr):
    """What `load_tile` returns, with zeros for steps of other rows, of which a shifted tile at either end has some."""
    found = ()
    for part in tl.static_range(T // V):
        t = at + part * V + tl.arange(0, V)[None, :] - shift
        found = found + (tl.where((t >= 0) & (t < L), parts[part], 0.0),)
    return found


@triton.jit
def unpack(parts, tile: tl.constexpr, C: tl.constexpr, T: tl.constexpr, V: tl.constexpr):
    """A tile of what `load_tile` returns, as T vectors (C,) in float32."""
    found = ()
    for part in tl.static_range(T // V):
        columns = unstack(parts[tile * (T // V) + part], C, V)
        for t in tl.static_range(V):
            found = found + (columns[t].to(tl.float32),)
    return found


@triton.jit
def store_tile(
    row_ptr,
    at,
    shift,
    L,
    columns,
    mask,
    ALIKE: tl.constexpr,
    SHIFTED: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
):
    """The inverse of `load_tile` and `unpack`; of the row's own steps alone.

    Rows begin and end with a multiple of ALIKE steps of a sector.
    """
    end = shift + L
    whole = (at >= shift) & (at + T <= end)
    shift = shift // ALIKE * ALIKE  # as they are, but now the compiler knows, and stores as many steps at once
    end = end // ALIKE * ALIKE
    for part in tl.static_range(T // V):
        chosen = ()
        for t in tl.static_range(V):
            chosen = chosen + (columns[part * V + t].to(row_ptr.dtype.element_ty),)
        t = at + part * V + tl.arange(0, V)[None, :]
        tile = stack(chosen, C, V)
        if SHIFTED:
            if whole:
                tl.store(row_ptr[:, None] + t, tile, mask=mask[:, None])
            else:
                tl.store(row_ptr[:, None] + t, tile, mask=mask[:, None] & (t >= shift) & (t < end))
        else:
            tl.store(row_ptr[:, None] + t, tile, mask=mask[:, None] & (t < L))


@triton.jit
def load_BC(B_ptr, C_ptr, t0, L, TILES: tl.constexpr, T: tl.constexpr):
    """B and C of one state in tiles from t0 on, each (T, 2), as `spread` takes them. Zeros outside of the sequence."""
    found = ()
    for tile in tl.static_range(TILES):
        t = t0 + tile * T + tl.arange(0, T)[:, None]
        at = tl.where(tl.arange(0, 2)[None, :] == 0, B_ptr, C_ptr) + t
        found = found + (tl.load(at, mask=(t >= 0) & (t < L), other=0.0),)
    return found


@triton.jit(do_not_specialize=_SIZES)
def scan_1d_forward(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    y_ptr,
    last_ptr,
    saved_ptr,
    starts_ptr,
    reach_ptr,
    L,
    batch,
    groups,
    chunks,
    chunk_tiles,
    D: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLASSES: tl.constexpr,
    PER: tl.constexpr,
    SUMMARY: tl.constexpr,
    FULL: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Forward; or, as SUMMARY, what each chunk makes of a zero state, and its sum of Δ.

    Args:
        u_ptr, delta_ptr, z_ptr, y_ptr: (B, groups * D, L), D channels a group.
        A_ptr: (N, groups * D).
        B_ptr, C_ptr: (B, groups, N, L).
        D_ptr, bias_ptr: (groups * D,).
        last_ptr: the state behind the end, (B, groups * D, N).
        saved_ptr: states after each tile but the last, (B, each class's, N, groups * D / CLASSES).
        starts_ptr: states with which chunks begin, (B, chunks, N, groups * D); as SUMMARY, those they make of zero.
        reach_ptr: sums of Δ, (B, chunks, groups * D).
    """
    WIDTH: tl.constexpr = D // CLASSES  # channels of a class
    BLOCKS: tl.constexpr = CLASSES * ((WIDTH + C - 1) // C)
    SHIFTED: tl.constexpr = CLASSES > 1
    pid = tl.program_id(0)
    kind = pid % CLASSES
    in_class = pid % BLOCKS // CLASSES * C + tl.arange(0, C)
    in_group = in_class * CLASSES + kind
    group = pid // BLOCKS % groups
    chunk = pid // BLOCKS // groups % chunks
    b = (pid // BLOCKS // groups // chunks).to(tl.int64)
    shift = kind * (L % PER) % PER
    tiles = (L + shift + (T - 1)) // T
    i0 = chunk * chunk_tiles
    i1 = tl.minimum(i0 + chunk_tiles, tiles)
    if i0 >= i1:
        return

    if ALIGNED:
        L = L // V * V  # as it is, but now the compiler knows, and reads V steps at once
    mask = in_class < WIDTH
    channels = groups.to(tl.int64) * D
    d = group * D + in_group
    rows = first_row(b, groups, group, in_group, shift, L, D, PER, SHIFTED)
    room = readable(rows, batch, groups, L, D, PER, SHIFTED)
    slots_before, slots = saved_slots(kind, L, CLASSES, PER, T)
    width = channels // CLASSES
    u_ptr += rows
    delta_ptr += rows
    z_ptr += rows
    y_ptr += rows
    line = (b * groups + group) * N * L
    B_ptr += line
    C_ptr += line
    saved_ptr += (b * slots + slots_before) * N * width + group * WIDTH + in_class
    starts_ptr += (b * chunks + chunk) * N * channels + d
    A_ptr += d
    skip = tl.zeros((C,), tl.float32)
    bias = tl.zeros((C,), tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    h = tl.zeros((C,), tl.float32)
    reach = tl.zeros((C,), tl.float32)
    if N == 1:
        A2 = decay_rate(tl.load(A_ptr, mask=mask, other=0.0))
        if not SUMMARY:
            h = tl.load(starts_ptr, mask=in_class < tl.where(chunks > 1, WIDTH, 0), other=0.0)

    us = load_tile(u_ptr, i0 * T, room, mask, AT_ONCE * T, V)
    raws = load_tile(delta_ptr, i0 * T, room, mask, AT_ONCE * T, V)
    BCs = load_BC(B_ptr, C_ptr, i0 * T - shift, L, AT_ONCE, T)
    for first in range(i0, i1, AT_ONCE):
        following = (first + AT_ONCE) * T
        next_us = load_tile(u_ptr, following, room, mask, AT_ONCE * T, V)
        next_raws = load_tile(delta_ptr, following, room, mask, AT_ONCE * T, V)
        next_BCs = load_BC(B_ptr, C_ptr, following - shift, L, AT_ONCE, T)
        if SHIFTED:
            if (first * T < shift) | ((first + AT_ONCE) * T > shift + L):
                us = within(us, first * T, shift, L, AT_ONCE * T, V)
                raws = within(raws, first * T, shift, L, AT_ONCE * T, V)
        for tile in tl.static_range(AT_ONCE):
            i = first + tile
            t0 = i * T - shift
            if (tile == 0) | (i < i1):
                BC = BCs[tile]
                # Outside of the sequence Δ = 0, which leaves the state as it is.
                wide_us = unpack(us, tile, C, T, V)
                wide_raws = unpack(raws, tile, C, T, V)
                steps = ()
                inputs = ()
                ys = ()
                for t in tl.static_range(T):
                    step = wide_raws[t] + bias
                    if SOFTPLUS:
                        step = softplus(step, EXACT)
                    if SHIFTED:
                        step = tl.where(t >= -t0, step, 0.0)
                    if not FULL:
                        step = tl.where(t < L - t0, step, 0.0)
                    steps = steps + (step,)
                    inputs = inputs + (step * wide_us[t],)
                    ys = ys + (skip * wide_us[t],)
                    reach += step
                if N == 1:
                    Bs, Cs = spread(BC, T)
                    ys, h = walk_forward(steps, inputs, Bs, Cs, A2, h, ys, T)
                    if not SUMMARY:
                        if i + 1 < tiles:
                            tl.store(saved_ptr + i * width, h, mask=mask)
                else:
                    # What state 0 begins the tile with, and what the others do while the one before is computed.
                    known = i > i0
                    if not SUMMARY:
                        known = known | (chunks > 1)
                    known = in_class < tl.where(known, WIDTH, 0)
                    from_saved = i > i0
                    stride = tl.where(from_saved, width, channels)
                    began = tl.where(from_saved, saved_ptr + (i - 1) * N * width, starts_ptr)
                    h = tl.load(began, mask=known, other=0.0)
                    A = tl.load(A_ptr, mask=mask, other=0.0)
                    for n in range(0, N):
                        Bs, Cs = spread(BC, T)
                        A2 = decay_rate(A)
                        next_n = tl.minimum(n + 1, N - 1)
                        BC = load_BC(B_ptr + next_n.to(tl.int64) * L, C_ptr + next_n.to(tl.int64) * L, t0, L, 1, T)[0]
                        h_of_next = tl.load(began + next_n * stride, mask=known, other=0.0)
                        A = tl.load(A_ptr + next_n * channels, mask=mask, other=0.0)
                        ys, h = walk_forward(steps, inputs, Bs, Cs, A2, h, ys, T)
                        if i + 1 < tiles:
                            tl.store(saved_ptr + (i * N + n) * width, h, mask=mask)
                        if SUMMARY:
                            if i + 1 == i1:
                                tl.store(starts_ptr + n * channels, h, mask=mask)
                        elif i + 1 == tiles:
                            tl.store(last_ptr + (b * channels + d) * N + n, h, mask=mask)
                        h = h_of_next
                    tl.debug_barrier()  # the tile that follows reads the states written here, perhaps from others
                if not SUMMARY:
                    if HAS_Z:
                        zs = unpack(load_tile(z_ptr, i * T, room, mask, T, V), 0, C, T, V)
                        gated = ()
                        for t in tl.static_range(T):
                            gated = gated + (ys[t] * zs[t] * tl.sigmoid(zs[t]),)
                        ys = gated
                    store_tile(y_ptr, i * T, shift, L, ys, mask, PER // CLASSES, SHIFTED, C, T, V)
        us = next_us
        raws = next_raws
        BCs = next_BCs
    if SUMMARY:
        tl.store(reach_ptr + (b * chunks + chunk) * channels + d, reach, mask=mask)
        if N == 1:
            tl.store(starts_ptr, h, mask=mask)
    elif N == 1:
        tl.store(last_ptr + b * channels + d, h, mask=in_class < tl.where(i1 == tiles, WIDTH, 0))


@triton.jit(do_not_specialize=_SIZES)
def scan_1d_backward(
    dy_ptr,
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    saved_ptr,
    du_ptr,
    ddelta_ptr,
    dA_ptr,
    dB_ptr,
    dC_ptr,
    dD_ptr,
    dz_ptr,
    dbias_ptr,
    ends_ptr,
    reach_ptr,
    L,
    batch,
    groups,
    chunks,
    chunk_tiles,
    D: tl.constexpr,
    N: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CLASSES: tl.constexpr,
    PER: tl.constexpr,
    SUMMARY: tl.constexpr,
    FULL: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Backward; or, as SUMMARY, the adjoint that each chunk makes of a zero one behind it, and its sum of Δ.

    Args, beyond those of `scan_1d_forward`:
        dy_ptr, du_ptr, ddelta_ptr, dz_ptr: (B, groups * D, L).
        dB_ptr, dC_ptr: float32, (blocks of a group's channels, B, groups, N, L), each block's part of a sum.
        dA_ptr, dD_ptr, dbias_ptr: float32, (B, chunks, N, groups * D) and twice (B, chunks, groups * D), each
            program's part of a sum; dA holds zeros before.
        ends_ptr: adjoints that reach chunks from behind, (B, chunks, N, groups * D), zeros where none does; used up
            where N > 1, and overwritten by SUMMARY.
    """
    WIDTH: tl.constexpr = D // CLASSES  # channels of a class
    BLOCKS: tl.constexpr = CLASSES * ((WIDTH + C - 1) // C)
    SHIFTED: tl.constexpr = CLASSES > 1
    pid = tl.program_id(0)
    block = pid % BLOCKS
    kind = block % CLASSES
    in_class = block // CLASSES * C + tl.arange(0, C)
    in_group = in_class * CLASSES + kind
    group = pid // BLOCKS % groups
    chunk = pid // BLOCKS // groups % chunks
    b = (pid // BLOCKS // groups // chunks).to(tl.int64)
    shift = kind * (L % PER) % PER
    tiles = (L + shift + (T - 1)) // T
    i0 = chunk * chunk_tiles
    i1 = tl.minimum(i0 + chunk_tiles, tiles)
    if i0 >= i1:
        return

    if ALIGNED:
        L = L // V * V  # as it is, but now the compiler knows, and reads V steps at once
    mask = in_class < WIDTH
    channels = groups.to(tl.int64) * D
    d = group * D + in_group
    rows = first_row(b, groups, group, in_group, shift, L, D, PER, SHIFTED)
    room = readable(rows, batch, groups, L, D, PER, SHIFTED)
    slots_before, slots = saved_slots(kind, L, CLASSES, PER, T)
    width = channels // CLASSES
    dy_ptr += rows
    u_ptr += rows
    delta_ptr += rows
    z_ptr += rows
    du_ptr += rows
    ddelta_ptr += rows
    dz_ptr += rows
    line = (b * groups + group) * N * L
    B_ptr += line
    C_ptr += line
    part = ((block * batch.to(tl.int64) + b) * groups + group) * N * L
    saved_ptr += (b * slots + slots_before) * N * width + group * WIDTH + in_class
    row = b * chunks + chunk
    ends_ptr += row * N * channels + d
    dA_ptr += row * N * channels + d
    A_ptr += d
    skip = tl.zeros((C,), tl.float32)
    bias = tl.zeros((C,), tl.float32)
    if HAS_D:
        skip = tl.load(D_ptr + d, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=mask, other=0.0).to(tl.float32)
    s = tl.zeros((C,), tl.float32)
    reach = tl.zeros((C,), tl.float32)
    dA = tl.zeros((C,), tl.float32)
    dbias = tl.zeros((C,), tl.float32)
    dskip = tl.zeros((C,), tl.float32)
    eight = tl.arange(0, 8)[None, :]
    if N == 1:
        A2 = decay_rate(tl.load(A_ptr, mask=mask, other=0.0))
        if not SUMMARY:
            s = tl.load(ends_ptr, mask=mask, other=0.0)

    us = load_tile(u_ptr, (i1 - 1) * T, room, mask, T, V)
    raws = load_tile(delta_ptr, (i1 - 1) * T, room, mask, T, V)
    dys = load_tile(dy_ptr, (i1 - 1) * T, room, mask, T, V)
    BC = load_BC(B_ptr, C_ptr, (i1 - 1) * T - shift, L, 1, T)[0]
    h = tl.load(saved_ptr + (i1 - 2) * N * width, mask=in_class < tl.where(i1 > 1, WIDTH, 0), other=0.0)
    for back in range(0, i1 - i0):
        i = i1 - 1 - back
        t0 = i * T - shift
        following = tl.maximum(i - 1, 0) * T
        next_us = load_tile(u_ptr, following, room, mask, T, V)
        next_raws = load_tile(delta_ptr, following, room, mask, T, V)
        next_dys = load_tile(dy_ptr, following, room, mask, T, V)
        next_BC = load_BC(B_ptr, C_ptr, following - shift, L, 1, T)[0]
        began = saved_ptr + (i - 1) * N * width
        known = in_class < tl.where(i > 0, WIDTH, 0)
        next_h = tl.load(began - N * width, mask=in_class < tl.where(i > 1, WIDTH, 0), other=0.0)

        if HAS_Z:
            gates = load_tile(z_ptr, i * T, room, mask, T, V)
        if SHIFTED:
            if (t0 < 0) | (t0 + T > L):
                us = within(us, i * T, shift, L, T, V)
                raws = within(raws, i * T, shift, L, T, V)
                dys = within(dys, i * T, shift, L, T, V)
                if HAS_Z:
                    gates = within(gates, i * T, shift, L, T, V)
        # Outside of the sequence Δ = 0 and dy = 0: nothing comes from there, and an adjoint passes through.
        wide_us = unpack(us, 0, C, T, V)
        wide_raws = unpack(raws, 0, C, T, V)
        wide_dys = unpack(dys, 0, C, T, V)
        if HAS_Z:
            zs = unpack(gates, 0, C, T, V)
            gated = ()
            for t in tl.static_range(T):
                gated = gated + (wide_dys[t] * zs[t] * tl.sigmoid(zs[t]),)
            from_y = wide_dys
            wide_dys = gated
        steps = ()
        inputs = ()
        ys = ()
        dinputs = ()
        dsteps = ()
        for t in tl.static_range(T):
            step = wide_raws[t] + bias
            if SOFTPLUS:
                step = softplus(step, EXACT)
            if SHIFTED:
                step = tl.where(t >= -t0, step, 0.0)
            if not FULL:
                step = tl.where(t < L - t0, step, 0.0)
            steps = steps + (step,)
            inputs = inputs + (step * wide_us[t],)
            ys = ys + (skip * wide_us[t],)
            dinputs = dinputs + (tl.zeros((C,), tl.float32),)
            dsteps = dsteps + (tl.zeros((C,), tl.float32),)
            reach += step
            dskip += wide_dys[t] * wide_us[t]
        dBs = tl.zeros((T, 8), tl.float32)
        dCs = tl.zeros((T, 8), tl.float32)
        t = t0 + tl.arange(0, T)[:, None]
        if N == 1:
            Bs, Cs = spread(BC, T)
            s, ys, dinputs, dsteps, dA_tile, into_B, into_C = walk_backward(
                steps, inputs, Bs, Cs, wide_dys, A2, h, s, ys, dinputs, dsteps, -t0, L - t0, FULL, T
            )
            dA += dA_tile
            if not SUMMARY:
                dBs = sum_channels(into_B, dBs, 0, C, T, PRECISION)
                dCs = sum_channels(into_C, dCs, 0, C, T, PRECISION)
                to_mask = (t >= 0) & (t < L) & (eight == 0)
                tl.store(dB_ptr + part + t + eight, dBs, mask=to_mask)
                tl.store(dC_ptr + part + t + eight, dCs, mask=to_mask)
        else:
            s = tl.load(ends_ptr, mask=mask, other=0.0)
            A = tl.load(A_ptr, mask=mask, other=0.0)
            for n in range(0, N):
                Bs, Cs = spread(BC, T)
                A2 = decay_rate(A)
                if SUMMARY:
                    s = tl.where(back > 0, s, 0.0)
                else:
                    dA = tl.load(dA_ptr + n * channels, mask=mask, other=0.0)
                next_n = tl.minimum(n + 1, N - 1)
                BC = load_BC(B_ptr + next_n.to(tl.int64) * L, C_ptr + next_n.to(tl.int64) * L, t0, L, 1, T)[0]
                h_of_next = tl.load(began + next_n * width, mask=known, other=0.0)
                s_of_next = tl.load(ends_ptr + next_n * channels, mask=mask, other=0.0)
                A = tl.load(A_ptr + next_n * channels, mask=mask, other=0.0)
                s, ys, dinputs, dsteps, dA_tile, into_B, into_C = walk_backward(
                    steps, inputs, Bs, Cs, wide_dys, A2, h, s, ys, dinputs, dsteps, -t0, L - t0, FULL, T
                )
                tl.store(ends_ptr + n * channels, s, mask=mask)
                if not SUMMARY:
                    tl.store(dA_ptr + n * channels, dA + dA_tile, mask=mask)
                    dBs = sum_channels(into_B, dBs, n % 8, C, T, PRECISION)
                    dCs = sum_channels(into_C, dCs, n % 8, C, T, PRECISION)
                    if (n % 8 == 7) | (n == N - 1):
                        state = n // 8 * 8 + eight
                        to = part + state.to(tl.int64) * L + t
                        to_mask = (t >= 0) & (t < L) & (state < N)
                        tl.store(dB_ptr + to, dBs, mask=to_mask)
                        tl.store(dC_ptr + to, dCs, mask=to_mask)
                        dBs = tl.zeros((T, 8), tl.float32)
                        dCs = tl.zeros((T, 8), tl.float32)
                h = h_of_next
                s = s_of_next
            tl.debug_barrier()  # the tile that follows reads the states written here, perhaps from other threads
        if not SUMMARY:
            dus = ()
            draws = ()
            dzs = ()
            for t in tl.static_range(T):
                dus = dus + (steps[t] * dinputs[t] + skip * wide_dys[t],)
                draw = wide_us[t] * dinputs[t] + dsteps[t]
                if SOFTPLUS:
                    draw *= sigmoid(wide_raws[t] + bias, steps[t])
                if SHIFTED:
                    draw = tl.where(t >= -t0, draw, 0.0)
                if not FULL:
                    draw = tl.where(t < L - t0, draw, 0.0)
                dbias += draw
                draws = draws + (draw,)
                if HAS_Z:
                    gate = tl.sigmoid(zs[t])
                    dzs = dzs + (from_y[t] * ys[t] * gate * (1.0 + zs[t] * (1.0 - gate)),)
            store_tile(du_ptr, i * T, shift, L, dus, mask, PER // CLASSES, SHIFTED, C, T, V)
            store_tile(ddelta_ptr, i * T, shift, L, draws, mask, PER // CLASSES, SHIFTED, C, T, V)
            if HAS_Z:
                store_tile(dz_ptr, i * T, shift, L, dzs, mask, PER // CLASSES, SHIFTED, C, T, V)
        us = next_us
        raws = next_raws
        dys = next_dys
        BC = next_BC
        h = next_h
    if SUMMARY:
        tl.store(reach_ptr + row * channels + d, reach, mask=mask)
        if N == 1:
            tl.store(ends_ptr, s, mask=mask)
    else:
        tl.store(dbias_ptr + row * channels + d, dbias, mask=mask)
        tl.store(dD_ptr + row * channels + d, dskip, mask=mask)
        if N == 1:
            tl.store(dA_ptr, dA, mask=mask)


@outside_autocast
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `parallel.selective_scan`."""
    u, delta, A, B, C, D, z, delta_bias = _contiguous(u, delta, A, *_alike(B, C), D, z, delta_bias)
    batch, channels, _ = u.shape
    d_state = A.shape[1]
    with torch.cuda.device_of(u):
        by_state = A.mT.contiguous()
        split = _split(u, delta, z, B.shape[1])
        chunks, starts, reach = _cut(u, B.shape[1], d_state, split)
        y, last = torch.empty_like(u), u.new_empty(batch, channels, d_state, dtype=torch.float32)
        saved = u.new_empty(saved_numel_1d(u.shape, d_state), dtype=torch.float32)
        saved[_saved(u, split, d_state) :].zero_()  # what a caller sees is the same at every call

        def launch(summary: bool) -> None:
            scan_1d_forward[_grid(u, B.shape[1], chunks, split)](
                u,
                delta,
                by_state,
                B,
                C,
                u if D is None else D,
                u if z is None else z,
                u if delta_bias is None else delta_bias,
                y,
                last,
                saved,
                starts,
                reach,
                *_sizes(u, B.shape[1], chunks),
                **_constants(u, delta, A, B, C, D, z, delta_bias, delta_softplus, split),
                SUMMARY=summary,
                num_warps=1,
                num_stages=1,
            )

        if chunks.count > 1:
            launch(summary=True)
            _carry(chunks, starts, reach, A, None, reverse=False)
        launch(summary=False)
    return y, last, saved


@outside_autocast
def selective_scan_backward(
    dy: Tensor,
    dlast: Tensor | None,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor | None, ...]:
    """As `parallel.selective_scan_backward`. Programs write their parts of sums side by side; torch adds them up."""
    given = B.dtype, C.dtype
    dy, u, delta, A, B, C, D, z, delta_bias = _contiguous(dy, u, delta, A, *_alike(B, C), D, z, delta_bias)
    batch, channels, _ = u.shape
    groups, d_state = B.shape[1], A.shape[1]
    split = _split(u, delta, z, groups)
    with torch.cuda.device_of(u):
        by_state = A.mT.contiguous()
        chunks, ends, reach = _cut(u, groups, d_state, split)
        # A copy whatever its shape, because the kernel uses it up.
        initial = None if dlast is None else dlast.mT.to(torch.float32, copy=True).contiguous()
        if chunks.count == 1:
            ends = _zeros(u, batch, d_state, channels) if initial is None else initial
        du, ddelta, dz = torch.empty_like(u), torch.empty_like(delta), None if z is None else torch.empty_like(z)
        dB, dC = (torch.empty(split.blocks, *B.shape, dtype=torch.float32, device=u.device) for _ in range(2))
        dA = _zeros(u, batch, chunks.count, d_state, channels)
        # A class with fewer tiles leaves its last chunk out.
        fill = torch.zeros if chunks.count > 1 else torch.empty
        dD, dbias = (fill(batch, chunks.count, channels, dtype=torch.float32, device=u.device) for _ in range(2))

        def launch(summary: bool) -> None:
            scan_1d_backward[_grid(u, groups, chunks, split)](
                dy,
                u,
                delta,
                by_state,
                B,
                C,
                u if D is None else D,
                u if z is None else z,
                u if delta_bias is None else delta_bias,
                saved,
                du,
                ddelta,
                dA,
                dB,
                dC,
                dD,
                du if dz is None else dz,
                dbias,
                ends,
                reach,
                *_sizes(u, groups, chunks),
                **_constants(u, delta, A, B, C, D, z, delta_bias, delta_softplus, split),
                SUMMARY=summary,
                PRECISION=matrix_precision(u, delta, B, C),
                num_warps=1,
                num_stages=1,
            )

        if chunks.count > 1:
            launch(summary=True)
            _carry(chunks, ends, reach, A, initial, reverse=True)
        launch(summary=False)
        return (
            du,
            ddelta,
            dA.sum((0, 1)).mT.to(A.dtype),
            dB.sum(0).to(given[0]),
            dC.sum(0).to(given[1]),
            None if D is None else dD.sum((0, 1)).to(D.dtype),
            dz,
            None if delta_bias is None else dbias.sum((0, 1)).to(delta_bias.dtype),
        )


def saved_numel_1d(shape: torch.Size, d_state: int) -> int:
    """The number of states that `selective_scan` saves, at most: one in 16 steps."""
    batch, channels, length = shape
    return batch * channels * d_state * length // STEPS


def _saved(u: Tensor, split: "Split", d_state: int) -> int:
    batch, channels, length = u.shape
    slots = sum(-(-(length + kind * length % split.steps) // STEPS) - 1 for kind in range(split.classes))
    return batch * slots * d_state * (channels // split.classes)


class Split(NamedTuple):
    """How the channels of a group are dealt out to programs.

    Attributes:
        classes: of channels whose rows begin at the same place of a sector, every `classes`-th; a program has one.
        steps: of a sector.
        blocks: programs of a group.
    """

    classes: int
    steps: int
    blocks: int


def _split(u: Tensor, delta: Tensor, z: Tensor | None, groups: int) -> Split:
    width = u.shape[1] // groups
    steps = SECTOR // u.element_size()
    classes = steps // math.gcd(steps, u.shape[2])
    alike = len({t.element_size() for t in (u, delta, z) if t is not None}) == 1
    enough = 2 * (width // classes) >= CHANNELS  # half of a warp's threads have a channel
    if not alike or not enough or width % classes or steps // classes < ALIKE_AT_LEAST:
        classes = 1
    return Split(classes, steps, classes * triton.cdiv(width // classes, CHANNELS))


def _alike(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """B and C in one dtype, since a load reads both."""
    return (B, C) if B.dtype == C.dtype else (B.float(), C.float())


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if t is None else t.contiguous() for t in tensors]


def _grid(u: Tensor, groups: int, chunks: Chunks, split: Split) -> tuple[int]:
    return (u.shape[0] * groups * chunks.count * split.blocks,)


def _cut(u: Tensor, groups: int, d_state: int, split: Split) -> tuple[Chunks, Tensor, Tensor]:
    """The chunks, and where there are several the states with which they begin and their sums of Δ."""
    batch, channels, length = u.shape
    most = length + split.steps - split.steps // split.classes
    chunks = cut(*_grid(u, groups, Chunks(1, 0), split), -(-most // STEPS), multiprocessors(u.device))
    if chunks.count == 1:
        none = u.new_empty(0, dtype=torch.float32)
        return chunks, none, none
    # A class with fewer tiles leaves its last chunk out.
    return chunks, _zeros(u, batch, chunks.count, d_state, channels), _zeros(u, batch, chunks.count, channels)


def _carry(chunks: Chunks, values: Tensor, reach: Tensor, A: Tensor, initial: Tensor | None, reverse: bool) -> None:
    batch, _, d_state, channels = values.shape
    carry_chunks[(batch, triton.cdiv(channels, CHANNELS), d_state)](
        values,
        reach,
        (A.float() * LOG2_E.value).mT.contiguous(),
        values if initial is None else initial,
        1,
        chunks.count,
        channels,
        d_state,
        C=CHANNELS,
        HAS_INITIAL=initial is not None,
        REVERSE=reverse,
        num_warps=1,
    )


def _sizes(u: Tensor, groups: int, chunks: Chunks) -> tuple[int, ...]:
    return u.shape[2], u.shape[0], groups, chunks.count, chunks.tiles


def _constants(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    split: Split,
) -> dict[str, int | bool]:
    shifted = split.classes > 1
    vector = VECTORS[0] if shifted else next((v for v in VECTORS if u.shape[2] % v == 0), VECTORS[0])
    return {
        "D": u.shape[1] // B.shape[1],
        "N": A.shape[1],
        "C": CHANNELS,
        "T": STEPS,
        "V": vector,
        "HAS_D": D is not None,
        "HAS_Z": z is not None,
        "HAS_BIAS": delta_bias is not None,
        "SOFTPLUS": delta_softplus,
        "ALIGNED": u.shape[2] % vector == 0,
        "CLASSES": split.classes,
        "PER": split.steps,
        "FULL": u.shape[2] % STEPS == 0,
        "EXACT": torch.float32 in (u.dtype, delta.dtype, B.dtype, C.dtype),
    }


def _zeros(u: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32, device=u.device)
