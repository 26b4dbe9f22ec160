"""The two operators in torch operations alone: what runs on a CPU, and wherever there is no kernel.

Both turn their inputs into lines (see `lines.py`). Reverse routes walk the same memory from its end, transposed ones
through a transposed view, so nothing is flipped or copied into a route's order.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .lines import Lines, line_counts, saved_shape_of, walk_backward, walk_forward
from .precision import outside_autocast, state_dtype
from .routes import sequences


@outside_autocast
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The 1-D operator; arguments as in `msv.kernels.selective_scan`, B and C of shape (B, G, N, L).

    Returns:
        y (B, D, L), the last state (B, D, N), and the saved states that `selective_scan_backward` wants.
    """
    dtype = state_dtype(u, delta, A, B, C)
    (batch, channels, length), d_state = u.shape, A.shape[1]
    y, last, saved = torch.empty_like(u), u.new_empty(batch, channels, d_state, dtype=dtype), []
    for part in _groups(u, B):
        lines = _cut(part, u, delta, A, B, C, delta_bias, delta_softplus, dtype)
        out = torch.empty_like(lines.u)
        states = out.new_empty(lines.saved_shape())
        h = walk_forward(lines, out.new_zeros(batch, *lines.A.shape), None, out, states)
        y_part = _uncut(out, length)
        if D is not None:
            y_part = y_part + D[part.channels, None].to(dtype) * u[:, part.channels]
        if z is not None:
            y_part = y_part * F.silu(z[:, part.channels].to(dtype))
        _put(y[:, part.channels], y_part)
        last[:, part.channels] = h.mT
        saved.append(states.flatten())
    return y, last, torch.cat(saved)


@outside_autocast
def selective_scan_backward(
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
) -> tuple[Tensor | None, ...]:
    """Gradients of u, delta, A, B, C, D, z and delta_bias, each in its input's dtype; None where the input is None."""
    dtype = state_dtype(u, delta, A, B, C)
    batch, _, length = u.shape
    du, ddelta, dA, dB, dC = (torch.empty_like(t) for t in (u, delta, A, B, C))
    dD, dz, dbias = (None if t is None else torch.empty_like(t) for t in (D, z, delta_bias))
    for part in _groups(u, B):
        own = part.channels
        lines = _cut(part, u, delta, A, B, C, delta_bias, delta_softplus, dtype)
        shape = lines.saved_shape()
        states, saved = saved.split([math.prod(shape), saved.numel() - math.prod(shape)])
        dy_part, u_part = dy[:, own].to(dtype), u[:, own].to(dtype)
        if z is not None and dz is not None:
            # The gate's gradient needs y before the gate, which is not kept.
            y = torch.empty_like(lines.u)
            walk_forward(lines, y.new_zeros(batch, *lines.A.shape), None, y, torch.empty_like(states).view(shape))
            y = _uncut(y, length) if D is None else _uncut(y, length) + D[own, None].to(dtype) * u_part
            wide = z[:, own].to(dtype)
            gate = torch.sigmoid(wide)
            dz[:, own] = (dy_part * y * gate * (1 + wide * (1 - gate))).to(z.dtype)
            dy_part = dy_part * wide * gate
        into = lines.zero_gradients()
        dh = None if dlast is None else dlast[:, own].to(dtype).mT.contiguous()
        walk_backward(lines, into, _to_lines(dy_part, lines.u.shape[:2]), dh, None, states.view(shape))
        du_part, ddelta_part = _uncut(into.u, length), _uncut(into.delta, length)
        if D is not None and dD is not None:
            du_part = du_part + D[own, None].to(dtype) * dy_part
            dD[own] = (dy_part * u_part).sum(dim=(0, 2)).to(D.dtype)
        if delta_softplus:
            step = _uncut(lines.delta, length)
            ddelta_part = ddelta_part * -torch.expm1(-step)  # softplus' = sigmoid = 1 - exp(-softplus)
        if delta_bias is not None and dbias is not None:
            dbias[own] = ddelta_part.sum(dim=(0, 2)).to(delta_bias.dtype)
        _put(du[:, own], du_part)
        _put(ddelta[:, own], ddelta_part)
        dA[own] = into.A.mT.to(A.dtype)
        dB[:, part.number], dC[:, part.number] = _uncut(into.B, length).to(B.dtype), _uncut(into.C, length).to(C.dtype)
    return du, ddelta, dA, dB, dC, dD, dz, dbias


