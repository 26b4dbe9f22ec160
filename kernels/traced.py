"""The 2-D operator as a graph of fixed size for maps of any size: what `torch.export` sees of `backend="parallel"`.

`parallel.py` cuts its work and counts its steps by the map's size, in Python, so that a trace of it writes out every
step and serves that one size. Here lines are walked in step (see `lines.py`) by torch's operator `scan`, whose number
of steps is the length of a tensor, known when the graph runs. ONNX has the same operator, Scan. The arithmetic is that
of `parallel`, step by step, so that results agree to rounding; what is N wide lives for one step of all lines.
"""

from collections.abc import Sequence
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import outside_autocast, state_dtype
from .routes import sequences


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
) -> Tensor:
    """The 2-D operator; arguments and result as in `msv.kernels.selective_scan_2d`."""
    dtype = state_dtype(x, x_dbl, dt_weight, A_log)
    height, width, channels = x.shape[1:]
    rank, d_state = dt_weight.shape[2], A_log.shape[2]
    out: dict[int, Tensor] = {}
    walked = sorted(sequences(tuple(s for _, s in routes), carry_state), key=len)
    for count, alike in groupby(walked, key=len):  # sequences of as many routes are walked side by side
        group = list(alike)
        sets = [routes[sequence[0]][1] for sequence in group]
        inputs = []
        for sequence, s in zip(group, sets, strict=True):
            on_map = torch.cat([x.to(dtype), x_dbl[..., s, :].to(dtype)], dim=-1)
            steps = torch.cat([_in_order(on_map, routes[route][0]) for route in sequence], dim=1)
            u, low, BC = steps.split([channels, rank, 2 * d_state], dim=-1)
            delta = F.softplus(F.linear(low, dt_weight[s].to(dtype), dt_bias[s].to(dtype)))
            inputs.append(torch.cat([delta, delta * u, BC], dim=-1))
        A = -torch.exp(torch.stack([A_log[s] for s in sets]).to(dtype)).mT.contiguous()
        lines = torch.stack(inputs).unflatten(2, (count * height, width)).movedim(3, 0)
        y = _walk(lines, A).movedim(0, 3).flatten(2, 3)
        # The copy has strides that torch 2.11 can reason about, unlike those of two dimensions made one.
        y = y.clone(memory_format=torch.contiguous_format).unflatten(2, (count, height * width))
        for number, sequence in enumerate(group):
            for place, route in enumerate(sequence):
                out[route] = _on_map(y[number, :, place], routes[route][0], height, width)
    skip = torch.stack([D_skip[s] for _, s in routes]).to(dtype)[:, None, None]
    y = torch.stack([out[route] for route in range(len(routes))], dim=1)
    return (y + skip * x.unsqueeze(1)).to(x.dtype)


def _walk(lines: Tensor, A: Tensor) -> Tensor:
    """Walks S sequences, each cut into O lines of I steps, from zero states.

    Args:
        lines: [Δ, Δ u, B, C], (I, S, B, O, 2D + 2N); one tensor, since torch writes Scan of several wrongly for ONNX.
        A: (S, N, D).

    Returns:
        C · h, (I, S, B, O, D).
    """
    d_state, channels = A.shape[1:]
    of_step, of_line = A[:, None, None], A[:, None]

    def step(h: Tensor, inputs: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        delta, delta_u, B, C = inputs.split([channels, channels, d_state, d_state], dim=-1)
        h = torch.exp(delta.unsqueeze(-2) * A) * h + B.unsqueeze(-1) * delta_u.unsqueeze(-2)
        return h, (C.unsqueeze(-2) @ h).squeeze(-2)

    def next_line(h: Tensor, line: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        delta, from_zero = line.split([1, d_state], dim=-2)
        return torch.exp(delta * A) * h + from_zero, h.clone()

    scan = torch.ops.higher_order.scan
    sets, batch, count = lines.shape[1:4]
    from_zero, _ = scan(step, [lines.new_zeros(sets, batch, count, d_state, channels)], [lines], (of_step,))
    whole_lines = torch.cat([lines[..., :channels].sum(0).unsqueeze(-2), from_zero], dim=-2).movedim(2, 0)
    _, begins = scan(next_line, [lines.new_zeros(sets, batch, d_state, channels)], [whole_lines], (of_line,))
    _, y = scan(step, [begins.movedim(0, 2).contiguous()], [lines], (of_step,))
    return y


def _in_order(t: Tensor, route: str) -> Tensor:
    """A map (B, H, W, ·) as the steps of a route, (B, H·W, ·)."""
    t = (t.transpose(1, 2) if route.startswith("col") else t).flatten(1, 2)
    return t.flip(1) if route.endswith("R") else t


def _on_map(t: Tensor, route: str, height: int, width: int) -> Tensor:
    """The inverse of `_in_order`."""
    t = t.flip(1) if route.endswith("R") else t
    if route.startswith("col"):
        return t.unflatten(1, (width, height)).transpose(1, 2)
    return t.unflatten(1, (height, width))
