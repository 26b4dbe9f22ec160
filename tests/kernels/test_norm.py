"""The sum of a map and a branch, and its LayerNorm: against the definition in float64, as torch sees it, what it
refuses.

As in `test_triton.py`, kernels run small through Triton's interpreter, and in full with `pytest -m gpu`.
"""

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

from msv.kernels import add_branch, add_norm, triton_pixels

KINDS = ("alone", "branch", "factors")


class Case(NamedTuple):
    kind: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __str__(self):
        return f"{self.kind}-{str(self.dtype)[6:]}-{'x'.join(map(str, self.shape))}"


kinds = pytest.mark.parametrize("kind", KINDS)


def make(kind, shape, dtype=FLOAT32, device="cpu"):
    """(the operator but for its tensors, tensors): a map and a branch, and a norm in float32 as a network has it."""
    tensors = {"x": 3 * torch.randn(shape) + 1, "branch": torch.randn(shape)}
    tensors |= {"weight": torch.randn(shape[3]), "bias": torch.randn(shape[3])}
    tensors = {name: t.to(device, dtype if t.dim() > 1 else FLOAT32) for name, t in tensors.items()}
    if kind == "alone":
        del tensors["branch"]
    factors = (torch.rand(shape[0]) * 2).to(device) if kind == "factors" else None
    return partial(by_name, factors=factors), tensors


def by_name(x, weight, bias, branch=None, factors=None, **options):
    """`add_norm`, its tensors by name."""
    return add_norm(x, branch, factors, weight, bias, **options)


def small_shape(device):
    return (3, 5, 4, 6) if device == "cpu" else (3, 29, 27, 100)


@pytest.fixture
def assert_exact(outputs_and_gradients, relative_error):
    """Compares outputs and gradients with the definition in float64, which has seen no rounding of the sum."""

    def check(operator, tensors):
        found = outputs_and_gradients(operator, tensors, backend=BACKEND)
        expected = outputs_and_gradients(operator, tensors, dtype=torch.float64, backend="reference")
        rounding = UNIT_ROUNDOFF[tensors["x"].dtype]
        for name, t in tensors.items():
            assert found[1][f"d{name}"].dtype == t.dtype
        errors = {}
        for limit, part, right in zip((2 * rounding + 1e-6, 3 * rounding + 1e-6), found, expected, strict=True):
            errors |= {name: relative_error(t, right[name]) / limit for name, t in part.items() if t is not None}
        assert all(error <= 1 for error in errors.values()), errors
        return found[0]

    return check


# Values.

SMALL = [
    Case("alone", FLOAT32, (2, 5, 7, 6)),
    Case("alone", BF16, (1, 3, 4, 50)),
    Case("branch", FLOAT32, (1, 1, 1, 70)),
    Case("branch", BF16, (2, 4, 5, 9)),
    Case("branch", FP16, (1, 3, 2, 48)),
    Case("factors", FLOAT32, (3, 4, 5, 33)),
    Case("factors", BF16, (2, 3, 4, 64)),
    Case("factors", FP16, (3, 2, 5, 20)),
]
SHAPES = ((2, 56, 56, 96), (3, 28, 28, 48), (2, 7, 7, 768), (1, 65, 63, 33), (5, 1, 9, 50), (1, 128, 96, 1536))
FULL = [Case(kind, dtype, shape) for kind in KINDS for dtype in (FLOAT32, BF16, FP16) for shape in SHAPES]


@pytest.mark.parametrize("device, case", on_devices(SMALL, FULL))
def test_values(assert_exact, device, case):
    found = assert_exact(*make(case.kind, case.shape, case.dtype, device))
    assert {t.dtype for t in found.values() if t is not None} == {case.dtype}


@kinds
@pytest.mark.parametrize("dtype", [FLOAT32, BF16], ids=str)
def test_the_definition_is_torch_s(kind, dtype):
    operator, tensors = make(kind, (2, 3, 4, 5), dtype)
    found, expected = (operator(**tensors, backend=backend) for backend in ("reference", "parallel"))
    limit = 2 * UNIT_ROUNDOFF[dtype]
    for t, right in zip(found, expected, strict=True):
        torch.testing.assert_close(t, right.to(dtype), rtol=limit, atol=8 * limit)


@devices
def test_without_a_branch_the_map_itself_is_returned(device):
    operator, tensors = make("alone", small_shape(device), device=device)
    assert operator(**tensors, backend=BACKEND)[0] is tensors["x"]


