"""The merge of routes and the gate: against their definitions in float64, as torch sees them, and what they refuse.

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

from msv.kernels import gate, merge_routes, triton_merge, triton_pixels


class Kind(NamedTuple):
    """Numbers of routes on the full and the half map, and what becomes of them."""

    full: int
    half: int
    own_norms: bool = False
    sum_first: bool = False
    means: bool = False


KINDS = {
    "1/3-means": Kind(1, 3, means=True),
    "1/3": Kind(1, 3),
    "2/2-own-norms-means": Kind(2, 2, own_norms=True, means=True),
    "3/1": Kind(3, 1),
    "4/0-means": Kind(4, 0, means=True),
    "4/0": Kind(4, 0),
    "0/4-means": Kind(0, 4, sum_first=True, means=True),
    "0/4-each": Kind(0, 4),
}
TRAINED = ("1/3-means", "4/0", "0/4-means")


class Case(NamedTuple):
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self):
        return f"{self.kind}-{str(self.dtype)[6:]}-{'x'.join(map(str, self.shape))}"


trained_kinds = pytest.mark.parametrize("kind", TRAINED)


def merge(y_full=None, y_half=None, weight=None, bias=None, weight_half=None, bias_half=None, *, size, kind, **options):
    """`merge_routes` of a kind, without a mean that nobody wants; branches without a norm of their own share one."""
    full, half = (weight, bias), (weight_half, bias_half)
    half = full if y_half is not None and weight_half is None else half
    full = full if y_full is not None else (None, None)
    options = {"sum_first": KINDS[kind].sum_first, "means": KINDS[kind].means, **options}
    m, means = merge_routes(y_full, y_half, *full, *half, size, **options)
    return (m, means) if KINDS[kind].means else m


def make(kind, shape, dtype=FLOAT32, device="cpu"):
    """(the operator but for its tensors, tensors): routes, and norms in float32 as a network has them."""
    batch, height, width, channels = shape
    full, half, own_norms, *_ = KINDS[kind]
    tensors = {}
    if full:
        tensors["y_full"] = torch.randn(batch, full, height, width, channels)
    if half:
        tensors["y_half"] = torch.randn(batch, half, -(-height // 2), -(-width // 2), channels)
    for name in ("weight", "bias", *(("weight_half", "bias_half") if own_norms else ())):
        tensors[name] = torch.randn(channels)
    tensors = {name: t.to(device, dtype if name.startswith("y") else FLOAT32) for name, t in tensors.items()}
    return partial(merge, size=(height, width), kind=kind), tensors


def make_gate(shape, scaled, dtype=FLOAT32, device="cpu"):
    """The gate's tensors: z is half of a map."""
    m, z = torch.randn(shape), torch.randn(*shape[:3], 2 * shape[3])
    tensors = {"m": m.to(device, dtype), "scale": torch.rand(shape[0], shape[3], device=device)}
    return {**(tensors if scaled else {**tensors, "scale": None}), "z": z.to(device, dtype).chunk(2, dim=-1)[1]}


def make_either(kind, shape, dtype=FLOAT32, device="cpu"):
    """The merge of a kind, or the `gate`, with its tensors."""
    return (gate, make_gate(shape, True, dtype, device)) if kind == "gate" else make(kind, shape, dtype, device)


def small_shape(device):
    return (3, 5, 4, 6) if device == "cpu" else (3, 29, 27, 100)


@pytest.fixture
def assert_exact(outputs_and_gradients, relative_error):
    """Compares outputs and gradients with the definition in float64. In half precision the half map is rounded on its
    way, and a gradient has seen a rounded sum of routes.
    """

    def check(operator, tensors):
        found = outputs_and_gradients(operator, tensors, backend=BACKEND)
        expected = outputs_and_gradients(operator, tensors, dtype=torch.float64, backend="reference")
        rounding = UNIT_ROUNDOFF[next(iter(tensors.values())).dtype]
        for name, t in tensors.items():
            assert t is None or found[1][f"d{name}"].dtype == t.dtype
        errors = {}
        for limit, part, right in zip((2 * rounding + 1e-6, 3 * rounding + 1e-6), found, expected, strict=True):
            errors |= {name: relative_error(t, right[name]) / limit for name, t in part.items() if t is not None}
        assert all(error <= 1 for error in errors.values()), errors
        return found[0]

    return check


