"""The depthwise convolution: against its definition in float64, as torch sees it, and what it refuses.

As in `test_triton.py`, kernels run small through Triton's interpreter, and in full with `pytest -m gpu`.
"""

import itertools
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from gpu_or_interpreter import (
    BACKEND,
    BF16,
    FLOAT32,
    FP16,
    GPU,
    INTERPRETER,
    UNIT_ROUNDOFF,
    assert_graph_replays,
    assert_same_bits,
    devices,
    on_devices,
    on_gpu,
    under_autocast,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from msv.kernels import depthwise_conv, triton_depthwise

KINDS = {
    "3x3": {"size": 3, "stride": 1, "activation": "none"},
    "3x3-silu": {"size": 3, "stride": 1, "activation": "silu"},
    "3x3-residual-gelu": {"size": 3, "stride": 1, "activation": "gelu", "residual": True},
    "3x3-half-silu": {"size": 3, "stride": 2, "activation": "silu"},
    "7x7-half": {"size": 7, "stride": 2, "activation": "none"},
    "7x7-half-silu": {"size": 7, "stride": 2, "activation": "silu"},
    "5x5-gelu": {"size": 5, "stride": 1, "activation": "gelu"},
    "1x1-silu": {"size": 1, "stride": 1, "activation": "silu"},
}


class Case(NamedTuple):
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self):
        return f"{self.kind}-{str(self.dtype)[6:]}-{'x'.join(map(str, self.shape))}"


TRAINED = ("3x3-silu", "3x3-residual-gelu", "7x7-half-silu")
trained_kinds = pytest.mark.parametrize("kind", TRAINED)


def make(kind, shape, dtype=FLOAT32, device="cpu"):
    """(the operator but for its tensors, tensors): a map, and weights in float32 as a network has them."""
    options = dict(KINDS[kind])
    size = options.pop("size")
    tensors = {
        "x": torch.randn(shape),
        "weight": torch.randn(shape[3], 1, size, size) / size,
        "bias": torch.randn(shape[3]),
    }
    tensors = {name: t.to(device, dtype if name == "x" else FLOAT32) for name, t in tensors.items()}
    return partial(depthwise_conv, **options), tensors


def small_shape(device):
    return (3, 5, 4, 6) if device == "cpu" else (3, 29, 27, 100)


@pytest.fixture
def assert_exact(outputs_and_gradients, relative_error):
    """Compares output and gradients with the definition in float64; in half precision a gradient of the map or weights
    has seen two roundings more, of what the activation is applied to and of its gradient.
    """

    def check(conv, tensors):
        dtype = tensors["x"].dtype
        found = outputs_and_gradients(conv, tensors, backend=BACKEND)
        expected = outputs_and_gradients(conv, tensors, dtype=torch.float64, backend="reference")
        rounding = UNIT_ROUNDOFF[dtype]
        y, gradients = found[0]["y"], found[1]
        assert y.dtype == gradients["dx"].dtype == dtype
        assert gradients["dweight"].dtype == gradients["dbias"].dtype == FLOAT32
        errors = {"y": relative_error(y, expected[0]["y"]) / (rounding + 1e-6)}
        for name, t in gradients.items():
            errors[name] = relative_error(t, expected[1][name]) / (2 * rounding + 1e-6)
        assert all(error <= 1 for error in errors.values()), errors

    return check


# Values.

SMALL = [
    Case("3x3", FLOAT32, (2, 5, 7, 6)),
    Case("3x3-silu", FLOAT32, (1, 1, 1, 3)),
    Case("3x3-silu", BF16, (2, 6, 9, 6)),
    Case("3x3-residual-gelu", FLOAT32, (2, 6, 5, 70)),
    Case("3x3-residual-gelu", FP16, (3, 4, 4, 8)),
    Case("3x3-half-silu", FLOAT32, (2, 5, 6, 5)),
    Case("7x7-half", FLOAT32, (1, 2, 3, 4)),
    Case("7x7-half-silu", FLOAT32, (2, 9, 10, 35)),
    Case("7x7-half-silu", BF16, (2, 8, 7, 6)),
    Case("5x5-gelu", FLOAT32, (1, 6, 5, 4)),
    Case("1x1-silu", FLOAT32, (1, 3, 5, 4)),
]
SHAPES = ((2, 56, 56, 192), (3, 28, 28, 96), (2, 7, 7, 1536), (1, 65, 63, 33), (5, 1, 9, 50), (1, 256, 256, 64))
FULL = [Case(kind, dtype, shape) for kind in KINDS for dtype in (FLOAT32, BF16, FP16) for shape in SHAPES]


