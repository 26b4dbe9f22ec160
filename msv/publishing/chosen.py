"""The grids with results that a command works on."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from msv.ablation.config import nearest
from msv.ablation.grid import GRID_FILE


def add_grid_option(parser: argparse._ActionsContainer) -> None:
    """Add ``--grid`` to a command that works on grids with results."""
    parser.add_argument(
        "--grid",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="grids, as NAME or NAME/RECIPE (default: all there are)",
    )


def grid_folders(results: Path, names: Sequence[str] | None) -> list[Path]:
    """Folders of the grids in a results folder: all, or those named as NAME or NAME/RECIPE.

    Raises:
        FileNotFoundError: there are none at all.
        ValueError: a name that no grid has.
    """
    if results.exists() and not results.is_dir():
        raise NotADirectoryError(f"results folder {results} is a file, expected a folder; choose another --results")
    found = {f"{path.parent.parent.name}/{path.parent.name}": path.parent for path in results.glob(f"*/*/{GRID_FILE}")}
    if not found:
        raise FileNotFoundError(
            f"no grid has results in {results} (no */*/{GRID_FILE}); run one first, such as "
            "`python cli.py fit --config experiments/ablate_scans.yaml`, or name their folder with --results"
        )
    if not names:
        return [found[key] for key in sorted(found)]
    chosen: list[Path] = []
    for name in names:
        folders = [found[key] for key in sorted(found) if name in (key, key.partition("/")[0])]
        if not folders:
            known = sorted({key.partition("/")[0] for key in found} | set(found))
            raise ValueError(f"--grid {name!r}: no such grid in {results}; {nearest(name, known)}")
        chosen.extend(folder for folder in folders if folder not in chosen)
    return chosen
