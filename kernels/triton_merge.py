"""What follows the scans in Triton: the sum of routes, LayerNorm, the half map's upsampling, and the gate.

A program is a chunk of an image's pixels, held as `triton_pixels` says. Where the half map lies on the full one is a
fraction of whole numbers, exact for every size: forward and backward cannot disagree about it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_maps import pixel_stride, silu, silu_gate, silu_slope, zeros
from .triton_pixels import (
    REGISTERS,
    REGISTERS_BACK,
    Split,
    add_scaled,
    channel_block,
    constants,
    load_blocks,
    load_channels,
    over_channels,
    over_pixels,
    scaled,
    split,
    standardise,
    store_blocks,
    store_channels,
)
from .triton_tiles import multiprocessors

GATE_CHANNELS = 64
"""Of a program of the gate, which needs not see a pixel's other channels."""

# A new size of map or batch is a new value of these, and compiles nothing.
_SIZES = ["H", "W", "other_H", "other_W", "tiles"]


@triton.jit
def source(i, size, half):
    """Where row or column i of a full map lies on the half map, centre to centre, in parts of 1 / (2 * size)."""
    return tl.minimum(tl.maximum((2 * i + 1) * half - size, 0), (half - 1) * 2 * size)


@triton.jit
def share(i, u, size, half):
    """How much of row or column u of a half map is in i of the full map."""
    away = tl.abs(source(i, size, half) - 2 * size * u)
    return tl.where(i < size, tl.maximum(2 * size - away, 0).to(tl.float32) / (2 * size).to(tl.float32), 0.0)