@pytest.mark.parametrize("device, case", on_devices(SMALL, FULL))
def test_values(assert_exact, device, case):
    assert_exact(*make(case.kind, case.shape, case.dtype, device))


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_is_the_definition(kind, outputs_and_gradients, assert_agree):
    conv, tensors = make(kind, (2, 9, 8, 5))
    run = partial(outputs_and_gradients, conv, tensors, torch.float64)
    assert_agree(run(backend="parallel"), run(backend="reference"), torch.float64)


@pytest.mark.parametrize("sides", [(1, 1), (4, 1), (8, 1), (1, 6), (3, 4), (5, 5)], ids=str)
@pytest.mark.parametrize("kind", ["3x3-residual-gelu", "3x3-half-silu", "7x7-half-silu"])
def test_parallel_on_narrow_maps_in_bf16(kind, sides, outputs_and_gradients, relative_error):
    for seed in range(20):  # what oneDNN gets wrong there, it does not always
        torch.manual_seed(seed)
        _ = [torch.full((1000,), torch.nan, dtype=BF16) for _ in range(50)]  # leaves NaN in memory
        run = partial(outputs_and_gradients, *make(kind, (2, *sides, 128), BF16))
        for part, same in zip(run(backend="parallel"), run(backend="reference"), strict=True):
            assert all(relative_error(part[name], t) < 4 * UNIT_ROUNDOFF[BF16] for name, t in same.items())


def test_the_definition_is_torch_s_convolution():
    _, tensors = make("7x7-half", (2, 9, 8, 5))
    x, weight, bias = (t.double() for t in tensors.values())
    expected = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride=2, padding=3, groups=5).permute(0, 2, 3, 1)
    torch.testing.assert_close(depthwise_conv(x, weight, bias, 2, backend="reference"), expected)


@devices
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_activations_at_their_ends(device, activation):
    x = torch.linspace(-12, 12, 397, device=device)[None, None, :, None]
    middle, bias = torch.ones(1, 1, 1, 1, device=device), torch.zeros(1, device=device)
    z, exact = (t.clone().requires_grad_() for t in (x, x.double()))
    y = depthwise_conv(z, middle, bias, activation=activation, backend=BACKEND)
    expected = getattr(F, activation)(exact)
    for found, right in (
        (y, expected),
        *zip(*(torch.autograd.grad(t.sum(), leaf) for t, leaf in ((y, z), (expected, exact))), strict=True),
    ):
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=1e-6)


@devices
@trained_kinds
def test_what_is_not_finite_stays_in_its_channel_and_window(device, kind):
    conv, tensors = make(kind, small_shape(device), device=device)
    clean = conv(**tensors, backend=BACKEND)
    tensors["x"][1, 3, 2, 1] = torch.nan
    found, expected = (conv(**tensors, backend=backend) for backend in (BACKEND, "reference"))
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found[~found.isnan()], clean[~found.isnan()])


# Layouts.


@devices
@trained_kinds
@pytest.mark.parametrize("part", [0, 1])
def test_half_of_a_map_is_read_where_it_lies(outputs_and_gradients, device, kind, part):
    batch, height, width, channels = small_shape(device)
    conv, tensors = make(kind, (batch, height, width, 2 * channels), device=device)
    whole = tensors["x"]
    half = whole.chunk(2, dim=-1)[part]
    assert triton_depthwise.with_channels_last(half) is half
    tensors |= {name: t[:channels].clone() for name, t in tensors.items() if name != "x"}
    expected = outputs_and_gradients(conv, {**tensors, "x": half.contiguous()}, backend=BACKEND)
    assert torch.equal(conv(half, tensors["weight"], tensors["bias"], backend=BACKEND), expected[0]["y"])
    leaf = whole.clone().requires_grad_()
    conv(leaf.chunk(2, dim=-1)[part], tensors["weight"], tensors["bias"], backend=BACKEND).square().sum().backward()
    alone = half.clone().requires_grad_()
    conv(alone, tensors["weight"], tensors["bias"], backend=BACKEND).square().sum().backward()
    assert torch.equal(leaf.grad.chunk(2, dim=-1)[part], alone.grad)
    assert not leaf.grad.chunk(2, dim=-1)[1 - part].any()


