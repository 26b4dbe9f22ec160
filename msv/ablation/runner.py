"""Carries out a grid: every cell is checked before the first trains, then each trains in a fresh process.

Runs start in the grid's order; with several workers the next one starts as soon as one has ended.
"""

import logging
import math
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout
from rich.console import Console

from msv.ablation import cell as cell_process
from msv.ablation.check import check_runs, check_same_data, resolve_all
from msv.ablation.cost import duration, estimate, told
from msv.ablation.grid import Run, check_results_root, grid_folder, selected, write_grid_file
from msv.ablation.records import RECORD_NAME, judged_by, read_record, write_record
from msv.ablation.tables import make_table
from msv.ablation.twins import find_twins, take_over
from msv.ablation.workers import Job, Workers
from msv.experiment import LAST, ExperimentCLI
from msv.files import write_atomic
from msv.grid_section import Grid

log = logging.getLogger(__name__)

STOPPED = cell_process.STOPPED


class Stopped(BaseException):
    """A signal asks the runner to stop."""


@dataclass
class Tally:
    """How many runs are what, and how long one takes where so many train side by side."""

    total: int
    workers: int = 1
    running: int = 0
    done: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    timed: int = 0

    @property
    def left(self) -> int:
        """Runs that have not been looked at."""
        return self.total - self.running - self.done - self.failed - self.skipped

    def estimate(self) -> str:
        """What those that run and those that are left will take, going by those that finished."""
        if not self.timed:
            return "no estimate yet"
        rounds = math.ceil((self.running + self.left) / self.workers)
        return f"about {duration(self.seconds / self.timed * rounds)} to go"


