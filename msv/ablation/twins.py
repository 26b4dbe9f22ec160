"""Runs that two grids have in common: trained in one, taken over by the other."""

import os
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path

from msv.ablation.check import DataNow
from msv.ablation.grid import Run
from msv.ablation.hparams import SUFFIX, write_hparams
from msv.ablation.records import RECORD_NAME, read_record, write_record


def find_twins(runs: Sequence[Run]) -> dict[Path, Path]:
    """Finished runs of the same configuration and data in the other grids of the same results and recipe.

    Args:
        runs: runs to come, of one grid.

    Returns:
        Folder of a run -> folder of its twin. A run that has left anything in its own folder has none: it goes on.
    """
    data = DataNow()
    twins = {}
    for run in runs:
        results = run.folder.parents[3]
        same = sorted(results.glob(f"*/{run.recipe}/*/seed{run.seed}-{run.config_hash}/{RECORD_NAME}"))
        for path in same if not run.folder.exists() else []:
            try:
                record = read_record(path)
            except (OSError, ValueError):
                continue  # its own grid says what is wrong with it
            if record["status"] == "done" and not data.changes(run, record):
                twins[run.folder] = path.parent
                break
    return twins


def take_over(run: Run, twin: Path) -> str:
    """Make a finished run of another grid this grid's too: the same files, and a record that says where it comes from.

    Files are linked where the file system can, since checkpoints are large and a finished run's files do not change.

    Args:
        run: the run; its folder does not exist.
        twin: folder of a finished run of the same configuration.

    Returns:
        Where the run was trained, ``<grid>/<recipe>/<cell>``.

    Raises:
        OSError: a file cannot be read or written; the run's folder is as if nothing had been tried.
    """
    record = read_record(twin / RECORD_NAME)
    trained_as = record.get("trained_as") or f"{record['grid']}/{record['recipe']}/{record['cell']}"
    temporary = run.folder.with_name(f".{run.folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        shutil.copytree(twin, temporary, copy_function=_link, ignore=shutil.ignore_patterns(f"*{SUFFIX}"))
        own = {"grid": run.grid, "recipe": run.recipe, "cell": run.cell.name, "toggles": run.cell.toggles}
        # A new file in the link's place: the twin keeps its own record.
        write_record(temporary / RECORD_NAME, {**record, **own, "trained_as": trained_as})
        write_hparams(temporary, {**record, **own})
        temporary.rename(run.folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return trained_as


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
