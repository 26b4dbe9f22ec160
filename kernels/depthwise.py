"""Depthwise convolutions of channels-last maps, with bias, activation and residual sum in one operator.

Backends are those of the scans: `reference`, the definition; `parallel`, torch's convolution, which a CPU runs and an
exported program holds; `triton`, kernels registered with `torch.library`, one call to compile and FLOP counters.

Autocast changes nothing: y has the dtype of x, and weights need not have it.
"""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .checks import Backend, check_floating, check_shape, exporting, settle_backend
from .precision import outside_autocast, state_dtype
from .registration import register

Activation = Literal["none", "silu", "gelu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: int = 1,
    activation: Activation = "none",
    residual: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """activation(conv(x) + bias), or with `residual` activation(x + conv(x) + bias), each channel convolved by itself.

    The map is padded with K // 2 zeros on each side. Sums are float32 whatever the inputs are (float64 for float64
    inputs), but those of `parallel`, which are as torch's convolution makes them from weights in the dtype of x.

    Args:
        x: map, channels last, (B, H, W, C); read where it lies if its channels lie side by side.
        weight: (C, 1, K, K), as of a Conv2d with C groups; K odd.
        bias: (C,).
        stride: 1 or 2, in both directions.
        activation: `none`, `silu`, or `gelu`, the exact one.
        residual: whether the map itself is added, which needs stride 1.
        backend: `auto` (Triton on a GPU, parallel on a CPU and in an export), `triton`, `parallel` or `reference`.

    Returns:
        (B, ceil(H / stride), ceil(W / stride), C) in the dtype of x.

    Raises:
        TypeError: an input is complex or not floating point.
        ValueError: shapes do not fit together, an option is unknown, or the backend is unknown or cannot run here.
    """
    check_floating(x=x, weight=weight, bias=bias)
    check_shape("x", x, ("B", "H", "W", "C"), {})
    known = {"C": x.shape[3]}
    check_shape("weight", weight, ("C", 1, "K", "K"), known)
    check_shape("bias", bias, ("C",), known)
    if weight.shape[2] % 2 == 0:
        raise ValueError(f"weight has a kernel of {weight.shape[2]}×{weight.shape[2]}; expected an odd size")
    if stride not in (1, 2):
        raise ValueError(f"stride is {stride}; expected 1 or 2")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is unknown; expected one of {', '.join(ACTIVATIONS)}")
    if residual and stride != 1:
        raise ValueError(f"residual adds x to a map of the same size, but stride is {stride}; use 1, or no residual")
    arguments = (x, weight, bias, stride, activation, residual)
    chosen = settle_backend(backend, x, state_dtype(x, weight, bias))
    if chosen != "triton":
        return (reference if chosen == "reference" else parallel)(*arguments)
    trained = torch.is_grad_enabled() and any(t.requires_grad for t in arguments[:3])
    keep = trained and activation != "none" and not _triton().convolves_again(weight.shape[2], stride)
    return _depthwise_conv(*arguments, keep)[0]


@outside_autocast
def reference(x: Tensor, weight: Tensor, bias: Tensor, stride: int, activation: str, residual: bool) -> Tensor:
    """The definition: a sum over the kernel's weights, each times the map moved by its place. Read this first."""
    dtype = state_dtype(x, weight, bias)
    height, width = x.shape[1:3]
    size, wide = weight.shape[2], x.to(dtype)
    padded = F.pad(wide, (0, 0, *[size // 2] * 4))
    y = bias.to(dtype) + (wide if residual else 0)
    for i in range(size):
        for j in range(size):
            y = y + weight[:, 0, i, j].to(dtype) * padded[:, i : i + height : stride, j : j + width : stride]
    return _activate(y, activation).to(x.dtype)


@outside_autocast
def parallel(x: Tensor, weight: Tensor, bias: Tensor, stride: int, activation: str, residual: bool) -> Tensor:
    """The same by torch's convolution."""
    size, channels = weight.shape[2], x.shape[3]
    dtype = x.dtype
    if dtype == torch.bfloat16 and x.device.type == "cpu" and not exporting():
        reached = (stride * ((side - 1) // stride) for side in x.shape[1:3])  # the last row and column of outputs
        if min(reached) < size // 2:
            # Some weights meet no pixel; of those in bf16 oneDNN returns gradients of whatever memory holds.
            dtype = torch.float32
    y = F.conv2d(x.permute(0, 3, 1, 2).to(dtype), weight.to(dtype), bias.to(dtype), stride, size // 2, groups=channels)
    y = y.permute(0, 2, 3, 1).to(x.dtype)
    if torch.is_grad_enabled():
        return _activate(x + y if residual else y, activation)
    return _activate(y.add_(x) if residual else y, activation, inplace=True)  # fresh memory costs more than the sums


def _activate(y: Tensor, activation: str, inplace: bool = False) -> Tensor:
    if activation == "none":
        return y
    if activation == "silu":
        return F.silu(y, inplace)
    return torch.ops.aten.gelu_(y) if inplace else F.gelu(y)


# The registered operator: forward, backward, fake, autograd, FLOPs.


def _run(
    x: Tensor, weight: Tensor, bias: Tensor, stride: int, activation: str, residual: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, with `keep` what the activation was applied to, else nothing, and the weights that kernels read."""
    return _triton().depthwise_conv(x, weight, bias, stride, activation, residual, keep)


def _fake(x, weight, bias, stride, activation, residual, keep):
    batch, height, width, channels = x.shape
    y = x.new_empty(batch, -(-height // stride), -(-width // stride), channels)
    blocks = x.new_empty(_triton().blocks_shape(weight.shape), dtype=torch.float32)
    return y, x.new_empty(y.shape if keep else 0), blocks


def _run_backward(
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
    """Returns the gradients of x, weight and bias."""
    return _triton().depthwise_conv_backward(dy, pre, blocks, x, weight, bias, stride, activation, residual)


def _fake_backward(dy, pre, blocks, x, weight, bias, stride, activation, residual):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.options = inputs[3:6]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[1:], *inputs[:3])


def _gradients(ctx: Any, dy: Tensor | None, *_: None) -> tuple:
    if dy is None:
        return (None,) * 7
    return (*_depthwise_conv_backward(dy, *ctx.saved_tensors, *ctx.options), None, None, None, None)


_depthwise_conv = register("depthwise_conv", _run, _fake, _keep, _gradients)
_depthwise_conv_backward = register("depthwise_conv_backward", _run_backward, _fake_backward)


@register_flop_formula(torch.ops.msv.depthwise_conv)
def _(x, weight, bias, stride, *args, **kwargs) -> int:
    batch, height, width, channels = x
    return 2 * batch * -(-height // stride) * -(-width // stride) * channels * weight[2] * weight[3]


@register_flop_formula(torch.ops.msv.depthwise_conv_backward)
def _(dy, pre, blocks, x, weight, *args, **kwargs) -> int:
    """Twice the forward's, for the gradients of x and of weight, as of torch's convolution."""
    batch, height, width, channels = dy
    return 4 * batch * height * width * channels * weight[2] * weight[3]


def _triton() -> Any:
    from . import triton_depthwise

    return triton_depthwise