@devices
@pytest.mark.parametrize("x, branch", [(FLOAT32, BF16), (BF16, FLOAT32)], ids=str)
def test_the_wider_dtype_is_the_sum_s(outputs_and_gradients, relative_error, device, x, branch):
    operator, tensors = make("factors", small_shape(device), device=device)
    tensors |= {"x": tensors["x"].to(x), "branch": tensors["branch"].to(branch)}
    found = outputs_and_gradients(operator, tensors, backend=BACKEND)
    expected = outputs_and_gradients(operator, tensors, dtype=torch.float64, backend="reference")
    assert {t.dtype for t in found[0].values() if t is not None} == {FLOAT32}
    for name, t in found[1].items():
        assert t.dtype == tensors[name.removeprefix("d")].dtype
        assert relative_error(t, expected[1][name]) < UNIT_ROUNDOFF[t.dtype] + 1e-6


@devices
@kinds
@pytest.mark.parametrize("used", ["sum", "norm"])
def test_one_output_may_be_of_no_use(relative_error, device, kind, used):
    operator, tensors = make(kind, small_shape(device), device=device)
    gradients = []
    for backend, dtype in ((BACKEND, FLOAT32), ("reference", torch.float64)):
        leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in tensors.items()}
        total, normed = operator(**leaves, backend=backend)
        y = total if used == "sum" else normed
        gradients.append(torch.autograd.grad(y.square().sum(), leaves.values(), allow_unused=True))
    for name, found, expected in zip(tensors, *gradients, strict=True):
        assert (found is None) == (expected is None) == (used == "sum" and name in ("weight", "bias"))
        assert found is None or relative_error(found, expected) < 1e-6


@devices
@kinds
def test_what_is_not_finite_stays_in_its_pixel(device, kind):
    operator, tensors = make(kind, small_shape(device), device=device)
    clean = operator(**tensors, backend=BACKEND)[1]
    tensors["x"][1, 3, 2, 1] = torch.nan
    found = operator(**tensors, backend=BACKEND)[1]
    nan = torch.zeros(found.shape, dtype=torch.bool, device=device)
    nan[1, 3, 2] = True
    assert torch.equal(found.isnan(), nan)
    assert torch.equal(found[~nan], clean[~nan])


@devices
def test_a_factor_of_zero_leaves_the_branch_out(device):
    operator, tensors = make("factors", small_shape(device), device=device)
    tensors["branch"].requires_grad_()
    factors = torch.tensor([0.0, 2.0, 0.0], device=device)
    total, normed = operator(**tensors, backend=BACKEND, factors=factors)
    assert torch.equal(total[::2], tensors["x"][::2])
    (total.sum() + normed.square().sum()).backward()
    assert not tensors["branch"].grad[::2].any()
    assert tensors["branch"].grad[1].all()


# Layouts and bits.

LAYOUTS = {
    "channels-first": lambda t: t.movedim(-1, 1).contiguous().movedim(1, -1),
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view_as(t),
    "cropped": lambda t: F.pad(t, (1, 2, 1, 1, 2, 1))[..., 2:-1, 1:-1, 1:-2],
}


@devices
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_does_not_matter(device, layout):
    operator, tensors = make("factors", small_shape(device), device=device)

    def run(change):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in tensors.items()}
        outputs = operator(**{name: change(t) if t.dim() > 1 else t for name, t in leaves.items()}, backend=BACKEND)
        torch.autograd.backward(outputs, [change(torch.ones_like(y) * y.detach()) for y in outputs])
        return [*outputs, *(t.grad for t in leaves.values())]

    assert all(torch.equal(a, b) for a, b in zip(run(LAYOUTS[layout]), run(lambda t: t), strict=True))


@devices
@kinds
@pytest.mark.usefixtures("as_users_run")
def test_the_same_inputs_give_the_same_bits(outputs_and_gradients, device, kind):
    operator, tensors = make(kind, small_shape(device), device=device)
    expected = outputs_and_gradients(operator, tensors, backend=BACKEND)
    for _ in range(1 if device == "cpu" else 5):
        assert_same_bits(outputs_and_gradients(operator, tensors, backend=BACKEND), expected)