# Values.

SMALL = [
    Case("1/3-means", FLOAT32, (2, 5, 7, 6)),
    Case("1/3-means", BF16, (2, 6, 4, 8)),
    Case("1/3-means", FP16, (1, 3, 9, 50)),
    Case("1/3", FLOAT32, (1, 1, 1, 8)),
    Case("1/3", FLOAT32, (1, 2, 1, 70)),
    Case("1/3", FLOAT32, (1, 13, 2, 12)),
    Case("2/2-own-norms-means", FLOAT32, (2, 4, 6, 35)),
    Case("2/2-own-norms-means", BF16, (1, 5, 5, 20)),
    Case("3/1", FLOAT32, (2, 3, 4, 6)),
    Case("4/0-means", FLOAT32, (2, 3, 5, 96)),
    Case("4/0", BF16, (1, 4, 5, 33)),
    Case("0/4-means", FLOAT32, (2, 7, 6, 20)),
    Case("0/4-means", BF16, (1, 3, 4, 9)),
    Case("0/4-each", FLOAT32, (1, 4, 7, 5)),
]
SHAPES = ((2, 56, 56, 192), (3, 28, 28, 96), (2, 7, 7, 1536), (1, 65, 63, 33), (5, 1, 9, 50), (1, 128, 96, 512))
FULL = [Case(kind, dtype, shape) for kind in KINDS for dtype in (FLOAT32, BF16, FP16) for shape in SHAPES]


@pytest.mark.parametrize("device, case", on_devices(SMALL, FULL))
def test_values(assert_exact, device, case):
    found = assert_exact(*make(case.kind, case.shape, case.dtype, device))
    assert found["y"].dtype == case.dtype
    assert not KINDS[case.kind].means or found["last"].dtype == case.dtype


GATES = [(FLOAT32, (2, 5, 3, 6)), (FLOAT32, (1, 1, 1, 70)), (BF16, (2, 4, 5, 9)), (FP16, (2, 3, 4, 64))]
FULL_GATES = [(dtype, shape) for dtype in UNIT_ROUNDOFF for shape in SHAPES]


@pytest.mark.parametrize("device, case", on_devices(GATES, FULL_GATES))
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "SE"])
def test_gate_values(assert_exact, device, case, scaled):
    dtype, shape = case
    assert assert_exact(gate, make_gate(shape, scaled, dtype, device))["y"].dtype == dtype


@devices
def test_gate_at_its_ends(device):
    z = torch.linspace(-60, 60, 397, device=device)[None, None, :, None]
    leaf, exact = (t.clone().requires_grad_() for t in (z, z.double()))
    out, expected = gate(torch.ones_like(z), None, leaf, backend=BACKEND), F.silu(exact)
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    (dz,), (right,) = (torch.autograd.grad(t.sum(), x) for t, x in ((out, leaf), (expected, exact)))
    torch.testing.assert_close(dz.double(), right, rtol=1e-6, atol=1e-6)


def interpolation(out, size):
    """Rows of weights of linear interpolation from `size` to `out` points, pixel centres at halves."""
    at = ((torch.arange(out, dtype=torch.float64) + 0.5) * size / out - 0.5).clamp(0, size - 1)
    return (1 - (at[:, None] - torch.arange(size)).abs()).clamp(min=0)


