"""One call of an operator on tensors of its own: what every benchmark of an operator times."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Columns = dict[str, int | str]
Outputs = TypeVar("Outputs", Tensor, tuple[Tensor, ...])


@dataclass(frozen=True)
class Call(Generic[Outputs]):
    """One call of an operator on tensors of its own, and the gradients that come back to its outputs, one or more."""

    function: Callable[..., Outputs]
    tensors: tuple[Tensor, ...]
    upstream: Outputs

    def forward(self) -> Outputs:
        """The outputs, nothing kept for a backward."""
        with torch.no_grad():
            return self.function(*self.tensors)

    def forward_backward(self) -> tuple[Tensor, ...]:
        """The outputs and the gradients of all tensors."""
        found: Any = self.function(*self.tensors)
        gradients: tuple[Tensor, ...] = torch.autograd.grad(found, self.tensors, self.upstream)
        return (*found, *gradients) if isinstance(found, tuple) else (found, *gradients)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same memory as tensors that gradients are asked of."""
    return tuple(t.detach().requires_grad_() for t in tensors)


def dtype_name(dtype: torch.dtype) -> str:
    """As the CSV has it: without torch."""
    return str(dtype).removeprefix("torch.")
