"""`python cli.py benchmark merge`: the time of what follows the scans on a GPU, beside torch's and a copy.

Routes are merged and gated, from the scans' outputs to out_proj's input. torch gets the same tensors under autocast, as
a network trains; in place of squeeze-excitation's two small products stands a sigmoid.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from msv.kernels import Backend, gate, merge_routes

from .operators import MAPS, QUICK_MAPS, Benchmark, MapCase
from .scan_call import Call, Columns, dtype_name, leaves


@dataclass(frozen=True)
class Kind:
    """A split of the routes, Table 5's.

    Attributes:
        full: routes on the full map.
        half: routes on the half map; with no full routes they are normalised after their sum.
        se: whether squeeze-excitation is between the two operators.
    """

    full: int
    half: int
    se: bool


KINDS = {"1/3 SE": Kind(1, 3, True), "4/0": Kind(4, 0, False), "0/4 SE": Kind(0, 4, True)}


@dataclass(frozen=True)
class Case(MapCase):
    """A mixer's merge and gate; its norms are float32."""

    @property
    def half_shape(self) -> tuple[int, int, int, int]:
        """Of the half map."""
        batch, height, width, channels = self.shape
        return batch, -(-height // 2), -(-width // 2), channels

    @property
    def moved_bytes(self) -> tuple[int, int]:
        """Bytes of maps that the kernels read and write: in a forward, and with the backward."""
        kind = KINDS[self.kind]
        full, half = torch.Size(self.shape).numel(), torch.Size(self.half_shape).numel()
        merged = kind.full * full + (kind.half + 2) * half * (kind.half > 0) + full
        kept = full * (kind.full > 1) + half * (kind.half > 1 and not kind.full)
        normalised = 3 * full * (kind.full > 0)
        if kind.half:
            normalised += full + 2 * half * (kind.half if kind.full else 1)
        forward, backward = merged + 3 * full, kept + 5 * full + normalised
        return forward * self.dtype.itemsize, (forward + backward) * self.dtype.itemsize

    def call(self, device: torch.device, backend: Backend) -> Call:
        """Both operators on tensors of their own, the same for every backend; z is half of in_proj's output."""
        kind, generator = KINDS[self.kind], torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, device=device, generator=generator)
        batch, *_, channels = self.shape
        maps = [
            normal(batch, routes, *shape[1:], dtype=self.dtype)
            for routes, shape in ((kind.full, self.shape), (kind.half, self.half_shape))
            if routes
        ]
        z = normal(*self.shape[:3], 2 * channels, dtype=self.dtype)[..., channels:]

        def merge(weight: Tensor, bias: Tensor, z: Tensor, *maps: Tensor) -> Tensor:
            norm = (weight, bias)
            full, half = (maps[0] if kind.full else None, maps[-1] if kind.half else None)
            m, means = merge_routes(
                full, half, *norm, *norm, self.shape[1:3], sum_first=not kind.full, means=kind.se, backend=backend
            )
            out = gate(m, None if means is None else means.sigmoid(), z, backend=backend)
            return out.to(self.dtype)

        def trained(*tensors: Tensor) -> Tensor:
            mixed = self.dtype != torch.float32 and backend == "parallel"
            with torch.autocast(device.type, self.dtype) if mixed else nullcontext():
                return merge(*tensors)

        tensors = leaves(normal(channels), normal(channels), z, *maps)
        return Call(trained, tensors, normal(*self.shape, dtype=self.dtype))

    def about(self) -> Columns:
        kind, shape = KINDS[self.kind], dict(zip("BHWD", self.shape, strict=True))
        what = {"full": kind.full, "half": kind.half, "se": kind.se}
        return {**shape, **what, "dtype": dtype_name(self.dtype)}


BENCHMARK = Benchmark(
    "merge",
    "What follows the scans on a GPU, the merge of routes and the gate, beside torch's and a copy of the same bytes.",
    cases=[*(Case(kind, shape) for shape in MAPS for kind in KINDS), Case("1/3 SE", MAPS[0], torch.float32)],
    quick_cases=[Case(kind, shape) for shape in QUICK_MAPS for kind in KINDS],
)
main = BENCHMARK.main
