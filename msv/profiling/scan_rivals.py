"""How Mamba's CUDA scan does the work of our operators on the same tensors: alone, or amid cross-scan and cross-merge.

A scan of sequences wants every route of a map copied out of it: the map's rows, its columns, and both flipped
(cross-scan); and the routes' outputs brought back and added (cross-merge). Both are here as published, in torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .scan_gpu_cases import SS2D, Case, MapCase

SUPPORTED_MAPS = f"cross-scan knows the routes {' '.join(name for name, _ in SS2D)}, a weight set each"


class Kernel(Protocol):
    """What `msv.profiling.mamba_cuda.load` gives."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...

    def forward(
        self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, delta_bias: Tensor | None
    ) -> Tensor:
        """y, with delta's softplus."""

    def forward_backward(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        dy: Tensor,
    ) -> tuple[Tensor, ...]:
        """y, and the gradients of u, delta, A, B, C, D and delta_bias."""


@dataclass(frozen=True)
class RivalCall:
    """The rival's call beside one of ours; neither of its functions keeps a graph.

    Attributes:
        forward: y.
        forward_backward: y and the gradients of all that ours gives gradients of.
        alike: turns our output into one that compares with y.
    """

    forward: Callable[[], Tensor]
    forward_backward: Callable[[], tuple[Tensor, ...]]
    alike: Callable[[Tensor], Tensor]


def rival_call(kernel: Kernel, case: Case, tensors: tuple[Tensor, ...], upstream: Tensor) -> RivalCall | None:
    """The rival's call for a case, on the tensors of ours; None where it has no such operator."""
    inputs = tuple(t.detach() for t in tensors)
    if not isinstance(case, MapCase):
        return RivalCall(
            lambda: kernel.forward(*inputs), lambda: kernel.forward_backward(*[*inputs, upstream]), lambda y: y
        )
    if case.routes != SS2D or case.carry_state:
        return None
    ss2d = CrossScanned(kernel, upstream[:, 0], *inputs)
    return RivalCall(ss2d.forward, ss2d.forward_backward, lambda y: y.sum(1).flatten(1, 2).mT)


def cross_scan(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, 4, C, L): rows, columns, and both from the end."""
    onward = torch.stack([x.flatten(2), x.mT.flatten(2)], dim=1)
    return torch.cat([onward, onward.flip(-1)], dim=1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, C, L) to (B, C, L): the sum of the routes, each put back on the map."""
    y = y[:, :2] + y[:, 2:].flip(-1)
    return y[:, 0] + y[:, 1].unflatten(-1, (width, height)).mT.flatten(2)


class CrossScanned:
    """SS2D's scan as published, but in the dtype of x: cross-scan, delta's projection, the kernel, cross-merge.

    It gets the map channels first and x_dbl in the order of the routes, as a network built round it has them.
    Arguments as those of `msv.kernels.selective_scan_2d`; before them the gradient of the sum of routes, (B, H, W, D).
    """

    def __init__(
        self,
        kernel: Kernel,
        dmerged: Tensor,
        x: Tensor,
        x_dbl: Tensor,
        dt_weight: Tensor,
        dt_bias: Tensor,
        A_log: Tensor,
        D_skip: Tensor,
    ) -> None:
        self.kernel, self.rank, self.d_state = kernel, dt_weight.shape[2], A_log.shape[2]
        self.size = (x.shape[1], x.shape[2])
        self.x = x.permute(0, 3, 1, 2).contiguous()
        walks = [cross_scan(x_dbl[..., k, :].permute(0, 3, 1, 2))[:, k] for k in range(4)]
        self.x_dbl = torch.stack(walks, dim=1)  # (B, 4, R + 2N, L)
        self.dt_weight = dt_weight.to(x.dtype)
        self.A = -A_log.exp().flatten(0, 1)  # (4·D, N)
        self.skip, self.bias = D_skip.flatten(), dt_bias.flatten()
        self.dmerged = dmerged.permute(0, 3, 1, 2).contiguous()

    def forward(self) -> Tensor:
        """The sum of routes, (B, D, L)."""
        return self._merge(self.kernel.forward(*self._inputs()))

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The sum of routes, and the gradients of x, x_dbl, dt_weight, dt_bias, A and D_skip in the layouts above."""
        # Cross-merge's backward is cross-scan, and the other way round.
        dy = cross_scan(self.dmerged).flatten(1, 2)
        y, du, ddelta, dA, dB, dC, dskip, dbias = self.kernel.forward_backward(*[*self._inputs(), dy])
        ddelta = ddelta.unflatten(1, (4, -1))
        dlow = torch.einsum("bkdl,kdr->bkrl", ddelta, self.dt_weight)
        dweight = torch.einsum("bkdl,bkrl->kdr", ddelta, self.x_dbl[:, :, : self.rank])
        return self._merge(y), self._merge(du), torch.cat([dlow, dB, dC], dim=2), dweight, dbias, dA, dskip

    def _inputs(self) -> tuple[Tensor, ...]:
        low, B, C = self.x_dbl.split([self.rank, self.d_state, self.d_state], dim=2)
        delta = torch.einsum("bkrl,kdr->bkdl", low, self.dt_weight)
        return cross_scan(self.x).flatten(1, 2), delta.flatten(1, 2), self.A, B, C, self.skip, self.bias

    def _merge(self, y: Tensor) -> Tensor:
        return cross_merge(y.unflatten(1, (4, -1)), *self.size)
