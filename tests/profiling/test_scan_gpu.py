from dataclasses import replace

import pytest
import torch

from msv.kept import ENVIRONMENT
from msv.kernels import selective_scan, selective_scan_2d
from msv.profiling import scan_gpu
from msv.profiling.scan_gpu import QUICK, measure_case
from msv.profiling.scan_gpu_bars import verdicts
from msv.profiling.scan_gpu_cases import BF16, CASES, FP32, SS2D, Anchor, MapCase, SequenceCase, cases
from msv.profiling.scan_rivals import CrossScanned, cross_merge, cross_scan, rival_call

CPU = torch.device("cpu")
SEQUENCE = SequenceCase(2, 3, 11, 4, FP32, batch=2)
MAP = MapCase(3, 4, 5, 2, 3, SS2D, FP32, batch=2)


class FakeRival:
    """What a CUDA kernel gives, made with the parallel scan."""

    name, version = "fake", "1.0"

    def forward(self, u, delta, A, B, C, D, delta_bias):
        return selective_scan(u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True, backend="parallel")

    def forward_backward(self, *arguments):
        *tensors, dy = arguments
        leaves = [t.detach().requires_grad_() for t in tensors]
        y = self.forward(*leaves)
        return y.detach(), *torch.autograd.grad(y, leaves, dy)


def test_names_are_unique():
    for shapes in (CASES, cases(quick=True)):
        names = [case.name for case in shapes]
        assert len(set(names)) == len(names)


def test_all_anchors_are_among_the_cases():
    """The table of the CUDA kernels' times: floor, forward, forward plus backward."""
    found = {
        (case.groups, case.channels, case.length, case.d_state, case.dtype): case.anchor
        for case in CASES
        if isinstance(case, SequenceCase) and case.anchor != Anchor()
    }
    assert len(found) == 13
    assert found[1, 192, 3136, 1, FP32] == Anchor(0.307, 0.574, 1.91)
    assert found[4, 1536, 49, 16, BF16] == Anchor(0.077, 3.37, 11.2)


@pytest.mark.parametrize("case", [case for case in CASES if case.anchor.floor], ids=lambda case: case.name)
def test_floors_agree_with_the_anchors(case):
    assert case.floor_bytes / 3e12 == pytest.approx(1e-3 * case.anchor.floor, rel=0.04)


@pytest.mark.parametrize(
    "case", [SEQUENCE, MAP, replace(MAP, routes=(("col", 0), ("rowR", 0)))], ids=lambda case: case.name
)
def test_calls(case):
    call = case.call(CPU, "parallel")
    y, *gradients = call.forward_backward()
    assert y.shape == call.upstream.shape
    assert torch.equal(y, call.forward())
    assert [g.shape for g in gradients] == [t.shape for t in call.tensors]
    read = call.tensors[:2] if case.operator == "2d" else [call.tensors[i] for i in (0, 1, 3, 4)]
    assert case.floor_bytes == sum(t.nbytes for t in (*read, y))
    meta = [t.detach().to("meta") for t in call.tensors]
    flat = case.operator == "1d"
    channels, length = meta[0].shape[1:] if flat else (case.channels, case.height * case.width)
    sequences = 1 if flat else len(case.routes)
    # The kernels keep a state of every channel behind each tile of 16 steps but a sequence's last; in 1-D at most that.
    states = case.batch * case.d_state * channels
    expected = states * length // 16 if flat else states * sequences * (-(-length // 16) - 1)
    assert case.saved(meta, triton=True).numel() == expected
    assert case.saved(meta, triton=False).numel() > expected


def test_cross_scan_and_merge():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    routes = cross_scan(x)[0, :, 0].tolist()
    assert routes == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    assert torch.equal(cross_merge(cross_scan(x), 2, 3), 4 * x.flatten(2))