@devices
@kinds
def test_chunks_change_nothing_but_the_rounding_of_sums(
    monkeypatch, outputs_and_gradients, relative_error, device, kind
):
    if device == "cpu":
        monkeypatch.setattr(triton_pixels, "TILE", 256)
    operator, tensors = make(kind, (2, 9, 8, 6) if device == "cpu" else (3, 129, 127, 100), device=device)
    found = []
    for wanted in (1, 100_000):
        monkeypatch.setattr(triton_pixels, "PROGRAMS_WANTED", wanted)
        found.append(outputs_and_gradients(operator, tensors, backend=BACKEND))
    for part, same in zip(*found, strict=True):
        for name, t in part.items():
            if name in ("dweight", "dbias"):
                assert relative_error(t, same[name]) < 1e-6
            else:
                assert t is None or torch.equal(t, same[name])


# Registration with torch.


@pytest.mark.parametrize(
    "device, dtype",
    [
        pytest.param("cpu", FLOAT32, marks=INTERPRETER, id="interpreter-float32"),
        *(pytest.param("cuda", dtype, marks=GPU, id=f"cuda-{dtype}") for dtype in (FLOAT32, BF16)),
    ],
)
@pytest.mark.parametrize("kind", ["alone", "factors"])
def test_opcheck(device, dtype, kind):
    operator, tensors = make(kind, (2, 3, 4, 6), dtype, device)
    factors, leaves = operator.keywords["factors"], {name: t.requires_grad_() for name, t in tensors.items()}
    x, branch, weight, bias = (leaves.get(name) for name in ("x", "branch", "weight", "bias"))
    torch.library.opcheck(torch.ops.msv.add_norm.default, (x, branch, factors, weight, bias, 1e-5, dtype, dtype))
    with torch.no_grad():
        x, weight = x.detach(), weight.detach()
        gradients = (torch.randn_like(x), None if kind == "alone" else torch.randn_like(x))
        arguments = (*gradients, x, factors, weight, 1e-5, factors is not None, dtype)
        torch.library.opcheck(torch.ops.msv.add_norm_backward.default, arguments)