def copied(t):
    """With strides of its own also where `contiguous` finds nothing to copy, since there is one of a dimension."""
    return t.clone(memory_format=torch.contiguous_format)


LAYOUTS = {
    "channels-first": lambda t: copied(t.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
    "transposed": lambda t: copied(t.transpose(1, 2)).transpose(1, 2),
    "sliced": lambda t: torch.stack([t, t + 1], dim=-1).flatten(-2)[..., ::2],
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view_as(t),
    "expanded": lambda t: t[:1].expand_as(t),
    "cropped": lambda t: F.pad(t, (1, 2, 1, 1, 2, 1))[:, 2:-1, 1:-1, 1:-2],
    "half": lambda t: torch.cat([t, t], dim=-1).chunk(2, dim=-1)[1],
}


IN_LAYOUTS = [
    *((layout, "map") for layout in LAYOUTS),
    *itertools.product(("channels-first", "transposed", "cropped"), ("row", "column")),
]


@pytest.mark.parametrize("device, case", on_devices(IN_LAYOUTS, IN_LAYOUTS))
def test_layout_does_not_matter(device, case):
    layout, form = case
    batch, height, width, channels = small_shape(device)
    shape = (batch, 1 if form == "row" else height, 1 if form == "column" else width, channels)
    conv, tensors = make("3x3-silu", shape, device=device)
    view = LAYOUTS[layout](tensors["x"])
    leaf = view.contiguous().requires_grad_()
    expected = conv(leaf, tensors["weight"], tensors["bias"], backend=BACKEND)
    assert torch.equal(conv(view, tensors["weight"], tensors["bias"], backend=BACKEND), expected)
    dy = LAYOUTS[layout](torch.randn_like(expected))
    found, same = (torch.autograd.grad(expected, leaf, t, retain_graph=True)[0] for t in (dy, dy.contiguous()))
    assert torch.equal(found, same)


MAPS, LINES = ((6, 4), (5, 7), (9, 3), (2, 2)), ((1, 5), (4, 1), (1, 1))


@pytest.mark.parametrize(
    "layout, sizes",
    [*((name, MAPS) for name in LAYOUTS), *((name, MAPS + LINES) for name in ("channels-first", "transposed", "half"))],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}-sizes",
)
def test_where_a_map_lies_is_the_same_for_all_sizes(layout, sizes):
    """Kernels are compiled for it."""
    maps = [triton_depthwise.with_channels_last(LAYOUTS[layout](torch.empty(3, *sides, 6))) for sides in sizes]
    assert len({tuple(triton_depthwise.layout(x).items()) for x in maps}) == 1


# Bits.


@devices
@trained_kinds
@pytest.mark.usefixtures("as_users_run")
def test_the_same_inputs_give_the_same_bits(outputs_and_gradients, device, kind):
    conv, tensors = make(kind, small_shape(device), device=device)
    expected = outputs_and_gradients(conv, tensors, backend=BACKEND)
    for _ in range(1 if device == "cpu" else 5):
        if device == "cuda":
            with torch.cuda.stream(torch.cuda.Stream()):  # work beside it, and other memory for its outputs
                other = torch.randn(2048, 2048, device=device)
                other = (other @ other).sum()
        assert_same_bits(outputs_and_gradients(conv, tensors, backend=BACKEND), expected)


@devices
@trained_kinds
def test_images_do_not_know_of_each_other(device, kind):
    conv, tensors = make(kind, small_shape(device), device=device)
    order = torch.tensor([2, 0, 1], device=device)
    found = []
    for x in (tensors["x"], tensors["x"][order]):
        leaf = x.requires_grad_()
        y = conv(leaf, tensors["weight"], tensors["bias"], backend=BACKEND)
        found.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    assert all(torch.equal(permuted, t[order]) for t, permuted in zip(*found, strict=True))


