"""Grids driven through the command line, from the first run to the table."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from msv.ablation.cell import one_line, run_lock
from msv.ablation.cost import duration
from msv.ablation.grid import Cell, Run
from msv.ablation.runner import command
from msv.ablation.twins import find_twins

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "configs"
TINY = ["--config", str(CONFIGS / "grid.yaml"), "--config", str(CONFIGS / "quick.yaml")]
ONE = ["--grid.only", '["full_scans=1"]']

# How many threads share a sum decides its last bit: every process here has one.
os.environ["OMP_NUM_THREADS"] = "1"

spec = importlib.util.spec_from_file_location("cli", ROOT / "cli.py")
assert spec is not None
assert spec.loader is not None
cli = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cli)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command in this process; returns its exit status, what it printed, and its errors."""

    def call(*words: str):
        monkeypatch.setattr(sys, "argv", ["cli.py", *words])
        monkeypatch.setenv("COLUMNS", "200")
        status = cli.main(list(words))
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call


def fit(results: Path, *words: str) -> list[str]:
    return ["fit", *TINY, "--grid.results", str(results), *words]


def record(results: Path, cell: str, recipe: str = "quick", grid: str = "tiny") -> dict:
    (path,) = [p for p in (results / grid / recipe / cell).glob("seed*/record.json") if ".old-" not in str(p)]
    return json.loads(path.read_text()) | {"folder": path.parent}


def start(*words: str, **environment: str) -> subprocess.Popen:
    variables = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200"} | environment
    return subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables, cwd=ROOT,
    )  # fmt: skip


def read_until(process: subprocess.Popen, word: str) -> str:
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if word in line:
            return seen
    raise AssertionError(f"ended before {word!r}:\n{seen}")


def weights(folder: Path) -> dict:
    content = torch.load(folder / "last.ckpt", weights_only=True)
    return {**content["state_dict"], **{f"raw.{k}": v for k, v in content["current_model_state"].items()}}


def without_clock(rows: list[dict]) -> list[dict]:
    return [{key: row[key] for key in row if key not in ("seconds", "images_per_second")} for row in rows]


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict:
    """The record of one cell trained without interruption."""
    results = tmp_path_factory.mktemp("straight")
    sys.argv, kept = ["cli.py"], sys.argv
    try:
        assert cli.main(fit(results, *ONE, "--trainer.max_epochs", "6")) == 0
    finally:
        sys.argv = kept
    return record(results, "full_scans=1")


def test_dry_run_prints_cells_and_commands_and_writes_nothing(run, tmp_path):
    status, out, err = run(*fit(tmp_path / "results", "--grid.dry_run", "true", "--grid.seeds", "[0,1]"))
    assert (status, err) == (0, "")
    cells = [line.partition(" in ")[0].partition(" ")[2] for line in out.splitlines() if line.startswith("cell")]
    expected = [f"full_scans={n} seed {s} (new)" for n in (0, 1, 4) for s in (0, 1)]
    assert cells == [f"{number}/6 {text}" for number, text in enumerate(expected, start=1)]
    assert """--grid.only '["full_scans=4"]' --grid.seeds '[1]'""" in out
    assert "--grid.dry_run" not in out
    assert list(tmp_path.iterdir()) == []


