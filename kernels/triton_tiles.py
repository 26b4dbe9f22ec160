"""What the Triton kernels share: a tile of T steps, and the recurrence through it.

A program walks its sequence tile after tile; a thread holds one channel, and the T steps of a tile in registers as a
tuple of T vectors over channels. So the recurrence is written as it is defined, step after step, and needs nothing
from other threads. Everything else about a step (softplus, decay, loads of the tile after) is independent of the steps
beside it, which is what keeps a GPU busy.

States, exponentials and sums are float32. Exponentials are powers of two, which a GPU has in hardware; A carries the
factor log2(e) for it.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

STEPS = 16
"""Steps of a tile: the least that the matrix units take, and one state in 16 steps is what a backward needs saved."""

CHANNELS = 32
"""Channels of a program: one a thread of its one warp."""

PROGRAMS_WANTED = 8
"""Programs that a multiprocessor should have at least: where there are fewer, sequences are cut into chunks."""

CHUNK_TILES = 4
"""Fewest tiles of a chunk."""

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def unstack(x, C: tl.constexpr, T: tl.constexpr):
    """(C, T) as a tuple of T vectors (C,), by splitting off the lowest bit of the step, then the next."""
    parts = (x.reshape(C, T),)
    for level in tl.static_range(T.bit_length() - 1):
        even = ()
        odd = ()
        for part in tl.static_range(2**level):
            lo, hi = parts[part].reshape(C, T // 2 ** (level + 1), 2).split()
            even = even + (lo,)
            odd = odd + (hi,)
        parts = even + odd
    columns = ()
    for t in tl.static_range(T):
        columns = columns + (parts[t].reshape(C),)
    return columns


@triton.jit
def stack(columns, C: tl.constexpr, T: tl.constexpr):
    """The inverse of `unstack`."""
    parts = ()
    for t in tl.static_range(T):
        parts = parts + (columns[t].reshape(C, 1),)
    for level in tl.static_range(T.bit_length() - 1):
        joined = ()
        for part in tl.static_range(T // 2 ** (level + 1)):
            pair = tl.join(parts[part], parts[part + T // 2 ** (level + 1)])
            joined = joined + (pair.reshape(C, 2 ** (level + 1)),)
        parts = joined
    return parts[0]


@triton.jit
def softplus(x, EXACT: tl.constexpr):
    """log(1 + exp(x)), with relative accuracy however small it gets.

    max(x, 0) + log1p(e) with e = exp(-|x|) in (0, 1], where log1p(e) / e is a polynomial (of least relative error on
    that interval: computed in float32 3e-7, or 9e-6 where inputs are 16 bits wide). To that comes the rounding of
    x * log2(e), which makes an error of 6e-8 |x| in e. One exponential, no logarithm, whose hardware version is only
    absolutely accurate near 1.
    """
    e = tl.exp2(tl.abs(x) * -LOG2_E)
    if EXACT:
        p = e * -0.00853912274 + 0.044089329
        p = p * e - 0.10768129
        p = p * e + 0.177452117
        p = p * e - 0.244954519
        p = p * e + 0.332754778
        p = p * e - 0.499974052
        p = p * e + 0.999999806
    else:
        p = e * -0.0238689227 + 0.101221706
        p = p * e - 0.210048168
        p = p * e + 0.325206481
        p = p * e - 0.499361336
        p = p * e + 0.999991597
    return e * p + tl.maximum(x, 0.0)


@triton.jit
def sigmoid(x, step):
    """The derivative of step = softplus(x): exp(x - softplus(x)), accurate at both ends."""
    return tl.exp2((x - step) * LOG2_E)


@triton.jit
def finite_rate(A2):
    """A * log2(e), at least -3e38: what is no step has Δ = 0, and multiplies it."""
    return tl.maximum(A2, -3e38, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def walk_forward(steps, inputs, Bs, Cs, A2, h, ys, T: tl.constexpr):
    """One state through a tile: h = exp(Δ A) h + Δ u B, y += C h. Returns (ys, h)."""
    out = ()
    for t in tl.static_range(T):
        h = tl.exp2(steps[t] * A2) * h + inputs[t] * Bs[t].to(tl.float32)
        out = out + (ys[t] + Cs[t].to(tl.float32) * h,)
    return out, h


@triton.jit
def walk_backward(
    steps, inputs, Bs, Cs, dys, A2, h, s, ys, dinputs, dsteps, lead, rest, FULL: tl.constexpr, T: tl.constexpr
):
    """One state through a tile and back.

    Args, of T vectors each: steps Δ, inputs Δ u, Bs, Cs, dys. h is the state before the tile, s the adjoint
    exp(Δ A) dh of the step behind it. The sequence has the steps from `lead` on and before `rest`, unless all are FULL;
    at the others Δ, B, C and dy are zero. Added to: ys, C h; dinputs, the gradients of Δ u; dsteps, those of Δ inside
    the exponent.

    Returns:
        (s before the tile, ys, dinputs, dsteps, gradient of A summed over the tile, and T vectors each whose sums
        over channels are the gradients of B and of C)
    """
    decays = ()
    kept = ()  # exp(Δ A) h of the step before
    into_C = ()
    out = ()
    for t in tl.static_range(T):
        a = tl.exp2(steps[t] * A2)
        carried = a * h
        h = carried + inputs[t] * Bs[t].to(tl.float32)
        decays = decays + (a,)
        kept = kept + (carried,)
        into_C = into_C + (dys[t] * h,)
        out = out + (ys[t] + Cs[t].to(tl.float32) * h,)
    A = A2 * LN_2
    dA = tl.zeros_like(A2)
    into_B = ()
    dus = ()
    dts = ()
    for t in tl.static_range(T - 1, -1, -1):
        g = Cs[t].to(tl.float32) * dys[t] + s
        into_B = (g * inputs[t],) + into_B
        dus = (dinputs[t] + g * Bs[t].to(tl.float32),) + dus
        through = g * kept[t]
        if not FULL:
            through = tl.where((t >= lead) & (t < rest), through, 0.0)  # outside kept may be NaN, and 0 times it too
        dts = (dsteps[t] + A * through,) + dts
        dA += steps[t] * through
        s = decays[t] * g
    return s, out, dus, dts, dA, into_B, into_C


@triton.jit
def sum_channels(columns, sums, column, C: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr):
    """Puts into one column of `sums` (T, 8) what T vectors (C,) add up to, each over its channels.

    The matrix units add faster than shuffles. Their eight columns are all the same.
    """
    ones = tl.full((C, 8), 1.0, tl.float32)
    found = tl.dot(stack(columns, C, T).trans(), ones, input_precision=PRECISION)
    return tl.where((tl.arange(0, 8) == column)[None, :], found, sums)


@triton.jit
def state_sectors(saved_ptr, stride, N: tl.constexpr, C: tl.constexpr):
    """Pointers to the 32-byte sectors of C channels' N states, rows of `stride` apart; some stand twice."""
    SECTORS: tl.constexpr = C // 8
    at = tl.arange(0, triton.next_power_of_2(N) * SECTORS)
    return saved_ptr + (tl.minimum(at // SECTORS, N - 1) * stride + at % SECTORS * 8)


@triton.jit
def fetch(sectors):
    """Brings sectors to the L2 cache, and waits for nothing.

    Saved states come from further away than the work on one state hides.
    """
    if not INTERPRETED:
        asm: tl.constexpr = "prefetch.global.L2 [$1]; mov.b32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r,l", [sectors.to(tl.int64)], tl.int32, is_pure=False, pack=1)


@triton.jit
def widen(x):
    """In float32, in a way that the compiler leaves where it stands.

    Otherwise it exchanges 16-bit values between threads first, and every thread then widens all of them.
    """
    if INTERPRETED:
        wide = x.to(tl.float32)
    elif x.dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise("cvt.f32.bf16 $0, $1;", "=f,h", [x], tl.float32, is_pure=True, pack=1)
    elif x.dtype == tl.float16:
        wide = tl.inline_asm_elementwise("cvt.f32.f16 $0, $1;", "=f,h", [x], tl.float32, is_pure=True, pack=1)
    else:
        wide = x
    return wide


@triton.jit
def to_tf32(x):
    """Rounds to the nearest value of tf32, where the matrix units would cut off."""
    if not INTERPRETED:
        x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    return x


@triton.jit
def spread(tile, T: tl.constexpr):
    """B and C of T steps, (T, 2), which lie among threads, for all threads: twice T vectors (1,) in float32."""
    values = unstack(widen(tile).trans().reshape(1, 2 * T), 1, 2 * T)
    Bs = ()
    Cs = ()
    for t in tl.static_range(T):
        Bs = Bs + (values[t],)
        Cs = Cs + (values[T + t],)
    return Bs, Cs


@triton.jit(do_not_specialize=["sequences", "chunks", "D", "N"])
def carry_chunks(
    values_ptr,
    reach_ptr,
    A_ptr,
    initial_ptr,
    sequences,
    chunks,
    D,
    N,
    C: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """Turns what each chunk makes of a zero state into the state with which it begins, one chunk after another.

    The state behind chunk c is exp(A reach[c]) times the one before it, plus what c makes of zero. For adjoints it is
    REVERSE, from the last chunk to the first. Grid: (batch * sequences, blocks of channels, N).

    Args:
        values_ptr: (batch * sequences, chunks, N, D), replaced.
        reach_ptr: each chunk's sum of Δ, (batch * sequences, chunks, D).
        A_ptr: A * log2(e) of each sequence, (sequences, N, D).
        initial_ptr: the state with which the first one begins, (batch * sequences, N, D), or zero.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * C + tl.arange(0, C)
    n = tl.program_id(2)
    mask = d < D
    A2 = finite_rate(tl.load(A_ptr + (row % sequences * N + n) * D + d, mask=mask, other=0.0))
    value = tl.zeros((C,), tl.float32)
    if HAS_INITIAL:
        value = tl.load(initial_ptr + (row * N + n) * D + d, mask=mask, other=0.0)
    for step in range(0, chunks):
        c = row * chunks + (chunks - 1 - step if REVERSE else step)
        at = values_ptr + (c * N + n) * D + d
        made = tl.load(at, mask=mask, other=0.0)
        tl.store(at, value, mask=mask)
        decay = tl.exp2(A2 * tl.load(reach_ptr + c * D + d, mask=mask, other=0.0))
        value = tl.where(value == 0.0, made, made + decay * value)  # a decay that grows may be infinite


def matrix_precision(*inputs: Tensor) -> str:
    """How the backward's matrix units multiply: as float32, or with bf16 inputs as tf32.

    Of an operand that is float32 tf32 cuts off all but 10 bits, 2^-11 on average. Where sums of such products leave in
    bf16 (B's, C's and delta's low-rank form's gradients), that is lost in the output's rounding; where they leave in
    float32 (delta's projection), operands are rounded first (`to_tf32`), so that errors cancel in the sum. The 10 bits
    are all that fp16 has, so that fp16 is multiplied as float32.
    """
    narrow = {t.dtype for t in inputs} == {torch.bfloat16}
    return "tf32" if narrow else "tf32x3"


class Chunks(NamedTuple):
    """How long sequences are cut where there are too few of them to fill a GPU.

    Attributes:
        count: chunks of the longest sequence.
        tiles: tiles of a chunk.
    """

    count: int
    tiles: int


def cut(programs: int, tiles: int, multiprocessors: int) -> Chunks:
    """Cuts sequences of so many tiles that so many programs would walk at once.

    A cut costs a second walk over all chunks, so it has to bring several times as many programs. It depends on the GPU,
    and so do the last bits of what is cut.
    """
    count = min(tiles // CHUNK_TILES, -(-PROGRAMS_WANTED * multiprocessors // programs))
    if count < 3:
        return Chunks(1, tiles)
    each = -(-tiles // count)
    return Chunks(-(-tiles // each), each)


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 of a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
