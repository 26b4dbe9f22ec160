"""The scan that exports hold: one export of it for any batch and map, against the reference."""

import pytest
import torch
from torch.export import Dim

from msv.kernels import selective_scan_2d

ROUTE_SETS = {
    "4/0": (("row", 0), ("col", 1), ("rowR", 2), ("colR", 3)),
    "1/3-half": (("rowR", 0), ("col", 0), ("colR", 0)),
    "unlike": (("row", 1), ("colR", 0), ("col", 0), ("rowR", 2)),
}
SIZES = ((2, 2, 3), (1, 2, 9), (3, 8, 2), (2, 13, 11))


class Scan(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options = options

    def forward(self, x, x_dbl, dt_weight, dt_bias, A_log, D_skip):
        return selective_scan_2d(x, x_dbl, dt_weight, dt_bias, A_log, D_skip, **self.options)


def export(arguments, **options):
    free = {0: Dim("batch"), 1: Dim("height", min=2), 2: Dim("width", min=2)}
    scan = Scan(**options, backend="parallel")
    return torch.export.export(scan, tuple(arguments.values()), dynamic_shapes=(free, free, *[None] * 4)).module()


@pytest.mark.parametrize("carry_state", [True, False], ids=["carry", "reset"])
@pytest.mark.parametrize("routes", ROUTE_SETS.values(), ids=ROUTE_SETS)
def test_one_export_serves_every_map(make_2d, routes, carry_state):
    options = {"routes": routes, "carry_state": carry_state}
    exported = export(make_2d(height=4, width=3, sets=4, grad=False), **options)
    for size in SIZES:
        arguments = make_2d(*size, sets=4, grad=False)
        expected = selective_scan_2d(**arguments, **options, backend="reference")
        torch.testing.assert_close(exported(*arguments.values()), expected, rtol=1e-11, atol=1e-11)


def test_bf16_keeps_states_in_float32(make_2d):
    options = {"routes": ROUTE_SETS["4/0"], "carry_state": True}
    arguments = make_2d(height=9, width=8, sets=4, dtype=torch.bfloat16, grad=False)
    found = export(arguments, **options)(*arguments.values())
    assert found.dtype == torch.bfloat16
    expected = selective_scan_2d(**arguments, **options, backend="reference")
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