def test_a_failing_cell_and_all_that_follows(run, tmp_path):
    """One grid's life: a cell fails, the others go on; again; tables again; everything anew."""
    grid = tmp_path / "grid.yaml"
    base = yaml.safe_load((CONFIGS / "grid.yaml").read_text())
    key = "model.init_args"
    base["grid"] = {
        "name": "life",
        "cells": {
            "explodes": {f"{key}.lr": 1e30, f"{key}.lr_batch_size": 1},
            "works": {},
            "also": {f"{key}.eps": 1e-7},
        },
        "baseline": "works",
    }
    grid.write_text(yaml.safe_dump(base, sort_keys=False))
    results = tmp_path / "results"
    words = ["fit", "--config", str(grid), "--config", str(CONFIGS / "quick.yaml"), "--grid.results", str(results),
             "--trainer.max_epochs", "2"]  # fmt: skip

    status, out, _ = run(*words)
    assert status == 1
    assert "cell 1/3 explodes seed 0 starts: 0 done, 1 running, 0 failed, 2 left" in out
    assert "cell 3/3 also seed 0 starts: 1 done, 1 running, 1 failed, 0 left, about" in out
    assert "2 of 3 done, 1 failed" in out
    records = {cell: record(results, cell, grid="life") for cell in ("explodes", "works", "also")}
    assert [r["status"] for r in records.values()] == ["failed", "done", "done"]
    assert "the loss is" in records["explodes"]["error"]
    assert "traceback in error.log" in records["explodes"]["error"]
    assert "NonFiniteLossError" in (records["explodes"]["folder"] / "error.log").read_text()
    works = records["works"]
    assert set(works["metrics"]) == {f"test_{name}{raw}" for name in ("top1", "top5", "loss") for raw in ("", "_raw")}
    assert [row["epoch"] for row in works["history"]] == [0, 1]
    limits = {"limit_train_batches": 4, "limit_val_batches": 2, "limit_test_batches": 2}
    schedule = {"epochs": 2, "global_batch_size": 32, "lr": 0.001, "precision": "32-true", "limits": limits}
    assert works["schedule"] == schedule
    assert works["network"]["init_args"]["drop_path_rate"] == 0.2
    assert works["counts"]["params"] > works["counts"]["params_trained"]
    assert works["toggles"] == {"lr": 0.001, "lr_batch_size": None, "eps": 1e-08}
    assert works["command"].endswith("""--grid.only '["works"]' --grid.seeds '[0]'""")
    assert any(path.name.startswith("events.out") for path in works["folder"].iterdir())

    folder = results / "life" / "quick"
    names = ("table.csv", "table.md", "accuracy_vs_flops.png", "training_curves.png")
    tables = {name: (folder / name).read_bytes() for name in names}
    for name in tables:
        (folder / name).unlink()
    status, _, _ = run("tables", "--results", str(results))
    assert status == 0
    assert {name: (folder / name).read_bytes() for name in tables} == tables

    times = {cell: (r["folder"] / "record.json").stat().st_mtime_ns for cell, r in records.items()}

    def changed() -> set[str]:
        return {c for c, r in records.items() if (r["folder"] / "record.json").stat().st_mtime_ns != times[c]}

    status, out, _ = run(*words, "--grid.rerun", "none")
    assert (status, changed()) == (1, set())
    assert "cell 1/3 explodes seed 0: failed, skipped" in out
    assert "2 of 3 done, 1 failed" in out

    status, out, _ = run(*words)
    assert (status, changed()) == (1, {"explodes"})
    assert "cell 2/3 works seed 0: done, skipped" in out

    status, out, _ = run(*words, "--grid.rerun", "all", "--grid.only", '["works"]')
    assert (status, changed()) == (0, {"explodes", "works"})
    old = works["folder"].with_name(works["folder"].name + ".old-1")
    assert json.loads((old / "record.json").read_text())["status"] == "done"
    again = record(results, "works", grid="life")
    assert without_clock(again["history"]) == without_clock(works["history"])
    assert again["metrics"] == works["metrics"]
    assert (folder / "table.csv").read_text().splitlines()[1].startswith("explodes")


