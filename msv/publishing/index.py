"""The index of what is published, `results/README.md`, made from what lies beside it."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from msv.ablation.grid import GRID_FILE
from msv.ablation.markdown import describe_data, machine, pipe_table
from msv.ablation.rows import Table
from msv.ablation.tables import load_table
from msv.files import write_atomic

MEASURED, COUNTED, COMPARED, TIMED = "measured", "counted", "comparison", "benchmarks"
"""What `results/` holds that git tracks."""

_INTRODUCTION = """\
# Results

What this code has measured, timed and counted; `python cli.py tables --all` makes the tables and this page again from
what is kept here. The paper's own numbers (arXiv 2405.14174) stand beside ours in columns called *paper*, and nowhere
else: no column holds both, and no mean is made of both.

The grids are those of `experiments/`: `ablate_components` is Table 4, `ablate_scans` Table 5; `controls_components` and
`controls_scans` are the same rows with control rows, at equal depth; `compare_baseline` is VMamba-Nano against MS2D."""


def write_index(results: Path) -> Path:
    """Write ``README.md``, the index of what is published in a results folder; returns its path.

    Raises:
        ValueError: a published record is damaged.
        OSError: the file cannot be written.
    """
    tables = {folder: load_table(folder) for folder in kept_folders(results)}
    sections = [_INTRODUCTION, _measured(results, tables), _timed(results), _compared(results), _counted(results)]
    path = results / "README.md"
    write_atomic(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def kept_folders(results: Path) -> list[Path]:
    """Folders of the grids that are published in a results folder."""
    return sorted(path.parent for path in (results / MEASURED).glob(f"*/*/{GRID_FILE}"))


def _measured(results: Path, tables: Mapping[Path, Table]) -> str:
    lines, commands, notes, versions = [], [], [], []
    for folder, table in tables.items():
        runs = [record for cell in table.records.values() for record in cell.values()]
        done = [record for record in runs if record is not None]
        where = folder.relative_to(results).as_posix()
        lines.append(
            [
                f"[{table.name}]({where}/table.md)",
                table.recipe,
                _told(describe_data(record) for record in done),
                f"{len(done)} of {len(runs)}",
                _told(str(seed) for cell in table.records.values() for seed in cell),
                _told(machine(record["env"]).partition("; ")[0] for record in done),
                _told(f"`{record['env']['commit']}`" for record in done),
            ]
        )
        versions += [machine(record["env"]).partition("; ")[2] for record in done]
        commands.append(table.command)
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


def _timed(results: Path) -> str:
    lines = []
    for path in sorted((results / TIMED).glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        told = [_told(row.get(column) or "–" for row in rows) for column in ("device", "torch", "commit")]
        lines.append([f"[{path.stem}]({path.relative_to(results).as_posix()})", str(len(rows)), *told])
    if not lines:
        return ""
    table = pipe_table(["table", "rows", "device", "torch", "commit"], lines, words=1)
    return f"## Timed here\n\n{table}\n\nBy `python cli.py benchmark scan`, on the device that the table names."


def _compared(results: Path) -> str:
    return _listed(
        results,
        COMPARED,
        "## The paper's comparison of systems",
        "Tables 1, 6 and 7 and Fig. 1: counts of this code beside what the paper prints.",
    )


def _counted(results: Path) -> str:
    return _listed(
        results,
        COUNTED,
        "## Counted here, without training",
        "Parameters and FLOPs of every row of the grids, at 1×3×224×224 with 1000 classes, beside what the paper "
        "prints of the same networks.",
    )


def _listed(results: Path, name: str, title: str, text: str) -> str:
    """A section that lists the pages and figures of a folder; nothing where there are none."""
    files = sorted(path for path in (results / name).glob("*") if path.suffix in (".md", ".png"))
    links = [f"- [{path.stem}]({path.relative_to(results).as_posix()})" for path in files]
    return "\n\n".join([title, text, "\n".join(links)]) if links else ""


def _told(values: Iterable[Any]) -> str:
    """Different values in order, as a list."""
    different: Sequence[str] = list(dict.fromkeys(str(value) for value in values))
    return ", ".join(different)
