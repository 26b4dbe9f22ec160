import pytest
import torch

from msv.comparison import accuracy, write_all
from msv.comparison.command import main
from msv.profiling import networks, steps

COUNTED = {"table_1.md", "table_1.csv", "fig_1.png", "table_7.md", "table_7.csv"}


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_write_all(tmp_path):
    paths = write_all(tmp_path / "new", tmp_path / "timed")
    assert {path.name for path in paths} == COUNTED
    assert all(path.is_file() for path in paths)


def test_counts(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--timed", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "# Table 1" in out
    assert "# Table 7" in out
    assert f"wrote {tmp_path / 'fig_1.png'}" in out


def test_throughput_on_a_cpu(tmp_path, capsys, means, monkeypatch, clean_commit):
    def make_step(case, device):
        return steps.random_step(means, (case.batch, 3, 32, 32), 1000, case.task, case.mode, case.precision)

    monkeypatch.setattr(networks, "make_step", make_step)
    monkeypatch.setattr(networks, "ON_CPU", networks.QUICK)
    words = ["--out", str(tmp_path / "tables"), "--timed", str(tmp_path / "timed"), "--size", "32"]
    words += ["--measure", "throughput", "--only", "vmamba_tiny", "swin_tiny"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "throughput on the CPU (no GPU is used): 2 rows of batch 2, 32×32" in out
    assert "2/2 swin_tiny_patch4_window7_224, inference, eager, float32, 2 of 32×32: " in out
    assert "# Table 6" in out
    assert (
        "`python cli.py compare --only vmamba_tiny swin_tiny_patch4_window7_224 --measure throughput --size 32`" in out
    )
    assert {path.name for path in (tmp_path / "tables").iterdir()} == COUNTED | {"table_6.md", "table_6.csv"}
    assert [path.name for path in (tmp_path / "timed").iterdir()] == ["network_cpu.csv"]
    assert main(words) == 0
    assert "2 rows are finished" in capsys.readouterr().out


def test_a_failed_row_makes_the_exit_status_1(tmp_path, capsys, monkeypatch):
    def make(case, device):
        raise RuntimeError("no memory")

    monkeypatch.setattr(networks, "make_step", make)
    folders = ["--out", str(tmp_path), "--timed", str(tmp_path)]
    assert main([*folders, "--measure", "throughput", "--only", "vmamba_tiny"]) == 1
    assert "failed: RuntimeError: no memory" in capsys.readouterr().out
    assert "failed" in (tmp_path / "table_6.md").read_text()


def test_accuracy(tmp_path, capsys, means, imagenet, monkeypatch):
    monkeypatch.setattr(accuracy, "load", lambda weights: means)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "vmamba_tiny.pth").touch()
    words = ["--out", str(tmp_path / "out"), "--weights", str(tmp_path / "weights"), "--data-root", str(imagenet)]
    words += ["--timed", str(tmp_path)]
    assert main([*words, "--workers", "0"]) == 0
    out = capsys.readouterr().out
    assert "vmamba_tiny: 83.333% of 6 images (vmamba_tiny.pth)" in out
    assert "6 of 50,000" in out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--weights", "a"], "--weights needs --data-root"),
        (["--data-root", "a"], "--data-root needs --weights"),
        (["--device", "cuda"], "torch finds no GPU"),
        (["--measure", "throughput", "--only", "swin_tini"], "'swin_tini' is no model .*did you mean swin_tiny"),
        (["--only", "swin_tiny"], "--only belongs to --measure throughput or --weights"),
        (["--mode", "eager"], "--mode belongs to --measure throughput"),
        (["--size", "64"], "--size belongs to --measure throughput"),
        (["--measure", "throughput", "--size", "8"], "--size is 8; expected 32 or more"),
        (["--measure", "throughput", "--batch", "-1"], "--batch is -1; expected 1 or more"),
        (["--measure", "throughput", "--batch", "0"], "--batch is 0; expected 1 or more"),
    ],
)
def test_bad_words(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        main(["--out", str(tmp_path), "--timed", str(tmp_path), *words])
    assert not list(tmp_path.iterdir())