def run_grid(cli: ExperimentCLI) -> int:
    """Carry out the ``grid:`` section of a parsed ``fit``.

    Returns:
        Exit status: 0, 1 if a run failed, now or earlier, or 130 if stopped by a signal.

    Raises:
        ValueError: a cell, a record or a checkpoint is not right; nothing has been trained.
        OSError: the results cannot be written.
    """
    grid: Grid = cli.grid  # type: ignore[assignment]
    grid = replace(grid, recipe=grid.recipe or cli.recipe)
    console = Console(highlight=False, soft_wrap=True)
    if not grid.dry_run:
        check_results_root(Path(grid.results))
        Workers.prepare()
    runs = resolve_all(cli, grid)
    chosen = selected(grid, runs)
    todo = [run for run in chosen if _is_due(grid, run)]
    if grid.dry_run:
        twins = {} if grid.rerun == "all" else find_twins(todo)
        for number, run in enumerate(chosen, start=1):
            state = "to be taken over from another grid" if run.folder in twins else _state(run)
            console.print(f"cell {number}/{len(chosen)} {title(run)} ({state}) in {run.folder}")
            console.print(f"  {cell_command(cli.words, run)}", style="dim")
        _tell_cost(console, grid, [run for run in todo if run.folder not in twins])
        return 0
    check_runs(todo, fresh=grid.rerun == "all", workers=grid.workers)
    if grid.rerun != "all":
        check_same_data([run for run in chosen if (run.folder / RECORD_NAME).is_file()])
    twins = {} if grid.rerun == "all" else find_twins(todo)
    _tell_cost(console, grid, [run for run in todo if run.folder not in twins])
    folder = grid_folder(grid, chosen[0].recipe)
    write_grid_file(grid, runs, command(cli.words))

    tally = Tally(len(chosen), grid.workers)
    workers = Workers(grid.workers, lambda run, line: console.print(f"{title(run)}: {line}", markup=False))
    previous = {sign: signal.signal(sign, _raise_stopped) for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, run in enumerate(chosen, start=1):
            if run not in todo:
                _skip(console, run, number, tally)
            elif _begin(console, cli, grid, run, number, tally, twins.get(run.folder)):
                workers.start(run, number)
            while workers.full:
                _end(console, workers.next_ended(), tally)
                _write_table(console, folder)
        while workers.jobs:
            _end(console, workers.next_ended(), tally)
            _write_table(console, folder)
    except Stopped:
        _stop(workers)
        _write_table(console, folder)
        console.print(f"stopped with {tally.done} of {tally.total} done; to go on, run again: {command(cli.words)}")
        return STOPPED
    finally:
        if workers.jobs:  # an error of ours, such as a full disk
            _stop(workers)
        for sign, handler in previous.items():
            signal.signal(sign, handler)
    _write_table(console, folder)  # also where no run was due: the baseline or the cells may be others by now
    _summarise(console, folder, tally)
    return 1 if tally.failed else 0


def _tell_cost(console: Console, grid: Grid, runs: Sequence[Run]) -> None:
    for line in told(estimate(runs, grid.workers), runs, grid.workers):
        console.print(line, markup=False)


def _begin(
    console: Console, cli: ExperimentCLI, grid: Grid, run: Run, number: int, tally: Tally, twin: Path | None
) -> bool:
    """Make a run ready for its process; whether there is anything left for one to do."""
    try:
        with cell_process.run_lock(_made(run.folder.parent) / run.folder.name).acquire(timeout=0):
            if grid.rerun != "all" and _state(run) == "done":  # another process finished it meanwhile
                _skip(console, run, number, tally)
                return False
            if grid.rerun == "all" and run.folder.exists():
                run.folder.rename(_old_name(run.folder))
            if twin is not None and not run.folder.exists():
                trained_as = take_over(run, twin)
                console.print(f"cell {number}/{tally.total} {title(run)}: taken over, trained as {trained_as}")
                tally.done += 1
                return False
            resumed = (run.folder / LAST).is_file()
            _prepare(cli, run, grid.workers)
    except Timeout:
        _leave(console, run, number, tally)
        return False
    tally.running += 1
    console.print(
        f"cell {number}/{tally.total} {title(run)} {'goes on' if resumed else 'starts'}: {tally.done} done, "
        f"{tally.running} running, {tally.failed} failed, {tally.left} left, {tally.estimate()}",
        style="bold",
    )
    return True


def _end(console: Console, job: Job, tally: Tally) -> None:
    """Say what came of a run whose process has ended."""
    run, status = job.run, job.process.exitcode or 0
    tally.running -= 1
    if status == cell_process.LOCKED:
        _leave(console, run, job.number, tally)
        return
    record = _settle(run, status)
    name = f"cell {job.number}/{tally.total} {title(run)}"
    if record["status"] == "done":
        tally.done += 1
        tally.seconds += job.seconds
        tally.timed += 1
        split = judged_by(run.tested)
        top1 = record["metrics"][f"{split}_top1"]
        console.print(f"{name} done in {duration(job.seconds)}: {split} top-1 {100 * top1:.2f}%")
    else:
        tally.failed += 1
        console.print(f"{name} {record['status']}: {record['error']}", style="red", markup=False)
        console.print(f"  in {run.folder}")


def _leave(console: Console, run: Run, number: int, tally: Tally) -> None:
    console.print(f"cell {number}/{tally.total} {title(run)}: running elsewhere, left to that process")
    tally.skipped += 1


def _stop(workers: Workers) -> None:
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.SIG_IGN)
    for job in workers.stop():
        with suppress(OSError, ValueError):
            if read_record(job.run.folder / RECORD_NAME)["status"] == "running":
                cell_process.update_record(job.run.folder, status="unfinished")


def _settle(run: Run, status: int) -> dict[str, Any]:
    """The record of a run whose process has ended; one that could not write its own end gets it written here."""
    record = read_record(run.folder / RECORD_NAME)
    if record["status"] in ("done", "failed"):
        return record
    if status < 0:
        name = signal.Signals(-status).name
        reason = f"the process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    else:
        reason = f"the process ended with status {status} and no word; see {run.folder / cell_process.ERROR_LOG}"
    return cell_process.update_record(run.folder, status="failed", error=f"{reason}; run again to go on from {LAST}")


