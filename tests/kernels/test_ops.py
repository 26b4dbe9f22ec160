"""The registered operators as the rest of torch sees them: opcheck, compile, meta tensors, FLOPs, autocast, export."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from msv.kernels import ROUTES, flops_1d, flops_2d, selective_scan, selective_scan_2d
from msv.kernels.checks import exporting, settle_backend

BACKENDS = ("reference", "parallel", "auto")
SPLITS = {
    "4/0": (("row", 0), ("col", 1), ("rowR", 2), ("colR", 3)),
    "1/3-half": (("rowR", 0), ("col", 0), ("colR", 0)),
    "sets-0011": (("row", 0), ("colR", 0), ("col", 1), ("rowR", 1)),
}


def sets_of(routes):
    return 1 + max(weight_set for _, weight_set in routes)


def positional_1d(arguments):
    names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus")
    return tuple(arguments.get(name) for name in names)


def positional_2d(arguments, routes, carry_state):
    return (*arguments.values(), [ROUTES.index(name) for name, _ in routes], [s for _, s in routes], carry_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 70], ids="L{}".format)
@pytest.mark.parametrize("options", [True, False], ids=["all-options", "no-options"])
def test_1d_opcheck(make_1d, options, length, dtype):
    arguments = make_1d(length=length, groups=2, options=options, dtype=dtype)
    torch.library.opcheck(torch.ops.msv.selective_scan.default, positional_1d(arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("carry_state", [True, False], ids=["carry", "reset"])
@pytest.mark.parametrize("routes", SPLITS.values(), ids=SPLITS)
def test_2d_opcheck(make_2d, routes, carry_state, dtype):
    arguments = make_2d(height=5, width=6, sets=sets_of(routes), dtype=dtype)
    torch.library.opcheck(torch.ops.msv.selective_scan_2d.default, positional_2d(arguments, routes, carry_state))


def test_opcheck_of_the_backwards(make_1d, make_2d):
    arguments = positional_1d(make_1d(length=70, groups=2, grad=False))
    y, last, saved = torch.ops.msv.selective_scan(*arguments)
    backward = torch.ops.msv.selective_scan_backward.default
    for dlast in (torch.randn_like(last), None):
        torch.library.opcheck(backward, (torch.randn_like(y), dlast, saved, *arguments))
    arguments = positional_2d(make_2d(sets=2, grad=False), SPLITS["sets-0011"], True)
    y, saved = torch.ops.msv.selective_scan_2d(*arguments)
    backward = torch.ops.msv.selective_scan_2d_backward.default
    torch.library.opcheck(backward, (torch.randn_like(y), saved, *arguments))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["auto", "parallel"])
def test_compiled_is_eager(make_1d, make_2d, outputs_and_gradients, assert_agree, backend):
    for scan, arguments in (
        (partial(selective_scan, return_last_state=True, backend=backend), make_1d(length=2)),
        (
            partial(selective_scan_2d, routes=SPLITS["1/3-half"], carry_state=True, backend=backend),
            make_2d(height=2, width=1),
        ),
    ):
        compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
        expected = outputs_and_gradients(scan, arguments)
        assert_agree(outputs_and_gradients(compiled, arguments), expected, torch.float64)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_chooses_as_eager(monkeypatch):
    """That an export is another thing than a compiled call not all versions of torch know."""

    def exported(x):
        return x + (1 if exporting() else 0)

    def chosen(x):
        return x + (1 if settle_backend("auto", x, torch.float32) == "triton" else 0)

    monkeypatch.setattr("msv.kernels.checks.runs_triton", lambda *_: True)  # as on a GPU
    zero = torch.zeros(1)
    assert torch.compile(exported, fullgraph=True, backend="eager")(zero) == 0
    assert torch.compile(chosen, fullgraph=True, backend="eager")(zero) == chosen(zero) == 1
    with torch.no_grad():
        assert torch.export.export(Call(exported), (zero,)).module()(zero) == 1


@pytest.mark.parametrize("backend", ["auto", "parallel"])
def test_no_gradient_of_outputs_is_none_of_inputs(make_1d, make_2d, backend):
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    scans = (
        (selective_scan, make_1d(length=2)),
        (partial(selective_scan_2d, routes=SPLITS["1/3-half"], carry_state=True), make_2d(height=2, width=1)),
    )
    for scan, arguments in scans:
        Nothing.apply(scan(**arguments, backend=backend)).sum().backward()
        assert all(t.grad is None for t in arguments.values() if isinstance(t, torch.Tensor))


class Call(torch.nn.Module):
    """A function, as an export wants it."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_once_for_all_map_sizes(make_2d):
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    scan = torch.compile(
        lambda **a: selective_scan_2d(**a, routes=SPLITS["4/0"], carry_state=True),
        fullgraph=True,
        backend=counting,
        dynamic=True,
    )
    for height, width in ((7, 6), (9, 13), (14, 11)):  # unlike the other sizes, which compile would take for the same
        arguments = make_2d(height=height, width=width, sets=4, grad=False)
        expected = selective_scan_2d(**arguments, routes=SPLITS["4/0"], carry_state=True)
        torch.testing.assert_close(scan(**arguments), expected)
    assert len(graphs) == 1


