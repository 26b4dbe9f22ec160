"""The token mixers: SS2D of VMamba, and the paper's MS2D. Both turn a map (B, H, W, C) into one of the same shape.

Both project the map to x and a gate z of D = 2·C channels, mix x over positions, and gate and project the result
back. They differ in the middle: on which maps the routes run, and with how many S6 weight sets.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from msv.kernels import ROUTES, Backend, gate, merge_routes, selective_scan_2d

from .layers import AddNorm, DepthwiseConv, MapLinear, SplitLinear, SqueezeExcite, map_linear


class S6(nn.Module):
    """The selective state space over routes of a map (Eqs. 1-4), with one weight set a route or one for all of them.

    Args:
        channels: D.
        d_state: N.
        dt_rank: R, the width from which delta is projected.
        routes: names of the routes walked, in order.
        shared: whether all routes share one weight set.
        carry_state: whether, with a shared set, the state of a route is carried into the next (Eq. 9).
        backend: of the scan, see `msv.kernels.selective_scan_2d`.
    """

    def __init__(
        self,
        channels: int,
        d_state: int,
        dt_rank: int,
        routes: tuple[str, ...],
        shared: bool = False,
        carry_state: bool = False,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        sets = 1 if shared else len(routes)
        self.routes = tuple((route, 0 if shared else number) for number, route in enumerate(routes))
        self.carry_state, self.backend = carry_state, backend
        self.x_proj = nn.Parameter(torch.empty(sets, dt_rank + 2 * d_state, channels))
        self.dt_weight = nn.Parameter(torch.empty(sets, channels, dt_rank))
        self.dt_bias = nn.Parameter(torch.empty(sets, channels))
        self.A_log = nn.Parameter(torch.empty(sets, channels, d_state))
        self.D_skip = nn.Parameter(torch.empty(sets, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mamba's initial values: A = -(1..N), delta log-uniform in [1e-3, 1e-1], projections uniform."""
        nn.init.uniform_(self.x_proj, -(self.x_proj.shape[2] ** -0.5), self.x_proj.shape[2] ** -0.5)
        nn.init.uniform_(self.dt_weight, -(self.dt_weight.shape[2] ** -0.5), self.dt_weight.shape[2] ** -0.5)
        with torch.no_grad():
            log_delta = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1))
            delta = log_delta.exp().clamp(min=1e-4)
            self.dt_bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus
            self.A_log.copy_(torch.arange(1, self.A_log.shape[2] + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D_skip)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) to (B, K, H, W, D), each of K routes put back on the map."""
        x_dbl = map_linear(x, self.x_proj.flatten(0, 1)).unflatten(-1, self.x_proj.shape[:2])
        weights = (self.dt_weight, self.dt_bias, self.A_log, self.D_skip)
        return selective_scan_2d(x, x_dbl, *weights, self.routes, self.carry_state, backend=self.backend)


class SkipOnly(nn.Module):
    """S6 without its recurrence, y = D_skip ∘ x: the control in which nothing passes along a route.

    Args:
        channels: D.
        routes: names of the routes that S6 would walk.
        shared: whether all routes share one D_skip.
    """

    def __init__(self, channels: int, routes: tuple[str, ...], shared: bool = False) -> None:
        super().__init__()
        self.routes = routes
        self.D_skip = nn.Parameter(torch.ones(1 if shared else len(routes), channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, D) to (B, K, H, W, D), for each of K routes."""
        return (x[:, None] * self.D_skip.expand(len(self.routes), -1)[:, None, None]).to(x.dtype)


