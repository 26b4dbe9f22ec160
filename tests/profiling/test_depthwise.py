"""The depthwise convolutions' benchmark, run dry."""

import csv
import os

import pytest
import torch

from msv.kept import ENVIRONMENT
from msv.profiling import depthwise

KERNELS_RUN = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.skipif(not KERNELS_RUN, reason="needs a GPU, or TRITON_INTERPRET=1")
def test_quick(tmp_path, capsys):
    assert depthwise.main(["--quick", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*.csv")
    assert "2x8x7x6 bfloat16 | " in path.with_suffix(".md").read_text()
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [f"{kind} 2x8x7x6 bfloat16" for kind in depthwise.KINDS]
    for row in rows:
        assert tuple(row) == (*depthwise.BENCHMARK.columns, *ENVIRONMENT)
        assert float(row["forward_speedup"]) == pytest.approx(
            float(row["forward_torch_ms"]) / float(row["forward_ms"]), rel=1e-3
        )
    assert "mixer 7x7 2x8x7x6" in capsys.readouterr().out


def test_moved_bytes():
    for kind, forward, both in (("mixer 3x3", 2, 5), ("mixer 7x7", 1.25, 3.5), ("ffn 3x3", 2, 5)):
        x = 2 * 8 * 6 * 10 * 2
        assert depthwise.Case(kind, (2, 8, 6, 10)).moved_bytes == (forward * x, both * x)


def test_backends_get_the_same_tensors():
    device = torch.device("cpu")
    case = depthwise.Case("mixer 3x3", (2, 5, 4, 6), torch.float32)
    ours, theirs = (case.call(device, backend) for backend in ("reference", "parallel"))
    assert ours.tensors[0].stride() == (5 * 4 * 12, 4 * 12, 12, 1)
    for found, expected in zip(ours.forward_backward(), theirs.forward_backward(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arguments, message", [(["--quick", "--only", "9x9"], "--only is 9x9"), ([], "no GPU here")])
def test_refused(monkeypatch, tmp_path, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        depthwise.main([*arguments, "--out", str(tmp_path)])
