"""What is published of finished runs: copied to ``results/measured/``, which git tracks and `fit` never reads.

A published number was measured by the code at the commit that its record names; a record of which that cannot be said
is refused.
"""

import argparse
import csv
import io
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from msv.ablation.cell import CONFIG_NAME
from msv.ablation.config import config_hash
from msv.ablation.grid import GRID_FILE, read_grid_file, run_folder, with_seed
from msv.ablation.records import RECORD_NAME, read_record
from msv.ablation.tables import current_record, make_table
from msv.files import write_atomic
from msv.publishing.chosen import add_grid_option, grid_folders
from msv.publishing.guard import commit_problem
from msv.publishing.index import MEASURED, write_index

EPOCHS_NAME = "epochs.csv"

Key = tuple[str, int, str]
"""What tells runs of one grid apart: cell, seed, hash."""


@dataclass(frozen=True)
class Kept:
    """What came of publishing one grid.

    Args:
        folder: ``<measured>/<recipe>/<grid>``.
        runs: how many runs it holds now.
        new: how many of them it did not hold before.
        unfinished: runs that were left out because they are not done.
        refused: runs that were left out because of their record, each with the reason.
    """

    folder: Path
    runs: int
    new: int
    unfinished: list[str]
    refused: list[str]


def keep_grid(folder: Path, measured: Path, replace: bool = False) -> Kept:
    """Publish the finished current runs of a grid: records, configs, metrics of every epoch, tables.

    What is published already stays if it belongs to the same cells and configurations, so seeds may come in portions.
    The folder is made beside the old one and takes its place at the end: it is there whole, or as it was.

    Args:
        folder: ``results/<grid>/<recipe>``.
        measured: where published grids live, as ``<recipe>/<grid>``.
        replace: whether what is published may be replaced by something else.

    Raises:
        ValueError: no run can be published; or published runs would be lost or changed and ``replace`` is False.
        OSError: something cannot be read or written.
    """
    listed = read_grid_file(folder)
    target = measured / listed["recipe"] / listed["name"]
    sources: dict[Key, Path] = {}
    unfinished, refused = [], []
    for cell, seed, digest in _runs(listed):
        title, record = f"{cell} seed {seed}", current_record(folder, cell, seed, digest)
        if record is None or record["status"] != "done":
            unfinished.append(f"{title} ({record['status'] if record else 'missing'})")
        elif problem := unpublishable(record):
            refused.append(f"{title}: {problem}")
        else:
            sources[cell, seed, digest] = run_folder(folder, cell, seed, digest)
    if not sources:
        reasons = "; ".join([*refused, *unfinished])
        raise ValueError(f"{folder}: no run to publish: {reasons}; expected finished runs of a known commit")

    before = _published(target)
    lost = _lost(before, sources, listed) if _ends_alike(target, listed) else list(before)
    if lost and not replace:
        titles = ", ".join(f"{cell} seed {seed}" for cell, seed, _ in lost)
        raise ValueError(
            f"{target} holds other records than {folder}: {titles}; to put these in their place give --replace"
        )
    runs = {**{run: path for run, path in before.items() if run not in lost}, **sources}
    _write(target, listed, runs)
    return Kept(target, len(runs), len(set(sources) - set(before)), unfinished, refused)


def unpublishable(record: Mapping[str, Any]) -> str | None:
    """Why a finished run's record is not to be published, None if it may be."""
    return commit_problem((record.get("env") or {}).get("commit"), "train")


def _runs(listed: Mapping[str, Any]) -> list[Key]:
    return [(cell, seed, digest) for cell in listed["cells"] for seed, digest in listed["cells"][cell]["runs"].items()]


def _published(target: Path) -> dict[Key, Path]:
    """The runs in a published folder: (cell, seed, hash) -> folder."""
    if not (target / GRID_FILE).is_file():
        return {}
    runs = {run: run_folder(target, *run) for run in _runs(read_grid_file(target))}
    return {run: path for run, path in runs.items() if (path / RECORD_NAME).is_file()}


def _ends_alike(target: Path, listed: Mapping[str, Any]) -> bool:
    """Whether what is published was tested if the grid's runs are, and validated alone if those are."""
    return not (target / GRID_FILE).is_file() or read_grid_file(target)["test"] == listed["test"]


