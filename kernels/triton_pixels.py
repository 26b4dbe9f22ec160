"""What Triton kernels with a LayerNorm share: pixels of a map with all their channels, in registers.

LayerNorm wants all D channels of a pixel at once: P pixels lie there as a tuple of two or three blocks (P, BLOCK), a
power of two each, so that few lanes are idle and a pixel's sums take few shuffles. Sums over pixels stay in registers
till a program's end; torch adds up the programs' parts, in the same order every time.

Everything is computed in float32 and read or written in the maps' own dtype. Backwards compute means and variances
again, since they hold the pixels anyway.
"""

from typing import NamedTuple

import triton
import triton.language as tl

TILE = 1024
"""Values of a block, P * BLOCK: eight a thread, which a 16-bit map's thread reads at once."""

WARPS = 4
"""Of a program."""

REGISTERS, REGISTERS_BACK = 128, 168
"""Of a thread at most, so that four or three programs run on a multiprocessor at once."""

TILES = 8
"""Tiles of a program at most: what it writes of sums must be little beside them."""

PROGRAMS_WANTED = 16
"""Programs that a multiprocessor should have at least: where there are fewer, chunks are shorter."""


@triton.jit
def load_blocks(pixel_ptr, inside, D: tl.constexpr, BLOCK: tl.constexpr):
    """The channels of pixels that lie at `pixel_ptr` (P, 1), as blocks (P, BLOCK); zeros where there are none."""
    c = tl.arange(0, BLOCK)[None, :]
    found = ()
    for k in tl.static_range((D + BLOCK - 1) // BLOCK):
        mask = inside[:, None]
        if (k + 1) * BLOCK > D:
            mask = mask & (k * BLOCK + c < D)
        found = found + (tl.load(pixel_ptr + (k * BLOCK + c), mask=mask, other=0.0),)
    return found


@triton.jit
def store_blocks(pixel_ptr, inside, blocks, D: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_blocks`."""
    c = tl.arange(0, BLOCK)[None, :]
    for k in tl.static_range((D + BLOCK - 1) // BLOCK):
        mask = inside[:, None]
        if (k + 1) * BLOCK > D:
            mask = mask & (k * BLOCK + c < D)
        tl.store(pixel_ptr + (k * BLOCK + c), blocks[k].to(pixel_ptr.dtype.element_ty), mask=mask)


@triton.jit
def load_channels(channel_ptr, D: tl.constexpr, BLOCK: tl.constexpr):
    """A value for each channel, as blocks (1, BLOCK) in float32."""
    c = tl.arange(0, BLOCK)
    found = ()
    for k in tl.static_range((D + BLOCK - 1) // BLOCK):
        value = tl.load(channel_ptr + k * BLOCK + c, mask=k * BLOCK + c < D, other=0.0)
        found = found + (value.to(tl.float32)[None, :],)
    return found


@triton.jit
def store_channels(channel_ptr, blocks, D: tl.constexpr, BLOCK: tl.constexpr):
    """The inverse of `load_channels`."""
    c = tl.arange(0, BLOCK)[None, :]
    for k in tl.static_range((D + BLOCK - 1) // BLOCK):
        tl.store(channel_ptr + k * BLOCK + c, blocks[k], mask=k * BLOCK + c < D)


@triton.jit
def over_pixels(blocks, COUNT: tl.constexpr):
    """Blocks (P, BLOCK) summed over pixels, (1, BLOCK)."""
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (tl.sum(blocks[k], axis=0)[None, :],)
    return found


@triton.jit
def scaled(blocks, factor, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """The product in float32 of a factor and blocks, COUNT of them from FIRST on."""
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (factor * blocks[FIRST + k].to(tl.float32),)
    return found


@triton.jit
def add_scaled(sums, blocks, factor, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Adds that product to sums."""
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (sums[k] + factor * blocks[FIRST + k].to(tl.float32),)
    return found


@triton.jit
def over_channels(blocks, others, COUNT: tl.constexpr):
    """The sum over a pixel's channels of blocks * others, (P, 1)."""
    total = blocks[0] * others[0]
    for k in tl.static_range(COUNT - 1):
        total += blocks[k + 1] * others[k + 1]
    return tl.sum(total, axis=1)[:, None]


@triton.jit
def standardise(blocks, FIRST: tl.constexpr, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    """Pixels less their mean over their deviation, and 1 over that, (P, 1); of `blocks` from FIRST on."""
    COUNT: tl.constexpr = (D + BLOCK - 1) // BLOCK
    c = tl.arange(0, BLOCK)[None, :]
    total = blocks[FIRST].to(tl.float32)
    for k in tl.static_range(COUNT - 1):
        total += blocks[FIRST + k + 1].to(tl.float32)
    mean = tl.sum(total, axis=1)[:, None] * (1.0 / D)
    centred = ()
    for k in tl.static_range(COUNT):
        value = blocks[FIRST + k].to(tl.float32) - mean
        if (k + 1) * BLOCK > D:
            value = tl.where(k * BLOCK + c < D, value, 0.0)
        centred = centred + (value,)
    rstd = tl.rsqrt(over_channels(centred, centred, COUNT) * (1.0 / D) + eps)
    found = ()
    for k in tl.static_range(COUNT):
        found = found + (centred[k] * rstd,)
    return found, rstd


class Split(NamedTuple):
    """How a map's work is spread over programs.

    Attributes:
        chunks: of an image.
        tiles: of a chunk.
        pixels: of a tile, P.
        block: channels of a block.
    """

    chunks: int
    tiles: int
    pixels: int
    block: int


def split(batch: int, pixels: int, block: int, multiprocessors: int) -> Split:
    """Spreads images over programs whose blocks have `block` channels.

    It depends on the GPU, and so do the last bits of sums over pixels.
    """
    tile = max(1, TILE // block)
    in_image = -(-pixels // tile)
    tiles = min(TILES, max(1, batch * in_image // (PROGRAMS_WANTED * multiprocessors)))
    return Split(-(-in_image // tiles), tiles, tile, block)


def channel_block(channels: int) -> int:
    """A third of all channels, rounded up to a power of two, so that 3·2ⁿ and 4·2ⁿ channels leave no lane idle."""
    return max(16, 1 << (-(-channels // 3) - 1).bit_length())


def constants(work: Split, channels: int) -> dict[str, int]:
    """What kernels over such pixels are compiled for."""
    return {"D": channels, "P": work.pixels, "BLOCK": work.block, "num_warps": WARPS, "num_stages": 1}