@devices
@trained_kinds
def test_chunks_of_rows_change_nothing_but_the_rounding_of_sums(
    monkeypatch, outputs_and_gradients, relative_error, device, kind
):
    conv, tensors = make(kind, small_shape(device), device=device)
    monkeypatch.setattr(triton_depthwise, "PROGRAMS_WANTED", 1)
    expected = outputs_and_gradients(conv, tensors, backend=BACKEND)
    monkeypatch.setattr(triton_depthwise, "PROGRAMS_WANTED", 1000)
    monkeypatch.setattr(triton_depthwise, "CHUNK_ROWS", 1)
    found = outputs_and_gradients(conv, tensors, backend=BACKEND)
    for part, same in zip(found, expected, strict=True):
        assert all(relative_error(part[name], t) < 1e-6 for name, t in same.items())
    assert torch.equal(found[0]["y"], expected[0]["y"])
    assert torch.equal(found[1]["dx"], expected[1]["dx"])


@pytest.mark.parametrize("shape", [(128, 56, 56, 192), (1, 14, 14, 768), (1, 1, 1, 3), (2, 255, 3, 65)], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
def test_programs_cover_the_map(shape, stride):
    work = triton_depthwise.split(torch.Size(shape), stride, 64, multiprocessors=132)
    height, width, rows, columns, strips, across, chunk_rows = work.sizes
    assert (height, width) == shape[1:3]
    assert (rows, columns) == (-(-height // stride), -(-width // stride))
    chunks = -(-rows // chunk_rows)
    assert chunks == 1 or chunk_rows >= triton_depthwise.CHUNK_ROWS
    assert strips == shape[0] * across
    assert (across - 1) * triton_depthwise.COLUMNS < columns <= across * triton_depthwise.COLUMNS
    assert work.programs == chunks * -(-strips // triton_depthwise.STRIPS)
    assert (work.blocks - 1) * 64 < shape[3] <= work.blocks * 64


# Registration with torch.


@pytest.mark.parametrize(
    "device, dtype",
    [
        pytest.param("cpu", FLOAT32, marks=INTERPRETER, id="interpreter-float32"),
        *(pytest.param("cuda", dtype, marks=GPU, id=f"cuda-{dtype}") for dtype in (FLOAT32, BF16)),
    ],
)
@pytest.mark.parametrize("kind", ["3x3-residual-gelu", "7x7-half-silu"])
def test_opcheck(device, dtype, kind):
    conv, tensors = make(kind, (1, 3, 4, 6), dtype, device)
    options = (conv.keywords["stride"], conv.keywords["activation"], conv.keywords.get("residual", False))
    keep = options[0] == 2
    leaves = [t.requires_grad_() for t in tensors.values()]
    torch.library.opcheck(torch.ops.msv.depthwise_conv.default, (*leaves, *options, keep))
    with torch.no_grad():
        leaves = [t.detach() for t in leaves]
        y, *kept = torch.ops.msv.depthwise_conv(*leaves, *options, keep)
        backward = torch.ops.msv.depthwise_conv_backward
        torch.library.opcheck(backward.default, (torch.randn_like(y), *kept, *leaves, *options))


@devices
def test_what_was_not_kept_is_made_again(device):
    _, tensors = make("7x7-half-silu", small_shape(device), device=device)
    arguments = (*tensors.values(), 2, "silu", False)
    y, pre, blocks = torch.ops.msv.depthwise_conv(*arguments, True)
    same, nothing, _ = torch.ops.msv.depthwise_conv(*arguments, False)
    assert torch.equal(y, same)
    assert nothing.numel() == 0
    dy = torch.randn_like(y)
    found, expected = (torch.ops.msv.depthwise_conv_backward(dy, t, blocks, *arguments) for t in (nothing, pre))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@devices
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["3x3-residual-gelu", "7x7-half-silu"])
def test_compiled_is_eager(outputs_and_gradients, device, kind):
    conv, tensors = make(kind, (2, 4, 5, 6), device=device)
    conv = partial(conv, backend=BACKEND)
    compiled = torch.compile(conv, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    assert_same_bits(outputs_and_gradients(compiled, tensors), outputs_and_gradients(conv, tensors))


@devices
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_once_for_all_map_sizes(device):
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        lambda x, weight, bias: depthwise_conv(x, weight, bias, 2, "silu", backend=BACKEND),
        fullgraph=True,
        backend=counting,
        dynamic=True,
    )
    for height, width in ((8, 6), (9, 13), (4, 11)):  # unlike the other sizes, which compile would take for the same
        conv, tensors = make("7x7-half-silu", (2, height, width, 5), device=device)
        assert torch.equal(compiled(**tensors), conv(**tensors, backend=BACKEND))
    assert len(graphs) == 1


class Conv(torch.nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, tensors):
        return self.conv(**tensors)


def exported(conv, tensors):
    """A program, and the names of the operators that it calls."""
    with torch.no_grad():
        program = torch.export.export(Conv(conv), (tensors,))
    return program, {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=GPU, id="cuda")],
)
def test_exports_as_torch_s_convolution(device):
    conv, tensors = make("3x3-residual-gelu", (1, 4, 5, 6), device=device)
    program, called = exported(conv, tensors)
    assert any(name.startswith("aten.conv2d") for name in called)
    assert not any("msv" in name for name in called)
    torch.testing.assert_close(program.module()(tensors), conv(**tensors, backend="parallel"))


@devices
def test_exports_as_itself_where_triton_is_asked_for(device):
    conv, tensors = make("3x3-residual-gelu", (1, 4, 5, 6), device=device)
    program, called = exported(partial(conv, backend=BACKEND), tensors)
    assert "msv.depthwise_conv.default" in called
    assert torch.equal(program.module()(tensors), conv(**tensors, backend=BACKEND))


@under_autocast
@trained_kinds
@pytest.mark.parametrize("dtype", [FLOAT32, BF16], ids=str)
def test_autocast_changes_nothing(outputs_and_gradients, device, backend, kind, dtype):
    conv, tensors = make(kind, (1, 4, 5, 6), dtype, device)
    expected = outputs_and_gradients(conv, tensors, backend=backend)
    with torch.autocast(device, BF16):  # forward and backward
        found = outputs_and_gradients(conv, tensors, backend=backend)
    assert_same_bits(found, expected)
    assert found[0]["y"].dtype == dtype
    assert all(found[1][f"d{name}"].dtype == t.dtype for name, t in tensors.items())


@devices
@trained_kinds
def test_the_second_derivative_is_refused(device, kind):
    conv, tensors = make(kind, (1, 4, 5, 6), device=device)
    x = tensors["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(conv(**tensors, backend=BACKEND).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backward through msv\.depthwise_conv_backward"):
        gradient.square().sum().backward()


@devices
@pytest.mark.parametrize("kind", ["3x3-silu", "7x7-half-silu"])
def test_flops_are_the_convolution_s(device, kind):
    conv, tensors = make(kind, (2, 5, 3, 6), device=device)
    size, outputs = KINDS[kind]["size"], 2 * (5 * 3 if KINDS[kind]["stride"] == 1 else 3 * 2) * 6
    for backend in (BACKEND, "parallel"):
        with FlopCounterMode(display=False) as counter:
            y = conv(**{name: t.requires_grad_() for name, t in tensors.items()}, backend=backend)
        assert counter.get_total_flops() == 2 * outputs * size * size
        if backend == BACKEND:  # torch counts the weights' gradients of C groups C times
            with FlopCounterMode(display=False) as counter:
                y.sum().backward()
            assert counter.get_total_flops() == 4 * outputs * size * size


def test_shapes_and_dtypes_on_the_meta_device():
    for kind in TRAINED:
        conv, tensors = make(kind, (2, 9, 6, 5), BF16)
        y, meta = conv(**tensors), conv(**{name: t.to("meta") for name, t in tensors.items()})
        assert meta.is_meta
        assert (meta.shape, meta.dtype) == (y.shape, y.dtype)


@on_gpu
def test_cuda_graph(device):
    conv, tensors = make("3x3-silu", small_shape(device), device=device)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}

    def step():
        y = conv(**leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves.values())]

    assert_graph_replays(step, leaves, tensors)


