"""What joins the layers of a residual network: the sum of a map and a branch, and its LayerNorm; one operator.

Backends are those of the scans: `reference`, the definition; `parallel`, torch's sum and LayerNorm, which a CPU runs
and an exported program holds; `triton`, kernels registered with `torch.library`.

Under autocast the norm has autocast's dtype, since what reads it are matrix products, which would round it so; of
`parallel` it is what torch makes it, float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Backend, check_floating, check_shape, settle_backend
from .precision import outside_autocast, state_dtype
from .registration import register


def add_norm(
    x: Tensor,
    branch: Tensor | None,
    factors: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The sum x + factors ∘ branch, and its LayerNorm over channels; without a branch x itself, and its.

    The sum is rounded to the wider of both dtypes, and normalised as it is then. All is computed in float32 whatever
    the inputs are (float64 for float64 inputs); of `parallel`, as torch does.

    Args:
        x: map, channels last, (B, H, W, C).
        branch: what is added to it, (B, H, W, C).
        factors: of the branch, one an image, (B,), as stochastic depth draws them; None for 1. No gradient flows there.
        weight: LayerNorm's, (C,).
        bias: (C,).
        eps: LayerNorm's.
        backend: `auto` (Triton on a GPU, parallel on a CPU and in an export), `triton`, `parallel` or `reference`.

    Returns:
        The sum, and its norm in the same dtype or that of autocast; both (B, H, W, C).

    Raises:
        TypeError: an input is complex or not floating point.
        ValueError: shapes do not fit together, there are factors of no branch, or the backend is unknown or cannot run
            here.
    """
    check_floating(x=x, branch=branch, factors=factors, weight=weight, bias=bias)
    check_shape("x", x, ("B", "H", "W", "C"), {})
    known = dict(zip("BHWC", x.shape, strict=True))
    for name, t, dims in (
        ("branch", branch, tuple("BHWC")),
        ("factors", factors, ("B",)),
        ("weight", weight, ("C",)),
        ("bias", bias, ("C",)),
    ):
        if t is not None:
            check_shape(name, t, dims, known)
    if factors is not None and branch is None:
        raise ValueError("there are factors, but branch is None; expected what they multiply, or no factors")
    chosen = settle_backend(backend, x, state_dtype(x, branch, factors, weight, bias))
    if chosen == "parallel":
        return parallel(x, branch, factors, weight, bias, eps)
    sum_dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else sum_dtype
    if chosen == "reference":
        return reference(x, branch, factors, weight, bias, eps, sum_dtype, dtype)
    total, out = _add_norm(x, branch, factors, weight, bias, eps, sum_dtype, dtype)
    return x if branch is None else total, out


def add_branch(x: Tensor, branch: Tensor | None, factors: Tensor | None) -> Tensor:
    """The sum of `add_norm` without its norm, in torch; x itself where there is no branch."""
    if branch is None:
        return x
    return x + (branch if factors is None else branch * factors.to(branch.dtype)[:, None, None, None])


@outside_autocast
def reference(
    x: Tensor,
    branch: Tensor | None,
    factors: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    sum_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The definition, in the dtype of states. Read this first."""
    wide = state_dtype(x, branch, factors, weight, bias)
    total = x.to(wide)
    if branch is not None:
        scale = 1 if factors is None else factors.to(wide)[:, None, None, None]
        total = total + scale * branch.to(wide)
    total = total.to(sum_dtype)
    centred = total.to(wide) - total.to(wide).mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    return total, (centred / deviation * weight.to(wide) + bias.to(wide)).to(dtype)


def parallel(
    x: Tensor, branch: Tensor | None, factors: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """By torch's LayerNorm, in the dtypes that it chooses."""
    x = add_branch(x, branch, factors)
    return x, F.layer_norm(x, x.shape[-1:], weight, bias, eps)


# The registered operator: forward, backward, fake, autograd.


def _run(
    x: Tensor,
    branch: Tensor | None,
    factors: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    sum_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Returns the sum, empty where there is no branch, and its norm."""
    return _triton().add_norm(x, branch, factors, weight, bias, eps, sum_dtype, dtype)


def _fake(x, branch, factors, weight, bias, eps, sum_dtype, dtype):
    total = x.new_empty(0 if branch is None else x.shape, dtype=sum_dtype)
    return total, x.new_empty(x.shape, dtype=dtype)


def _run_backward(
    dout: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    factors: Tensor | None,
    weight: Tensor,
    eps: float,
    apart: bool,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, with `apart` of the branch, else empty, and of the norm, (2, C) in float32."""
    return _triton().add_norm_backward(dout, dsum, total, factors, weight, eps, apart, branch_dtype)


def _fake_backward(dout, dsum, total, factors, weight, eps, apart, branch_dtype):
    dbranch = total.new_empty(total.shape if apart else 0, dtype=branch_dtype)
    return total.new_empty(total.shape), dbranch, total.new_empty((2, total.shape[3]), dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, branch, factors, weight, bias, ctx.eps, *_ = inputs
    total = output[0]
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, branch, weight, bias))
    ctx.set_materialize_grads(False)
    if branch is None:
        ctx.mark_non_differentiable(total)
        total = x
    ctx.save_for_backward(total, factors, weight)


def _gradients(ctx: Any, dsum: Tensor | None, dout: Tensor | None) -> tuple:
    total, factors, weight = ctx.saved_tensors
    x_dtype, branch_dtype, *norm_dtypes = ctx.dtypes
    if dout is None:  # only the sum was used
        if dsum is None:
            return (None,) * 8
        dbranch = None if branch_dtype is None else dsum if factors is None else dsum * factors[:, None, None, None]
        return dsum.to(x_dtype), None if dbranch is None else dbranch.to(branch_dtype), *(None,) * 6
    apart = branch_dtype is not None and (factors is not None or branch_dtype != total.dtype)
    options = (apart, branch_dtype or total.dtype)
    dx, dbranch, of_norm = _add_norm_backward(dout, dsum, total, factors, weight, ctx.eps, *options)
    if branch_dtype is None:
        dbranch = None
    elif not apart:
        dbranch = dx
    norms = (t.to(dtype) for t, dtype in zip(of_norm.unbind(), norm_dtypes, strict=True))
    return dx.to(x_dtype), dbranch, None, *norms, None, None, None


_add_norm = register("add_norm", _run, _fake, _keep, _gradients)
_add_norm_backward = register("add_norm_backward", _run_backward, _fake_backward)


def _triton() -> Any:
    from . import triton_norm

    return triton_norm
