"""Tables of a grid, made from its records alone: `table.csv`, `table.md` and a plot of accuracy against FLOPs.

Nothing here knows of the clock or of a run's memory: the same records give the same bytes.
"""

import csv
import io
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msv.ablation.grid import read_grid_file, run_folder
from msv.ablation.markdown import render_markdown
from msv.ablation.names import acting, format_value
from msv.ablation.paper import paper_row
from msv.ablation.plots import plot_accuracy
from msv.ablation.records import RECORD_NAME, judged_by, read_record
from msv.ablation.rows import Row, Table
from msv.ablation.statistics import holm, mean, paired_difference, sample_std
from msv.files import write_atomic

PLOT_NAME = "accuracy_vs_flops.png"
# The order in which a cell of several seeds names their states.
_STATES = ("done", "running", "unfinished", "failed", "missing")


@dataclass(frozen=True)
class TablePaths:
    """The files of a table; no plot where no run is done."""

    csv: Path
    markdown: Path
    plot: Path | None


def make_table(folder: Path) -> TablePaths:
    """Make a grid's tables and plot from its ``grid.yaml`` and the records of the runs listed there.

    Args:
        folder: ``results/<grid>/<recipe>``.

    Raises:
        FileNotFoundError: the folder has no ``grid.yaml``.
        ValueError: the grid file or a record is truncated or foreign.
        OSError: a file cannot be written.
    """
    folder = Path(folder)
    table = load_table(folder)
    paths = TablePaths(folder / "table.csv", folder / "table.md", None)
    write_atomic(paths.csv, render_csv(table))
    write_atomic(paths.markdown, render_markdown(table))
    plot = plot_accuracy(table)
    if plot is None:
        # A plot of runs that are current no more would contradict the table beside it.
        (folder / PLOT_NAME).unlink(missing_ok=True)
        return paths
    write_atomic(folder / PLOT_NAME, plot)
    return TablePaths(paths.csv, paths.markdown, folder / PLOT_NAME)


def load_table(folder: Path) -> Table:
    """Read a grid's current records and compute its rows; see `make_table` for the errors."""
    listed = read_grid_file(folder)
    records: dict[str, dict[int, dict[str, Any] | None]] = {
        name: {seed: current_record(folder, name, seed, digest) for seed, digest in sorted(cell["runs"].items())}
        for name, cell in listed["cells"].items()
    }
    metric = f"{judged_by(listed['test'])}_top1"
    top1 = {name: _done(runs, metric) for name, runs in records.items()}
    baseline = listed["baseline"]
    against = {name: listed["against"].get(name, baseline if name != baseline else None) for name in records}
    differences = {name: paired_difference(top1[name], top1.get(other, {})) for name, other in against.items()}
    tested = [difference.p if difference else None for difference in differences.values()]
    corrected = dict(zip(differences, holm(tested), strict=True))

    groups = {name: title for title, cells in listed["groups"].items() for name in cells}
    titles = ["", *listed["groups"]]
    rows = []
    for name in sorted(records, key=lambda name: titles.index(groups.get(name, ""))):
        runs = records[name]
        known = [record for record in runs.values() if record is not None]
        # Numbers come from finished runs first: a failed one may be of an earlier commit.
        known.sort(key=lambda record: record["status"] != "done")
        counts: Mapping[str, Any] = next((record["counts"] for record in known if record.get("counts")), {})
        network = next((record["network"] for record in known if record.get("network")), None)
        rows.append(
            Row(
                cell=name,
                toggles=acting(listed["cells"][name]["toggles"], network),
                status=_status(runs),
                top1=top1[name],
                top1_mean=mean(list(top1[name].values())),
                top1_std=sample_std(list(top1[name].values())),
                top1_raw_mean=mean(list(_done(runs, f"{metric}_raw").values())),
                counts=counts,
                difference=differences[name],
                p_holm=corrected[name],
                paper=paper_row(network),
                against=against[name],
                group=groups.get(name, ""),
                answers=listed["groups"].get(groups.get(name, ""), {}).get(name, ""),
            )
        )
    return Table(
        name=listed["name"],
        recipe=listed["recipe"],
        baseline=baseline,
        command=listed["command"],
        toggles=listed["toggles"],
        rows=rows,
        records=records,
        again=_command_again(folder, listed),
        tested=listed["test"],
    )


