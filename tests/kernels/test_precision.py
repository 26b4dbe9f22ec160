"""Rounding, saturation and NaN: float32 and half precision against the reference in float64."""

from functools import partial

import pytest
import torch

from msv.kernels import selective_scan, selective_scan_2d

BACKENDS = ("reference", "parallel", "auto")
scan_1d = partial(selective_scan, return_last_state=True)
scan_2d = partial(
    selective_scan_2d, routes=(("row", 0), ("rowR", 1), ("col", 1), ("colR", 1), ("col", 2)), carry_state=True
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(2, 6, 300, 8, 2), (1, 7, 785, 1, 1), (70, 48, 9, 8, 1)], ids=str)
def test_1d_in_float32(make_1d, outputs_and_gradients, assert_agree, size, backend):
    arguments = make_1d(*size, dtype=torch.float32)
    expected = outputs_and_gradients(scan_1d, arguments, torch.float64, backend="reference")
    found = outputs_and_gradients(scan_1d, arguments, backend=backend)
    assert all(t.dtype == torch.float32 for part in found for t in part.values())
    assert_agree(found, expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(2, 7, 9, 6, 8, 2), (1, 14, 15, 5, 1, 3), (70, 3, 2, 48, 8, 3)], ids=str)
def test_2d_in_float32(make_2d, outputs_and_gradients, assert_agree, size, backend):
    arguments = make_2d(*size, sets=3, dtype=torch.float32)
    expected = outputs_and_gradients(scan_2d, arguments, torch.float64, backend="reference")
    found = outputs_and_gradients(scan_2d, arguments, backend=backend)
    assert all(t.dtype == torch.float32 for part in found for t in part.values())
    assert_agree(found, expected, torch.float32)


