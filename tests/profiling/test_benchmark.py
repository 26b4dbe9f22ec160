import csv

import pytest
import torch
import torch.nn.functional as F

from msv.files import EXPERIMENTS
from msv.kept import ENVIRONMENT, Kept
from msv.models import MSVMamba, mixers
from msv.profiling import benchmark, commands, mamba_cuda, scan_cpu, scan_gpu, scan_gpu_bars
from msv.profiling.scan_call import Call
from msv.profiling.scan_cpu_cases import MAPS, SEQUENCES, cases, record_scans

PUBLISHED = EXPERIMENTS.parent / "results" / "benchmarks"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmarks")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        assert benchmark.main(["--quick", "--device", "cpu", "--threads", "1", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    (path,) = out.glob("*.csv")
    with path.open(newline="") as file:
        return path.name, list(csv.DictReader(file))


def test_the_csv(quick):
    name, rows = quick
    assert name == "scan_cpu_quick.csv"
    assert all(tuple(row) == (*scan_cpu.COLUMNS, *ENVIRONMENT) for row in rows)
    assert [(row["operator"], row["N"], row["calls"]) for row in rows] == [
        *[("1d", "1", "1"), ("1d", "8", "1")],
        *[("2d", "8", "1"), ("2d", "8", "4"), ("2d", "1", "1"), ("2d", "1", "4")],
    ]
    for row in rows:
        assert float(row["ratio"]) == pytest.approx(
            float(row["forward_backward_ms"]) / float(row["yardstick_ms"]), rel=1e-3
        )
        assert row["threads"] == "1"
        assert row["torch"] and row["device"] and row["commit"]
        assert (row["max_ratio"], row["max_memory_ratio"]) == ("", "")  # a bar is for the real sizes


def test_shapes_and_bytes(quick):
    _, rows = quick
    sizes = ("B", "K", "D", "L", "N", "R", "map")
    assert [tuple(row[size] for size in sizes) for row in rows[1:4]] == [
        ("1", "1", "4", "50", "8", "", ""),
        ("2", "4", "16", "64", "8", "1", "8x8"),
        ("2", "4", "16/32/64/128", "64/16/4/1", "8", "1/2/4", "8x8/4x4/2x2/1x1"),
    ]
    # u, delta, y; A; B and C
    assert int(rows[1]["io_bytes"]) == 4 * (3 * 4 * 50 + 4 * 8 + 2 * 8 * 50)
    # x, x_dbl, the weights, the output
    weights = 4 * 16 * (1 + 1 + 8 + 1)
    assert int(rows[2]["io_bytes"]) == 4 * (2 * 64 * 16 + 2 * 64 * 4 * 17 + weights + 2 * 4 * 64 * 16)
    for row in rows:
        if row["calls"] == "1":
            assert int(row["peak_bytes"]) > int(row["io_bytes"])
        else:
            assert row["peak_bytes"] == row["memory_ratio"] == ""


def test_the_shipped_shapes_are_those_of_the_main_job():
    assert [(entry.channels, entry.length, entry.d_states) for entry in SEQUENCES] == [(192, 3136, {1: 10.0, 8: None})]
    first = MAPS[0]
    network = MSVMamba(3, 10, **first.network)
    images = torch.zeros(1, 3, first.image_size, first.image_size)
    calls = record_scans(network, images, torch.zeros(1, dtype=torch.long))
    assert len(calls) == sum(first.network["depths"])
    assert calls[0].tensors[0].shape == (1, 8, 8, 96)
    assert calls[0].tensors[1].shape == (1, 8, 8, 4, 3 + 2 * 8)
    assert (first.batch, first.max_ratio) == (64, 0.5)