def test_the_rival_s_way_over_a_map_is_ours():
    call = MAP.call(CPU, "reference")
    x, x_dbl, dt_weight, dt_bias, A_log, D_skip = (t.detach().double().requires_grad_() for t in call.tensors)
    dmerged = call.upstream[:, 0].double()
    ours = selective_scan_2d(x, x_dbl, dt_weight, dt_bias, A_log, D_skip, SS2D, False, backend="reference").sum(1)
    wanted = torch.autograd.grad(ours, (x, x_dbl, dt_weight, dt_bias, A_log, D_skip), dmerged)
    with torch.no_grad():
        rival = CrossScanned(FakeRival(), dmerged, x, x_dbl, dt_weight, dt_bias, A_log, D_skip)
        merged = rival.forward()
    torch.testing.assert_close(merged.unflatten(2, (3, 4)).permute(0, 2, 3, 1), ours)
    rival = CrossScanned(FakeRival(), dmerged, *(t.detach() for t in (x, x_dbl, dt_weight, dt_bias, A_log, D_skip)))
    y, dx, dx_dbl, dweight, dbias, dA, dskip = rival.forward_backward()
    assert torch.equal(y, merged)
    # Each route's part of x_dbl put back on the map; A = -exp(A_log).
    back = [cross_merge(dx_dbl[:, [k] * 4] * (torch.arange(4) == k).view(1, 4, 1, 1), 3, 4) for k in range(4)]
    found = (
        dx.unflatten(2, (3, 4)).permute(0, 2, 3, 1),
        torch.stack(back, dim=1).unflatten(3, (3, 4)).permute(0, 3, 4, 1, 2),
        dweight,
        dbias.view(4, 5),
        (dA * rival.A).view(4, 5, 3),
        dskip.view(4, 5),
    )
    for gradient, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_other_routes_have_no_rival():
    case = replace(MAP, routes=(("row", 0),))
    call = case.call(CPU, "parallel")
    assert rival_call(FakeRival(), case, call.tensors, call.upstream) is None


def test_a_row_beside_its_rival_and_the_parallel_scan():
    # "auto" is the parallel scan here, but stands for ours.
    single = replace(MAP, routes=(("row", 0),))
    one, four, row = (measure_case(case, CPU, "auto", FakeRival(), effort=QUICK) for case in (SEQUENCE, MAP, single))
    assert (one["rival"], four["rival"]) == ("fake 1.0", "cross-scan, CUDA scan, cross-merge: fake 1.0")
    for found in (one, four):
        assert found["rival_difference"] < 1e-5
        assert found["rival_note"] is None
        assert found["forward_speedup"] == pytest.approx(found["rival_forward_ms"] / found["forward_ms"])
    assert "rival" not in row and "rival_forward_ms" not in row
    assert row["rival_note"].startswith("cross-scan knows the routes")
    for found in (one, four, row):
        assert found["parallel_forward_backward_ms"] > 0
        assert found["eager_forward_backward_ms"] > 0
        assert found["io_bytes"] < found["peak_bytes"]
        assert (found["repeats"], found["method"], found["input_sets"]) == (1, "calls", 1)
    assert "copy_x_ms" not in one and row["copy_x_ms"] > 0
    kept = dict.fromkeys(scan_gpu.COLUMNS, "") | single.columns | {"rival_note": row["rival_note"]}
    assert scan_gpu.notes([kept]) == [f"rival: {single.name}: {row['rival_note']}"]


def test_a_rival_that_fails_leaves_ours():
    class Failing(FakeRival):
        def forward(self, *tensors):
            raise RuntimeError("built for float64 only\nat line 3")

    row = measure_case(SEQUENCE, CPU, "auto", Failing(), parallel=False, effort=QUICK)
    assert row["forward_ms"] > 0 and not {"rival", "parallel_forward_ms"} & row.keys()
    assert row["rival_note"] == "it fails: RuntimeError: built for float64 only at line 3"


def test_the_parallel_scan_is_not_always_timed(monkeypatch):
    monkeypatch.setattr(scan_gpu, "PARALLEL_SECONDS", 0.0)
    slow = measure_case(SEQUENCE, CPU, "auto", effort=QUICK)
    assert slow["parallel_forward_ms"] > 0 and "parallel_forward_backward_ms" not in slow
    assert slow["parallel_note"].startswith("the backward not timed: the forward alone takes")
    monkeypatch.setattr(scan_gpu, "PARALLEL_BYTES", 1.0)
    large = measure_case(SEQUENCE, CPU, "auto", effort=QUICK)
    assert "parallel_forward_ms" not in large
    assert large["parallel_note"].startswith("not timed: it needs some")


