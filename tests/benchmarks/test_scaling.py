import csv

import pytest
import torch

from msv.benchmarks import command, scaling
from msv.benchmarks.scaling import COLUMNS, as_series, exponent, growth, markdown, series
from msv.benchmarks.scaling_plot import Series, plot
from msv.comparison.systems import SWIN
from msv.kept import ENVIRONMENT
from msv.profiling import networks


@pytest.fixture
def small(monkeypatch):
    """A network that does not care for sizes, and does not fit above a batch of 3."""

    class Means(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(3, networks.CLASSES)

        def forward(self, images):
            if len(images) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TiB")
            return self.linear(images.mean(dim=(2, 3)))

    monkeypatch.setattr(networks, "create", lambda model, size: Means())


def run(folder, *options):
    words = ["scaling", "--device", "cpu", "--threads", "1", "--only", "msvmamba_nano", "--out", str(folder)]
    status = command.main([*words, *options])
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        return status, path.name, list(csv.DictReader(file))


def test_cells_are_kept_and_those_too_large_are_no_failure(tmp_path, small, capsys, clean_commit):
    sizes = ("--batches", "1", "2", "4", "--sizes", "32", "64", "--batch", "1", "--task", "inference")
    status, name, rows = run(tmp_path, *sizes)
    assert (status, name) == (0, "scaling_cpu.csv")
    assert [(row["batch"], row["size"], row["status"]) for row in rows] == [
        ("1", "224", "done"), ("2", "224", "done"), ("4", "224", "does not fit"),
        ("1", "32", "done"), ("1", "64", "done"),
    ]  # fmt: skip
    assert tuple(rows[0]) == (*COLUMNS, *ENVIRONMENT)
    assert (rows[2]["images_per_s"], rows[2]["error"]) == ("", "")
    assert (tmp_path / "scaling_cpu.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "scaling_cpu.md").read_text()
    assert "Against batch, 224×224:" in page and "Against size, batch 1:" in page and f"`{rows[0]['command']}`" in page
    printed = capsys.readouterr().out
    assert "msvmamba_nano, inference, eager, batch 1: time grows as pixels to the power of" in printed
    assert "does not fit" in printed
    assert run(tmp_path, *sizes)[2] == rows
    assert "5 rows are finished and skipped" in capsys.readouterr().out


def test_another_error_is_a_failure(tmp_path, monkeypatch):
    def broken(model, size):
        raise RuntimeError("no")

    monkeypatch.setattr(networks, "create", broken)
    status, name, rows = run(tmp_path, "--quick")
    assert (status, name) == (1, "scaling_cpu_quick.csv")
    assert {row["status"] for row in rows} == {"failed"}


def test_a_network_at_tiny_sizes(tmp_path):
    status, _, rows = run(tmp_path, "--quick", "--batches", "1", "--sizes", "32", "64", "--task", "training")
    assert status == 0
    assert [(row["batch"], row["size"], row["status"]) for row in rows] == [("1", "64", "done"), ("1", "32", "done")]


def test_the_cells_of_a_gpu():
    found = series(torch.device("cuda"), scaling._parser().parse_args([]))
    assert len(found) == 3 * 2 * 2
    assert {case.model for one in found for case in one} == {"msvmamba_nano", "msvmamba_tiny", SWIN}
    batches, sizes = found[0], found[1]
    assert [case.batch for case in batches] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert {case.size for case in batches} == {224}
    assert (sizes[0].size, sizes[-1].size, {case.batch for case in sizes}) == (224, 1024, {32})
    assert all(case.size % 32 == 0 for case in sizes)


def test_swin_is_made_for_the_size():
    with torch.device("meta"):
        network = networks.create(SWIN, 96)
        assert network(torch.empty(1, 3, 96, 96)).shape == (1, 1000)


def test_the_exponent_of_a_power():
    assert exponent([(x, 3 * x**1.5) for x in (1.0, 2.0, 5.0, 7.0)]) == pytest.approx(1.5)


def cells(row):
    options = scaling._parser().parse_args(["--only", "swin_tiny", "--task", "training", "--mode", "compiled"])
    return [[(case, row(case)) for case in one] for one in series(torch.device("cuda"), options)]


def test_growth_and_lines_are_of_the_cells_that_fit():
    def row(case):
        if case.batch > 128 or case.size > 512:
            return {"status": "does not fit", "step_ms": "", "images_per_s": ""}
        return {"status": "done", "step_ms": str(case.size**2), "images_per_s": str(case.batch)}

    found = cells(row)
    (line,) = growth(found)
    assert (
        line
        == f"{SWIN}, training, compiled, batch 32: time grows as pixels to the power of 1.00 from 224×224 to 512×512"
    )
    batches, sizes = as_series(found)
    assert (batches.name, batches.task, batches.axis, batches.fixed) == (
        "swin_tiny, compiled",
        "training",
        "batch",
        224,
    )
    assert batches.points[-1] == (128, 128.0)
    assert batches.too_large == (256, 512)
    assert (sizes.axis, sizes.fixed, sizes.too_large) == ("size", 32, (640, 768, 896, 1024))


def test_the_page():
    def row(batch, size, status="done", mode="eager", **columns):
        found = dict.fromkeys((*COLUMNS, *ENVIRONMENT), "")
        found |= {"model": "m", "task": "training", "mode": mode, "precision": "bf16", "batch": batch, "size": size}
        found |= {"status": status, "device": "H100", "command": "python cli.py benchmark scaling"}
        if status == "done":
            found |= {"images_per_s": "1000", "step_ms": str(int(size) ** 2)}
        return found | columns

    rows = [row("1", "224"), row("2", "224", "does not fit"), row("1", "448"), row("1", "896", "failed", error="no")]
    rows += [row("1", "224", mode="compiled"), row("1", "224", device="another")]
    found = markdown(rows)
    assert found.count("\n## ") == 2
    first = found.partition("## another")[0].splitlines()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in first if line.startswith(("| n", "| `"))]
    heads = ["network", "task", "mode", "precision"]
    assert lines[:3] == [
        [*heads, "1", "2"],
        ["`m`", "training", "eager", "bf16", "1,000.0", "does not fit"],
        ["`m`", "training", "compiled", "bf16", "1,000.0", "–"],
    ]
    assert lines[3:] == [
        [*heads, "224", "448", "896"],
        ["`m`", "training", "eager", "bf16", "1,000.0", "1,000.0", "failed"],
        ["`m`", "training", "compiled", "bf16", "1,000.0", "–", "–"],
    ]
    assert "Growth:\n\n- m, training, eager, batch 1: time grows as pixels to the power of 1.00 from 224" in found
    assert "Failed cells:\n\n- m, training, eager, bf16, 1 of 896×896: no" in found


def test_the_same_numbers_give_the_same_picture():
    lines = [
        Series("one", "inference", "batch", 224, ((1, 10.0), (2, 18.0)), (4,)),
        Series("one", "inference", "size", 8, ((224, 18.0), (448, 4.0)), ()),
        Series("two", "training", "size", 8, (), (224,)),
    ]
    assert plot(lines, "a GPU") == plot(lines, "a GPU")
    assert plot(lines, "a GPU") != plot(lines[:1], "a GPU")


@pytest.mark.parametrize("words", [["--batches", "0"], ["--sizes", "31"]])
def test_sizes_out_of_range(tmp_path, words):
    with pytest.raises(ValueError, match=f"{words[0]} is {words[1]}; expected"):
        command.main(["scaling", "--device", "cpu", "--out", str(tmp_path), *words])


def test_what_is_given_wins_over_quick():
    options = scaling._parser().parse_args(["--quick", "--batch", "3", "--only", "msvmamba_nano"])
    found = series(torch.device("cpu"), options)
    assert {case.batch for case in found[1]} == {3}
    assert {case.size for case in found[0]} == {64}
