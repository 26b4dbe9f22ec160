"""The Triton kernels against the reference in float64: small through Triton's interpreter, in full on a GPU.

`pytest` runs what the interpreter can bear; `pytest -m gpu` runs the matrix. Kernels are reached through the public
operators alone, so nothing here knows how they are made.
"""

import itertools
import os
import random
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import pytest
import torch
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
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from msv.kernels import ROUTES, selective_scan, selective_scan_2d
from msv.kernels.triton_tiles import Chunks, cut

# Relative error in norm: of outputs and gradients in float32; of float32 gradients beside inputs in half precision.
TOLERANCES = {FLOAT32: (1e-5, 1e-4), BF16: (5e-4, 5e-4), FP16: (5e-4, 5e-4)}
ROUNDED = {"u", "delta", "B", "C", "z", "x", "x_dbl"}  # the arguments that half precision holds; weights are float32

FOUR_OWN = tuple(zip(ROUTES, range(4), strict=True))
ROUTE_SETS = {
    **{name: (((name, 0),), False) for name in ROUTES},
    "four-own": (FOUR_OWN, False),
    "four-shared": (tuple((name, 0) for name in ROUTES), False),
    "three-carried": ((("rowR", 0), ("col", 0), ("colR", 0)), True),
    "three-reset": ((("rowR", 0), ("col", 0), ("colR", 0)), False),
}
scan_and_last = partial(selective_scan, return_last_state=True)


class Case1d(NamedTuple):
    dtype: torch.dtype
    length: int
    channels: int
    d_state: int
    groups: int
    options: str  # a letter each: D, z, b for delta_bias, s for softplus, l for the last state

    def __str__(self):
        sizes = f"L{self.length}-D{self.channels}-N{self.d_state}-G{self.groups}"
        return f"{str(self.dtype)[6:]}-{sizes}-{self.options or 'plain'}"


class Case2d(NamedTuple):
    dtype: torch.dtype
    size: tuple[int, int]
    routes: str
    channels: int
    d_state: int
    rank: int

    def __str__(self):
        sizes = f"{self.size[0]}x{self.size[1]}-D{self.channels}-N{self.d_state}-R{self.rank}"
        return f"{str(self.dtype)[6:]}-{sizes}-{self.routes}"


def pairwise(*factors):
    """Combinations in which any two values of two factors meet at least once."""

    def pairs(combination):
        return set(itertools.combinations(enumerate(combination), 2))

    draw = random.Random(0)
    missing = set().union(*(pairs(combination) for combination in itertools.product(*factors)))
    found = []
    while missing:
        pair = min(missing, key=repr)
        tries = [[draw.choice(values) for values in factors] for _ in range(30)]
        for combination in tries:
            for factor, value in pair:
                combination[factor] = value
        found.append(tuple(max(tries, key=lambda combination: len(pairs(combination) & missing))))
        missing -= pairs(found[-1])
    return found


def to(arguments, *where):
    return {name: t.to(*where) if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}


@pytest.fixture
def assert_exact(outputs_and_gradients, relative_error):
    """Compares outputs and gradients with the reference in float64, of arguments rounded to a dtype or as they are."""

    def check(scan, arguments, dtype=FLOAT32, steps=0):
        # The reference takes minutes for sequences of several maps; test_parallel.py holds parallel to it.
        exactly = partial(
            outputs_and_gradients, scan, dtype=torch.float64, backend="reference" if steps <= 3136 else "parallel"
        )
        inputs = {name: t.to(dtype) if name in ROUNDED else t for name, t in arguments.items()}
        found, expected = outputs_and_gradients(scan, inputs, backend=BACKEND), exactly(inputs)
        unrounded = expected if dtype == FLOAT32 else exactly(arguments)
        errors = {}
        for part, exact, original, tolerance in zip(found, expected, unrounded, TOLERANCES[dtype], strict=True):
            assert part.keys() == exact.keys()
            for name, t in part.items():
                assert t.dtype == (dtype if name == "y" or name[1:] in ROUNDED else FLOAT32)
                tiny = exact[name].norm() < 1e-30  # what float32 cannot hold need only be as tiny
                error = t.double().norm() / 1e-30 if tiny else relative_error(t, exact[name])
                allowed = 1 if tiny else tolerance if t.dtype == FLOAT32 else UNIT_ROUNDOFF[dtype]
                if not error <= allowed:
                    errors[name] = f"{error:.2e}, allowed {allowed:.2e}"
                elif dtype != FLOAT32:
                    error, allowed = relative_error(t, original[name]), relative_error(exact[name], original[name])
                    if not error <= allowed + UNIT_ROUNDOFF[dtype]:
                        errors[name] = f"{error:.2e} from unrounded inputs, where rounding them makes {allowed:.2e}"
        assert not errors

    return check


