"""What the scan's benchmark times on a CPU: calls of the operators, and the yardsticks beside them.

A new shape is an entry of `SEQUENCES` or `MAPS`, a new backend one of `BACKENDS`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msv.kernels import Backend, selective_scan, selective_scan_2d
from msv.models import MSVMamba, mixers

from .scan_call import Call, Shape, leaves
from .timing import Work

BACKENDS: tuple[Backend, ...] = ("auto",)


@dataclass(frozen=True)
class Case:
    """A row of the benchmark.

    Attributes:
        what: the row in words.
        operator: `1d` or `2d`.
        shape: columns of the row: B, K, D, L, N, R and map.
        calls: what is timed, one after another.
        backend: of the operator.
        max_ratio: the bar for forward plus backward over the yardstick.
        max_memory_ratio: the bar for the peak of memory over inputs plus output; measured for a single call only.
    """

    what: str
    operator: str
    shape: Shape
    calls: tuple[Call, ...]
    backend: Backend
    max_ratio: float | None = None
    max_memory_ratio: float | None = None


@dataclass(frozen=True)
class Group:
    """Cases that are timed in turns with one yardstick.

    Attributes:
        yardstick: in words.
        yardstick_work: what is timed.
        cases: timed beside it.
        repeats: timed turns.
    """

    yardstick: str
    yardstick_work: Work
    cases: tuple[Case, ...]
    repeats: int


@dataclass(frozen=True)
class SequenceEntry:
    """1-D: u (B, D, L) against `torch.cumsum` of u, for each N of `d_states`, with the bar there is for it."""

    batch: int
    channels: int
    length: int
    d_states: dict[int, float | None]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class MapEntry:
    """2-D: the first scan of a training step of `network` on a batch of images, and all of its scans, over the step."""

    batch: int
    image_size: int
    network: dict[str, Any]
    max_ratio: float | None = None


SEQUENCES = (SequenceEntry(batch=1, channels=192, length=3136, d_states={1: 10.0, 8: None}),)
# The 4/0 row of Table 5 as experiments/ablate_scans.yaml trains it on digits, and the same with one state a channel.
_FOUR_FULL_SCANS = {"depths": (2, 2, 6, 2), "d_state": 8, "full_scans": 4, "se": False, "conv_ffn": False}
MAPS = (
    MapEntry(batch=64, image_size=32, network=_FOUR_FULL_SCANS, max_ratio=0.5),
    MapEntry(batch=64, image_size=32, network={**_FOUR_FULL_SCANS, "d_state": 1}),
)
MAX_MEMORY_RATIO = 6.0


def groups(device: torch.device, quick: bool) -> Iterator[Group]:
    """Makes the groups one after another, so that only one lies in memory.

    Args:
        device: where the tensors lie.
        quick: the same groups at tiny sizes and without bars, to see that everything runs.
    """
    makers = [
        *(partial(sequence_group, _tiny_sequence(entry) if quick else entry) for entry in SEQUENCES),
        *(partial(map_group, _tiny_map(entry) if quick else entry) for entry in MAPS),
    ]
    for make in makers:
        group = make(device)
        if quick:
            bare = tuple(replace(case, max_ratio=None, max_memory_ratio=None) for case in group.cases)
            group = replace(group, cases=bare, repeats=2)
        yield group


def sequence_group(entry: SequenceEntry, device: torch.device) -> Group:
    """`selective_scan(u, delta, A, B, C)` for each N, and `torch.cumsum(u, -1)`."""
    random = partial(torch.randn, device=device, dtype=entry.dtype)
    u, upstream = (random(entry.batch, entry.channels, entry.length) for _ in range(2))
    delta = torch.empty_like(u).uniform_(1e-3, 1e-1)
    cases = []
    for d_state, max_ratio in entry.d_states.items():
        A = -torch.arange(1, d_state + 1, device=device, dtype=torch.float32).repeat(entry.channels, 1)
        B, C = (random(entry.batch, d_state, entry.length) for _ in range(2))
        sizes = {"B": entry.batch, "K": 1, "D": entry.channels, "L": entry.length, "N": d_state}
        shape: Shape = {**sizes, "R": "", "map": ""}
        for backend in BACKENDS:
            call = Call(partial(selective_scan, backend=backend), leaves(u, delta, A, B, C), upstream)
            cases.append(Case("1-D scan", "1d", shape, (call,), backend, max_ratio, MAX_MEMORY_RATIO))
    yardstick = Call(partial(torch.cumsum, dim=-1), leaves(u), upstream)
    return Group("torch.cumsum(u, -1), forward and backward", yardstick.forward_backward, tuple(cases), repeats=30)


def map_group(entry: MapEntry, device: torch.device) -> Group:
    """A training step of a network, its first scan and all of its scans, with the very tensors of a step."""
    images = torch.randn(entry.batch, 3, entry.image_size, entry.image_size, device=device)
    labels = torch.randint(10, (entry.batch,), device=device)
    cases = []
    for backend in BACKENDS:
        network = MSVMamba(3, 10, backend=backend, **entry.network).to(device).train()
        calls = record_scans(network, images, labels)
        memory = MAX_MEMORY_RATIO
        cases += [
            Case("2-D scan", "2d", _map_shape(calls[:1]), calls[:1], backend, entry.max_ratio, memory),
            Case("2-D scans of the step", "2d", _map_shape(calls), calls, backend, entry.max_ratio),
        ]
    network = MSVMamba(3, 10, **entry.network).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return Group(f"a training step, batch {entry.batch}", step, tuple(cases), repeats=10)


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


def _map_shape(calls: tuple[Call, ...]) -> Shape:
    """The shape columns of one call, or of several: the values that differ stand beside each other."""
    found: list[Shape] = []
    for call in calls:
        x, _, dt_weight, _, A_log, _ = call.tensors
        (batch, height, width, channels), d_state, rank = x.shape, A_log.shape[2], dt_weight.shape[2]
        sizes = {"B": batch, "K": call.upstream.shape[1], "D": channels, "L": height * width, "N": d_state, "R": rank}
        found.append({**sizes, "map": f"{height}x{width}"})
    different = {name: list(dict.fromkeys(shape[name] for shape in found)) for name in found[0]}
    return {name: values[0] if len(values) == 1 else "/".join(map(str, values)) for name, values in different.items()}


def _tiny_sequence(entry: SequenceEntry) -> SequenceEntry:
    return replace(entry, channels=4, length=50)


def _tiny_map(entry: MapEntry) -> MapEntry:
    return replace(entry, batch=2, network={**entry.network, "dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1)})
