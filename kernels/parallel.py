"""The selective scan in torch operations alone, chunk-parallel: what runs on a CPU.

A step needs the one before it, so L steps cannot run side by side; channels, states, batch and routes can, and so can
chunks of the sequence once their first states are known (Eq. 4's product over a chunk carries a state across it).
The core walks all chunks in step. A step's slice fits in the cache, and nothing of width N is ever stored for all L:
the backward starts again from states saved every few steps.

Layout of the core, time first and channels last, so that slices are contiguous (P: any batch dimensions):

    u, delta (L, *P, D)     A (*P or ones, N, D)     B, C (L, *P, N)     h (*P, N, D)

Chunked, L becomes (chunks, steps) and a slice at one step of every chunk is (chunks, *P, D).
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import state_dtype
from .routes import route_inverse, route_order, sequences

LOG2_E = math.log2(math.e)  # exp2 is several times faster than exp on a CPU, so A carries this factor
SLICE = 32_768  # elements of a slice beyond which more chunks bring no more parallel work


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
    y, last, saved = scan(*_to_core(u, _step_size(delta, delta_bias, delta_softplus, dtype), A, B, C, dtype))
    y = _from_core(y)
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), last.mT.reshape(u.shape[0], u.shape[1], -1), saved


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
    batch, channels, _ = u.shape
    groups, d_state = B.shape[1:3]
    step = _step_size(delta, delta_bias, delta_softplus, dtype)
    core = _to_core(u, step, A, B, C, dtype)
    dy = dy.to(dtype)
    dz = None
    if z is not None:
        z_wide = z.to(dtype)
        gate = torch.sigmoid(z_wide)
        y, _, _ = scan(*core)  # the gate's gradient needs y before the gate, which is not kept
        y = _from_core(y) if D is None else _from_core(y) + D.to(dtype)[:, None] * u
        dz = (dy * y * gate * (1 + z_wide * (1 - gate))).to(z.dtype)
        dy = dy * z_wide * gate
    if dlast is not None:
        dlast = dlast.to(dtype).reshape(batch, groups, channels // groups, d_state).mT
    du, ddelta, dA, dB, dC = scan_backward(_split_groups(dy, groups), dlast, saved, *core)
    du, ddelta = _from_core(du), _from_core(ddelta)
    dD = None
    if D is not None:
        du = du + D.to(dtype)[:, None] * dy
        dD = (dy * u).sum(dim=(0, 2)).to(D.dtype)
    if delta_softplus:
        ddelta = ddelta * -torch.expm1(-step)  # softplus' = sigmoid = 1 - exp(-softplus)
    dbias = None if delta_bias is None else ddelta.sum(dim=(0, 2)).to(delta_bias.dtype)
    dA = dA.mT.reshape(channels, d_state).to(A.dtype)
    return (
        du.to(u.dtype),
        ddelta.to(delta.dtype),
        dA,
        dB.permute(1, 2, 3, 0).to(B.dtype),
        dC.permute(1, 2, 3, 0).to(C.dtype),
        dD,
        dz,
        dbias,
    )


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
    walk = _Walk(x, x_dbl, dt_weight, dt_bias, A_log, routes, carry_state)
    skip = D_skip.to(walk.dtype)
    out = x.new_empty(x.shape[0], len(routes), walk.length, x.shape[3])
    saved = []
    for bundle in walk.bundles:
        y, _, states = scan(*walk.gather(bundle))
        saved.append(states.flatten())
        for route, piece in walk.pieces(bundle, y):
            on_map = piece.index_select(0, walk.inverse[route])
            out[:, route] = (on_map + skip[walk.sets[route]] * walk.tokens).transpose(0, 1)
    return out.unflatten(2, x.shape[1:3]), torch.cat(saved)


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
    walk = _Walk(x, x_dbl, dt_weight, dt_bias, A_log, routes, carry_state)
    dy = dy.flatten(2, 3).to(walk.dtype)  # (B, K, L, D)
    skip = D_skip.to(walk.dtype)
    dx = torch.zeros_like(walk.tokens)
    ddelta = torch.zeros_like(walk.delta)
    dB, dC = torch.zeros_like(walk.B), torch.zeros_like(walk.C)
    dA, dskip = torch.zeros_like(walk.A), torch.zeros_like(skip)
    for bundle in walk.bundles:
        core = walk.gather(bundle)
        shape = saved_shape(core[0].shape, A_log.shape[2])
        states, saved = saved.split([math.prod(shape), saved.numel() - math.prod(shape)])
        dy_walked = torch.stack(
            [torch.cat([dy[:, r].transpose(0, 1).index_select(0, walk.order[r]) for r in seq]) for seq in bundle], dim=1
        )  # (n·L, G, B, D)
        gradients = scan_backward(dy_walked, None, states.view(shape), *core)
        for sequence, gradient in zip(bundle, gradients[2][:, 0], strict=True):
            dA[walk.sets[sequence[0]]] += gradient
        targets = ((dx, False), (ddelta, True), (dB, True), (dC, True))
        for (target, by_set), gradient in zip(targets, (*gradients[:2], *gradients[3:]), strict=True):
            for route, piece in walk.pieces(bundle, gradient):
                into = target[walk.sets[route]] if by_set else target
                into += piece.index_select(0, walk.inverse[route])
    for route, weight_set in enumerate(walk.sets):
        of_route = dy[:, route].transpose(0, 1)
        dx += skip[weight_set] * of_route
        dskip[weight_set] += (of_route * walk.tokens).sum(dim=(0, 1))

    draw = (ddelta * -torch.expm1(-walk.delta)).flatten(1, 2)  # through softplus, (S, L·B, D)
    dlow = (draw @ dt_weight.to(walk.dtype)).unflatten(1, walk.delta.shape[1:3])
    dx_dbl = torch.cat([dlow, dB, dC], dim=-1).permute(2, 1, 0, 3)  # (B, L, S, R+2N)
    return (
        dx.transpose(0, 1).reshape(x.shape).to(x.dtype),
        dx_dbl.reshape(x_dbl.shape).to(x_dbl.dtype),
        (draw.mT @ walk.dt_low.flatten(1, 2)).to(dt_weight.dtype),
        draw.sum(1).to(dt_bias.dtype),
        (dA * walk.A).mT.to(A_log.dtype),  # A = -exp(A_log), so dA/dA_log = A
        dskip.to(D_skip.dtype),
    )


def saved_numel(shape: Sequence[int], d_state: int, sets: tuple[int, ...], carry_state: bool) -> int:
    """The number of states that `selective_scan_2d` saves for x of shape (B, H, W, D)."""
    batch, height, width, channels = shape
    return sum(
        math.prod(saved_shape((length * height * width, count, batch, channels), d_state))
        for length, count in Counter(len(sequence) for sequence in sequences(sets, carry_state)).items()
    )


class _Walk:
    """A map made ready for walking: delta, B and C of every weight set on the map, and the order of every route."""

    def __init__(
        self,
        x: Tensor,
        x_dbl: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A_log: Tensor,
        routes: Sequence[tuple[str, int]],
        carry_state: bool,
    ) -> None:
        _, height, width, _ = x.shape
        rank, d_state = dt_weight.shape[2], A_log.shape[2]
        self.dtype = state_dtype(x, x_dbl, dt_weight, A_log)
        self.length = height * width
        self.sets = tuple(weight_set for _, weight_set in routes)
        self.order = [route_order(name, height, width, x.device) for name, _ in routes]
        self.inverse = [route_inverse(name, height, width, x.device) for name, _ in routes]
        by_length: dict[int, list[tuple[int, ...]]] = {}
        for sequence in sequences(self.sets, carry_state):
            by_length.setdefault(len(sequence), []).append(sequence)
        self.bundles = list(by_length.values())  # sequences of one length are walked side by side

        self.tokens = x.flatten(1, 2).transpose(0, 1).to(self.dtype)  # (L, B, D)
        projected = x_dbl.flatten(1, 2).permute(2, 1, 0, 3).to(self.dtype)  # (S, L, B, R+2N)
        self.dt_low, self.B, self.C = projected.split([rank, d_state, d_state], dim=-1)
        raw = self.dt_low.flatten(1, 2) @ dt_weight.to(self.dtype).mT + dt_bias.to(self.dtype)[:, None]
        self.delta = F.softplus(raw).unflatten(1, self.tokens.shape[:2])  # (S, L, B, D)
        self.A = -torch.exp(A_log.to(self.dtype)).mT  # (S, N, D)

    def gather(self, bundle: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Returns u, delta, A, B, C of a bundle of G sequences in the core's layout, P = (G, B)."""
        walked = [torch.cat([self.order[route] for route in sequence]) for sequence in bundle]
        first = [self.sets[sequence[0]] for sequence in bundle]

        def along(on_map: Tensor) -> Tensor:
            pairs = zip(walked, first, strict=True)
            return torch.stack([on_map[s].index_select(0, order) for order, s in pairs], dim=1)

        u = torch.stack([self.tokens.index_select(0, order) for order in walked], dim=1)
        return u, along(self.delta), self.A[first].unsqueeze(1), along(self.B), along(self.C)

    def pieces(self, bundle: list[tuple[int, ...]], walked: Tensor) -> list[tuple[int, Tensor]]:
        """Cuts (n·L, G, B, ·) at the seams: pairs of a route and its (L, B, ·), still in walking order."""
        return [
            (route, piece)
            for g, sequence in enumerate(bundle)
            for route, piece in zip(sequence, walked[:, g].split(self.length), strict=True)
        ]