def _prepare(cli: ExperimentCLI, run: Run, workers: int) -> None:
    """Write what the run's process reads: its config and the part of its record that is known beforehand."""
    write_atomic(run.folder / cell_process.CONFIG_NAME, yaml.safe_dump(run.config, sort_keys=False))
    path = run.folder / RECORD_NAME
    known = read_record(path) if path.is_file() else {}
    fresh = {
        "grid": run.grid,
        "recipe": run.recipe,
        "cell": run.cell.name,
        "seed": run.seed,
        "config_hash": run.config_hash,
        "status": "running",
        "toggles": run.cell.toggles,
        "network": run.config["model"]["init_args"]["network"],
        "metrics": {},
        "history": [],
        "counts": {},
        "data": {},
        "schedule": {},
        "timing": {"started": cell_process.now(), "finished": None, "train_seconds": None, "images_per_second": None},
        "env": {},
        **({} if run.tested else {"tested": False}),
    }
    record = {**fresh, **known, "status": "running", "command": cell_command(cli.words, run), "error": None}
    # A speed says little without how many runs had the device.
    record["timing"] = {**record["timing"], "workers": workers}
    write_record(path, record)


def _state(run: Run) -> str:
    path = run.folder / RECORD_NAME
    return read_record(path)["status"] if path.is_file() else "new"


def _is_due(grid: Grid, run: Run) -> bool:
    if grid.rerun == "all":
        return True
    state = _state(run)
    return state == "new" if grid.rerun == "none" else state != "done"


def _skip(console: Console, run: Run, number: int, tally: Tally) -> None:
    state = _state(run)
    console.print(f"cell {number}/{tally.total} {title(run)}: {state}, skipped")
    if state == "done":
        tally.done += 1
        timing = read_record(run.folder / RECORD_NAME).get("timing") or {}
        if timing.get("train_seconds") and timing.get("workers", 1) == tally.workers:
            tally.seconds += timing["train_seconds"]
            tally.timed += 1
    elif state == "failed":
        tally.failed += 1
    else:
        tally.skipped += 1


def _write_table(console: Console, folder: Path) -> None:
    try:
        paths = make_table(folder)
    except (OSError, ValueError) as error:
        # The runs are worth more than their table, which can be made again from the records.
        console.print(f"  no table: {error}", style="red", markup=False)
    else:
        console.print(f"  table: {paths.markdown}")


def _summarise(console: Console, folder: Path, tally: Tally) -> None:
    with suppress(OSError):
        console.print((folder / "table.md").read_text(encoding="utf-8"), markup=False)
    parts = [f"{tally.done} of {tally.total} done"]
    if tally.failed:
        parts.append(f"{tally.failed} failed (run again to try again; error.log in the run's folder has the traceback)")
    if tally.skipped:
        parts.append(f"{tally.skipped} skipped")
    console.print(f"{', '.join(parts)}; results in {folder}", markup=False)


def _old_name(folder: Path) -> Path:
    number = 1
    while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    return old


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _raise_stopped(signum: int, frame: Any) -> None:
    raise Stopped(signal.Signals(signum).name)


def title(run: Run) -> str:
    """A run as messages call it."""
    return f"{run.cell.name} seed {run.seed}"


def command(words: Sequence[str], without: Sequence[str] = ("rerun", "dry_run", "only")) -> str:
    """The command that a user types to run this again, without options that were for once."""
    kept: list[str] = []
    options = tuple(f"--grid.{name}" for name in without)
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not word.startswith(tuple(f"{option}=" for option in options)):
            kept.append(word)
    return f"python {shlex.join([Path(sys.argv[0]).name if sys.argv[0].endswith('.py') else 'cli.py', *kept])}"


def cell_command(words: Sequence[str], run: Run) -> str:
    """The command that makes one run of a grid again."""
    base = command(words, without=("rerun", "dry_run", "only", "seeds", "workers"))
    return f"{base} --grid.only '[\"{run.cell.name}\"]' --grid.seeds '[{run.seed}]'"
