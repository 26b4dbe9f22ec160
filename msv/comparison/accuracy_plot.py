"""Fig. 1: accuracy against FLOPs, the paper's points and those measured here told apart."""

import io
from collections.abc import Sequence

from msv.ablation.plots import Point, label_points
from msv.kept import number

from .accuracy import VAL_IMAGES
from .accuracy_table import Table1Row

_COLOURS = (
    "dimgray", "tab:brown", "darkgoldenrod", "tab:purple", "tab:blue", "darkcyan", "tab:green", "tab:red",
)  # fmt: skip


def figure_1(rows: Sequence[Table1Row]) -> bytes:
    """Plot top-1 on ImageNet-1K against FLOPs, a line a family.

    The paper's points are hollow and stand at the FLOPs that it prints; those measured here are filled and stand at the
    FLOPs counted here.

    Returns:
        A PNG without a date, so that the same rows give the same bytes.
    """
    from matplotlib import style  # heavy, and no other table needs it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    families = list(dict.fromkeys(row.system.family for row in rows))
    colours = {family: _COLOURS[number % len(_COLOURS)] for number, family in enumerate(families)}
    points, measured, lines = [], [], []
    # A user's matplotlibrc would change the bytes.
    with style.context("default"):
        figure = Figure(figsize=(8.4, 5.6), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        for family, colour in colours.items():
            printed = [row.system.paper for row in rows if row.system.family == family and row.system.paper]
            lines.append([(row.gflops, row.top1) for row in printed])
            ours = family == "MSVMamba"
            axes.plot(
                [row.gflops for row in printed],
                [row.top1 for row in printed],
                marker="o",
                markersize=8,
                markerfacecolor="white",
                color=colour,
                linewidth=1.6 if ours else 0.8,
                linestyle="--",
                alpha=1.0 if ours else 0.85,
            )
        for row in rows:
            colour = colours[row.system.family]
            if row.system.paper:
                paper = row.system.paper
                points.append(Point(row.system.name, paper.gflops, paper.top1, colour=colour))
            if row.top1 is not None and row.gflops is not None:  # small, so that it fits into the ring of an equal one
                axes.plot(row.gflops, row.top1, marker="D", markersize=4.5, color=colour, zorder=3)
                measured.append(row)
                points.append(Point("" if row.system.paper else row.system.name, row.gflops, row.top1, colour=colour))
        axes.margins(x=0.12, y=0.1)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        ticks = [1, 2, 4, 8, 16]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("GFLOPs at 224×224 (a multiply-accumulate counts once)")
        axes.set_ylabel("top-1 on ImageNet-1K, %")
        axes.set_title("Fig. 1: accuracy against FLOPs", fontsize=11, loc="left")
        hollow = Line2D([], [], marker="o", color="0.3", markerfacecolor="white", linestyle="--", linewidth=0.8)
        filled = Line2D([], [], marker="D", markersize=4.5, color="0.3", linestyle="none")
        axes.legend(
            [hollow, filled],
            ["as the paper prints them (Table 1, arXiv 2405.14174)", _told(measured)],
            loc="lower right",
            fontsize=8,
            frameon=False,
        )
        label_points(figure, axes, points, lines)
        out = io.BytesIO()
        figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


def _told(measured: Sequence[Table1Row]) -> str:
    if not measured:
        return "measured here: none, no weights were given"
    fewer = sum(number(row.evaluation or {}, "images") != VAL_IMAGES for row in measured)
    return "measured here, validation images" + (f" ({fewer} of {len(measured)} on a part of them)" if fewer else "")
