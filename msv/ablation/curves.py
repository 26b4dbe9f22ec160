"""Training curves of a grid: mean over seeds, with a band of their standard deviation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msv.ablation.plots import Picture, drawing
from msv.ablation.rows import Row, Table
from msv.ablation.statistics import mean, sample_std


@dataclass(frozen=True)
class Metric:
    """A column of the history that is drawn.

    Args:
        key: its name there.
        label: of the axis.
        scale: what its values are multiplied by.
    """

    key: str
    label: str
    scale: float


METRICS = (
    Metric("train_loss", "training loss", 1.0),
    Metric("val_top1", "validation top-1, % (EMA)", 100.0),
)
# A tenth of the epochs may leave the axes, or the first one would decide their scale.
_CUT = 0.1
_BASELINE = "0.15"
# Told apart also by those who see fewer colours; the second round is dashed.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_LINES = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Curve:
    """A metric of a cell over the epochs that all its finished seeds have.

    Args:
        epochs: from 1.
        mean: over the seeds, at each of them.
        std: their sample standard deviation; None of a single seed.
        n: how many seeds.
    """

    epochs: Sequence[int]
    mean: Sequence[float]
    std: Sequence[float] | None
    n: int


def curve(runs: Mapping[int, Mapping[str, Any] | None], metric: Metric) -> Curve | None:
    """A cell's curve.

    Args:
        runs: its records by seed; those that are not done are passed over.
        metric: what is drawn.

    Returns:
        None where no finished run has the metric.
    """
    seeds = []
    for record in runs.values():
        if record is None or record["status"] != "done":
            continue
        values = {row["epoch"] + 1: row.get(metric.key) for row in record.get("history") or ()}
        seeds.append({epoch: metric.scale * value for epoch, value in values.items() if value is not None})
    seeds = [values for values in seeds if values]
    epochs = sorted(set.intersection(*(set(values) for values in seeds))) if seeds else []
    if not epochs:
        return None
    points = [[values[epoch] for values in seeds] for epoch in epochs]
    means = [value for value in map(mean, points) if value is not None]
    spreads = [value for value in map(sample_std, points) if value is not None]
    return Curve(epochs, means, spreads or None, len(seeds))


def plot_curves(table: Table, kind: Picture = "png") -> bytes | None:
    """Plot the training loss and the validation accuracy of each cell, a row of axes for each group of cells.

    The baseline is in every row. A tenth of the epochs, the first ones, may lie outside the axes.

    Returns:
        A picture without a date, so that the same table gives the same bytes; None where no run has a history.
    """
    drawn = {
        (row.cell, metric.key): found
        for row in table.rows
        for metric in METRICS
        if (found := curve(table.records[row.cell], metric)) is not None
    }
    metrics = [metric for metric in METRICS if any(key == metric.key for _, key in drawn)]
    groups = [
        (title, [row for row in rows if any((row.cell, metric.key) in drawn for metric in metrics)])
        for title, rows in table.groups.items()
    ]
    groups = [(title, rows) for title, rows in groups if rows]
    if not groups:
        return None
    with drawing((9.6, 0.5 + 3.0 * len(groups)), kind) as (figure, out):
        parts = figure.subfigures(len(groups), 1, squeeze=False)[:, 0]
        for part, (title, rows) in zip(parts, groups, strict=True):
            _draw_group(part, table, title, rows, metrics, drawn)
        seeds = sorted({found.n for found in drawn.values()})
        figure.suptitle(f"{table.name} · {table.recipe} · {_told(seeds)}", fontsize=11, x=0.01, ha="left")
    return out.getvalue()


def _draw_group(
    part: Any,
    table: Table,
    title: str,
    rows: Sequence[Row],
    metrics: Sequence[Metric],
    drawn: Mapping[tuple[str, str], Curve],
) -> None:
    baseline = [row for row in table.rows if row.cell == table.baseline and row not in rows]
    others = [row for row in rows if row.cell != table.baseline]
    styles = {row.cell: (_COLOURS[n % 6], _LINES[n // 6 % 4]) for n, row in enumerate(others)}
    # The baseline last, so that it lies on top, and first in the legend.
    order = [*others, *(row for row in rows if row.cell == table.baseline), *baseline]
    handles = {}
    for axes, metric in zip(part.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        shown = [(row, drawn[row.cell, metric.key]) for row in order if (row.cell, metric.key) in drawn]
        for row, found in shown:
            colour, line = styles.get(row.cell, (_BASELINE, "-"))
            (handles[row.cell],) = axes.plot(
                found.epochs,
                found.mean,
                line,
                color=colour,
                linewidth=1.4,
                marker="." if len(found.epochs) == 1 else "",
            )
            if found.std is not None:
                low = [value - spread for value, spread in zip(found.mean, found.std, strict=True)]
                high = [value + spread for value, spread in zip(found.mean, found.std, strict=True)]
                axes.fill_between(found.epochs, low, high, color=colour, alpha=0.15, linewidth=0)
        _limit(axes, metric, [found for _, found in shown])
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("epoch")
        axes.set_ylabel(metric.label)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if title:
        part.suptitle(title, fontsize=9, x=0.01, ha="left", color="0.3")
    names = [row.cell for row in reversed(order) if row.cell in handles and row.cell == table.baseline]
    names += [row.cell for row in others if row.cell in handles]
    labels = [f"{name} (baseline)" if name == table.baseline else name for name in names]
    part.legend([handles[name] for name in names], labels, loc="outside right upper", fontsize=8, frameon=False)


def _limit(axes: Any, metric: Metric, curves: Sequence[Curve]) -> None:
    """Let the later epochs decide the scale, not the first ones, in which all runs are alike."""
    kept: list[float] = []
    for found in curves:
        first = int(_CUT * len(found.epochs))
        spreads = found.std or [0.0] * len(found.mean)
        for value, spread in list(zip(found.mean, spreads, strict=True))[first:]:
            kept += [value - spread, value + spread]
    low, high = min(kept), max(kept)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)


def _told(seeds: Sequence[int]) -> str:
    if list(seeds) == [1]:
        return "1 seed"
    span = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return f"mean of {span} seeds, bands: ± standard deviation"
