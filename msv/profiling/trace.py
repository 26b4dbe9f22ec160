"""Where a step goes: the time of its kernels by family, from torch's profiler."""

import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .devices import wait_for
from .timing import Work

FAMILIES = (
    "scan",
    "merge and gate",
    "depthwise convolution",
    "other convolution",
    "matrix products",
    "normalisation",
    "copies and casts",
    "other elementwise",
    "optimizer",
    "idle",
)
"""In the order of the table. `idle` is the time in which the GPU ran nothing; on a CPU that of no operator, which is
Python's and autograd's."""

# How the names of what is ours begin, operators' and kernels'; whatever goes on inside of them belongs to them.
_OURS = {
    "scan": ("msv::selective_scan", "scan_1d_", "scan_2d_", "carry_chunks"),
    "merge and gate": ("msv::merge_routes", "msv::gate", "normalise", "gate_"),
    "depthwise convolution": ("msv::depthwise_conv", "convolve", "sum_weights"),
    "normalisation": ("msv::add_norm", "add_norm_"),
}
_OPTIMIZER = ("optimizer.", "_foreach_lerp", "fused_adam")
# Parts of the names of other operators and kernels; the first family that fits.
_BY_NAME = {
    "depthwise convolution": ("dwconv", "depthwise"),
    "other convolution": ("convolution", "conv2d"),
    "normalisation": ("layer_norm", "layernorm", "batch_norm", "group_norm", "rms_norm"),
    "matrix products": (
        *("::mm", "addmm", "::bmm", "baddbmm", "matmul", "::linear", "scaled_dot_product", "attention"),
        *("gemm", "cutlass", "nvjet", "triton_tem_"),
    ),
    "copies and casts": (
        *("copy_", "_to_copy", "::clone", "::contiguous", "::cat", "::stack", "::flip", "memcpy", "memset"),
        *("::zero_", "::fill_", "::pad", "constant_pad", "::index"),
    ),
}
# What torch.compile fuses is named by the operators in it; these alone only move and cast.
_FUSED = re.compile(r"triton_(?!tem)[a-z]+_fused_(?P<operators>\w+?)_\d+$")
_MOVES = re.compile(
    r"_*(to_copy|clone|cat|stack|flip|permute|transpose|view|unsafe_view|reshape|expand|slice|select|split|unsqueeze"
    r"|squeeze|constant_pad_nd|copy|t)(?=_|$)"
)


@dataclass(frozen=True)
class Kernel:
    """A part of a step.

    Attributes:
        name: of a kernel, or on a CPU of an operator.
        family: of `FAMILIES`.
        seconds: of all steps together.
        calls: of all steps together.
    """

    name: str
    family: str
    seconds: float
    calls: int


