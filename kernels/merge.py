"""What follows the scans in a mixer: routes become one map (Eq. 11), which z gates; two operators.

Backends are those of the scans: `reference`, the definition; `parallel`, the same in torch's LayerNorm and
interpolation, which a CPU runs and an exported program holds; `triton`, kernels registered with `torch.library`.

Autocast changes nothing about `triton` and `reference`: a map has the dtype of the routes, and all between is float32.
`parallel` is what torch makes of it, whose LayerNorm under autocast returns float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import Backend, check_floating, check_shape, exporting, settle_backend
from .precision import outside_autocast, state_dtype
from .registration import register


def merge_routes(
    y_full: Tensor | None,
    y_half: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_half: Tensor | None,
    bias_half: Tensor | None,
    size: tuple[int, int],
    eps: float = 1e-5,
    sum_first: bool = False,
    means: bool = False,
    *,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor | None]:
    """LayerNorm of the full routes' sum, plus the half routes' LayerNorms summed and upsampled bilinearly.

    Either branch may be missing. Sums, LayerNorm and interpolation are float32 whatever the inputs are (float64 for
    float64 inputs); of `parallel`, what torch makes them.

    Args:
        y_full: routes on the full map, (B, Kf, H, W, D).
        y_half: routes on the half map, (B, Kh, ceil(H/2), ceil(W/2), D).
        weight: LayerNorm's on the full map, (D,).
        bias: (D,).
        weight_half: LayerNorm's on the half map, (D,); may be `weight` itself.
        bias_half: (D,).
        size: (H, W).
        eps: LayerNorm's.
        sum_first: whether the half routes too are normalised after their sum, not each before it.
        means: whether the channels' means are wanted, for squeeze-excitation.
        backend: `auto` (Triton on a GPU, parallel on a CPU and in an export), `triton`, `parallel` or `reference`.

    Returns:
        The map (B, H, W, D) in the dtype of the routes, and with `means` its channels' means (B, D) in the dtype of
        the map; else None.

    Raises:
        TypeError: an input is complex or not floating point.
        ValueError: there are no routes, shapes do not fit together, or the backend is unknown or cannot run here.
    """
    tensors = {"y_full": y_full, "y_half": y_half, "weight": weight, "bias": bias}
    tensors |= {"weight_half": weight_half, "bias_half": bias_half}
    check_floating(**tensors)
    some = y_full if y_full is not None else y_half
    if some is None:
        raise ValueError("y_full and y_half are both None; expected routes on the full map, on the half map, or both")
    height, width = size
    known: dict[str, int] = {}
    branches = (("y_full", y_full, (height, width)), ("y_half", y_half, (-(-height // 2), -(-width // 2))))
    for name, y, (rows, columns) in branches:
        suffix = name.removeprefix("y_full").removeprefix("y")
        if y is None:
            continue
        check_shape(name, y, ("B", "K", "H", "W", "D"), {})
        known = known or {"B": y.shape[0], "D": y.shape[4]}
        # An export knows no sizes, and would take what is asked of them for a promise of its own.
        sides = {} if exporting() else {"H": rows, "W": columns}
        check_shape(name, y, ("B", "K", "H", "W", "D"), {**known, **sides})
        for part in ("weight", "bias"):
            t = tensors[part + suffix]
            if t is None:
                raise ValueError(f"{part}{suffix} is None, but there is {name}; expected LayerNorm's, of shape (D,)")
            check_shape(part + suffix, t, ("D",), known)
    arguments = (y_full, y_half, weight, bias, weight_half, bias_half, height, width, eps, sum_first, means)
    chosen = settle_backend(backend, some, state_dtype(*tensors.values()))
    if chosen != "triton":
        return (reference if chosen == "reference" else parallel)(*arguments)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors.values())
    m, found, _, _ = _merge_routes(*arguments, keep)
    return m, found if means else None


def gate(m: Tensor, scale: Tensor | None, z: Tensor, *, backend: Backend = "auto") -> Tensor:
    """A map times squeeze-excitation's factors of its channels, if any, and times its gate (Fig. 5): m ∘ s ∘ SiLU(z).

    Args:
        m: map, (B, H, W, D).
        scale: (B, D).
        z: (B, H, W, D); read where it lies if it is half of a map's channels.
        backend: as of `merge_routes`.

    Returns:
        (B, H, W, D), in the dtype of m; of `parallel`, what torch makes it.

    Raises:
        TypeError: an input is complex or not floating point.
        ValueError: shapes do not fit together, or the backend is unknown or cannot run here.
    """
    check_floating(m=m, scale=scale, z=z)
    check_shape("m", m, ("B", "H", "W", "D"), {})
    known = dict(zip("BHWD", m.shape, strict=True))
    check_shape("z", z, ("B", "H", "W", "D"), known)
    if scale is not None:
        check_shape("scale", scale, ("B", "D"), known)
    chosen = settle_backend(backend, m, state_dtype(m, scale, z))
    if chosen != "triton":
        return (reference_gate if chosen == "reference" else parallel_gate)(m, scale, z)
    return _gate(m, scale, z)


def upsample(x: Tensor, size: tuple[int, int] | torch.Size) -> Tensor:
    """Bilinear interpolation of a channels-last map to height and width `size` (Eq. 11)."""
    x = F.interpolate(x.permute(0, 3, 1, 2), size=tuple(size), mode="bilinear", align_corners=False)
    return x.permute(0, 2, 3, 1)


@outside_autocast
def reference(
    y_full: Tensor | None,
    y_half: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_half: Tensor | None,
    bias_half: Tensor | None,
    height: int,
    width: int,
    eps: float,
    sum_first: bool,
    means: bool,
) -> tuple[Tensor, Tensor | None]:
    """The definition, in the dtype of states. Read this first."""
    tensors = (y_full, y_half, weight, bias, weight_half, bias_half)
    dtype = state_dtype(*tensors)
    out_dtype = next(y.dtype for y in (y_full, y_half) if y is not None)
    y_full, y_half, weight, bias, weight_half, bias_half = (None if t is None else t.to(dtype) for t in tensors)
    m, found = parallel(y_full, y_half, weight, bias, weight_half, bias_half, height, width, eps, sum_first, means)
    return m.to(out_dtype), None if found is None else found.to(out_dtype)


def parallel(
    y_full: Tensor | None,
    y_half: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_half: Tensor | None,
    bias_half: Tensor | None,
    height: int,
    width: int,
    eps: float,
    sum_first: bool,
    means: bool,
) -> tuple[Tensor, Tensor | None]:
    """By torch's LayerNorm and interpolation, in the dtypes that they choose."""
    found = []
    if y_full is not None:
        summed = y_full[:, 0] if y_full.shape[1] == 1 else y_full.sum(dim=1)
        found.append(F.layer_norm(summed, y_full.shape[-1:], weight, bias, eps))
    if y_half is not None:
        routes = y_half.sum(dim=1, keepdim=True) if sum_first else y_half
        half = F.layer_norm(routes, routes.shape[-1:], weight_half, bias_half, eps).sum(dim=1)
        found.append(upsample(half, (height, width)))
    m = found[0]
    if len(found) == 2:
        m = m + found[1] if torch.is_grad_enabled() else m.add_(found[1])
    return m, m.mean(dim=(1, 2)) if means else None


