"""Runs of a grid that train side by side."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from msv.ablation import cell
from msv.ablation.cell import run_lock, share_threads

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "tests" / "configs"
# How many threads share a sum decides its last bit: every process here has one.
ENVIRONMENT = os.environ | {"PYTHONUNBUFFERED": "1", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}


def fit(results: Path, *words: str, grid: Path = CONFIGS / "grid.yaml") -> list[str]:
    configs = ["--config", str(grid), "--config", str(CONFIGS / "quick.yaml")]
    return [sys.executable, str(ROOT / "cli.py"), "fit", *configs, "--grid.results", str(results), *words]


def done(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=300, check=False)


def records(results: Path, grid: str = "tiny") -> dict[str, dict]:
    paths = sorted((results / grid / "quick").glob("*/seed*/record.json"))
    return {path.parent.relative_to(results).as_posix(): json.loads(path.read_text()) for path in paths}


def trained(record: dict) -> dict:
    """What of a record says what was trained, without the clock."""
    clock = ("seconds", "images_per_second")
    history = [{key: value for key, value in row.items() if key not in clock} for row in record["history"]]
    return {key: value for key, value in record.items() if key not in ("timing", "history")} | {"history": history}


def test_side_by_side_is_the_same_as_one_after_the_other(tmp_path):
    alone = done(fit(tmp_path / "one"))
    together = done(fit(tmp_path / "two", "--grid.workers", "2"))
    assert (alone.returncode, together.returncode) == (0, 0), alone.stderr + together.stderr
    one, two = records(tmp_path / "one"), records(tmp_path / "two")
    assert len(one) == len(two) == 3
    for name, record in two.items():
        assert record["timing"]["workers"] == 2
        assert one[name]["timing"]["workers"] == 1
        record["command"] = record["command"].replace(str(tmp_path / "two"), str(tmp_path / "one"))
        assert trained(record) == trained(one[name])
    tables = [(tmp_path / name / "tiny/quick/table.csv").read_text() for name in ("one", "two")]
    assert tables[0] == tables[1]

    lines = together.stdout.splitlines()
    starts = [line.split()[1] for line in lines if line.startswith("cell") and " starts: " in line]
    assert starts == [f"{number}/3" for number in range(1, 4)]
    assert any("2 running, 0 failed, 1 left" in line for line in lines)
    epochs = [line for line in lines if "epoch" in line and "train loss" in line]
    names = {f"full_scans={n} seed 0" for n in (0, 1, 4)}
    assert len(epochs) == 3 * 3
    assert {line.partition(": epoch ")[0] for line in epochs} == names
    assert not [line for line in alone.stdout.splitlines() if ": epoch " in line]


def test_a_run_that_fails_stops_no_other(tmp_path):
    grid = tmp_path / "grid.yaml"
    content = yaml.safe_load((CONFIGS / "grid.yaml").read_text())
    lr = "model.init_args.lr"
    content["grid"] = {"name": "life", "cells": {"works": {}, "explodes": {lr: 1e30}, "also": {lr: 1e-4}}}
    grid.write_text(yaml.safe_dump(content, sort_keys=False))
    ended = done(fit(tmp_path / "results", "--grid.workers", "2", grid=grid))
    assert ended.returncode == 1, ended.stderr
    found = {record["cell"]: record for record in records(tmp_path / "results", "life").values()}
    assert {name: found[name]["status"] for name in found} == {"works": "done", "explodes": "failed", "also": "done"}
    assert "the loss is" in found["explodes"]["error"]
    assert "2 of 3 done, 1 failed" in ended.stdout


def test_ctrl_c_ends_all_and_they_go_on(tmp_path):
    words = fit(tmp_path, "--grid.workers", "2", "--trainer.max_epochs", "40")
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        waiting = {"full_scans=0 seed 0: epoch 2/40", "full_scans=1 seed 0: epoch 2/40"}
        for line in process.stdout:
            waiting = {word for word in waiting if not line.startswith(word)}
            if not waiting:
                break
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, out
    assert "stopped with 0 of 3 done; to go on, run again" in out
    assert "Traceback" not in out
    stopped = records(tmp_path)
    assert sorted(record["status"] for record in stopped.values()) == ["unfinished", "unfinished"]
    for name in stopped:
        assert (tmp_path / name / "last.ckpt").is_file()
        with run_lock(tmp_path / name).acquire(timeout=0):
            pass
    # The same two go on, for as long as it takes to say so.
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        begun = (line for line in process.stdout if line.startswith("cell "))
        assert ["goes on" in line for _, line in zip(range(2), begun, strict=False)] == [True, True]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def test_two_grids_at_once_train_each_run_once(tmp_path):
    words = fit(tmp_path, "--grid.workers", "2")
    processes = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, cwd=ROOT)
        for _ in range(2)
    ]
    out = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], out
    assert [record["status"] for record in records(tmp_path).values()] == ["done"] * 3
    assert sum(text.count(" done in ") for text in out) == 3


@pytest.mark.parametrize(("workers", "threads"), [(1, None), (3, 5), (32, 1)])
def test_threads_are_shared_out_unless_somebody_has_said_how_many(monkeypatch, workers, threads):
    taken = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    for name in cell._THREAD_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    share_threads(workers)
    assert taken == ([] if threads is None else [threads])
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    share_threads(workers)
    assert len(taken) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_process_that_starts_runs_never_touches_the_gpu(tmp_path):
    words = fit(tmp_path, "--grid.workers", "2", "--trainer.accelerator", "gpu")[2:]
    code = "import sys, cli, torch; status = cli.main(sys.argv[1:]); sys.exit(torch.cuda.is_initialized() or status)"
    ended = done([sys.executable, "-c", code, *words])
    assert ended.returncode == 0, ended.stderr
    assert {record["env"]["device"] for record in records(tmp_path).values()} == {torch.cuda.get_device_name()}