def test_interrupted_and_resumed_equals_straight(straight, tmp_path):
    words = fit(tmp_path, *ONE, "--trainer.max_epochs", "6")
    process = start(*words)
    try:
        read_until(process, "epoch 2/6")
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "to go on, run again: python cli.py fit" in out
    assert "Traceback" not in out
    stopped = record(tmp_path, "full_scans=1")
    assert stopped["status"] == "unfinished"
    with run_lock(stopped["folder"]).acquire(timeout=0):
        pass
    assert "unfinished" in (tmp_path / "tiny/quick/table.csv").read_text()

    # Killed without a word, and the run's process ends too.
    process = start(*words)
    try:
        assert "goes on" in read_until(process, "epoch 4/6")
    finally:
        process.kill()
        process.wait()
    with run_lock(stopped["folder"]).acquire(timeout=20):
        assert record(tmp_path, "full_scans=1")["status"] in ("running", "done")

    process = start(*words)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    done = record(tmp_path, "full_scans=1")
    assert done["status"] == "done"
    assert done["metrics"] == straight["metrics"]
    assert without_clock(done["history"]) == without_clock(straight["history"])
    one, two = weights(straight["folder"]), weights(done["folder"])
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_whose_process_is_killed(run, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(CONFIGS)
    status, _, _ = run(*fit(tmp_path, *ONE, "--trainer.callbacks+=misbehave.Die"))
    assert status == 1
    killed = record(tmp_path, "full_scans=1")
    assert killed["status"] == "failed"
    assert "ended by SIGKILL (out of memory?)" in killed["error"]


def test_a_run_that_is_not_tested(run, tmp_path, monkeypatch):
    """Nothing asks for the test images, the record has nothing of them, and a tested grid trains anew."""
    monkeypatch.syspath_prepend(CONFIGS)
    words = fit(tmp_path, *ONE, "--trainer.max_epochs", "2")
    status, out, err = run(*words, "--grid.test", "false", "--data.class_path", "misbehave.Untestable")
    assert status == 0, out + err
    validated = record(tmp_path, "full_scans=1")
    assert validated["tested"] is False
    assert set(validated["metrics"]) == {
        f"val_{name}{raw}" for name in ("top1", "top5", "loss") for raw in ("", "_raw")
    }
    assert validated["metrics"]["val_top1"] == pytest.approx(validated["history"][-1]["val_top1"])
    assert f"val top-1 {100 * validated['metrics']['val_top1']:.2f}%" in out
    assert "- **Not tested**" in (tmp_path / "tiny/quick/table.md").read_text()

    # Without the switch the same data tell that they are asked for.
    status, out, _ = run(*words, "--data.class_path", "misbehave.Untestable")
    assert status == 1
    assert "the test split was asked for" in out
    folders = {path.parent.name for path in (tmp_path / "tiny/quick/full_scans=1").glob("seed0-*/record.json")}
    assert len(folders) == 2
    assert validated["folder"].name in folders


def test_running_elsewhere_and_running_without_a_holder(run, straight, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(straight["folder"].parents[3], results)
    folder = results / straight["folder"].relative_to(straight["folder"].parents[3])
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))
    words = fit(results, *ONE, "--trainer.max_epochs", "6")
    with run_lock(folder).acquire(timeout=0):
        status, out, _ = run(*words)
    assert status == 0
    assert "full_scans=1 seed 0: running elsewhere" in out
    status, out, _ = run(*words)  # nobody holds the lock: it is unfinished, and goes on from its last epoch
    assert status == 0
    assert "full_scans=1 seed 0 goes on" in out
    assert record(results, "full_scans=1")["metrics"] == straight["metrics"]


