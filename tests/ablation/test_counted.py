"""Counts of the shipped grids, their CSV and their page."""

import csv
import io
import re

import pytest

from msv.ablation.counted import count_grid, render_csv, render_markdown
from msv.ablation.paper import PAPER_ROWS
from msv.files import shipped_grids


@pytest.fixture(scope="module")
def components():
    (path,) = [path for path in shipped_grids() if path.stem == "controls_components"]
    return count_grid(path)


def test_counts_of_the_controls(components):
    assert all(
        row.subject.toggles.keys() == {"full_scans", "depths", "se", "conv_ffn", "d_state"} for row in components
    )
    counts = {row.subject.name: (row.counts.params, round(row.counts.flops_fvcore / 1e9, 3)) for row in components}
    assert counts["vmamba_nano"] == (4_435_288, 0.873)
    assert counts["ms2d_equal_depth"] == (4_196_632, 0.663)
    # SE has two products of D × D/8 in each of the nine blocks.
    se = sum(2 * (2 * dim) ** 2 // 8 * depth for dim, depth in zip((48, 96, 192, 384), (1, 2, 4, 2), strict=True))
    assert counts["ms2d_se_equal_depth"][0] - counts["ms2d_equal_depth"][0] == se
    assert counts["vmamba_se"][0] - counts["vmamba_nano"][0] == se
    printed = {row.subject.name: row.subject.printed.row for row in components if row.subject.printed}
    assert set(printed) == {"vmamba_nano", "ms2d", "ms2d_se", "ms2d_se_ffn", "msvmamba_nano", "vmamba_deeper"}
    assert set(printed.values()) <= {row.name for row in PAPER_ROWS}
    assert all(row.rounds_alike for row in components if row.subject.printed)


def test_control_rows_stand_under_their_own_headings(components):
    text = render_markdown("g", components)
    _, paper, depth, on_ms2d, on_ss2d = text.split("\n## ")
    assert paper.startswith("The paper's rows (Table 4)")
    assert "| ms2d_equal_depth " in depth
    assert "*paper: params, M*" not in on_ms2d
    assert "- `vmamba_se`: does SE need MS2D?" in on_ss2d
    table = list(csv.DictReader(io.StringIO(render_csv(components))))
    assert [row["cell"] for row in table] == [row.subject.name for row in components]
    assert (table[1]["paper_params_m"], table[1]["rounds_alike"], table[-1]["paper_params_m"]) == ("4.8", "true", "")


def test_every_grid_that_compares_is_counted():
    assert {path.stem for path in shipped_grids()} == {
        "ablate_components", "ablate_scans", "compare_baseline", "controls_components", "controls_scans",
        "pathfinder_scans",
    }  # fmt: skip


def test_a_toggle_that_cannot_act_is_not_shown():
    (path,) = [path for path in shipped_grids() if path.stem == "controls_scans"]
    rows = count_grid(path)
    table = {row["cell"]: row for row in csv.DictReader(io.StringIO(render_csv(rows)))}
    shown = {name: (row["carry_state"], row["share_half"]) for name, row in table.items()}
    for split in (0, 3, 4):  # no two half routes beside full ones
        assert shown[f"full_scans={split}"] == ("", "")
    assert shown["full_scans=1"] == ("true", "true")
    assert shown["full_scans=2,reset"] == ("false", "true")
    assert shown["full_scans=2,separate"] == ("", "false")  # separate sets carry nothing
    page = render_markdown("controls_scans", rows)
    assert re.search(r"\| full_scans=4 +\| 4 +\| – +\| – +\| 8 ", page)
