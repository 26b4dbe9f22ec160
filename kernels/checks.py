"""What every operator does first: checks its arguments, and which backend can run here."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "parallel", "reference"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# Both are settled before Triton is imported, which is not before a kernel is asked for.
HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def check_backend(backend: str, x: Tensor, states: torch.dtype) -> str:
    """Checks that a backend is known and can run here, and returns it.

    Args:
        backend: its name.
        x: an input, on the device where it would run.
        states: the dtype of states and sums, of `precision.state_dtype`.

    Raises:
        ValueError: the backend is unknown, or is `triton` and there is no Triton, no GPU, or an input in float64.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; expected one of {', '.join(BACKENDS)}")
    if backend == "triton":
        remedy = "use 'auto' or 'parallel', which run in torch on any device"
        if not HAS_TRITON:
            raise ValueError(
                f"backend 'triton' needs the package triton, which is not installed; install it, or {remedy}"
            )
        if not (x.is_cuda or INTERPRETED):
            raise ValueError(
                f"backend 'triton' needs a GPU, but the input is on {x.device}; {remedy}, or set TRITON_INTERPRET=1 "
                "before Python starts, which runs the kernels slowly in Triton's interpreter"
            )
        if states == torch.float64:
            raise ValueError(f"backend 'triton' keeps states in float32, but an input is float64; {remedy}")
    return backend


def runs_triton(backend: str, x: Tensor, states: torch.dtype) -> bool:
    """Whether `auto` or `triton` means the Triton kernels for this input, rather than torch's operators."""
    return backend == "triton" or (x.is_cuda and HAS_TRITON and states == torch.float32)


def exporting() -> bool:
    """Whether the call is traced for an export; `torch.compile` of torch 2.11 takes itself for one, too."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def settle_backend(backend: str, x: Tensor, states: torch.dtype) -> str:
    """As `check_backend`, with `auto` settled: `triton` where it can run, but `parallel` elsewhere and in an export."""
    if check_backend(backend, x, states) != "auto":
        return backend
    return "triton" if runs_triton(backend, x, states) and not exporting() else "parallel"


def check_floating(**tensors: Tensor | None) -> None:
    """Checks that arguments, by name, are real numbers; None is no argument.

    Raises:
        TypeError: one is complex or not floating point.
    """
    for name, t in tensors.items():
        if t is not None and not t.is_floating_point():
            kind = "real A only: split a complex A into real states" if t.is_complex() else "a floating point dtype"
            raise TypeError(f"{name} is {t.dtype}; expected {kind}")


def check_shape(name: str, t: Tensor, dims: Sequence[str | int], known: dict[str, int]) -> None:
    """Checks the shape of an argument.

    Args:
        name: of the argument.
        t: the argument.
        dims: names of its dimensions, or sizes; a name that stands there twice is one size.
        known: sizes by name of dimension, as earlier arguments have them; empty for the first one.

    Raises:
        ValueError: the shape does not fit, or the first argument has no elements.
    """
    found: dict[str, int] = {}
    fits = t.dim() == len(dims)
    if fits:
        for d, n in zip(dims, t.shape, strict=True):
            size = d if isinstance(d, int) else known[d] if d in known else found.setdefault(d, n)
            if size != n:
                fits = False
                break
    if not fits:
        expected = ", ".join(f"{d}={known[d]}" if d in known else str(d) for d in dims)
        raise ValueError(f"{name} has shape {tuple(t.shape)}; expected ({expected})")
    if not known and t.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(t.shape)} and so no elements; expected one or more")