@on_gpu
@pytest.mark.parametrize("kind", TRAINED)
def test_a_new_size_compiles_nothing(monkeypatch, outputs_and_gradients, device, kind):
    import triton

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **kernel: compiled.append(kernel["repr"]))
    sizes = ((4, 56, 56), (4, 55, 57), (1, 64, 48), (3, 23, 41), (16, 9, 8), (1, 256, 256))
    for batch, height, width in sizes:
        conv, tensors = make(kind, (batch, height, width, 100), BF16, device)
        for layout in ("half", "transposed"):
            outputs_and_gradients(conv, {**tensors, "x": LAYOUTS[layout](tensors["x"])})
        assert not compiled or height == width == 56, f"{batch}, {height}x{width} compiled {compiled}"
        compiled.clear()


# Memory.


@pytest.mark.parametrize("kind, quarters", [("3x3-silu", 0), ("3x3-residual-gelu", 0), ("7x7-half-silu", 1)])
def test_what_the_backward_needs_kept(kind, quarters):
    kept = []
    with FakeTensorMode():
        empty = partial(torch.empty, device="cuda", requires_grad=True)
        conv, _ = make(kind, (1, 1, 1, 192))
        size = KINDS[kind]["size"]
        x, weight, bias = empty(128, 56, 56, 192, dtype=BF16), empty(192, 1, size, size), empty(192)
        own = {t.untyped_storage()._cdata for t in (x, weight, bias)}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            conv(x, weight, bias)
        beside = sum(t.nbytes for t in kept if t.untyped_storage()._cdata not in own)
        with torch.no_grad():
            inferred = torch.ops.msv.depthwise_conv(x, weight, bias, 1, "silu", False, False)[1]
    assert beside == quarters * x.nbytes // 4 + 192 * (size * size + 1) * 4  # and the weights that kernels read
    assert inferred.numel() == 0