def test_shapes_and_dtypes_on_the_meta_device(make_1d, make_2d):
    def to_meta(arguments):
        return {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}

    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        arguments = make_1d(length=70, groups=2, dtype=dtype, grad=False)
        real = selective_scan(**arguments, return_last_state=True)
        meta = selective_scan(**to_meta(arguments), return_last_state=True)
        assert [(t.shape, t.dtype, t.stride()) for t in real] == [(t.shape, t.dtype, t.stride()) for t in meta]
        arguments = make_2d(sets=4, dtype=dtype, grad=False)
        real = selective_scan_2d(**arguments, routes=SPLITS["4/0"], carry_state=True)
        meta = selective_scan_2d(**to_meta(arguments), routes=SPLITS["4/0"], carry_state=True)
        assert meta.is_meta
        assert (real.shape, real.dtype, real.stride()) == (meta.shape, meta.dtype, meta.stride())


@pytest.mark.parametrize("options", [True, False], ids=["all-options", "no-options"])
def test_flops_of_1d(make_1d, options):
    batch, channels, length, d_state = 2, 6, 70, 3
    arguments = make_1d(batch, channels, length, d_state, groups=2, options=options)
    with FlopCounterMode(display=False) as counter:
        y = selective_scan(**arguments)
        forward = counter.get_total_flops()
        y.sum().backward()
    skip = batch * length * channels if options else 0
    assert forward == 9 * batch * length * channels * d_state + skip
    assert flops_1d(batch, length, channels, d_state, skip=options) == forward
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("carry_state", [True, False], ids=["carry", "reset"])
@pytest.mark.parametrize("routes", SPLITS.values(), ids=SPLITS)
def test_flops_of_2d(make_2d, routes, carry_state):
    batch, height, width, channels, d_state, rank = 2, 7, 5, 6, 3, 4
    arguments = make_2d(batch, height, width, channels, d_state, rank, sets_of(routes))
    with FlopCounterMode(display=False) as counter:
        y = selective_scan_2d(**arguments, routes=routes, carry_state=carry_state)
        forward = counter.get_total_flops()
        y.sum().backward()
    cells = batch * height * width * channels
    assert forward == len(routes) * (9 * cells * d_state + cells + cells * rank)
    assert flops_2d(batch, height * width, channels, d_state, rank, len(routes)) == forward
    assert counter.get_total_flops() == 3 * forward


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_reach_into_the_scan(make_1d, make_2d, outputs_and_gradients, backend):
    def under_autocast(scan):
        def run(**arguments):
            with torch.autocast("cpu", torch.bfloat16):
                return scan(**arguments)

        return run

    for scan, arguments in (
        (
            partial(selective_scan, return_last_state=True, backend=backend),
            make_1d(length=70, groups=2, dtype=torch.float32),
        ),
        (
            partial(selective_scan_2d, routes=SPLITS["1/3-half"], carry_state=True, backend=backend),
            make_2d(dtype=torch.float32),
        ),
    ):
        expected = outputs_and_gradients(scan, arguments)
        found = outputs_and_gradients(under_autocast(scan), arguments)
        for part, expected_part in zip(found, expected, strict=True):
            for name, t in expected_part.items():
                assert part[name].dtype == torch.float32
                torch.testing.assert_close(part[name], t, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_autocast_around_the_backward_too(make_2d, outputs_and_gradients):
    arguments = make_2d(sets=4, dtype=torch.float32)
    scan = partial(selective_scan_2d, routes=SPLITS["4/0"], carry_state=True)
    _, expected = outputs_and_gradients(scan, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        _, found = outputs_and_gradients(scan, arguments)
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


class Scan(torch.nn.Module):
    def forward(self, x, x_dbl, dt_weight, dt_bias, A_log, D_skip):
        weights = (dt_weight, dt_bias, A_log, D_skip)
        return selective_scan_2d(x, x_dbl, *weights, SPLITS["1/3-half"], True, backend="parallel")


def test_parallel_exports_as_plain_torch(make_2d):
    arguments = make_2d(height=4, width=3, grad=False)
    with torch.no_grad():
        program = torch.export.export(Scan(), tuple(arguments.values()))
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    called = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    assert any(name.startswith("aten.exp") for name in called)
    assert not any("msv" in name for name in called)
    torch.testing.assert_close(program.module()(*arguments.values()), Scan()(*arguments.values()))
