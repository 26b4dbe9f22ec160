import errno
import os
from collections import namedtuple
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from msv.ablation import grid as grid_module
from msv.ablation.config import config_hash
from msv.ablation.grid import (
    check_results_root,
    expand,
    read_grid_file,
    recipe_name,
    resolve_runs,
    selected,
    write_grid_file,
)
from msv.ablation.names import format_value, toggle_names
from msv.grid_section import Grid

SCANS = "model.init_args.network.init_args.full_scans"
STATE = "model.init_args.network.init_args.d_state"
LR = "model.init_args.lr"


def base():
    network = {"class_path": "msv.models.MSVMamba", "init_args": {"full_scans": 1, "d_state": 8, "depths": [1, 1]}}
    return {
        "seed_everything": 0,
        "model": {"class_path": "msv.tasks.Classification", "init_args": {"network": network, "lr": 0.001}},
        "data": {"class_path": "msv.data.Digits", "init_args": {"root": "data", "batch_size": 64}},
        "trainer": {"max_epochs": 3, "devices": 1},
    }


def names(grid):
    return [cell.name for cell in expand(grid)]


def test_axes_make_a_product_and_cells_follow():
    grid = Grid("g", axes={SCANS: [0, 4], STATE: [1, 8]}, cells={"slow": {LR: 1e-4}, "run": {}})
    cells = expand(grid)
    assert names(grid) == [
        "full_scans=0,d_state=1",
        "full_scans=0,d_state=8",
        "full_scans=4,d_state=1",
        "full_scans=4,d_state=8",
        "slow",
        "run",
    ]
    assert cells[1].overrides == {SCANS: 0, STATE: 8}
    assert cells[1].toggles == {"full_scans": 0, "d_state": 8}
    assert cells[4].toggles == {"lr": 1e-4}
    assert cells[5].overrides == {}


def test_names_of_values():
    assert names(Grid("g", axes={"a.x": [[1, 2, 5, 2], True, None, 1e-3, "conv", "a b/c"]})) == [
        "x=1-2-5-2",
        "x=true",
        "x=null",
        "x=0.001",
        "x=conv",
        "x=a-b-c",
    ]
    assert format_value({"class_path": "msv.models.TimmModel", "init_args": {"name": "x"}}) == "TimmModel(name=x)"
    assert format_value({"class_path": "msv.models.MSVMamba"}) == "MSVMamba"
    assert format_value({"a": 1, "b": False}) == "a=1, b=false"


