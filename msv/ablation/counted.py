"""Parameters and FLOPs of a grid's cells: what a table can say of networks that nobody has trained here."""

import csv
import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from msv.ablation.check import resolve_all
from msv.ablation.grid import Run
from msv.ablation.markdown import pipe_table
from msv.ablation.names import format_value, toggle_names
from msv.ablation.paper import PaperRow, paper_row
from msv.experiment import ExperimentCLI
from msv.files import EXPERIMENTS, write_atomic
from msv.grid_section import Grid
from msv.profiling import count

_NONE = "–"


@dataclass(frozen=True)
class CountedRow:
    """A cell's network at 1x3x224x224 with 1000 classes.

    Args:
        cell: its name.
        toggles: short name -> value.
        params: parameters.
        gflops: FLOPs in 10^9 of the paper's convention.
        paper: the paper's row of the same network.
        group: heading under which the row stands, "" for none.
        answers: what the row answers, "" where nothing is said.
    """

    cell: str
    toggles: dict[str, Any]
    params: int
    gflops: float
    paper: PaperRow | None
    group: str
    answers: str

    @property
    def rounds_alike(self) -> bool | None:
        """Whether both numbers round to those that the paper prints; None where it prints none."""
        if self.paper is None:
            return None
        ours = f"{self.params / 1e6:.1f}", f"{self.gflops:.2f}"
        return ours == (f"{self.paper.params_m:.1f}", f"{self.paper.gflops:.2f}")


def shipped_grids() -> list[Path]:
    """The YAML files of `experiments/` that compare networks."""
    return sorted(path for path in EXPERIMENTS.glob("*.yaml") if path.stem != "train")


def count_grid(file: Path) -> tuple[list[str], list[CountedRow]]:
    """Count a grid's networks, each as its cell resolves.

    Args:
        file: YAML of the grid.

    Returns:
        Short names of the toggles in column order, and the rows, those of one group together.

    Raises:
        ValueError: the YAML or a cell of it is not right.
    """
    found: list[tuple[Grid, list[Run]]] = []

    def take(cli: ExperimentCLI) -> int:
        grid: Grid = replace(cli.grid, seeds=[0])  # type: ignore[type-var,assignment]
        found.append((grid, resolve_all(cli, grid)))
        return 0

    ExperimentCLI(args=["fit", "--config", str(file)], run_grid=take)
    ((grid, runs),) = found
    groups = {cell: title for title, cells in grid.groups.items() for cell in cells}
    titles = ["", *grid.groups]
    rows = []
    for run in sorted(runs, key=lambda run: titles.index(groups.get(run.cell.name, ""))):
        network = run.config["model"]["init_args"]["network"]
        counted = count(_build(network))
        group = groups.get(run.cell.name, "")
        rows.append(
            CountedRow(
                run.cell.name,
                run.cell.toggles,
                counted.params,
                counted.flops_fvcore / 1e9,
                paper_row(network),
                group,
                grid.groups.get(group, {}).get(run.cell.name, ""),
            )
        )
    return list(toggle_names([key for run in runs for key in run.cell.overrides]).values()), rows


def _build(network: dict[str, Any]) -> torch.nn.Module:
    module, _, name = network["class_path"].rpartition(".")
    with torch.device("meta"):
        return getattr(importlib.import_module(module), name)(3, 1000, **network.get("init_args", {}))


def write_counts(file: Path, folder: Path) -> list[Path]:
    """Count a grid and write ``<folder>/<grid>.csv`` and ``.md``; returns the two paths."""
    toggles, rows = count_grid(file)
    paths = [folder / f"{file.stem}.csv", folder / f"{file.stem}.md"]
    write_atomic(paths[0], render_csv(toggles, rows))
    write_atomic(paths[1], render_markdown(file.stem, toggles, rows))
    return paths


def render_csv(toggles: Sequence[str], rows: Sequence[CountedRow]) -> str:
    """A row a cell: parameters to the unit, FLOPs to 10^6, the paper's figures in columns of their own."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    paper = ["paper_params_m", "paper_gflops", "rounds_alike", "paper_tables"]
    writer.writerow(["cell", *toggles, "params", "gflops_fvcore", *paper, "group", "answers"])
    for row in rows:
        printed = [""] * len(paper)
        if row.paper is not None:
            tables, alike = "; ".join(row.paper.tables), format_value(row.rounds_alike)
            printed = [f"{row.paper.params_m:.1f}", f"{row.paper.gflops:.2f}", alike, tables]
        counted = [str(row.params), f"{row.gflops:.3f}"]
        writer.writerow([row.cell, *_values(toggles, row, ""), *counted, *printed, row.group, row.answers])
    return out.getvalue()


def render_markdown(name: str, toggles: Sequence[str], rows: Sequence[CountedRow]) -> str:
    """The page: what is counted and how, a table for each group of rows, what the rows answer."""
    parts = [
        f"# {name} · counted",
        "- **params, GFLOPs**: counted by this code at 1×3×224×224 with 1000 classes; nothing is trained. FLOPs in the "
        "paper's convention: a multiply-accumulate counts once\n"
        "- **paper**: printed in Tables 4 and 5 of arXiv 2405.14174; *alike* where both numbers round to what is "
        "printed",
    ]
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        parts += [f"## {group}"] if group else []
        parts.append(_table(toggles, members))
        answers = [f"- `{row.cell}`: {row.answers}" for row in members if row.answers]
        parts += ["\n".join(answers)] if answers else []
    parts.append("Counted again by `python cli.py tables --all`.")
    return "\n\n".join(parts) + "\n"


def _table(toggles: Sequence[str], rows: Sequence[CountedRow]) -> str:
    paper = any(row.paper for row in rows)
    titles = ["cell", *toggles, "params", "GFLOPs"]
    titles += ["*paper: params, M*", "*paper: GFLOPs*", "alike"] if paper else []
    lines = []
    for row in rows:
        line = [row.cell, *_values(toggles, row, _NONE), f"{row.params:,}", f"{row.gflops:.3f}"]
        if paper:
            alike = "yes" if row.rounds_alike else "no"
            printed = [f"*{row.paper.params_m:.1f}*", f"*{row.paper.gflops:.2f}*", alike] if row.paper else [_NONE] * 3
            line += printed
        lines.append(line)
    return pipe_table(titles, lines, words=1 + len(toggles))


def _values(toggles: Sequence[str], row: CountedRow, none: str) -> list[str]:
    return [format_value(row.toggles[name]) if name in row.toggles else none for name in toggles]
