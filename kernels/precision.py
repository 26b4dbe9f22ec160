"""In what precision the scan computes: its own choice, whatever the inputs and autocast are."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def state_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of states and exponentials: float64 where any input is, float32 otherwise, bf16 and fp16 included."""
    for t in tensors:
        if t is not None and t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def outside_autocast(scan: Callable[P, R]) -> Callable[P, R]:
    """Runs a function of tensors with autocast off, which would make its matrix products bf16 or fp16."""

    @wraps(scan)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next(t.device.type for t in args if isinstance(t, Tensor))
        if device == "meta" or not torch.is_autocast_enabled(device):  # an exported graph need not know of autocast
            return scan(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return scan(*args, **kwargs)

    return run