@triton.jit
def first_reached(u, size, half):
    """The first row or column of a full map in which there is some of u of the half map; of the next three may be."""
    return tl.where(u > 0, ((2 * u - 1) * size - half) // (2 * half) + 1, 0)


@triton.jit
def add_upsampled(sums, half_ptr, pixel, inside, H, W, half_H, half_W, D: tl.constexpr, BLOCK: tl.constexpr):
    """Adds the half map at `half_ptr`, upsampled, to pixels of the full one: each has four neighbours there."""
    COUNT: tl.constexpr = (D + BLOCK - 1) // BLOCK
    i = pixel // W
    j = pixel - i * W
    top = source(i, H, half_H) // (2 * H)
    left = source(j, W, half_W) // (2 * W)
    found = ()
    weights = ()
    for corner in tl.static_range(4):
        u = tl.minimum(top + corner // 2, half_H - 1)
        v = tl.minimum(left + corner % 2, half_W - 1)
        weight = share(i, u, H, half_H) * share(j, v, W, half_W)
        used = inside & (weight > 0)
        if corner // 2 == 1:  # the last row or column has no other below or right of it
            used = used & (u > top)
        if corner % 2 == 1:
            used = used & (v > left)
        weights = weights + (tl.where(used, weight, 0.0)[:, None],)
        found = found + load_blocks(half_ptr + (u * half_W + v).to(tl.int64)[:, None] * D, used, D, BLOCK)
    for corner in tl.static_range(4):
        sums = add_scaled(sums, found, weights[corner], corner * COUNT, COUNT)
    return sums


@triton.jit
def gather_back(full_ptr, u, v, inside, H, W, half_H, half_W, P: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):
    """The transpose of upsampling: each half pixel from the 4×4 full ones that may have some of it.

    Returns:
        (blocks (P, BLOCK), sum of weights (P, 1))
    """
    COUNT: tl.constexpr = (D + BLOCK - 1) // BLOCK
    weights = tl.zeros((P,), tl.float32)[:, None]
    top = first_reached(u, H, half_H)
    left = first_reached(v, W, half_W)
    for down in tl.static_range(4):
        from_row = share(top + down, u, H, half_H)
        found = ()
        shares = ()
        for right in tl.static_range(4):
            weight = from_row * share(left + right, v, W, half_W)
            at = ((top + down) * W + left + right).to(tl.int64)[:, None] * D
            found = found + load_blocks(full_ptr + at, inside & (weight > 0), D, BLOCK)
            shares = shares + (weight[:, None],)
        for right in tl.static_range(4):
            if down == 0 and right == 0:
                sums = scaled(found, shares[0], 0, COUNT)
            else:
                sums = add_scaled(sums, found, shares[right], right * COUNT, COUNT)
            weights += shares[right]
    return sums, weights


@triton.jit(do_not_specialize=_SIZES)
def normalise(
    y_ptr,
    weight_ptr,
    bias_ptr,
    half_ptr,
    out_ptr,
    sum_ptr,
    part_ptr,
    H,
    W,
    other_H,
    other_W,
    tiles,
    eps,
    D: tl.constexpr,
    K: tl.constexpr,
    EACH: tl.constexpr,
    HALF: tl.constexpr,
    KEEP: tl.constexpr,
    MEANS: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """LayerNorm of the sum of K routes, or with EACH the sum of their LayerNorms; with HALF a half map upsampled added.

    Args:
        y_ptr: routes, (B, K, H, W, D).
        weight_ptr, bias_ptr: (D,).
        half_ptr: (B, other_H, other_W, D).
        out_ptr: (B, H, W, D).
        sum_ptr: with KEEP the sum of routes, (B, H, W, D).
        part_ptr: with MEANS, float32, (B, chunks of an image, D), sums over a chunk's pixels.
        tiles: of a chunk.
    """
    COUNT: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pixels = H * W
    chunks = tl.cdiv(pixels, tiles * P)
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    first = pid % chunks * tiles * P
    y_ptr += b * pixels * K * D
    out_ptr += b * pixels * D
    sum_ptr += b * pixels * D
    half_ptr += b * other_H * other_W * D
    if K > 0:
        weight = load_channels(weight_ptr, D, BLOCK)
        bias = scaled(load_channels(bias_ptr, D, BLOCK), (K if EACH else 1) * 1.0, 0, COUNT)
    sums = zeros(COUNT, P, BLOCK)
    for tile in range(tiles):
        pixel = first + tile * P + tl.arange(0, P)
        inside = pixel < pixels
        at = pixel.to(tl.int64)[:, None] * D
        ys = ()
        for route in tl.static_range(K):
            ys = ys + load_blocks(y_ptr + route * pixels.to(tl.int64) * D + at, inside, D, BLOCK)
        if HALF and K > 0:
            tl.debug_barrier()  # without it ptxas asks for the routes after the neighbours, and waits twice
        if K > 0:
            out = bias
        else:
            out = zeros(COUNT, P, BLOCK)
        if HALF:
            out = add_upsampled(out, half_ptr, pixel, inside, H, W, other_H, other_W, D, BLOCK)
        if K > 0:
            if not EACH:
                total = scaled(ys, 1.0, 0, COUNT)
                for route in tl.static_range(K - 1):
                    total = add_scaled(total, ys, 1.0, (route + 1) * COUNT, COUNT)
                ys = total
                if KEEP:
                    store_blocks(sum_ptr + at, inside, ys, D, BLOCK)
            for route in tl.static_range(K if EACH else 1):
                normal, _ = standardise(ys, route * COUNT, eps, D, BLOCK)
                added = ()
                for k in tl.static_range(COUNT):
                    added = added + (out[k] + normal[k] * weight[k],)
                out = added
        store_blocks(out_ptr + at, inside, out, D, BLOCK)
        if MEANS:
            sums = add_scaled(sums, out, inside.to(tl.float32)[:, None], 0, COUNT)
    if MEANS:
        store_channels(part_ptr + pid.to(tl.int64) * D, over_pixels(sums, COUNT), D, BLOCK)


@triton.jit(do_not_specialize=_SIZES)
def normalise_back(
    dout_ptr,
    mean_ptr,
    y_ptr,
    weight_ptr,
    dy_ptr,
    part_ptr,
    H,
    W,
    other_H,
    other_W,
    tiles,
    eps,
    D: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    MEANS: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of K routes, each with a LayerNorm of its own, and of its weight and bias.

    Args:
        dout_ptr: gradient of their sum, (B, H, W, D), or with HALF of that sum upsampled, (B, other_H, other_W, D).
        mean_ptr: with MEANS, (B, D), what is to be added to the gradient everywhere.
        y_ptr, dy_ptr: (B, K, H, W, D).
        weight_ptr: (D,).
        part_ptr: float32, (programs, 2, D), each program's part of the gradients of weight and bias.
        tiles: of a chunk.
    """
    COUNT: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pixels = H * W
    chunks = tl.cdiv(pixels, tiles * P)
    pid = tl.program_id(0)
    b = (pid // chunks).to(tl.int64)
    first = pid % chunks * tiles * P
    y_ptr += b * pixels * K * D
    dy_ptr += b * pixels * K * D
    dout_ptr += b * (other_H * other_W if HALF else pixels) * D
    weight = load_channels(weight_ptr, D, BLOCK)
    if MEANS:
        mean = load_channels(mean_ptr + b * D, D, BLOCK)
    dweight = zeros(COUNT, P, BLOCK)
    dbias = zeros(COUNT, P, BLOCK)
    means_in = tl.zeros((P,), tl.float32)[:, None]
    for tile in range(tiles):
        pixel = first + tile * P + tl.arange(0, P)
        inside = pixel < pixels
        at = pixel.to(tl.int64)[:, None] * D
        weights = 1.0
        if HALF:
            u = pixel // W
            dout, weights = gather_back(dout_ptr, u, pixel - u * W, inside, other_H, other_W, H, W, P, D, BLOCK)
        else:
            dout = load_blocks(dout_ptr + at, inside, D, BLOCK)
        ys = ()
        for route in tl.static_range(K):
            ys = ys + load_blocks(y_ptr + route * pixels.to(tl.int64) * D + at, inside, D, BLOCK)
        gs = scaled(dout, 1.0, 0, COUNT)
        dbias = add_scaled(dbias, gs, K * 1.0, 0, COUNT)
        if MEANS:
            weights = tl.where(inside[:, None], weights, 0.0)
            gs = add_scaled(gs, mean, weights, 0, COUNT)
            means_in += weights
        level = over_channels(gs, weight, COUNT) * (1.0 / D)
        for route in tl.static_range(K):
            normal, rstd = standardise(ys, route * COUNT, eps, D, BLOCK)
            turned = ()
            added = ()
            for k in tl.static_range(COUNT):
                turned = turned + (gs[k] * normal[k],)
                added = added + (dweight[k] + turned[k],)
            slope = over_channels(turned, weight, COUNT) * (1.0 / D)
            dys = ()
            for k in tl.static_range(COUNT):
                dys = dys + ((gs[k] * weight[k] - level - normal[k] * slope) * rstd,)
            dweight = added
            store_blocks(dy_ptr + route * pixels.to(tl.int64) * D + at, inside, dys, D, BLOCK)
    dbias = over_pixels(dbias, COUNT)
    if MEANS:
        # It is small beside the gradients of pixels: added to each, or to a lane's sum, it would be rounded, and where
        # those are of 16 bits mostly one way.
        dbias = add_scaled(dbias, mean, tl.sum(means_in) * K, 0, COUNT)
    part_ptr += pid.to(tl.int64) * 2 * D
    store_channels(part_ptr, over_pixels(dweight, COUNT), D, BLOCK)
    store_channels(part_ptr + D, dbias, D, BLOCK)


@triton.jit
def gated_pixels(pixels, tiles, D: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """Where a program of the gate works. Programs are numbered by channel block, then by chunk, then by image.

    Returns:
        (channels (BLOCK,), image, first pixel, number of the chunk among all images')
    """
    blocks: tl.constexpr = (D + BLOCK - 1) // BLOCK
    chunks = tl.cdiv(pixels, tiles * P)
    chunk = tl.program_id(0) // blocks
    c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return c, (chunk // chunks).to(tl.int64), chunk % chunks * tiles * P, chunk.to(tl.int64)


@triton.jit(do_not_specialize=["pixels", "tiles"])
def gate_map(
    m_ptr,
    scale_ptr,
    z_ptr,
    out_ptr,
    pixels,
    tiles,
    PIXEL: tl.constexpr,
    D: tl.constexpr,
    SCALED: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A map times a scale of its channels times silu(z).

    Args:
        m_ptr, out_ptr: (B, pixels, D).
        scale_ptr: with SCALED, (B, D).
        z_ptr: (B, pixels, D), pixels PIXEL values apart.
        pixels: of an image.
        tiles: of a chunk.
    """
    c, b, first, _ = gated_pixels(pixels, tiles, D, P, BLOCK)
    m_ptr += b * pixels * D
    out_ptr += b * pixels * D
    z_ptr += b * pixels * PIXEL
    if SCALED:
        scale = tl.load(scale_ptr + b * D + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    for tile in range(tiles):
        pixel = first + tile * P + tl.arange(0, P)
        mask = (pixel < pixels)[:, None] & (c < D)[None, :]
        at = pixel.to(tl.int64)[:, None]
        m = tl.load(m_ptr + at * D + c[None, :], mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at * PIXEL + c[None, :], mask=mask, other=0.0).to(tl.float32)
        out = m * silu(z)
        if SCALED:
            out *= scale
        tl.store(out_ptr + at * D + c[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["pixels", "tiles"])
def gate_back(
    dout_ptr,
    m_ptr,
    scale_ptr,
    z_ptr,
    dm_ptr,
    dz_ptr,
    part_ptr,
    pixels,
    tiles,
    PIXEL: tl.constexpr,
    D: tl.constexpr,
    SCALED: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of m, scale and z.

    Args, beyond those of `gate_map`:
        dout_ptr, dm_ptr, dz_ptr: (B, pixels, D).
        part_ptr: with SCALED, float32, (B, chunks of an image, D), each chunk's part of the gradient of scale.
    """
    c, b, first, chunk = gated_pixels(pixels, tiles, D, P, BLOCK)
    z_ptr += b * pixels * PIXEL
    image = b * pixels * D
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr + b * D + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros((P, BLOCK), tl.float32)
    for tile in range(tiles):
        pixel = first + tile * P + tl.arange(0, P)
        mask = (pixel < pixels)[:, None] & (c < D)[None, :]
        at = pixel.to(tl.int64)[:, None]
        place = image + at * D + c[None, :]
        dout = tl.load(dout_ptr + place, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(m_ptr + place, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at * PIXEL + c[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = silu_gate(z)
        through = dout * m
        if SCALED:
            sums += through * (z * gate)
        dz = through * scale * silu_slope(z, gate)
        tl.store(dm_ptr + place, (dout * scale * (z * gate)).to(dm_ptr.dtype.element_ty), mask=mask)
        tl.store(dz_ptr + place, dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if SCALED:
        tl.store(part_ptr + chunk * D + c, tl.sum(sums, axis=0), mask=c < D)


def merge_routes(
    y_full: Tensor | None,
    y_half: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_half: Tensor | None,
    bias_half: Tensor | None,
    height: int,
    width: int,
    eps: float,
    sum_first: bool,
    means: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The merged map, with `means` its channels' means, and with `keep` the sums of routes that the backward wants.

    See `merge.merge_routes`.
    """
    half = half_sum = None
    like = next(y for y in (y_full, y_half) if y is not None)
    if y_half is not None:
        each = not sum_first
        half, _, half_sum = _normalise(like, y_half, weight_half, bias_half, None, y_half.shape, eps, each, keep)
    shape = (like.shape[0], 0 if y_full is None else y_full.shape[1], height, width, like.shape[4])
    m, parts, full_sum = _normalise(like, y_full, weight, bias, half, shape, eps, False, keep, means)
    found = m.new_empty(0)
    if parts is not None:
        found = torch.div(parts.sum(1), height * width, out=m.new_empty(like.shape[0], like.shape[4]))
    full_sum, half_sum = (m.new_empty(0) if t is None else t for t in (full_sum, half_sum))
    return m, found, full_sum, half_sum


def _normalise(
    like: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    half: Tensor | None,
    shape: tuple[int, ...],
    eps: float,
    each: bool,
    keep: bool,
    means: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A map from routes of `shape` (B, K, H, W, D), the sums over its chunks' pixels, and the routes' sum."""
    batch, routes, height, width, channels = shape
    work = split(batch, height * width, channel_block(channels), multiprocessors(like.device))
    out = like.new_empty(batch, height, width, channels)
    keep = keep and routes > 1 and not each
    kept = like.new_empty(batch, 1, height, width, channels) if keep else None
    parts = torch.empty(batch, work.chunks, channels, dtype=torch.float32, device=like.device) if means else None
    with torch.cuda.device_of(like):
        normalise[(batch * work.chunks,)](
            out if y is None else y.contiguous(),
            out if weight is None else weight.contiguous(),
            out if bias is None else bias.contiguous(),
            out if half is None else half,
            out,
            out if kept is None else kept,
            out if parts is None else parts,
            height,
            width,
            *(half.shape[1:3] if half is not None else (1, 1)),
            work.tiles,
            eps,
            K=routes,
            EACH=each,
            HALF=half is not None,
            KEEP=keep,
            MEANS=means,
            **constants(work, channels),
            maxnreg=REGISTERS,
        )
    return out, parts, kept


def merge_routes_backward(
    dm: Tensor,
    dmeans: Tensor | None,
    full: Tensor | None,
    half: Tensor | None,
    weight: Tensor | None,
    weight_half: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """The gradients of the full routes and of their LayerNorm's weight and bias, then the same of the half routes.

    Args:
        dm: (B, H, W, D).
        dmeans: (B, D).
        full: the routes that were normalised, (B, 1, H, W, D): one, or the sum of more.
        half: likewise, (B, K, h, w, D), each of K with a LayerNorm of its own.
        weight: (D,), as `weight_half`.
        eps: LayerNorm's.

    Returns:
        For each branch that there is, gradients in the shape of `full` or `half`, and (2, D) in float32.
    """
    dm = dm.contiguous()
    if dmeans is not None:
        dmeans = dmeans.float().contiguous() / (dm.shape[1] * dm.shape[2])  # too little for fp16
    found: list[Tensor] = []
    for y, scale, upsampled in ((full, weight, False), (half, weight_half, True)):
        if y is not None and scale is not None:
            y = y.contiguous()
            batch, routes, height, width, channels = y.shape
            work = split(batch, height * width, channel_block(channels), multiprocessors(y.device))
            dy = y.new_empty(y.shape)
            parts = torch.empty(batch * work.chunks, 2, channels, dtype=torch.float32, device=y.device)
            with torch.cuda.device_of(y):
                normalise_back[(batch * work.chunks,)](
                    dm,
                    dm if dmeans is None else dmeans,
                    y,
                    scale.contiguous(),
                    dy,
                    parts,
                    height,
                    width,
                    *dm.shape[1:3],
                    work.tiles,
                    eps,
                    K=routes,
                    HALF=upsampled,
                    MEANS=dmeans is not None,
                    **constants(work, channels),
                    maxnreg=REGISTERS_BACK,
                )
            found += [dy, parts.sum(0)]
    return found


def gate(m: Tensor, scale: Tensor | None, z: Tensor) -> Tensor:
    """See `merge.gate`."""
    m, (z, pixel) = m.contiguous(), with_pixels_in_line(z)
    out = m.new_empty(m.shape)
    work, launch, options = _gating(m, scale, pixel)
    with torch.cuda.device_of(m):
        gate_map[launch](
            m, m if scale is None else scale.contiguous(), z, out, m.shape[1] * m.shape[2], work.tiles, **options
        )
    return out


def gate_backward(dout: Tensor, m: Tensor, scale: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of m, scale and z; that of scale is empty where there is none."""
    dout, m, (z, pixel) = dout.contiguous(), m.contiguous(), with_pixels_in_line(z)
    dm, dz = m.new_empty(m.shape), z.new_empty(z.shape)
    work, launch, options = _gating(m, scale, pixel)
    parts = m if scale is None else m.new_empty(m.shape[0], work.chunks, m.shape[3], dtype=torch.float32)
    with torch.cuda.device_of(m):
        gate_back[launch](
            dout,
            m,
            m if scale is None else scale.contiguous(),
            z,
            dm,
            dz,
            parts,
            m.shape[1] * m.shape[2],
            work.tiles,
            **options,
        )
    return dm, m.new_empty(0) if scale is None else parts.sum(1).to(scale.dtype), dz


def _gating(m: Tensor, scale: Tensor | None, pixel: int) -> tuple[Split, tuple[int], dict[str, int]]:
    batch, height, width, channels = m.shape
    blocks = -(-channels // GATE_CHANNELS)
    work = split(batch * blocks, height * width, GATE_CHANNELS, multiprocessors(m.device))
    options = {"PIXEL": pixel, "SCALED": scale is not None, **constants(work, channels)}
    return work, (batch * work.chunks * blocks,), options


def with_pixels_in_line(z: Tensor) -> tuple[Tensor, int]:
    """The map itself where its pixels lie at equal distances, such as half of another map's, otherwise a copy.

    Returns:
        (map, distance of neighbouring pixels in elements)
    """
    _, height, width, channels = z.shape
    pixel = pixel_stride(z)
    strides = (height * width * pixel, width * pixel, pixel, 1)
    in_line = all(
        size == 1 or found == stride for size, found, stride in zip(z.shape, z.stride(), strides, strict=True)
    )
    return (z, pixel) if in_line else (z.contiguous(), channels)