def test_two_processes_train_one_cell(tmp_path):
    words = fit(tmp_path, *ONE, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_epochs", "2")
    process = start(*words)
    out, _ = process.communicate(timeout=180)
    assert process.returncode == 0, out
    done = record(tmp_path, "full_scans=1")
    assert done["status"] == "done"
    assert done["schedule"]["global_batch_size"] == 64
    assert [row["epoch"] for row in done["history"]] == [0, 1]
    assert out.count("epoch 2/2") == 1


@pytest.mark.parametrize(
    ("damage", "fix"),
    [("record.json", "move .* aside and run the grid again"), ("last.ckpt", "delete it to start again without it: rm")],
)
def test_truncated_leftovers_are_named_before_training(run, straight, tmp_path, damage, fix):
    results = tmp_path / "results"
    shutil.copytree(straight["folder"].parents[3], results)
    folder = results / straight["folder"].relative_to(straight["folder"].parents[3])
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "unfinished"}))
    content = (folder / damage).read_bytes()
    (folder / damage).write_bytes(content[: len(content) // 2])
    status, _, err = run(*fit(results, "--trainer.max_epochs", "6"))
    assert status == 2
    assert str(folder / damage) in err
    assert "truncated" in err
    assert re.search(fix, err)
    assert sorted(p.name for p in (results / "tiny/quick").glob("full_scans=*")) == ["full_scans=1"]


def test_a_finished_run_on_other_data_is_not_passed_off_as_this_one(run, straight, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(straight["folder"].parents[3], results)
    words = fit(results, *ONE, "--trainer.max_epochs", "6")
    status, out, _ = run(*words)
    assert (status, "skipped" in out) == (0, True)

    path = record(results, "full_scans=1")["folder"] / "record.json"
    content = json.loads(path.read_text())
    content["data"] |= {"name": "ImageNet layout: flowers", "train_images": 12}
    path.write_text(json.dumps(content))
    status, _, err = run(*words)
    assert status == 2
    assert "name 'ImageNet layout: flowers', now 'digits'; train_images 12, now 1077" in err
    assert "--grid.recipe NAME" in err
    assert json.loads(path.read_text()) == content


def test_a_run_that_another_grid_has_trained_is_taken_over(run, straight, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(straight["folder"].parents[3], results)
    trained = record(results, "full_scans=1")
    before = (trained["folder"] / "record.json").read_bytes()
    grid = tmp_path / "other.yaml"
    grid.write_text(yaml.safe_dump({"grid": {"name": "other", "axes": {}, "cells": {"same": {}}, "baseline": "same"}}))
    words = fit(results, "--config", str(grid), "--grid.recipe", "quick", "--trainer.max_epochs", "6")
    status, out, err = run(*words)
    assert status == 0, err
    assert "cell 1/1 same seed 0: taken over, trained as tiny/quick/full_scans=1" in out
    same = record(results, "same", grid="other")
    assert (same["grid"], same["cell"], same["toggles"]) == ("other", "same", {})
    assert same["trained_as"] == "tiny/quick/full_scans=1"
    kept = {"metrics", "history", "counts", "env", "timing", "command", "config_hash"}
    assert {key: same[key] for key in kept} == {key: trained[key] for key in kept}
    assert same["folder"].name == trained["folder"].name
    assert (same["folder"] / "last.ckpt").read_bytes() == (trained["folder"] / "last.ckpt").read_bytes()
    assert (trained["folder"] / "record.json").read_bytes() == before
    text = (results / "other/quick/table.md").read_text()
    assert "same (baseline)" in text
    assert "- **Trained in other grids**: `same` as `tiny/quick/full_scans=1`\n" in text

    # Not under another recipe, and not where the data are others by now.
    assert find_twins([*_runs(same, results, recipe="else")]) == {}
    path = trained["folder"] / "record.json"
    path.write_text(json.dumps(json.loads(before) | {"data": {**trained["data"], "train_images": 12}}))
    shutil.rmtree(same["folder"])
    assert find_twins([*_runs(same, results)]) == {}
    path.write_bytes(before)
    assert find_twins([*_runs(same, results)]) == {same["folder"]: trained["folder"]}


def _runs(of: dict, results: Path, recipe: str = "quick"):
    config = yaml.safe_load((results / "tiny/quick/full_scans=1" / of["folder"].name / "config.yaml").read_text())
    folder = results / "other" / recipe / "same" / of["folder"].name
    yield Run("other", recipe, Cell("same", {}, {}), 0, config, of["config_hash"], folder)


def test_a_lock_is_seen_from_another_process(tmp_path):
    folder = tmp_path / "cell" / "seed0-00000000"
    folder.parent.mkdir()
    code = "import sys; from pathlib import Path; from msv.ablation.cell import run_lock; "
    code += "run_lock(Path(sys.argv[1])).acquire(timeout=0)"
    with run_lock(folder).acquire(timeout=0):
        taken = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
    assert "Timeout" in taken.stderr


def test_one_line_of_an_error():
    worker = "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  a\n\n"
    assert one_line(ValueError(worker + "ValueError: cannot read the image x.png")) == (
        "ValueError: cannot read the image x.png"
    )
    assert one_line(ValueError("lr=0:\n  too small")) == "lr=0: too small"
    assert one_line(KeyError("x")) == "KeyError: 'x'"


def test_command_leaves_out_what_was_for_once(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/cli.py"])
    words = ["fit", "--config", "a b.yaml", "--grid.rerun", "all", "--grid.only=[x]", "--grid.seeds", "[1]"]
    assert command(words) == "python cli.py fit --config 'a b.yaml' --grid.seeds '[1]'"


@pytest.mark.parametrize(("seconds", "text"), [(5.4, "5 s"), (75, "1 min 15 s"), (7265, "2 h 1 min")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_key_given_twice_is_refused(run, tmp_path):
    grid = tmp_path / "grid.yaml"
    grid.write_text("grid:\n  name: g\n  cells:\n    a: {model.init_args.lr: 0.1}\n    a: {model.init_args.lr: 0.2}\n")
    status, _, err = run(*fit(tmp_path / "results", "--config", str(grid)))
    assert status == 2
    assert f"{grid}, line 5: 'a' stands twice" in err


def test_a_grid_of_ones_own_gets_the_digits_wherever_it_lies(run, tmp_path):
    grid = tmp_path / "my_grid.yaml"
    grid.write_text((CONFIGS / "grid.yaml").read_text())
    status, out, err = run(
        "fit", "--config", str(grid), "--grid.dry_run", "true", "--grid.results", str(tmp_path / "results")
    )
    assert (status, err) == (0, "")
    assert "/tiny/digits/full_scans=4/" in out


def test_a_truncated_ckpt_path_is_named(run, straight, tmp_path):
    damaged = tmp_path / "last.ckpt"
    damaged.write_bytes((straight["folder"] / "last.ckpt").read_bytes()[:50_000])
    status, _, err = run("test", "--config", str(straight["folder"] / "config.yaml"), "--ckpt_path", str(damaged))
    assert status == 2
    assert str(damaged) in err
    assert "truncated" in err


def test_ckpt_path_beside_a_grid_is_refused(run, tmp_path):
    status, _, err = run(*fit(tmp_path / "results", "--ckpt_path", "x.ckpt"))
    assert status == 2
    assert "--ckpt_path x.ckpt: the runs of a grid go on from their own last.ckpt" in err


def test_a_finished_run_is_not_trained_again_by_hand(run, straight):
    status, _, err = run("cell", str(straight["folder"]))
    assert status == 2
    assert "holds a finished run" in err
    assert record(straight["folder"].parents[3], "full_scans=1")["status"] == "done"


@pytest.mark.parametrize("word", ["--model.in_chans", "--model.num_classes"])
def test_what_follows_the_data_is_not_taken_from_the_command_line(run, tmp_path, word):
    status, _, err = run(*fit(tmp_path / "results", word, "3"))
    assert status == 2
    assert f"{word}: the channels and classes of the network follow the data" in err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--grid.workers", "0"], "grid.workers is 0; expected how many runs train side by side, from 1 up"),
        (
            ["--grid.workers", "2", "--trainer.devices", "2"],
            "grid.workers=2 and 2 devices a run (trainer.devices, trainer.num_nodes): runs side by side share one "
            "device; set one of them to 1",
        ),
    ],
)
def test_workers_that_cannot_be(run, tmp_path, words, error):
    status, _, err = run(*fit(tmp_path / "results", *words))
    assert status == 2
    assert error in err
    assert not list((tmp_path / "results").glob("*/*/*"))
