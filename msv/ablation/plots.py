"""Accuracy against FLOPs, one point a cell."""

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from msv.ablation.rows import Row, Table

Picture = Literal["png", "svg"]

# Where a label may stand beside its point, in points of the page: (x, y, horizontal, vertical alignment).
_PLACES = [
    (distance * x, distance * y, horizontal, vertical)
    for distance in (8, 16, 26, 38)
    for x, y, horizontal, vertical in (
        (0, 1, "center", "bottom"),
        (1, 0, "left", "center"),
        (0, -1, "center", "top"),
        (-1, 0, "right", "center"),
        (0.7, 0.7, "left", "bottom"),
        (0.7, -0.7, "left", "top"),
        (-0.7, 0.7, "right", "bottom"),
        (-0.7, -0.7, "right", "top"),
    )
]
# A label that lies nearer to another point is as bad as one that covers this many pixels.
_MISLEADING = 200.0


@dataclass(frozen=True)
class Point:
    """A point to be labelled, in the units of its axes.

    Args:
        name: its label; empty for none.
        x: where it lies.
        y: where it lies.
        spread: length of its error bar, up and down.
        colour: of the label.
    """

    name: str
    x: float
    y: float
    spread: float = 0.0
    colour: str = "black"


@contextmanager
def drawing(size: tuple[float, float], kind: Picture) -> Iterator[tuple[Any, io.BytesIO]]:
    """A figure to draw on, and the buffer that has the picture of it afterwards.

    Args:
        size: width and height in inches.
        kind: of the picture, which has no date in it and nothing of a user's matplotlibrc: the same drawing gives the
            same bytes. An SVG's letters are paths, which look alike everywhere.
    """
    from matplotlib import rc_context, style  # heavy, and a table without a finished run needs none of it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out = io.BytesIO()
    with style.context("default"), rc_context({"svg.hashsalt": "msv"}):
        figure = Figure(figsize=size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure, out
        metadata = {"Software": None} if kind == "png" else {"Creator": None, "Date": None}
        figure.savefig(out, format=kind, metadata=metadata)


def plot_accuracy(table: Table, kind: Picture = "png") -> bytes | None:
    """Plot the measured top-1 of each cell against its FLOPs as trained.

    The paper's numbers are not in it: they are of other data or another schedule.

    Returns:
        A picture without a date, so that the same table gives the same bytes; None where no cell is finished.
    """
    rows = [row for row in table.rows if row.top1_mean is not None and row.gflops_trained is not None]
    if not rows:
        return None
    with drawing((7.2, 4.6), kind) as (figure, out):
        axes = figure.add_subplot()
        for row in rows:
            _draw(axes, row, baseline=row.cell == table.baseline)
        axes.margins(x=0.14, y=0.18)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("GFLOPs as trained (a multiply-accumulate counts once)")
        axes.set_ylabel(f"{table.split} top-1, % (last epoch, EMA)")
        axes.set_title(f"{table.name} · {table.recipe} · {_seeds(rows)}", fontsize=11, loc="left")
        axes.ticklabel_format(useOffset=False)
        label_points(
            figure,
            axes,
            [
                Point(
                    f"{row.cell} (baseline)" if row.cell == table.baseline else row.cell,
                    row.gflops_trained or 0.0,
                    row.top1_mean or 0.0,
                    row.top1_std or 0.0,
                )
                for row in rows
            ],
        )
    return out.getvalue()


def _draw(axes: Any, row: Row, *, baseline: bool) -> None:
    axes.errorbar(
        row.gflops_trained,
        row.top1_mean,
        yerr=row.top1_std,
        fmt="D" if baseline else "o",
        color="tab:red" if baseline else "tab:blue",
        ecolor="0.6",
        markersize=6,
        capsize=3,
        elinewidth=1,
    )


def _seeds(rows: Sequence[Row]) -> str:
    numbers = sorted({row.n for row in rows})
    if numbers == [1]:
        return "1 seed"
    span = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return f"{span} seeds, bars: standard deviation"


def label_points(
    figure: Any, axes: Any, points: Sequence[Point], lines: Sequence[Sequence[tuple[float, float]]] = ()
) -> None:
    """Name the points, each label where it covers the least of what is drawn and lies nearest to its own point.

    Args:
        figure: laid out, on a canvas of its own.
        axes: whose limits and scales are settled.
        points: those without a name are only kept clear of labels.
        lines: drawn, each through these (x, y): labels keep clear of them, too.
    """
    from matplotlib.text import Text

    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer).extents
    taken: list[Sequence[float]] = []
    places: list[tuple[float, float]] = []
    for point in points:
        ends = [(point.x, value) for value in (point.y - point.spread, point.y, point.y + point.spread)]
        (x, low), (_, middle), (_, high) = axes.transData.transform(ends)
        taken.append((x - 9, low - 9, x + 9, high + 9))
        places.append((x, middle))
    for line in lines:
        taken += _dots([axes.transData.transform(end) for end in line])
    for point, own in zip(points, places, strict=True):
        if not point.name:
            continue
        tried: list[tuple[float, int, tuple[float, float, str, str], Sequence[float]]] = []
        for place in _PLACES:
            label = _annotate(axes, point, *place)
            label.update_positions(renderer)
            # Text's own extent: that of an annotation takes in the line to its point, too.
            box = Text.get_window_extent(label, renderer).extents
            label.remove()
            cost = sum(_overlap(box, other) for other in taken) + _outside(box, frame)
            cost += _MISLEADING * sum(_gap(box, other) < _gap(box, own) for other in places)
            tried.append((cost, len(tried), place, box))
        _, _, place, best = min(tried, key=lambda entry: entry[:2])
        _annotate(axes, point, *place)
        taken.append(best)


def _annotate(axes: Any, point: Point, x: float, y: float, horizontal: str, vertical: str) -> Any:
    far = x * x + y * y > 10**2
    label = axes.annotate(
        point.name,
        (point.x, point.y),
        xytext=(x, y),
        textcoords="offset points",
        ha=horizontal,
        va=vertical,
        fontsize=8,
        color=point.colour,
        arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkB": 4} if far else None,
    )
    label.set_in_layout(False)
    return label


def _dots(line: Sequence[tuple[float, float]], width: float = 6.0) -> list[Sequence[float]]:
    """Boxes along a line of the page, as far apart as they are wide, in pixels."""
    boxes: list[Sequence[float]] = []
    for (x, y), (to_x, to_y) in pairwise(line):
        count = int(math.hypot(to_x - x, to_y - y) / width)
        for number in range(1, count):
            at_x, at_y = x + (to_x - x) * number / count, y + (to_y - y) * number / count
            boxes.append((at_x - width / 2, at_y - width / 2, at_x + width / 2, at_y + width / 2))
    return boxes


def _overlap(one: Sequence[float], other: Sequence[float]) -> float:
    """Area that two boxes (left, bottom, right, top) share, in pixels."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _outside(box: Sequence[float], frame: Sequence[float]) -> float:
    """Area of a box beyond a frame, in pixels."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)


def _gap(box: Sequence[float], point: tuple[float, float]) -> float:
    """Distance from a point to a box, in pixels."""
    return math.hypot(
        max(box[0] - point[0], 0.0, point[0] - box[2]),
        max(box[1] - point[1], 0.0, point[1] - box[3]),
    )
