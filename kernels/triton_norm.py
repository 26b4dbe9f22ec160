"""The sum of a map and a branch, and its LayerNorm, in Triton: each map is read once and written once.

A program is a chunk of all images' pixels, held as `triton_pixels` says.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_maps import zeros
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

# A new size of map or batch is a new value of these, and compiles nothing.
_SIZES = ["pixels", "in_image", "tiles"]


@triton.jit
def factors_of(factor_ptr, pixel, inside, in_image, FACTORED: tl.constexpr):
    """The factors of the images that pixels lie in, (P, 1), or one."""
    factors = 1.0
    if FACTORED:
        factors = tl.load(factor_ptr + pixel // in_image, mask=inside, other=0.0).to(tl.float32)[:, None]
    return factors


@triton.jit(do_not_specialize=_SIZES)
def add_norm_map(
    x_ptr,
    branch_ptr,
    factor_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    out_ptr,
    pixels,
    in_image,
    tiles,
    eps,
    ADDED: tl.constexpr,
    FACTORED: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """LayerNorm of x, or with ADDED of its sum with a branch, which is written too, and rounded first.

    Args:
        x_ptr, branch_ptr, sum_ptr, out_ptr: (pixels, D).
        factor_ptr: with FACTORED, what a branch is multiplied by, one an image.
        weight_ptr, bias_ptr: (D,).
        pixels: of all images.
        in_image: pixels of one.
        tiles: of a chunk.
    """
    COUNT: tl.constexpr = (D + BLOCK - 1) // BLOCK
    first = tl.program_id(0).to(tl.int64) * tiles * P
    weight = load_channels(weight_ptr, D, BLOCK)
    bias = load_channels(bias_ptr, D, BLOCK)
    for tile in range(tiles):
        pixel = first + tile * P + tl.arange(0, P)
        inside = pixel < pixels
        at = pixel[:, None] * D
        values = load_blocks(x_ptr + at, inside, D, BLOCK)
        if ADDED:
            branch = load_blocks(branch_ptr + at, inside, D, BLOCK)
            factors = factors_of(factor_ptr, pixel, inside, in_image, FACTORED)
            total = add_scaled(scaled(values, 1.0, 0, COUNT), branch, factors, 0, COUNT)
            values = ()
            for k in tl.static_range(COUNT):
                values = values + (total[k].to(sum_ptr.dtype.element_ty),)
            store_blocks(sum_ptr + at, inside, values, D, BLOCK)
        normal, _ = standardise(values, 0, eps, D, BLOCK)
        out = ()
        for k in tl.static_range(COUNT):
            out = out + (normal[k] * weight[k] + bias[k],)
        store_blocks(out_ptr + at, inside, out, D, BLOCK)


@triton.jit(do_not_specialize=_SIZES)
def add_norm_back(
    dout_ptr,
    dsum_ptr,
    sum_ptr,
    factor_ptr,
    weight_ptr,
    dx_ptr,
    dbranch_ptr,
    part_ptr,
    pixels,
    in_image,
    tiles,
    eps,
    SUMMED: tl.constexpr,
    APART: tl.constexpr,
    FACTORED: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of a sum through its LayerNorm, of the branch in it, and of the norm's weight and bias.

    Args:
        dout_ptr: gradient of the norm's output, (pixels, D).
        dsum_ptr: with SUMMED, the gradient that the sum has otherwise, (pixels, D).
        sum_ptr, dx_ptr: (pixels, D).
        factor_ptr: with FACTORED, of an image each.
        weight_ptr: (D,).
        dbranch_ptr: with APART, (pixels, D), where it is not dx itself.
        part_ptr: float32, (programs, 2, D), each program's part of the gradients of weight and bias.
        pixels, in_image, tiles: as of `add_norm_map`.
    """
    COUNT: tl.constexpr = (D + BLOCK - 1) // BLOCK
    pid = tl.program_id(0).to(tl.int64)
    first = pid * tiles * P
    weight = load_channels(weight_ptr, D, BLOCK)
    dweight = zeros(COUNT, P, BLOCK)
    dbias = zeros(COUNT, P, BLOCK)
    for tile in range(tiles):
        pixel = first + tile * P + tl.arange(0, P)
        inside = pixel < pixels
        at = pixel[:, None] * D
        dout = load_blocks(dout_ptr + at, inside, D, BLOCK)
        values = load_blocks(sum_ptr + at, inside, D, BLOCK)
        if SUMMED:
            dsum = load_blocks(dsum_ptr + at, inside, D, BLOCK)
        gs = scaled(dout, 1.0, 0, COUNT)
        dbias = add_scaled(dbias, gs, 1.0, 0, COUNT)
        level = over_channels(gs, weight, COUNT) * (1.0 / D)
        normal, rstd = standardise(values, 0, eps, D, BLOCK)
        turned = ()
        added = ()
        for k in tl.static_range(COUNT):
            turned = turned + (gs[k] * normal[k],)
            added = added + (dweight[k] + turned[k],)
        dweight = added
        slope = over_channels(turned, weight, COUNT) * (1.0 / D)
        dx = ()
        for k in tl.static_range(COUNT):
            dx = dx + ((gs[k] * weight[k] - level - normal[k] * slope) * rstd,)
        if SUMMED:
            dx = add_scaled(dx, dsum, 1.0, 0, COUNT)
        store_blocks(dx_ptr + at, inside, dx, D, BLOCK)
        if APART:
            factors = factors_of(factor_ptr, pixel, inside, in_image, FACTORED)
            store_blocks(dbranch_ptr + at, inside, scaled(dx, factors, 0, COUNT), D, BLOCK)
    part_ptr += pid * 2 * D
    store_channels(part_ptr, over_pixels(dweight, COUNT), D, BLOCK)
    store_channels(part_ptr + D, over_pixels(dbias, COUNT), D, BLOCK)


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    factors: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    sum_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The sum, empty where there is no branch, and its LayerNorm. See `norm.add_norm`."""
    x = x.contiguous()
    total = x.new_empty(0 if branch is None else x.shape, dtype=sum_dtype)
    out = x.new_empty(x.shape, dtype=dtype)
    work, options = _work(x, factors)
    with torch.cuda.device_of(x):
        add_norm_map[(work.chunks,)](
            x,
            x if branch is None else branch.contiguous(),
            x if factors is None else factors.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            total,
            out,
            x.numel() // x.shape[3],
            x.shape[1] * x.shape[2],
            work.tiles,
            eps,
            ADDED=branch is not None,
            **options,
            maxnreg=REGISTERS,
        )
    return total, out


def add_norm_backward(
    dout: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    factors: Tensor | None,
    weight: Tensor,
    eps: float,
    apart: bool,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of what was normalised, with `apart` of the branch, else empty, and of weight and bias, (2, D)."""
    total = total.contiguous()
    dx = total.new_empty(total.shape)
    dbranch = total.new_empty(total.shape if apart else 0, dtype=branch_dtype)
    work, options = _work(total, factors)
    parts = total.new_empty(work.chunks, 2, total.shape[3], dtype=torch.float32)
    with torch.cuda.device_of(total):
        add_norm_back[(work.chunks,)](
            dout.contiguous(),
            total if dsum is None else dsum.contiguous(),
            total,
            total if factors is None else factors.contiguous(),
            weight.contiguous(),
            dx,
            dbranch,
            parts,
            total.numel() // total.shape[3],
            total.shape[1] * total.shape[2],
            work.tiles,
            eps,
            SUMMED=dsum is not None,
            APART=apart,
            **options,
            maxnreg=REGISTERS_BACK,
        )
    return dx, dbranch, parts.sum(0)


def _work(x: Tensor, factors: Tensor | None) -> tuple[Split, dict[str, int]]:
    channels = x.shape[3]
    work = split(1, x.numel() // channels, channel_block(channels), multiprocessors(x.device))
    return work, {"FACTORED": factors is not None, **constants(work, channels)}