def test_toggle_names_are_the_shortest_that_tell_apart():
    keys = ["model.a.lr", "model.b.lr", "lr", "data.size", "data.size"]
    assert toggle_names(keys) == {"model.a.lr": "a.lr", "model.b.lr": "b.lr", "lr": "lr", "data.size": "size"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "grid 'g' is empty; give it `axes`"),
        ({"axes": {SCANS: []}}, "is empty; give it values"),
        ({"axes": {SCANS: 3}}, "expected a list of values, such as [3]"),
        ({"axes": {SCANS: [1, 2, 1]}}, "holds 1 twice in [1, 2, 1]"),
        ({"axes": {SCANS: [1, 1.0]}}, "holds 1.0 twice"),
        ({"axes": {SCANS: ["a b", "a-b"]}}, "two cells are named 'full_scans=a-b'"),
        ({"axes": {SCANS: [{"a": 1}]}}, "makes no name; name such cells under `grid.cells`"),
        ({"axes": {SCANS: ["x" * 300]}}, "expected at most 200"),
        ({"axes": {SCANS: [1]}, "cells": {"full_scans=1": {}}}, "two cells are named 'full_scans=1'"),
        ({"cells": {"SE": {}, "se": {LR: 1}}}, "two cells are named 'se' and 'SE'"),
        (
            {"cells": {"+ SE": {}}},
            "no safe folder name; expected letters, digits and . _ = + , - (no . , - first), such as '+-SE'",
        ),
        ({"cells": {"../up": {}}}, "such as 'up'"),
        ({"cells": {"..": {}}}, "no safe folder name"),
        ({"cells": {"": {}}}, "no safe folder name"),
        ({"cells": {"table.csv": {}}}, "is kept for something else"),
        ({"cells": {"a": {}}, "baseline": "b"}, "grid.baseline 'b' is no cell of grid 'g'; there are: a"),
        ({"cells": {"plain": {}}, "baseline": "plan"}, "did you mean plain?"),
        (
            {"cells": {"plain": {}}, "only": ["plain", "plane"]},
            "'plane', which is no cell of grid 'g'; did you mean plain?",
        ),
        (
            {"cells": {"plain": {}}, "against": {"plain": "plane"}},
            "grid.against names 'plane', which is no cell of grid 'g'; did you mean plain?",
        ),
        ({"cells": {"a": {}}, "against": {"a": "a"}}, "grid.against compares 'a' with 'a'; expected a cell other"),
        (
            {"cells": {"a": {}, "b": {}}, "against": {"a": "b"}, "baseline": "a"},
            "grid.against compares 'a' with 'b'; expected a cell other than itself, and none for the baseline",
        ),
        ({"cells": {"plain": {}}, "groups": {"x": {"plane": ""}}}, "grid.groups names 'plane', which is no cell"),
        ({"cells": {"a": {}}, "groups": {"x": {"a": ""}, "y": {"a": ""}}}, "grid.groups names 'a' twice"),
        ({"cells": {"a": {}}, "seeds": []}, "grid.seeds is empty"),
        ({"cells": {"a": {}}, "seeds": [0, 1, 0]}, "grid.seeds holds 0 twice in [0, 1, 0]"),
        ({"cells": {"a": {}}, "seeds": [-1]}, "grid.seeds holds -1; expected whole numbers"),
        ({"cells": {"a": {"seed_everything": 3}}}, "a grid cannot set 'seed_everything'; use grid.seeds"),
        ({"axes": {"grid.seeds": [1]}}, "a grid cannot set 'grid.seeds'"),
        ({"cells": {"a": {}}, "recipe": "a/b"}, "grid.recipe 'a/b' is no safe folder name"),
        ({"cells": {"a": {}}, "name": "measured"}, "grid.name 'measured' is kept for something else"),
        ({"cells": {"a": {}}, "name": "my grid"}, "such as 'my-grid'"),
    ],
)
def test_what_expand_refuses(settings, message):
    with pytest.raises(ValueError, match=r".+") as error:
        expand(Grid(**{"name": "g", **settings}))
    assert message in str(error.value)


def test_only_narrows_the_selection_not_the_grid():
    grid = Grid("g", axes={SCANS: [0, 1]}, seeds=[0, 5], only=["full_scans=1"])
    runs = resolve_runs(grid, base())
    assert len(runs) == 4
    assert [(run.cell.name, run.seed) for run in selected(grid, runs)] == [("full_scans=1", 0), ("full_scans=1", 5)]


def test_runs_hold_their_config_and_folder():
    grid = Grid("g", axes={SCANS: [0, 1]}, seeds=[0, 5], results="out")
    runs = resolve_runs(grid, base())
    assert [(run.cell.name[-1], run.seed) for run in runs] == [("0", 0), ("0", 5), ("1", 0), ("1", 5)]
    for run in runs:
        assert run.config["seed_everything"] == run.seed
        assert run.config["model"]["init_args"]["network"]["init_args"]["full_scans"] == int(run.cell.name[-1])
        assert run.config_hash == config_hash(run.config)
        assert run.folder == Path("out/g/digits", run.cell.name, f"seed{run.seed}-{run.config_hash}")
    assert len({run.config_hash for run in runs}) == 4


def test_toggles_of_every_cell_are_filled_in():
    other = {"class_path": "msv.models.TimmModel", "init_args": {"name": "x"}}
    cells = {"plain": {}, "lr": {LR: 0.1}, "scans": {SCANS: 4}, "timm": {"model.init_args.network": other}}
    toggles = {run.cell.name: run.cell.toggles for run in resolve_runs(Grid("g", cells=cells), base())}
    assert toggles["plain"] == {"lr": 0.001, "full_scans": 1, "network": "MSVMamba"}
    assert toggles["lr"] == {"lr": 0.1, "full_scans": 1, "network": "MSVMamba"}
    assert toggles["timm"] == {"lr": 0.001, "network": other}


