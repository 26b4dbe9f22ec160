"""The times of kernels without the host's part: batches of calls, captured as CUDA graphs, in turns."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from .devices import wait_for
from .timing import Timing, Work

FLUSH_BYTES = 512 << 20
"""What is written before each batch: several times the L2, and some 0.2 ms in which the host launches the batch."""
Clock = Callable[[Mapping[str, Work]], dict[str, float]]


@dataclass(frozen=True)
class Measured:
    """What came of `time_batches`.

    Attributes:
        times: of one call of each work.
        method: `graph`, where the batches were CUDA graphs; `calls`, where the calls were made one after another.
        repeats: timed turns.
        note: why there were no graphs, on a GPU; otherwise empty.
    """

    times: dict[str, Timing]
    method: str
    repeats: int
    note: str = ""


def time_batches(
    works: Mapping[str, Sequence[Work]], device: torch.device, repeats: int = 30, seconds: float = 1.0
) -> Measured:
    """Times works against each other, in turns, each as a batch of calls one after another.

    On a GPU a batch is captured as one CUDA graph, so that neither launches nor autograd's bookkeeping is timed, and
    before each batch the L2 is overwritten. Where one of the works cannot be captured, none is: all are timed alike.

    Args:
        works: by name, the calls of a batch: the same work on different tensors, so that together they exceed the L2.
        device: where the calls run.
        repeats: timed turns, at most.
        seconds: after which no further turn begins; three turns are timed in any case, or `repeats` if that is less.
    """
    method, note = "calls", ""
    batches: dict[str, Work] = {name: partial(_one_after_another, calls) for name, calls in works.items()}
    if device.type == "cuda":
        try:
            batches, method = capture(works, device), "graph"
        except RuntimeError as error:
            note = f"no CUDA graph: {str(error).strip().splitlines()[0]}"
    found = turns(batches, _CudaClock(device) if device.type == "cuda" else _cpu_clock, repeats, seconds)
    times = {name: [t / len(works[name]) for t in values] for name, values in found.items()}
    timings = {name: Timing(statistics.median(values), min(values)) for name, values in times.items()}
    return Measured(timings, method, len(next(iter(times.values()))), note)


def turns(batches: Mapping[str, Work], clock: Clock, repeats: int, seconds: float) -> dict[str, list[float]]:
    """The times in seconds of each batch, of one turn after another; an untimed turn comes first."""
    found: dict[str, list[float]] = {name: [] for name in batches}
    clock(batches)
    start = time.perf_counter()
    for turn in range(repeats):
        if turn >= 3 and time.perf_counter() - start > seconds:
            break
        for name, value in clock(batches).items():
            found[name].append(value)
    return found


def capture(works: Mapping[str, Sequence[Work]], device: torch.device) -> dict[str, Work]:
    """Each batch as the replay of a CUDA graph.

    Raises:
        RuntimeError: a work does what cannot be captured, such as waiting for the GPU, or memory does not suffice;
            torch may then refuse to capture anything else in this process.
    """
    # One pool for all graphs: they replay one after another, and nobody reads what they leave.
    stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
    replays: dict[str, Work] = {}
    for name, calls in works.items():
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            calls[0]()  # what is compiled or loaded at a first call cannot be captured
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            for call in calls:
                call()
        replays[name] = graph.replay
    return replays


def time_eagerly(work: Work, device: torch.device, repeats: int = 10, seconds: float = 0.3) -> float:
    """Seconds of one call made from Python, the host's part included: the mean of calls one after another.

    A first call shows how long it takes and is left out, unless it alone exceeds `seconds`; then it stands.

    Args:
        work: what to time.
        device: where it runs.
        repeats: calls at most.
        seconds: that they may take.
    """
    first = _wall_clock([work], device)
    if first > seconds:
        return first
    calls = max(1, min(repeats, int(seconds / max(first, 1e-9))))
    return _wall_clock([work] * calls, device) / calls


def _one_after_another(calls: Sequence[Work]) -> None:
    for call in calls:
        call()


def _wall_clock(calls: Sequence[Work], device: torch.device) -> float:
    wait_for(device)
    start = time.perf_counter()
    _one_after_another(calls)
    wait_for(device)
    return time.perf_counter() - start


def _cpu_clock(batches: Mapping[str, Work]) -> dict[str, float]:
    return {name: _wall_clock([batch], torch.device("cpu")) for name, batch in batches.items()}


class _CudaClock:
    """Times batches with the GPU's events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, batches: Mapping[str, Work]) -> dict[str, float]:
        events = {}
        for name, batch in batches.items():
            # While the GPU writes this, the host launches what is timed: its launch is not.
            self.buffer.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            batch()
            end.record()
            events[name] = (start, end)
        torch.cuda.synchronize(self.device)
        return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in events.items()}