@devices
@kinds
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_is_eager(outputs_and_gradients, device, kind):
    operator, tensors = make(kind, (2, 4, 5, 6), device=device)
    run = partial(operator, backend=BACKEND)
    compiled = torch.compile(run, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    assert_same_bits(outputs_and_gradients(compiled, tensors), outputs_and_gradients(run, tensors))


@under_autocast
@kinds
def test_autocast_chooses_the_norm_s_dtype_alone(outputs_and_gradients, device, backend, kind):
    if backend == "parallel":
        pytest.skip("is what torch's LayerNorm makes of it")
    operator, tensors = make(kind, (2, 4, 5, 6), device=device)
    expected = operator(**tensors, backend=backend)
    with torch.autocast(device, BF16):
        found, gradients = outputs_and_gradients(operator, tensors, backend=backend)
        total, normed = operator(**tensors, backend=backend)
    assert torch.equal(total, expected[0])
    # Where an output is rounded to 16 bits, the interpreter cuts.
    torch.testing.assert_close(normed, expected[1].to(BF16), rtol=2 * UNIT_ROUNDOFF[BF16], atol=0)
    assert all(gradients[f"d{name}"].dtype == t.dtype for name, t in tensors.items())
    assert {t.dtype for t in found.values() if t is not None} == {FLOAT32, BF16}


@devices
@pytest.mark.parametrize("backend", ["auto", BACKEND])
def test_exports(device, backend):
    """As torch's operators, or as itself where Triton is asked for."""
    operator, tensors = make("branch", (1, 4, 5, 6), device=device)

    class Module(torch.nn.Module):
        def forward(self, tensors):
            return operator(**tensors, backend=backend)

    program = torch.export.export(Module(), (tensors,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("msv.add_norm" in name for name in called) == (backend == BACKEND)
    for found, expected in zip(program.module()(tensors), Module()(tensors), strict=True):
        torch.testing.assert_close(found, expected)


@devices
def test_the_second_derivative_is_refused(device):
    operator, tensors = make("branch", (1, 4, 5, 6), device=device)
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    _, y = operator(**leaves, backend=BACKEND)
    (gradient,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"backward through msv\.add_norm_backward"):
        gradient.square().sum().backward()


@kinds
def test_shapes_and_dtypes_on_the_meta_device(kind):
    operator, tensors = make(kind, (2, 9, 6, 5))
    factors = operator.keywords["factors"]
    expected = operator(**tensors)
    found = operator(
        **{name: t.to("meta") for name, t in tensors.items()}, factors=None if factors is None else factors.to("meta")
    )
    for y, meta in zip(expected, found, strict=True):
        assert meta.is_meta
        assert (meta.shape, meta.dtype) == (y.shape, y.dtype)


@on_gpu
def test_cuda_graph(device):
    operator, tensors = make("factors", small_shape(device), device=device)
    leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}

    def step():
        outputs = operator(**leaves, backend=BACKEND)
        return [*outputs, *torch.autograd.grad(sum(y.square().sum() for y in outputs), leaves.values())]

    assert_graph_replays(step, leaves, tensors)


@on_gpu
@kinds
def test_a_new_size_compiles_nothing(monkeypatch, outputs_and_gradients, device, kind):
    import triton

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **kernel: compiled.append(kernel["repr"]))
    for shape in ((4, 56, 56), (4, 55, 57), (1, 64, 48), (3, 23, 41), (16, 9, 8), (1, 256, 256), (1, 1, 1)):
        outputs_and_gradients(*make(kind, (*shape, 104), BF16, device))
        assert not compiled or shape == (4, 56, 56), f"{shape} compiled {compiled}"
        compiled.clear()


# Memory.


@kinds
def test_what_the_backward_needs_kept(kind):
    """The sum, which the next layer adds to, or the map itself; and nothing of its size beside it."""
    kept, shape = [], (128, 56, 56, 96)
    with FakeTensorMode():
        x = torch.empty(shape, device="cuda", dtype=BF16, requires_grad=True)
        branch = None if kind == "alone" else torch.empty_like(x, requires_grad=True)
        factors = torch.empty(128, device="cuda") if kind == "factors" else None
        norm = torch.empty(2, 96, device="cuda", requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            total, _ = add_norm(x, branch, factors, *norm)
    large = [t for t in kept if t.numel() > 96 * 128]
    assert len(large) == 1
    assert large[0].untyped_storage()._cdata == total.untyped_storage()._cdata


@on_gpu
@pytest.mark.usefixtures("free_memory")
def test_beyond_2_31_elements(device):
    x = torch.empty(3, 900, 800, 1024, device=device, dtype=BF16).normal_()
    norm = torch.randn(2, 1024, device=device)
    assert x.numel() > 2**31

    def run(x):
        leaves = [x.requires_grad_(), x.detach().requires_grad_()]
        outputs = add_norm(*leaves, torch.ones(len(x), device=device), *norm)
        gradients = torch.autograd.grad(outputs, leaves, [x.detach(), x.detach()])
        return [t.detach()[-1] for t in (*outputs, *gradients)]

    alone = run(x[-1:].clone())
    for found, same in zip(run(x), alone, strict=True):
        assert torch.equal(found, same)


# What is refused.

X = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": X[0]}, ValueError, r"x has shape \(3, 4, 5\); expected \(B, H, W, C\)"),
        ({"x": X[:0]}, ValueError, "no elements"),
        ({"branch": X[:, :2]}, ValueError, r"branch has shape .*; expected \(B=2, H=3, W=4, C=5\)"),
        ({"factors": torch.ones(3)}, ValueError, r"factors has shape \(3,\); expected \(B=2\)"),
        ({"branch": None}, ValueError, "there are factors, but branch is None; expected what they multiply"),
        ({"weight": torch.ones(4)}, ValueError, r"weight has shape \(4,\); expected \(C=5\)"),
        ({"branch": X.int()}, TypeError, "branch is torch.int32"),
        ({"backend": "cudnn"}, ValueError, "backend 'cudnn' is unknown"),
        ({"x": X.double(), "backend": "triton"}, ValueError, "an input is float64; use 'auto'"),
    ],
)
def test_refused(change, error, message):
    tensors = {"x": X, "branch": X, "factors": torch.ones(2), "weight": torch.ones(5), "bias": torch.ones(5)}
    with pytest.raises(error, match=message):
        add_norm(**{**tensors, **change})


def test_a_sum_without_a_norm():
    x, branch = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert add_branch(x, None, None) is x
    assert torch.equal(add_branch(x, branch, None), x + branch)
    torch.testing.assert_close(add_branch(x, branch, torch.tensor([0.0, 2.0]))[1], (x + 2 * branch)[1])
    assert torch.equal(add_branch(x, branch, torch.tensor([0.0, 2.0]))[0], x[0])
