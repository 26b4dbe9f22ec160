import csv
import json
import shutil

import pytest
import yaml

from msv.ablation.grid import read_grid_file, resolve_runs, write_grid_file
from msv.ablation.records import write_record
from msv.ablation.tables import make_table
from msv.grid_section import Grid
from msv.publishing import guard, keep
from msv.publishing.index import write_index
from msv.publishing.keep import keep_grid, main

LR = "model.init_args.lr"
COMMIT = "0123456789ab"


@pytest.fixture(autouse=True)
def history(monkeypatch):
    """Stands for the repository's: the commits it has."""
    commits = {COMMIT}
    monkeypatch.setattr(guard, "in_history", lambda commit: commit in commits)
    return commits


def train(results, cells, seeds=(0,), top1=0.5, commit=COMMIT, status="done", epochs=2, lr=1.0, test=True, **changes):
    """Write what a grid leaves: cells (name -> lr) with some seeds; returns its folder."""
    grid = Grid("g", cells={name: {LR: lr * value} for name, value in cells.items()}, seeds=list(seeds),
                results=str(results), recipe="quick", test=test)  # fmt: skip
    runs = resolve_runs(grid, {"seed_everything": 0, "model": {"init_args": {"lr": 0.0}}})
    write_grid_file(grid, runs, "python cli.py fit --config experiments/g.yaml")
    for run in runs:
        known = {
            **({} if test else {"tested": False}),
            "grid": "g", "recipe": "quick", "cell": run.cell.name, "seed": run.seed, "config_hash": run.config_hash,
            "toggles": run.cell.toggles, "data": {"name": "digits", "note": "360 test images"},
            "env": {"commit": commit, "device": "A CPU"},
        }  # fmt: skip
        measured = {
            "status": status, "metrics": {f"{'test' if test else 'val'}_top1": top1 + 0.01 * run.seed},
            "history": [{"epoch": epoch, "train_loss": 1 / (1 + epoch)} for epoch in range(epochs)],
        }  # fmt: skip
        write_record(run.folder / "record.json", {**known, **measured, **changes.get(run.cell.name, {})})
        (run.folder / "config.yaml").write_text(yaml.safe_dump(run.config))
        (run.folder / "last.ckpt").write_bytes(b"weights")
    return results / "g" / "quick"


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_published(tmp_path):
    folder = train(tmp_path / "results", {"a": 1.0, "b": 2.0}, seeds=[0, 1])
    make_table(folder)
    kept = keep_grid(folder, tmp_path / "measured")
    assert (kept.folder, kept.runs, kept.new) == (tmp_path / "measured/quick/g", 4, 4)
    assert (kept.unfinished, kept.refused) == ([], [])
    runs = [f"{cell}/seed{s}-{h}" for cell, c in read_grid_file(folder)["cells"].items() for s, h in c["runs"].items()]
    files = tree(kept.folder)
    expected = {f"{run}/{name}" for run in runs for name in ("record.json", "config.yaml")}
    assert set(files) == expected | {"grid.yaml", "table.csv", "table.md", "epochs.csv"}
    for name in expected | {"table.csv"}:
        assert files[name] == (folder / name).read_bytes()
    epochs = list(csv.DictReader((kept.folder / "epochs.csv").read_text().splitlines()))
    assert len(epochs) == 8
    assert epochs[3] == {"cell": "a", "seed": "1", "epoch": "1", "train_loss": "0.5"}
    text = files["table.md"].decode()
    assert "from the records alone by `python cli.py tables --all`." in text
    assert str(tmp_path) not in text + files["grid.yaml"].decode()
    # The runs are as they were, and nothing else is left behind.
    assert (folder / runs[0] / "last.ckpt").is_file()
    assert [path.name for path in (tmp_path / "measured").iterdir()] == ["quick"]


def test_again_changes_nothing(tmp_path):
    folder = train(tmp_path / "results", {"a": 1.0})
    before = tree(keep_grid(folder, tmp_path).folder)
    again = keep_grid(folder, tmp_path)
    assert (again.runs, again.new) == (1, 0)
    assert tree(again.folder) == before


@pytest.mark.parametrize(
    ("commit", "reason"),
    [
        ("unknown", "its commit is unknown; train in a git checkout"),
        (None, "its commit is unknown"),
        (f"{COMMIT}+dirty", r"0123456789ab\+dirty: files differed from it; commit them and train again"),
        ("ba9876543210", "ba9876543210 is not in this repository's history"),
    ],
)
def test_a_number_without_a_commit_is_refused(tmp_path, commit, reason):
    folder = train(tmp_path / "all", {"a": 1.0}, commit=commit)
    with pytest.raises(ValueError, match=f"no run to publish: a seed 0: .*{reason}"):
        keep_grid(folder, tmp_path)
    assert not (tmp_path / "quick").exists()

    folder = train(tmp_path / "some", {"a": 1.0, "b": 2.0}, a={"env": {"commit": commit}})
    kept = keep_grid(folder, tmp_path)
    assert kept.runs == 1
    assert len(kept.refused) == 1
    assert "a,1.0,missing" in (kept.folder / "table.csv").read_text()