@on_gpu
@pytest.mark.usefixtures("free_memory")
@pytest.mark.parametrize("kind", ["3x3-silu", "7x7-half-silu"])
def test_beyond_2_31_elements(device, kind):
    conv, tensors = make(kind, (1, 1, 1, 1024))
    weight, bias = (tensors[name].to(device) for name in ("weight", "bias"))
    x = torch.empty(3, 900, 800, 1024, device=device, dtype=BF16).normal_()
    assert x.numel() > 2**31
    leaf = x.requires_grad_()
    y = conv(leaf, weight, bias)
    (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    alone = x[-1:].detach().clone().requires_grad_()
    last = conv(alone, weight, bias)
    (dlast,) = torch.autograd.grad(last, alone, torch.ones_like(last))
    assert torch.equal(y[-1:], last)
    assert torch.equal(dx[-1:], dlast)


# What is refused.


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, r"x has shape \(2, 3, 4\); expected \(B, H, W, C\)"),
        ({"x": torch.zeros(0, 3, 4, 5)}, ValueError, "no elements"),
        (
            {"weight": torch.zeros(4, 1, 3, 3)},
            ValueError,
            r"weight has shape \(4, 1, 3, 3\); expected \(C=5, 1, K, K\)$",
        ),
        ({"weight": torch.zeros(5, 2, 3, 3)}, ValueError, r"weight has shape .*; expected \(C=5, 1, K, K\)"),
        ({"weight": torch.zeros(5, 1, 3, 5)}, ValueError, r"weight has shape .*; expected \(C=5, 1, K, K\)"),
        ({"weight": torch.zeros(())}, ValueError, r"weight has shape \(\); expected \(C=5, 1, K, K\)"),
        ({"weight": torch.zeros(5)}, ValueError, r"weight has shape \(5,\); expected \(C=5, 1, K, K\)"),
        ({"bias": torch.zeros(())}, ValueError, r"bias has shape \(\); expected \(C=5\)"),
        ({"weight": torch.zeros(5, 1, 2, 2)}, ValueError, "kernel of 2×2; expected an odd size"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias has shape \(4,\); expected \(C=5\)"),
        ({"x": torch.zeros(2, 3, 4, 5).int()}, TypeError, "x is torch.int32"),
        ({"stride": 3}, ValueError, "stride is 3; expected 1 or 2"),
        ({"activation": "relu"}, ValueError, "activation 'relu' is unknown; expected one of none, silu, gelu"),
        ({"residual": True, "stride": 2}, ValueError, "residual adds x .* but stride is 2; use 1"),
        ({"backend": "cudnn"}, ValueError, "backend 'cudnn' is unknown"),
        ({"x": torch.zeros(2, 3, 4, 5).double(), "backend": "triton"}, ValueError, "an input is float64; use 'auto'"),
    ],
)
def test_refused(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 4, 5), "weight": torch.zeros(5, 1, 3, 3), "bias": torch.zeros(5)}
    with pytest.raises(error, match=message):
        depthwise_conv(**{**arguments, **change})