def assert_one_rounding(found, expected, accumulated=1e-5):
    """Each number within half a unit in the last place of its dtype, beyond what float32 work in between leaves."""
    for name, exact in expected.items():
        got = found[name].double()
        info = torch.finfo(found[name].dtype)
        allowed = info.eps / 2 * exact.abs() + info.smallest_normal * info.eps / 2 + accumulated * exact.abs().max()
        excess = ((got - exact).abs() - allowed).max().item()
        assert excess <= 0, f"{name} is off by {excess} more than one rounding"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("d_state", [1, 8], ids="N{}".format)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_1d_in_half_precision_rounds_once(make_1d, outputs_and_gradients, dtype, d_state, backend):
    arguments = make_1d(length=65, d_state=d_state, groups=2, dtype=dtype)
    expected = outputs_and_gradients(scan_1d, arguments, torch.float64, backend="reference")
    (outputs, gradients) = outputs_and_gradients(scan_1d, arguments, backend=backend)
    assert outputs["y"].dtype == dtype
    assert outputs["last"].dtype == torch.float32
    assert all(gradient.dtype == dtype for gradient in gradients.values())
    assert_one_rounding(outputs, expected[0])
    assert_one_rounding(gradients, expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", ["float32-weights", "same-weights"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_2d_in_half_precision_rounds_once(make_2d, outputs_and_gradients, dtype, weights, backend):
    arguments = make_2d(height=5, width=7, sets=3, dtype=dtype)
    if weights == "float32-weights":  # as autocast has it
        arguments = {k: v if k.startswith("x") else v.float() for k, v in arguments.items()}
    expected = outputs_and_gradients(scan_2d, arguments, torch.float64, backend="reference")
    outputs, gradients = outputs_and_gradients(scan_2d, arguments, backend=backend)
    assert outputs["y"].dtype == dtype
    assert all(gradients[f"d{name}"].dtype == t.dtype for name, t in arguments.items())
    assert_one_rounding(outputs, expected[0])
    if backend != "reference":  # its autograd rounds once a sequence where sequences share half-precision weights
        assert_one_rounding(gradients, expected[1])


SATURATED = {
    "delta-closed": {"delta": -1e4},
    "delta-open": {"delta": 1e4},
    "A-near-0": {"A": -1e-30},
    "A-zero": {"A": 0.0},
    "A-very-negative": {"A": -1e30},
    "delta-open-A-very-negative": {"delta": 1e4, "A": -1e30},
    "delta-closed-A-very-negative": {"delta": -1e4, "A": -1e30},
    "delta-open-A-near-0": {"delta": 1e4, "A": -1e-30},
    "u-zero": {"u": 0.0},
    "B-zero": {"B": 0.0},
    "all-zero": {"u": 0.0, "delta": 0.0, "B": 0.0, "C": 0.0},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("where", ["everywhere", "here-and-there"])
@pytest.mark.parametrize("values", SATURATED.values(), ids=SATURATED)
def test_1d_saturated(make_1d, outputs_and_gradients, assert_agree, values, where, backend):
    arguments = make_1d(length=130, d_state=2, dtype=torch.float32, grad=False)
    for name, value in values.items():
        chosen = torch.ones_like(arguments[name]) if where == "everywhere" else torch.rand_like(arguments[name]) < 0.2
        arguments[name] = torch.where(chosen.bool(), value, arguments[name])
    expected = outputs_and_gradients(scan_1d, arguments, torch.float64, backend="reference")
    found = outputs_and_gradients(scan_1d, arguments, backend=backend)
    assert all(t.isfinite().all() for part in expected for t in part.values())
    assert_agree(found, expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_1d_closed_and_open_by_hand(make_1d, backend):
    arguments = make_1d(length=70, d_state=2, grad=False)
    del arguments["z"], arguments["delta_bias"]
    u, A, B, C, D = (arguments[name] for name in ("u", "A", "B", "C", "D"))

    closed = {**arguments, "delta": torch.full_like(u, -1e4)}  # nothing enters, nothing decays
    y, last = scan_1d(**closed, backend=backend)
    assert not last.any()
    torch.testing.assert_close(y, D[:, None] * u)

    opened = {**arguments, "delta": torch.full_like(u, 1e4)}  # nothing is remembered
    y, last = scan_1d(**opened, backend=backend)
    entering = 1e4 * u[:, :, None] * B.mT.mT  # (B, D, N, L), one group
    torch.testing.assert_close(y, (C * entering).sum(2) + D[:, None] * u)
    torch.testing.assert_close(last, entering[..., -1])
    assert A.max() < 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("raw", [-1e4, 1e4], ids=["closed", "open"])
@pytest.mark.parametrize("A_log", [-70.0, 0.0, 70.0], ids="A_log{:g}".format)
def test_2d_saturated(make_2d, outputs_and_gradients, assert_agree, raw, A_log, backend):
    arguments = make_2d(height=9, width=6, sets=3, dtype=torch.float32, grad=False)
    arguments["A_log"][:2] = A_log
    arguments["dt_bias"][:, ::2] = raw
    expected = outputs_and_gradients(scan_2d, arguments, torch.float64, backend="reference")
    found = outputs_and_gradients(scan_2d, arguments, backend=backend)
    assert all(t.isfinite().all() for part in found for t in part.values())
    assert_agree(found, expected, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_1d_growing_states(make_1d, outputs_and_gradients, assert_agree, backend):
    """A positive A, or a negative step, makes the state grow; while it fits its dtype it is what it should be."""
    arguments = make_1d(length=100, options=False, grad=False)
    arguments["A"] = arguments["A"].abs()
    expected = outputs_and_gradients(scan_1d, arguments, backend="reference")
    assert_agree(outputs_and_gradients(scan_1d, arguments, backend=backend), expected, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("t", [0, 1, 50, 99], ids="t{}".format)
def test_1d_nan_in_u_stays_behind_the_recurrence(make_1d, t, backend):
    arguments = make_1d(length=100, groups=2, dtype=torch.float32, grad=False)
    arguments["u"][1, 4, t] = torch.nan
    y, last = scan_1d(**arguments, backend=backend)
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[1, 4, t:] = True
    assert torch.equal(y.isnan(), expected)
    assert last[1, 4].isnan().all()
    assert last.isnan().sum() == last.shape[-1]


@pytest.mark.parametrize("backend", ("parallel", "auto"))
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_1d_nan_reaches_what_it_reaches_in_the_reference(make_1d, outputs_and_gradients, name, backend):
    arguments = make_1d(length=100, groups=2, dtype=torch.float32, grad=False)
    arguments[name].view(-1)[arguments[name].numel() * 2 // 3] = torch.nan
    for found, expected in zip(
        outputs_and_gradients(scan_1d, arguments, backend=backend),
        outputs_and_gradients(scan_1d, arguments, backend="reference"),
        strict=True,
    ):
        for key, t in expected.items():
            assert torch.equal(found[key].isnan(), t.isnan()), key


@pytest.mark.parametrize("backend", BACKENDS)
def test_2d_nan_in_x_stays_behind_the_recurrence(make_2d, backend):
    arguments = make_2d(height=6, width=7, dtype=torch.float32, grad=False)
    arguments["x"][1, 2, 3, 4] = torch.nan
    routes = (("row", 0), ("col", 0), ("rowR", 0), ("colR", 0))
    y = selective_scan_2d(**arguments, routes=routes, carry_state=False, backend=backend)
    expected = torch.zeros(2, 4, 6, 7, 5, dtype=torch.bool)
    expected[1, 0, 3:, :, 4] = expected[1, 0, 2, 3:, 4] = True
    expected[1, 1, :, 4:, 4] = expected[1, 1, 2:, 3, 4] = True
    expected[1, 2, :2, :, 4] = expected[1, 2, 2, :4, 4] = True
    expected[1, 3, :, :3, 4] = expected[1, 3, :3, 3, 4] = True
    assert torch.equal(y.isnan(), expected)

    carried = selective_scan_2d(**arguments, routes=routes, carry_state=True, backend=backend)
    expected[1, 1:, :, :, 4] = True  # every later route goes on from the state that row left
    assert torch.equal(carried.isnan(), expected)