@pytest.fixture(params=["1d", "2d"])
def operator(request, device, make_1d, make_2d):
    """(scan, arguments) of each operator: all options of the one, a carried state over three routes of the other."""
    small = device == "cpu"
    if request.param == "1d":
        arguments = make_1d(3, 6 if small else 10, 20 if small else 784, 2 if small else 3, 2, FLOAT32, grad=False)
        scan = partial(scan_and_last, delta_softplus=arguments.pop("delta_softplus"), backend=BACKEND)
    else:
        size = (3, 4) if small else (28, 27)
        arguments = make_2d(3, *size, 10, 2 if small else 3, 2, dtype=FLOAT32, grad=False)
        routes, carry_state = ROUTE_SETS["three-carried"]
        scan = partial(selective_scan_2d, routes=routes, carry_state=carry_state, backend=BACKEND)
    return scan, to(arguments, device)


# Values: the matrix.

OPTIONS = ("", "Dzbsl", "Ds", "zl", "bs")
SMALL_1D = [
    Case1d(FLOAT32, 1, 5, 3, 1, "Dzbsl"),
    Case1d(FLOAT32, 7, 5, 1, 1, ""),
    Case1d(FLOAT32, 30, 4, 16, 4, "Ds"),
    Case1d(FLOAT32, 64, 6, 3, 2, "zl"),
    Case1d(FLOAT32, 65, 33, 1, 1, "Dzbsl"),
    Case1d(FLOAT32, 196, 5, 1, 1, "bs"),
    Case1d(BF16, 35, 10, 3, 2, "Dzbsl"),
    Case1d(FP16, 64, 5, 3, 1, "Dzbsl"),
    # Rows that begin anywhere in a sector: two classes of channels, four of them twice, and too many.
    Case1d(FLOAT32, 52, 40, 1, 1, "Dzbsl"),
    Case1d(BF16, 44, 64, 1, 2, "Dzbsl"),
    Case1d(FP16, 20, 128, 2, 2, "bs"),
    Case1d(BF16, 37, 256, 1, 1, ""),
]
FULL_1D = itertools.starmap(
    Case1d,
    pairwise(
        (FLOAT32, BF16, FP16),
        (1, 7, 63, 64, 65, 196, 588, 784, 2352, 3136),
        (5, 33, 100, 192, 256),
        (1, 3, 8, 16),
        (1, 2, 4),
        OPTIONS,
    ),
)


@pytest.mark.parametrize("device, case", on_devices(SMALL_1D, FULL_1D))
def test_1d_is_the_reference(make_1d, assert_exact, device, case):
    channels = case.channels if case.channels % case.groups == 0 else case.channels * case.groups
    arguments = make_1d(2, channels, case.length, case.d_state, case.groups, FLOAT32, grad=False)
    softplus = arguments.pop("delta_softplus") and "s" in case.options
    for name, letter in (("D", "D"), ("z", "z"), ("delta_bias", "b")):
        if letter not in case.options:
            del arguments[name]
    if not softplus:  # negative steps would make the state grow
        arguments.update({name: t.abs() for name, t in arguments.items() if name.startswith("delta")})
    scan = partial(selective_scan, delta_softplus=softplus, return_last_state="l" in case.options)
    assert_exact(scan, to(arguments, device), case.dtype, case.length)


SMALL_2D = [
    *(Case2d(FLOAT32, (7, 5), route, 5, n, 2) for route, n in zip(ROUTES, (1, 3, 1, 8), strict=True)),
    Case2d(FLOAT32, (9, 8), "four-own", 6, 1, 6),
    Case2d(FLOAT32, (3, 5), "four-shared", 33, 1, 1),
    Case2d(FLOAT32, (7, 5), "three-carried", 6, 1, 12),
    Case2d(FLOAT32, (4, 5), "three-reset", 5, 16, 1),
    Case2d(FLOAT32, (1, 1), "three-carried", 5, 3, 1),
    Case2d(FLOAT32, (1, 13), "four-own", 5, 1, 2),
    Case2d(BF16, (7, 5), "three-carried", 10, 1, 6),
    Case2d(FP16, (5, 6), "four-own", 5, 3, 2),
]
FULL_2D = itertools.starmap(
    Case2d,
    pairwise(
        (FLOAT32, BF16, FP16),
        ((7, 5), (9, 8), (1, 1), (1, 13), (13, 1), (56, 56)),
        tuple(ROUTE_SETS),
        (5, 33, 100, 192),
        (1, 3, 8, 16),
        (1, 6, 12, 24, 48),
    ),
)


