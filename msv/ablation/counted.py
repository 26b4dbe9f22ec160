"""Parameters and FLOPs of a grid's cells: what a table can say of networks that nobody has trained here."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msv.ablation.markdown import pipe_table
from msv.ablation.names import format_value
from msv.ablation.paper import CONFOUNDED
from msv.ablation.subjects import Subject, grid_rows
from msv.files import write_atomic
from msv.profiling import Counts, profile_model

_NONE = "–"


@dataclass(frozen=True)
class CountedRow:
    """A cell's network, counted at 1x3x224x224 with 1000 classes.

    Args:
        subject: the cell, with the paper's figures of the same network.
        counts: what it costs.
        group: heading under which the row stands, "" for none.
        answers: what the row answers, "" where nothing is said.
    """

    subject: Subject
    counts: Counts
    group: str
    answers: str

    @property
    def rounds_alike(self) -> bool | None:
        """Whether both numbers round to those that the paper prints; None where it prints none."""
        printed, counts = self.subject.printed, self.counts
        if printed is None:
            return None
        return printed.params_alike(counts.params) and printed.flops_alike(counts.flops_fvcore)


def count_grid(file: Path) -> list[CountedRow]:
    """Count a grid's networks; the rows of one group stand together.

    Args:
        file: YAML of the grid.

    Raises:
        OSError: the file cannot be read.
        ValueError: the YAML or a cell of it is not right.
    """
    grid, subjects = grid_rows(file)
    groups = {cell: title for title, cells in grid.groups.items() for cell in cells}
    titles = ["", *grid.groups]
    rows = []
    for subject in sorted(subjects, key=lambda subject: titles.index(groups.get(subject.name, ""))):
        group = groups.get(subject.name, "")
        answers = grid.groups.get(group, {}).get(subject.name, "")
        rows.append(CountedRow(subject, profile_model(subject.factory).counts, group, answers))
    return rows


def write_counts(file: Path, folder: Path) -> list[Path]:
    """Count a grid and write ``<folder>/<grid>.csv`` and ``.md``; returns the two paths."""
    rows = count_grid(file)
    paths = [folder / f"{file.stem}.csv", folder / f"{file.stem}.md"]
    write_atomic(paths[0], render_csv(rows))
    write_atomic(paths[1], render_markdown(file.stem, rows))
    return paths


def render_csv(rows: Sequence[CountedRow]) -> str:
    """A row a cell: parameters to the unit, FLOPs to 10^6, the paper's figures in columns of their own."""
    toggles = _toggles(rows)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    paper = ["paper_params_m", "paper_gflops", "rounds_alike", "paper_tables"]
    writer.writerow(["cell", *toggles, "params", "gflops_fvcore", *paper, "group", "answers"])
    for row in rows:
        subject, printed = row.subject, row.subject.printed
        figures = [""] * len(paper)
        if printed is not None:
            figures = [printed.params_m, printed.gflops, format_value(row.rounds_alike), "; ".join(printed.tables)]
        counted = [str(row.counts.params), _giga(row)]
        writer.writerow([subject.name, *_values(toggles, row, ""), *counted, *figures, row.group, row.answers])
    return out.getvalue()


def render_markdown(name: str, rows: Sequence[CountedRow]) -> str:
    """The page: what is counted and how, a table for each group of rows, what the rows answer."""
    parts = [
        f"# {name} · counted",
        "- **params, GFLOPs**: counted by this code at 1×3×224×224 with 1000 classes; nothing is trained. FLOPs in the "
        "paper's convention: a multiply-accumulate counts once\n"
        "- **paper**: printed in Tables 4 and 5 of arXiv 2405.14174; *alike* where both numbers round to what is "
        "printed" + (f"\n- **Confounded**: {CONFOUNDED[name]}" if name in CONFOUNDED else ""),
    ]
    for group in dict.fromkeys(row.group for row in rows):
        members = [row for row in rows if row.group == group]
        parts += [f"## {group}"] if group else []
        parts.append(_table(_toggles(rows), members))
        answers = [f"- `{row.subject.name}`: {row.answers}" for row in members if row.answers]
        parts += ["\n".join(answers)] if answers else []
    parts.append("Counted again by `python cli.py tables --all`.")
    return "\n\n".join(parts) + "\n"


def _table(toggles: Sequence[str], rows: Sequence[CountedRow]) -> str:
    paper = any(row.subject.printed for row in rows)
    titles = ["cell", *toggles, "params", "GFLOPs"]
    titles += ["*paper: params, M*", "*paper: GFLOPs*", "alike"] if paper else []
    lines = []
    for row in rows:
        printed = row.subject.printed
        line = [row.subject.name, *_values(toggles, row, _NONE), f"{row.counts.params:,}", _giga(row)]
        if paper:
            alike = "yes" if row.rounds_alike else "no"
            line += [f"*{printed.params_m}*", f"*{printed.gflops}*", alike] if printed else [_NONE] * 3
        lines.append(line)
    return pipe_table(titles, lines, words=1 + len(toggles))


def _toggles(rows: Sequence[CountedRow]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.subject.toggles))


def _values(toggles: Sequence[str], row: CountedRow, none: str) -> list[str]:
    values = row.subject.acting
    return [format_value(values[name]) if name in values else none for name in toggles]


def _giga(row: CountedRow) -> str:
    return f"{row.counts.flops_fvcore / 1e9:.3f}"
