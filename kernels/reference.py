"""The selective scan as it is defined: one step after another, in any dtype. Read this first.

Symbols, in the paper's names (Eqs. 1-4):

    u, x   (B, D, L), (B, H, W, D)   input sequence; input map
    delta  (B, D, L)                 step size, Δ = softplus(dt_low · W_dt + b_dt)
    A      (D, N)                    state matrix, diagonal, real (the 2-D operator takes A_log, A = -exp(A_log))
    B, C   (B, G, N, L)              input and output projections of the state, one pair a group of D/G channels
    D      (D,)                      skip
    h      (B, D, N)                 state

    h_t = exp(Δ_t A) ∘ h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t + D ∘ u_t

Everything else in this folder computes the same, faster.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import outside_autocast, state_dtype
from .routes import route_order, sequences


@outside_autocast
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
) -> tuple[Tensor, Tensor]:
    """The 1-D selective scan, Eqs. 2-4; arguments as in `msv.kernels.selective_scan`, B and C of shape (B, G, N, L).

    Returns:
        y (B, D, L) in the dtype of u, and the last state (B, D, N) in the dtype of states.
    """
    dtype = state_dtype(u, delta, A, B, C)
    out_dtype, groups = u.dtype, B.shape[1]
    u, delta, A, B, C = (t.to(dtype) for t in (u, delta, A, B, C))
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B = B.repeat_interleave(u.shape[1] // groups, dim=1)  # (B, D, N, L)
    C = C.repeat_interleave(u.shape[1] // groups, dim=1)

    h = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    steps = []
    for t in range(u.shape[2]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta[:, :, t] * u[:, :, t])[..., None] * B[..., t]
        steps.append((h * C[..., t]).sum(-1))
    y = torch.stack(steps, dim=-1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(out_dtype), h


@outside_autocast
def selective_scan_2d(
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D_skip: Tensor,
    routes: tuple[tuple[str, int], ...],
    carry_state: bool,
) -> Tensor:
    """The scan of a map over routes, Eqs. 6-10; arguments as in `msv.kernels.selective_scan_2d`.

    Returns:
        (B, K, H, W, D) in the dtype of x, each route put back on the map.
    """
    dtype = state_dtype(x, x_dbl, dt_weight, A_log)
    batch, height, width, channels = x.shape
    rank, length = dt_weight.shape[2], height * width
    d_state = A_log.shape[2]
    order = [route_order(name, height, width, x.device) for name, _ in routes]
    sets = tuple(weight_set for _, weight_set in routes)
    tokens = x.reshape(batch, length, channels).to(dtype)
    projected = x_dbl.reshape(batch, length, *x_dbl.shape[3:]).to(dtype)

    out: list[Tensor] = [tokens] * len(routes)
    for sequence in sequences(sets, carry_state):
        s = sets[sequence[0]]
        walk = torch.cat([order[route] for route in sequence])  # map position of each step, (n·L,)
        dt_low, B, C = projected[:, walk, s].split([rank, d_state, d_state], dim=-1)
        raw = dt_low @ dt_weight[s].to(dtype).T + dt_bias[s].to(dtype)
        y, _ = selective_scan(
            tokens[:, walk].mT,
            F.softplus(raw).mT,
            -torch.exp(A_log[s].to(dtype)),
            B.mT.unsqueeze(1),
            C.mT.unsqueeze(1),
            D_skip[s],
        )
        for route, piece in zip(sequence, y.mT.split(length, dim=1), strict=True):
            out[route] = piece[:, order[route].argsort()]
    return torch.stack(out, dim=1).reshape(batch, len(routes), height, width, channels).to(x.dtype)