@pytest.mark.parametrize("device, case", on_devices(SMALL_2D, FULL_2D))
def test_2d_is_the_reference(make_2d, assert_exact, device, case):
    routes, carry_state = ROUTE_SETS[case.routes]
    sets = 1 + max(weight_set for _, weight_set in routes)
    arguments = make_2d(2, *case.size, case.channels, case.d_state, case.rank, sets, FLOAT32, grad=False)
    arguments["dt_weight"] /= case.rank**0.5  # so that delta is as large whatever the rank
    scan = partial(selective_scan_2d, routes=routes, carry_state=carry_state)
    steps = case.size[0] * case.size[1] * len(routes)
    assert_exact(scan, to(arguments, device), case.dtype, steps)


@on_gpu
def test_long_sequences(make_1d, make_2d, assert_exact, device):
    """Beyond 2^16 steps, at batch 1, where an implementation cuts the sequence in parts."""
    arguments = make_1d(1, 33, 70_001, 1, 1, FLOAT32, grad=False)
    scan = partial(scan_and_last, delta_softplus=arguments.pop("delta_softplus"))
    assert_exact(scan, to(arguments, device), steps=70_001)
    arguments = make_2d(1, 256, 259, 33, 1, 6, grad=False)
    scan = partial(selective_scan_2d, routes=(("col", 0), ("rowR", 0)), carry_state=True)
    assert_exact(scan, to(arguments, device, FLOAT32), steps=2 * 256 * 259)


@on_gpu
@pytest.mark.parametrize("length", [196, 3136], ids="L{}".format)
def test_one_sequence_alone_and_among_many(make_1d, relative_error, device, length):
    """The work may be cut by the size of the batch; where it is cut changes no more than rounding."""
    arguments = to(make_1d(128, 192, length, 1, 1, FLOAT32, grad=False), device)
    y = selective_scan(**arguments, backend=BACKEND)
    alone = {name: t[:1] if name in ROUNDED else t for name, t in arguments.items()}
    assert relative_error(selective_scan(**alone, backend=BACKEND), y[:1]) < 1e-5


@devices
def test_float64_is_exact(operator, outputs_and_gradients, assert_agree, device):
    scan, arguments = operator
    expected = outputs_and_gradients(scan, arguments, torch.float64, backend="reference")
    assert_agree(outputs_and_gradients(scan, arguments, torch.float64, backend="auto"), expected, torch.float64)


# Values: extremes. Without a skip, so that what tiny steps let in is all there is in y.

EXTREMES = {
    "delta-closed": {"delta": -1e4},
    "delta-almost-closed": {"delta": -80.0},
    "delta-tiny": {"delta": -20.0},
    "delta-small": {"delta": -15.0},
    "delta-linear": {"delta": 30.0},
    "delta-open": {"delta": 1e4},
    "A-near-0": {"A": -1e-8},
    "A-near-0-delta-open": {"A": -1e-8, "delta": 1e4},
    "A-very-negative": {"A": -1e4},
    "A-very-negative-delta-small": {"A": -1e4, "delta": -15.0},
    "A-very-negative-delta-open": {"A": -1e4, "delta": 1e4},
    "u-zero": {"u": 0.0},
    "B-zero": {"B": 0.0},
    "all-zero": {"u": 0.0, "delta": 0.0, "B": 0.0, "C": 0.0},
}


@pytest.mark.parametrize("device, where", on_devices(["here-and-there"], ["everywhere", "here-and-there"]))
@pytest.mark.parametrize("values", EXTREMES.values(), ids=EXTREMES)
def test_1d_extremes(make_1d, assert_exact, values, where, device):
    arguments = make_1d(1, 5, 37 if device == "cpu" else 785, 2, 1, FLOAT32, grad=False)
    arguments = {name: arguments[name] for name in ("u", "delta", "A", "B", "C")}
    for name, value in values.items():
        t = arguments[name]
        t[torch.ones_like(t, dtype=bool) if where == "everywhere" else torch.rand_like(t) < 0.2] = value
    assert_exact(partial(selective_scan, delta_softplus=True), to(arguments, device))


