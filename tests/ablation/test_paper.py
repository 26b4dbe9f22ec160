import inspect

import pytest

from msv.ablation import paper
from msv.ablation.paper import PAPER_ROWS, TABLE_1, TABLE_6, Printed, paper_row, printed
from msv.models import PRESETS, MSVMamba

TABLE_5 = {"dims": [48, 96, 192, 384], "depths": [2, 2, 6, 2], "d_state": 8, "se": False, "conv_ffn": False}


def network(**arguments):
    return {"class_path": "msv.models.MSVMamba", "init_args": arguments}


@pytest.mark.parametrize(
    ("full_scans", "printed"),
    [
        (0, (5.1, 0.74, 63.1)),
        (1, (4.8, 0.89, 71.9)),
        (2, (5.0, 1.0, 72.0)),
        (3, (5.3, 1.11, 72.5)),
        (4, (5.1, 1.19, 72.3)),
    ],
)
def test_table_5(full_scans, printed):
    row = paper_row(network(**TABLE_5, full_scans=full_scans))
    assert (row.params_m, row.gflops, row.top1) == printed
    assert "Table 5" in row.tables


@pytest.mark.parametrize(
    ("full_scans", "se", "conv_ffn", "d_state", "depths", "printed"),
    [
        (4, False, False, 8, (1, 2, 4, 2), (4.4, 0.87, 69.6)),
        (1, False, False, 8, (2, 2, 6, 2), (4.8, 0.89, 71.9)),
        (1, True, False, 8, (2, 2, 6, 2), (5.3, 0.89, 72.4)),
        (1, True, True, 8, (1, 2, 4, 2), (6.6, 0.94, 74.4)),
        (1, True, True, 1, (1, 2, 5, 2), (6.9, 0.88, 75.1)),
    ],
)
def test_table_4(full_scans, se, conv_ffn, d_state, depths, printed):
    row = paper_row(network(full_scans=full_scans, se=se, conv_ffn=conv_ffn, d_state=d_state, depths=depths))
    assert (row.params_m, row.gflops, row.top1) == printed
    assert "Table 4" in row.tables


def test_one_row_stands_in_both_tables():
    assert [row.name for row in PAPER_ROWS if row.tables == ("Table 4", "Table 5")] == ["+ MS2D (1/3)"]


def test_what_changes_no_network_is_ignored():
    arguments = {
        **TABLE_5,
        "full_scans": 2,
        "in_chans": 1,
        "num_classes": 10,
        "drop_path_rate": 0.1,
        "backend": "parallel",
    }
    assert paper_row(network(**arguments)).top1 == 72.0
    assert paper_row({"class_path": "msv.models.network.MSVMamba", "init_args": arguments}).top1 == 72.0


@pytest.mark.parametrize(
    "change",
    [
        {"depths": [1, 2, 4, 2]},
        {"dims": [64, 128, 256, 512]},
        {"d_state": 16},
        {"carry_state": False},
        {"recurrence": False},
        {"share_half": False},
        {"separate_norms": True},
        {"downsample": "conv"},
        {"ssm_weight_decay": False},
        {"something_new": 1},
    ],
)
def test_another_network_has_no_printed_numbers(change):
    assert paper_row(network(**{**TABLE_5, "full_scans": 2, **change})) is None


@pytest.mark.parametrize(
    "other",
    [
        None,
        {},
        {"class_path": "msv.models.TimmModel", "init_args": {"name": "msvmamba_nano"}},
        {"class_path": "MSVMamba"},
    ],
)
def test_other_networks_have_no_row(other):
    assert paper_row(other) is None


def test_every_argument_of_the_model_is_known_here():
    """A new argument must be sorted in, or every row would lose its printed numbers (or keep wrong ones)."""
    defaults = {
        name: tuple(parameter.default) if isinstance(parameter.default, list) else parameter.default
        for name, parameter in inspect.signature(MSVMamba).parameters.items()
    }
    known = {**paper._CONFIGURED, **paper._PUBLISHED}
    assert set(defaults) == set(known) | paper._IGNORED
    assert {name: defaults[name] for name in known} == known
    assert paper_row(network(**{**defaults, "num_classes": 10})).top1 == 75.1


def test_tables_1_and_6_name_presets_once():
    presets = [row.preset for row in TABLE_1 if row.preset]
    assert len(presets) == len(set(presets)) == 5
    assert set(TABLE_6) < set(presets)
    assert next(row.top1 for row in TABLE_1 if row.preset == "msvmamba_tiny") == 82.8
    assert round(TABLE_6["msvmamba_nano"] / TABLE_6["vmamba_tiny"], 2) == 5.33


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("msvmamba_nano", Printed("6.9", "0.88", ("Table 4",), "+ N=1")),
        ("msvmamba_tiny", Printed("33.0", "4.6", ("Table 7",))),
        ("vmamba_nano", Printed("4.4", "0.87", ("Table 4",), "VMamba-Nano")),
        ("vmamba_small", Printed("44", "11.2", ("Table 1",), "VMamba-B", TABLE_1[11].note)),
        ("vmamba_base", None),
    ],
)
def test_sizes_are_printed_where_they_have_the_most_digits(preset, expected):
    assert printed(network(**PRESETS[preset]), preset) == expected


def test_sizes_keep_the_digits_of_print():
    both = Printed("4.8", "0.89", ("Table 4", "Table 5"), "+ MS2D (1/3)")
    assert printed(network(**TABLE_5, full_scans=2)) == Printed("5.0", "1.00", ("Table 5",), "2/2")
    assert printed(network(**TABLE_5, full_scans=1)) == both
    assert both.source == "Table 4, Table 5: + MS2D (1/3)"
    assert Printed("33.0", "4.6", ("Table 7",)).source == "Table 7"
    assert printed(network(**TABLE_5, full_scans=2, carry_state=False)) is None
    assert printed(None) is None


@pytest.mark.parametrize(
    ("params", "flops", "alike"),
    [
        (5_039_800, 998_000_000, (True, True)),
        (4_949_999, 994_999_999, (False, False)),
        (5_050_001, 1_005_000_001, (False, False)),
    ],
)
def test_rounding_to_what_is_printed(params, flops, alike):
    row = Printed("5.0", "1.00", ("Table 5",), "2/2")
    assert (row.params_alike(params), row.flops_alike(flops)) == alike
