"""The scan's public operators, and their registration with torch.

`auto` and `triton` go through operators registered with `torch.library`, which compile and FLOP counters see as one
call, on a GPU the Triton kernels, elsewhere the torch scan; `parallel` and `reference` are plain torch.

Autocast changes nothing: an operator takes its inputs in the dtypes they have, computes as `precision.py` says and
returns y in the dtype of u or x.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from . import parallel, reference, traced
from .checks import Backend, check_backend, check_floating, check_shape, exporting, runs_triton
from .precision import state_dtype
from .registration import register
from .routes import ROUTES


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of a sequence (Eqs. 1-4), with the arguments, layout and meaning that Mamba's users know.

    h_t = exp(Δ_t A) ∘ h_{t-1} + Δ_t B_t u_t,  y_t = (C_t · h_t + D ∘ u_t) ∘ SiLU(z_t). States and exponentials are
    float32 whatever the inputs and autocast are (float64 for float64 inputs). Batch B, channels D, length L, states N,
    groups G.

    Args:
        u: input, (B, D, L).
        delta: step sizes, (B, D, L).
        A: state matrix, real, (D, N).
        B: input projection, (B, N, L) or (B, G, N, L), a group serving D/G neighbouring channels.
        C: output projection, shaped as B.
        D: skip, (D,).
        z: gate, (B, D, L).
        delta_bias: added to delta before the softplus, (D,).
        delta_softplus: whether Δ is the softplus of delta.
        return_last_state: whether to return the last state too.
        backend: `auto` (Triton on a GPU, parallel on a CPU), `triton`, `parallel` or `reference`.

    Returns:
        y (B, D, L) in the dtype of u; with `return_last_state` also h_L (B, D, N) in the dtype of states.

    Raises:
        TypeError: an input is complex or not floating point.
        ValueError: shapes do not fit together, or the backend is unknown or cannot run here.

    Example:
        >>> u, delta = torch.randn(2, 8, 100), torch.rand(2, 8, 100)
        >>> A, B, C = -torch.rand(8, 4), torch.randn(2, 4, 100), torch.randn(2, 4, 100)
        >>> selective_scan(u, delta, A, B, C).shape
        torch.Size([2, 8, 100])
    """
    check_floating(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    check_shape("u", u, ("B", "D", "L"), {})
    batch, channels, length = u.shape
    known = {"B": batch, "D": channels, "L": length}
    check_shape("delta", delta, ("B", "D", "L"), known)
    check_shape("A", A, ("D", "N"), known)
    if B.dim() == 3:
        B = B.unsqueeze(1)
    if C.dim() == 3:
        C = C.unsqueeze(1)
    known["N"] = A.shape[1]
    check_shape("B", B, ("B", "G", "N", "L"), known)
    known["G"] = B.shape[1]
    check_shape("C", C, ("B", "G", "N", "L"), known)
    for name, t, dims in (("D", D, ("D",)), ("z", z, ("B", "D", "L")), ("delta_bias", delta_bias, ("D",))):
        if t is not None:
            check_shape(name, t, dims, known)
    if B.shape[1] == 0 or channels % B.shape[1]:
        raise ValueError(f"B has {B.shape[1]} groups, but u has {channels} channels; expected a divisor of them")

    arguments = (u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    states = state_dtype(u, delta, A, B, C)
    if check_backend(backend, u, states) == "reference":
        y, last = reference.selective_scan(*arguments)
    elif backend == "parallel":
        y, last, _ = _plain(_Parallel1d, parallel.selective_scan, arguments)
    else:
        y, last, _ = _scan_1d(*arguments, runs_triton(backend, u, states))
    return (y, last) if return_last_state else y


def selective_scan_2d(
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    routes: Sequence[tuple[str, int]],
    carry_state: bool,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """The S6 layer over a map walked on several routes (Eqs. 6-10), from its low-rank projections on.

    For each route with weight set s: Δ = softplus(dt_low · dt_weight[s]ᵀ + dt_bias[s]), A = -exp(A_log[s]), then the
    recurrence of `selective_scan` over the map's positions in the route's order, plus D_skip[s] ∘ x. States and
    exponentials are float32 whatever the inputs and autocast are (float64 for float64 inputs).

    Args:
        x: map, channels last, (B, H, W, D).
        x_dbl: the projections [dt_low, B, C] of x for each of S weight sets, (B, H, W, S, R + 2N).
        dt_weight: (S, D, R).
        dt_bias: (S, D).
        A_log: (S, D, N).
        D_skip: (S, D).
        routes: pairs of a route's name (`row`, `col`, `rowR`, `colR`) and its weight set.
        carry_state: whether neighbouring routes that share a weight set are one sequence, the state carried over the
            seam, as Eq. 9 concatenates the half-resolution routes; otherwise each route starts from a zero state.
        backend: `auto` (Triton on a GPU, parallel on a CPU), `triton`, `parallel` or `reference`.

    Returns:
        (B, K, H, W, D) in the dtype of x: each of the K routes, put back on the map.

    Raises:
        TypeError: an input is complex or not floating point.
        ValueError: shapes do not fit together, a route is unknown, or the backend is unknown or cannot run here.
    """
    check_floating(x=x, x_dbl=x_dbl, dt_weight=dt_weight, dt_bias=dt_bias, A_log=A_log, D_skip=D_skip)
    check_shape("x", x, ("B", "H", "W", "D"), {})
    known = dict(zip("BHWD", x.shape, strict=True))
    check_shape("dt_weight", dt_weight, ("S", "D", "R"), known)
    known["S"], known["R"] = dt_weight.shape[0], dt_weight.shape[2]
    check_shape("A_log", A_log, ("S", "D", "N"), known)
    known["R + 2N"] = dt_weight.shape[2] + 2 * A_log.shape[2]
    check_shape("x_dbl", x_dbl, ("B", "H", "W", "S", "R + 2N"), known)
    check_shape("dt_bias", dt_bias, ("S", "D"), known)
    check_shape("D_skip", D_skip, ("S", "D"), known)
    if not routes:
        raise ValueError("routes is empty; expected pairs of a route's name and its weight set, e.g. (('row', 0),)")
    for name, weight_set in routes:
        if name not in ROUTES:
            raise ValueError(f"route {name!r} is unknown; expected one of {', '.join(ROUTES)}")
        if not 0 <= weight_set < dt_weight.shape[0]:
            raise ValueError(f"route {name!r} names weight set {weight_set}, but there are {dt_weight.shape[0]}")

    weights = (x, x_dbl, dt_weight, dt_bias, A_log, D_skip)
    states = state_dtype(x, x_dbl, dt_weight, A_log)
    if check_backend(backend, x, states) == "reference":
        return reference.selective_scan_2d(*weights, tuple(routes), carry_state)
    if backend == "parallel" and exporting():
        return traced.selective_scan_2d(*weights, tuple(routes), carry_state)
    if backend == "parallel":
        return _plain(_Parallel2d, parallel.selective_scan_2d, (*weights, tuple(routes), carry_state))[0]
    names, sets = [ROUTES.index(name) for name, _ in routes], [weight_set for _, weight_set in routes]
    return _scan_2d(*weights, names, sets, carry_state, runs_triton(backend, x, states))[0]


# The registered operators: forward, backward, fake, autograd, FLOPs.


def _run_1d(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    triton: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, the last state and the states saved for the backward; `triton`: by its kernels, or in torch."""
    scan = _triton_1d() if triton else parallel
    y, last, saved = scan.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return y.contiguous(), last.contiguous(), saved


def _fake_1d(u, delta, A, B, C, D, z, delta_bias, delta_softplus, triton=False):
    dtype = state_dtype(u, delta, A, B, C)
    last = u.new_empty(u.shape[0], u.shape[1], A.shape[1], dtype=dtype)
    if triton:
        saved = _triton_1d().saved_numel_1d(u.shape, A.shape[1])
    else:
        saved = parallel.saved_numel_1d(u.shape, B.shape[1], A.shape[1], u.device)
    return u.new_empty(u.shape), last, u.new_empty(saved, dtype=dtype)


def _run_1d_backward(
    dy: Tensor,
    dlast: Tensor | None,
    saved: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    triton: bool = False,
) -> list[Tensor]:
    """Returns the gradients of u, delta, A, B, C, then of those of D, z, delta_bias that are given."""
    scan = _triton_1d() if triton else parallel
    gradients = scan.selective_scan_backward(dy, dlast, saved, u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return [g.contiguous() for g in gradients if g is not None]


def _fake_1d_backward(dy, dlast, saved, u, delta, A, B, C, D, z, delta_bias, delta_softplus, triton=False):
    return [t.new_empty(t.shape) for t in (u, delta, A, B, C, D, z, delta_bias) if t is not None]


def _run_2d(
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    routes: Sequence[int],
    sets: Sequence[int],
    carry_state: bool,
    triton: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the routes on the map and the states saved for the backward; routes are numbers into `ROUTES`."""
    scan = _triton_2d() if triton else parallel
    return scan.selective_scan_2d(x, x_dbl, dt_weight, dt_bias, A_log, D_skip, _pairs(routes, sets), carry_state)


def _fake_2d(x, x_dbl, dt_weight, dt_bias, A_log, D_skip, routes, sets, carry_state, triton=False):
    batch, height, width, channels = x.shape
    dtype = state_dtype(x, x_dbl, dt_weight, A_log)
    if triton:
        saved = _triton_2d().saved_numel_2d(x.shape, A_log.shape[2], _pairs(routes, sets), carry_state)
    else:
        saved = parallel.saved_numel_2d(x.shape, A_log.shape[2], [ROUTES[route] for route in routes], x.device)
    out = x.new_empty(batch, len(routes), height, width, channels)
    return out, x.new_empty(saved, dtype=dtype)


def _run_2d_backward(
    dy: Tensor,
    saved: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    routes: Sequence[int],
    sets: Sequence[int],
    carry_state: bool,
    triton: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, x_dbl, dt_weight, dt_bias, A_log and D_skip."""
    scan = _triton_2d() if triton else parallel
    gradients = scan.selective_scan_2d_backward(
        dy, saved, x, x_dbl, dt_weight, dt_bias, A_log, D_skip, _pairs(routes, sets), carry_state
    )
    dx, dx_dbl, dweight, dbias, dA_log, dskip = (g.contiguous() for g in gradients)
    return dx, dx_dbl, dweight, dbias, dA_log, dskip


def _fake_2d_backward(dy, saved, x, x_dbl, dt_weight, dt_bias, A_log, D_skip, routes, sets, carry_state, triton=False):
    return tuple(t.new_empty(t.shape) for t in (x, x_dbl, dt_weight, dt_bias, A_log, D_skip))


def _pairs(routes: Sequence[int], sets: Sequence[int]) -> list[tuple[str, int]]:
    return [(ROUTES[route], weight_set) for route, weight_set in zip(routes, sets, strict=True)]


def _triton_1d() -> ModuleType:
    from . import triton_1d

    return triton_1d


def _triton_2d() -> ModuleType:
    from . import triton_2d

    return triton_2d


def _keep_1d(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.options = inputs[8:]
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], *inputs[:8])


def _keep_2d(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.options = inputs[6:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # of the saved states, which are as large as the map
    ctx.save_for_backward(output[1], *inputs[:6])


def _gradients_1d(scan_backward: Callable, ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple:
    saved, *tensors = ctx.saved_tensors
    if dy is None and dlast is None:
        return (None,) * (len(tensors) + len(ctx.options))
    if dy is None:
        dy = torch.zeros_like(tensors[0])
    given = iter(g for g in scan_backward(dy, dlast, saved, *tensors, *ctx.options) if g is not None)
    return (*(None if t is None else next(given) for t in tensors), *(None for _ in ctx.options))


def _gradients_2d(scan_backward: Callable, ctx: Any, dy: Tensor | None) -> tuple:
    if dy is None:
        return (None,) * (len(ctx.saved_tensors) - 1 + len(ctx.options))
    return (*scan_backward(dy, *ctx.saved_tensors, *ctx.options), *(None for _ in ctx.options))


def _autograd_1d(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None) -> tuple:
    return _gradients_1d(_scan_1d_backward, ctx, dy, dlast)


def _autograd_2d(ctx: Any, dy: Tensor | None, _: None) -> tuple:
    return _gradients_2d(_scan_2d_backward, ctx, dy)


_scan_1d = register("selective_scan", _run_1d, _fake_1d, _keep_1d, _autograd_1d)
_scan_1d_backward = register("selective_scan_backward", _run_1d_backward, _fake_1d_backward)
_scan_2d = register("selective_scan_2d", _run_2d, _fake_2d, _keep_2d, _autograd_2d)
_scan_2d_backward = register("selective_scan_2d_backward", _run_2d_backward, _fake_2d_backward)


class _Parallel1d(torch.autograd.Function):
    """`backend="parallel"` with gradients: the same torch code, unregistered."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return parallel.selective_scan(*arguments)

    setup_context = staticmethod(_keep_1d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None, _: None) -> tuple:
        return _gradients_1d(parallel.selective_scan_backward, ctx, dy, dlast)


class _Parallel2d(torch.autograd.Function):
    """As `_Parallel1d`, over a map."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return parallel.selective_scan_2d(*arguments)

    setup_context = staticmethod(_keep_2d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple:
        return _gradients_2d(parallel.selective_scan_2d_backward, ctx, dy)


# A backward is counted as twice its forward, as torch counts those of matrix products and convolutions.


def flops_1d(batch: int, length: int, channels: int, d_state: int, skip: bool) -> int:
    """Operations of one scan in the paper's convention: 9·B·L·D·N, and B·L·D for the skip."""
    return 9 * batch * length * channels * d_state + skip * batch * length * channels


def flops_2d(batch: int, length: int, channels: int, d_state: int, rank: int, routes: int) -> int:
    """Operations of K routes in the paper's convention: `flops_1d` with a skip, and B·L·D·R for delta's projection."""
    return routes * (flops_1d(batch, length, channels, d_state, True) + batch * length * channels * rank)


@register_flop_formula(torch.ops.msv.selective_scan)
def _(u, delta, A, B, C, D, *args, **kwargs) -> int:
    return flops_1d(u[0], u[2], u[1], A[1], D is not None)


@register_flop_formula(torch.ops.msv.selective_scan_2d)
def _(x, x_dbl, dt_weight, dt_bias, A_log, D_skip, routes, *args, **kwargs) -> int:
    return flops_2d(x[0], x[1] * x[2], x[3], A_log[2], dt_weight[2], len(routes))


@register_flop_formula(torch.ops.msv.selective_scan_backward)
def _(dy, dlast, saved, u, delta, A, B, C, D, *args, **kwargs) -> int:
    return 2 * flops_1d(u[0], u[2], u[1], A[1], D is not None)


@register_flop_formula(torch.ops.msv.selective_scan_2d_backward)
def _(dy, saved, x, x_dbl, dt_weight, dt_bias, A_log, D_skip, routes, *args, **kwargs) -> int:
    return 2 * flops_2d(x[0], x[1] * x[2], x[3], A_log[2], dt_weight[2], len(routes))


def _plain(function: Any, scan: Callable, arguments: tuple) -> tuple:
    """The torch scan outside the registered operators."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
        return function.apply(*arguments)
    return scan(*arguments)
