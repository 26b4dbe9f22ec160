"""One call of a scan on tensors of its own: what every benchmark of the scan times."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Columns = dict[str, int | str]


@dataclass(frozen=True)
class Call:
    """One call of an operator on tensors of its own, and the gradient that comes back to its output."""

    function: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]
    upstream: Tensor

    def forward(self) -> Tensor:
        """The output, nothing kept for a backward."""
        with torch.no_grad():
            return self.function(*self.tensors)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The output and the gradients of all tensors."""
        y = self.function(*self.tensors)
        return y, *torch.autograd.grad(y, self.tensors, self.upstream)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory as tensors that gradients are asked of."""
    return tuple(t.detach().requires_grad_() for t in tensors)


def dtype_name(dtype: torch.dtype) -> str:
    """As the CSV has it: without torch."""
    return str(dtype).removeprefix("torch.")
