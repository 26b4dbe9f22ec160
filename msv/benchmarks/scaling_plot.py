"""Images a second against batch and image size, as a picture."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from msv.profiling.steps import TASKS

AXES = ("batch", "size")


@dataclass(frozen=True)
class Series:
    """A line of the plot.

    Attributes:
        name: of the network.
        task: `inference` or `training`.
        axis: what grows, `batch` or `size`.
        fixed: the other of the two.
        points: what grows, and images a second.
        too_large: where a step did not fit in memory.
    """

    name: str
    task: str
    axis: str
    fixed: int
    points: tuple[tuple[int, float], ...]
    too_large: tuple[int, ...]


def plot(series: Sequence[Series], title: str) -> bytes:
    """A panel for each task and axis, a line for each network; a dashed one falls in proportion to the pixels.

    Crosses at the lower edge stand where a step did not fit in memory.

    Returns:
        A PNG without a date, so that the same numbers give the same bytes.
    """
    from matplotlib import style  # heavy, and no measurement needs it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A user's matplotlibrc would change the bytes.
    with style.context("default"):
        figure = Figure(figsize=(10.5, 7.5), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        names = list(dict.fromkeys(one.name for one in series))
        panels = figure.subplots(len(TASKS), len(AXES), squeeze=False)
        for task, row in zip(TASKS, panels, strict=True):
            for axis, axes in zip(AXES, row, strict=True):
                _panel(axes, [one for one in series if (one.task, one.axis) == (task, axis)], names, task, axis)
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _panel(axes: Any, series: Sequence[Series], names: Sequence[str], task: str, axis: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for one in series:
        colour = f"C{names.index(one.name)}"
        x, y = [point[0] for point in one.points], [point[1] for point in one.points]
        axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.2, label=one.name)
        if axis == "size" and len(one.points) > 1:
            axes.plot(x, [y[0] * (x[0] / side) ** 2 for side in x], "--", color=colour, linewidth=0.7, alpha=0.7)
        if one.too_large:
            # At the lower edge, whatever the speeds are, and those of one place above each other.
            edge = [0.03 + 0.04 * names.index(one.name)] * len(one.too_large)
            axes.plot(one.too_large, edge, "x", color=colour, transform=axes.get_xaxis_transform())
    others = sorted({one.fixed for one in series})
    fixed = ", ".join(f"{other}×{other}" if axis == "batch" else f"batch {other}" for other in others)
    axes.set_title(f"{task}, {fixed}" if fixed else task, fontsize=10, loc="left")
    ticks = sorted({x for one in series for x in (*(point[0] for point in one.points), *one.too_large)})
    axes.set_xticks(ticks, [str(tick) for tick in ticks], fontsize=8, rotation=45 if axis == "size" else 0)
    axes.minorticks_off()
    axes.set_xlabel("images of a batch" if axis == "batch" else "side of the images (dashed: 1 / pixels)")
    axes.set_ylabel("images / s")
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if axis == "size" and any(one.points for one in series):  # once a row; where lines fall there is room
        axes.legend(fontsize=8, frameon=False, loc="upper right")
    if any(one.too_large for one in series):
        axes.annotate("×: does not fit in memory", (0.02, 0.98), fontsize=8, xycoords="axes fraction", va="top")