class TokenMixer(nn.Module):
    """What SS2D and MS2D share: projection in, SE, gate and projection out (Fig. 5)."""

    def __init__(self, dim: int, se: bool, backend: Backend) -> None:
        super().__init__()
        self.backend = backend
        self.in_proj = SplitLinear(dim, 4 * dim)
        self.se = SqueezeExcite(2 * dim) if se else nn.Identity()
        self.out_proj = MapLinear(2 * dim, dim, bias=False)

    @property
    def wants_means(self) -> bool:
        """Whether squeeze-excitation asks for the channels' means."""
        return isinstance(self.se, SqueezeExcite)

    def scan(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mixes x (B, H, W, D) over positions; if they are wanted, its channels' means (B, D) too."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x)
        m, means = self.scan(x)
        scale = None if means is None else self.se(means)
        return self.out_proj(gate(m, scale, z, backend=self.backend))


class SS2D(TokenMixer):
    """VMamba's 2-D selective scan (Eqs. 6-7): four routes, each with its own weight set, on one map.

    Args:
        dim: channels of the map, C.
        d_state: N.
        stride: 1, the 4/0 row of Table 5; or 2, its 0/4 row, the map scanned at half resolution and upsampled.
        se: whether squeeze-excitation follows the scan.
        backend: of the scans, and of the operators before and after them.
        recurrence: whether routes are scanned; if not, each is y = D_skip ∘ x, and d_state says nothing.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        stride: int = 1,
        se: bool = False,
        backend: Backend = "auto",
        recurrence: bool = True,
    ) -> None:
        super().__init__(dim, se, backend)
        self.dwconv = DepthwiseConv(2 * dim, 3, stride, backend)
        self.s6: S6 | SkipOnly = (
            S6(2 * dim, d_state, dt_rank(dim), ROUTES, backend=backend) if recurrence else SkipOnly(2 * dim, ROUTES)
        )
        self.norm = nn.LayerNorm(2 * dim, eps=1e-5)

    def scan(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        y, norm, size = self.s6(self.dwconv(x, "silu")), (self.norm.weight, self.norm.bias), tuple(x.shape[1:3])
        merge = partial(merge_routes, size=size, eps=self.norm.eps, means=self.wants_means, backend=self.backend)
        if self.dwconv.stride == (1, 1):
            return merge(y, None, *norm, None, None)
        return merge(None, y, None, None, *norm, sum_first=True)


class MS2D(TokenMixer):
    """The paper's multi-scale 2-D scan (Eqs. 8-11): the first routes on the full map, the others on a half map.

    Args:
        dim: channels of the map, C.
        d_state: N.
        full_scans: routes on the full map, 1 to 3, each with its own weight set; the other 4 - n run on the half map.
        carry_state: whether the state runs on over the seams of the half routes, which the published code joins into
            one sequence; needs `share_half`.
        share_half: whether the half routes share one weight set (published), or have one each.
        separate_norms: whether the half branch has a norm of its own; the published code has one for both.
        se: whether squeeze-excitation follows the scan.
        backend: of the scans, and of the operators before and after them.
        recurrence: whether routes are scanned; if not, each is y = D_skip ∘ x, and d_state says nothing.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        full_scans: int = 1,
        carry_state: bool = True,
        share_half: bool = True,
        separate_norms: bool = False,
        se: bool = False,
        backend: Backend = "auto",
        recurrence: bool = True,
    ) -> None:
        super().__init__(dim, se, backend)
        rank = dt_rank(dim)
        full, half = ROUTES[:full_scans], half_routes(full_scans)
        self.dwconv_full = DepthwiseConv(2 * dim, 3, backend=backend)
        self.dwconv_half = DepthwiseConv(2 * dim, 7, 2, backend)
        self.s6_full: S6 | SkipOnly
        self.s6_half: S6 | SkipOnly
        if recurrence:
            self.s6_full = S6(2 * dim, d_state, rank, full, backend=backend)
            self.s6_half = S6(2 * dim, d_state, rank, half, share_half, carry_state and share_half, backend)
        else:
            self.s6_full, self.s6_half = SkipOnly(2 * dim, full), SkipOnly(2 * dim, half, share_half)
        self.norm = nn.LayerNorm(2 * dim, eps=1e-5)
        self.norm_half = nn.LayerNorm(2 * dim, eps=1e-5) if separate_norms else None

    def scan(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        full = self.s6_full(self.dwconv_full(x, "silu"))
        half = self.s6_half(self.dwconv_half(x, "silu"))
        half_norm = self.norm_half or self.norm
        # The published order: the full routes are normalised after their sum, the half routes before theirs.
        return merge_routes(
            full,
            half,
            self.norm.weight,
            self.norm.bias,
            half_norm.weight,
            half_norm.bias,
            size=tuple(x.shape[1:3]),
            eps=self.norm.eps,
            means=self.wants_means,
            backend=self.backend,
        )


def half_routes(full_scans: int) -> tuple[str, ...]:
    """The routes left to the half map, in the order in which the published code joins them."""
    return tuple(route for route in ("rowR", "col", "colR") if route not in ROUTES[:full_scans])


def dt_rank(dim: int) -> int:
    """R = ceil(dim / 16)."""
    return math.ceil(dim / 16)


def use_backend(network: nn.Module, backend: Backend) -> None:
    """Has all operators of a network run by another backend than it was built with."""
    for module in network.modules():
        if isinstance(module, (AddNorm, DepthwiseConv, S6, TokenMixer)):
            module.backend = backend
