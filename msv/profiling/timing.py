"""How long a call takes and how much memory it needs, on a CPU or a GPU."""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """The times of repeated calls.

    Attributes:
        median: in seconds.
        minimum: in seconds.
    """

    median: float
    minimum: float


def medians_interleaved(
    works: Mapping[str, Work], device: torch.device, repeats: int, warmup: int = 2
) -> dict[str, Timing]:
    """Times several calls against each other: they take turns, so that a machine that slows down slows all of them.

    In its turn a call runs twice and the second is timed, so that none meets the caches as another left them.

    Args:
        works: what to time, by name.
        device: where the calls run; on a GPU its own events measure, so a call whose kernels take longer than their
            launches is timed without them.
        repeats: timed turns.
        warmup: turns before them.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-warmup, repeats):
        for name, work in works.items():
            work()
            seconds = call_seconds(work, device)
            if turn >= 0:
                times[name].append(seconds)
    return {name: Timing(statistics.median(seconds), min(seconds)) for name, seconds in times.items()}


def call_seconds(work: Work, device: torch.device) -> float:
    """Seconds of one call: on a GPU between two of its events, elsewhere by the clock."""
    return _cuda_seconds(work) if device.type == "cuda" else _cpu_seconds(work)


def peak_memory(work: Work, device: torch.device) -> int:
    """The most bytes of tensors alive at once during a call, beyond those alive before it.

    What the call returns is kept until its end. On a CPU every allocation and release is followed; on a GPU torch's
    allocator says.
    """
    work()  # what is allocated once and kept, such as a library's workspace, is not the call's
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = [work()]
        peak = torch.cuda.max_memory_allocated(device) - before
        kept.clear()
        return peak
    # The profiler's library greets on stderr and looks for GPUs in vain.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        kept = [work()]
    kept.clear()
    if profiler.profiler is None or profiler.profiler.kineto_results is None:
        raise RuntimeError("torch's profiler returned no events; this build of torch cannot follow CPU memory")
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


@contextmanager
def torch_threads(number: int | None) -> Iterator[None]:
    """As many CPU threads of torch as that, for a while; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def nbytes(*tensors: Tensor) -> int:
    """Bytes that tensors take up: an expanded one what it is expanded from, a view of a larger one its own elements."""
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


def _cpu_seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cuda_seconds(work: Work) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
