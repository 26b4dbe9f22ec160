"""The index of what is published, `results/README.md`, made from what lies beside it."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msv.ablation.grid import GRID_FILE
from msv.ablation.markdown import commands_elsewhere, describe_data, grids_elsewhere, machine, pipe_table
from msv.ablation.paper import CONFOUNDED
from msv.ablation.rows import Table
from msv.ablation.tables import load_table
from msv.comparison import accuracy, throughput
from msv.files import EXPERIMENTS, shipped_grids, write_atomic
from msv.kept import Row
from msv.publishing import goldens
from msv.publishing.guard import row_problem
from msv.publishing.timed import TIMED, TimedTable, timed_tables

MEASURED, COUNTED, COMPARED = "measured", "counted", "comparison"
"""What `results/` holds that git tracks, beside what is timed."""

_INTRODUCTION = """\
# Results

What this code has measured, timed and counted; `python cli.py tables --all` makes the tables and this page again from
what is kept here. The paper's own numbers (arXiv 2405.14174) stand beside ours in columns called *paper*, and nowhere
else: no column holds both, and no mean is made of both.

The grids are those of `experiments/`:

{grids}

What the paper's rows confound: in `ablate_components` {ablate_components}. In `ablate_scans` {ablate_scans}."""


_TITLES = {
    "table_1": "Table 1: the paper's systems",
    "table_6": "Table 6: throughput in inference",
    "table_7": "Table 7: architectures",
    "fig_1": "Fig. 1: accuracy against FLOPs",
    "goldens": "Differences from what the published code computed",
    "ablate_components": "ablate_components: the rows of Table 4",
    "ablate_scans": "ablate_scans: the rows of Table 5",
    "compare_baseline": "compare_baseline: VMamba-Nano against MS2D",
    "controls_components": "controls_components: the rows of Table 4 and their controls, at equal depth",
    "controls_scans": "controls_scans: the rows of Table 5 and their controls, of states and weight sets",
    "pathfinder_scans": "pathfinder_scans: the rows of Table 5 and controls without recurrence, for Pathfinder",
}
"""File -> what the index calls it."""


