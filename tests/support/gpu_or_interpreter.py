"""What the tests of Triton kernels share: they run small through the interpreter, and in full on a GPU."""

import os

import pytest
import torch

BACKEND = "triton"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETER = [pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 is not set, as it is where a GPU is")]
GPU = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="needs a CUDA GPU")]
FLOAT32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
UNIT_ROUNDOFF = {FLOAT32: 2**-24, BF16: 2**-8, FP16: 2**-11}

devices = pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=INTERPRETER, id="interpreter"), pytest.param("cuda", marks=GPU, id="cuda")],
)
on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU, id="cuda")])

# Backends beside autocast, which has lists of its own for CPUs and for GPUs.
under_autocast = pytest.mark.parametrize(
    "device, backend",
    [
        pytest.param("cpu", "parallel", id="parallel"),
        pytest.param("cpu", "reference", id="reference"),
        pytest.param("cpu", BACKEND, marks=INTERPRETER, id="interpreter"),
        pytest.param("cuda", BACKEND, marks=GPU, id="cuda"),
    ],
)


def on_devices(small, full):
    """Parameters (device, case): small cases for the interpreter, the full list for a GPU."""
    return [
        *(pytest.param("cpu", case, marks=INTERPRETER, id=f"interpreter-{case}") for case in small),
        *(pytest.param("cuda", case, marks=GPU, id=f"cuda-{case}") for case in full),
    ]


def assert_same_bits(found, expected):
    """Compares outputs and gradients, by name."""
    for part, same in zip(found, expected, strict=True):
        assert part.keys() == same.keys()
        assert [name for name, t in part.items() if t is not None and not torch.equal(t, same[name])] == []


def assert_graph_replays(step, leaves, values):
    """Captures a step in a CUDA graph, and compares what it makes of other values of its leaves with the step itself.

    Args:
        step: makes a list of tensors of the leaves.
        leaves: tensors by name.
        values: of the leaves, by name.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for factor in (1.0, 0.5, 1.5):
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(factor * values[name])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, step(), strict=True))