def saved_numel_1d(shape: Sequence[int], groups: int, d_state: int, device: torch.device) -> int:
    """The number of states that `selective_scan` saves for u of shape (B, D, L)."""
    batch, channels, length = shape
    lines = line_counts(length, batch * d_state * channels // groups, device)
    return groups * math.prod(saved_shape_of(*lines, batch, d_state, channels // groups, device))


@outside_autocast
def selective_scan_2d(
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    routes: Sequence[tuple[str, int]],
    carry_state: bool,
) -> tuple[Tensor, Tensor]:
    """The 2-D operator; arguments as in `msv.kernels.selective_scan_2d`.

    Returns:
        (B, K, H, W, D), and the saved states that `selective_scan_2d_backward` wants, flat.
    """
    dtype = state_dtype(x, x_dbl, dt_weight, A_log)
    out = x.new_empty(x.shape[0], len(routes), *x.shape[1:])
    skip, saved = D_skip.to(dtype), []
    weights = (x, x_dbl, dt_weight, dt_bias, A_log)
    prepared = [_on_map(s, *weights, dtype, keep_raw=False)[0] for s in range(dt_weight.shape[0])]
    for sequence in sequences(tuple(s for _, s in routes), carry_state):
        h = skip.new_zeros(x.shape[0], A_log.shape[2], x.shape[3])
        for route in sequence:
            name, weight_set = routes[route]
            lines, y = prepared[weight_set].along(name), _map_lines(out[:, route])
            y = y.transpose(0, 1) if name.startswith("col") else y
            states = h.new_empty(lines.saved_shape())
            h = walk_forward(lines, h, skip[weight_set], y, states)
            saved.append(states.flatten())
    return out, torch.cat(saved)


@outside_autocast
def selective_scan_2d_backward(
    dy: Tensor,
    saved: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    routes: Sequence[tuple[str, int]],
    carry_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, x_dbl, dt_weight, dt_bias, A_log and D_skip, each in its input's dtype."""
    dtype, out_dtype = state_dtype(x, x_dbl, dt_weight, A_log), x.dtype
    rank, d_state, skip = dt_weight.shape[2], A_log.shape[2], D_skip.to(dtype)
    x, dy = x.to(dtype), dy.to(dtype)
    dx, dx_dbl = torch.zeros_like(x), torch.zeros_like(x_dbl, dtype=dtype)
    dweight, dbias, dA_log, dskip = (torch.zeros_like(t, dtype=dtype) for t in (dt_weight, dt_bias, A_log, D_skip))
    walked = sequences(tuple(s for _, s in routes), carry_state)
    sizes = [
        saved_numel_2d(x.shape, d_state, [routes[route][0]], x.device) for sequence in walked for route in sequence
    ]
    states = dict(zip((route for sequence in walked for route in sequence), saved.split(sizes), strict=True))
    for weight_set in range(dt_weight.shape[0]):
        on_map, raw = _on_map(weight_set, x, x_dbl, dt_weight, dt_bias, A_log, dtype)
        dlow, dB, dC = dx_dbl[..., weight_set, :].split([rank, d_state, d_state], dim=-1)
        ddelta, dA = torch.zeros_like(raw), torch.zeros_like(on_map.A)
        into = Lines(dx, ddelta, dA, dB, dC).apply(_map_lines)
        for sequence in walked:
            dh = None
            for route in reversed([route for route in sequence if routes[route][1] == weight_set]):
                name = routes[route][0]
                dy_lines = _map_lines(dy[:, route])
                dskip[weight_set] += (dy_lines * on_map.u).sum(dim=(0, 1, 2))
                lines, own = on_map.along(name), states[route]
                dy_lines = dy_lines.transpose(0, 1) if name.startswith("col") else dy_lines
                own = own.view(lines.saved_shape())
                dh = walk_backward(lines, into.along(name), dy_lines, dh, skip[weight_set], own)
        draw = torch.ops.aten.softplus_backward(ddelta, raw, 1, 20).flatten(0, 2)  # (B·H·W, D)
        dlow.copy_((draw @ dt_weight[weight_set].to(dtype)).view_as(dlow))
        dweight[weight_set] = draw.mT @ x_dbl[..., weight_set, :rank].to(dtype).reshape(-1, rank)
        dbias[weight_set] = draw.sum(0)
        dA_log[weight_set] = (dA * on_map.A).mT  # A = -exp(A_log), so dA/dA_log = A
    return (
        dx.to(out_dtype),
        dx_dbl.to(x_dbl.dtype),
        dweight.to(dt_weight.dtype),
        dbias.to(dt_bias.dtype),
        dA_log.to(A_log.dtype),
        dskip.to(D_skip.dtype),
    )


def saved_numel_2d(shape: Sequence[int], d_state: int, routes: Sequence[str], device: torch.device) -> int:
    """The number of states that `selective_scan_2d` saves for x of shape (B, H, W, D) on these routes."""
    batch, height, width, channels = shape
    sizes = ((width, height) if name.startswith("col") else (height, width) for name in routes)
    return sum(math.prod(saved_shape_of(*size, batch, d_state, channels, device)) for size in sizes)


def _map_lines(t: Tensor) -> Tensor:
    """A map (B, H, W, ·) as its rows, (H, W, B, ·)."""
    return t.permute(1, 2, 0, 3)


def _on_map(
    weight_set: int,
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    dtype: torch.dtype,
    keep_raw: bool = True,
) -> tuple[Lines, Tensor]:
    """The inputs of a weight set as rows of the map, and delta before its softplus, (B, H, W, D), if that is kept."""
    rank, d_state = dt_weight.shape[2], A_log.shape[2]
    dt_low, B, C = x_dbl[..., weight_set, :].to(dtype).split([rank, d_state, d_state], dim=-1)
    raw = F.linear(dt_low, dt_weight[weight_set].to(dtype), dt_bias[weight_set].to(dtype))
    A = -torch.exp(A_log[weight_set].to(dtype)).mT.contiguous()
    # In place, as fresh memory costs as much as the softplus.
    delta = F.softplus(raw) if keep_raw else torch.ops.aten.softplus.out(raw, out=raw)
    return Lines(x.to(dtype), delta, A, B, C).apply(_map_lines), raw


class _Group(NamedTuple):
    """A group of neighbouring channels that share B and C."""

    number: int
    channels: slice


def _groups(u: Tensor, B: Tensor) -> list[_Group]:
    size = u.shape[1] // B.shape[1]
    return [_Group(g, slice(g * size, (g + 1) * size)) for g in range(B.shape[1])]


def _cut(
    part: _Group,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    dtype: torch.dtype,
) -> Lines:
    """Cuts a group of a 1-D sequence into lines; a tail is filled with zeros, which leave the state as it is."""
    own = part.channels
    step = delta[:, own].to(dtype)
    if delta_bias is not None:
        step = step + delta_bias[own, None].to(dtype)
    if delta_softplus:
        step = F.softplus(step)
    A = A[own].to(dtype).mT.contiguous()
    size = line_counts(u.shape[2], u.shape[0] * A.numel(), u.device)
    B, C = (_to_lines(t[:, part.number].to(dtype), size) for t in (B, C))
    return Lines(_to_lines(u[:, own].to(dtype), size), _to_lines(step, size), A, B, C)


def _to_lines(t: Tensor, size: Sequence[int]) -> Tensor:
    """(B, D, L) to contiguous (O, I, B, D)."""
    (lines, steps), (batch, channels, length) = size, t.shape
    cut = t.new_empty(lines * steps, batch, channels)
    cut[length:] = 0
    _put(cut[:length].transpose(0, 1), t.mT)
    return cut.unflatten(0, (lines, steps))


def _uncut(t: Tensor, length: int) -> Tensor:
    """The inverse of `_to_lines`."""
    return t.flatten(0, 1)[:length].permute(1, 2, 0)


def _put(into: Tensor, value: Tensor) -> None:
    """Copies a batch of matrices into a tensor of that shape."""
    if len(value) == 1:
        into[0].copy_(value[0])  # torch transposes plain matrices several times faster
    else:
        into.copy_(value)