def write_index(results: Path) -> Path:
    """Write ``README.md``, the index of what is published in a results folder; returns its path.

    Raises:
        ValueError: a published record is damaged.
        OSError: the file cannot be written.
    """
    tables = {folder: load_table(folder) for folder in kept_folders(results)}
    sections = [
        _introduction(),
        _measured(results, tables),
        _top1(results),
        _agreement(results),
        _timed(results),
        _counted(results),
    ]
    path = results / "README.md"
    write_atomic(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def kept_folders(results: Path) -> list[Path]:
    """Folders of the grids that are published in a results folder."""
    return sorted(path.parent for path in (results / MEASURED).glob(f"*/*/{GRID_FILE}"))


def _introduction() -> str:
    lines = []
    for path in shipped_grids():
        about = _TITLES.get(path.stem, "").partition(": ")[2]
        link = f"[`{path.stem}`](../{path.relative_to(EXPERIMENTS.parent).as_posix()})"
        lines.append(f"- {link}: {about}" if about else f"- {link}")
    return _INTRODUCTION.format(grids="\n".join(lines), **CONFOUNDED)


def _measured(results: Path, tables: Mapping[Path, Table]) -> str:
    lines, commands, notes, versions = [], [], [], []
    for folder, table in tables.items():
        runs = [record for cell in table.records.values() for record in cell.values()]
        done = [record for record in runs if record is not None]
        elsewhere = [record for record in done if record.get("trained_as")]
        origin = ""
        if elsewhere:
            some = f"{len(elsewhere)} of them " if len(elsewhere) < len(done) else ""
            origin = f", {some}taken over from {grids_elsewhere(elsewhere)}"
        where = folder.relative_to(results).as_posix()
        lines.append(
            [
                f"[{table.name}]({where}/table.md)",
                table.recipe,
                _told(describe_data(record) for record in done),
                f"{len(done)} of {len(runs)}{origin}{'' if table.tested else ', validated alone, not tested'}",
                _told(str(seed) for cell in table.records.values() for seed in cell),
                _told(machine(record["env"]).partition("; ")[0] for record in done),
                _told(f"`{record['env']['commit']}`" for record in done),
            ]
        )
        versions += [machine(record["env"]).partition("; ")[2] for record in done]
        # A run that is taken over was trained by its own grid's command, which its record has.
        commands += [table.command] if len(elsewhere) < len(done) or not done else []
        commands += commands_elsewhere(elsewhere)
        notes += [str(record["data"]["note"]) for record in done if record["data"].get("note")]
    parts = ["## Trained and tested here"]
    if lines:
        titles = ["table", "recipe", "data", "runs", "seeds", "device", "commit"]
        parts.append(pipe_table(titles, lines, words=len(titles)))
        parts.append("\n".join(f"- {text}" for text in dict.fromkeys([*versions, *notes]) if text))
        parts.append("Trained by\n\n```sh\n" + "\n".join(dict.fromkeys(commands)) + "\n```")
        parts.append(
            "Beside each table lie its CSV, `epochs.csv` (the metrics of every epoch of every run), and for each run "
            "its record and its whole configuration, in `<cell>/seed<k>-<hash>/`. `python cli.py keep` put them there."
        )
    else:
        parts.append("Nothing yet: train a grid, then `python cli.py keep`.")
    if not any(table.recipe.startswith("imagenet") for table in tables.values()):
        parts.append(
            "No network has been trained on ImageNet here: there is nothing yet to hold against the paper's top-1. "
            "`experiments/recipes/imagenet_100e.yaml` is the recipe of its ablations."
        )
    return "\n\n".join(part for part in parts if part)


def _top1(results: Path) -> str:
    rows = _fit(accuracy.store(results / COMPARED).read())
    if not rows:
        return ""
    lines = [
        [f"`{row['model']}`", row["file"], row["top1"], row["images"], row["device"] or "–", f"`{row['commit']}`"]
        for row in rows
    ]
    table = pipe_table(["network", "weights", "top-1, %", "images", "device", "commit"], lines, words=2)
    link = f"[{_TITLES['table_1']}]({COMPARED}/table_1.md)"
    title = "## Measured here, of weights at hand"
    return "\n\n".join([title, f"{link} has them beside the paper's.", table, f"By {_commands(rows)}."])


def _agreement(results: Path) -> str:
    rows = _fit(goldens.store(results / COMPARED).read())
    if not rows:
        return ""
    lines = [
        [
            row["quantity"],
            f"{float(row['difference']):.1e}",
            f"{float(row['tolerance']):g}",
            row["measure"],
            f"`{row['golden']}`, {row['network']}, {row['size']}",
        ]
        for row in goldens.largest(rows)
    ]
    link = f"[{_TITLES['goldens']}]({COMPARED}/goldens.md)"
    titles = ["tensors", "difference", "allowed", "which is", "of"]
    devices, commits = _told(row["device"] or "–" for row in rows), _told(f"`{row['commit']}`" for row in rows)
    return "\n\n".join(
        [
            "## Agreement with the published model",
            f"{link}, on the same weights and images. The largest, on {devices} at commit {commits}:",
            pipe_table(titles, lines, words=len(titles)),
            f"By {_commands(rows)}.",
        ]
    )


def _timed(results: Path) -> str:
    tables = [table for table in timed_tables(results) if table.rows]
    lines = [_timed_line(_timed_links(table, results), _share(table), table.rows) for table in tables]
    commands = [command for table in tables for command in table.commands]
    notes = ["Timed by\n\n```sh\n" + "\n".join(dict.fromkeys(commands)) + "\n```"] if commands else []
    speeds = _fit(throughput.kept_rows(results / TIMED))
    if speeds:
        link = f"[{_TITLES['table_6']}]({COMPARED}/table_6.md)"
        lines.append(_timed_line(link, str(len(speeds)), speeds))
        notes.append(f"Table 6 by {_commands(speeds)}.")
    else:
        notes.append(
            "Table 6 (throughput) has not been measured yet: `python cli.py compare --measure throughput` on a GPU"
        )
    table = pipe_table(["table", "rows", "device", "torch", "commit"], lines, words=1) if lines else ""
    return "\n\n".join(part for part in ("## Timed here", table, *notes) if part)


def _timed_line(links: str, rows: str, taken: Sequence[Mapping[str, str]]) -> list[str]:
    return [links, rows, *(_told(row.get(column) or "–" for row in taken) for column in ("device", "torch", "commit"))]


def _timed_links(table: TimedTable, results: Path) -> str:
    """A timed table by its page, if it has one, with what else there is of it."""
    others = {"CSV": table.path if table.page else None, "plot": table.plot}
    links = [f"[{what}]({path.relative_to(results).as_posix()})" for what, path in others.items() if path]
    told = f"[{table.path.stem}]({(table.page or table.path).relative_to(results).as_posix()})"
    return f"{told} ({', '.join(links)})" if links else told


def _share(table: TimedTable) -> str:
    """How many rows of a table are published."""
    rows, left_out = len(table.rows), len(table.left_out)
    return f"{rows} of {rows + left_out}" if left_out else str(rows)


def _counted(results: Path) -> str:
    grids = _links(results, COUNTED, "*.md")
    systems = _links(results, COMPARED, "table_1.md", "table_7.md", "fig_1.png")
    parts = []
    if grids:
        parts.append(
            "Parameters and FLOPs of every row of the grids, at 1×3×224×224 with 1000 classes, beside what the paper "
            "prints of the same networks; by `python cli.py tables --all`:"
        )
        parts.append(grids)
    if systems:
        parts.append("The paper's comparison of systems, beside what it prints; by `python cli.py compare`:")
        parts.append(systems)
    return "\n\n".join(["## Counted here, without training", *parts]) if parts else ""


def _links(results: Path, name: str, *patterns: str) -> str:
    """The pages and figures of a folder that there are, with what they show."""
    files = [path for pattern in patterns for path in sorted((results / name).glob(pattern))]
    return "\n".join(
        f"- [{_TITLES.get(path.stem, path.stem)}]({path.relative_to(results).as_posix()})" for path in files
    )


def _fit(rows: Iterable[Row]) -> list[Row]:
    """The kept rows that the published tables take."""
    return [row for row in rows if row_problem(row) is None]


def _commands(rows: Iterable[Mapping[str, str]]) -> str:
    return _told(f"`{row['command']}`" for row in rows)


def _told(values: Iterable[Any]) -> str:
    """Different values in order, as a list."""
    different: Sequence[str] = list(dict.fromkeys(str(value) for value in values))
    return ", ".join(different)
