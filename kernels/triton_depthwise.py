"""Depthwise convolutions of channels-last maps in Triton, with the activation that follows them.

A warp is a block of channels of a strip: P neighbouring columns of the map, which it walks down. Its lanes hold
channels, so that each finds everything that its channels need in registers of its own, as tuples over columns of values
(G, C), for the G strips of a program and C channels: the rows that are still wanted, and sums. A row is read once and
asked for before the row before it is worked on. Columns that strips share, and the kernel's weights, which every row
needs again, come from the L1 cache.

Products and sums are float32. What an activation is applied to is kept for the backward at stride 2, where it is a
quarter of the map; at stride 1 the backward convolves again, since it reads the map anyway, and to write and read
another one takes longer.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .triton_maps import pixel_stride, silu, silu_gate, silu_slope, zeros
from .triton_tiles import LOG2_E, multiprocessors

STRIPS = 4
"""G, strips of a program: one a warp."""

COLUMNS = 4
"""P, columns of a strip."""

CHANNELS = 64
"""Channels of a program: two a lane, which reads and writes them at once."""

REGISTERS, REGISTERS_FOR_SUMS = 128, 168
"""Of a thread at most, so that four or three programs run on a multiprocessor at once."""

CHUNK_ROWS = 8
"""Fewest rows that a strip is cut to: what is read before its first row must be little beside them."""

PROGRAMS_WANTED = 8
"""Programs that a multiprocessor should have at least: where there are fewer, strips are cut."""

# A new size of map or batch is a new value of these, and compiles nothing.
_SIZES = ["H", "W", "out_H", "out_W", "strips", "across", "chunk_rows", "image_stride", "row_stride"]


@triton.jit
def gelu_gate(z):
    """Φ(z), by which GELU multiplies.

    log2 Φ(-a) is a polynomial, right to 2e-7 where Φ(-a) is above 3e-3 and less exact as it vanishes, so that Φ is
    right to 2e-7 everywhere.
    """
    a = tl.abs(z)
    q = a * -1.31447863e-06 + 2.01552737e-05
    q = q * a - 8.91127166e-05
    q = q * a - 0.000388005586
    q = q * a + 0.0074175177
    q = q * a - 0.0527632887
    q = q * a - 0.459110648
    q = q * a - 1.15111862
    q = q * a - 0.999999694
    tail = tl.exp2(q)
    return tl.where(z > 0, 1.0 - tail, tail)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """The activation of z."""
    if ACTIVATION == "silu":
        z = silu(z)
    if ACTIVATION == "gelu":
        z = z * gelu_gate(z)
    return z


@triton.jit
def through_activation(dy, z, ACTIVATION: tl.constexpr):
    """The gradient of z from that of its activation."""
    if ACTIVATION == "silu":
        dy = dy * silu_slope(z, silu_gate(z))
    if ACTIVATION == "gelu":
        bell = tl.exp2(z * z * (-0.5 * LOG2_E)) * 0.3989422804
        dy = dy * (gelu_gate(z) + z * bell)
    return dy


@triton.jit
def load_row(row_ptr, first, width, mask, PIXEL: tl.constexpr, COUNT: tl.constexpr):
    """COUNT neighbouring columns of a row, from the column `first` (G,) on, each (G, C); zeros where the row ends."""
    found = ()
    for j in tl.static_range(COUNT):
        inside = (first + j).to(tl.uint32, bitcast=True) < width.to(tl.uint32, bitcast=True)  # and not below 0
        found = found + (tl.load(row_ptr + j * PIXEL, mask=inside[:, None] & mask, other=0.0),)
    return found


@triton.jit
def store_row(row_ptr, first, width, columns, mask, C: tl.constexpr, COUNT: tl.constexpr):
    """The inverse of `load_row`."""
    for j in tl.static_range(COUNT):
        value = columns[j].to(row_ptr.dtype.element_ty)
        tl.store(row_ptr + j * C, value, mask=(first + j < width)[:, None] & mask)


@triton.jit
def widen(columns, COUNT: tl.constexpr):
    """A tuple's values in float32."""
    found = ()
    for j in tl.static_range(COUNT):
        found = found + (columns[j].to(tl.float32),)
    return found


