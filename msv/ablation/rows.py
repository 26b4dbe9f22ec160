"""The numbers of a table, before they are written as CSV, Markdown or a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msv.ablation.paper import PaperRow
from msv.ablation.statistics import CONFIDENCE, Difference


@dataclass(frozen=True)
class Row:
    """A cell over its seeds.

    Args:
        cell: its name.
        toggles: short name -> value, of those that can act in its network.
        status: "done", "running", "unfinished", "failed" or "missing", with counts where its seeds are not alike.
        top1: top-1 of the table's split in percent by seed, of finished runs.
        top1_mean: their mean.
        top1_std: their sample standard deviation.
        top1_raw_mean: mean top-1 of the raw weights, in percent.
        counts: parameters and FLOPs as the record has them.
        difference: to the baseline in points; None of the baseline itself.
        p_holm: p-value after Holm's correction over the table's rows.
        paper: the paper's row of the same network.
        against: the cell that the difference refers to; None without one.
        group: heading under which the row stands, "" for none.
        answers: what the row answers, "" where nothing is said.
    """

    cell: str
    toggles: Mapping[str, Any]
    status: str
    top1: Mapping[int, float]
    top1_mean: float | None
    top1_std: float | None
    top1_raw_mean: float | None
    counts: Mapping[str, Any]
    difference: Difference | None
    p_holm: float | None
    paper: PaperRow | None
    against: str | None = None
    group: str = ""
    answers: str = ""

    @property
    def n(self) -> int:
        """Number of finished seeds."""
        return len(self.top1)

    @property
    def differs(self) -> bool | None:
        """Whether the row may be said to differ from the baseline; None where nothing can be tested."""
        return None if self.p_holm is None else self.p_holm < 1 - CONFIDENCE

    @property
    def params_m(self) -> float | None:
        """Parameters with 1000 classes, in millions."""
        return _millions(self.counts.get("params"))

    @property
    def gflops_fvcore(self) -> float | None:
        """FLOPs in 10^9 of the paper's convention at 1x3x224x224."""
        return self.counts.get("gflops_fvcore")

    @property
    def params_trained_m(self) -> float | None:
        """Parameters as trained, in millions."""
        return _millions(self.counts.get("params_trained"))

    @property
    def gflops_trained(self) -> float | None:
        """FLOPs in 10^9 of the paper's convention, as trained."""
        return self.counts.get("gflops_fvcore_trained")


@dataclass(frozen=True)
class Table:
    """A grid under one recipe: its rows in order, and the records they come from.

    Args:
        name: of the grid.
        recipe: name of the recipe.
        baseline: cell that differences refer to.
        command: what a user types to run the grid.
        toggles: their short names, in column order.
        rows: one a cell, those of one group together.
        records: cell -> seed -> record; None where a run left none.
        again: what a user types to make the table again from the records.
        tested: whether its runs end with the test split; else with validation, for choices.
    """

    name: str
    recipe: str
    baseline: str | None
    command: str
    toggles: Sequence[str]
    rows: Sequence[Row]
    records: Mapping[str, Mapping[int, Mapping[str, Any] | None]]
    again: str = "python cli.py tables"
    tested: bool = True

    @property
    def split(self) -> str:
        """The split that top-1 is of: "test", "val", or both where the records disagree."""
        if not self.tested:
            return "val"
        runs = [record for cell in self.records.values() for record in cell.values() if record is not None]
        splits = {(record.get("data") or {}).get("test_split", "test") for record in runs}
        return " or ".join(sorted(splits)) or "test"

    @property
    def finished(self) -> list[Mapping[str, Any]]:
        """The records of finished runs."""
        runs = [record for cell in self.records.values() for record in cell.values() if record is not None]
        return [record for record in runs if record["status"] == "done"]

    @property
    def groups(self) -> dict[str, list[Row]]:
        """Rows by the heading under which they stand, in order."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.group, []).append(row)
        return found


def _millions(count: int | None) -> float | None:
    return None if count is None else count / 1e6
