"""The differences from the published model: measured, kept with their place, guarded, told when they are too large."""

import csv
import shutil

import pytest
import torch

from msv.models import MSVMamba, load_published
from msv.models.published import infer_arguments
from msv.publishing import goldens, write
from msv.publishing.goldens import FOLDER, QUANTITIES, differences, main
from msv.publishing.index import write_index

SPLIT = "small_split13"


@pytest.fixture
def golden():
    return torch.load(FOLDER / f"{SPLIT}.pt", weights_only=True)


def read(folder):
    return list(csv.DictReader((folder / "goldens.csv").read_text().splitlines()))


def test_the_command(tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--backend", "auto"]) == 0
    rows = read(tmp_path)
    assert {row["golden"] for row in rows} == {path.stem for path in FOLDER.glob("*.pt")}
    assert len(rows) == 3 * len(QUANTITIES)
    assert all(0 < float(row["difference"]) <= float(row["tolerance"]) for row in rows)
    assert {row["command"] for row in rows} == {"python cli.py goldens --backend auto"}
    assert all(row["device"] and row["torch"] and row["commit"] for row in rows)
    assert {(row["golden"], row["network"]) for row in rows} == {
        ("small_ss2d", "SS2D, N = 8"), (SPLIT, "MS2D 1/3, N = 8"), ("small_full_n1", "MS2D 1/3, N = 1, SE, ConvFFN"),
    }  # fmt: skip
    page = (tmp_path / "goldens.md").read_text()
    assert page in capsys.readouterr().out
    assert page.count(" yes |") == 3
    # Measured again, a row takes the place of the one before.
    assert main(["--out", str(tmp_path), "--backend", "auto"]) == 0
    assert len(read(tmp_path)) == len(rows)


@pytest.mark.parametrize(
    ("set_of", "quantity"), [("logits", "logits"), ("norm", "maps"), ("grad_input", "input gradient")]
)
@pytest.mark.parametrize("wrong", [1e-4, float("nan")])
def test_a_difference_that_is_too_large_is_told(tmp_path, golden, set_of, quantity, wrong, capsys):
    case = golden["cases"]["64x64"]
    (case["stages"] if set_of == "norm" else case)[set_of].view(-1)[0] += wrong
    torch.save(golden, tmp_path / f"{SPLIT}.pt")
    assert main(["--goldens", str(tmp_path), "--out", str(tmp_path), "--backend", "auto"]) == 1
    assert [row["quantity"] for row in read(tmp_path) if not goldens.agrees(row)] == [quantity]
    assert "  NO |" in capsys.readouterr().out
    (worst,) = [row for row in goldens.largest(read(tmp_path)) if row["quantity"] == quantity]
    assert not goldens.agrees(worst)


def test_another_model_is_told_apart(golden):
    """The nearest wrong one: half routes that carry no state."""
    model = MSVMamba(**infer_arguments(golden["state_dict"]), carry_state=False).eval()
    load_published(model, golden["state_dict"])
    found = differences(model, golden["cases"]["64x64"], torch.device("cpu"))
    assert all(difference > quantity.tolerance for quantity, difference in found.items())


def test_a_row_without_a_difference_does_not_agree():
    assert not goldens.agrees({"difference": "", "tolerance": "1"})


def test_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no \*\.pt in .*; expected the goldens of a checkout"):
        main(["--goldens", str(tmp_path), "--out", str(tmp_path)])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device is cuda, but torch finds no GPU"):
            main(["--device", "cuda"])


def test_what_is_published(results, where, monkeypatch):
    monkeypatch.setattr(write, "shipped_grids", lambda: [])
    folder = results / "comparison"
    row = {"network": "SS2D", "size": "64x64", "backend": "auto", "tolerance": 3e-6, "measure": "m", "command": "c"}
    for golden, difference, commit in (("a", 2e-6, "abc"), ("b", 1e-6, "abc"), ("c", 2.9e-6, "abc+dirty")):
        kept = {"golden": golden, "quantity": "logits", "difference": difference, **row}
        goldens.store(folder).put(kept, where | {"commit": commit})
    written = write.write_all(results)
    assert folder / "goldens.md" in written.files
    assert [line for line in written.left_out if "goldens" in line] == [
        f"{folder / 'goldens.csv'}: c, 64x64, auto, logits, a device: its commit is abc+dirty: files differed from it; "
        "commit them and measure again"
    ]
    page = (folder / "goldens.md").read_text()
    assert "| a " in page
    assert "| c " not in page
    section = write_index(results).read_text().partition("## Agreement with the published model")[2]
    assert "| logits  | 2.0e-06    | 3e-06   | m        | `a`, SS2D, 64x64 |" in section
    assert "(comparison/goldens.md)" in section
    assert "By `c`." in section

    shutil.copy(folder / "goldens.csv", results / "copy.csv")
    monkeypatch.setattr("msv.publishing.guard.in_history", lambda commit: False)
    write.write_all(results)
    assert not (folder / "goldens.md").exists()
    assert "Agreement" not in (results / "README.md").read_text()
    assert (folder / "goldens.csv").read_bytes() == (results / "copy.csv").read_bytes()