class _Plan(NamedTuple):
    """How a sequence is cut: `chunks` walked in step, `steps` each, a state saved every `stride` steps."""

    chunks: int
    steps: int
    stride: int

    @classmethod
    def of(cls, shape: Sequence[int], d_state: int) -> "_Plan":
        """The plan for u of shape (L, *P, D)."""
        length, width = shape[0], max(1, math.prod(shape[1:]) * d_state)
        chunks = max(1, min(round(length**0.5), SLICE // width))
        steps = -(-length // chunks)
        return cls(-(-length // steps), steps, max(1, round(steps**0.5)))

    def cut(self, t: Tensor) -> Tensor:
        """(L, ...) to (steps, chunks, ...); a tail is filled with zeros, which leave the state as it is."""
        missing = self.chunks * self.steps - t.shape[0]
        if missing:
            t = torch.cat([t, t.new_zeros(missing, *t.shape[1:])])
        return t.unflatten(0, (self.chunks, self.steps)).transpose(0, 1)

    def join(self, t: Tensor, length: int) -> Tensor:
        """The inverse of `cut`."""
        return t.transpose(0, 1).flatten(0, 1)[:length]


def saved_shape(shape: Sequence[int], d_state: int) -> tuple[int, ...]:
    """The shape of the states that `scan` saves for u of shape (L, *P, D)."""
    plan = _Plan.of(shape, d_state)
    return (-(-plan.steps // plan.stride), plan.chunks, *shape[1:-1], d_state, shape[-1])


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The core: y (L, *P, D), the last state (*P, N, D), and states saved every few steps of every chunk."""
    length, plan = u.shape[0], _Plan.of(u.shape, A.shape[-2])
    A2 = A * LOG2_E
    delta_u, delta, B, C = (plan.cut(t) for t in (delta * u, delta, B, C))

    h = _state_like(delta_u[0], A)
    if plan.chunks > 1:
        for t in range(plan.steps):
            h = _advance(_decay(delta[t], A2), h, delta_u[t], B[t])
        h = _carry(_decay(delta.sum(0), A2), h)

    y, saved = torch.empty_like(delta_u), []
    for t in range(plan.steps):
        if t % plan.stride == 0:
            saved.append(h)
        h = _advance(_decay(delta[t], A2), h, delta_u[t], B[t])
        y[t] = _over_states(C[t], h)
    return plan.join(y, length), h[-1], torch.stack(saved)


def scan_backward(
    dy: Tensor, dlast: Tensor | None, saved: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C given those of y and of the last state.

    The adjoint runs the recurrence backwards: dh_t = C_t dy_t + exp(Δ_{t+1} A) dh_{t+1}.
    """
    length, plan = u.shape[0], _Plan.of(u.shape, A.shape[-2])
    A2 = A * LOG2_E
    delta_u, delta_cut, B, C, dy = (plan.cut(t) for t in (delta * u, delta, B, C, dy))

    adjoint = _state_like(delta_u[0], A)  # exp(Δ_{t+1} A) dh_{t+1}, what flows into step t from the future
    if plan.chunks > 1:
        for t in reversed(range(plan.steps)):
            adjoint = adjoint.addcmul_(C[t].unsqueeze(-1), dy[t].unsqueeze(-2)).mul_(_decay(delta_cut[t], A2))
        adjoint = _carry(_decay(delta_cut.sum(0), A2).flip(0), adjoint.flip(0), dlast).flip(0)
    elif dlast is not None:
        adjoint = adjoint + dlast

    d_delta_u, ddelta = torch.empty_like(delta_u), torch.empty_like(delta_u)
    dB, dC = torch.empty_like(B), torch.empty_like(C)
    dA = torch.zeros_like(adjoint)
    for block in reversed(range(saved.shape[0])):
        first = block * plan.stride
        steps = range(first, min(first + plan.stride, plan.steps))
        decays, states = [], [saved[block]]
        for t in steps:
            decays.append(_decay(delta_cut[t], A2))
            states.append(_advance(decays[-1], states[-1], delta_u[t], B[t]))
        for t in reversed(steps):
            h, before, decay = states.pop(), states[-1], decays.pop()
            dC[t] = _over_channels(h, dy[t])
            dh = adjoint.addcmul_(C[t].unsqueeze(-1), dy[t].unsqueeze(-2))
            dB[t] = _over_channels(dh, delta_u[t])
            d_delta_u[t] = _over_states(B[t], dh)
            adjoint = dh.mul_(decay)
            into_decay = before * adjoint  # dL/d(Δ_t A)
            dA.addcmul_(into_decay, delta_cut[t].unsqueeze(-2))
            ddelta[t] = into_decay.mul_(A).sum(-2)
    d_delta_u, ddelta, dB, dC = (plan.join(t, length) for t in (d_delta_u, ddelta, dB, dC))
    return d_delta_u * delta, ddelta.addcmul_(d_delta_u, u), dA.sum(0).sum_to_size(A.shape), dB, dC


def _decay(delta: Tensor, A2: Tensor) -> Tensor:
    """exp(Δ A), (..., N, D)."""
    return torch.mul(delta.unsqueeze(-2), A2).exp2_()


def _advance(decay: Tensor, h: Tensor, delta_u: Tensor, B: Tensor) -> Tensor:
    """One step of the recurrence, h_t = decay ∘ h_{t-1} + B_t ⊗ (Δ_t u_t)."""
    return torch.mul(decay, h).addcmul_(B.unsqueeze(-1), delta_u.unsqueeze(-2))


def _carry(decay: Tensor, last: Tensor, first: Tensor | None = None) -> Tensor:
    """The states in which chunks start, from the last states of chunks walked from zero."""
    h = torch.zeros_like(last[0]) if first is None else first.expand_as(last[0])
    starts = []
    for chunk in range(last.shape[0]):
        starts.append(h)
        h = torch.addcmul(last[chunk], decay[chunk], h)
    return torch.stack(starts)


def _state_like(slice_: Tensor, A: Tensor) -> Tensor:
    return slice_.new_zeros(*slice_.shape[:-1], A.shape[-2], slice_.shape[-1])


def _over_states(B: Tensor, h: Tensor) -> Tensor:
    """Sum over N of B_n h_nd, (..., D)."""
    return B * h.squeeze(-2) if h.shape[-2] == 1 else (B.unsqueeze(-2) @ h).squeeze(-2)


def _over_channels(h: Tensor, d: Tensor) -> Tensor:
    """Sum over D of h_nd d_d, (..., N)."""
    return (h.squeeze(-2) * d).sum(-1, keepdim=True) if h.shape[-2] == 1 else (h @ d.unsqueeze(-1)).squeeze(-1)


def _step_size(delta: Tensor, bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    delta = delta.to(dtype) if bias is None else delta.to(dtype) + bias.to(dtype)[:, None]
    return F.softplus(delta) if softplus else delta


def _split_groups(t: Tensor, groups: int) -> Tensor:
    """(B, D, L) to the core's (L, B, G, D/G)."""
    return t.permute(2, 0, 1).unflatten(2, (groups, t.shape[1] // groups)).contiguous()


def _from_core(t: Tensor) -> Tensor:
    """(L, B, G, D/G) to (B, D, L)."""
    return t.flatten(2, 3).permute(1, 2, 0)


def _to_core(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    groups = B.shape[1]
    return (
        _split_groups(u.to(dtype), groups),
        _split_groups(delta, groups),
        A.to(dtype).reshape(1, groups, A.shape[0] // groups, A.shape[1]).mT,
        B.to(dtype).permute(3, 0, 1, 2).contiguous(),
        C.to(dtype).permute(3, 0, 1, 2).contiguous(),
    )
