"""The `grid:` section of an experiment's YAML: what it can say. `msv.ablation.grid` says what it means."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Grid:
    """A grid of runs: what is varied, over which seeds, against which row.

    Args:
        name: of the grid; its results lie in `<results>/<name>/<recipe>`. Letters, digits and ``._=+,-``.
        axes: full dotted key of the config -> list of values; the product of all axes makes the cells, the last axis
            running fastest, named like `full_scans=1,d_state=8`.
        cells: name -> {full dotted key: value}; explicit rows, after those of the axes. `{}` is the base config as it
            is. The keys of axes and cells win over the command line.
        seeds: each cell runs once with each seed (`seed_everything`).
        baseline: name of the cell that the differences of the table refer to.
        against: cell -> the cell that its difference refers to, where that is not the baseline.
        groups: heading -> {cell: what its row answers}; the table's parts, in order. Cells in no group come first.
        recipe: name of the folder under the grid's; by default the overlays' names, or the data's.
        results: folder that takes all results.
        rerun: what to do with runs that have a record: "failed" runs failed ones again and resumes unfinished ones,
            "all" moves every old run aside and starts afresh, "none" starts only runs that have no record.
        dry_run: print the cells and their commands, and train nothing.
        test: whether a run ends with the test split. False ends it with the validation split, to choose by: such runs
            are others than tested ones, and their tables show val top-1.
        only: names of the only cells to run now, for job arrays; the grid and its table stay whole.
    """

    name: str
    axes: dict[str, list[Any]] = field(default_factory=dict)
    cells: dict[str, dict[str, Any]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    baseline: str | None = None
    against: dict[str, str] = field(default_factory=dict)
    groups: dict[str, dict[str, str]] = field(default_factory=dict)
    recipe: str | None = None
    results: str = "results"
    rerun: Literal["failed", "all", "none"] = "failed"
    dry_run: bool = False
    test: bool = True
    only: list[str] = field(default_factory=list)
