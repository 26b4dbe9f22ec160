import io

import matplotlib
import numpy as np
import pytest
from matplotlib import image

from msv.ablation.curves import METRICS, curve, plot_curves
from msv.ablation.rows import Row, Table

LOSS, TOP1 = METRICS


def run(losses, status="done", top1=()):
    rows = [{"epoch": epoch, "train_loss": loss} for epoch, loss in enumerate(losses)]
    for row, value in zip(rows, top1, strict=False):
        row["val_top1"] = value
    return {"status": status, "history": rows}


def table(records, baseline="a", groups=None):
    rows = [
        Row(name, {}, "done", {}, None, None, None, {}, None, None, None, group=(groups or {}).get(name, ""))
        for name in records
    ]
    return Table("g", "digits", baseline, "", [], rows, records)


def test_mean_and_deviation_over_seeds():
    found = curve({0: run([2.0, 1.0], top1=[0.5, 0.75]), 1: run([4.0, 1.0], top1=[0.5, 0.25])}, LOSS)
    assert (found.epochs, found.n) == ([1, 2], 2)
    assert found.mean == [3.0, 1.0]
    assert found.std == pytest.approx([2**0.5, 0.0])
    assert curve({0: run([2.0, 1.0], top1=[0.5, 0.75])}, TOP1).mean == [50.0, 75.0]


def test_one_seed_has_no_band_and_only_finished_runs_count():
    found = curve({0: run([2.0, 1.0]), 1: run([9.0, 9.0], "failed"), 2: None, 3: run([9.0], "unfinished")}, LOSS)
    assert (found.mean, found.std, found.n) == ([2.0, 1.0], None, 1)
    assert curve({0: run([9.0], "running"), 1: None}, LOSS) is None
    assert curve({0: run([2.0])}, TOP1) is None


def test_epochs_that_not_all_seeds_have_are_left_out():
    found = curve({0: run([2.0, 1.0, 0.5]), 1: run([4.0, None, 0.5, 0.1])}, LOSS)
    assert (found.epochs, found.mean) == ([1, 3], [3.0, 0.5])


RECORDS = {
    "a": {0: run([2.0, 1.0, 0.5], top1=[0.1, 0.5, 0.8]), 1: run([2.1, 1.2, 0.6], top1=[0.2, 0.4, 0.8])},
    "b": {0: run([2.0, 1.1, 0.7], top1=[0.1, 0.4, 0.7])},
}


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_records_are_the_same_bytes_whatever_the_user_s_style(kind):
    plot = plot_curves(table(RECORDS), kind)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "svg.fonttype": "none"}):
        assert plot_curves(table(RECORDS), kind) == plot
    assert b"Software" not in plot
    assert b"Matplotlib" not in plot
    assert b"date" not in plot.lower()
    other = {**RECORDS, "b": {0: run([2.0, 1.1, 0.71], top1=[0.1, 0.4, 0.7])}}
    assert plot_curves(table(other), kind) != plot


COLOURS = {"baseline": (38, 38, 38), "first": (0, 114, 178), "second": (213, 94, 0)}


def colours(plot):
    """How many pixels have the colour of the baseline, and of the first and second of the other cells."""
    pixels = (image.imread(io.BytesIO(plot))[..., :3] * 255).astype(int)
    return {name: int((np.abs(pixels - colour).sum(axis=-1) < 12).sum()) for name, colour in COLOURS.items()}


def test_a_row_of_axes_for_each_group_with_the_baseline_in_all():
    records = {**RECORDS, "c": RECORDS["b"]}
    one, two = (plot_curves(table(records, groups=groups)) for groups in (None, {"c": "Controls"}))
    shape = [image.imread(io.BytesIO(plot)).shape[:2] for plot in (one, two)]
    assert shape == [(525, 1440), (975, 1440)]
    assert colours(one)["second"] > 100
    assert colours(two)["second"] == 0  # each group begins with the first colour
    assert colours(two)["baseline"] > colours(one)["baseline"] + 300


def test_what_is_not_there_is_not_drawn():
    assert plot_curves(table({"a": {0: None}})) is None
    assert plot_curves(table({"a": {0: run([])}})) is None
    assert plot_curves(table({"a": {0: run([1.0])}}, baseline=None)) is not None  # of one epoch, and of one metric
