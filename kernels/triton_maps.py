"""What the Triton kernels over channels-last maps share: SiLU, tuples of zeros, and where pixels lie."""

import triton
import triton.language as tl
from torch import Tensor

from .triton_tiles import LOG2_E


@triton.jit
def silu(z):
    """SiLU, z ∘ σ(z)."""
    return z / (1.0 + tl.exp2(z * -LOG2_E))


@triton.jit
def silu_gate(z):
    """σ(z), by which SiLU multiplies."""
    return 1.0 / (1.0 + tl.exp2(z * -LOG2_E))


@triton.jit
def silu_slope(z, gate):
    """The derivative of SiLU, given its gate."""
    return gate * (1.0 + z * (1.0 - gate))


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """COUNT blocks of zeros, each (ROWS, BLOCK)."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros((ROWS, BLOCK), tl.float32),)
    return found


def pixel_stride(x: Tensor) -> int:
    """How many elements neighbouring pixels of a map (B, H, W, C) are apart.

    Where it has one column those below each other are neighbours, where it has one row, too, those of two images: a
    dimension of one has a stride that says little. A single pixel's is taken, so that half of a map looks like half of
    a larger one, for which kernels are compiled already.
    """
    apart = [stride for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1]
    return apart[-1] if apart else max(x.stride(2), x.shape[3])
