"""The walk over lines of steps, forward and backward: the core of the scan in torch operations.

A sequence is walked as lines of steps: a map is its rows or columns, a 1-D sequence is cut. Steps of a line come one
after another, everything else side by side:

- wide work (a batch of images on a CPU) walks line after line, in blocks of rows of the batch that stay in the cache;
- narrow work (one long sequence, anything on a GPU) walks all lines in step. Their first states come from a walk of
  their own, each line from zero, and the products of decays over whole lines (Eq. 4), which carry a state from line to
  line.

A visit is a few neighbouring steps of a line. What is N wide lives for one visit and is never stored for all steps: the
backward computes it again from the states with which visits begin, which the forward saves.

Layouts, channels last so that the innermost loops run over D (O lines of I steps, P: any batch dimensions):

    u, delta, y (O, I, B, D)     B, C (O, I, B, N)     A (N, D)     states (*P, N, D)     a visit's (steps, *P, N, D)
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)  # exp2 is several times faster than exp on a CPU, so A carries this factor
VISIT = 4, 16  # least and most steps of a visit: a quarter of all states is saved, or less


class _Sizes(NamedTuple):
    """What suits a device.

    Attributes:
        wide: states of one step from which on lines are walked one after another.
        in_step: states of one step of all lines, where lines are walked in step and their number is free.
        visit: states of a visit up to which what it touches stays in the cache, or in memory at all.
    """

    wide: int
    in_step: int
    visit: int


CPU = _Sizes(wide=4_096, in_step=32_768, visit=393_216)
GPU = _Sizes(wide=2**24, in_step=2**20, visit=2**26)  # launches cost more than anything else


def _sizes(device: torch.device) -> _Sizes:
    return CPU if device.type == "cpu" else GPU


class Lines(NamedTuple):
    """One weight set's inputs as lines: u and delta (O, I, *P, D), A (N, D), B and C (O, I, *P, N); or gradients."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    reverse: bool = False

    def apply(self, change: Callable[[Tensor], Tensor]) -> "Lines":
        """Changes the view of all but A."""
        u, delta, B, C = (change(t) for t in (self.u, self.delta, self.B, self.C))
        return self._replace(u=u, delta=delta, B=B, C=C)

    def along(self, route: str) -> "Lines":
        """The lines of a map, rows, on a route."""
        lines = self.apply(lambda t: t.transpose(0, 1)) if route.startswith("col") else self
        return lines._replace(reverse=route.endswith("R"))

    def rows(self, rows: slice) -> "Lines":
        """A block of rows of the batch."""
        return self.apply(lambda t: t[..., rows, :])

    def at(self, place: tuple[int, slice]) -> "Lines":
        """The steps of one visit, (steps, *P, ·)."""
        return self.apply(lambda t: t[place])

    def zero_gradients(self) -> "Lines":
        """Zeros to add gradients to."""
        return self.apply(torch.zeros_like)._replace(A=torch.zeros_like(self.A))

    @property
    def in_step(self) -> bool:
        """Whether lines are walked in step, or one after another."""
        return _in_step(self.u.shape[0], self.u.shape[2] * self.A.numel(), self.u.device)

    @property
    def visit(self) -> int:
        """The steps of a visit."""
        return _visit(self.u.shape[1], math.prod(self.u.shape[2:-1]) * self.A.numel(), self.u.device)

    def saved_shape(self) -> tuple[int, ...]:
        """The shape of the states saved, one a visit."""
        lines, steps, batch = self.u.shape[:3]
        return saved_shape_of(lines, steps, batch, self.A.shape[0], self.A.shape[1], self.u.device)

    def visits(self, steps: int) -> list[tuple[int, slice]]:
        """The places of visits of so many steps, in walking order."""
        places = [
            (line, slice(first, min(first + steps, self.u.shape[1])))
            for line in range(self.u.shape[0])
            for first in range(0, self.u.shape[1], steps)
        ]
        return places[::-1] if self.reverse else places

    def blocks(self, steps: int) -> Iterator[slice]:
        """Blocks of rows of the batch whose visits of so many steps fit in the cache."""
        batch = self.u.shape[-2]
        beside = math.prod(self.u.shape[2:-2])
        most = max(1, _sizes(self.u.device).visit // max(1, steps * beside * self.A.numel()))
        size = -(-batch // -(-batch // most)) if batch else 1
        return (slice(row, row + size) for row in range(0, batch, size))


def _in_step(lines: int, width: int, device: torch.device) -> bool:
    return lines > 1 and width < _sizes(device).wide


def _visit(steps: int, width: int, device: torch.device) -> int:
    """The steps of a visit, `width` states a step."""
    return min(steps, max(VISIT[0], min(VISIT[1], _sizes(device).visit // max(1, width))))


def line_counts(length: int, width: int, device: torch.device) -> tuple[int, int]:
    """Lines and steps of a 1-D sequence, `width` states a step."""
    sizes = _sizes(device)
    lines = 1 if width >= sizes.wide else max(1, min(round(length**0.5), sizes.in_step // max(1, width)))
    steps = -(-length // lines)
    return -(-length // steps), steps


def saved_shape_of(
    lines: int, steps: int, batch: int, d_state: int, channels: int, device: torch.device
) -> tuple[int, ...]:
    """The shape of the states saved of so many lines of so many steps."""
    width = batch * d_state * channels
    if _in_step(lines, width, device):
        return -(-steps // _visit(steps, lines * width, device)), lines, batch, d_state, channels
    return lines * -(-steps // _visit(steps, width, device)), batch, d_state, channels


def walk_forward(lines: Lines, h: Tensor, skip: Tensor | None, y: Tensor, saved: Tensor) -> Tensor:
    """Walks lines from the state h (B, N, D): fills y and the saved states, and returns the last state."""
    A2, last, in_step = lines.A * LOG2_E, torch.empty_like(h), lines.in_step
    if in_step:
        h, last = _first_states(lines, h)
        lines, y = lines.apply(_stack), _stack(y)
    steps = lines.visit
    for rows in lines.blocks(steps):
        part, y_part, saved_part = lines.rows(rows), y[..., rows, :], saved[..., rows, :, :]
        decay, states = _visit_buffers(part, steps, 2)
        saved_part[0] = h[..., rows, :, :]
        for number, place in enumerate(part.visits(steps)):
            visit = part.at(place)
            of_visit = states[: visit.u.shape[0]]
            after = _walk(visit, A2, saved_part[number], decay[: visit.u.shape[0]], of_visit)
            if number + 1 < saved.shape[0]:
                saved_part[number + 1] = after
            elif not in_step:
                last[rows] = after
            y_visit = _over_states(visit.C, of_visit, spend=True)
            y_part[place] = y_visit if skip is None else y_visit.addcmul_(skip, visit.u)
    return last


def walk_backward(
    lines: Lines, into: Lines, dy: Tensor, dh: Tensor | None, skip: Tensor | None, saved: Tensor
) -> Tensor:
    """Walks lines backwards: adds gradients `into`, and returns that of the state they began with.

    The adjoint's recurrence is dh_t = C_t dy_t + exp(Δ_{t+1} A) dh_{t+1}; `dh` is what flows in from behind the end.
    """
    A, A2, in_step = lines.A, lines.A * LOG2_E, lines.in_step
    dh = dy.new_zeros(lines.u.shape[2], *A.shape) if dh is None else dh
    dfirst = torch.empty_like(dh)
    if in_step:
        dh, dfirst = _last_adjoints(lines, dy, dh)
        lines, into, dy = lines.apply(_stack), into.apply(_stack), _stack(dy)
    steps = lines.visit
    for rows in lines.blocks(steps):
        part, into_part, dy_part = lines.rows(rows), into.rows(rows), dy[..., rows, :]
        adjoint = dh[..., rows, :, :]
        buffers = _visit_buffers(part, steps, 5)
        dA = buffers[4].zero_()
        places = part.visits(steps)
        for number in reversed(range(len(places))):
            visit, gradient, dy_visit = part.at(places[number]), into_part.at(places[number]), dy_part[places[number]]
            decay, states, dstates, scratch, dA_visit = (t[: visit.u.shape[0]] for t in buffers)
            before = saved[number][..., rows, :, :]
            _walk(visit, A2, before, decay, states)
            delta_u = visit.delta * visit.u

            torch.mul(visit.C.unsqueeze(-1), dy_visit.unsqueeze(-2), out=dstates)
            order = _steps(visit)[::-1]
            decays, adjoints = decay.unbind(), dstates.unbind()
            adjoints[order[0]].add_(adjoint)
            for later, i in pairwise(order):
                adjoints[i].addcmul_(decays[later], adjoints[later])

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


def _walk(visit: Lines, A2: Tensor, h: Tensor, decay: Tensor, states: Tensor) -> Tensor:
    """Fills the decays and states of a visit, (steps, *P, N, D), and returns the state after it."""
    torch.mul(visit.delta.unsqueeze(-2), A2, out=decay).exp2_()
    torch.mul(visit.B.unsqueeze(-1), (visit.delta * visit.u).unsqueeze(-2), out=states)
    decays, after = decay.unbind(), states.unbind()  # at once, since a view costs as much as a short step
    for i in _steps(visit):
        h = after[i].addcmul_(decays[i], h)
    return h


def _steps(visit: Lines) -> range:
    steps = range(visit.u.shape[0])
    return steps[::-1] if visit.reverse else steps


def _first_states(lines: Lines, h: Tensor) -> tuple[Tensor, Tensor]:
    """The state (O, B, N, D) with which each line begins, and the one after the last line."""
    stacked, A2 = lines.apply(_stack), lines.A * LOG2_E
    decay, states = _visit_buffers(stacked, stacked.visit, 2)
    from_zero = torch.zeros_like(states[0])
    for place in stacked.visits(stacked.visit):
        visit = stacked.at(place)
        steps = visit.u.shape[0]
        from_zero = _walk(visit, A2, from_zero, decay[:steps], states[:steps]).clone()
    return _carry(_line_decay(lines, A2), from_zero, h, lines.reverse)


def _last_adjoints(lines: Lines, dy: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
    """The adjoint (O, B, N, D) that flows into the end of each line, and the one out of the first line's beginning."""
    stacked, dy, A2 = lines.apply(_stack), _stack(dy), lines.A * LOG2_E
    decay, dstates = _visit_buffers(stacked, stacked.visit, 2)
    from_zero = torch.zeros_like(dstates[0])
    for place in reversed(stacked.visits(stacked.visit)):
        visit = stacked.at(place)
        torch.mul(visit.delta.unsqueeze(-2), A2, out=decay[: visit.u.shape[0]]).exp2_()
        for i in _steps(visit)[::-1]:
            from_zero.addcmul_(visit.C[i].unsqueeze(-1), dy[place][i].unsqueeze(-2)).mul_(decay[i])
    return _carry(_line_decay(lines, A2), from_zero, dh, not lines.reverse)


def _line_decay(lines: Lines, A2: Tensor) -> Tensor:
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


def _visit_buffers(lines: Lines, steps: int, count: int) -> list[Tensor]:
    """Buffers for what is N wide in a visit, (steps, *P, N, D)."""
    shape = (steps, *lines.u.shape[2:-1], *lines.A.shape)
    return [lines.u.new_empty(shape) for _ in range(count)]


def _over_states(n: Tensor, h: Tensor, spend: bool = False) -> Tensor:
    """Sum over N of n (..., N) times h (..., N, D), which is overwritten with `spend`."""
    if h.shape[-2] > 1:
        return (n.unsqueeze(-2) @ h).squeeze(-2)
    return h.squeeze(-2).mul_(n) if spend else h.squeeze(-2) * n


def _stack(t: Tensor) -> Tensor:
    """(O, I, B, ·) to (1, I, O, B, ·): lines in step are one line of a larger batch."""
    return t.transpose(0, 1).unsqueeze(0)
