import csv
import io
import json
import re
import shutil

import pytest
import yaml

from msv.ablation.grid import resolve_runs, write_grid_file
from msv.ablation.records import write_record
from msv.ablation.tables import load_table, make_table
from msv.grid_section import Grid

SCANS = "model.init_args.network.init_args.full_scans"
NETWORK = {"dims": [48, 96, 192, 384], "depths": [2, 2, 6, 2], "d_state": 8, "se": False, "conv_ffn": False}
DATA = {
    "name": "digits",
    "train_images": 1077,
    "val_images": 360,
    "test_images": 360,
    "image_size": 32,
    "num_classes": 10,
    "in_chans": 1,
    "augmentation": {"max_shift": 2, "hflip": False},
    "note": "360 test images, one image is 0.28 points",
}
ENV = {"device": "A CPU", "torch": "2.15.0", "triton": None, "python": "3.11.2", "commit": "0123456789ab"}


def base():
    network = {"class_path": "msv.models.MSVMamba", "init_args": {**NETWORK, "full_scans": 1}}
    return {
        "seed_everything": 0,
        "model": {"class_path": "msv.tasks.Classification", "init_args": {"network": network}},
        "data": {"class_path": "msv.data.Digits", "init_args": {}},
    }


def fabricate(root, accuracies, *, baseline="full_scans=1", name="g", against=None, groups=None, test=True, **changes):
    """Write a grid and records as if trained: full_scans -> top-1 by seed (None: a missing run, str: a status)."""
    seeds = list(range(max(len(values) for values in accuracies.values())))
    grid = Grid(name, axes={SCANS: list(accuracies)}, seeds=seeds, baseline=baseline, results=str(root),
                against=against or {}, groups=groups or {}, test=test)  # fmt: skip
    runs = resolve_runs(grid, base())
    write_grid_file(grid, runs, "python cli.py fit --config experiments/g.yaml")
    split = "test" if test else "val"
    for run in runs:
        full_scans = run.cell.overrides[SCANS]
        outcome = accuracies[full_scans][run.seed]
        if outcome is None:
            continue
        status = outcome if isinstance(outcome, str) else "done"
        record = {
            "grid": run.grid,
            "recipe": run.recipe,
            "cell": run.cell.name,
            "seed": run.seed,
            "config_hash": run.config_hash,
            "status": status,
            "network": run.config["model"]["init_args"]["network"],
            "metrics": {f"{split}_top1": outcome, f"{split}_top1_raw": outcome - 0.01} if status == "done" else {},
            "counts": {
                "params": 5_000_400 + full_scans,
                "gflops_fvcore": 0.7 + 0.1 * full_scans,
                "params_trained": 4_500_000,
                "gflops_fvcore_trained": 0.0151 + 0.002 * full_scans,
            },
            "data": DATA,
            "schedule": {"epochs": 30, "global_batch_size": 64, "lr": 0.001, "precision": "32-true"},
            "env": ENV,
            "error": "ValueError: the loss is nan\nat step 7 | batch" if status == "failed" else None,
            **({} if test else {"tested": False}),
            **changes.get(f"{full_scans}-{run.seed}", {}),
        }
        write_record(run.folder / "record.json", record)
    return root / name / "digits"


def read_csv(folder):
    return list(csv.DictReader(io.StringIO((folder / "table.csv").read_text())))


