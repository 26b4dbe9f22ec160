import io

import matplotlib
import pytest
from matplotlib import image

from msv.ablation.plots import _dots, _gap, _outside, _overlap, plot_accuracy
from msv.ablation.rows import Row, Table


def table(points, baseline="a", std=None):
    rows = [
        Row(name, {}, "done", {0: top1}, top1, std, None, {"gflops_fvcore_trained": gflops}, None, None, None)
        for name, gflops, top1 in points
    ]
    return Table("g", "digits", baseline, "", [], rows, {})


POINTS = [("a", 0.018, 97.0), ("b", 0.020, 98.0), ("c", 0.0201, 98.0), ("d" * 40, 0.024, 97.9)]


def test_a_png_without_a_date_and_the_same_bytes_whatever_the_user_s_style():
    plot = plot_accuracy(table(POINTS, std=0.2))
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black"}):
        assert plot_accuracy(table(POINTS, std=0.2)) == plot
    pixels = image.imread(io.BytesIO(plot))
    assert pixels.shape[:2] == (690, 1080)
    assert b"Software" not in plot
    assert b"Date" not in plot


def test_the_baseline_is_marked():
    def red(plot):
        pixels = image.imread(io.BytesIO(plot))
        return int(((pixels[..., 0] > 0.7) & (pixels[..., 1] < 0.3) & (pixels[..., 2] < 0.3)).sum())

    assert red(plot_accuracy(table(POINTS))) > 50
    assert red(plot_accuracy(table(POINTS, baseline=None))) == 0


@pytest.mark.parametrize("points", [[], [("a", None, 97.0)], [("a", 0.1, None)]])
def test_nothing_to_plot(points):
    assert plot_accuracy(table(points)) is None


def test_one_point():
    assert plot_accuracy(table(POINTS[:1])) is not None


def test_boxes():
    assert _overlap((0, 0, 4, 4), (2, 3, 9, 9)) == 2
    assert _overlap((0, 0, 1, 1), (2, 0, 3, 1)) == 0
    assert _outside((-1, 0, 1, 2), (0, 0, 9, 9)) == 2
    assert _gap((0, 0, 2, 2), (5, 6)) == 5
    assert _gap((0, 0, 2, 2), (1, 1)) == 0


def test_boxes_along_a_line():
    assert _dots([(0, 0), (0, 18)]) == [(-3, 3, 3, 9), (-3, 9, 3, 15)]
    assert _dots([(0, 0), (3, 4), (3, 4)]) == []
