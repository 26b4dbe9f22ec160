"""Layers that stages and blocks are made of. Maps are channels last, (B, H, W, C), from the stem to the head."""

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from msv.kernels import Activation, Backend, add_norm, depthwise_conv


def map_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A Linear over the channels of a map: (B, H, W, C), weight (O, C) and bias (O,) to (B, H, W, O)."""
    if not infers_on_cpu(x) or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    # torch's convolutions are oneDNN's, its products MKL's, which on AMD's processors take twice as long.
    return F.conv2d(x.permute(0, 3, 1, 2), weight[:, :, None, None], bias).permute(0, 2, 3, 1)


def infers_on_cpu(x: Tensor) -> bool:
    """Whether what is computed of x runs now, on a CPU, and keeps nothing for a backward."""
    return x.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling())


class MapLinear(nn.Linear):
    """A Linear over the channels of a channels-last map."""

    def forward(self, x: Tensor) -> Tensor:
        return map_linear(x, self.weight, self.bias)


class SplitLinear(nn.Linear):
    """A Linear without bias over the channels of a channels-last map, that returns its outputs as two maps."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if infers_on_cpu(x):  # where a convolution copies what does not lie together
            first, second = (map_linear(x, weight) for weight in self.weight.chunk(2))
        else:
            first, second = F.linear(x, self.weight).chunk(2, dim=-1)
        return first, second


class PointwiseConv(MapLinear):
    """A 1×1 convolution of a channels-last map; a Linear that keeps a convolution's initial values."""


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution of a channels-last map, (B, H, W, C) to (B, ceil(H/stride), ceil(W/stride), C).

    What follows it is part of the same operator: an activation, and the sum with its own input.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, backend: Backend = "auto") -> None:
        super().__init__(channels, channels, kernel_size, stride, padding=kernel_size // 2, groups=channels)
        self.backend = backend

    def forward(self, x: Tensor, activation: Activation = "none", residual: bool = False) -> Tensor:
        options = (self.stride[0], activation, residual)
        return depthwise_conv(x, self.weight, self.bias, *options, backend=self.backend)


class AddNorm(nn.LayerNorm):
    """The sum of a map and a branch, and its LayerNorm over channels: what a residual network does between its layers.

    Under autocast the norm has autocast's dtype on a GPU, for the product that reads it.
    """

    def __init__(self, channels: int, backend: Backend = "auto") -> None:
        super().__init__(channels, eps=1e-5)
        self.backend = backend

    def forward(  # type: ignore[override]
        self, x: Tensor, branch: Tensor | None = None, factors: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Maps x and branch (B, H, W, C), and factors (B,) of the branch, to x + factors ∘ branch and its LayerNorm."""
        return add_norm(x, branch, factors, self.weight, self.bias, self.eps, backend=self.backend)


class Stem(nn.Module):
    """Conv 4×4, stride 4, and LayerNorm: images (B, C, H, W) to a map (B, H//4, W//4, dim) (Table 7)."""

    def __init__(self, in_chans: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=4, stride=4)
        self.norm = nn.LayerNorm(dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


def pad_to_even(x: Tensor) -> Tensor:
    """Pads a map with zeros at the bottom and right where a side is odd."""
    height, width = x.shape[1:3]
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    return x


class PatchMerging(nn.Module):
    """(B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C) from the four pixels of each 2×2 patch (published)."""

    def __init__(self, dim: int, out_dim: int, backend: Backend = "auto") -> None:
        super().__init__()
        self.norm = AddNorm(4 * dim, backend)
        self.reduction = MapLinear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_to_even(x).unflatten(1, (-1, 2)).unflatten(3, (-1, 2))
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # of a patch the left column, then the right one
        _, x = self.norm(x)
        return self.reduction(x)


class ConvDownsample(nn.Module):
    """The same shapes as `PatchMerging` by a 2×2 convolution of stride 2 and LayerNorm: the paper's Table 7."""

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out_dim, kernel_size=2, stride=2)
        self.norm = nn.LayerNorm(out_dim, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(pad_to_even(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class SqueezeExcite(nn.Module):
    """Channel attention without biases (Fig. 5): from the means of a map's channels, (B, D), factors in (0, 1)."""

    def __init__(self, channels: int, reduction: int = 8) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, channels // reduction, bias=False)
        self.expand = nn.Linear(channels // reduction, channels, bias=False)

    def forward(self, means: Tensor) -> Tensor:
        return self.expand(F.relu(self.reduce(means))).sigmoid()


class ConvFFN(nn.Module):
    """The channel mixer (Fig. 5): 1×1 convolution to 2·dim, u + DWConv3×3(u), GELU, 1×1 convolution back."""

    def __init__(self, dim: int, expansion: int = 2, drop_rate: float = 0.0, backend: Backend = "auto") -> None:
        super().__init__()
        self.expand = PointwiseConv(dim, expansion * dim)
        self.dwconv = DepthwiseConv(expansion * dim, 3, backend=backend)
        self.reduce = PointwiseConv(expansion * dim, dim)
        self.drop = nn.Dropout(drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.expand(x)
        x = self.drop(self.dwconv(x, "gelu", residual=True))
        return self.drop(self.reduce(x))


def init_weights(module: nn.Module) -> None:
    """Initial values of Linears: normal, sigma 0.02, truncated, biases 0. Convolutions keep PyTorch's."""
    if isinstance(module, nn.Linear) and not isinstance(module, PointwiseConv):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
