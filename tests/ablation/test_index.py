import sys
import types

import pytest

from msv.ablation import index
from msv.ablation.counted import shipped_grids
from msv.ablation.grid import resolve_runs, write_grid_file
from msv.ablation.index import write_all, write_index
from msv.ablation.keep import keep_grid
from msv.ablation.records import write_record
from msv.ablation.tables import main
from msv.grid_section import Grid

DATA = {"name": "digits", "train_images": 9, "test_images": 5, "image_size": 32, "num_classes": 10, "in_chans": 1}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder with one published grid and a benchmark."""
    monkeypatch.setattr("msv.ablation.keep.in_history", lambda commit: True)
    grid = Grid("g", cells={"a": {"model.lr": 1.0}, "b": {"model.lr": 2.0}}, recipe="quick", results=str(tmp_path))
    runs = resolve_runs(grid, {"seed_everything": 0, "model": {"lr": 0.0}})
    write_grid_file(grid, runs, "python cli.py fit --config experiments/g.yaml")
    for run in runs[:1]:
        (run.folder).mkdir(parents=True)
        (run.folder / "config.yaml").write_text("seed_everything: 0")
        record = {
            "grid": "g", "recipe": "quick", "cell": run.cell.name, "seed": run.seed, "config_hash": run.config_hash,
            "status": "done", "metrics": {"test_top1": 0.5}, "history": [], "data": {**DATA, "note": "5 images"},
            "env": {"commit": "0123456789ab", "device": "A CPU", "threads": 1, "torch": "2.15.0"},
        }  # fmt: skip
        write_record(run.folder / "record.json", record)
    keep_grid(tmp_path / "g" / "quick", tmp_path / "measured")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "scan.csv").write_text(
        "ms,device,torch,commit\n1,A CPU,2.15.0,abc\n2,A CPU,2.15.0,def\n"
    )
    return tmp_path


def test_index(results):
    text = write_index(results).read_text()
    rows = [[value.strip() for value in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert rows[2] == [
        "[g](measured/quick/g/table.md)", "quick", "digits; 9 train, 5 test images of 1×32×32; 10 classes", "1 of 2",
        "0", "A CPU, 1 thread", "`0123456789ab`",
    ]  # fmt: skip
    assert rows[-1] == ["[scan](benchmarks/scan.csv)", "2", "A CPU", "2.15.0", "abc, def"]
    for phrase in (
        "- torch 2.15.0\n- 5 images\n",
        "```sh\npython cli.py fit --config experiments/g.yaml\n```",
        "no column holds both",
        "No network has been trained on ImageNet here",
    ):
        assert phrase in text
    # A page that was not made is not linked.
    assert "Counted here" not in text
    assert "comparison" not in text


def test_an_empty_folder_has_an_index_too(tmp_path):
    assert "Nothing yet: train a grid" in write_index(tmp_path).read_text()


@pytest.fixture
def quick_counts(monkeypatch):
    """One small grid stands for those that are shipped."""
    shipped = [path for path in shipped_grids() if path.stem == "compare_baseline"]
    monkeypatch.setattr(index, "shipped_grids", lambda: shipped)


def test_everything_at_once(results, quick_counts, monkeypatch, capsys):
    def compare(out):
        (out / "table_1.md").parent.mkdir(parents=True)
        (out / "table_1.md").write_text("x")
        return [out / "table_1.md"]

    monkeypatch.setitem(sys.modules, "msv.comparison", types.SimpleNamespace(write_all=compare))
    (results / "measured/quick/g/table.md").unlink()
    assert main(["--all", "--results", str(results)]) == 0
    wrote = capsys.readouterr().out.replace("wrote ", "").split()
    assert [name.removeprefix(f"{results}/") for name in wrote] == [
        "measured/quick/g/table.csv", "measured/quick/g/table.md", "counted/compare_baseline.csv",
        "counted/compare_baseline.md", "comparison/table_1.md", "README.md",
    ]  # fmt: skip
    text = (results / "README.md").read_text()
    assert "- [compare_baseline](counted/compare_baseline.md)" in text
    assert "- [table_1](comparison/table_1.md)" in text
    # The runs themselves, which are not published, are left alone.
    assert not (results / "g/quick/table.md").exists()


def test_without_the_comparison(results, quick_counts, monkeypatch):
    monkeypatch.setitem(sys.modules, "msv.comparison", None)
    assert write_all(results)[-1] == results / "README.md"


def test_a_damaged_record_does_not_keep_the_others_from_their_tables(results, quick_counts):
    next((results / "measured/quick/g").glob("*/*/record.json")).write_text("{")
    with pytest.raises(ValueError, match="truncated or damaged"):
        write_all(results)
    assert (results / "counted/compare_baseline.csv").is_file()


def test_all_and_grid_exclude_each_other(results, capsys):
    with pytest.raises(SystemExit):
        main(["--all", "--grid", "g"])
    assert "not allowed with" in capsys.readouterr().err
