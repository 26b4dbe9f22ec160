import csv

import pytest
import torch

from msv.benchmarks import command, loop
from msv.benchmarks.loop import COLUMNS, RandomImages, markdown, plan, told
from msv.kept import ENVIRONMENT
from msv.profiling import networks, steps


@pytest.fixture
def small(monkeypatch):
    """A network that costs nothing, so that a training is quick."""

    class Means(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, loop.CLASSES)

        def forward(self, images):
            return self.linear(images.mean(dim=(2, 3)))

    monkeypatch.setattr(networks, "create", lambda model, size: Means())


def run(folder, *options):
    status = command.main(["loop", "--device", "cpu", "--threads", "1", "--out", str(folder), *options])
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        return status, path.name, list(csv.DictReader(file))


def test_a_step_of_fit_is_timed_beside_a_bare_one(tmp_path, small, capsys, clean_commit):
    status, name, rows = run(tmp_path, "--steps", "3", "--rounds", "2", "--batch", "2")
    assert (status, name) == (0, "loop_cpu.csv")
    (row,) = rows
    assert tuple(row) == (*COLUMNS, *ENVIRONMENT)
    assert (row["steps"], row["rounds"], row["size"], row["mode"]) == ("3", "2", "32", "eager")
    # The loop takes its part of a millisecond, and this network far less.
    assert float(row["fit_ms"]) > float(row["step_ms"]) > 0
    assert float(row["overhead"]) > 0.03
    assert "MISSED: msvmamba_nano, eager, float32, 2 of 32×32: a step of fit takes" in capsys.readouterr().out
    page = (tmp_path / "loop_cpu.md").read_text()
    assert "- MISSED: msvmamba_nano, eager" in page and f"`{row['command']}`" in page
    assert run(tmp_path, "--steps", "3", "--rounds", "2", "--batch", "2")[2] == rows
    # A shorter run is not taken for it, nor takes its place.
    longer = run(tmp_path, "--steps", "3", "--rounds", "3", "--batch", "2")[2]
    assert [(row["steps"], row["rounds"]) for row in longer] == [("3", "2"), ("3", "3")]
    assert longer[0] == row


def test_quick(tmp_path, small, capsys):
    status, name, _ = run(tmp_path, "--quick", "--precision", "bf16")
    assert (status, name) == (0, "loop_cpu_quick.csv")
    assert "MISSED" not in capsys.readouterr().out


def test_the_stopwatch_counts_whole_steps(small, monkeypatch):
    """Only the steps between its two batches: warming up and the last batch are left out."""
    now = iter(range(100))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(now))
    watch = loop.Stopwatch(first=2, last=5)

    class Module:
        device = torch.device("cpu")

    for batch in range(7):
        watch.on_train_batch_start(None, Module, None, batch)
    assert watch.seconds == 1  # the clock was asked twice


def test_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "create", lambda model, size: 1 / 0)
    status, _, rows = run(tmp_path, "--quick")
    assert (status, rows[0]["status"]) == (1, "failed")


def test_the_plan_of_a_gpu():
    cases = plan(torch.device("cuda"), loop._parser().parse_args([]))
    assert [(case.size, case.mode) for case in cases] == [
        (224, "eager"), (224, "compiled"), (64, "eager"), (64, "compiled")
    ]  # fmt: skip
    assert {(case.batch, case.precision) for case in cases} == {(128, "bf16")}


def test_the_page():
    done = dict.fromkeys((*COLUMNS, *ENVIRONMENT), "") | {"model": "m", "mode": "eager", "precision": "bf16"}
    done |= {"batch": "128", "size": "224", "steps": "50", "rounds": "5", "status": "done", "device": "H100"}
    done |= {"step_ms": "100", "fit_ms": "102.5", "overhead": "0.025", "command": "python cli.py benchmark loop"}
    failed = done | {"model": "n", "status": "failed", "error": "no", "step_ms": "", "fit_ms": "", "overhead": ""}
    found = markdown([done, failed])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines() if line.startswith("| `")]
    assert lines == [
        ["`m`", "eager", "bf16", "128, 224×224", "5 of 50", "100", "102.5", "+2.5%"],
        ["`n`", "eager", "bf16", "128, 224×224", "5 of 50", "failed", "–", "–"],
    ]
    assert "Bars:\n\n- met: m, eager, bf16, 128 of 224×224: a step of fit takes 102.5 ms" in found
    assert "Failed rows:\n\n- n, eager, bf16, 128 of 224×224: failed: no" in found
    assert "Bars:" not in markdown([done], quick=True)


def test_images_for_so_many_batches():
    data = RandomImages(4, 8, 64)
    data.setup("fit")
    assert len(data.train_dataloader()) == 4
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 3, 64, 64)
    assert labels.max() < loop.CLASSES


@pytest.mark.parametrize(("share", "word"), [("0.029", "met"), ("0.031", "MISSED")])
def test_the_bar(share, word):
    row = {"model": "m", "mode": "eager", "precision": "bf16", "batch": "1", "size": "32", "status": "done"}
    assert told(row | {"fit_ms": "1", "step_ms": "1", "overhead": share}, quick=False).startswith(word)


@pytest.mark.parametrize(("mode", "options"), [("compiled", {}), ("compiled-graphs", {"mode": "reduce-overhead"})])
def test_modes_compile_as_torch_knows_it(mode, options, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **options: (network, options))
    assert steps._run_as("network", mode) == ("network", options)


@pytest.mark.parametrize("mode", ["graphs", "compiled-graphs"])
def test_no_cuda_graphs_without_a_gpu(mode):
    with pytest.raises(ValueError, match=f"mode {mode}: a cpu has no CUDA graphs; expected eager or compiled there"):
        steps.random_step(torch.nn.Linear(3, 2), (1, 3, 32, 32), 2, "inference", mode, "float32")


def test_what_is_given_wins_over_quick():
    (case,) = plan(torch.device("cpu"), loop._parser().parse_args(["--quick", "--steps", "4", "--batch", "3"]))
    assert (case.steps, case.rounds, case.batch) == (4, 1, 3)


@pytest.mark.parametrize("words", [["--steps", "0"], ["--rounds", "-1"]])
def test_numbers_out_of_range(tmp_path, words):
    with pytest.raises(ValueError, match=f"{words[0]} is {words[1]}; expected 1 or more"):
        command.main(["loop", "--device", "cpu", "--out", str(tmp_path), *words])