def test_recorded_scans_give_the_gradients_of_the_step():
    torch.manual_seed(0)
    network = MSVMamba(3, 5, (8, 16, 32, 64), (1, 1, 1, 1), d_state=2, full_scans=4, se=False, conv_ffn=False)
    images, labels = torch.randn(2, 3, 40, 33), torch.tensor([0, 1])
    original = mixers.selective_scan_2d
    calls = record_scans(network, images, labels)
    assert mixers.selective_scan_2d is original
    network.zero_grad()
    F.cross_entropy(network(images), labels).backward()
    scans = [module for module in network.modules() if isinstance(module, mixers.S6)]
    assert len(scans) == len(calls) == 4
    for scan, call in zip(scans, calls, strict=True):
        y, _, _, *gradients = call.forward_backward()
        assert torch.equal(y, call.forward())
        for parameter, gradient in zip((scan.dt_weight, scan.dt_bias, scan.A_log, scan.D_skip), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


def test_recording_ends_with_a_failing_step():
    original = mixers.selective_scan_2d
    with pytest.raises(ValueError, match=r"expected \(B, 3, H, W\)"):
        record_scans(MSVMamba(3, 5, (8, 16, 32, 64), (1, 1, 1, 1)), torch.zeros(1, 4, 32, 32), torch.zeros(1).long())
    assert mixers.selective_scan_2d is original


def test_a_call_s_forward_keeps_no_graph():
    x = torch.ones(3, requires_grad=True)
    call = Call(torch.exp, (x,), torch.ones(3))
    assert not call.forward().requires_grad
    y, gradient = call.forward_backward()
    assert torch.equal(gradient, y)


def test_verdicts():
    row = {"what": "1-D scan", "N": "1", "yardstick": "torch.cumsum", "ratio": "10", "max_ratio": "10", "status": ""}
    memory = {"memory_ratio": "6", "max_memory_ratio": "6"}
    assert scan_cpu.verdicts([{**row, **memory}]) == [
        "met: 1-D scan, N=1: 10.00 times torch.cumsum (at most 10)",
        "MISSED: 1-D scan, N=1: peak memory 6.00 times inputs plus output (under 6)",
    ]
    assert scan_cpu.verdicts([{**row, **memory, "max_ratio": "", "max_memory_ratio": ""}]) == []
    failed = scan_cpu.verdicts([{**row, "status": "failed", "error": "RuntimeError: no"}])
    assert failed == ["MISSED: 1-D scan, N=1: not measured: RuntimeError: no"]


@pytest.mark.parametrize("threads", ["0", "-2"])
def test_no_threads(tmp_path, threads):
    with pytest.raises(ValueError, match=f"--threads is {threads}; expected 1 or more"):
        benchmark.main(["--threads", threads, "--out", str(tmp_path)])


def test_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no GPU"):
        benchmark.main(["--device", "cuda", "--out", str(tmp_path)])


def gpu_table(tmp_path, *arguments):
    status = benchmark.main(["--quick", "--out", str(tmp_path), *arguments])
    (path,) = tmp_path.glob("*.csv")
    with path.open(newline="") as file:
        return status, path.name, list(csv.DictReader(file))


@pytest.fixture
def interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_the_gpu_s_table_at_tiny_sizes_on_a_cpu(interpreter, tmp_path, capsys):
    arguments = ("--device", "cpu", "--backend", "parallel", "--only", "1d B2 K1", "2d SS2D B2 D6 5x7 N1 ")
    status, name, rows = gpu_table(tmp_path, *arguments)
    assert (status, name) == (0, "scan_interpreter_parallel_quick.csv")
    assert [(row["name"], row["R"], row["map"]) for row in rows] == [
        ("1d B2 K1 D6 L37 N1 bf16", "", ""),
        ("2d SS2D B2 D6 5x7 N1 bf16", "2", "5x7"),
        *((f"1d B2 K1 D6 L37 N1 {dtype}", "", "") for dtype in ("fp16", "fp32")),
    ]
    for row in rows:
        assert tuple(row) == (*scan_gpu.COLUMNS, *ENVIRONMENT)
        assert (row["method"], row["backend"], row["rival"], row["error"]) == ("calls", "parallel", "", "")
        assert row["torch"] and row["device"] and row["commit"]
        assert float(row["forward_over_copy"]) == pytest.approx(
            float(row["forward_ms"]) / float(row["copy_ms"]), rel=1e-3
        )
    printed = capsys.readouterr().out
    assert "met:" not in printed and "MISSED" not in printed  # a bar is for the real sizes


def test_a_row_that_fails_stops_no_other(interpreter, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scan_gpu, "peak_memory", lambda work, device: work() and 1 // 0)
    status, _, rows = gpu_table(tmp_path, "--device", "cpu", "--backend", "parallel", "--only", "K1")
    assert status == 1
    assert [row["error"] for row in rows] == ["ZeroDivisionError: integer division or modulo by zero"] * 4
    printed = capsys.readouterr().out
    assert "error: 4 rows: ZeroDivisionError" in printed
    assert "4/4 1d B2 K1 D6 L37 N1 fp32: failed: ZeroDivisionError" in printed


def test_a_run_goes_on_where_it_was(interpreter, tmp_path, capsys, monkeypatch, clean_commit):
    arguments = ("--device", "cpu", "--backend", "parallel", "--only", "d B2 K1", "1d B1")
    original = scan_gpu.measure_case
    taken = []

    def stop_after_one(case, **options):
        if taken:
            raise KeyboardInterrupt
        taken.append(case)
        return original(case, **options)

    monkeypatch.setattr(scan_gpu, "measure_case", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        gpu_table(tmp_path, *arguments)
    monkeypatch.setattr(scan_gpu, "measure_case", original)
    status, _, rows = gpu_table(tmp_path, *arguments)
    assert (status, len(rows)) == (0, 4)
    assert "1 rows are finished and skipped" in capsys.readouterr().out
    assert {row["command"] for row in rows} == {
        "python cli.py benchmark scan --device cpu --quick --only 'd B2 K1' '1d B1' --backend parallel"
    }


@pytest.mark.parametrize(
    ("name", "columns", "key", "rows"),
    [("scan_cuda", scan_gpu.COLUMNS, ("name",), 39), ("scan_cpu", scan_cpu.COLUMNS, scan_cpu.KEY, 6)],
)
def test_a_new_row_takes_the_place_of_one_published_row(tmp_path, where, name, columns, key, rows):
    kept = Kept(tmp_path / f"{name}.csv", columns, (*key, "device", "threads"))
    kept.path.write_bytes((PUBLISHED / kept.path.name).read_bytes())
    first = kept.read()[0]
    assert len(kept.read()) == len({kept.identity(row) for row in kept.read()}) == rows
    there = {"device": first["device"], "threads": first["threads"], "cuda": first["cuda"]}
    kept.put({column: first[column] for column in key} | {"status": "done"}, where | there)
    kept.put({column: first[column] for column in key} | {"status": "done"}, where | there | {"device": "another"})
    found = kept.read()
    assert [row["commit"] for row in found] == ["a commit", *[first["commit"]] * (rows - 1), "a commit"]


@pytest.mark.parametrize(
    ("name", "of", "bars", "rows"),
    [("scan_cuda", scan_gpu, scan_gpu_bars.verdicts, 39), ("scan_cpu", scan_cpu, scan_cpu.verdicts, 6)],
)
def test_kept_rows_are_a_page(name, of, bars, rows):
    kept = Kept(PUBLISHED / f"{name}.csv", of.COLUMNS, ()).read()
    page = commands.page("The scan", kept, of.table, bars)
    assert f"## {kept[0]['device']}, commit {kept[0]['commit']}" in page
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert len(lines) >= 2 + rows
    assert {line.count("|") for line in lines[:2]} == {line.count("|") for line in lines[2:]}
    assert "\n- met: " in page


def test_no_two_rows_of_a_cpu_are_alike():
    found = [tuple(case.columns[name] for name in scan_cpu.KEY) for case in cases()]
    assert len(set(found)) == len(found) == 6


def test_no_such_row(interpreter, tmp_path):
    with pytest.raises(ValueError, match="--only is D999, which is part of no row's name"):
        gpu_table(tmp_path, "--device", "cpu", "--only", "D999")


def test_a_rival_that_was_asked_for_and_is_missing(interpreter, tmp_path, monkeypatch):
    def load(source):
        raise mamba_cuda.RivalMissingError(f"no nvcc for {source}")

    monkeypatch.setattr(mamba_cuda, "load", load)
    with pytest.raises(ValueError, match=r"--rival is a\.tar\.gz: no nvcc for a\.tar\.gz"):
        gpu_table(tmp_path, "--device", "cpu", "--rival", "a.tar.gz")


@pytest.mark.parametrize("option", [("--only", "1d"), ("--rival", "x.so"), ("--without", "rival")])
def test_options_of_the_gpu_s_table_on_a_cpu(tmp_path, monkeypatch, option):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"{option[0]} belongs to the GPU's table"):
        benchmark.main(["--quick", "--device", "cpu", "--out", str(tmp_path), *option])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu(tmp_path):
    status, name, rows = gpu_table(tmp_path, "--device", "cuda", "--without", "rival", "--only", "bf16")
    assert (status, name) == (0, "scan_cuda_without_rival_quick.csv")
    assert {row["method"] for row in rows} == {"graph"}
