"""The reference against loops written from the paper's equations, one number at a time."""

import itertools
import math

import numpy as np
import pytest
import torch

from msv.kernels import selective_scan, selective_scan_2d


def softplus(x):
    return np.logaddexp(0.0, x)


def loop_1d(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """Eqs. 2-4 as they are printed; B and C of shape (B, G, N, L)."""
    batch, channels, length = u.shape
    d_state, channels_a_group = A.shape[1], channels // B.shape[1]
    y, h = np.zeros(u.shape), np.zeros((batch, channels, d_state))
    for b, d, t in itertools.product(range(batch), range(channels), range(length)):
        step, group = delta[b, d, t], d // channels_a_group
        if delta_bias is not None:
            step = step + delta_bias[d]
        if delta_softplus:
            step = softplus(step)
        for n in range(d_state):
            h[b, d, n] = math.exp(step * A[d, n]) * h[b, d, n] + step * B[b, group, n, t] * u[b, d, t]
            y[b, d, t] += C[b, group, n, t] * h[b, d, n]
        if D is not None:
            y[b, d, t] += D[d] * u[b, d, t]
        if z is not None:
            y[b, d, t] *= z[b, d, t] / (1 + math.exp(-z[b, d, t]))
    return y, h


def cells(route, height, width):
    """The cells that a route visits, as nested loops."""
    if route == "row":
        return [(i, j) for i in range(height) for j in range(width)]
    if route == "col":
        return [(i, j) for j in range(width) for i in range(height)]
    if route == "rowR":
        return [(i, j) for i in range(height - 1, -1, -1) for j in range(width - 1, -1, -1)]
    return [(i, j) for j in range(width - 1, -1, -1) for i in range(height - 1, -1, -1)]


def loop_2d(x, x_dbl, dt_weight, dt_bias, A_log, D_skip, routes, carry_state):
    """Eqs. 6-10: the map walked on each route, the state kept over a seam between equal weight sets if carried."""
    batch, height, width, channels = x.shape
    rank, d_state = dt_weight.shape[2], A_log.shape[2]
    y = np.full((batch, len(routes), height, width, channels), np.nan)
    for b, d in itertools.product(range(batch), range(channels)):
        for k, (route, s) in enumerate(routes):
            if k == 0 or not carry_state or routes[k - 1][1] != s:
                h = np.zeros(d_state)
            for i, j in cells(route, height, width):
                p = x_dbl[b, i, j, s]
                step = softplus(sum(p[r] * dt_weight[s, d, r] for r in range(rank)) + dt_bias[s, d])
                y[b, k, i, j, d] = D_skip[s, d] * x[b, i, j, d]
                for n in range(d_state):
                    decay = math.exp(-step * math.exp(A_log[s, d, n]))
                    h[n] = decay * h[n] + step * p[rank + n] * x[b, i, j, d]
                    y[b, k, i, j, d] += p[rank + d_state + n] * h[n]
    return y


def as_numpy(arguments):
    return {k: v.detach().numpy() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


OPTIONS = ("D", "z", "delta_bias")


@pytest.mark.parametrize("d_state", [1, 3], ids="N{}".format)
@pytest.mark.parametrize("groups", [1, 2, 3], ids="G{}".format)
@pytest.mark.parametrize(
    "options", [(), ("D",), ("z",), ("delta_bias",), ("softplus",), (*OPTIONS, "softplus")], ids="+".join
)
def test_1d_is_the_equations(make_1d, options, groups, d_state):
    arguments = make_1d(batch=2, channels=6, length=5, d_state=d_state, groups=groups, grad=False)
    arguments["delta_softplus"] = "softplus" in options
    for name in OPTIONS:
        if name not in options:
            del arguments[name]
    y, last = selective_scan(**arguments, return_last_state=True, backend="reference")
    expected_y, expected_last = loop_1d(**as_numpy(arguments))
    np.testing.assert_allclose(y, expected_y, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(last, expected_last, rtol=1e-12, atol=1e-13)
    assert torch.equal(selective_scan(**arguments, backend="reference"), y)


def test_1d_takes_one_group_without_its_dimension(make_1d):
    arguments = make_1d(grad=False)
    expected = selective_scan(**arguments, backend="reference")
    arguments["B"] = arguments["B"][:, 0]
    assert torch.equal(selective_scan(**arguments, backend="reference"), expected)
    arguments["C"] = arguments["C"][:, 0]
    assert torch.equal(selective_scan(**arguments, backend="reference"), expected)


SPLITS = {
    "4/0": (("row", 0), ("col", 1), ("rowR", 2), ("colR", 3)),
    "1/3-half": (("rowR", 0), ("col", 0), ("colR", 0)),
    "2/2-half": (("rowR", 0), ("colR", 0)),
    "3/1-full": (("row", 0), ("col", 1), ("rowR", 2)),
    "sets-0011": (("row", 0), ("colR", 0), ("col", 1), ("rowR", 1)),
    "sets-0100": (("row", 0), ("colR", 1), ("col", 0), ("rowR", 0)),
}


@pytest.mark.parametrize("carry_state", [True, False], ids=["carry", "reset"])
@pytest.mark.parametrize("routes", SPLITS.values(), ids=SPLITS)
def test_2d_is_the_equations(make_2d, routes, carry_state):
    sets = 1 + max(weight_set for _, weight_set in routes)
    arguments = make_2d(height=3, width=4, channels=3, d_state=2, sets=sets, grad=False)
    y = selective_scan_2d(**arguments, routes=routes, carry_state=carry_state, backend="reference")
    expected = loop_2d(**as_numpy(arguments), routes=routes, carry_state=carry_state)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [(1, 1), (1, 5), (5, 1), (3, 2)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("route", ["row", "col", "rowR", "colR"])
def test_2d_single_routes_on_maps_of_any_shape(make_2d, route, size):
    arguments = make_2d(height=size[0], width=size[1], channels=2, d_state=1, rank=1, grad=False)
    y = selective_scan_2d(**arguments, routes=((route, 0),), carry_state=False, backend="reference")
    expected = loop_2d(**as_numpy(arguments), routes=((route, 0),), carry_state=False)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("d_state", [1, 2], ids="N{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_states_are_float32_whatever_the_inputs_are(make_1d, make_2d, dtype, d_state):
    arguments = make_1d(d_state=d_state, dtype=dtype, grad=False)
    y, last = selective_scan(**arguments, return_last_state=True, backend="reference")
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    y = selective_scan_2d(
        **make_2d(d_state=d_state, dtype=dtype), routes=(("row", 0),), carry_state=True, backend="reference"
    )
    assert y.dtype == dtype