@triton.jit
def load_taps(weight_ptr, DOWN: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, RESIDUAL: tl.constexpr):
    """A row of the kernel, K weights (G, C). With RESIDUAL the one in the middle passes its input on as well."""
    found = ()
    for j in tl.static_range(K):
        weight = tl.load(weight_ptr + (DOWN * K + j) * STRIDE)
        if RESIDUAL:
            if DOWN == K // 2 and j == K // 2:
                weight += 1.0
        found = found + (weight,)
    return found


@triton.jit
def slice_of(values, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT of a tuple's values."""
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (values[FIRST + k],)
    return found


@triton.jit
def place(strips, across, rows, chunk_rows, C: tl.constexpr, G: tl.constexpr, BLOCK: tl.constexpr):
    """Where a program works. Programs are numbered by channel block, then by chunk of rows, then by strips.

    Returns:
        (channels (G, BLOCK); which of them there are; images (G, 1), int64; numbers of the strips in their images,
        (G,); first row; row behind the last)
    """
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    chunks = tl.cdiv(rows, chunk_rows)
    pid = tl.program_id(0)
    c = (pid % blocks * BLOCK + tl.arange(0, BLOCK))[None, :] + tl.zeros((G, BLOCK), tl.int32)
    first = pid // blocks % chunks * chunk_rows
    strip = pid // blocks // chunks * G + tl.arange(0, G)
    mask = (c < C) & (strip < strips)[:, None]
    return c, mask, (strip // across).to(tl.int64)[:, None], strip % across, first, tl.minimum(first + chunk_rows, rows)


@triton.jit(do_not_specialize=_SIZES)
def convolve(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    pre_ptr,
    H,
    W,
    out_H,
    out_W,
    strips,
    across,
    chunk_rows,
    image_stride,
    row_stride,
    PIXEL: tl.constexpr,
    ALIGN: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
):
    """y, and with KEEP what the activation was applied to.

    A row of x is added to the output rows that it reaches, LIVE of them, as soon as it is read; S rows complete one.

    Args:
        x_ptr: (B, H, W, C); pixels lie PIXEL elements apart, rows row_stride, images image_stride, multiples of ALIGN.
        weight_ptr, bias_ptr: float32, (K * K, channels) and (channels,), channels filled up to whole blocks.
        y_ptr, pre_ptr: (B, out_H, out_W, C).
        strips: of all images; across: of one.
        chunk_rows: rows of the output that a program makes.
    """
    PAD: tl.constexpr = K // 2
    LIVE: tl.constexpr = (K + S - 1) // S
    COLUMNS: tl.constexpr = (P - 1) * S + K
    FILLED: tl.constexpr = (C + BLOCK - 1) // BLOCK * BLOCK
    c, mask, b, strip, i0, i1 = place(strips, across, out_H, chunk_rows, C, G, BLOCK)
    row_stride = row_stride // ALIGN * ALIGN  # as they are, but now the compiler knows
    image_stride = image_stride // ALIGN * ALIGN
    w0 = strip * P
    left = w0 * S - PAD
    row = (i0 - LIVE) * S + K - PAD
    x_ptr += b * image_stride + row.to(tl.int64) * row_stride + left.to(tl.int64)[:, None] * PIXEL + c
    at = ((b * out_H + (i0 - LIVE + 1)) * out_W + w0[:, None]) * C + c
    y_ptr += at
    pre_ptr += at
    weight_ptr += c
    bias = tl.load(bias_ptr + c)

    sums = ()
    for _ in tl.static_range(LIVE * P):
        sums = sums + (bias,)
    ahead = load_row(x_ptr, left, tl.where((row >= 0) & (row < H), W, 0), mask, PIXEL, COLUMNS)
    for i in range(i0 - LIVE + 1, i1):
        for s in tl.static_range(S):
            xs = widen(ahead, COLUMNS)
            row += 1
            x_ptr += row_stride
            ahead = load_row(x_ptr, left, tl.where((row >= 0) & (row < H), W, 0), mask, PIXEL, COLUMNS)
            added = ()
            for live in tl.static_range(LIVE):
                if K - S + s - S * live >= 0:
                    taps = load_taps(weight_ptr, K - S + s - S * live, K, FILLED, RESIDUAL)
                for p in tl.static_range(P):
                    value = sums[live * P + p]
                    if K - S + s - S * live >= 0:
                        for j in tl.static_range(K):
                            value += taps[j] * xs[p * S + j]
                    added = added + (value,)
            sums = added
        wanted = tl.where(i >= i0, out_W, 0)
        if KEEP:
            store_row(pre_ptr, w0, wanted, sums, mask, C, P)
        ys = ()
        for p in tl.static_range(P):
            ys = ys + (activate(sums[p], ACTIVATION),)
        store_row(y_ptr, w0, wanted, ys, mask, C, P)
        y_ptr += out_W.to(tl.int64) * C
        pre_ptr += out_W.to(tl.int64) * C
        sums = slice_of(sums, P, (LIVE - 1) * P)
        for _ in tl.static_range(P):
            sums = sums + (bias,)


@triton.jit(do_not_specialize=_SIZES)
def convolve_back(
    g_ptr,
    weight_ptr,
    dx_ptr,
    H,
    W,
    out_H,
    out_W,
    strips,
    across,
    chunk_rows,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """The gradient of x from g, the gradient of what the convolution puts out.

    Every S rows of dx need the same DEEP rows of g, from LOW before the one that lies on them; so it is with columns.
    A strip is P columns of g and S·P of dx.

    Args, beyond those of `convolve`:
        g_ptr: (B, out_H, out_W, C).
        dx_ptr: (B, H, W, C).
        chunk_rows: a program makes S times as many rows of dx.
    """
    PAD: tl.constexpr = K // 2
    LOW: tl.constexpr = PAD // S
    DEEP: tl.constexpr = (PAD + S - 1) // S + LOW + 1
    COLUMNS: tl.constexpr = P + DEEP - 1
    FILLED: tl.constexpr = (C + BLOCK - 1) // BLOCK * BLOCK
    c, mask, b, strip, i0, i1 = place(strips, across, tl.cdiv(H, S), chunk_rows, C, G, BLOCK)
    w0 = strip * P
    left = w0 - LOW
    row = i0 - LOW
    g_ptr += ((b * out_H + row) * out_W + left[:, None]) * C + c
    dx_ptr += ((b * H + i0 * S) * W + w0[:, None] * S) * C + c
    weight_ptr += c

    window = ()
    for _ in tl.static_range(DEEP - 1):
        gs = load_row(g_ptr, left, tl.where((row >= 0) & (row < out_H), out_W, 0), mask, C, COLUMNS)
        window = window + widen(gs, COLUMNS)
        row += 1
        g_ptr += out_W.to(tl.int64) * C
    ahead = load_row(g_ptr, left, tl.where((row >= 0) & (row < out_H), out_W, 0), mask, C, COLUMNS)
    for i in range(i0, i1):
        window = window + widen(ahead, COLUMNS)
        row += 1
        g_ptr += out_W.to(tl.int64) * C
        ahead = load_row(g_ptr, left, tl.where((row >= 0) & (row < out_H), out_W, 0), mask, C, COLUMNS)
        for e in tl.static_range(S):
            dxs = zeros(P * S, G, BLOCK)
            for d in tl.static_range(DEEP):
                if e + PAD + S * (LOW - d) >= 0 and e + PAD + S * (LOW - d) < K:
                    taps = load_taps(weight_ptr, e + PAD + S * (LOW - d), K, FILLED, RESIDUAL)
                    added = ()
                    for q in tl.static_range(P * S):
                        value = dxs[q]
                        for j in tl.static_range(DEEP):
                            if q % S + PAD + S * (LOW - j) >= 0 and q % S + PAD + S * (LOW - j) < K:
                                value += taps[q % S + PAD + S * (LOW - j)] * window[d * COLUMNS + q // S + j]
                        added = added + (value,)
                    dxs = added
            store_row(dx_ptr, w0 * S, tl.where(i * S + e < H, W, 0), dxs, mask, C, P * S)
            dx_ptr += W.to(tl.int64) * C
        window = slice_of(window, COLUMNS, (DEEP - 1) * COLUMNS)


@triton.jit
def add_products(
    sums,
    gs,
    FIRST_G: tl.constexpr,
    xs,
    FIRST_X: tl.constexpr,
    DOWN: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
):
    """The weights' gradients, with what a row of g adds to a row of them by the row of x that lies under it."""
    found = ()
    for k in tl.static_range(K * K + 1):
        value = sums[k]
        if k // K == DOWN:
            for p in tl.static_range(P):
                value += gs[FIRST_G + p] * xs[FIRST_X + p * S + k % K]
        found = found + (value,)
    return found


@triton.jit
def add_bias(sums, gs, K: tl.constexpr, P: tl.constexpr):
    """The same of the bias' gradient, which stands behind the weights'."""
    value = sums[K * K]
    for p in tl.static_range(P):
        value += gs[p]
    return slice_of(sums, 0, K * K) + (value,)


@triton.jit
def store_parts(part_ptr, sums, C: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """A program's part of the gradients of weights and bias, summed over its strips."""
    blocks: tl.constexpr = (C + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    block = pid % blocks * BLOCK + tl.arange(0, BLOCK)
    part_ptr += (pid // blocks).to(tl.int64) * COUNT * C + block
    for k in tl.static_range(COUNT):
        tl.store(part_ptr + k * C, tl.sum(sums[k], axis=0), mask=block < C)


@triton.jit(do_not_specialize=_SIZES)
def sum_weights(
    x_ptr,
    dy_ptr,
    pre_ptr,
    g_ptr,
    part_ptr,
    H,
    W,
    out_H,
    out_W,
    strips,
    across,
    chunk_rows,
    image_stride,
    row_stride,
    PIXEL: tl.constexpr,
    ALIGN: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """g, and the gradients of weights and bias, where what the activation was applied to is known, or there is none.

    A row of x meets the rows of g that it reached, LIVE of them.

    Args, beyond those of `convolve`:
        dy_ptr, pre_ptr, g_ptr: (B, out_H, out_W, C); without an activation g is dy and not written.
        part_ptr: float32, (programs of a channel block, K * K + 1, C), each program's part of the sums, bias last.
    """
    PAD: tl.constexpr = K // 2
    LIVE: tl.constexpr = (K + S - 1) // S
    COLUMNS: tl.constexpr = (P - 1) * S + K
    c, mask, b, strip, i0, i1 = place(strips, across, out_H, chunk_rows, C, G, BLOCK)
    row_stride = row_stride // ALIGN * ALIGN  # as they are, but now the compiler knows
    image_stride = image_stride // ALIGN * ALIGN
    w0 = strip * P
    left = w0 * S - PAD
    row = (i0 - LIVE) * S + K - PAD
    x_ptr += b * image_stride + row.to(tl.int64) * row_stride + left.to(tl.int64)[:, None] * PIXEL + c
    at = ((b * out_H + i0) * out_W + w0[:, None]) * C + c
    dy_ptr += at
    pre_ptr += at
    g_ptr += at

    sums = zeros(K * K + 1, G, BLOCK)
    gs = zeros((LIVE - 1) * P, G, BLOCK)
    ahead = load_row(x_ptr, left, tl.where((row >= 0) & (row < H), W, 0), mask, PIXEL, COLUMNS)
    dys_ahead = load_row(dy_ptr, w0, out_W, mask, C, P)
    if ACTIVATION != "none":
        pres_ahead = load_row(pre_ptr, w0, out_W, mask, C, P)
    for i in range(i0, i1 + LIVE - 1):
        dys = widen(dys_ahead, P)
        wanted = tl.where(i < i1, out_W, 0)
        wanted_ahead = tl.where(i + 1 < i1, out_W, 0)
        dy_ptr += out_W.to(tl.int64) * C
        dys_ahead = load_row(dy_ptr, w0, wanted_ahead, mask, C, P)
        if ACTIVATION != "none":
            pres = widen(pres_ahead, P)
            pre_ptr += out_W.to(tl.int64) * C
            pres_ahead = load_row(pre_ptr, w0, wanted_ahead, mask, C, P)
            gated = ()
            for p in tl.static_range(P):
                gated = gated + (through_activation(dys[p], pres[p], ACTIVATION),)
            dys = gated
            store_row(g_ptr, w0, wanted, dys, mask, C, P)
            g_ptr += out_W.to(tl.int64) * C
        gs = gs + dys
        sums = add_bias(sums, dys, K, P)
        for s in tl.static_range(S):
            xs = widen(ahead, COLUMNS)
            row += 1
            x_ptr += row_stride
            ahead = load_row(x_ptr, left, tl.where((row >= 0) & (row < H), W, 0), mask, PIXEL, COLUMNS)
            for live in tl.static_range(LIVE):
                if K - S + s - S * live >= 0:
                    sums = add_products(sums, gs, live * P, xs, 0, K - S + s - S * live, K, S, P)
        gs = slice_of(gs, P, (LIVE - 1) * P)
    store_parts(part_ptr, sums, C, BLOCK, K * K + 1)


@triton.jit(do_not_specialize=_SIZES)
def convolve_and_sum_weights(
    x_ptr,
    weight_ptr,
    bias_ptr,
    dy_ptr,
    g_ptr,
    part_ptr,
    H,
    W,
    out_H,
    out_W,
    strips,
    across,
    chunk_rows,
    image_stride,
    row_stride,
    PIXEL: tl.constexpr,
    ALIGN: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """The same at stride 1, where what the activation was applied to is made again, from a window of K rows of x.

    Args: those of `convolve` and `sum_weights`.
    """
    PAD: tl.constexpr = K // 2
    COLUMNS: tl.constexpr = P - 1 + K
    FILLED: tl.constexpr = (C + BLOCK - 1) // BLOCK * BLOCK
    c, mask, b, strip, i0, i1 = place(strips, across, out_H, chunk_rows, C, G, BLOCK)
    row_stride = row_stride // ALIGN * ALIGN  # as they are, but now the compiler knows
    image_stride = image_stride // ALIGN * ALIGN
    w0 = strip * P
    left = w0 - PAD
    row = i0 - PAD
    x_ptr += b * image_stride + row.to(tl.int64) * row_stride + left.to(tl.int64)[:, None] * PIXEL + c
    at = ((b * out_H + i0) * out_W + w0[:, None]) * C + c
    dy_ptr += at
    g_ptr += at
    weight_ptr += c
    bias = tl.load(bias_ptr + c)

    sums = zeros(K * K + 1, G, BLOCK)
    window = ()
    for _ in tl.static_range(K - 1):
        xs = load_row(x_ptr, left, tl.where((row >= 0) & (row < H), W, 0), mask, PIXEL, COLUMNS)
        window = window + widen(xs, COLUMNS)
        row += 1
        x_ptr += row_stride
    ahead = load_row(x_ptr, left, tl.where((row >= 0) & (row < H), W, 0), mask, PIXEL, COLUMNS)
    dys_ahead = load_row(dy_ptr, w0, out_W, mask, C, P)
    for i in range(i0, i1):
        dys = widen(dys_ahead, P)
        dy_ptr += out_W.to(tl.int64) * C
        dys_ahead = load_row(dy_ptr, w0, tl.where(i + 1 < i1, out_W, 0), mask, C, P)
        window = window + widen(ahead, COLUMNS)
        row += 1
        x_ptr += row_stride
        ahead = load_row(x_ptr, left, tl.where((row >= 0) & (row < H), W, 0), mask, PIXEL, COLUMNS)
        pres = ()
        for _ in tl.static_range(P):
            pres = pres + (bias,)
        for down in tl.static_range(K):
            taps = load_taps(weight_ptr, down, K, FILLED, RESIDUAL)
            added = ()
            for p in tl.static_range(P):
                value = pres[p]
                for j in tl.static_range(K):
                    value += taps[j] * window[down * COLUMNS + p + j]
                added = added + (value,)
            pres = added
        gs = ()
        for p in tl.static_range(P):
            gs = gs + (through_activation(dys[p], pres[p], ACTIVATION),)
        store_row(g_ptr, w0, out_W, gs, mask, C, P)
        g_ptr += out_W.to(tl.int64) * C
        for down in tl.static_range(K):
            sums = add_products(sums, gs, 0, window, down * COLUMNS, down, K, 1, P)
        sums = add_bias(sums, gs, K, P)
        window = slice_of(window, COLUMNS, (K - 1) * COLUMNS)
    store_parts(part_ptr, sums, C, BLOCK, K * K + 1)


class Split(NamedTuple):
    """How a map's work is spread over programs.

    Attributes:
        programs: of a block of channels.
        blocks: of channels.
        sizes: the kernels' arguments H, W, out_H, out_W, strips, across, chunk_rows.
    """

    programs: int
    blocks: int
    sizes: tuple[int, ...]


def split(shape: torch.Size, stride: int, block: int, multiprocessors: int) -> Split:
    """Spreads a map (B, H, W, C) over programs of `block` channels each.

    It depends on the GPU, and so do the last bits of the weights' gradients.
    """
    batch, height, width, channels = shape
    rows, columns = -(-height // stride), -(-width // stride)
    across, blocks = -(-columns // COLUMNS), -(-channels // block)
    groups = -(-batch * across // STRIPS)
    chunks = max(1, min(rows // CHUNK_ROWS, -(-PROGRAMS_WANTED * multiprocessors // (groups * blocks))))
    chunk_rows = -(-rows // chunks)
    sizes = (height, width, rows, columns, batch * across, across, chunk_rows)
    return Split(groups * -(-rows // chunk_rows), blocks, sizes)


def convolves_again(size: int, stride: int) -> bool:
    """Whether the backward makes again what the activation was applied to, rather than have it kept."""
    return stride == 1 and size <= 3


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, activation: str, residual: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution, with `keep` what its activation was applied to, and weights `in_blocks`, for the backward.

    See `depthwise.depthwise_conv`.
    """
    x = with_channels_last(x)
    work = split(x.shape, stride, CHANNELS, multiprocessors(x.device))
    blocks = in_blocks(weight, bias)
    y = x.new_empty(x.shape[0], *work.sizes[2:4], x.shape[3])
    pre = x.new_empty(y.shape if keep else 0)
    with torch.cuda.device_of(x):
        convolve[(work.programs * work.blocks,)](
            x,
            blocks,
            blocks[-1],
            y,
            pre,
            *work.sizes,
            *x.stride()[:2],
            **layout(x),
            **_constants(x, weight, stride, CHANNELS),
            ACTIVATION=activation,
            RESIDUAL=residual,
            KEEP=keep,
            maxnreg=REGISTERS,
        )
    return y, pre, blocks


def depthwise_conv_backward(
    dy: Tensor,
    pre: Tensor,
    blocks: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int,
    activation: str,
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; `pre` is empty where it was not kept, `blocks` as `in_blocks` makes them.

    Programs write their parts of the sums over a map side by side; torch adds them up.
    """
    x, dy = with_channels_last(x), dy.contiguous()
    size = weight.shape[2]
    again = activation != "none" and convolves_again(size, stride)
    if activation != "none" and not again and pre.numel() == 0:
        pre, _, _ = depthwise_conv(x, weight, bias, stride, "none", residual, False)
    g = dy if activation == "none" else torch.empty_like(dy)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)

    block = CHANNELS if size <= 3 else CHANNELS // 2  # a lane has room for 10 sums of two channels, or 50 of one
    work = split(x.shape, stride, block, multiprocessors(x.device))
    parts = torch.empty(work.programs, size * size + 1, x.shape[3], dtype=torch.float32, device=x.device)
    arguments = (*work.sizes, *x.stride()[:2])
    constants = {**layout(x), **_constants(x, weight, stride, block), "ACTIVATION": activation}
    grid = (work.programs * work.blocks,)
    with torch.cuda.device_of(x):
        if again:
            del constants["S"]
            convolve_and_sum_weights[grid](
                x, blocks, blocks[-1], dy, g, parts, *arguments, **constants, RESIDUAL=residual, maxnreg=REGISTERS
            )
        else:
            sum_weights[grid](x, dy, pre, g, parts, *arguments, **constants, maxnreg=REGISTERS_FOR_SUMS)
        work = split(x.shape, stride, CHANNELS, multiprocessors(x.device))
        convolve_back[(work.programs * work.blocks,)](
            g,
            blocks,
            dx,
            *work.sizes,
            **_constants(x, weight, stride, CHANNELS),
            RESIDUAL=residual,
            maxnreg=REGISTERS,
        )
    sums = parts.sum(0)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    return dx, dweight.copy_(sums[:-1].mT.view(weight.shape)), dbias.copy_(sums[-1])


def with_channels_last(x: Tensor) -> Tensor:
    """The map itself where its channels lie side by side, such as half of another map's; otherwise a copy.

    A map whose columns lie farther apart than its rows is copied, too: how far would depend on its height, and kernels
    are compiled for the distance of neighbouring pixels.
    """
    _, row, pixel, channel = x.stride()
    turned = min(x.shape[1:3]) > 1 and row < pixel
    return x if channel == 1 and not turned else x.contiguous()


def layout(x: Tensor) -> dict[str, int]:
    """What kernels are compiled for of where a map lies: the same for all sizes."""
    pixel = pixel_stride(x)
    batch, height, *_ = x.shape
    image, row, *_ = x.stride()
    even = pixel % 2 == 0 and (batch == 1 or image % 2 == 0) and (height == 1 or row % 2 == 0)
    return {"PIXEL": pixel, "ALIGN": 2 if even else 1}


def in_blocks(weight: Tensor, bias: Tensor) -> Tensor:
    """Weights and below them the bias, (K * K + 1, channels) in float32; zeros fill channels up to whole blocks."""
    channels, size = weight.shape[0], weight.shape[2]
    blocks = torch.cat((weight.reshape(channels, size * size).mT, bias[None])).float()
    filling = -channels % CHANNELS
    return F.pad(blocks, (0, filling)) if filling else blocks


def blocks_shape(weight: torch.Size) -> tuple[int, int]:
    """The shape of that."""
    return weight[2] * weight[3] + 1, -(-weight[0] // CHANNELS) * CHANNELS


def _constants(x: Tensor, weight: Tensor, stride: int, block: int) -> dict[str, int]:
    return {
        "C": x.shape[3],
        "K": weight.shape[2],
        "S": stride,
        "P": COLUMNS,
        "G": STRIPS,
        "BLOCK": block,
        "num_warps": STRIPS,
        "num_stages": 1,
    }
