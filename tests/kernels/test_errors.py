"""What the operators refuse, and in which words."""

import pytest
import torch

from msv.kernels import checks, selective_scan, selective_scan_2d

ONE_ROUTE = (("row", 0),)

BAD_1D = {
    "u-2d": ({"u": (6, 9)}, ValueError, r"u has shape \(6, 9\); expected \(B, D, L\)"),
    "delta": ({"delta": (2, 6, 8)}, ValueError, r"delta has shape \(2, 6, 8\); expected \(B=2, D=6, L=9\)"),
    "A-channels": ({"A": (5, 3)}, ValueError, r"A has shape \(5, 3\); expected \(D=6, N\)"),
    "A-1d": ({"A": (6,)}, ValueError, r"A has shape \(6,\); expected \(D=6, N\)"),
    "B-states": ({"B": (2, 1, 4, 9)}, ValueError, r"B has shape \(2, 1, 4, 9\); expected \(B=2, G, N=3, L=9\)"),
    "B-length": ({"B": (2, 1, 3, 8)}, ValueError, r"B has shape"),
    "B-batch": ({"B": (1, 1, 3, 9)}, ValueError, r"B has shape"),
    "B-2d": ({"B": (3, 9)}, ValueError, r"B has shape"),
    "C-groups": ({"C": (2, 2, 3, 9)}, ValueError, r"C has shape \(2, 2, 3, 9\); expected \(B=2, G=1, N=3, L=9\)"),
    "groups": ({"B": (2, 4, 3, 9), "C": (2, 4, 3, 9)}, ValueError, "4 groups, but u has 6 channels"),
    "no-groups": ({"B": (2, 0, 3, 9), "C": (2, 0, 3, 9)}, ValueError, "0 groups, but u has 6 channels"),
    "D": ({"D": (5,)}, ValueError, r"D has shape \(5,\); expected \(D=6\)"),
    "z": ({"z": (2, 6, 1)}, ValueError, r"z has shape \(2, 6, 1\)"),
    "delta_bias": ({"delta_bias": (1,)}, ValueError, r"delta_bias has shape \(1,\); expected \(D=6\)"),
}


@pytest.mark.parametrize("shapes, error, message", BAD_1D.values(), ids=BAD_1D)
def test_1d_shapes(make_1d, shapes, error, message):
    arguments = make_1d(grad=False)
    arguments.update({name: torch.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(error, match=message):
        selective_scan(**arguments)


BAD_2D = {
    "x-3d": ({"x": (3, 4, 5)}, r"x has shape \(3, 4, 5\); expected \(B, H, W, D\)"),
    "x-channels-first": ({"x": (2, 5, 3, 4)}, r"dt_weight has shape \(1, 5, 2\); expected \(S, D=4, R\)"),
    "x_dbl-width": ({"x_dbl": (2, 3, 4, 1, 7)}, r"expected \(B=2, H=3, W=4, S=1, R \+ 2N=8\)"),
    "x_dbl-sets": ({"x_dbl": (2, 3, 4, 2, 8)}, r"x_dbl has shape"),
    "x_dbl-map": ({"x_dbl": (2, 4, 3, 1, 8)}, r"x_dbl has shape"),
    "dt_weight": ({"dt_weight": (5, 2)}, r"dt_weight has shape \(5, 2\); expected \(S, D=5, R\)"),
    "dt_bias": ({"dt_bias": (5,)}, r"dt_bias has shape \(5,\); expected \(S=1, D=5\)"),
    "A_log": ({"A_log": (5, 3)}, r"A_log has shape \(5, 3\); expected \(S=1, D=5, N\)"),
    "D_skip": ({"D_skip": (2, 5)}, r"D_skip has shape \(2, 5\); expected \(S=1, D=5\)"),
}


@pytest.mark.parametrize("shapes, message", BAD_2D.values(), ids=BAD_2D)
def test_2d_shapes(make_2d, shapes, message):
    arguments = make_2d(grad=False)
    arguments.update({name: torch.zeros(shape) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match=message):
        selective_scan_2d(**arguments, routes=ONE_ROUTE, carry_state=True)


@pytest.mark.parametrize(
    "routes, message",
    [
        ((), "routes is empty"),
        ((("diagonal", 0),), "route 'diagonal' is unknown; expected one of row, col, rowR, colR"),
        ((("row", 0), ("col", 1)), "route 'col' names weight set 1, but there are 1"),
        ((("row", -1),), "route 'row' names weight set -1"),
    ],
    ids=["empty", "unknown", "no-such-set", "negative-set"],
)
def test_routes(make_2d, routes, message):
    with pytest.raises(ValueError, match=message):
        selective_scan_2d(**make_2d(), routes=routes, carry_state=True)


def test_dtypes(make_1d, make_2d):
    arguments = make_1d(grad=False)
    with pytest.raises(TypeError, match=r"A is torch\.complex128; expected real A only"):
        selective_scan(**{**arguments, "A": arguments["A"].to(torch.complex128)})
    for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"):
        with pytest.raises(TypeError, match=f"^{name} is torch.int64; expected a floating point dtype"):
            selective_scan(**{**arguments, name: arguments[name].long()})
    arguments = make_2d(grad=False)
    for name in arguments:
        with pytest.raises(TypeError, match=f"^{name} is torch.int64; expected a floating point dtype"):
            selective_scan_2d(**{**arguments, name: arguments[name].long()}, routes=ONE_ROUTE, carry_state=True)


def test_backends(monkeypatch, make_1d, make_2d):
    def scan_1d(backend, dtype=torch.float32):
        return selective_scan(**make_1d(dtype=dtype), backend=backend)

    def scan_2d(backend, dtype=torch.float32):
        return selective_scan_2d(**make_2d(dtype=dtype), routes=ONE_ROUTE, carry_state=True, backend=backend)

    for scan in (scan_1d, scan_2d):
        with pytest.raises(ValueError, match="backend 'cuda' is unknown; expected one of auto, triton, parallel, ref"):
            scan("cuda")
        monkeypatch.setattr(checks, "HAS_TRITON", True)
        monkeypatch.setattr(checks, "INTERPRETED", True)
        with pytest.raises(ValueError, match=r"'triton' keeps states in float32, but an input is float64; use 'auto'"):
            scan("triton", torch.float64)
        monkeypatch.setattr(checks, "INTERPRETED", False)
        with pytest.raises(ValueError, match=r"'triton' needs a GPU, .* on cpu; use 'auto' or .*TRITON_INTERPRET=1"):
            scan("triton")
        monkeypatch.setattr(checks, "HAS_TRITON", False)
        with pytest.raises(ValueError, match=r"'triton' needs the package triton.*install it, or use 'auto'"):
            scan("triton")
