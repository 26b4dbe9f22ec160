"""What the scan's benchmark times on a GPU: the shapes, and random tensors of them.

A new shape is an entry of `CASES`.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from msv.kernels import ROUTES, Backend, selective_scan, selective_scan_2d

from .measuring import NamedCase
from .scan_call import Call, Columns, dtype_name, leaves

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
_SHORT = {FP32: "fp32", FP16: "fp16", BF16: "bf16"}
Routes = tuple[tuple[str, int], ...]

SS2D: Routes = tuple((route, weight_set) for weight_set, route in enumerate(ROUTES))
"""Four routes with a weight set each."""


@dataclass(frozen=True)
class Anchor:
    """Times measured before, on one H100 80GB HBM3, in ms; None where none was.

    Attributes:
        floor: to move what the operator must, at the speed of a copy.
        forward: of the fastest CUDA kernel.
        forward_backward: of the same.
    """

    floor: float | None = None
    forward: float | None = None
    forward_backward: float | None = None


@dataclass(frozen=True)
class SequenceCase(NamedCase):
    """1-D: u and delta (B, K·D, L), B and C (B, K, N, L), with softplus, skip and delta's bias.

    Attributes:
        groups: K.
        channels: D, of a group.
        length: L.
        d_state: N.
        dtype: of u, delta, B and C; A, the skip and delta's bias are float32.
        batch: B.
        anchor: what was measured before.
    """

    groups: int
    channels: int
    length: int
    d_state: int
    dtype: torch.dtype
    batch: int = 128
    anchor: Anchor = Anchor()

    operator = "1d"

    @property
    def name(self) -> str:
        size = f"B{self.batch} K{self.groups} D{self.channels} L{self.length}"
        return f"1d {size} N{self.d_state} {_SHORT[self.dtype]}"

    def about(self) -> Columns:
        sizes = {"B": self.batch, "K": self.groups, "D": self.channels, "L": self.length, "N": self.d_state}
        no_map = {"R": "", "map": "", "routes": "", "carry_state": ""}
        return {"operator": self.operator, **sizes, **no_map, "dtype": dtype_name(self.dtype)}

    @property
    def elements(self) -> int:
        """Of u, which is walked once."""
        return self.batch * self.groups * self.channels * self.length

    @property
    def floor_bytes(self) -> int:
        """Bytes of u, delta, B and C, read once, and y, written once."""
        projections = 2 * self.batch * self.groups * self.d_state * self.length
        return self.dtype.itemsize * (3 * self.elements + projections)

    def call(self, device: torch.device, backend: Backend) -> Call:
        """The operator on fresh random tensors: u, delta, A, B, C, D, delta_bias."""
        generator = _generator(device)
        random = partial(torch.randn, device=device, dtype=self.dtype, generator=generator)
        u, delta, upstream = (random(self.batch, self.groups * self.channels, self.length) for _ in range(3))
        B, C = (random(self.batch, self.groups, self.d_state, self.length) for _ in range(2))
        A_log, D, bias = _weights(self.groups * self.channels, self.d_state, generator)

        def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor) -> Tensor:
            y = selective_scan(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True, backend=backend)
            return cast(Tensor, y)  # a tuple comes with return_last_state alone

        return Call(scan, leaves(u, delta, -A_log.exp(), B, C, D, bias), upstream)

    def saved(self, tensors: tuple[Tensor, ...], triton: bool) -> Tensor:
        """What the registered operator keeps for the backward beside its inputs, in Triton or in torch."""
        u, delta, A, B, C, D, bias = tensors
        return torch.ops.msv.selective_scan(u, delta, A, B, C, D, None, bias, True, triton)[-1]

    def tiny(self) -> "SequenceCase":
        """The same at a size that an interpreter manages."""
        return replace(self, batch=min(2, self.batch), channels=6, length=37, anchor=Anchor())


@dataclass(frozen=True)
class MapCase(NamedCase):
    """2-D: x (B, H, W, D), x_dbl (B, H, W, S, R + 2N), walked on K routes in one call.

    Attributes:
        height: H.
        width: W.
        channels: D.
        rank: R.
        d_state: N.
        routes: names and weight sets.
        dtype: of x and x_dbl; the weights are float32.
        carry_state: whether the state crosses from a route to the next.
        batch: B.
        anchor: what was measured before.
    """

    height: int
    width: int
    channels: int
    rank: int
    d_state: int
    routes: Routes
    dtype: torch.dtype
    carry_state: bool = False
    batch: int = 128
    anchor: Anchor = Anchor()

    operator = "2d"

    @property
    def name(self) -> str:
        walk = "SS2D" if self.routes == SS2D else "+".join(route for route, _ in self.routes)
        size = f"B{self.batch} D{self.channels} {self.height}x{self.width}"
        return f"2d {walk} {size} N{self.d_state} {_SHORT[self.dtype]}"

    def about(self) -> Columns:
        sizes = {"B": self.batch, "K": len(self.routes), "D": self.channels, "L": self.height * self.width}
        routes = " ".join(f"{route}:{weight_set}" for route, weight_set in self.routes)
        walk = {"map": f"{self.height}x{self.width}", "routes": routes, "carry_state": str(self.carry_state)}
        numbers = {"N": self.d_state, "R": self.rank}
        return {"operator": self.operator, **sizes, **numbers, **walk, "dtype": dtype_name(self.dtype)}

    @property
    def elements(self) -> int:
        """Of x, counted once for each route that walks it."""
        return len(self.routes) * self.batch * self.height * self.width * self.channels

    @property
    def floor_bytes(self) -> int:
        """Bytes of x and x_dbl, read once, and the routes' outputs, written once."""
        positions = self.batch * self.height * self.width
        projections = positions * self.weight_sets * (self.rank + 2 * self.d_state)
        return self.dtype.itemsize * (positions * self.channels + projections + self.elements)

    @property
    def weight_sets(self) -> int:
        """S."""
        return 1 + max(weight_set for _, weight_set in self.routes)

    def call(self, device: torch.device, backend: Backend) -> Call:
        """The operator on fresh random tensors: x, x_dbl, dt_weight, dt_bias, A_log, D_skip."""
        generator = _generator(device)
        random = partial(torch.randn, device=device, dtype=self.dtype, generator=generator)
        place = (self.batch, self.height, self.width)
        x, x_dbl = random(*place, self.channels), random(*place, self.weight_sets, self.rank + 2 * self.d_state)
        upstream = random(self.batch, len(self.routes), *place[1:], self.channels)
        weights = (_weights(self.channels, self.d_state, generator) for _ in range(self.weight_sets))
        A_log, D_skip, dt_bias = (torch.stack(t) for t in zip(*weights, strict=True))
        dt_weight = random(self.weight_sets, self.channels, self.rank, dtype=FP32) * self.rank**-0.5
        scan = partial(selective_scan_2d, routes=self.routes, carry_state=self.carry_state, backend=backend)
        return Call(scan, leaves(x, x_dbl, dt_weight, dt_bias, A_log, D_skip), upstream)

    def saved(self, tensors: tuple[Tensor, ...], triton: bool) -> Tensor:
        """What the registered operator keeps for the backward beside its inputs, in Triton or in torch."""
        numbers, sets = [ROUTES.index(route) for route, _ in self.routes], [s for _, s in self.routes]
        return torch.ops.msv.selective_scan_2d(*tensors, numbers, sets, self.carry_state, triton)[-1]

    def tiny(self) -> "MapCase":
        """The same at a size that an interpreter manages."""
        return replace(self, batch=min(2, self.batch), height=5, width=7, channels=6, rank=2, anchor=Anchor())