def _lost(before: Mapping[Key, Path], sources: Mapping[Key, Path], listed: Mapping[str, Any]) -> list[Key]:
    """Published runs that the grid has no place for any more, or another record."""
    lost = []
    for run, path in before.items():
        if run in sources:
            stays = (path / RECORD_NAME).read_bytes() == (sources[run] / RECORD_NAME).read_bytes()
        else:  # as long as the cell's configuration is still this one, be it with another seed
            config = yaml.safe_load((path / CONFIG_NAME).read_text(encoding="utf-8"))
            now = listed["cells"].get(run[0], {"runs": {}})["runs"]
            stays = any(config_hash(with_seed(config, seed), listed["test"]) == digest for seed, digest in now.items())
        if not stays:
            lost.append(run)
    return lost


def _write(target: Path, listed: Mapping[str, Any], runs: Mapping[Key, Path]) -> None:
    """Make the published folder anew from the folders of its runs, and put it in the old one's place."""
    cells = {name: dict(cell["runs"]) for name, cell in listed["cells"].items()}
    for cell, seed, digest in runs:
        cells[cell][seed] = digest
    content = {
        **{key: value for key, value in listed.items() if key != "results"},  # a folder of one's own machine
        "cells": {
            name: {**listed["cells"][name], "runs": dict(sorted(hashes.items()))} for name, hashes in cells.items()
        },
    }
    scratch = target.parent.parent / f".{uuid.uuid4().hex[:12]}.tmp"
    # The table is made in a folder of the same name, which says that it is a published one.
    new, old = scratch / target.parent.name / target.name, scratch / "old"
    try:
        for run, source in runs.items():
            for name in (RECORD_NAME, CONFIG_NAME):
                write_atomic(run_folder(new, *run) / name, (source / name).read_bytes())
        write_atomic(new / GRID_FILE, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=10_000))
        records = [read_record(run_folder(new, *run) / RECORD_NAME) for run in _runs(content) if run in runs]
        write_atomic(new / EPOCHS_NAME, render_epochs(records))
        make_table(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def render_epochs(records: Sequence[Mapping[str, Any]]) -> str:
    """The metrics of every epoch as CSV, a row an epoch: cell, seed, and the columns of the records' histories."""
    columns = list(dict.fromkeys(key for record in records for row in record["history"] for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, ["cell", "seed", *columns], lineterminator="\n")
    writer.writeheader()
    for record in records:
        for row in record["history"]:
            writer.writerow({"cell": record["cell"], "seed": record["seed"], **row})
    return out.getvalue()


def main(argv: Sequence[str]) -> int:
    """``keep``: publish finished runs.

    Args:
        argv: the arguments after the word ``keep``.

    Returns:
        0, or 1 if a record was refused.

    Raises:
        FileNotFoundError: no grid has results.
        ValueError: an unknown grid, or one that cannot be published, once the others are.
    """
    parser = argparse.ArgumentParser(
        prog="cli.py keep",
        description="Publish finished runs: copy their records, configs, metrics of every epoch and tables to "
        "<to>/measured/<recipe>/<grid>, which git tracks, and list them in <to>/README.md. Records without a known, "
        "clean commit are refused.",
    )
    add_grid_option(parser)
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: %(default)s)")
    parser.add_argument("--to", type=Path, default=Path("results"), help="folder to publish in (default: %(default)s)")
    parser.add_argument("--replace", action="store_true", help="put other records in the place of published ones")
    arguments = parser.parse_args(argv)

    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    problems, refused = [], False
    for folder in grid_folders(arguments.results, arguments.grid):
        try:
            kept = keep_grid(folder, arguments.to / MEASURED, arguments.replace)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        console.print(f"{kept.folder}: {kept.runs} runs, {kept.new} of them new")
        for label, runs in (("not finished", kept.unfinished), ("refused", kept.refused)):
            for run in runs:
                console.print(f"  {label}: {run}")
        refused = refused or bool(kept.refused)
    if problems:
        raise ValueError("; ".join(problems))
    console.print(f"wrote {write_index(arguments.to)}")
    return int(refused)
