"""`python cli.py unpack`: the runs of an archive put where `fit` finds them as finished."""

import argparse
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.console import Console

from msv.ablation.cell import CONFIG_NAME, run_lock
from msv.ablation.config import config_hash
from msv.ablation.grid import GRID_FILE, check_results_root, read_grid_file, with_seed
from msv.ablation.records import RECORD_NAME, read_record
from msv.experiment import LAST
from msv.files import write_atomic
from msv.publishing.archive import read_archive


@dataclass
class Unpacked:
    """What came of unpacking an archive; runs as ``<grid>/<recipe>/<cell>/seed<k>-<hash>``.

    Args:
        new: runs that were put in place.
        there: runs that were there already, with the same record.
        completed: of those, runs that had no checkpoint, and have the archive's now.
        unlisted: runs, new or there, that the grid's table does not show: the grid has other cells here.
    """

    new: list[str] = field(default_factory=list)
    there: list[str] = field(default_factory=list)
    completed: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)


def unpack(path: Path, results: Path) -> Unpacked:
    """Put the runs of an archive into a results folder, all of them or, if one is in the way, none.

    Args:
        path: the archive.
        results: the folder, made where it is missing.

    Raises:
        FileNotFoundError: there is no such archive.
        ValueError: it is damaged or foreign, or a run of another record is in the way, or is being trained.
        OSError: the results cannot be written.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no archive at {path}; give a file that `python cli.py pack` has written")
    check_results_root(results)
    scratch = results / f".{uuid.uuid4().hex[:12]}.tmp"
    scratch.mkdir()
    done = Unpacked()
    try:
        runs = read_archive(path, scratch)
        for run in runs:
            (done.there if _is_there(path, scratch / run, results / run) else done.new).append(str(run))
        for name in done.new:
            _put(path, scratch / name, results / name)
        for name in done.there:
            if _complete(path, scratch / name / LAST, results / name / LAST):
                done.completed.append(name)
        for folder in sorted({run.parent.parent for run in runs}):
            done.unlisted += _list(scratch, results, folder, [run for run in runs if run.parent.parent == folder])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return done


def _is_there(path: Path, source: Path, target: Path) -> bool:
    """Whether a run is in place already; ValueError where something else is."""
    if not target.exists():
        return False
    record = target / RECORD_NAME
    if not record.is_file() or record.read_bytes() != (source / RECORD_NAME).read_bytes():
        state = read_record(record)["status"] if record.is_file() else "there without a record"
        raise ValueError(
            f"{path}: another run of the same name is in {target} ({state}); nothing was unpacked: move it aside first"
        )
    return True


def _put(path: Path, source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, target):
        if target.exists():  # made since it was looked for
            raise ValueError(f"{path}: {target} has come into being meanwhile; unpack again")
        source.rename(target)


def _complete(path: Path, source: Path, target: Path) -> bool:
    """Give a run that is there the archive's checkpoint, if it has none."""
    if target.exists() or not source.is_file():
        return False
    with _locked(path, target.parent):
        source.rename(target)
    return True


@contextmanager
def _locked(path: Path, run: Path) -> Iterator[None]:
    try:
        with run_lock(run).acquire(timeout=0):
            yield
    except Timeout:
        raise ValueError(f"{path}: {run} is being trained; wait for it or stop it, then unpack again") from None


def _list(scratch: Path, results: Path, folder: PurePosixPath, runs: Sequence[PurePosixPath]) -> list[str]:
    """Have the grid's list of current runs name those unpacked; those that its cells here have no place for."""
    path = results / folder / GRID_FILE
    with FileLock(results / folder / f".{GRID_FILE}.lock"):
        if not path.is_file() and (scratch / folder / GRID_FILE).is_file():
            content = {**read_grid_file(scratch / folder), "results": results.as_posix()}
        elif path.is_file():
            content = read_grid_file(results / folder)
        else:
            return []  # `fit` writes the list
        unlisted = []
        for run in runs:
            record = read_record(results / run / RECORD_NAME)
            listed = content["cells"].get(record["cell"], {"runs": {}})["runs"]
            config = yaml.safe_load((results / run / CONFIG_NAME).read_text(encoding="utf-8"))
            if _same_cell(config, listed, record.get("tested", True)):
                listed[record["seed"]] = record["config_hash"]
            else:
                unlisted.append(str(run))
        for cell in content["cells"].values():
            cell["runs"] = dict(sorted(cell["runs"].items()))
        write_atomic(path, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=10_000))
    return unlisted


def _same_cell(config: dict[str, Any], listed: dict[int, str], tested: bool) -> bool:
    """Whether a run's config is, but for the seed, that of a cell's listed runs."""
    return any(config_hash(with_seed(config, seed), tested) == digest for seed, digest in listed.items())


def main(argv: Sequence[str]) -> int:
    """``unpack``: put the runs of archives in place.

    Args:
        argv: the arguments after the word ``unpack``.

    Returns:
        0: all runs are in place.

    Raises:
        FileNotFoundError: there is no such archive.
        ValueError: an archive is damaged or foreign, or another run is in the way.
        OSError: the results cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="cli.py unpack",
        description="Put the finished runs of an archive that `pack` has written where `fit` finds them. What is there "
        "already stays; another record in the place of one is an error, and nothing is unpacked.",
    )
    parser.add_argument("archives", type=Path, nargs="+", metavar="FILE.zip", help="what `pack` has written")
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: %(default)s)")
    arguments = parser.parse_args(argv)

    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    for path in arguments.archives:
        done = unpack(path, arguments.results)
        console.print(f"{path}: {len(done.new)} runs unpacked to {arguments.results}, {len(done.there)} there already")
        if done.completed:
            console.print(f"  checkpoints added to {len(done.completed)} of those there")
        for run in done.unlisted:
            console.print(f"  not in the grid's table, whose cells are others here: {run}")
    return 0
