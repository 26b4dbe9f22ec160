import re
import shutil

import pytest

from msv.comparison import accuracy, throughput
from msv.files import shipped_grids
from msv.kept import ENVIRONMENT
from msv.publishing import write
from msv.publishing.command import main
from msv.publishing.write import write_all


def test_all_tables(tmp_path, make_grid, capsys):
    folders = [make_grid(tmp_path, name) for name in ("scans", "parts")]
    assert main(["--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for folder in folders:
        assert f"# {folder.parent.name} · quick" in out
        assert f"wrote {folder / 'table.csv'}" in out
        assert (folder / "accuracy_vs_flops.png").is_file()


@pytest.mark.parametrize("chosen", ["scans", "scans/quick"])
def test_the_chosen_table(tmp_path, make_grid, capsys, chosen):
    make_grid(tmp_path, "scans")
    other = make_grid(tmp_path, "parts")
    assert main(["--grid", chosen, chosen, "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("# scans") == 1
    assert not (other / "table.csv").exists()


def test_an_unknown_grid(tmp_path, make_grid):
    make_grid(tmp_path, "ablate_scans")
    with pytest.raises(ValueError, match=r"--grid 'ablate_scan': no such grid in .*; did you mean ablate_scans"):
        main(["--grid", "ablate_scan", "--results", str(tmp_path)])


def test_no_results(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no grid has results in .*python cli\.py fit --config"):
            main(["--results", str(folder)])
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        main(["--results", str(tmp_path / "file")])


def test_the_other_tables_are_made_before_a_damaged_record_is_told_of(tmp_path, make_grid):
    next(make_grid(tmp_path, "a").glob("*/*/record.json")).write_text("{")
    whole = make_grid(tmp_path, "b")
    with pytest.raises(ValueError, match="truncated or damaged"):
        main(["--results", str(tmp_path)])
    assert (whole / "table.csv").is_file()


def test_published_tables_are_not_taken_for_runs(tmp_path, make_grid):
    folder = make_grid(tmp_path)
    published = tmp_path / "measured" / "quick" / "g"
    shutil.copytree(folder, published)
    main(["--results", str(tmp_path)])
    assert not (published / "table.csv").exists()
    main(["--results", str(tmp_path / "measured")])
    assert (published / "table.csv").read_bytes() == (folder / "table.csv").read_bytes()


# --all.


@pytest.fixture
def quick(monkeypatch):
    """One small grid stands for those that are shipped, and a page for the comparison."""

    def compare(out, timed, takes):
        out.mkdir(parents=True)
        (out / "table_1.md").write_text("x")
        return [out / "table_1.md"]

    shipped = [path for path in shipped_grids() if path.stem == "compare_baseline"]
    monkeypatch.setattr(write, "shipped_grids", lambda: shipped)
    monkeypatch.setattr("msv.comparison.write_all", compare)


def test_everything_at_once(results, quick, capsys):
    (results / "measured/quick/g/table.md").unlink()
    assert main(["--all", "--results", str(results)]) == 0
    wrote = capsys.readouterr().out.replace("wrote ", "").split()
    assert [name.removeprefix(f"{results}/") for name in wrote] == [
        "measured/quick/g/table.csv", "measured/quick/g/table.md", "measured/quick/g/accuracy_vs_flops.png",
        "counted/compare_baseline.csv", "counted/compare_baseline.md", "comparison/table_1.md", "README.md",
    ]  # fmt: skip
    text = (results / "README.md").read_text()
    assert "- [compare_baseline: VMamba-Nano against MS2D](counted/compare_baseline.md)" in text
    assert "by `python cli.py compare`:\n\n- [Table 1: the paper's systems](comparison/table_1.md)" in text
    # The runs themselves, which are not published, are left alone.
    assert not (results / "g/quick/table.md").exists()


def test_rows_of_no_known_commit_are_left_out_by_name(results, monkeypatch, capsys):
    monkeypatch.setattr(write, "shipped_grids", lambda: [])
    folder = results / "comparison"
    where = dict.fromkeys(ENVIRONMENT, "1")
    case = {"task": "inference", "precision": "bf16", "mode": "eager", "batch": 128, "size": 224}
    case |= {"status": "done", "images_per_s": 10.0}
    timed, _ = throughput.stores(results / "benchmarks")
    for model, commit in (("vmamba_tiny", "0123456789ab+dirty"), ("msvmamba_tiny", ""), ("msvmamba_nano", "abc")):
        timed.put({"model": model, **case, "command": "c"}, where | {"commit": commit})
    accuracy.store(folder).put({"model": "vmamba_tiny", "top1": 82.2, "images": 9}, where | {"commit": "unknown"})
    assert main(["--all", "--results", str(results)]) == 0
    out = capsys.readouterr().out
    assert f"left out: {folder / 'accuracy.csv'}: vmamba_tiny: its commit is unknown; measure in" in out
    assert f"{timed.path}, row 2: its commit is 0123456789ab+dirty: files differed" in out
    assert f"{timed.path}, row 3: its commit is unknown" in out
    assert out.count("left out: ") == 3
    table = (folder / "table_6.csv").read_text()
    assert "msvmamba_nano" in table
    assert table.count("\n") == 2
    assert not any("dirty" in path.read_text() for path in folder.glob("table_*"))
    index = (results / "README.md").read_text()
    assert re.search(r"\| \[Table 6: throughput in inference\]\(comparison/table_6.md\) \| +1 \| ", index)
    assert "Table 6 by `c`." in index
    assert "dirty" not in index
    # The rows themselves stay; the index speaks of those published alone.
    assert len(timed.read()) == 3

    monkeypatch.setattr("msv.publishing.guard.in_history", lambda commit: False)
    assert main(["--all", "--results", str(results)]) == 0
    assert not list(folder.glob("table_6.*"))
    missing = "Table 6 (throughput) has not been measured yet: `python cli.py compare --measure throughput` on a GPU"
    assert missing in (results / "README.md").read_text()


def test_a_damaged_record_does_not_keep_the_others_from_their_tables(results, quick):
    next((results / "measured/quick/g").glob("*/*/record.json")).write_text("{")
    with pytest.raises(ValueError, match="truncated or damaged"):
        write_all(results)
    assert (results / "counted/compare_baseline.csv").is_file()


def test_all_and_grid_exclude_each_other(results, capsys):
    with pytest.raises(SystemExit):
        main(["--all", "--grid", "g"])
    assert "not allowed with" in capsys.readouterr().err
