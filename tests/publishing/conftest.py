"""A small grid that has left results: one of its two runs is done."""

import pytest

from msv.ablation.grid import resolve_runs, write_grid_file
from msv.ablation.records import write_record
from msv.grid_section import Grid
from msv.publishing.keep import keep_grid

DATA = {"name": "digits", "train_images": 9, "test_images": 5, "image_size": 32, "num_classes": 10, "in_chans": 1}


@pytest.fixture
def make_grid():
    """Writes what a grid leaves in a results folder, and returns its own folder."""

    def make(results, name="g"):
        grid = Grid(name, cells={"a": {"model.lr": 1.0}, "b": {"model.lr": 2.0}}, recipe="quick", results=str(results))
        runs = resolve_runs(grid, {"seed_everything": 0, "model": {"lr": 0.0}})
        write_grid_file(grid, runs, f"python cli.py fit --config experiments/{name}.yaml")
        run = runs[0]
        run.folder.mkdir(parents=True)
        (run.folder / "config.yaml").write_text("seed_everything: 0")
        record = {
            "grid": name, "recipe": "quick", "cell": run.cell.name, "seed": run.seed, "config_hash": run.config_hash,
            "status": "done", "metrics": {"test_top1": 0.5}, "history": [], "data": {**DATA, "note": "5 images"},
            "counts": {"gflops_fvcore_trained": 0.0151},
            "env": {"commit": "0123456789ab", "device": "A CPU", "threads": 1, "torch": "2.15.0"},
        }  # fmt: skip
        write_record(run.folder / "record.json", record)
        return results / name / "quick"

    return make


@pytest.fixture
def results(tmp_path, monkeypatch, make_grid):
    """A results folder with one published grid and a benchmark."""
    monkeypatch.setattr("msv.publishing.guard.in_history", lambda commit: True)
    keep_grid(make_grid(tmp_path), tmp_path / "measured")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "scan_cpu.csv").write_text(
        "ms,device,torch,commit\n1,A CPU,2.15.0,abc\n2,A CPU,2.15.0,def\n"
    )
    return tmp_path