@devices
@pytest.mark.parametrize("raw", [-1e4, -80.0, -15.0, 30.0, 1e4], ids="raw{:g}".format)
@pytest.mark.parametrize("A", [-1e4, -1.0, -1e-8], ids="A{:g}".format)
def test_2d_extremes(make_2d, assert_exact, raw, A, device):
    size = (5, 4) if device == "cpu" else (28, 28)
    arguments = make_2d(1, *size, 5, 1, 2, dtype=FLOAT32, grad=False)
    arguments["dt_bias"][:] = raw
    arguments["dt_weight"] /= max(1, -raw)  # leaves delta where its bias puts it
    arguments["A_log"][:] = torch.tensor(-A).log()
    arguments["D_skip"][:] = 0
    scan = partial(selective_scan_2d, routes=ROUTE_SETS["three-carried"][0], carry_state=True)
    assert_exact(scan, to(arguments, device))


@pytest.mark.parametrize("device, length", on_devices([150], [3136]))
@pytest.mark.parametrize("d_state", [1, 16], ids="N{}".format)
def test_long_memory(make_1d, assert_exact, device, length, d_state):
    """Δ·A ≈ -1e-3: the state forgets over a thousand steps."""
    arguments = make_1d(1, 5, length, d_state, 1, FLOAT32, grad=False)
    arguments = {name: arguments[name] for name in ("u", "delta", "A", "B", "C")}
    arguments["delta"] = 0.01 * (1 + torch.rand_like(arguments["delta"]))
    arguments["A"] = -0.05 * (1 + torch.rand_like(arguments["A"]))
    assert_exact(scan_and_last, to(arguments, device), steps=length)


