"""The selective scan in torch operations alone: what runs on a CPU, and wherever there is no kernel.

A sequence is walked as lines of steps: a map is its rows or columns, a 1-D sequence is cut. Steps of a line come one
after another, everything else side by side:

- wide work (a batch of images) walks line after line, in blocks of rows of the batch that stay in the cache;
- narrow work (one long sequence) walks all lines in step. Their first states come from a walk of their own, each line
  from zero, and the products of decays over whole lines (Eq. 4), which carry a state from line to line.

A visit is a few neighbouring steps of a line. What is N wide lives for one visit and is never stored for all steps: the
backward computes it again from the states with which visits begin, which the forward saves. Reverse routes walk the
same memory from its end, transposed ones through a transposed view, so nothing is flipped or copied into order.

Layouts, channels last so that the innermost loops run over D (O lines of I steps, P: any batch dimensions):

    u, delta, y (O, I, B, D)     B, C (O, I, B, N)     A (N, D)     states (*P, N, D)     a visit's (steps, *P, N, D)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import state_dtype
from .routes import sequences

LOG2_E = math.log2(math.e)  # exp2 is several times faster than exp on a CPU, so A carries this factor
VISIT = 4  # steps of a visit: a quarter of all states is saved
WIDE = 8_192  # states of one step from which on lines are walked one after another
IN_STEP = 32_768  # states of one step of all lines, where lines are walked in step and their number is free
CACHED = 98_304  # states of a visit up to which what it touches stays in the cache


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
        h = _forward(lines, out.new_zeros(batch, *lines.A.shape), None, out, states)
        y_part = _uncut(out, length)
        if D is not None:
            y_part = y_part + D[part.channels, None].to(dtype) * u[:, part.channels]
        if z is not None:
            y_part = y_part * F.silu(z[:, part.channels].to(dtype))
        y[:, part.channels] = y_part.to(u.dtype)
        last[:, part.channels] = h.mT
        saved.append(states.flatten())
    return y, last, torch.cat(saved)


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
            _forward(lines, y.new_zeros(batch, *lines.A.shape), None, y, torch.empty_like(states).view(shape))
            y = _uncut(y, length) if D is None else _uncut(y, length) + D[own, None].to(dtype) * u_part
            wide = z[:, own].to(dtype)
            gate = torch.sigmoid(wide)
            dz[:, own] = (dy_part * y * gate * (1 + wide * (1 - gate))).to(z.dtype)
            dy_part = dy_part * wide * gate
        into = lines.zero_gradients()
        dh = None if dlast is None else dlast[:, own].to(dtype).mT.contiguous()
        _backward(lines, into, _to_lines(dy_part, lines.u.shape[:2]), dh, None, states.view(shape))
        du_part, ddelta_part = _uncut(into.u, length), _uncut(into.delta, length)
        if D is not None and dD is not None:
            du_part = du_part + D[own, None].to(dtype) * dy_part
            dD[own] = (dy_part * u_part).sum(dim=(0, 2)).to(D.dtype)
        if delta_softplus:
            step = _uncut(lines.delta, length)
            ddelta_part = ddelta_part * -torch.expm1(-step)  # softplus' = sigmoid = 1 - exp(-softplus)
        if delta_bias is not None and dbias is not None:
            dbias[own] = ddelta_part.sum(dim=(0, 2)).to(delta_bias.dtype)
        du[:, own], ddelta[:, own] = du_part.to(u.dtype), ddelta_part.to(delta.dtype)
        dA[own] = into.A.mT.to(A.dtype)
        dB[:, part.number], dC[:, part.number] = _uncut(into.B, length).to(B.dtype), _uncut(into.C, length).to(C.dtype)
    return du, ddelta, dA, dB, dC, dD, dz, dbias


def saved_numel_1d(shape: Sequence[int], groups: int, d_state: int) -> int:
    """The number of states that `selective_scan` saves for u of shape (B, D, L)."""
    batch, channels, length = shape
    lines = _line_counts(length, batch * d_state * channels // groups)
    return groups * math.prod(_saved_shape(*lines, batch, d_state, channels // groups))


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
    prepared = [_on_map(s, x, x_dbl, dt_weight, dt_bias, A_log, dtype)[0] for s in range(dt_weight.shape[0])]
    for sequence in sequences(tuple(s for _, s in routes), carry_state):
        h = skip.new_zeros(x.shape[0], A_log.shape[2], x.shape[3])
        for route in sequence:
            name, weight_set = routes[route]
            lines, y = prepared[weight_set].along(name), _map_lines(out[:, route])
            y = y.transpose(0, 1) if name.startswith("col") else y
            states = h.new_empty(lines.saved_shape())
            h = _forward(lines, h, skip[weight_set], y, states)
            saved.append(states.flatten())
    return out, torch.cat(saved)


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
    sizes = [saved_numel_2d(x.shape, d_state, [routes[route][0]]) for sequence in walked for route in sequence]
    states = dict(zip((route for sequence in walked for route in sequence), saved.split(sizes), strict=True))
    for weight_set in range(dt_weight.shape[0]):
        on_map, raw = _on_map(weight_set, x, x_dbl, dt_weight, dt_bias, A_log, dtype)
        dlow, dB, dC = dx_dbl[..., weight_set, :].split([rank, d_state, d_state], dim=-1)
        ddelta, dA = torch.zeros_like(raw), torch.zeros_like(on_map.A)
        into = _Lines(dx, ddelta, dA, dB, dC).apply(_map_lines)
        for sequence in walked:
            dh = None
            for route in reversed([route for route in sequence if routes[route][1] == weight_set]):
                name = routes[route][0]
                dy_lines = _map_lines(dy[:, route])
                dskip[weight_set] += (dy_lines * on_map.u).sum(dim=(0, 1, 2))
                lines, own = on_map.along(name), states[route]
                dy_lines = dy_lines.transpose(0, 1) if name.startswith("col") else dy_lines
                own = own.view(lines.saved_shape())
                dh = _backward(lines, into.along(name), dy_lines, dh, skip[weight_set], own)
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


def saved_numel_2d(shape: Sequence[int], d_state: int, routes: Sequence[str]) -> int:
    """The number of states that `selective_scan_2d` saves for x of shape (B, H, W, D) on these routes."""
    batch, height, width, channels = shape
    sizes = ((width, height) if name.startswith("col") else (height, width) for name in routes)
    return sum(math.prod(_saved_shape(*size, batch, d_state, channels)) for size in sizes)


class _Lines(NamedTuple):
    """One weight set's inputs as lines: u and delta (O, I, *P, D), A (N, D), B and C (O, I, *P, N); or gradients."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    reverse: bool = False

    def apply(self, change: Callable[[Tensor], Tensor]) -> "_Lines":
        """Changes the view of all but A."""
        u, delta, B, C = (change(t) for t in (self.u, self.delta, self.B, self.C))
        return self._replace(u=u, delta=delta, B=B, C=C)

    def along(self, route: str) -> "_Lines":
        """The lines of a map, rows, on a route."""
        lines = self.apply(lambda t: t.transpose(0, 1)) if route.startswith("col") else self
        return lines._replace(reverse=route.endswith("R"))

    def rows(self, rows: slice) -> "_Lines":
        """A block of rows of the batch."""
        return self.apply(lambda t: t[..., rows, :])

    def at(self, place: tuple[int, slice]) -> "_Lines":
        """The steps of one visit, (steps, *P, ·)."""
        return self.apply(lambda t: t[place])

    def zero_gradients(self) -> "_Lines":
        """Zeros to add gradients to."""
        return self.apply(torch.zeros_like)._replace(A=torch.zeros_like(self.A))

    @property
    def in_step(self) -> bool:
        """Whether lines are walked in step, or one after another."""
        return _in_step(self.u.shape[0], self.u.shape[2] * self.A.numel())

    def saved_shape(self) -> tuple[int, ...]:
        """The shape of the states saved, one a visit."""
        return _saved_shape(*self.u.shape[:3], *self.A.shape)

    def visits(self) -> list[tuple[int, slice]]:
        """The places of visits, in walking order."""
        places = [
            (line, slice(first, min(first + VISIT, self.u.shape[1])))
            for line in range(self.u.shape[0])
            for first in range(0, self.u.shape[1], VISIT)
        ]
        return places[::-1] if self.reverse else places

    def blocks(self) -> Iterator[slice]:
        """Blocks of rows of the batch small enough for the cache."""
        batch = self.u.shape[-2]
        beside = math.prod(self.u.shape[2:-2])
        most = max(1, CACHED // max(1, min(VISIT, self.u.shape[1]) * beside * self.A.numel()))
        size = -(-batch // -(-batch // most)) if batch else 1
        return (slice(row, row + size) for row in range(0, batch, size))


def _in_step(lines: int, width: int) -> bool:
    return lines > 1 and width < WIDE


def _line_counts(length: int, width: int) -> tuple[int, int]:
    """Lines and steps of a 1-D sequence, `width` states a step."""
    lines = 1 if width >= WIDE else max(1, min(round(length**0.5), IN_STEP // max(1, width)))
    steps = -(-length // lines)
    return -(-length // steps), steps


def _saved_shape(lines: int, steps: int, batch: int, d_state: int, channels: int) -> tuple[int, ...]:
    visits = -(-steps // VISIT)
    if _in_step(lines, batch * d_state * channels):
        return visits, lines, batch, d_state, channels
    return lines * visits, batch, d_state, channels


def _forward(lines: _Lines, h: Tensor, skip: Tensor | None, y: Tensor, saved: Tensor) -> Tensor:
    """Walks lines from the state h (B, N, D): fills y and the saved states, and returns the last state."""
    A2, last, in_step = lines.A * LOG2_E, torch.empty_like(h), lines.in_step
    if in_step:
        h, last = _first_states(lines, h)
        lines, y = lines.apply(_stack), _stack(y)
    for rows in lines.blocks():
        part, y_part, saved_part = lines.rows(rows), y[..., rows, :], saved[..., rows, :, :]
        decay, states = _visit_buffers(part, 2)
        saved_part[0] = h[..., rows, :, :]
        for number, place in enumerate(part.visits()):
            visit = part.at(place)
            of_visit = states[: visit.u.shape[0]]
            after = _walk(visit, A2, saved_part[number], decay[: visit.u.shape[0]], of_visit)
            if number + 1 < saved.shape[0]:
                saved_part[number + 1] = after
            elif not in_step:
                last[rows] = after
            y_visit = _over_states(visit.C, of_visit)
            y_part[place] = y_visit if skip is None else y_visit.addcmul_(skip, visit.u)
    return last


def _backward(lines: _Lines, into: _Lines, dy: Tensor, dh: Tensor | None, skip: Tensor | None, saved: Tensor) -> Tensor:
    """Walks lines backwards: adds gradients `into`, and returns that of the state they began with.

    The adjoint's recurrence is dh_t = C_t dy_t + exp(Δ_{t+1} A) dh_{t+1}; `dh` is what flows in from behind the end.
    """
    A, A2, in_step = lines.A, lines.A * LOG2_E, lines.in_step
    dh = dy.new_zeros(lines.u.shape[2], *A.shape) if dh is None else dh
    dfirst = torch.empty_like(dh)
    if in_step:
        dh, dfirst = _last_adjoints(lines, dy, dh)
        lines, into, dy = lines.apply(_stack), into.apply(_stack), _stack(dy)
    for rows in lines.blocks():
        part, into_part, dy_part = lines.rows(rows), into.rows(rows), dy[..., rows, :]
        adjoint = dh[..., rows, :, :]
        buffers = _visit_buffers(part, 5)
        dA = buffers[4].zero_()
        places = part.visits()
        for number in reversed(range(len(places))):
            visit, gradient, dy_visit = part.at(places[number]), into_part.at(places[number]), dy_part[places[number]]
            decay, states, dstates, scratch, dA_visit = (t[: visit.u.shape[0]] for t in buffers)
            before = saved[number][..., rows, :, :]
            _walk(visit, A2, before, decay, states)
            delta_u = visit.delta * visit.u

            torch.mul(visit.C.unsqueeze(-1), dy_visit.unsqueeze(-2), out=dstates)
            order = _steps(visit)[::-1]
            dstates[order[0]] += adjoint
            for later, i in pairwise(order):
                torch.addcmul(dstates[i], decay[later], dstates[later], out=dstates[i])

            gradient.C.add_(torch.mul(states, dy_visit.unsqueeze(-2), out=scratch).sum(-1))
            gradient.B.add_(torch.mul(dstates, delta_u.unsqueeze(-2), out=scratch).sum(-1))
            d_delta_u = _over_states(visit.B, dstates)
            into_exponent = decay.mul_(dstates)
            adjoint = into_exponent[order[-1]].clone()
            into_exponent[order[-1]] *= before  # the gradient of Δ_t A: exp(Δ_t A) ∘ dh_t ∘ h_{t-1}
            if visit.reverse:
                into_exponent[:-1] *= states[1:]
            else:
                into_exponent[1:] *= states[:-1]
            dA_visit.addcmul_(into_exponent, visit.delta.unsqueeze(-2))
            gradient.delta.add_(into_exponent.mul_(A).sum(-2)).addcmul_(d_delta_u, visit.u)
            gradient.u.addcmul_(d_delta_u, visit.delta)
            if skip is not None:
                gradient.u.addcmul_(skip, dy_visit)
        into.A.add_(dA.flatten(0, -3).sum(0))
        if not in_step:
            dfirst[rows] = adjoint
    return dfirst


def _walk(visit: _Lines, A2: Tensor, h: Tensor, decay: Tensor, states: Tensor) -> Tensor:
    """Fills the decays and states of a visit, (steps, *P, N, D), and returns the state after it."""
    torch.mul(visit.delta.unsqueeze(-2), A2, out=decay).exp2_()
    torch.mul(visit.B.unsqueeze(-1), (visit.delta * visit.u).unsqueeze(-2), out=states)
    for i in _steps(visit):
        h = torch.addcmul(states[i], decay[i], h, out=states[i])
    return h


def _steps(visit: _Lines) -> range:
    steps = range(visit.u.shape[0])
    return steps[::-1] if visit.reverse else steps


def _first_states(lines: _Lines, h: Tensor) -> tuple[Tensor, Tensor]:
    """The state (O, B, N, D) with which each line begins, and the one after the last line."""
    stacked, A2 = lines.apply(_stack), lines.A * LOG2_E
    decay, states = _visit_buffers(stacked, 2)
    from_zero = torch.zeros_like(states[0])
    for place in stacked.visits():
        visit = stacked.at(place)
        steps = visit.u.shape[0]
        from_zero = _walk(visit, A2, from_zero, decay[:steps], states[:steps]).clone()
    return _carry(_line_decay(lines, A2), from_zero, h, lines.reverse)


def _last_adjoints(lines: _Lines, dy: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """The adjoint (O, B, N, D) that flows into the end of each line, and the one out of the first line's beginning."""
    stacked, dy, A2 = lines.apply(_stack), _stack(dy), lines.A * LOG2_E
    decay, dstates = _visit_buffers(stacked, 2)
    from_zero = torch.zeros_like(dstates[0])
    for place in reversed(stacked.visits()):
        visit = stacked.at(place)
        torch.mul(visit.delta.unsqueeze(-2), A2, out=decay[: visit.u.shape[0]]).exp2_()
        for i in _steps(visit)[::-1]:
            from_zero.addcmul_(visit.C[i].unsqueeze(-1), dy[place][i].unsqueeze(-2)).mul_(decay[i])
    return _carry(_line_decay(lines, A2), from_zero, dh, not lines.reverse)


def _line_decay(lines: _Lines, A2: Tensor) -> Tensor:
    """The product of decays over each line, (O, B, N, D)."""
    return torch.mul(lines.delta.sum(1).unsqueeze(-2), A2).exp2_()


def _carry(decay: Tensor, from_zero: Tensor, h: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """States with which lines begin, given h before the first and what each makes of zero; and the state after all."""
    begins = torch.empty_like(from_zero)
    lines = range(begins.shape[0])
    for line in reversed(lines) if reverse else lines:
        begins[line] = h
        h = torch.addcmul(from_zero[line], decay[line], h)
    return begins, h


def _visit_buffers(lines: _Lines, count: int) -> list[Tensor]:
    """Buffers for what is N wide in a visit, (steps, *P, N, D)."""
    shape = (min(VISIT, lines.u.shape[1]), *lines.u.shape[2:-1], *lines.A.shape)
    return [lines.u.new_empty(shape) for _ in range(count)]


def _over_states(n: Tensor, h: Tensor) -> Tensor:
    """Sum over N of n (..., N) times h (..., N, D)."""
    return n * h.squeeze(-2) if h.shape[-2] == 1 else (n.unsqueeze(-2) @ h).squeeze(-2)


def _stack(t: Tensor) -> Tensor:
    """(O, I, B, ·) to (1, I, O, B, ·): lines in step are one line of a larger batch."""
    return t.transpose(0, 1).unsqueeze(0)


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
) -> tuple[_Lines, Tensor]:
    """The inputs of a weight set as rows of the map, and delta before its softplus, (B, H, W, D)."""
    rank, d_state = dt_weight.shape[2], A_log.shape[2]
    dt_low, B, C = x_dbl[..., weight_set, :].to(dtype).split([rank, d_state, d_state], dim=-1)
    raw = F.linear(dt_low, dt_weight[weight_set].to(dtype), dt_bias[weight_set].to(dtype))
    A = -torch.exp(A_log[weight_set].to(dtype)).mT.contiguous()
    return _Lines(x.to(dtype), F.softplus(raw), A, B, C).apply(_map_lines), raw


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
) -> _Lines:
    """Cuts a group of a 1-D sequence into lines; a tail is filled with zeros, which leave the state as it is."""
    own = part.channels
    step = delta[:, own].to(dtype)
    if delta_bias is not None:
        step = step + delta_bias[own, None].to(dtype)
    if delta_softplus:
        step = F.softplus(step)
    A = A[own].to(dtype).mT.contiguous()
    size = _line_counts(u.shape[2], u.shape[0] * A.numel())
    B, C = (_to_lines(t[:, part.number].to(dtype), size) for t in (B, C))
    return _Lines(_to_lines(u[:, own].to(dtype), size), _to_lines(step, size), A, B, C)


def _to_lines(t: Tensor, size: Sequence[int]) -> Tensor:
    """(B, D, L) to contiguous (O, I, B, D)."""
    lines, steps = size
    cut = t.new_zeros(lines * steps, t.shape[0], t.shape[1])
    cut[: t.shape[2]] = t.permute(2, 0, 1)
    return cut.unflatten(0, (lines, steps))


def _uncut(t: Tensor, length: int) -> Tensor:
    """The inverse of `_to_lines`."""
    return t.flatten(0, 1)[:length].permute(1, 2, 0)