def test_twin_cells_are_refused():
    grid = Grid("g", cells={"a": {SCANS: 1}, "b": {SCANS: 2}, "c": {}})
    with pytest.raises(ValueError, match=r"cells 'a' and 'c' of grid 'g' are the same configuration"):
        resolve_runs(grid, base())
    with pytest.raises(ValueError, match=r"cells 'devices=1' and 'devices=2'"):
        resolve_runs(Grid("g", axes={"trainer.devices": [1, 2]}), base())


def test_an_unknown_key_names_the_cell():
    with pytest.raises(ValueError, match=r"cell 'b' of grid 'g'.*did you mean model\.init_args\.network.*full_scans"):
        resolve_runs(Grid("g", cells={"a": {}, "b": {"model.network.full_scan": 1}}), base())


def test_resolve_checks_and_completes_every_cell():
    def resolve(config):
        if config["model"]["init_args"]["lr"] > 1:
            raise TypeError("lr is 2, expected at most 1")
        return {**config, "filled": True}

    runs = resolve_runs(Grid("g", cells={"a": {}}), base(), resolve)
    assert runs[0].config["filled"]
    with pytest.raises(ValueError, match="cell 'b' of grid 'g': lr is 2, expected at most 1"):
        resolve_runs(Grid("g", cells={"a": {}, "b": {LR: 2}}), base(), resolve)


@pytest.mark.parametrize(
    ("data", "name"),
    [("Digits", "digits"), ("FashionMNIST", "fashion_mnist"), ("CIFAR10", "cifar10"), ("ImageFolder", "image_folder")],
)
def test_recipe_name(data, name):
    grid = Grid("g", cells={"a": {}})
    assert recipe_name(grid, {"data": {"class_path": f"msv.data.{data}"}}) == name
    assert recipe_name(Grid("g", cells={"a": {}}, recipe="mine"), {}) == "mine"
    with pytest.raises(ValueError, match="has no recipe and the config no `data`"):
        recipe_name(grid, {"data": None})


def write(tmp_path, config=None, **settings):
    grid = Grid(**{"name": "g", "axes": {SCANS: [0, 1]}, "results": str(tmp_path), **settings})
    runs = resolve_runs(grid, config or base())
    return read_grid_file(write_grid_file(grid, runs, "python cli.py fit").parent), runs


def test_grid_file_lists_every_run(tmp_path):
    listed, runs = write(tmp_path, seeds=[1, 0], baseline="full_scans=1", only=["full_scans=0"])
    assert {key: listed[key] for key in ("name", "recipe", "baseline", "command", "toggles")} == {
        "name": "g",
        "recipe": "digits",
        "baseline": "full_scans=1",
        "command": "python cli.py fit",
        "toggles": ["full_scans"],
    }
    assert list(listed["cells"]) == ["full_scans=0", "full_scans=1"]
    assert listed["cells"]["full_scans=0"]["toggles"] == {"full_scans": 0}
    for run in runs:
        assert listed["cells"][run.cell.name]["runs"][run.seed] == run.config_hash


def test_grid_file_is_the_same_bytes_again(tmp_path):
    write(tmp_path)
    before = (tmp_path / "g" / "digits" / "grid.yaml").read_bytes()
    write(tmp_path)
    assert (tmp_path / "g" / "digits" / "grid.yaml").read_bytes() == before


def test_grid_file_keeps_other_seeds_while_they_are_current(tmp_path):
    first, _ = write(tmp_path, seeds=[0, 1])
    second, _ = write(tmp_path, seeds=[2])
    assert list(second["cells"]["full_scans=0"]["runs"]) == [0, 1, 2]
    assert second["cells"]["full_scans=0"]["runs"][1] == first["cells"]["full_scans=0"]["runs"][1]

    changed = base()
    changed["trainer"]["max_epochs"] = 5
    third, _ = write(tmp_path, changed, seeds=[2])
    assert list(third["cells"]["full_scans=0"]["runs"]) == [2]


