"""The benchmark of residual sums and their LayerNorm, run dry."""

import csv
import os

import pytest
import torch

from msv.kept import ENVIRONMENT
from msv.profiling import norm

KERNELS_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not KERNELS_RUN, reason="needs a GPU, or TRITON_INTERPRET=1")
def test_quick(tmp_path, capsys):
    assert norm.main(["--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    assert "2x8x7x6 bfloat16 | " in path.with_suffix(".md").read_text()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [f"{kind} 2x8x7x6 bfloat16" for kind in norm.KINDS]
    for row in rows:
        assert tuple(row) == (*norm.BENCHMARK.columns, *ENVIRONMENT)
        assert float(row["forward_speedup"]) == pytest.approx(
            float(row["forward_torch_ms"]) / float(row["forward_ms"]), rel=1e-3
        )
    assert "dropped 2x8x7x6" in capsys.readouterr().out


def test_moved_bytes():
    m = 2 * 8 * 6 * 10 * 2
    for kind, maps in (("sum", 8), ("dropped", 9)):
        assert norm.Case(kind, (2, 8, 6, 10)).moved_bytes == (4 * m, maps * m)


@pytest.mark.parametrize("kind", norm.KINDS)
def test_backends_get_the_same_tensors(kind):
    case = norm.Case(kind, (2, 5, 4, 6), torch.float32)
    ours, theirs = (case.call(torch.device("cpu"), backend) for backend in ("reference", "parallel"))
    assert len(ours.forward()) == 2
    for found, expected in zip(ours.forward_backward(), theirs.forward_backward(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