@pytest.mark.parametrize("kind", ["1/3-means", "2/2-own-norms-means", "0/4-means", "4/0-means"])
@pytest.mark.parametrize("size", [(5, 8), (1, 3)], ids=lambda size: "{}x{}".format(*size))
def test_the_definition_written_out(kind, size):
    operator, tensors = make(kind, (2, *size, 5))
    tensors = {name: t.double() for name, t in tensors.items()}

    def norm(y, suffix=""):
        weight, bias = (tensors.get(part + suffix, tensors[part]) for part in ("weight", "bias"))
        y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return y * weight + bias

    expected = torch.zeros(2, *size, 5, dtype=torch.float64)
    if "y_full" in tensors:
        expected += norm(sum(tensors["y_full"].unbind(1)))
    if "y_half" in tensors:
        routes = tensors["y_half"].unbind(1)
        half = norm(sum(routes)) if kind.startswith("0/4") else sum(norm(y, "_half") for y in routes)
        down, right = (interpolation(*sizes) for sizes in zip(size, half.shape[1:3], strict=True))
        expected += torch.einsum("ih,jw,bhwd->bijd", down, right, half)
    m, means = operator(**tensors, backend="reference")
    torch.testing.assert_close(m, expected)
    torch.testing.assert_close(means, expected.mean((1, 2)))


@devices
def test_what_is_not_finite_stays_in_its_pixel(device):
    operator, tensors = make("1/3", small_shape(device), device=device)
    clean = operator(**tensors, backend=BACKEND)
    tensors["y_full"][1, 0, 3, 2, 1] = torch.nan
    found = operator(**tensors, backend=BACKEND)
    nan = torch.zeros(found.shape, dtype=torch.bool, device=device)
    nan[1, 3, 2] = True
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan], clean[~nan])


# Layouts.


@devices
@pytest.mark.parametrize("part", [0, 1])
def test_half_of_a_map_is_read_where_it_lies(outputs_and_gradients, device, part):
    batch, height, width, channels = small_shape(device)
    tensors = make_gate((batch, height, width, channels), True, device=device)
    whole = torch.randn(batch, height, width, 2 * channels, device=device)
    half = whole.chunk(2, dim=-1)[part]
    assert triton_merge.with_pixels_in_line(half)[0] is half
    expected = outputs_and_gradients(gate, {**tensors, "z": half.contiguous()}, backend=BACKEND)
    assert torch.equal(gate(tensors["m"], tensors["scale"], half, backend=BACKEND), expected[0]["y"])
    leaf, alone = (t.clone().requires_grad_() for t in (whole, half.contiguous()))
    for z in (leaf.chunk(2, dim=-1)[part], alone):
        gate(tensors["m"], tensors["scale"], z, backend=BACKEND).square().sum().backward()
    assert torch.equal(leaf.grad.chunk(2, dim=-1)[part], alone.grad)
    assert not leaf.grad.chunk(2, dim=-1)[1 - part].any()


def copied(t):
    """With strides of its own also where `contiguous` finds nothing to copy, since there is one of a dimension."""
    return t.clone(memory_format=torch.contiguous_format)