@pytest.mark.parametrize(
    "device, size", on_devices([(2, 6, 70), (1, 64, 52)], [(2, 6, 300), (64, 36, 785), (3, 192, 588), (1, 4, 4000)])
)
@pytest.mark.parametrize("name", ["u", "delta", "B", "C"])
def test_1d_nan_stays_behind_the_recurrence(make_1d, outputs_and_gradients, device, size, name):
    arguments = to(make_1d(*size, d_state=2, groups=2, dtype=FLOAT32, grad=False), device)
    clean = selective_scan(**arguments, backend=BACKEND)
    arguments[name][-1, 0, ..., size[2] * 2 // 3] = torch.nan
    found, expected = (outputs_and_gradients(selective_scan, arguments, backend=b) for b in (BACKEND, "parallel"))
    for part, same in zip(found, expected, strict=True):
        assert [key for key, t in part.items() if not torch.equal(t.isnan(), same[key].isnan())] == []
    reached = expected[0]["y"].isnan()
    assert reached.any()
    assert torch.equal(found[0]["y"][~reached], clean[~reached])


@devices
@pytest.mark.parametrize("name", ["u", "B"])
def test_1d_nan_in_the_last_step(make_1d, outputs_and_gradients, device, name):
    arguments = to(make_1d(1, 2, 20, 2, dtype=FLOAT32, grad=False), device)
    arguments[name][..., -1] = torch.nan
    found, expected = (outputs_and_gradients(selective_scan, arguments, backend=b) for b in (BACKEND, "reference"))
    for part, same in zip(found, expected, strict=True):
        assert [key for key, t in part.items() if not torch.equal(t.isnan(), same[key].isnan())] == []


@devices
@pytest.mark.parametrize("name", ["x", "x_dbl"])
@pytest.mark.parametrize("routes", [*ROUTES, "three-carried"])
def test_2d_nan_stays_behind_the_recurrence(make_2d, outputs_and_gradients, device, name, routes):
    height, width = (6, 7) if device == "cpu" else (23, 31)
    arguments = to(make_2d(2, height, width, dtype=FLOAT32, grad=False), device)
    scan = partial(selective_scan_2d, **dict(zip(("routes", "carry_state"), ROUTE_SETS[routes], strict=True)))
    clean = scan(**arguments, backend=BACKEND)
    arguments[name][1, height // 3, width // 2, ..., -1] = torch.nan  # of x_dbl: of C, which no state remembers
    arguments[name][1, height // 2, width // 3, ..., 1] = torch.nan  # of x_dbl: of dt_low
    found, expected = (outputs_and_gradients(scan, arguments, backend=b) for b in (BACKEND, "parallel"))
    for part, same in zip(found, expected, strict=True):
        assert [key for key, t in part.items() if not torch.equal(t.isnan(), same[key].isnan())] == []
    reached = expected[0]["y"].isnan()
    assert reached.any()
    assert not reached.all()
    assert torch.equal(found[0]["y"][~reached], clean[~reached])


# Bits.


@pytest.mark.parametrize("device, repeats", on_devices([2], [5]))
@pytest.mark.usefixtures("as_users_run")
def test_the_same_inputs_give_the_same_bits(operator, outputs_and_gradients, device, repeats):
    scan, arguments = operator
    expected = outputs_and_gradients(scan, arguments)
    for _ in range(repeats - 1):
        if device == "cuda":
            with torch.cuda.stream(torch.cuda.Stream()):  # work beside it, and other memory for its outputs
                other = torch.randn(2048, 2048, device=device)
                other = (other @ other).sum()
        assert_same_bits(outputs_and_gradients(scan, arguments), expected)


def reversed_strides(t):
    back = tuple(reversed(range(t.dim())))
    return t.permute(back).contiguous().permute(back)


LAYOUTS = {
    "transposed": reversed_strides,
    "sliced": lambda t: torch.stack([t, t + 1], dim=-1).flatten(-2)[..., ::2],
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].view_as(t),
    "expanded": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("device, layout", on_devices(["transposed"], LAYOUTS))
def test_layout_does_not_matter(operator, outputs_and_gradients, device, layout):
    scan, arguments = operator
    views = {name: LAYOUTS[layout](t) for name, t in arguments.items()}
    contiguous = {name: t.clone(memory_format=torch.contiguous_format) for name, t in views.items()}
    assert_same_bits(outputs_and_gradients(scan, views), outputs_and_gradients(scan, contiguous))


@pytest.mark.parametrize("device, layout", on_devices(["transposed"], LAYOUTS))
def test_a_strided_gradient_of_the_output(operator, device, layout):
    scan, arguments = operator
    leaves = {name: t.requires_grad_() for name, t in arguments.items()}
    y = scan(**leaves)
    y = y[0] if isinstance(y, tuple) else y
    dy = LAYOUTS[layout](torch.randn_like(y))
    found, expected = (
        torch.autograd.grad(y, leaves.values(), weight, retain_graph=True) for weight in (dy, dy.contiguous())
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@devices
def test_images_do_not_know_of_each_other(operator, device):
    scan, arguments = operator
    order = torch.tensor([2, 0, 1], device=device)
    found, expected = [], []
    for which in (found, expected):
        leaves = {
            name: (t[order] if which is found and name in ROUNDED else t).requires_grad_()
            for name, t in arguments.items()
        }
        outputs = scan(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        batched = [leaf for name, leaf in leaves.items() if name in ROUNDED]
        which += [*outputs, *torch.autograd.grad([y.square().sum() for y in outputs], batched)]
    for permuted, t in zip(found, expected, strict=True):
        assert torch.equal(permuted, t[order])


def cut_into(monkeypatch, tiles):
    for module in ("triton_1d", "triton_2d"):
        monkeypatch.setattr(f"msv.kernels.{module}.cut", lambda _, most, __: Chunks(-(-most // tiles), tiles))


@devices
@pytest.mark.parametrize("channels, tiles", [(32, 1), (64, None)], ids=str)
def test_blocks_and_chunks_change_nothing_but_rounding(
    monkeypatch, operator, outputs_and_gradients, relative_error, device, channels, tiles
):
    scan, arguments = operator
    expected = outputs_and_gradients(scan, arguments)
    for module in ("triton_1d", "triton_2d"):
        monkeypatch.setattr(f"msv.kernels.{module}.CHANNELS", channels)
    if tiles:
        cut_into(monkeypatch, tiles)
    found = outputs_and_gradients(scan, arguments)
    for part, same in zip(found, expected, strict=True):
        assert all(relative_error(part[name], t) < 1e-6 for name, t in same.items())


@devices
def test_chunks_of_several_tiles_and_sequences_of_several_lengths(monkeypatch, make_2d, assert_exact, device):
    cut_into(monkeypatch, 2)
    routes = (("row", 0), ("colR", 0), ("col", 2), ("rowR", 0))  # two, one and one; no route with the set 1
    scan = partial(selective_scan_2d, routes=routes, carry_state=True)
    assert_exact(scan, to(make_2d(1, 6, 7, 5, 2, 2, 3, FLOAT32, grad=False), device))


@devices
@pytest.mark.parametrize("d_state", [1, 2])
def test_chunks_of_rows_that_begin_anywhere_in_a_sector(monkeypatch, make_1d, assert_exact, device, d_state):
    cut_into(monkeypatch, 2)  # of four classes, two have five tiles and three chunks, the others four and two
    assert_exact(scan_and_last, to(make_1d(1, 64, 62, d_state, dtype=FLOAT32, grad=False), device))


@devices
@pytest.mark.parametrize("name", ["delta", "B"])
def test_inputs_of_several_dtypes(make_1d, outputs_and_gradients, relative_error, device, name):
    arguments = to(make_1d(1, 40, 52, 2, dtype=FLOAT32, grad=False), device)
    arguments[name] = arguments[name].to(BF16)
    scan = partial(scan_and_last, delta_softplus=arguments.pop("delta_softplus"))
    found, expected = (outputs_and_gradients(scan, arguments, backend=b) for b in (BACKEND, "reference"))
    for part, same in zip(found, expected, strict=True):
        assert {key: t.dtype for key, t in part.items()} == {key: t.dtype for key, t in same.items()}
        assert all(relative_error(part[key], t) < 2**-7 for key, t in same.items())


@devices
@pytest.mark.parametrize("tiles", [None, 2], ids=["whole", "in-chunks"])
@pytest.mark.parametrize("rate", [-torch.inf, -3e38])
def test_an_immediate_decay(monkeypatch, make_1d, outputs_and_gradients, device, tiles, rate):
    if tiles:
        cut_into(monkeypatch, tiles)
    arguments = to(make_1d(1, 64, 52, 2, dtype=FLOAT32, grad=False), device)
    arguments["A"] = torch.full_like(arguments["A"], rate)
    arguments["delta"] = arguments["delta"].abs() + 0.1
    found, expected = (outputs_and_gradients(scan_and_last, arguments, backend=b) for b in (BACKEND, "reference"))
    for part, same in zip(found, expected, strict=True):
        for name in part.keys() - {"dA", "ddelta", "ddelta_bias"}:  # where 0 may be multiplied by infinity
            torch.testing.assert_close(part[name], same[name], rtol=1e-5, atol=1e-4)


@devices
def test_growing_states_over_chunks(monkeypatch, device):
    cut_into(monkeypatch, 1)
    u = torch.zeros(1, 1, 64, device=device)
    one = torch.ones(1, 1, 64, device=device)
    y = selective_scan(u, 5 * one, one[0, :, :1], one, one, backend=BACKEND)
    assert torch.equal(y, u)


@devices
def test_the_gradient_of_the_last_state_is_left_alone(device):
    u, delta = torch.randn(2, 1, 20, device=device), torch.rand(2, 1, 20, device=device)
    A = -torch.rand(1, 3, device=device)
    B = torch.randn(2, 3, 20, device=device, requires_grad=True)
    _, last = scan_and_last(u, delta, A, B, B, backend=BACKEND)
    dlast = torch.randn_like(last)
    before = dlast.clone()
    first, second = (torch.autograd.grad(last, B, dlast, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(dlast, before)
    assert torch.equal(first, second)


def test_long_sequences_are_cut_where_there_are_few():
    for programs, tiles, expected in ((768, 196, 1), (6, 4096, True), (6, 8, 1)):
        chunks = cut(programs, tiles, multiprocessors=132)
        assert (chunks.count > 1) == (expected is True)
        assert (chunks.count - 1) * chunks.tiles < tiles <= chunks.count * chunks.tiles


# Registration with torch.


class Calls(TorchDispatchMode):
    """Notes the registered operators that are called below it, and their arguments."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "msv":
            self.found[func] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "device, dtype",
    [
        pytest.param("cpu", FLOAT32, marks=INTERPRETER, id="interpreter-float32"),
        *(pytest.param("cuda", dtype, marks=GPU, id=f"cuda-{dtype}") for dtype in (FLOAT32, BF16)),
    ],
)
def test_opcheck(operator, outputs_and_gradients, device, dtype):
    scan, arguments = operator
    inputs = {name: t.to(dtype) if name in ROUNDED else t for name, t in arguments.items()}
    with Calls() as calls:
        outputs_and_gradients(scan, inputs)
    assert len(calls.found) == 2
    for number, (registered, args) in enumerate(calls.found.items()):
        leaves = [t.detach().requires_grad_(number == 0) if isinstance(t, torch.Tensor) else t for t in args]
        torch.library.opcheck(registered, tuple(leaves))


@devices
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_is_eager(operator, outputs_and_gradients, device):
    scan, arguments = operator
    compiled = torch.compile(scan, fullgraph=True, backend="inductor" if device == "cuda" else "aot_eager")
    assert_same_bits(outputs_and_gradients(compiled, arguments), outputs_and_gradients(scan, arguments))


@devices
@pytest.mark.usefixtures("fresh_compiler")
def test_1d_is_compiled_once_for_all_lengths(make_1d, device):
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    scan = torch.compile(partial(scan_and_last, backend=BACKEND), fullgraph=True, backend=counting, dynamic=True)
    for length in (52, 61, 38):  # of which memory's sectors make different kinds
        arguments = to(make_1d(3, 64, length, 2, dtype=FLOAT32, grad=False), device)
        torch.testing.assert_close(scan(**arguments), scan_and_last(**arguments, backend=BACKEND), rtol=0, atol=0)
    assert len(graphs) == 1


class Scan(torch.nn.Module):
    def __init__(self, scan):
        super().__init__()
        self.scan = scan

    def forward(self, arguments):
        return self.scan(**arguments)


@devices
def test_exported_is_eager(operator, device):
    scan, arguments = operator
    with torch.no_grad():
        program = torch.export.export(Scan(scan), (arguments,))
        found, expected = program.module()(arguments), scan(**arguments)
    if BACKEND == "triton":
        assert any("msv.selective_scan" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("device, dtype", on_devices([BF16], [BF16, FP16]))
@pytest.mark.parametrize("inputs", [FLOAT32, BF16], ids=str)
def test_autocast_does_not_reach_into_the_scan(operator, outputs_and_gradients, device, dtype, inputs):
    scan, arguments = operator
    arguments = {name: t.to(inputs) if name in ROUNDED else t for name, t in arguments.items()}
    expected = outputs_and_gradients(scan, arguments)
    with torch.autocast(device, dtype):  # the backward, too
        assert_same_bits(outputs_and_gradients(scan, arguments), expected)


@on_gpu
def test_cuda_graph(operator, device):
    scan, arguments = operator
    leaves = {name: t.clone().requires_grad_() for name, t in arguments.items()}

    def step():
        outputs = scan(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [*outputs, *torch.autograd.grad([y.square().sum() for y in outputs], leaves.values())]

    assert_graph_replays(step, leaves, arguments)


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current_one(operator, outputs_and_gradients, device):
    scan, arguments = operator
    expected = outputs_and_gradients(scan, arguments)
    with torch.cuda.device(0):
        found = outputs_and_gradients(scan, to(arguments, "cuda:1"))
    assert_same_bits([to(part, "cuda:0") for part in found], expected)


@on_gpu
@pytest.mark.parametrize("dtype", [FLOAT32, BF16], ids=str)
def test_a_new_size_compiles_nothing(monkeypatch, make_1d, make_2d, outputs_and_gradients, device, dtype):
    import triton

    compiled = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **kernel: compiled.append(kernel["repr"]))
    scan = partial(selective_scan_2d, routes=ROUTE_SETS["three-carried"][0], carry_state=True, backend=BACKEND)
    kinds = ((56, 56), (55, 57))  # whole tiles alone, or others too
    for height, width in (*kinds, (64, 48), (23, 41), (9, 8)):
        arguments = make_2d(4, height, width, 100, 1, 6, grad=False)
        outputs_and_gradients(scan, to(arguments, device, dtype))
        assert not compiled or (height, width) in kinds, f"{height}x{width} compiled {compiled}"
        compiled.clear()
    kinds = (3136, 3128, 3132, 3134, 3135)  # whole tiles; a multiple of 8, of 4, of 2; others
    for length in (*kinds, 2304, 588, 943, 72):
        outputs_and_gradients(
            partial(scan_and_last, backend=BACKEND), to(make_1d(4, 100, length, 1, grad=False), device, dtype)
        )
        assert not compiled or length in kinds, f"length {length} compiled {compiled}"
        compiled.clear()


def test_a_cpu_without_the_interpreter_is_refused():
    program = """
import torch
from msv.kernels import selective_scan, selective_scan_2d
t, x, w = torch.ones(1, 1, 2), torch.ones(1, 1, 2, 1), torch.ones(1, 1, 1)
for scan, arguments in (
    (selective_scan, (t, t, -w[0], t, t)),
    (selective_scan_2d, (x, torch.ones(1, 1, 2, 1, 3), w, w[0], w, w[0], (("row", 0),), True)),
):
    try:
        scan(*arguments, backend="triton")
    except ValueError as error:
        print(error)
"""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=100)
    assert done.stdout.count("TRITON_INTERPRET") == 2, done.stdout + done.stderr


# Memory.


def kept_bytes(scan, **arguments):
    """Bytes that autograd keeps beside the arguments, without computing anything."""
    kept = []
    own = {t.untyped_storage()._cdata for t in arguments.values()}

    def keep(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = scan(**arguments)
    assert y.requires_grad
    return sum(t.nbytes for t in kept if t.untyped_storage()._cdata not in own)


@pytest.mark.parametrize("length, channels", [(3136, 192), (2352, 192), (784, 384), (588, 384), (196, 768)], ids=str)
def test_1d_keeps_a_sixteenth(length, channels):
    with FakeTensorMode():
        empty = partial(torch.empty, device="cuda", requires_grad=True)
        u, A, B = empty(128, channels, length), empty(channels, 1), empty(128, 1, 1, length)
        kept = kept_bytes(selective_scan, u=u, delta=torch.empty_like(u), A=A, B=B, C=torch.empty_like(B))
        assert kept <= u.numel() * 4 / 16


@pytest.mark.parametrize("routes", ["row", "col", "four-own", "three-carried"])
@pytest.mark.parametrize("side, channels", [(56, 192), (28, 384), (14, 768)], ids=str)
def test_2d_keeps_a_sixteenth_a_route(routes, side, channels):
    routes, carry_state = ROUTE_SETS[routes]
    sets = 1 + max(weight_set for _, weight_set in routes)
    with FakeTensorMode():
        empty = partial(torch.empty, device="cuda", requires_grad=True)
        kept = kept_bytes(
            partial(selective_scan_2d, routes=routes, carry_state=carry_state),
            x=empty(128, side, side, channels),
            x_dbl=empty(128, side, side, sets, 6 + 2),
            dt_weight=empty(sets, channels, 6),
            dt_bias=empty(sets, channels),
            A_log=empty(sets, channels, 1),
            D_skip=empty(sets, channels),
        )
    assert kept <= len(routes) * 128 * side * side * channels * 4 / 16


def assert_parts_agree(scan, batched, weights, dy, parts):
    """Runs a batch of more than 2^31 elements, and its parts alone; gradients of the weights are the parts' sum."""
    leaves = [t.requires_grad_() for t in (*batched, *weights)]
    y = scan(*leaves)
    assert max(t.numel() for t in (*leaves, y)) > 2**31
    whole = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    sums = [torch.zeros_like(t) for t in weights]
    of_batch = 1 + len(batched)
    for rows in torch.arange(len(dy)).tensor_split(parts):
        rows = slice(int(rows[0]), int(rows[-1]) + 1)
        part = [*(t[rows].detach().requires_grad_() for t in batched), *weights]
        y = scan(*part)
        alone = [y.detach(), *torch.autograd.grad(y, part, dy[rows])]
        for t, expected in zip(whole[:of_batch], alone[:of_batch], strict=True):
            assert (t[rows] - expected).float().norm() <= 2**-8 * expected.float().norm()
        for total, gradient in zip(sums, alone[of_batch:], strict=True):
            total += gradient
    for t, expected in zip(whole[of_batch:], sums, strict=True):
        assert (t - expected).norm() <= 1e-4 * expected.norm()


@on_gpu
@pytest.mark.usefixtures("free_memory")
def test_1d_beyond_2_31_elements(device):
    batch, channels, length = 175, 4096, 3000
    normal = partial(torch.randn, device=device, dtype=BF16)
    A = -1 - torch.rand(channels, 1, device=device)
    batched = [normal(batch, channels, length) for _ in range(2)] + [normal(batch, 1, 1, length) for _ in range(2)]
    assert_parts_agree(
        lambda u, delta, B, C, A: selective_scan(u, delta, A, B, C, delta_softplus=True, backend=BACKEND),
        batched,
        [A],
        normal(batch, channels, length),
        parts=5,
    )


@on_gpu
@pytest.mark.usefixtures("free_memory")
@pytest.mark.parametrize("batch, routes", [(175, "col"), (44, "four-shared")], ids=["map", "output"])
def test_2d_beyond_2_31_elements(device, batch, routes):
    height, width, channels, rank = 50, 60, 4096, 4
    routes, carry_state = ROUTE_SETS[routes]
    normal = partial(torch.randn, device=device)
    weights = [normal(1, channels, rank), normal(1, channels), normal(1, channels, 1).abs(), normal(1, channels)]
    assert_parts_agree(
        partial(selective_scan_2d, routes=routes, carry_state=carry_state, backend=BACKEND),
        [normal(batch, height, width, channels, dtype=BF16), normal(batch, height, width, 1, rank + 2, dtype=BF16)],
        weights,
        normal(batch, len(routes), height, width, channels, dtype=BF16),
        parts=4,
    )
