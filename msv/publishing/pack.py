"""`python cli.py pack`: finished runs in one file, for another machine."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from msv.ablation.grid import GRID_FILE, read_grid_file, run_folder
from msv.ablation.tables import current_record
from msv.experiment import LAST
from msv.publishing.archive import run_files, write_archive
from msv.publishing.chosen import add_grid_option, grid_folders


def pack(folders: Sequence[Path], results: Path, out: Path, checkpoints: bool = False) -> tuple[list[str], list[str]]:
    """Write the finished current runs of grids into one archive.

    Args:
        folders: ``<results>/<grid>/<recipe>``.
        results: the folder that they lie in.
        out: the archive.
        checkpoints: whether their ``last.ckpt`` goes with them.

    Returns:
        The runs that it holds, and those that it does not since they are not finished, with their state.

    Raises:
        FileNotFoundError: a finished run has no checkpoint, and they are asked for.
        ValueError: no run is finished, or a grid file or record is damaged.
        OSError: something cannot be read or written.
    """
    files: dict[str, Path] = {}
    packed: list[str] = []
    unfinished: list[str] = []
    for folder in folders:
        listed = read_grid_file(folder)
        before = len(packed)
        for cell, content in listed["cells"].items():
            for seed, digest in content["runs"].items():
                record, run = current_record(folder, cell, seed, digest), run_folder(folder, cell, seed, digest)
                title = f"{listed['name']}/{listed['recipe']}: {cell} seed {seed}"
                if record is None or record["status"] != "done":
                    unfinished.append(f"{title} ({record['status'] if record else 'missing'})")
                    continue
                packed.append(title)
                for file in run_files(run, checkpoints):
                    if not file.is_file():
                        fix = "leave out --checkpoints" if file.name == LAST else "move the run aside and train again"
                        raise FileNotFoundError(f"{file}: a finished run lacks it; {fix}")
                    files[file.relative_to(results).as_posix()] = file
        if len(packed) > before:
            files[(folder / GRID_FILE).relative_to(results).as_posix()] = folder / GRID_FILE
    if not packed:
        raise ValueError(f"{results}: no run to pack: {'; '.join(unfinished)}; expected finished runs")
    write_archive(out, files)
    return packed, unfinished


def main(argv: Sequence[str]) -> int:
    """``pack``: finished runs into one file.

    Args:
        argv: the arguments after the word ``pack``.

    Returns:
        0: the archive is written.

    Raises:
        FileExistsError: the archive is there already, and ``--force`` is not given.
        FileNotFoundError: no grid has results, or a run lacks a file.
        ValueError: an unknown grid, or none of the runs is finished.
    """
    parser = argparse.ArgumentParser(
        prog="cli.py pack",
        description="Put finished runs into one file: records, configs and TensorBoard's events. `unpack` puts them "
        "where `fit` finds them as finished on another machine.",
    )
    add_grid_option(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.zip", help="the file to write")
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: %(default)s)")
    parser.add_argument("--checkpoints", action="store_true", help=f"with each run's {LAST}, some 100 MB each")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    arguments = parser.parse_args(argv)

    if arguments.out.exists() and not arguments.force:
        raise FileExistsError(f"{arguments.out} exists; give another name, or --force to overwrite it")
    folders = grid_folders(arguments.results, arguments.grid)
    packed, unfinished = pack(folders, arguments.results, arguments.out, arguments.checkpoints)
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    size = arguments.out.stat().st_size / 1e6
    console.print(f"{arguments.out}: {len(packed)} runs, {size:.1f} MB")
    for run in unfinished:
        console.print(f"  not finished: {run}")
    return 0