LAYOUTS = {
    "channels-first": lambda t: copied(t.movedim(-1, 1)).movedim(1, -1),
    "transposed": lambda t: copied(t.transpose(-2, -3)).transpose(-2, -3),
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view_as(t),
    "expanded": lambda t: t[:1].expand_as(t),
    "cropped": lambda t: F.pad(t, (1, 2, 1, 1, 2, 1))[..., 2:-1, 1:-1, 1:-2],
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
    operator, tensors = make("1/3", shape, device=device)
    tensors |= make_gate(shape, True, device=device)

    def run(change):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
        views = {name: change(t) if t.dim() > 2 else t for name, t in leaves.items()}
        m, scale, z = (views.pop(name) for name in ("m", "scale", "z"))
        outputs = (operator(**views, backend=BACKEND), gate(m, scale, z, backend=BACKEND))
        torch.autograd.backward(outputs, [change(torch.ones_like(y) * y.detach()) for y in outputs])
        return [*outputs, *(t.grad for t in leaves.values())]

    def straight(t):
        return LAYOUTS[layout](t).contiguous()

    assert all(torch.equal(a, b) for a, b in zip(run(LAYOUTS[layout]), run(straight), strict=True))


@pytest.mark.parametrize("layout", [*LAYOUTS, "half"])
@pytest.mark.parametrize("sides", [(3, 4), (3, 1), (1, 4), (1, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_pixels_are_found_in_line(layout, sides, batch):
    map = torch.randn(batch, *sides, 6)
    view = map.chunk(2, dim=-1)[1] if layout == "half" else LAYOUTS[layout](map)
    z, pixel = triton_merge.with_pixels_in_line(view)
    assert z is view or layout != "half"
    assert torch.equal(z.as_strided((z[..., 0].numel(), z.shape[3]), (pixel, 1)), view.flatten(0, 2))


# Bits.


@devices
@trained_kinds
@pytest.mark.usefixtures("as_users_run")
def test_the_same_inputs_give_the_same_bits(outputs_and_gradients, device, kind):
    operator, tensors = make(kind, small_shape(device), device=device)
    gated = make_gate(small_shape(device), True, device=device)
    pairs = ((operator, tensors), (gate, gated))
    runs = [partial(outputs_and_gradients, *pair, backend=BACKEND) for pair in pairs]
    expected = [run() for run in runs]
    for _ in range(1 if device == "cpu" else 5):
        if device == "cuda":
            with torch.cuda.stream(torch.cuda.Stream()):  # work beside it, and other memory for its outputs
                other = torch.randn(2048, 2048, device=device)
                other = (other @ other).sum()
        for run, same in zip(runs, expected, strict=True):
            assert_same_bits(run(), same)


@devices
@trained_kinds
def test_images_do_not_know_of_each_other(outputs_and_gradients, device, kind):
    operator, tensors = make(kind, small_shape(device), device=device)
    order = torch.tensor([2, 0, 1], device=device)
    found = []
    for change in (lambda t: t[order], lambda t: t):
        routes = {name: change(t).clone().requires_grad_() for name, t in tensors.items() if name.startswith("y")}
        outputs = operator(**{**tensors, **routes}, backend=BACKEND)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(sum(y.square().sum() for y in outputs), list(routes.values()))
        found.append((*outputs, *gradients))
    assert all(torch.equal(permuted, t[order]) for permuted, t in zip(*found, strict=True))


@devices
@trained_kinds
def test_chunks_change_nothing_but_the_rounding_of_sums(
    monkeypatch, outputs_and_gradients, relative_error, device, kind
):
    shape = (2, 9, 8, 6) if device == "cpu" else (3, 129, 127, 100)
    if device == "cpu":
        monkeypatch.setattr(triton_pixels, "TILE", 256)
    runs = [partial(outputs_and_gradients, *make(kind, shape, device=device), backend=BACKEND)]
    runs.append(partial(outputs_and_gradients, gate, make_gate(shape, True, device=device), backend=BACKEND))
    found = []
    for wanted in (1, 100_000):
        monkeypatch.setattr(triton_pixels, "PROGRAMS_WANTED", wanted)
        found.append([run() for run in runs])
    for long, short in zip(*found, strict=True):
        for part, same in zip(long, short, strict=True):
            for name, t in part.items():
                if name in ("y", "dm", "dz"):
                    assert torch.equal(t, same[name])
                else:
                    assert relative_error(t, same[name]) < 1e-6


@pytest.mark.parametrize("batch, pixels, block", [(128, 3136, 64), (1, 196, 256), (1, 1, 16), (2, 765, 2048)])
def test_programs_cover_the_map(batch, pixels, block):
    work = triton_pixels.split(batch, pixels, block, multiprocessors=132)
    assert (work.chunks - 1) * work.tiles * work.pixels < pixels <= work.chunks * work.tiles * work.pixels
    assert 1 <= work.tiles <= triton_pixels.TILES
    assert work.tiles == 1 or batch * work.chunks >= triton_pixels.PROGRAMS_WANTED * 132
    assert work.block == block


@pytest.mark.parametrize("channels", [1, 16, 33, 96, 100, 128, 192, 384, 1000, 1536])
def test_blocks_cover_the_channels(channels):
    block = triton_pixels.channel_block(channels)
    assert block >= 16
    assert block & (block - 1) == 0
    assert -(-channels // block) <= 3
    if channels in (96, 128, 192, 384, 1536):
        assert channels % block == 0


# Registration with torch.


@pytest.mark.parametrize(
    "device, dtype",
    [
        pytest.param("cpu", FLOAT32, marks=INTERPRETER, id="interpreter-float32"),
        *(pytest.param("cuda", dtype, marks=GPU, id=f"cuda-{dtype}") for dtype in (FLOAT32, BF16)),
    ],
)
class TestOpcheck:
    @pytest.mark.parametrize("kind", ["2/2-own-norms-means", "0/4-means"])
    def test_merge(self, device, dtype, kind):
        _, tensors = make(kind, (1, 3, 4, 6), dtype, device)
        names = ("y_full", "y_half", "weight", "bias", "weight_half", "bias_half")
        if kind == "0/4-means":
            tensors = {"y_half": tensors["y_half"], "weight_half": tensors["weight"], "bias_half": tensors["bias"]}
        leaves = [tensors[name].requires_grad_() if name in tensors else None for name in names]
        options = (3, 4, 1e-5, KINDS[kind].sum_first, True, True)
        torch.library.opcheck(torch.ops.msv.merge_routes.default, (*leaves, *options))
        with torch.no_grad():
            leaves = [None if t is None else t.detach() for t in leaves]
            m, means, full, half = torch.ops.msv.merge_routes(*leaves, *options)
            full = full if full.numel() else leaves[0]
            half = half if half.numel() else leaves[1]
            arguments = (torch.randn_like(m), torch.randn_like(means), full, half, leaves[2], leaves[4], 1e-5)
            torch.library.opcheck(torch.ops.msv.merge_routes_backward.default, arguments)

    @pytest.mark.parametrize("scaled", [False, True], ids=["plain", "SE"])
    def test_gate(self, device, dtype, scaled):
        tensors = make_gate((2, 3, 2, 6), scaled, dtype, device).values()
        leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
        torch.library.opcheck(torch.ops.msv.gate.default, tuple(leaves))
        leaves = [None if t is None else t.detach() for t in leaves]
        torch.library.opcheck(torch.ops.msv.gate_backward.default, (torch.randn_like(leaves[0]), *leaves))


@devices
@pytest.mark.parametrize("kind", ["2/2-own-norms-means", "4/0", "0/4-means"])
def test_what_was_not_kept_is_made_again(device, kind, relative_error):
    operator, tensors = make(kind, small_shape(device), device=device)
    if KINDS[kind].full == 0:
        tensors = {"y_half": tensors["y_half"], "weight_half": tensors["weight"], "bias_half": tensors["bias"]}
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    names = ("y_full", "y_half", "weight", "bias", "weight_half", "bias_half")
    arguments = (*(leaves.get(name) for name in names), *operator.keywords["size"], 1e-5, KINDS[kind].sum_first, False)
    found = []
    for keep in (True, False):
        m, _, *sums = torch.ops.msv.merge_routes(*arguments, keep)
        assert any(t.numel() for t in sums) == keep
        found.append((m, *torch.autograd.grad(m.square().sum(), leaves.values())))
    assert all(relative_error(again, t) < 1e-6 for t, again in zip(*found, strict=True))


def merge_and_gate(operator, z, **tensors):
    """Both operators, with the routes' means as factors."""
    m, means = operator(**tensors, backend=BACKEND)
    return gate(m, means.sigmoid(), z, backend=BACKEND)


@devices
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("kind", ["1/3-means", "0/4-means"])
def test_compiled_is_eager(outputs_and_gradients, device, kind):
    operator, tensors = make(kind, (2, 4, 5, 6), device=device)
    tensors["z"] = torch.randn(2, 4, 5, 6, device=device)
    both = partial(merge_and_gate, operator)
    compiled = torch.compile(both, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    found, expected = outputs_and_gradients(compiled, tensors), outputs_and_gradients(both, tensors)
    if device == "cpu":
        assert_same_bits(found, expected)
    else:  # inductor's sigmoid between the two has a rounding of its own
        for part, same in zip(found, expected, strict=True):
            for name, t in part.items():
                torch.testing.assert_close(t, same[name])


@devices
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_once_for_all_map_sizes(device):
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    @partial(torch.compile, fullgraph=True, backend=counting, dynamic=True)
    def both(y_full, y_half, weight, bias, z):
        m, means = merge_routes(
            y_full, y_half, weight, bias, weight, bias, tuple(z.shape[1:3]), means=True, backend=BACKEND
        )
        return gate(m, means.sigmoid(), z, backend=BACKEND)

    for height, width in ((8, 14), (13, 17), (12, 22)):  # unlike the other sizes, which compile would take for the same
        operator, tensors = make("1/3-means", (2, height, width, 5), device=device)
        tensors["z"] = torch.randn(2, height, width, 5, device=device)
        assert torch.equal(both(**tensors), merge_and_gate(operator, **tensors))
    assert len(graphs) == 1


class Mixed(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, tensors, scale, z):
        m, means = merge(**tensors, size=(4, 5), kind="1/3-means", backend=self.backend)
        return gate(m, scale * means, z, backend=self.backend)


def exported(backend, device):
    """(module, its program, names of the operators that it calls, arguments)"""
    _, tensors = make("1/3-means", (1, 4, 5, 6), device=device)
    gated = make_gate((1, 4, 5, 6), True, device=device)
    module, arguments = Mixed(backend), (tensors, gated["scale"], gated["z"])
    with torch.no_grad():
        program = torch.export.export(module, arguments)
    return module, program, {str(node.target) for node in program.graph.nodes if node.op == "call_function"}, arguments


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", id="cpu"), pytest.param("cuda", marks=GPU, id="cuda")],
)
def test_exports_as_torch_s_operators(device):
    module, program, called, arguments = exported("auto", device)
    assert any(name.startswith("aten.layer_norm") for name in called)
    assert not any("msv" in name for name in called)
    torch.testing.assert_close(program.module()(*arguments), module(*arguments))


@devices
def test_exports_as_itself_where_triton_is_asked_for(device):
    module, program, called, arguments = exported(BACKEND, device)
    assert called >= {"msv.merge_routes.default", "msv.gate.default"}
    assert torch.equal(program.module()(*arguments), module(*arguments))


@under_autocast
@pytest.mark.parametrize("kind", [*TRAINED, "gate"])
@pytest.mark.parametrize("dtype", [FLOAT32, BF16], ids=str)
def test_autocast_changes_nothing(outputs_and_gradients, device, backend, kind, dtype):
    if backend == "parallel":
        pytest.skip("is what torch's LayerNorm and product make of it")
    operator, tensors = make_either(kind, (1, 4, 5, 6), dtype, device)
    expected = outputs_and_gradients(operator, tensors, backend=backend)
    with torch.autocast(device, BF16):  # forward and backward
        found = outputs_and_gradients(operator, tensors, backend=backend)
    assert_same_bits(found, expected)
    assert all(t.dtype == dtype for t in found[0].values())
    assert all(found[1][f"d{name}"].dtype == t.dtype for name, t in tensors.items())


@devices
@pytest.mark.parametrize("kind", [*TRAINED, "gate"])
def test_the_second_derivative_is_refused(device, kind):
    operator, tensors = make_either(kind, (1, 4, 5, 6), device=device)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = operator(**leaves, backend=BACKEND)
    y = y[0] if isinstance(y, tuple) else y
    first = next(iter(leaves.values()))
    (gradient,) = torch.autograd.grad(y.square().sum(), first, create_graph=True)
    name = "gate" if kind == "gate" else "merge_routes"
    with pytest.raises(RuntimeError, match=f"backward through msv.{name}_backward"):
        gradient.square().sum().backward()


@trained_kinds
def test_shapes_and_dtypes_on_the_meta_device(kind):
    operator, tensors = make(kind, (2, 9, 6, 5), BF16)
    expected, found = operator(**tensors), operator(**{name: t.to("meta") for name, t in tensors.items()})
    for y, meta in zip(*(t if isinstance(t, tuple) else (t,) for t in (expected, found)), strict=True):
        assert meta.is_meta
        assert (meta.shape, meta.dtype) == (y.shape, y.dtype)


@on_gpu
def test_cuda_graph(device):
    operator, tensors = make("1/3-means", small_shape(device), device=device)
    tensors["z"] = torch.randn(small_shape(device), device=device)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}

    def step():
        y = merge_and_gate(operator, **leaves)
        return [y, *torch.autograd.grad(y.square().sum(), leaves.values())]

    assert_graph_replays(step, leaves, tensors)


@on_gpu
@trained_kinds
def test_a_new_size_compiles_nothing(monkeypatch, outputs_and_gradients, device, kind):
    import triton

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **kernel: compiled.append(kernel["repr"]))
    sizes = ((4, 56, 56), (4, 55, 57), (1, 64, 48), (3, 23, 41), (16, 9, 8), (1, 256, 256), (1, 1, 1))
    for batch, height, width in sizes:
        outputs_and_gradients(*make(kind, (batch, height, width, 104), BF16, device))
        outputs_and_gradients(gate, make_gate((batch, height, width, 104), True, BF16, device))
        assert not compiled or height == width == 56, f"{batch}, {height}x{width} compiled {compiled}"
        compiled.clear()


# Memory.


@pytest.mark.parametrize("kind, maps", [("1/3-means", 0), ("2/2-own-norms-means", 1), ("4/0", 1), ("0/4-means", 0.25)])
def test_what_the_backward_needs_kept(kind, maps):
    """Of several routes that are summed first, their sum; otherwise nothing but the routes."""
    shape, kept = (128, 56, 56, 192), []
    with FakeTensorMode():
        small = make(kind, (1, 2, 2, 192))[1]
        routes = {"y_full": (128, KINDS[kind].full, 56, 56, 192), "y_half": (128, KINDS[kind].half, 28, 28, 192)}
        tensors = {
            name: torch.empty(routes.get(name, t.shape), device="cuda", dtype=BF16 if name in routes else FLOAT32)
            for name, t in small.items()
        }
        own = {t.requires_grad_().untyped_storage()._cdata for t in tensors.values()}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            merge(**tensors, size=shape[1:3], kind=kind)
        for name in routes.keys() & tensors.keys():
            summed = name == "y_full" or KINDS[kind].sum_first
            held = any(t.untyped_storage()._cdata == tensors[name].untyped_storage()._cdata for t in kept)
            assert held != (summed and tensors[name].shape[1] > 1)
    assert sum(t.nbytes for t in kept if t.untyped_storage()._cdata not in own) == maps * 128 * 56 * 56 * 192 * 2


@on_gpu
@pytest.mark.usefixtures("free_memory")
def test_beyond_2_31_elements(device):
    batch, height, width, channels = 3, 900, 800, 1024
    full = torch.empty(batch, 1, height, width, channels, device=device, dtype=BF16).normal_()
    half = torch.randn(batch, 1, height // 2, width // 2, channels, device=device).to(BF16)
    norm = torch.randn(2, channels, device=device)
    assert full.numel() > 2**31

    def run(full, half):
        leaves = [t.detach().requires_grad_() for t in (full, half)]
        m, _ = merge_routes(*leaves, *norm, *norm, (height, width))
        gradients = torch.autograd.grad(m, leaves, m.detach())
        return m.detach()[-1], *(t[-1] for t in gradients)

    for found, alone in zip(run(full, half), run(full[-1:].clone(), half[-1:].clone()), strict=True):
        assert torch.equal(found, alone)
    m, z = full[:, 0].requires_grad_(), full[:, 0].detach()
    out = gate(m, None, z)
    assert torch.equal(out[-1:], gate(m[-1:], None, z[-1:]))
    (dm,) = torch.autograd.grad(out, m, z)
    last = m.detach()[-1:].requires_grad_()
    assert torch.equal(dm[-1:], torch.autograd.grad(gate(last, None, z[-1:]), last, z[-1:])[0])


# What is refused.

Y, HALF, NORM = torch.zeros(2, 1, 3, 4, 5), torch.zeros(2, 3, 2, 2, 5), torch.zeros(5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"y_full": None, "y_half": None}, ValueError, "y_full and y_half are both None; expected routes"),
        ({"y_full": Y[0]}, ValueError, r"y_full has shape \(1, 3, 4, 5\); expected \(B, K, H, W, D\)"),
        ({"y_full": Y[:0]}, ValueError, "no elements"),
        ({"size": (3, 5)}, ValueError, r"y_full has shape .*; expected \(B=2, K, H=3, W=5, D=5\)"),
        ({"y_half": HALF[:, :, :1]}, ValueError, r"y_half has shape .*; expected \(B=2, K, H=2, W=2, D=5\)"),
        ({"y_half": HALF[:1]}, ValueError, "y_half has shape .*; expected .B=2"),
        ({"weight": None}, ValueError, "weight is None, but there is y_full; expected LayerNorm's"),
        ({"bias_half": None}, ValueError, "bias_half is None, but there is y_half"),
        ({"weight_half": NORM[:4]}, ValueError, r"weight_half has shape \(4,\); expected \(D=5\)"),
        ({"y_half": HALF.int()}, TypeError, "y_half is torch.int32"),
        ({"backend": "cudnn"}, ValueError, "backend 'cudnn' is unknown"),
        ({"y_full": Y.double(), "backend": "triton"}, ValueError, "an input is float64; use 'auto'"),
    ],
)
def test_refused(change, error, message):
    names = ("y_full", "y_half", "weight", "bias", "weight_half", "bias_half")
    arguments = dict(zip(names, (Y, HALF, NORM, NORM, NORM, NORM), strict=True))
    with pytest.raises(error, match=message):
        merge_routes(**{**arguments, "size": (3, 4), **change})


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"m": torch.zeros(2, 3, 4)}, ValueError, r"m has shape \(2, 3, 4\); expected \(B, H, W, D\)"),
        ({"z": torch.zeros(2, 3, 4, 6)}, ValueError, r"z has shape .*; expected \(B=2, H=3, W=4, D=5\)"),
        ({"scale": torch.zeros(2, 4)}, ValueError, r"scale has shape \(2, 4\); expected \(B=2, D=5\)"),
        ({"z": torch.zeros(2, 3, 4, 5).int()}, TypeError, "z is torch.int32"),
        ({"backend": "cudnn"}, ValueError, "backend 'cudnn' is unknown"),
        ({"scale": torch.zeros(2, 5).double(), "backend": "triton"}, ValueError, "an input is float64"),
    ],
)
def test_gate_refuses(change, error, message):
    arguments = {"m": torch.zeros(2, 3, 4, 5), "scale": torch.zeros(2, 5), "z": torch.zeros(2, 3, 4, 5)}
    with pytest.raises(error, match=message):
        gate(**{**arguments, **change})