def measured(case, forward, both, **columns):
    """A row as the command keeps it, with these times."""
    row = {"device": "NVIDIA H100 80GB HBM3", "saved_ratio": 0.05, "status": "done"}
    row |= {f"anchor_{name}_ms": value for name, value in vars(case.anchor).items()}
    row |= {"forward_ms": forward, "forward_backward_ms": both, **columns}
    told = {name: "" if value is None else str(value) for name, value in row.items()}
    return dict.fromkeys((*scan_gpu.COLUMNS, *ENVIRONMENT), "") | case.columns | told


def find(name):
    (case,) = (case for case in CASES if case.name == name)
    return case


def test_verdicts_by_the_rival_or_else_the_anchor():
    case = find("1d B128 K4 D192 L3136 N8 bf16")
    rival = {"rival": "mamba_ssm 2", "rival_forward_ms": 6.0, "rival_forward_backward_ms": 28.0}
    assert verdicts([measured(case, 2.0, 20.0, **rival)]) == [
        "met: 1d B128 K4 D192 L3136 N8 bf16: forward 3.00 times as fast as mamba_ssm 2 (at least 2)",
        "MISSED: 1d B128 K4 D192 L3136 N8 bf16: forward plus backward 1.40 times as fast as mamba_ssm 2 (at least 2)",
    ]
    anchor = "the anchor, measured before on an H100 80GB HBM3"
    case = find("1d B128 K1 D192 L3136 N1 bf16")
    assert verdicts([measured(case, 0.354, 1.02, saved_ratio=0.07)]) == [
        f"met: {case.name}: forward 1.50 times as fast as {anchor} (at least 1.5)",
        f"MISSED: {case.name}: forward plus backward 1.79 times as fast as {anchor} (at least 1.8)",
        f"MISSED: 1 rows of N=1, the most in {case.name}: 0.0700 of the input in float32 saved (at most 1/16)",
    ]
    assert verdicts([measured(find("1d B128 K4 D192 L3136 N8 fp32"), 1.0, 1.0)]) == []


def test_verdicts_of_the_fused_operator():
    rows = [
        measured(find("2d row B128 D192 56x56 N1 bf16"), 0.2, 0.9, forward_over_copy_x=2.0),
        measured(find("2d col B128 D192 56x56 N1 bf16"), 0.3, 1.0),
        measured(find("2d col+rowR+colR B128 D192 28x28 N1 bf16"), 0.1, 0.9),
        measured(find("2d SS2D B128 D192 56x56 N16 bf16"), 4.0, 12.0, device="NVIDIA H200"),
    ]
    assert [line.split(": ", 1)[0] + ": " + line.split(": ", 2)[2] for line in verdicts(rows)] == [
        "met: forward 2.00 times a copy of x (at most 2.5)",
        "met: forward 0.200 ms (under 0.26 ms)",
        "MISSED: forward plus backward 0.900 ms (under 0.8 ms)",
        "MISSED: forward 1.50 times that of 2d row B128 D192 56x56 N1 bf16 (at most 1.4)",
        "met: forward plus backward 1.11 times that of 2d row B128 D192 56x56 N1 bf16 (at most 1.4)",
        "met: forward 0.50 times that of 2d row B128 D192 56x56 N1 bf16 (at most 1)",
        "met: forward plus backward 1.00 times that of 2d row B128 D192 56x56 N1 bf16 (at most 1)",
        "met: forward plus backward 12.000 ms (under 15 ms, on an H100)",
        "met: 0.0500 of the input in float32 saved (at most 1/16)",
    ]


def test_what_failed_is_missed():
    failed = {"status": "failed", "error": "RuntimeError: out of resource"}
    row = measured(find("2d row B128 D192 56x56 N1 bf16"), None, None, **failed)
    assert verdicts([row]) == [f"MISSED: {row['name']}: not measured: RuntimeError: out of resource"]
