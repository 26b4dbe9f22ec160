import itertools
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from msv.profiling import batches
from msv.profiling.batches import capture, time_batches, time_eagerly, turns

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def ticking(order, seconds):
    """A clock that notes what ran and says how long it took."""

    def clock(works):
        for name, work in works.items():
            work()
            order.append(name)
        return dict(zip(works, seconds, strict=True))

    return clock


def test_turns_are_interleaved_after_an_untimed_one():
    order = []
    found = turns(dict.fromkeys("ab", lambda: None), ticking(order, (1.0, 2.0)), repeats=3, seconds=60)
    assert "".join(order) == "ab" * 4
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}


@pytest.mark.parametrize(("repeats", "expected"), [(2, 2), (30, 3)])
def test_when_time_is_up_three_turns_suffice(repeats, expected):
    found = turns({"a": lambda: None}, ticking([], (1.0,)), repeats, seconds=0)
    assert len(found["a"]) == expected


def test_times_are_of_one_call():
    found = time_batches({"a": [lambda: time.sleep(2e-3)] * 3, "b": [lambda: time.sleep(1e-3)]}, CPU, repeats=3)
    assert 6e-3 > found.times["a"].minimum >= 2e-3
    assert found.times["b"].minimum >= 1e-3
    assert (found.method, found.repeats, found.note) == ("calls", 3, "")


@pytest.fixture
def no_gpu_needed(monkeypatch):
    monkeypatch.setattr(
        batches, "_CudaClock", lambda device: lambda works: {name: work() for name, work in works.items()}
    )


def test_on_a_gpu_batches_are_graphs(monkeypatch, no_gpu_needed):
    monkeypatch.setattr(batches, "capture", lambda works, device: {name: lambda: 6.0 for name in works})
    found = time_batches({"a": [lambda: None] * 3}, CUDA, repeats=4)
    assert (found.times["a"].median, found.method, found.repeats, found.note) == (2.0, "graph", 4, "")


def test_where_one_cannot_be_captured_none_is(monkeypatch, no_gpu_needed):
    def refuse(works, device):
        raise RuntimeError("operation not permitted when stream is capturing\nand a long trace")

    monkeypatch.setattr(batches, "capture", refuse)
    monkeypatch.setattr(batches, "_one_after_another", lambda calls: float(len(calls)))
    found = time_batches({"a": [lambda: None] * 3}, CUDA, repeats=4)
    assert (found.times["a"].median, found.method) == (1.0, "calls")
    assert found.note == "no CUDA graph: operation not permitted when stream is capturing"


class FakeCuda:
    """As much of torch.cuda as batches use: graphs that keep what was called, events a millisecond apart."""

    def __init__(self, monkeypatch):
        self.log, self.clock = [], itertools.count()
        for name in ("Stream", "CUDAGraph", "graph", "stream", "Event", "synchronize"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, f"make_{name}"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")

    def make_Stream(self, device):
        return SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))

    def make_CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextmanager
    def make_graph(self, graph, pool, stream):
        self.log.append(f"begin in {pool}")
        yield
        self.log.append("end")

    @contextmanager
    def make_stream(self, stream):
        yield

    def make_Event(self, enable_timing):
        event = SimpleNamespace(record=lambda: setattr(event, "at", next(self.clock)))
        event.elapsed_time = lambda later: float(later.at - event.at)
        return event

    def make_synchronize(self, device):
        self.log.append("synchronize")


def test_a_batch_is_called_once_and_then_captured(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    works = {name: [partial(cuda.log.append, f"{name}{i}") for i in range(2)] for name in "ab"}
    replays = capture(works, CUDA)
    assert cuda.log == [
        *("wait", "a0", "begin in pool", "a0", "a1", "end"),
        *("wait", "b0", "begin in pool", "b0", "b1", "end"),
    ]
    cuda.log.clear()
    replays["b"]()
    assert cuda.log == ["replay"]


def test_the_clock_overwrites_the_cache_and_waits_once(monkeypatch):
    monkeypatch.setattr(batches, "FLUSH_BYTES", 3)
    cuda = FakeCuda(monkeypatch)
    clock = batches._CudaClock(CPU)
    clock.buffer.fill_(1)
    assert clock({name: partial(cuda.log.append, name) for name in "ab"}) == {"a": 1e-3, "b": 1e-3}
    assert cuda.log == ["a", "b", "synchronize"]
    assert clock.buffer.tolist() == [0, 0, 0]


def test_eager_calls_leave_out_the_first():
    count = itertools.count()

    def work():
        time.sleep(0.02 if next(count) == 0 else 1e-3)

    assert 1e-3 <= time_eagerly(work, CPU, repeats=4) < 0.02
    assert next(count) == 5


def test_an_eager_call_that_takes_long_is_made_once():
    count = itertools.count()

    def work():
        next(count)
        time.sleep(0.01)

    assert time_eagerly(work, CPU, seconds=1e-3) >= 0.01
    assert next(count) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_graphs_do_what_the_calls_do():
    x = torch.zeros(1000, device="cuda", requires_grad=True)
    into = torch.zeros(1000, device="cuda")

    def both():
        (gradient,) = torch.autograd.grad((x.exp() * 2).sum(), x)
        into.add_(gradient)

    replay = capture({"both": [both, both]}, CUDA)["both"]
    into.zero_()
    replay()
    assert torch.equal(into.cpu(), torch.full((1000,), 4.0))
    found = time_batches({"both": [both]}, CUDA, repeats=3)
    assert (found.method, found.repeats, found.note) == ("graph", 3, "")
    assert 0 < found.times["both"].minimum <= found.times["both"].median < 1e-3