def markdown_rows(folder):
    lines = [line for line in (folder / "table.md").read_text().splitlines() if line.startswith("|")]
    rows = [[value.strip() for value in line.strip("|").split(" | ")] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_columns_and_numbers_of_the_csv(tmp_path):
    folder = fabricate(tmp_path, {1: [0.70, 0.71, 0.67], 4: [0.71, 0.73, 0.70]})
    paths = make_table(folder)
    assert (paths.csv, paths.markdown) == (folder / "table.csv", folder / "table.md")
    header = paths.csv.read_text().splitlines()[0]
    assert header.startswith(
        "cell,full_scans,status,params_m,gflops_fvcore,params_trained_m,gflops_trained,top1_mean,top1_std,n,"
        "delta_mean,delta_low,delta_high,paper_params_m,paper_gflops,paper_top1"
    )
    one, four = read_csv(folder)
    # Differences 1, 2, 3 points: 2 ± 4.3027 / sqrt(3), p = 1 - sqrt(12/14) = 0.0742 (the only test).
    expected = {
        "cell": "full_scans=4",
        "full_scans": "4",
        "status": "done",
        "params_m": "5.000",
        "gflops_fvcore": "1.100",
        "params_trained_m": "4.500",
        "gflops_trained": "0.0231",
        "top1_mean": "71.33",
        "top1_std": "1.53",
        "n": "3",
        "delta_mean": "2.00",
        "delta_low": "-0.48",
        "delta_high": "4.48",
        "paper_params_m": "5.1",
        "paper_gflops": "1.19",
        "paper_top1": "72.3",
        "delta_n": "3",
        "p_holm": "0.0742",
        "differs": "false",
        "top1_raw_mean": "70.33",
        "paper_tables": "Table 5",
        "delta_to": "full_scans=1",
        "group": "",
        "answers": "",
        "split": "test",
    }
    assert four == expected
    assert (one["delta_mean"], one["delta_n"], one["p_holm"], one["differs"]) == ("", "", "", "")
    assert one["paper_tables"] == "Table 4; Table 5"


def test_differs_only_after_holm(tmp_path):
    # Alone both rows have p < 0.05 (t = 5.05 and 4.67, 2 degrees of freedom); of two tests the smaller p is doubled.
    table = load_table(fabricate(tmp_path, {1: [0.5, 0.5, 0.5], 0: [0.51, 0.514, 0.52], 4: [0.51, 0.514, 0.521]}))
    _, zero, four = table.rows
    assert zero.difference.p < four.difference.p < 0.05
    assert zero.p_holm == four.p_holm == pytest.approx(2 * zero.difference.p)
    assert [row.differs for row in table.rows] == [None, False, False]

    clear = load_table(
        fabricate(tmp_path / "clear", {1: [0.5, 0.5, 0.5], 0: [0.6, 0.601, 0.602], 4: [0.5, 0.501, 0.499]})
    )
    assert {row.cell: row.differs for row in clear.rows} == {
        "full_scans=1": None,
        "full_scans=0": True,
        "full_scans=4": False,
    }


def test_one_seed_has_no_interval(tmp_path):
    folder = fabricate(tmp_path, {1: [0.70], 4: [0.7]})
    make_table(folder)
    _, four = read_csv(folder)
    assert (four["delta_mean"], four["top1_std"], four["delta_low"], four["delta_high"]) == ("0.00", "", "", "")
    assert (four["n"], four["p_holm"], four["differs"]) == ("1", "", "")
    assert markdown_rows(folder)[1]["Δ, points"] == "0.00"
    assert markdown_rows(folder)[1]["differs"] == "–"


def test_a_row_against_another_than_the_baseline(tmp_path):
    folder = fabricate(
        tmp_path, {1: [0.70], 2: [0.75], 3: [0.76]}, against={"full_scans=3": "full_scans=2"}, baseline="full_scans=1"
    )
    text = make_table(folder).markdown.read_text()
    one, two, three = read_csv(folder)
    assert [row["delta_to"] for row in (one, two, three)] == ["", "full_scans=1", "full_scans=2"]
    assert [row["delta_mean"] for row in (one, two, three)] == ["", "5.00", "1.00"]
    assert markdown_rows(folder)[2]["Δ to"] == "full_scans=2"
    assert "**Δ to the cell named beside it**" in text


def test_groups_are_tables_of_their_own_with_what_their_rows_answer(tmp_path):
    groups = {"The paper's rows": {"full_scans=2": "two"}, "Controls": {"full_scans=1": "one", "full_scans=9": "x"}}
    with pytest.raises(ValueError, match=r"grid.groups names 'full_scans=9', which is no cell .*full_scans="):
        fabricate(tmp_path, {1: [0.70], 2: [0.75], 3: [0.76]}, groups=groups)
    del groups["Controls"]["full_scans=9"]
    folder = fabricate(
        tmp_path,
        {1: [0.70], 2: [0.75], 3: [0.76]},
        groups=groups,
        **{"1-0": {"network": {"class_path": "x", "init_args": {}}}},
    )
    text = make_table(folder).markdown.read_text()
    # Without a group first, then the groups in the order of the YAML.
    assert [row["full_scans"] for row in read_csv(folder)] == ["3", "2", "1"]
    assert [row["group"] for row in read_csv(folder)] == ["", "The paper's rows", "Controls"]
    assert [row["answers"] for row in read_csv(folder)] == ["", "two", "one"]
    first, paper, controls = re.split(r"^## .*\n", text, flags=re.MULTILINE)
    assert re.findall(r"^## (.*)$", text, flags=re.MULTILINE) == list(groups)
    assert "- `full_scans=2`: two\n" in paper
    assert "- `full_scans=1`: one\n" in controls
    # Where no row is printed in the paper there are no columns for it.
    assert ["*paper: params, M*" in part for part in (first, paper, controls)] == [True, True, False]


def test_what_cuts_a_run_short_and_the_split_are_told(tmp_path):
    short = {
        "schedule": {"epochs": 3, "global_batch_size": 64, "limits": {"max_steps": 7, "limit_test_batches": 2}},
        "data": {**DATA, "test_split": "val"},
    }
    folder = fabricate(tmp_path, {1: [0.7], 4: [0.8]}, **{"1-0": short})
    text = make_table(folder).markdown.read_text()
    assert "**Schedule**: **the records disagree**: 3 epochs, batch 64, lr ?, precision ? (`full_scans=1`); 30" in text
    assert "**Cut short**: **the records disagree**: max_steps 7, limit_test_batches 2 (`full_scans=1`); –" in text
    assert "of the test or val split, last epoch" in text
    text = make_table(fabricate(tmp_path / "whole", {1: [0.7]})).markdown.read_text()
    assert "Cut short" not in text
    assert "of the test split, last epoch" in text


def test_a_table_of_runs_that_are_not_tested_says_so(tmp_path):
    accuracies = {1: [0.70, 0.71], 4: [0.72, 0.74]}
    folder = fabricate(tmp_path, accuracies, test=False)
    make_table(folder)
    tested = fabricate(tmp_path / "tested", accuracies)
    make_table(tested)
    text = (folder / "table.md").read_text()
    assert "- **Not tested**: runs end with validation" in text.partition("- **Data**")[0]
    assert "- **top-1, %**: of the val split" in text
    assert "Not tested" not in (tested / "table.md").read_text()
    one, four = read_csv(folder)
    assert (one["split"], four["split"], four["top1_mean"], four["top1_raw_mean"]) == ("val", "val", "73.00", "72.00")
    # Another run than the tested one, in a folder of its own.
    runs = [{path.parent.name for path in place.glob("*/*/record.json")} for place in (folder, tested)]
    assert not runs[0] & runs[1]

    # Run again with a test, the grid lists none of them.
    fabricate(tmp_path, {1: [0.5], 4: [0.5]}, baseline="full_scans=1")
    table = load_table(folder)
    assert (table.split, [dict(row.top1) for row in table.rows]) == ("test", [{0: 50.0}, {0: 50.0}])


def test_failed_missing_and_mixed_cells(tmp_path):
    rows = {
        0: ["failed", "failed"],
        1: [0.7, 0.71],
        2: [None, None],
        3: [0.72, "failed"],
        4: ["running", "unfinished"],
    }
    folder = fabricate(tmp_path, rows)
    make_table(folder)
    table = {row["full_scans"]: row for row in read_csv(folder)}
    assert {key: row["status"] for key, row in table.items()} == {
        "0": "failed",
        "1": "done",
        "2": "missing",
        "3": "1 done, 1 failed",
        "4": "1 running, 1 unfinished",
    }
    assert table["0"]["top1_mean"] == table["2"]["top1_mean"] == table["2"]["params_m"] == ""
    assert table["0"]["params_m"] == "5.000"
    assert (table["3"]["top1_mean"], table["3"]["n"], table["3"]["delta_n"]) == ("72.00", "1", "1")
    assert table["2"]["n"] == "0"
    text = (folder / "table.md").read_text()
    assert text.count("ValueError: the loss is nan at step 7 | batch") == 3
    assert "- `full_scans=3`, seed 1: ValueError" in text
    assert markdown_rows(folder)[2]["top-1, %"] == "–"


def test_no_record_at_all(tmp_path):
    folder = fabricate(tmp_path, {1: [None], 4: [None]})
    paths = make_table(folder)
    assert paths.plot is None
    assert "no run has left a record yet" in paths.markdown.read_text()
    assert [row["status"] for row in read_csv(folder)] == ["missing", "missing"]


def test_the_head_says_what_the_numbers_are(tmp_path):
    folder = fabricate(tmp_path, {1: [0.70, 0.71], 4: [0.71, 0.73]})
    text = make_table(folder).markdown.read_text()
    for phrase in (
        "# g · digits\n",
        "digits; 1,077 train, 360 val, 360 test images of 1×32×32; 10 classes",
        "max_shift 2, hflip false",
        "30 epochs, batch 64, lr 0.001, precision 32-true",
        "**Seeds**: 0, 1\n",
        "**Commit**: 0123456789ab\n",
        "A CPU; torch 2.15.0, python 3.11.2\n",
        "360 test images, one image is 0.28 points",
        "EMA weights, never the best over epochs",
        "a multiply-accumulate counts once",
        "**Δ to `full_scans=1`**",
        "Holm's correction",
        "ImageNet-1K, 100 epochs",
        "```\npython cli.py fit --config experiments/g.yaml\n```",
        f"`python cli.py tables --grid g/digits --results {tmp_path}`",
    ):
        assert phrase in text
    assert "disagree" not in text
    assert markdown_rows(folder)[0]["cell"] == "full_scans=1 (baseline)"
    assert markdown_rows(folder)[0]["*paper: params, M*"] == "*4.8*"


def test_records_that_disagree_are_all_listed(tmp_path):
    changes = {
        "4-0": {"env": {**ENV, "commit": "fedcba+dirty"}},
        "4-1": {"data": {**DATA, "train_images": 9}, "counts": {"params": 1}},
    }
    text = make_table(fabricate(tmp_path, {1: [0.7, 0.71], 4: [0.71, 0.73]}, **changes)).markdown.read_text()
    assert (
        "**Commit**: **the records disagree**: 0123456789ab (`full_scans=1`, `full_scans=4`); "
        "fedcba+dirty (`full_scans=4`)" in text
    )
    assert "9 train, 360 val, 360 test images of 1×32×32; 10 classes (`full_scans=4`)" in text
    assert "**Schedule**: 30 epochs" in text
    assert "the seeds of full_scans=4 disagree" in text


def test_what_the_grid_varies_is_told_by_cell(tmp_path):
    schedule = {"epochs": 30, "global_batch_size": 64, "lr": 0.001, "precision": "32-true"}
    folder = fabricate(tmp_path, {1: [0.7, 0.71], 4: [0.71, 0.73]})
    listed = yaml.safe_load((folder / "grid.yaml").read_text())
    (folder / "grid.yaml").write_text(yaml.safe_dump({**listed, "toggles": [*listed["toggles"], "init_args.lr"]}))
    paths = sorted(folder.glob("full_scans=4/*/record.json"))
    for path in paths:
        path.write_text(json.dumps({**json.loads(path.read_text()), "schedule": {**schedule, "lr": 0.002}}))
    text = make_table(folder).markdown.read_text()
    assert (
        "**Schedule**: by cell: 30 epochs, batch 64, lr 0.001, precision 32-true (`full_scans=1`); "
        "30 epochs, batch 64, lr 0.002, precision 32-true (`full_scans=4`)\n"
    ) in text
    paths[0].write_text(json.dumps({**json.loads(paths[0].read_text()), "schedule": schedule}))
    assert "**Schedule**: **the records disagree**" in make_table(folder).markdown.read_text()


def test_without_baseline_or_printed_numbers_their_columns_go(tmp_path):
    timm = {"network": {"class_path": "msv.models.TimmModel", "init_args": {"name": "x"}}}
    folder = fabricate(tmp_path, {1: [0.7]}, baseline=None, **{"1-0": timm})
    text = make_table(folder).markdown.read_text()
    assert "Δ" not in text
    assert "paper:" not in text
    assert list(markdown_rows(folder)[0])[-1] == "n"
    assert read_csv(folder)[0]["paper_top1"] == read_csv(folder)[0]["delta_mean"] == ""


def test_the_same_records_give_the_same_bytes(tmp_path):
    folder = fabricate(tmp_path / "here", {1: [0.70, 0.71], 4: [0.71, "failed"]})
    paths = make_table(folder)
    files = (paths.csv, paths.markdown, paths.plot)
    before = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    make_table(folder)
    assert [path.read_bytes() for path in files] == before
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved = make_table(tmp_path / "there" / "g" / "digits")
    assert [path.read_bytes() for path in (moved.csv, moved.markdown, moved.plot)] == before


def test_only_listed_hashes_count(tmp_path):
    folder = fabricate(tmp_path, {1: [0.7]})
    old = next(folder.glob("full_scans=1/seed0-*"))
    shutil.copytree(old, old.with_name("seed0-00000000"))
    make_table(folder)
    assert read_csv(folder)[0]["n"] == "1"
    old.rename(old.with_name("seed0-11111111"))
    paths = make_table(folder)
    assert read_csv(folder)[0]["status"] == "missing"
    assert paths.plot is None
    assert not (folder / "accuracy_vs_flops.png").exists()


def test_a_record_in_another_run_s_folder(tmp_path):
    folder = fabricate(tmp_path, {1: [0.7], 4: [0.8]})
    one, four = (next(folder.glob(f"full_scans={n}/seed0-*")) for n in (1, 4))
    shutil.copy(one / "record.json", four / "record.json")
    with pytest.raises(ValueError, match="is the record of another run"):
        make_table(folder)


def test_a_truncated_record_names_the_file_and_leaves_the_old_table(tmp_path):
    folder = fabricate(tmp_path, {1: [0.7], 4: [0.8]})
    before = make_table(folder).csv.read_bytes()
    path = next(folder.glob("full_scans=4/*/record.json"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"record\.json is truncated or damaged"):
        make_table(folder)
    assert (folder / "table.csv").read_bytes() == before


def test_a_toggle_called_as_a_column(tmp_path):
    config = base()
    config["data"]["init_args"]["n"] = 1
    grid = Grid("g", axes={"data.init_args.n": [1, 2]}, results=str(tmp_path))
    write_grid_file(grid, resolve_runs(grid, config), "")
    make_table(tmp_path / "g" / "digits")
    row = read_csv(tmp_path / "g" / "digits")[1]
    assert (row["toggle_n"], row["n"]) == ("2", "0")


@pytest.mark.parametrize("trained", [True, False])
def test_a_toggle_that_cannot_act_is_not_shown(tmp_path, trained):
    key = "model.init_args.network.init_args.carry_state"
    grid = Grid("g", cells={"one": {SCANS: 1, key: True}, "four": {SCANS: 4, key: True}}, results=str(tmp_path))
    config = base()
    config["model"]["init_args"]["network"]["init_args"]["carry_state"] = True
    runs = resolve_runs(grid, config)
    write_grid_file(grid, runs, "python cli.py fit --config experiments/g.yaml")
    for run in runs if trained else ():
        network = run.config["model"]["init_args"]["network"]
        known = {"grid": "g", "recipe": "digits", "cell": run.cell.name, "seed": 0, "config_hash": run.config_hash}
        write_record(run.folder / "record.json", {**known, "status": "running", "network": network})
    folder = tmp_path / "g" / "digits"
    text = make_table(folder).markdown.read_text()
    assert re.search(r"\| one +\| 1 +\| true ", text)
    assert re.search(r"\| four +\| 4 +\| – ", text)
    assert [row["carry_state"] for row in read_csv(folder)] == ["true", ""]


def test_runs_taken_over_say_what_trained_them(tmp_path):
    def taken(cell):
        command = f"python cli.py fit --config experiments/h.yaml --grid.only '[\"{cell}\"]' --grid.seeds '[0]'"
        return {"trained_as": f"h/digits/{cell}", "command": command}

    changes = {"1-0": taken("full_scans=1"), "4-0": taken("ss2d")}
    folder = fabricate(tmp_path / "all", {1: [0.70], 4: [0.71]}, name="ablate_scans", **changes)
    text = make_table(folder).markdown.read_text()
    command = (
        """python cli.py fit --config experiments/h.yaml --grid.only '["full_scans=1", "ss2d"]' --grid.seeds '[0]'"""
    )
    assert f"2 of 2 runs are taken over from h, where they were trained by\n\n```\n{command}\n```\n\nMade with" in text
    assert "- **Confounded**: weight sets and parameters change with the split; see `controls_scans`\n" in text
    folder = fabricate(tmp_path / "some", {1: [0.70], 4: [0.71]}, **{"4-0": taken("ss2d")})
    text = make_table(folder).markdown.read_text()
    assert "1 of 2 runs are taken over from h" in text
    assert "\n\nTrained, and made again with the records of finished runs, by\n\n```\n" in text
    assert "Confounded" not in text
