import pytest
import torch

from msv.comparison import throughput
from msv.comparison.throughput import Case, measure, measure_case, plan, store
from msv.comparison.throughput_table import render_csv, render_markdown, table_6
from msv.profiling import measuring
from msv.profiling.measuring import Effort, missing

CPU = torch.device("cpu")
QUICK = Effort(calls=2, turns=3, seconds=0.0, warmup=1)
NANO = Case("msvmamba_nano", "float32", "eager", 2, 32)
TINY = Case("vmamba_tiny", "float32", "eager", 2, 32)


def test_plan_on_a_gpu():
    cases = plan(on_gpu=True)
    assert {(case.batch, case.size) for case in cases} == {(128, 224)}
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
    assert {(case.precision, case.mode, case.batch) for case in plan(on_gpu=False)} == {("float32", "eager", 2)}
    (case,) = plan(True, 8, 64, ["regnety_008"], ["fp16"], ["compiled"])
    assert case == Case("regnety_008", "fp16", "compiled", 8, 64)


def test_a_case_is_timed_and_its_memory_counted(means, monkeypatch):
    taken = []
    monkeypatch.setattr(throughput, "create", lambda model, size: means)
    monkeypatch.setattr(measuring, "call_seconds", lambda work, device: taken.append(work()) or len(taken) / 10)
    found = measure_case(NANO, CPU, QUICK)
    # The first turn is not counted; the others took 0.2, 0.3 and 0.4 s for two forwards of two images.
    assert found["images_per_s"] == pytest.approx(2 / 0.15)
    assert (found["forward_ms"], found["forward_min_ms"], found["turns"]) == (pytest.approx(150), pytest.approx(100), 3)
    images = 2 * 3 * 32 * 32 * 4
    assert images + 2 * 1000 * 4 <= found["peak_bytes"] < images + 3 * 2 * 1000 * 4


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_weights_and_images_are_in_the_precision(means, monkeypatch, precision):
    seen = []
    monkeypatch.setattr(throughput, "create", lambda model, size: means)
    means.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0].dtype, module.scale.dtype)))
    measure_case(Case("msvmamba_nano", precision, "eager", 2, 32), CPU, QUICK)
    assert set(seen) == {(throughput.PRECISIONS[precision],) * 2}


def test_a_failing_row_is_kept_and_stops_no_other_one(tmp_path, means, monkeypatch, where):
    def make(model, size):
        if model == "vmamba_tiny":
            raise RuntimeError("no\nway")
        return means

    monkeypatch.setattr(throughput, "create", make)
    kept = store(tmp_path)
    rows = list(measure([TINY, NANO], CPU, QUICK, kept, where, "a command"))
    assert [row["status"] for row in rows] == ["failed", "done"]
    assert rows == kept.read()
    assert rows[0]["error"] == "RuntimeError: no way"
    assert rows[0]["images_per_s"] == ""
    assert float(rows[1]["images_per_s"]) > 0


def test_rows_are_kept_one_by_one_and_finished_ones_skipped(tmp_path, means, monkeypatch, where):
    monkeypatch.setattr(throughput, "create", lambda model, size: means)
    kept, cases = store(tmp_path), [TINY, NANO]
    measuring = measure(cases, CPU, QUICK, kept, where, "")
    next(measuring)
    measuring.close()
    assert missing(cases, kept, where) == [NANO]
    assert missing(cases, kept, where, again=True) == cases
    for column in ("device", "torch", "commit"):
        assert missing(cases, kept, where | {column: "another"}) == cases
    assert missing([Case("vmamba_tiny", "float32", "eager", 4, 32)], kept, where)


def test_what_failed_is_tried_again_and_last(tmp_path, where):
    kept = store(tmp_path)
    kept.put({**TINY.columns, "status": "failed", "error": "x"}, where)
    assert missing([TINY, NANO], kept, where) == [NANO, TINY]


# The table.


def keep(folder, where, speeds, **columns):
    for model, speed in speeds.items():
        row = {"model": model, "precision": "bf16", "mode": "eager", "batch": 128, "size": 224, "status": "done"}
        row |= {"images_per_s": speed, "peak_bytes": 2**30, "command": "python cli.py compare --measure throughput"}
        store(folder).put(row | columns, where)


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
    store(tmp_path).put({**TINY.columns, "status": "failed", "error": "OutOfMemoryError: none | left"}, cpu)
    rows = table_6(tmp_path)
    assert [row.ratio for row in rows] == [1.0, None, None]
    page = render_markdown(rows)
    assert page.count("\n## ") == 3
    assert "a CPU, not a GPU" in page
    assert "- `vmamba_tiny`, float32, eager: OutOfMemoryError" in page


def test_no_rows(tmp_path):
    assert table_6(tmp_path) == []


def test_a_foreign_row(tmp_path, where):
    keep(tmp_path, where, {"resnet50": 100})
    with pytest.raises(ValueError, match="row of 'resnet50'"):
        table_6(tmp_path)
