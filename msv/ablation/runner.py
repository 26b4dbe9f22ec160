"""Carries out a grid: every cell is checked before the first trains, then each trains in a fresh process."""

import logging
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import yaml
from filelock import Timeout
from rich.console import Console

from msv.ablation import cell as cell_process
from msv.ablation.check import check_runs, check_same_data, resolve_all
from msv.ablation.grid import Run, check_results_root, grid_folder, selected, write_grid_file
from msv.ablation.records import RECORD_NAME, judged_by, read_record, write_record
from msv.ablation.tables import make_table
from msv.ablation.twins import find_twins, take_over
from msv.experiment import LAST, ExperimentCLI
from msv.files import write_atomic
from msv.grid_section import Grid

log = logging.getLogger(__name__)

STOPPED = cell_process.STOPPED
# Seconds that a run's process gets to end by itself; its checkpoint is written atomically, so no harm if it does not.
GRACE = 5.0


class Stopped(BaseException):
    """A signal asks the runner to stop."""


@dataclass
class Tally:
    """How many runs are what, and how long one takes."""

    total: int
    done: int = 0
    failed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    timed: int = 0

    @property
    def left(self) -> int:
        """Runs that have not been looked at."""
        return self.total - self.done - self.failed - self.skipped

    def estimate(self, runs: int) -> str:
        """What ``runs`` more runs will take, going by those that finished."""
        if not self.timed:
            return "no estimate yet"
        return f"about {duration(self.seconds / self.timed * runs)} to go"


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
        _start_forkserver()  # it imports while the cells are checked
    runs = resolve_all(cli, grid)
    chosen = selected(grid, runs)
    if grid.dry_run:
        for number, run in enumerate(chosen, start=1):
            console.print(f"cell {number}/{len(chosen)} {title(run)} ({_state(run)}) in {run.folder}")
            console.print(f"  {cell_command(cli.words, run)}", style="dim")
        return 0
    todo = [run for run in chosen if _is_due(grid, run)]
    check_runs(todo, fresh=grid.rerun == "all")
    if grid.rerun != "all":
        check_same_data([run for run in chosen if (run.folder / RECORD_NAME).is_file()])
    twins = {} if grid.rerun == "all" else find_twins(todo)
    folder = grid_folder(grid, chosen[0].recipe)
    write_grid_file(grid, runs, command(cli.words))

    tally = Tally(len(chosen))
    previous = {sign: signal.signal(sign, _raise_stopped) for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        for number, run in enumerate(chosen, start=1):
            if run in todo:
                _run_one(console, cli, grid, run, number, tally, twins.get(run.folder))
                _write_table(console, folder)
            else:
                _skip(console, run, number, tally)
    except Stopped:
        _write_table(console, folder)
        console.print(f"stopped with {tally.done} of {tally.total} done; to go on, run again: {command(cli.words)}")
        return STOPPED
    finally:
        for sign, handler in previous.items():
            signal.signal(sign, handler)
    _write_table(console, folder)  # also where no run was due: the baseline or the cells may be others by now
    _summarise(console, folder, tally)
    return 1 if tally.failed else 0


def _run_one(
    console: Console, cli: ExperimentCLI, grid: Grid, run: Run, number: int, tally: Tally, twin: Path | None
) -> None:
    try:
        with cell_process.run_lock(_made(run.folder.parent) / run.folder.name).acquire(timeout=0):
            if grid.rerun != "all" and _state(run) == "done":  # another process finished it meanwhile
                _skip(console, run, number, tally)
                return
            if grid.rerun == "all" and run.folder.exists():
                run.folder.rename(_old_name(run.folder))
            if twin is not None and not run.folder.exists():
                trained_as = take_over(run, twin)
                console.print(f"cell {number}/{tally.total} {title(run)}: taken over, trained as {trained_as}")
                tally.done += 1
                return
            resumed = (run.folder / LAST).is_file()
            _prepare(cli, run)
    except Timeout:
        console.print(f"cell {number}/{tally.total} {title(run)}: running elsewhere, left to that process")
        tally.skipped += 1
        return
    verb = "goes on" if resumed else "starts"
    console.print(
        f"cell {number}/{tally.total} {title(run)} {verb}: {tally.done} done, 1 running, {tally.failed} failed, "
        f"{tally.left - 1} left, {tally.estimate(tally.left)}",
        style="bold",
    )
    begin = time.monotonic()
    status = _wait_for(_start(run), run)
    if status == cell_process.LOCKED:
        console.print(f"cell {number}/{tally.total} {title(run)}: running elsewhere, left to that process")
        tally.skipped += 1
        return
    record = _settle(run, status)
    if record["status"] == "done":
        tally.done += 1
        tally.seconds += time.monotonic() - begin
        tally.timed += 1
        took = duration(time.monotonic() - begin)
        split = judged_by(run.tested)
        console.print(f"  done in {took}: {split} top-1 {100 * record['metrics'][f'{split}_top1']:.2f}%")
    else:
        tally.failed += 1
        console.print(f"  {record['status']}: {record['error']}", style="red", markup=False)
        console.print(f"  in {run.folder}")


def _start_forkserver() -> None:
    # Asking whether there is a GPU must not start CUDA in the process that all runs are forked from.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["msv.ablation.cell"])
    from multiprocessing import forkserver

    forkserver.ensure_running()


def _start(run: Run) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    script = Path(cell_process.__file__).parents[2] / "cli.py"
    process = context.Process(target=cell_process.child_main, args=(str(run.folder), str(script)))
    process.start()
    return process


def _wait_for(process: ForkServerProcess, run: Run) -> int:
    """The exit status of a run's process, which is ended if we are asked to stop."""
    try:
        process.join()
    except Stopped:
        for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(sign, signal.SIG_IGN)
        process.terminate()
        process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()
        with suppress(OSError, ValueError):
            if read_record(run.folder / RECORD_NAME)["status"] == "running":
                cell_process.update_record(run.folder, status="unfinished")
        raise
    return process.exitcode or 0


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


def _prepare(cli: ExperimentCLI, run: Run) -> None:
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
    write_record(path, {**fresh, **known, "status": "running", "command": cell_command(cli.words, run), "error": None})


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
        seconds = (read_record(run.folder / RECORD_NAME).get("timing") or {}).get("train_seconds")
        if seconds:
            tally.seconds += seconds
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
    base = command(words, without=("rerun", "dry_run", "only", "seeds"))
    return f"{base} --grid.only '[\"{run.cell.name}\"]' --grid.seeds '[{run.seed}]'"


def duration(seconds: float) -> str:
    """A time span to read."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