@outside_autocast
def reference_gate(m: Tensor, scale: Tensor | None, z: Tensor) -> Tensor:
    """The definition, in the dtype of states."""
    dtype = state_dtype(m, scale, z)
    return parallel_gate(m.to(dtype), None if scale is None else scale.to(dtype), z.to(dtype)).to(m.dtype)


def parallel_gate(m: Tensor, scale: Tensor | None, z: Tensor) -> Tensor:
    """In the dtypes that torch chooses."""
    if torch.is_grad_enabled() or m.dtype != z.dtype:
        return (m if scale is None else m * scale[:, None, None]) * F.silu(z)
    y = F.silu(z).mul_(m)  # in place, as fresh memory costs more than products
    return y if scale is None else y.mul_(scale[:, None, None])


# The registered operators: forward, backward, fake, autograd.


def _run_merge(
    y_full: Tensor | None,
    y_half: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    weight_half: Tensor | None,
    bias_half: Tensor | None,
    height: int,
    width: int,
    eps: float,
    sum_first: bool,
    means: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the map, its channels' means, and with `keep` the sums of full and of half routes; or empty tensors."""
    arguments = (y_full, y_half, weight, bias, weight_half, bias_half, height, width, eps, sum_first, means, keep)
    return _triton().merge_routes(*arguments)


def _fake_merge(y_full, y_half, weight, bias, weight_half, bias_half, height, width, eps, sum_first, means, keep):
    some = y_full if y_full is not None else y_half
    batch, channels = some.shape[0], some.shape[4]
    sums = []
    for y, summed in ((y_full, True), (y_half, sum_first)):
        kept = keep and summed and y is not None and y.shape[1] > 1
        sums.append(some.new_empty((batch, 1, *y.shape[2:]) if kept else 0))
    found = some.new_empty((batch, channels) if means else 0)
    return some.new_empty(batch, height, width, channels), found, *sums


def _run_merge_backward(
    dm: Tensor,
    dmeans: Tensor | None,
    full: Tensor | None,
    half: Tensor | None,
    weight: Tensor | None,
    weight_half: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """Returns the gradients of the full routes and of their LayerNorm, (2, D) in float32, then those of the half's.

    Routes that were summed first all have the same gradient, which stands there once.
    """
    return _triton().merge_routes_backward(dm, dmeans, full, half, weight, weight_half, eps)


def _fake_merge_backward(dm, dmeans, full, half, weight, weight_half, eps):
    found = []
    for y in (full, half):
        if y is not None:
            found += [y.new_empty(y.shape), y.new_empty((2, y.shape[4]), dtype=torch.float32)]
    return found


def _keep_routes(ctx: Any, inputs: tuple, output: tuple) -> None:
    full, half, *norms = inputs[:6]
    *_, full_sum, half_sum = output
    ctx.routes = tuple(None if y is None else y.shape[1] for y in (full, half))
    ctx.dtypes = tuple(None if t is None else t.dtype for t in norms)
    ctx.eps, ctx.shape = inputs[8], output[0].shape
    ctx.mark_non_differentiable(full_sum, half_sum)
    ctx.set_materialize_grads(False)
    full, half = _normalised(full, full_sum, True), _normalised(half, half_sum, inputs[9])
    ctx.save_for_backward(full, half, norms[0], norms[2])


def _normalised(y: Tensor | None, kept: Tensor, summed: bool) -> Tensor | None:
    """What was normalised of a branch: its routes, or their sum, made again where it was not kept."""
    if y is None or not summed or y.shape[1] == 1:
        return y
    return kept if kept.numel() else y.sum(1, keepdim=True, dtype=y.dtype)


def _route_gradients(ctx: Any, dm: Tensor | None, dmeans: Any, *_: Any) -> tuple:
    if dm is None and dmeans is None:
        return (None,) * 12
    if dm is None:  # only the means were used
        dm = dmeans.new_zeros(ctx.shape)
    found = iter(_merge_routes_backward(dm, dmeans, *ctx.saved_tensors, ctx.eps))
    routes: list[Tensor | None] = []
    norms: list[Tensor | None] = []
    for number, dtypes in zip(ctx.routes, (ctx.dtypes[:2], ctx.dtypes[2:]), strict=True):
        if number is None:
            routes.append(None)
            norms += [None, None]
        else:
            of_routes = next(found)
            if of_routes.shape[1] != number:  # of a sum, the same for every route
                of_routes = of_routes.expand(-1, number, -1, -1, -1)
            routes.append(of_routes)
            norms += [t.to(dtype) for t, dtype in zip(next(found).unbind(), dtypes, strict=True)]
    return (*routes, *norms, None, None, None, None, None, None)


_merge_routes = register("merge_routes", _run_merge, _fake_merge, _keep_routes, _route_gradients)
_merge_routes_backward = register("merge_routes_backward", _run_merge_backward, _fake_merge_backward)


def _run_gate(m: Tensor, scale: Tensor | None, z: Tensor) -> Tensor:
    return _triton().gate(m, scale, z)


def _fake_gate(m, scale, z):
    return m.new_empty(m.shape)


def _run_gate_backward(dout: Tensor, m: Tensor, scale: Tensor | None, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of m, scale and z; that of scale is empty where there is none."""
    return _triton().gate_backward(dout, m, scale, z)


def _fake_gate_backward(dout, m, scale, z):
    return m.new_empty(m.shape), m.new_empty(0) if scale is None else scale.new_empty(scale.shape), z.new_empty(z.shape)


def _keep_gate(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gate_gradients(ctx: Any, dout: Tensor) -> tuple:
    m, scale, z = ctx.saved_tensors
    dm, dscale, dz = _gate_backward(dout, m, scale, z)
    return dm, None if scale is None else dscale, dz


_gate = register("gate", _run_gate, _fake_gate, _keep_gate, _gate_gradients)
_gate_backward = register("gate_backward", _run_gate_backward, _fake_gate_backward)


def _triton() -> Any:
    from . import triton_merge

    return triton_merge
