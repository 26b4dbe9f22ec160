"""`python cli.py tables`: the tables of grids, or all that is published, made again without training."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from msv.ablation.tables import make_table
from msv.publishing.chosen import add_grid_option, grid_folders


def main(argv: Sequence[str]) -> int:
    """``tables``: make the tables of grids again from their records, without training.

    Args:
        argv: the arguments after the word ``tables``.

    Returns:
        0: the tables are written.

    Raises:
        FileNotFoundError: no grid has results.
        ValueError: an unknown grid; or a grid file or record is damaged, once all other tables are written.
    """
    parser = argparse.ArgumentParser(
        prog="cli.py tables",
        description="Make the tables and plots of grids again from their records, without training.",
    )
    chosen = parser.add_mutually_exclusive_group()
    add_grid_option(chosen)
    chosen.add_argument(
        "--all",
        action="store_true",
        help="everything that is published: the tables of kept records, counts of every grid, the paper's comparison, "
        "and README.md as their index",
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: %(default)s)")
    arguments = parser.parse_args(argv)

    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    if arguments.all:
        from msv.publishing.write import write_all  # counts build networks, which no other table needs

        written = write_all(arguments.results)
        for file in written.files:
            console.print(f"wrote {file}")
        for row in written.left_out:
            console.print(f"left out: {row}")
        return 0
    problems = []
    for folder in grid_folders(arguments.results, arguments.grid):
        try:
            paths = make_table(folder)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        console.print(paths.markdown.read_text(encoding="utf-8"))
        for path in paths.written:
            console.print(f"wrote {path}")
    if problems:
        raise ValueError("; ".join(problems))
    return 0
