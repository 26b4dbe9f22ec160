import pytest
import torch

from msv.comparison.throughput import kept_rows, plan, stores
from msv.comparison.throughput_table import render_csv, render_markdown, table_6
from msv.profiling.networks import Case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY = Case("vmamba_tiny", "inference", "eager", "float32", 2, 32)


def test_plan_on_a_gpu():
    cases = plan(CUDA)
    assert len(cases) == 37
    assert {(case.task, case.batch, case.size) for case in cases} == {("inference", 128, 224)}
    ways = {}
    for case in cases:
        ways.setdefault(case.model, []).append((case.precision, case.mode))
    six = [(precision, mode) for precision in ("float32", "fp16", "bf16") for mode in ("eager", "compiled")]
    for model in ("vmamba_tiny", "msvmamba_nano", "msvmamba_micro", "msvmamba_tiny"):
        assert ways.pop(model) == six
    for model in ("swin_tiny_patch4_window7_224", "convnext_tiny"):
        assert ways.pop(model) == [("bf16", "eager"), ("bf16", "compiled")]
    assert len(ways) == 9
    assert all(way == [("bf16", "eager")] for way in ways.values())


def test_plan_on_a_cpu_and_as_asked():
    assert {(case.precision, case.mode, case.batch) for case in plan(CPU)} == {("float32", "eager", 2)}
    (case,) = plan(CUDA, 8, 64, ["regnety_008"], ["fp16"], ["compiled"])
    assert case == Case("regnety_008", "inference", "compiled", "fp16", 8, 64)


def keep(folder, where, speeds, **columns):
    for model, speed in speeds.items():
        row = {"model": model, "task": "inference", "precision": "bf16", "mode": "eager", "batch": 128, "size": 224}
        row |= {"status": "done", "images_per_s": speed, "peak_bytes": 2**30}
        row |= {"command": "python cli.py compare --measure throughput"}
        stores(folder)[0 if where["cuda"] else 1].put(row | columns, where)


def test_ratios_beside_the_papers(tmp_path, where):
    keep(tmp_path, where, {"swin_tiny_patch4_window7_224": 500, "msvmamba_nano": 450, "vmamba_tiny": 100})
    rows = table_6(tmp_path)
    found = [(row.kept["model"], row.ratio, row.paper_ratio and round(row.paper_ratio, 2)) for row in rows]
    assert found == [
        ("vmamba_tiny", 1.0, 1.0), ("msvmamba_nano", 4.5, 5.33), ("swin_tiny_patch4_window7_224", 5.0, None)
    ]  # fmt: skip
    page = render_markdown(rows)
    for text in ("batch 128, 224×224", "a device", "Commit**: a commit", "*1165.71*", "*5.33*", "RTX 2080 Ti", "1024"):
        assert text in page
    assert "CPU, not a GPU" not in page
    assert "VMamba-T,vmamba_tiny,bf16,eager,128,224,done,100.00,1.000,1024.0,218.86,1.00" in render_csv(rows)


@pytest.mark.parametrize("other", [{"precision": "fp16"}, {"mode": "compiled"}, {"batch": 64}, {"size": 192}])
def test_no_ratio_to_another_kind_of_row(tmp_path, where, other):
    keep(tmp_path, where, {"vmamba_tiny": 100}, **other)
    keep(tmp_path, where, {"msvmamba_nano": 450})
    assert {row.kept["model"]: row.ratio for row in table_6(tmp_path)}["msvmamba_nano"] is None


def test_places_have_tables_of_their_own(tmp_path, where):
    keep(tmp_path, where, {"vmamba_tiny": 100})
    cpu = where | {"device": "a small one", "cuda": ""}
    keep(tmp_path, cpu, {"msvmamba_nano": 3})
    stores(tmp_path)[1].put({**TINY.columns, "status": "failed", "error": "OutOfMemoryError: none | left"}, cpu)
    rows = table_6(tmp_path)
    assert [row.ratio for row in rows] == [1.0, None, None]
    page = render_markdown(rows)
    assert page.count("\n## ") == 3
    assert "a CPU, not a GPU" in page
    assert "- `vmamba_tiny`, float32, eager: OutOfMemoryError" in page


def test_of_whole_networks_inference_without_graphs(tmp_path, where):
    keep(tmp_path, where, {"vmamba_tiny": 100})
    keep(tmp_path, where, {"vmamba_tiny": 50}, task="training")
    keep(tmp_path, where, {"vmamba_tiny": 200}, mode="graphs", peak_bytes=None)
    assert [row["images_per_s"] for row in kept_rows(tmp_path)] == ["100"]
    assert kept_rows(tmp_path, lambda row: False) == []


def test_no_rows(tmp_path):
    assert table_6(tmp_path) == []


def test_a_foreign_row(tmp_path, where):
    keep(tmp_path, where, {"resnet50": 100})
    with pytest.raises(ValueError, match="row of 'resnet50'"):
        table_6(tmp_path)
