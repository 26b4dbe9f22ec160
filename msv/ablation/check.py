"""What can be known to be wrong with a grid before anything trains."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from msv.ablation.cell import one_line
from msv.ablation.config import apply_overrides
from msv.ablation.grid import Run, expand, resolve_runs
from msv.ablation.records import RECORD_NAME, read_record
from msv.experiment import LAST, ExperimentCLI, parse_experiment
from msv.grid_section import Grid
from msv.models.checkpoint_file import read_checkpoint

IDENTITY = ("name", "train_images", "val_images", "test_images", "num_classes")
"""What tells data apart in a record."""


def resolve_all(cli: ExperimentCLI, grid: Grid) -> list[Run]:
    """Every run of a grid with its config resolved: parsed again with the cell's values, defaults filled in.

    Raises:
        ValueError: names every cell whose keys or values the parser refuses.
    """
    base = cli.resolved()
    problems: dict[str, str] = {}
    for cell in expand(grid):
        try:
            parse_experiment(cli, apply_overrides(base, cell.overrides))
        except (TypeError, ValueError) as error:
            problems[cell.name] = one_line(error)
    _raise_together(grid.name, problems)
    return resolve_runs(grid, base, lambda config: parse_experiment(cli, config))


def check_runs(runs: Sequence[Run], fresh: bool, workers: int = 1) -> None:
    """Build the objects of every different config, and read what earlier runs left, without training.

    Args:
        runs: the runs to come.
        fresh: whether earlier runs are moved aside, so that what they left does not matter.
        workers: how many of them train side by side.

    Raises:
        ValueError: names every cell with something wrong: data, network, image size, device, schedule, a damaged
            record or checkpoint, several devices beside several workers.
    """
    problems: dict[str, str] = {}
    known: dict[str, str | None] = {}
    checked: set[str] = set()
    for run in runs:
        key = json.dumps({**run.config, "seed_everything": 0}, sort_keys=True, default=str)
        if key not in known:
            known[key] = _problem(run.config, checked, workers)
        found = known[key] or (None if fresh else _leftover_problem(run))
        if found:
            problems[run.cell.name] = found
    _raise_together(runs[0].grid if runs else "", problems)


class DataNow:
    """The data that configs find now; each data section is looked at once."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Any] | None] = {}

    def changes(self, run: Run, record: Mapping[str, Any]) -> str:
        """How the data of a record differ from those that a run finds now.

        The data's root is no part of a run's hash. Data that cannot be read now, and a record without any, say nothing.
        """
        key = json.dumps(run.config["data"], sort_keys=True, default=str)
        if key not in self._known:
            self._known[key] = _data_now(run.config)
        now, then = self._known[key], record["data"]
        if now is None or not then:
            return ""
        return "; ".join(
            f"{name} {then.get(name)!r}, now {now[name]!r}" for name in IDENTITY if then.get(name) != now[name]
        )


def check_same_data(runs: Sequence[Run]) -> None:
    """Refuse to skip or resume runs whose data are others by now.

    Args:
        runs: runs that have a record.

    Raises:
        ValueError: a record's data are not those that the config finds now.
    """
    problems: dict[str, str] = {}
    data = DataNow()
    for run in runs:
        changes = data.changes(run, read_record(run.folder / RECORD_NAME))
        if changes:
            problems[run.cell.name] = (
                f"trained on other data ({changes}): name these data with --grid.recipe NAME, or train "
                "anew with --grid.rerun all, which moves the old runs aside"
            )
    _raise_together(runs[0].grid if runs else "", problems)


def _data_now(config: dict[str, Any]) -> dict[str, Any] | None:
    try:
        cli = ExperimentCLI(args={**config, "trainer": {**config["trainer"], "logger": False}}, run=False)
        return cli.datamodule.summary()
    except (OSError, ValueError):
        return None


def _problem(config: dict[str, Any], checked: set[str], workers: int) -> str | None:
    """What is wrong with a config; ``checked`` holds the data sections whose files have been looked at."""
    try:
        cli = ExperimentCLI(args={**config, "trainer": {**config["trainer"], "logger": False}}, run=False)
        data, model = cli.datamodule, cli.model
        if workers > 1 and cli.trainer.world_size > 1:
            raise ValueError(
                f"grid.workers={workers} and {cli.trainer.world_size} devices a run (trainer.devices, "
                "trainer.num_nodes): runs side by side share one device; set one of them to 1"
            )
        section = json.dumps(config["data"], sort_keys=True, default=str)
        if section not in checked:
            data.check()
            checked.add(section)
        model.check(cli.trainer, data)
        with torch.inference_mode():
            model.network.eval()(torch.zeros(1, data.in_chans, data.image_size, data.image_size))
    except Exception as error:  # whatever a class of the user's raises is said of the cell it belongs to
        return one_line(error)
    return None


def _leftover_problem(run: Run) -> str | None:
    try:
        if (run.folder / RECORD_NAME).is_file():
            read_record(run.folder / RECORD_NAME)
        if (run.folder / LAST).is_file():
            last = run.folder / LAST
            read_checkpoint(last, map_location="meta", fix=f"delete it to start again without it: rm {last}")
    except (OSError, ValueError) as error:
        return one_line(error)
    return None


def _raise_together(grid: str, problems: dict[str, str]) -> None:
    if not problems:
        return
    texts = dict.fromkeys(problems.values())
    lines = [f"{', '.join(cell for cell in problems if problems[cell] == text)}: {text}" for text in texts]
    if len(lines) == 1:
        raise ValueError(f"grid {grid!r}, {'cells' if len(problems) > 1 else 'cell'} {lines[0]}")
    raise ValueError(f"{len(problems)} cells of grid {grid!r} cannot run:\n  " + "\n  ".join(lines))
