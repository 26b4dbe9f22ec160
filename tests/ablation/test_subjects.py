"""What can be profiled: presets, rows of the grids that train them, other models; and what names are refused."""

import pytest
import yaml

from msv.ablation.paper import PAPER_ROWS
from msv.ablation.subjects import GRIDS, grid_rows, subjects
from msv.files import EXPERIMENTS, shipped_grids
from msv.models import PRESETS

NETWORK = {"class_path": "msv.models.MSVMamba", "init_args": {"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1]}}
ARGUMENTS = "model.init_args.network.init_args"


def write(path, network=NETWORK, **grid):
    path.write_text(yaml.safe_dump({"model": {"init_args": {"network": network}}, "grid": {"name": "mine", **grid}}))
    return path


def test_all_presets_and_every_row_of_both_tables():
    found = subjects()
    assert [s.name for s in found if s.group == "presets"] == list(PRESETS)
    assert [s.group for s in found if s.group != "presets"] == sorted(s.group for s in found if s.group in GRIDS)
    for grid, table in GRIDS.items():
        sources = {s.printed.source for s in found if s.group == grid and s.printed}
        expected = [row for row in PAPER_ROWS if table in row.tables]
        assert len(expected) == 5
        for row in expected:
            assert any(source.endswith(f": {row.name}") for source in sources)


def test_rows_are_the_cells_with_defaults_and_overrides(tmp_path):
    path = write(
        tmp_path / "mine.yaml",
        axes={f"{ARGUMENTS}.full_scans": [1, 4]},
        cells={
            "reset": {f"{ARGUMENTS}.carry_state": False, "trainer.max_epochs": 3},
            "timm": {
                "model.init_args.network": {"class_path": "msv.models.TimmModel", "init_args": {"name": "resnet18"}}
            },
        },
    )
    grid, found = grid_rows(path)
    assert grid.cells.keys() == {"reset", "timm"}
    assert [(s.group, s.name) for s in found] == [
        ("mine", n) for n in ("full_scans=1", "full_scans=4", "reset", "timm")
    ]
    one, four, reset, resnet = (s.factory(3, 10) for s in found)
    assert [m.stem.proj.weight.shape[0] for m in (one, four, reset)] == [8, 8, 8]
    assert one.stages[0].blocks[0].mixer.s6_half.carry_state
    assert not reset.stages[0].blocks[0].mixer.s6_half.carry_state
    assert type(four.stages[0].blocks[0].mixer).__name__ == "SS2D"
    assert type(resnet).__name__ == "ResNet"
    # Of the network alone, resolved; what another network has no such argument for is left out.
    assert found[1].toggles == {"full_scans": 4, "carry_state": True, "network": "MSVMamba"}
    assert found[2].toggles == {"full_scans": 1, "carry_state": False, "network": "MSVMamba"}
    assert found[3].toggles.keys() == {"network"}


def test_by_name_in_order_and_once():
    grid = str(EXPERIMENTS / "compare_baseline.yaml")
    names = ["vmamba_tiny", "resnet18", "ablate_scans/full_scans=3", "ablate_scans", "vmamba_tiny", grid]
    found = [(s.group, s.name) for s in subjects(names)]
    assert found[:3] == [("presets", "vmamba_tiny"), ("timm", "resnet18"), ("ablate_scans", "full_scans=3")]
    assert len(found) == len(set(found))
    assert {("ablate_scans", "full_scans=0"), ("compare_baseline", "ms2d_equal_depth")} <= set(found)


@pytest.mark.parametrize("path", shipped_grids(), ids=lambda path: path.stem)
def test_every_shipped_grid_by_name(path):
    found = subjects([path.stem])
    assert found
    assert {s.group for s in found} == {path.stem}
    assert [s.name for s in subjects([f"{path.stem}/{found[-1].name}"])] == [found[-1].name]


def test_control_rows_have_no_printed_numbers():
    printed = {s.name: s.printed for s in grid_rows(EXPERIMENTS / "compare_baseline.yaml")[1]}
    assert printed["ms2d_equal_depth"] is None
    assert printed["ms2d_paper_depth"].params_m == "4.8"


@pytest.mark.parametrize(
    "name, message",
    [
        ("msvmamba_nan", "no model, grid or row 'msvmamba_nan'; did you mean msvmamba_nano"),
        ("ablate_scan", "did you mean ablate_scans"),
        ("resnet18x", "did you mean resnet18"),
        (
            "zzz",
            "no model, grid or row 'zzz'; there are the presets msvmamba_nano, .*, the grids ablate_components, "
            "ablate_scans, compare_baseline, controls_components, controls_scans, pathfinder_scans, and timm's "
            "models$",
        ),
        ("controls_scans/reset", "no row 'controls_scans/reset'"),
        ("ablate_scans/full_scan=2", "no row 'ablate_scans/full_scan=2'; did you mean .*ablate_scans/full_scans=2"),
    ],
)
def test_unknown_names_are_answered_by_near_ones(name, message):
    with pytest.raises(ValueError, match=message):
        subjects([name])


def test_a_missing_yaml():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        subjects(["nowhere.yaml"])


@pytest.mark.parametrize("text", ["just text", "a: [1", "grid: {name: x}", "model: {init_args: {}}"])
def test_a_yaml_that_is_no_grid(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"bad.yaml is no YAML with model.init_args.network and grid; expected"):
        grid_rows(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    "grid, message",
    [
        ({"cells": {"a": None}}, "grid.cells: 'None' given, expected dict"),
        ({"cells": {"a": {f"{ARGUMENTS}.full_scan": 1}}}, "cell 'a' of grid 'mine': .*full_scan' matches nothing"),
        ({"cells": {"a": {f"{ARGUMENTS}.full_scans": "two"}}}, "cell 'a' of grid 'mine': .*'two' given, expected int"),
        ({"axes": {}}, "grid 'mine' is empty"),
    ],
    ids=["cell", "key", "type", "empty"],
)
def test_a_grid_with_something_wrong(tmp_path, grid, message):
    with pytest.raises(ValueError, match=message):
        grid_rows(write(tmp_path / "mine.yaml", **grid))
