"""Without gradients the operators work in place where they can: results stay, and so do their arguments."""

import itertools

import pytest
import torch

from msv.kernels import depthwise_conv, gate, merge_routes, selective_scan_2d


def assert_same_without_gradients(operator, *tensors):
    """`operator` of leaves with gradients, and of the same without, which are then what they were."""
    expected = operator(*(t.clone().requires_grad_() for t in tensors))
    given = [t.clone() for t in tensors]
    with torch.inference_mode():
        found = operator(*given)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
    assert all(torch.equal(one, two) for one, two in zip(given, tensors, strict=True))


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "silu", "gelu"])
def test_depthwise(activation, residual):
    tensors = torch.randn(2, 5, 6, 4), torch.randn(4, 1, 3, 3), torch.randn(4)
    assert_same_without_gradients(
        lambda *t: depthwise_conv(*t, activation=activation, residual=residual, backend="parallel"), *tensors
    )


@pytest.mark.parametrize("full, half", [(1, 3), (2, 2), (4, 0), (1, 0), (0, 1)])
def test_merge(full, half):
    shapes = ((2, full, 4, 6, 5), (2, half, 2, 3, 5))
    tensors = [torch.randn(shape) for shape in shapes if shape[1]]

    def merged(weight, bias, *routes):
        y_full, y_half = routes[0] if full else None, routes[-1] if half else None
        return merge_routes(y_full, y_half, weight, bias, weight, bias, (4, 6), backend="parallel")[0]

    assert_same_without_gradients(merged, torch.randn(5), torch.randn(5), *tensors)


@pytest.mark.parametrize("dtypes", list(itertools.product((torch.float32, torch.bfloat16), repeat=2)), ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_gate(scaled, dtypes):
    m, z = (torch.randn(2, 3, 4, 5, dtype=dtype) for dtype in dtypes)
    if m.dtype == z.dtype == torch.bfloat16:
        m, z = m.double(), z.double()  # rounds in another order; the types are what counts here
    scale = [torch.rand(2, 5, dtype=m.dtype)] * scaled
    assert_same_without_gradients(lambda m, z, *s: gate(m, s[0] if s else None, z, backend="parallel"), m, z, *scale)


@pytest.mark.parametrize("d_state", [1, 3])
def test_scan(make_2d, d_state):
    tensors = make_2d(d_state=d_state, dtype=torch.float32, grad=False)
    routes = (("row", 0), ("colR", 0))
    assert_same_without_gradients(
        lambda *t: selective_scan_2d(*t, routes, True, backend="parallel"), *(t.clone() for t in tensors.values())
    )