def test_grid_file_follows_a_change_of_one_cell(tmp_path):
    write(tmp_path, axes={}, cells={"a": {LR: 0.1}, "b": {LR: 0.2}, "gone": {LR: 0.3}}, seeds=[0, 1])
    listed, _ = write(tmp_path, axes={}, cells={"a": {LR: 0.1}, "b": {LR: 0.25}}, seeds=[0])
    assert {name: list(cell["runs"]) for name, cell in listed["cells"].items()} == {"a": [0, 1], "b": [0]}


def test_seeds_that_were_not_tested_are_listed_with_their_like_alone(tmp_path):
    validated, runs = write(tmp_path, seeds=[0, 1], test=False)
    assert validated["test"] is False
    assert [run.tested for run in runs] == [False] * len(runs)
    more, _ = write(tmp_path, seeds=[2], test=False)
    assert [sorted(cell["runs"]) for cell in more["cells"].values()] == [[0, 1, 2]] * len(more["cells"])
    tested, runs = write(tmp_path, seeds=[2])
    assert tested["test"] is True
    assert all(run.tested for run in runs)
    for name, cell in tested["cells"].items():
        assert cell["runs"].keys() == {2}
        assert cell["runs"][2] != more["cells"][name]["runs"][2]


def test_grid_file_wants_all_cells(tmp_path):
    grid = Grid("g", axes={SCANS: [0, 1]}, results=str(tmp_path))
    runs = resolve_runs(grid, base())
    with pytest.raises(ValueError, match="the runs lack the cells full_scans=1"):
        write_grid_file(grid, runs[:1], "")


@pytest.mark.parametrize(
    "content",
    ["", "name: [", "name: g", "- 1", "cells: 3\ntoggles: []\nname: g\nrecipe: d\nbaseline: null\ncommand: c\n"],
)
def test_a_damaged_grid_file(tmp_path, content):
    (tmp_path / "grid.yaml").write_text(content)
    with pytest.raises(ValueError, match=r"grid\.yaml .*run `fit` on the grid again"):
        read_grid_file(tmp_path)


def test_hashes_that_look_like_numbers_stay_text(tmp_path):
    write(tmp_path)
    path = tmp_path / "g" / "digits" / "grid.yaml"
    listed = yaml.safe_load(path.read_text())
    listed["cells"]["full_scans=0"]["runs"] = {0: "12345678", 1: "1234e567"}
    path.write_text(yaml.safe_dump(listed))
    assert read_grid_file(path.parent)["cells"]["full_scans=0"]["runs"] == {0: "12345678", 1: "1234e567"}
    path.write_text(path.read_text().replace("'12345678'", "12345678"))
    with pytest.raises(ValueError, match="lists 0: 12345678, expected seed: 8 hex digits"):
        read_grid_file(path.parent)


def test_results_root(tmp_path, monkeypatch):
    check_results_root(tmp_path / "new" / "results")
    assert (tmp_path / "new" / "results").is_dir()
    assert list((tmp_path / "new" / "results").iterdir()) == []

    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"file is a file, expected a folder"):
            check_results_root(path)

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(grid_module, "disk_usage", lambda path: usage(10**9, 10**9 - 5_000_000, 5_000_000))
    with pytest.raises(OSError, match=r"no space for results in .*: 5 MB free, expected at least 200 MB"):
        check_results_root(tmp_path)


def test_results_root_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(grid_module.tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match=r"cannot be written to \(Permission denied\); fix that or choose another"):
        check_results_root(tmp_path)


def test_the_grid_section_is_read_with_its_help(capsys):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Grid, "grid")
    section = {"name": "g", "axes": {SCANS: [0, [1, 2], True, None]}, "cells": {"run": {}, "b": {LR: 0.1}}}
    parsed = parser.parse_string(yaml.safe_dump({"grid": section}))
    assert Grid(**vars(parsed.grid)) == Grid(**section)
    parser.print_help()
    described = " ".join(capsys.readouterr().out.split())
    for phrase in ("the last axis running fastest", "name of the cell that the differences", "for job arrays"):
        assert phrase in described