Case = SequenceCase | MapCase


def cases(quick: bool = False, only: tuple[str, ...] = ()) -> tuple[Case, ...]:
    """What is timed.

    Args:
        quick: the same at tiny sizes, each once.
        only: those whose name contains one of these; all, if there are none.

    Raises:
        ValueError: there is no such name.
    """
    shapes = tuple(dict.fromkeys(case.tiny() for case in CASES)) if quick else CASES
    chosen = tuple(case for case in shapes if not only or any(part in case.name for part in only))
    if not chosen:
        names = ", ".join(case.name for case in shapes)
        raise ValueError(f"--only is {' '.join(only)}, which is part of no row's name; expected a part of: {names}")
    return chosen


def _generator(device: torch.device) -> torch.Generator:
    """Randomness of its own: a CUDA graph that could not be captured leaves the GPU's common one unusable."""
    generator = torch.Generator(device)
    generator.seed()
    return generator


def _weights(channels: int, d_state: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A_log (D, N), the skip (D,) and delta's bias (D,), as a network begins with them: delta from 0.001 to 0.1."""
    device = generator.device
    A_log = torch.arange(1, d_state + 1, device=device, dtype=FP32).log().repeat(channels, 1)
    log_delta = torch.empty(channels, device=device).uniform_(math.log(1e-3), math.log(1e-1), generator=generator)
    return A_log, torch.ones(channels, device=device), log_delta.exp().expm1().log()


_ONE: Routes = (("row", 0),)
_HALF: Routes = (("col", 0), ("rowR", 0), ("colR", 0))

CASES: tuple[Case, ...] = (
    # 1-D, a route of a stage at 224×224, then those that walk its half resolution: floor, forward, with backward
    SequenceCase(1, 192, 3136, 1, BF16, anchor=Anchor(0.153, 0.531, 1.83)),
    SequenceCase(1, 384, 784, 1, BF16, anchor=Anchor(0.077, 0.269, 0.97)),
    SequenceCase(1, 768, 196, 1, BF16, anchor=Anchor(0.038, 0.149, 0.59)),
    SequenceCase(1, 1536, 49, 1, BF16, anchor=Anchor(0.019, 0.140, 0.52)),
    SequenceCase(1, 192, 2352, 1, BF16, anchor=Anchor(0.115, 0.514, 1.76)),
    SequenceCase(1, 384, 588, 1, BF16, anchor=Anchor(0.057, 0.263, 0.95)),
    # the four routes of SS2D
    SequenceCase(4, 192, 3136, 1, BF16, anchor=Anchor(0.614, 2.09, 7.20)),
    SequenceCase(4, 192, 3136, 8, BF16, anchor=Anchor(0.629, 6.05, 28.6)),
    SequenceCase(4, 192, 3136, 16, BF16, anchor=Anchor(0.646, 11.9, 56.4)),
    SequenceCase(4, 384, 784, 16, BF16, anchor=Anchor(0.314, 5.12, 20.4)),
    SequenceCase(4, 768, 196, 16, BF16, anchor=Anchor(0.155, 2.93, 11.6)),
    SequenceCase(4, 1536, 49, 16, BF16, anchor=Anchor(0.077, 3.37, 11.2)),
    # one long sequence
    SequenceCase(1, 192, 65536, 1, BF16, batch=1),
    # 2-D, one route of the first stage
    MapCase(56, 56, 192, 6, 1, _ONE, BF16, anchor=Anchor(floor=0.105)),
    *(MapCase(56, 56, 192, 6, 1, ((route, 0),), BF16) for route in ROUTES[1:]),
    MapCase(56, 56, 192, 6, 1, _ONE, FP16),
    MapCase(56, 56, 192, 6, 1, _ONE, FP32),
    # the three routes at half resolution, one state running through them
    MapCase(28, 28, 192, 6, 1, _HALF, BF16, carry_state=True),
    # SS2D: with the cross-scan and cross-merge that a CUDA kernel needs, 60 to 62 ms
    MapCase(56, 56, 192, 6, 16, SS2D, BF16, anchor=Anchor(forward_backward=60.0)),
    MapCase(56, 56, 192, 6, 1, SS2D, BF16),
    # the other stages
    *(
        MapCase(side, side, channels, rank, d_state, routes, BF16)
        for side, channels, rank in ((28, 384, 12), (14, 768, 24), (7, 1536, 48))
        for d_state, routes in ((1, _ONE), (16, SS2D))
    ),
    # one large map
    MapCase(256, 256, 192, 6, 1, _ONE, BF16, batch=1),
    # 1-D, other dtypes
    SequenceCase(1, 192, 3136, 1, FP16),
    SequenceCase(1, 192, 3136, 1, FP32, anchor=Anchor(0.307, 0.574, 1.91)),
    SequenceCase(1, 384, 784, 1, FP32),
    SequenceCase(1, 768, 196, 1, FP32),
    SequenceCase(1, 1536, 49, 1, FP32),
    SequenceCase(1, 192, 2352, 1, FP32),
    SequenceCase(1, 384, 588, 1, FP32),
    SequenceCase(4, 192, 3136, 1, FP32),
    SequenceCase(4, 192, 3136, 8, FP32),
    SequenceCase(4, 192, 3136, 16, FP32),
)
