"""`python cli.py benchmark depthwise`: the depthwise convolutions' time on a GPU, beside torch's and a copy.

torch's convolution, cuDNN's, gets the same tensors, its weights in the map's dtype, and is followed by torch's sum and
activation.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from msv.kernels import Activation, Backend, depthwise_conv

from .operators import MAPS, QUICK_MAPS, Benchmark, MapCase
from .scan_call import Call, Columns, dtype_name, leaves


@dataclass(frozen=True)
class Case(MapCase):
    """A convolution of the network; its weights are float32."""

    @property
    def moved_bytes(self) -> tuple[int, int]:
        """Bytes to move at least: forward x and y, backward x, dy and dx; of the forward, and of both."""
        batch, height, width, channels = self.shape
        stride = KINDS[self.kind].stride
        x = batch * height * width * channels * self.dtype.itemsize
        y = batch * -(-height // stride) * -(-width // stride) * channels * self.dtype.itemsize
        return x + y, 3 * x + 2 * y

    def call(self, device: torch.device, backend: Backend) -> Call:
        """The convolution on tensors of its own, the same for every backend."""
        kind, generator = KINDS[self.kind], torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, device=device, generator=generator)
        batch, height, width, channels = self.shape
        x = normal(batch, height, width, (2 if kind.half else 1) * channels, dtype=self.dtype)[..., :channels]
        weight, bias = normal(channels, 1, kind.size, kind.size) / kind.size, normal(channels)

        def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return depthwise_conv(x, weight, bias, kind.stride, kind.activation, kind.residual, backend=backend)

        upstream = normal(batch, -(-height // kind.stride), -(-width // kind.stride), channels, dtype=self.dtype)
        return Call(convolve, leaves(x, weight, bias), upstream)

    def about(self) -> Columns:
        kind, shape = KINDS[self.kind], dict(zip("BHWC", self.shape, strict=True))
        what = {"kernel": kind.size, "stride": kind.stride, "activation": kind.activation}
        return {**shape, **what, "dtype": dtype_name(self.dtype)}


@dataclass(frozen=True)
class Kind:
    """Where in the network a convolution stands.

    Attributes:
        size: K of the K×K kernel.
        half: whether the map is half of another one, as the mixers' x beside its gate.
    """

    size: int
    stride: int
    activation: Activation
    residual: bool = False
    half: bool = False


KINDS = {
    "mixer 3x3": Kind(3, 1, "silu", half=True),
    "mixer 7x7": Kind(7, 2, "silu", half=True),
    "ffn 3x3": Kind(3, 1, "gelu", residual=True),
}

BENCHMARK = Benchmark(
    "depthwise",
    "The depthwise convolutions on a GPU, beside torch's (cuDNN's) and a copy of the same bytes.",
    cases=[*(Case(kind, shape) for shape in MAPS for kind in KINDS), Case("mixer 3x3", MAPS[0], torch.float32)],
    quick_cases=[Case(kind, shape) for shape in QUICK_MAPS for kind in KINDS],
)
main = BENCHMARK.main