def test_unfinished_runs_are_left_out(tmp_path):
    folder = train(tmp_path / "results", {"a": 1.0, "b": 2.0, "c": 3.0}, a={"status": "failed"})
    shutil.rmtree(folder / "c")
    kept = keep_grid(folder, tmp_path)
    assert (kept.runs, kept.unfinished) == (1, ["a seed 0 (failed)", "c seed 0 (missing)"])
    assert not (kept.folder / "a").exists()


@pytest.mark.parametrize("change", [{"top1": 0.6}, {"lr": 3.0}], ids=["trained again", "another configuration"])
def test_another_record_needs_the_flag(tmp_path, change):
    target = keep_grid(train(tmp_path / "one", {"a": 1.0, "b": 2.0}), tmp_path).folder
    before = tree(target)
    folder = train(tmp_path / "two", {"a": 1.0, "b": 2.0}, **change)
    with pytest.raises(ValueError, match=r"holds other records than .*: a seed 0, b seed 0; .* give --replace"):
        keep_grid(folder, tmp_path)
    assert tree(target) == before
    keep_grid(folder, tmp_path, replace=True)
    assert sorted(target.glob("*/*/record.json")) == sorted(
        target / path.relative_to(folder) for path in folder.glob("*/*/record.json")
    )
    assert (target / "table.csv").read_bytes() == make_table(folder).csv.read_bytes()


def test_a_cell_that_the_grid_has_no_more_needs_the_flag(tmp_path):
    keep_grid(train(tmp_path / "one", {"a": 1.0, "b": 2.0}), tmp_path)
    folder = train(tmp_path / "two", {"a": 1.0})
    shutil.copytree(tmp_path / "one/g/quick/a", folder / "a", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"holds other records than .*: b seed 0"):
        keep_grid(folder, tmp_path)
    assert keep_grid(folder, tmp_path, replace=True).runs == 1


@pytest.mark.parametrize("first", [True, False], ids=["validated after tested", "tested after validated"])
def test_tested_and_validated_runs_are_not_mixed(tmp_path, first):
    kept = keep_grid(train(tmp_path / "one", {"a": 1.0}, seeds=[0], test=first), tmp_path)
    before = tree(kept.folder)
    folder = train(tmp_path / "two", {"a": 1.0}, seeds=[1], test=not first)
    with pytest.raises(ValueError, match=r"holds other records than .*: a seed 0; .* give --replace"):
        keep_grid(folder, tmp_path)
    assert tree(kept.folder) == before
    kept = keep_grid(folder, tmp_path, replace=True)
    assert kept.runs == 1
    assert read_grid_file(kept.folder)["test"] is not first
    assert ("Not tested" in (kept.folder / "table.md").read_text()) is first
    index = write_index(tmp_path / "index").read_text()
    assert "not tested" not in index
    shutil.copytree(tmp_path / "quick", tmp_path / "index" / "measured" / "quick")
    index = write_index(tmp_path / "index").read_text()
    assert ("| 1 of 1, validated alone, not tested |" in index) is first


def test_seeds_may_come_in_portions_and_runs_may_be_deleted(tmp_path):
    keep_grid(train(tmp_path / "one", {"a": 1.0, "b": 2.0}, seeds=[0]), tmp_path)
    kept = keep_grid(train(tmp_path / "two", {"a": 1.0, "b": 2.0}, seeds=[1, 2]), tmp_path)
    assert (kept.runs, kept.new) == (6, 4)
    folder = train(tmp_path / "three", {"a": 1.0, "b": 2.0}, seeds=[3])
    shutil.rmtree(folder / "b")
    kept = keep_grid(folder, tmp_path)
    assert (kept.runs, kept.new) == (7, 1)
    assert read_grid_file(kept.folder)["cells"]["b"]["runs"].keys() == {0, 1, 2, 3}
    assert "a,1.0,done" in (kept.folder / "table.csv").read_text()
    assert "3 done, 1 missing" in (kept.folder / "table.csv").read_text()


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    target = keep_grid(train(tmp_path / "one", {"a": 1.0}), tmp_path / "measured").folder
    before = tree(target)

    def full(folder):
        raise OSError("no space")

    monkeypatch.setattr(keep, "make_table", full)
    with pytest.raises(OSError, match="no space"):
        keep_grid(train(tmp_path / "two", {"a": 1.0, "b": 2.0}, seeds=[1]), tmp_path / "measured", replace=True)
    assert tree(target) == before
    assert [path.name for path in (tmp_path / "measured").iterdir()] == ["quick"]


def test_command(tmp_path, capsys):
    results, to = tmp_path / "runs", tmp_path / "results"
    train(results, {"a": 1.0, "b": 2.0}, a={"env": {"commit": "unknown"}})
    assert main(["--results", str(results), "--to", str(to)]) == 1
    out = capsys.readouterr().out
    assert f"{to}/measured/quick/g: 1 runs, 1 of them new" in out
    assert "  refused: a seed 0: its commit is unknown" in out
    assert "[g](measured/quick/g/table.md)" in (to / "README.md").read_text()
    path = next((results / "g/quick/a").glob("*/record.json"))
    path.write_text(json.dumps({**json.loads(path.read_text()), "env": {"commit": COMMIT}}))
    assert main(["--results", str(results), "--to", str(to)]) == 0
    assert f"{to}/measured/quick/g: 2 runs, 1 of them new" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--grid 'h': no such grid"):
        main(["--results", str(results), "--to", str(to), "--grid", "h"])
