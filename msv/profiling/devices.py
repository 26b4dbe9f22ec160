"""The device that a command runs on, and networks on none."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)

DEVICES = ("auto", "cpu", "cuda")


def chosen_device(name: str) -> torch.device:
    """The device of an option `--device`, of `DEVICES`; `auto` takes a GPU where there is one.

    Raises:
        ValueError: there is no GPU for `cuda`.
    """
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("--device is cuda, but torch finds no GPU here; use --device cpu, or auto for what there is")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def wait_for(device: torch.device) -> None:
    """Returns once the device has done what it was given; a CPU has done it by then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def without_weights(create: Callable[[], Network]) -> Network:
    """A network for counting: it fills no memory, unless it computes with values while it is built.

    Some of timm's do, and older versions of torch have no such operations on the device of no values.
    """
    try:
        with torch.device("meta"):
            return create()
    except (NotImplementedError, RuntimeError):
        return create()