def is_kept(folder: Path, listed: Mapping[str, Any]) -> bool:
    """Whether a folder with this ``grid.yaml`` is a published one, ``<measured>/<recipe>/<grid>``."""
    return (folder.parent.name, folder.name) == (listed["recipe"], listed["name"])


def _command_again(folder: Path, listed: Mapping[str, Any]) -> str:
    if is_kept(folder, listed):
        return "python cli.py tables --all"
    command = f"python cli.py tables --grid {listed['name']}/{listed['recipe']}"
    return command if listed["results"] == "results" else f"{command} --results {shlex.quote(listed['results'])}"


def render_csv(table: Table) -> str:
    """The table as CSV: accuracies in percent, differences in points, counts in 10^6 and 10^9, no value as nothing."""
    fixed = [*_csv_fields(table.rows[0]), "split"] if table.rows else []
    # A toggle may be called as a column is; the columns keep their names.
    toggles = [f"toggle_{name}" if name in {"cell", *fixed} else name for name in table.toggles]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["cell", *toggles, *fixed])
    for row in table.rows:
        values = [format_value(row.toggles[name]) if name in row.toggles else "" for name in table.toggles]
        writer.writerow([row.cell, *values, *_csv_fields(row).values(), table.split])
    return out.getvalue()


def _csv_fields(row: Row) -> dict[str, str]:
    difference, paper = row.difference, row.paper
    return {
        "status": row.status,
        "params_m": _fixed(row.params_m, 3),
        "gflops_fvcore": _fixed(row.gflops_fvcore, 3),
        "params_trained_m": _fixed(row.params_trained_m, 3),
        "gflops_trained": _fixed(row.gflops_trained, 4),
        "top1_mean": _fixed(row.top1_mean, 2),
        "top1_std": _fixed(row.top1_std, 2),
        "n": str(row.n),
        "delta_mean": _fixed(difference.mean if difference else None, 2),
        "delta_low": _fixed(difference.low if difference else None, 2),
        "delta_high": _fixed(difference.high if difference else None, 2),
        "paper_params_m": _fixed(paper.params_m if paper else None, 1),
        "paper_gflops": _fixed(paper.gflops if paper else None, 2),
        "paper_top1": _fixed(paper.top1 if paper else None, 1),
        "delta_n": str(difference.n) if difference else "",
        "p_holm": _fixed(row.p_holm, 4),
        "differs": "" if row.differs is None else format_value(row.differs),
        "top1_raw_mean": _fixed(row.top1_raw_mean, 2),
        "paper_tables": "; ".join(paper.tables) if paper else "",
        "delta_to": row.against or "",
        "group": row.group,
        "answers": row.answers,
    }


def _fixed(value: float | None, digits: int) -> str:
    # Adding zero after rounding turns -0.00 into 0.00.
    return "" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def current_record(folder: Path, cell: str, seed: int, digest: str) -> dict[str, Any] | None:
    """The record of a run that a grid lists, None where it has left none; ValueError if it is another run's."""
    path = run_folder(folder, cell, seed, digest) / RECORD_NAME
    if not path.is_file():
        return None
    record = read_record(path)
    found = (record["cell"], record["seed"], record["config_hash"])
    if found != (cell, seed, digest):
        raise ValueError(
            f"{path} is the record of another run: cell, seed and hash are {found}, expected {(cell, seed, digest)}; "
            f"move {path.parent} aside and run the grid again"
        )
    return record


def _done(runs: Mapping[int, Mapping[str, Any] | None], metric: str) -> dict[int, float]:
    """A metric of the finished runs by seed, in percent."""
    return {
        seed: 100 * record["metrics"][metric]
        for seed, record in runs.items()
        if record is not None and record["status"] == "done" and record["metrics"].get(metric) is not None
    }


def _status(runs: Mapping[int, Mapping[str, Any] | None]) -> str:
    states = Counter(record["status"] if record is not None else "missing" for record in runs.values())
    if len(states) <= 1:
        return next(iter(states), "missing")
    return ", ".join(f"{states[state]} {state}" for state in _STATES if states[state])
