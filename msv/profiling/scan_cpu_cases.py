"""What the scan's benchmark times on a CPU: calls of the operators, and the yardsticks beside them.

A new shape is an entry of `CASES`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msv.kernels import selective_scan, selective_scan_2d
from msv.models import MSVMamba, mixers

from .scan_call import Call, Columns, leaves
from .timing import Work

MAX_MEMORY_RATIO = 6.0


@dataclass(frozen=True)
class Made:
    """A case on tensors of its own.

    Attributes:
        shape: columns of the row: B, K, D, L, R and map.
        calls: what is timed, one after another.
        yardstick: what is timed in turns with them.
    """

    shape: Columns
    calls: tuple[Call, ...]
    yardstick: Work


@dataclass(frozen=True)
class Case:
    """A row of the benchmark, in float32.

    Attributes:
        what: the row in words.
        operator: `1d` or `2d`.
        d_state: N.
        yardstick: in words.
        make: makes the calls.
        repeats: timed turns.
        max_ratio: the bar for forward plus backward over the yardstick.
        max_memory_ratio: the bar for the peak of memory over inputs plus output; for a single call only.
    """

    what: str
    operator: str
    d_state: int
    yardstick: str
    make: Callable[[], Made]
    repeats: int
    max_ratio: float | None = None
    max_memory_ratio: float | None = None

    @property
    def columns(self) -> dict[str, str]:
        """As a row has it."""
        about = {"what": self.what, "operator": self.operator, "N": str(self.d_state), "dtype": "float32"}
        return {**about, "yardstick": self.yardstick}

    def __str__(self) -> str:
        return f"{self.what}, N={self.d_state}"


@dataclass(frozen=True)
class SequenceEntry:
    """1-D: `selective_scan` of u (B, D, L) against `torch.cumsum` of u, for each N with the bar there is for it."""

    batch: int
    channels: int
    length: int
    d_states: dict[int, float | None]

    def cases(self) -> list[Case]:
        """A row for each N."""
        yardstick = "torch.cumsum(u, -1), forward and backward"
        return [
            Case("1-D scan", "1d", N, yardstick, partial(self.make, N), 30, max_ratio, MAX_MEMORY_RATIO)
            for N, max_ratio in self.d_states.items()
        ]

    def make(self, d_state: int) -> Made:
        """One call, and the cumulative sum of its u."""
        u, upstream = (torch.randn(self.batch, self.channels, self.length) for _ in range(2))
        delta = torch.empty_like(u).uniform_(1e-3, 1e-1)
        A = -torch.arange(1.0, d_state + 1).repeat(self.channels, 1)
        B, C = (torch.randn(self.batch, d_state, self.length) for _ in range(2))
        call = Call(partial(selective_scan, backend="auto"), leaves(u, delta, A, B, C), upstream)
        yardstick = Call(partial(torch.cumsum, dim=-1), leaves(u), upstream)
        sizes: Columns = {"B": self.batch, "K": 1, "D": self.channels, "L": self.length, "R": "", "map": ""}
        return Made(sizes, (call,), yardstick.forward_backward)

    def tiny(self) -> "SequenceEntry":
        """The same at a tiny size."""
        return replace(self, channels=4, length=50)


@dataclass(frozen=True)
class MapEntry:
    """2-D: the first scan of a training step of `network` on a batch of images, and all of its scans, over the step."""

    batch: int
    image_size: int
    network: dict[str, Any]
    max_ratio: float | None = None

    def cases(self) -> list[Case]:
        """A row for the first scan, and one for all."""
        about = (self.network["d_state"], f"a training step, batch {self.batch}")
        first, whole = partial(self.make, slice(1)), partial(self.make, slice(None))
        return [
            Case("2-D scan", "2d", *about, first, 10, self.max_ratio, MAX_MEMORY_RATIO),
            Case("2-D scans of the step", "2d", *about, whole, 10, self.max_ratio),
        ]

    def make(self, scans: slice) -> Made:
        """Some of the scans, with the very tensors of a step, and a step."""
        images = torch.randn(self.batch, 3, self.image_size, self.image_size)
        labels = torch.randint(10, (self.batch,))
        network = MSVMamba(3, 10, **self.network).train()
        calls = record_scans(network, images, labels)[scans]
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()

        return Made(_map_shape(calls), calls, step)

    def tiny(self) -> "MapEntry":
        """The same at a tiny size."""
        return replace(self, batch=2, network={**self.network, "dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1)})


SEQUENCES = (SequenceEntry(batch=1, channels=192, length=3136, d_states={1: 10.0, 8: None}),)
# The 4/0 row of Table 5 as experiments/ablate_scans.yaml trains it on digits, and the same with one state a channel.
_FOUR_FULL_SCANS = {"depths": (2, 2, 6, 2), "d_state": 8, "full_scans": 4, "se": False, "conv_ffn": False}
MAPS = (
    MapEntry(batch=64, image_size=32, network=_FOUR_FULL_SCANS, max_ratio=0.5),
    MapEntry(batch=64, image_size=32, network={**_FOUR_FULL_SCANS, "d_state": 1}),
)


def cases(quick: bool = False) -> list[Case]:
    """What is timed.

    Args:
        quick: the same at tiny sizes and without bars, to see that everything runs.
    """
    if not quick:
        return [case for entry in (*SEQUENCES, *MAPS) for case in entry.cases()]
    found = [case for entry in (*SEQUENCES, *MAPS) for case in entry.tiny().cases()]
    return [replace(case, max_ratio=None, max_memory_ratio=None, repeats=2) for case in found]


def record_scans(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Call, ...]:
    """Carries out a step's forward and backward and returns its 2-D scans: their tensors, and the gradients they got.

    Args:
        network: a model of `msv.models`.
        images: (B, C, H, W).
        labels: (B,).
    """
    found: list[dict[str, Any]] = []

    def recording(*arguments: Any, **options: Any) -> Tensor:
        y = selective_scan_2d(*arguments, **options)
        call: dict[str, Any] = {"tensors": arguments[:6], "rest": arguments[6:], "options": options}
        y.register_hook(partial(call.__setitem__, "upstream"))
        found.append(call)
        return y

    mixers.selective_scan_2d = recording
    try:
        F.cross_entropy(network(images), labels).backward()
    finally:
        mixers.selective_scan_2d = selective_scan_2d

    def again(call: dict[str, Any]) -> Call:
        def function(*tensors: Tensor) -> Tensor:
            return selective_scan_2d(*tensors, *call["rest"], **call["options"])

        return Call(function, leaves(*call["tensors"]), call["upstream"].detach())

    return tuple(again(call) for call in found)


def _map_shape(calls: tuple[Call, ...]) -> Columns:
    """The shape columns of one call, or of several: the values that differ stand beside each other."""
    found: list[Columns] = []
    for call in calls:
        x, _, dt_weight, _, A_log, _ = call.tensors
        (batch, height, width, channels), d_state, rank = x.shape, A_log.shape[2], dt_weight.shape[2]
        sizes = {"B": batch, "K": call.upstream.shape[1], "D": channels, "L": height * width, "N": d_state, "R": rank}
        found.append({**sizes, "map": f"{height}x{width}"})
    different = {name: list(dict.fromkeys(shape[name] for shape in found)) for name in found[0]}
    return {name: values[0] if len(values) == 1 else "/".join(map(str, values)) for name, values in different.items()}