@dataclass(frozen=True)
class Trace:
    """Where the time of some steps went.

    Attributes:
        seconds: of all steps together, as the clock has it.
        steps: how many.
        kernels: what ran, the longest first; `idle` is not among them.
    """

    seconds: float
    steps: int
    kernels: tuple[Kernel, ...]

    def shares(self) -> dict[str, tuple[float, float, int]]:
        """Seconds a step, share of the step, and calls a step of each family that took any, in order of `FAMILIES`.

        On a GPU kernels may run side by side, so that shares may add up to more than one.
        """
        seconds: dict[str, float] = defaultdict(float)
        calls: dict[str, int] = defaultdict(int)
        for kernel in self.kernels:
            seconds[kernel.family] += kernel.seconds
            calls[kernel.family] += kernel.calls
        seconds["idle"] = max(0.0, self.seconds - sum(seconds.values()))
        return {
            family: (seconds[family] / self.steps, seconds[family] / self.seconds, calls[family] // self.steps)
            for family in FAMILIES
            if seconds[family] > 0
        }


def trace(work: Work, device: torch.device, path: Path, steps: int = 3, warmup: int = 3) -> Trace:
    """Profiles some steps, and writes them as a Chrome trace, which chrome://tracing and ui.perfetto.dev show.

    Args:
        work: makes one step.
        device: where it runs.
        path: the trace's file, `.json` or `.json.gz`.
        steps: profiled, one after another.
        warmup: before them, in which kernels are compiled and loaded.

    Raises:
        OSError: the trace cannot be written.
    """
    # The profiler's library greets on stderr and looks for GPUs in vain.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    on_gpu = device.type == "cuda"
    for _ in range(warmup):
        work()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    wait_for(device)
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            work()
        wait_for(device)
        seconds = time.perf_counter() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        profiler.export_chrome_trace(str(path))
    except RuntimeError as error:
        raise OSError(f"{path}: the trace could not be written ({error})") from error
    events = profiler.events() or []
    found = _on_gpu(events) if on_gpu else _on_cpu(events)
    return Trace(seconds, steps, _summed(found))


def family(names: Sequence[str], depthwise: bool = False) -> str:
    """The family of a kernel.

    Args:
        names: of the kernel, of the operator that launched it, and of those round that one, the innermost first.
        depthwise: whether one of the operators is a convolution whose weight has one channel a group.
    """
    names = [name.lower() for name in names]
    for ours, starts in _OURS.items():
        if any(name.startswith(starts) for name in names):
            return ours
    if any(part in name for name in names for part in _OPTIMIZER):
        return "optimizer"
    found = next((one for name in names if (one := _named(name)) is not None), "other elementwise")
    return "depthwise convolution" if depthwise and found == "other convolution" else found


def _named(name: str) -> str | None:
    fused = _FUSED.match(name)
    if fused is not None:
        if any(part in name for part in _BY_NAME["normalisation"]):
            return "normalisation"
        return "other elementwise" if _MOVES.sub("", fused["operators"]) else "copies and casts"
    return next((one for one, parts in _BY_NAME.items() if any(part in name for part in parts)), None)


def _on_cpu(events: Sequence[Any]) -> Iterator[tuple[str, str, float]]:
    """Name, family and seconds of each operator's own time."""
    for event in events:
        seconds = event.self_cpu_time_total / 1e6
        # What autograd and the profiler's marks take beside the operators is no operator's time.
        if seconds > 0 and "::" in event.name and not event.name.startswith(("autograd::", "torch::autograd::")):
            names, depthwise = _lineage(event)
            yield event.name, family(names, depthwise), seconds


def _on_gpu(events: Sequence[Any]) -> Iterator[tuple[str, str, float]]:
    """Name, family and seconds of each kernel, copy and fill on the GPU."""
    launched: Counter[tuple[str, float]] = Counter()
    for event in events:
        if event.device_type == DeviceType.CPU and event.kernels:
            names, depthwise = _lineage(event)
            for kernel in event.kernels:
                launched[kernel.name, kernel.duration] += 1
                yield kernel.name, family([kernel.name, *names], depthwise), kernel.duration / 1e6
    for event in events:
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        # Compiled code launches kernels outside of any operator; their names alone tell what they are.
        key = (event.name, event.time_range.end - event.time_range.start)
        if launched[key]:
            launched[key] -= 1
        else:
            yield event.name, family([event.name]), key[1] / 1e6


def _lineage(event: Any) -> tuple[list[str], bool]:
    """An operator's name and those of the ones round it, and whether one is a depthwise convolution."""
    names, depthwise = [], False
    while event is not None:
        names.append(event.name)
        depthwise = depthwise or ("conv" in event.name.lower() and _is_depthwise(event.input_shapes or []))
        event = event.cpu_parent
    return names, depthwise


def _is_depthwise(shapes: Sequence[Any]) -> bool:
    """Whether the inputs of a convolution, or of its backward, end in a map of C channels and a weight (C, 1, k, k)."""
    sizes = [tuple(shape) for shape in shapes if len(shape) == 4]
    if len(sizes) < 2:
        return False
    (_, channels, *_), (out, each, *_) = sizes[-2:]
    return channels > 1 and (out, each) == (channels, 1)


def _summed(found: Iterator[tuple[str, str, float]]) -> tuple[Kernel, ...]:
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    calls: dict[tuple[str, str], int] = defaultdict(int)
    for name, one, time_taken in found:
        seconds[name, one] += time_taken
        calls[name, one] += 1
    kernels = [Kernel(name, one, seconds[name, one], calls[name, one]) for name, one in seconds]
    return tuple(sorted(kernels, key=lambda kernel: -kernel.seconds))
