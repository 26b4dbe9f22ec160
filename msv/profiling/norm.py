"""`python cli.py benchmark norm`: the time of a branch's sum and the LayerNorm after it on a GPU, beside torch's.

torch gets the same tensors under autocast, as a network trains, and its norm is cast to the map's dtype, as the product
that reads it does.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from msv.kernels import Backend, add_norm

from .operators import MAPS, QUICK_MAPS, Benchmark, MapCase
from .scan_call import Call, Columns, dtype_name, leaves

KINDS = {"sum": False, "dropped": True}
"""Whether stochastic depth draws factors of the branch."""


@dataclass(frozen=True)
class Case(MapCase):
    """A residual sum and its norm, whose weight and bias are float32."""

    @property
    def moved_bytes(self) -> tuple[int, int]:
        """Bytes to move at least, of the forward, and of both.

        Forward x, branch, sum and norm; backward the sum, the gradients of both outputs, dx, and with factors dbranch.
        """
        a_map = torch.Size(self.shape).numel() * self.dtype.itemsize
        return 4 * a_map, (8 + KINDS[self.kind]) * a_map

    def call(self, device: torch.device, backend: Backend) -> Call:
        """The operator on tensors of its own, the same for every backend."""
        normal = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
        batch, *_, channels = self.shape
        factors = normal(batch).abs() if KINDS[self.kind] else None

        def run(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            mixed = self.dtype != torch.float32 and backend == "parallel"
            with torch.autocast(device.type, self.dtype) if mixed else nullcontext():
                total, normed = add_norm(x, branch, factors, weight, bias, backend=backend)
                return total, normed.to(self.dtype)

        maps = [normal(*self.shape, dtype=self.dtype) for _ in range(4)]
        return Call(run, leaves(*maps[:2], normal(channels), normal(channels)), tuple(maps[2:]))

    def about(self) -> Columns:
        shape = dict(zip("BHWC", self.shape, strict=True))
        return {**shape, "factors": KINDS[self.kind], "dtype": dtype_name(self.dtype)}


# Blocks have half as many channels as their mixers do inside.
BLOCK_MAPS = tuple((*shape[:3], shape[3] // 2) for shape in MAPS)

BENCHMARK = Benchmark(
    "norm",
    "A branch's sum and the LayerNorm after it on a GPU, beside torch's and a copy of the same bytes.",
    cases=[*(Case(kind, shape) for shape in BLOCK_MAPS for kind in KINDS), Case("sum", BLOCK_MAPS[0], torch.float32)],
    quick_cases=[Case(kind, shape) for shape in QUICK_MAPS for kind in KINDS],
)
main = BENCHMARK.main
