"""Grids: one base config, expanded into named cells and seeds, each a run with a folder of its own."""

import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import disk_usage
from typing import Any

import yaml
from filelock import FileLock

from msv.ablation.config import apply_overrides, canonical, config_hash, get_path, nearest
from msv.ablation.names import check_name, name_part, toggle_names
from msv.files import write_atomic
from msv.grid_section import Grid

GRID_FILE = "grid.yaml"
_GRID_FILE_KEYS = frozenset({"name", "recipe", "baseline", "command", "toggles", "cells"})
# What `results/` and a grid's own folder hold beside grids and cells.
_RESERVED_GRIDS = frozenset({"measured", "benchmarks", "comparison", "counted", "readme.md"})
_RESERVED_CELLS = frozenset({GRID_FILE, "table.csv", "table.md", "accuracy_vs_flops.png"})
_HASH = re.compile(r"[0-9a-f]{8}")
# A run of the shipped networks keeps a checkpoint of up to ~100 MB, and writes the next before it drops the last.
MIN_FREE_BYTES = 200_000_000


@dataclass(frozen=True)
class Cell:
    """A row of the table: the overrides that make it (full dotted key -> value) and its toggles (short name -> value).

    Out of `expand`, toggles hold the cell's own overrides; out of `resolve_runs`, every toggle of the grid.
    """

    name: str
    overrides: dict[str, Any]
    toggles: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training: a cell with one seed, its whole config, the folder it lives in, and whether it ends with a test."""

    grid: str
    recipe: str
    cell: Cell
    seed: int
    config: dict[str, Any]
    config_hash: str
    folder: Path
    tested: bool = True


def expand(grid: Grid) -> list[Cell]:
    """All cells of a grid, in table order: the product of the axes, then the explicit cells.

    ``grid.only`` is checked and does not narrow the result (see `selected`).

    Raises:
        ValueError: an empty grid or axis, a value or seed given twice, two cells of one name, a name that is no safe
            folder name, a baseline, ``only``, ``against`` or group that names no cell, a cell in two groups or against
            itself, a key that a grid cannot set.
    """
    check_name("grid.name", grid.name, reserved=_RESERVED_GRIDS)
    if grid.recipe is not None:
        check_name("grid.recipe", grid.recipe)
    if not grid.axes and not grid.cells:
        raise ValueError(
            f"grid {grid.name!r} is empty; give it `axes` (key: [values]) or `cells` (name: {{key: value}})"
        )
    _check_seeds(grid.seeds)
    for key, values in grid.axes.items():
        _check_axis(key, values)
    short = toggle_names([*grid.axes, *(key for overrides in grid.cells.values() for key in overrides)])

    cells: dict[str, Cell] = {}
    for point in itertools.product(*grid.axes.values()) if grid.axes else ():
        overrides = dict(zip(grid.axes, point, strict=True))
        name = ",".join(f"{short[key]}={name_part(key, value)}" for key, value in overrides.items())
        _add_cell(cells, name, overrides, short, "axes")
    for name, overrides in grid.cells.items():
        for key in overrides:
            _check_key(key)
        _add_cell(cells, str(name), overrides, short, "cells")

    if grid.baseline is not None and grid.baseline not in cells:
        raise ValueError(
            f"grid.baseline {grid.baseline!r} is no cell of grid {grid.name!r}; {nearest(grid.baseline, cells)}"
        )
    for name in grid.only:
        if name not in cells:
            raise ValueError(
                f"grid.only names {name!r}, which is no cell of grid {grid.name!r}; {nearest(name, cells)}"
            )
    _check_table(grid, cells)
    return list(cells.values())


def resolve_runs(
    grid: Grid, base_config: Mapping[str, Any], resolve: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> list[Run]:
    """All runs of a grid, every cell with every seed, in the order in which they run: seed by seed within a cell.

    Args:
        grid: the grid.
        base_config: resolved config of the experiment, defaults included, as plain dicts and lists.
        resolve: checks a cell's config and returns it with its defaults filled in, ValueError or TypeError if it is
            wrong. By default the config stands as it is.

    Raises:
        ValueError: what `expand` and `apply_overrides` refuse, and what ``resolve`` does, naming the cell; two cells
            that come out as the same configuration.
    """
    cells = expand(grid)
    recipe = recipe_name(grid, base_config)
    short = toggle_names([key for cell in cells for key in cell.overrides])
    runs: list[Run] = []
    twins: dict[str, str] = {}
    for cell in cells:
        for seed in grid.seeds:
            try:
                config = with_seed(apply_overrides(base_config, cell.overrides), seed)
                config = config if resolve is None else resolve(config)
            except (TypeError, ValueError) as error:
                raise ValueError(f"cell {cell.name!r} of grid {grid.name!r}: {error}") from error
            digest = config_hash(config, grid.test)
            twin = twins.setdefault(digest, cell.name)
            if twin != cell.name:
                raise ValueError(
                    f"cells {twin!r} and {cell.name!r} of grid {grid.name!r} are the same configuration, so one would "
                    "stand in the table twice; drop one, or let them differ in something that is trained"
                )
            full = replace(cell, toggles=cell_toggles(cell, config, short))
            folder = run_folder(grid_folder(grid, recipe), cell.name, seed, digest)
            runs.append(Run(grid.name, recipe, full, seed, config, digest, folder, grid.test))
    return runs


def selected(grid: Grid, runs: Sequence[Run]) -> list[Run]:
    """The runs that ``grid.only`` leaves, all of them where it is empty."""
    return [run for run in runs if not grid.only or run.cell.name in grid.only]


def with_seed(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A copy of a config with another seed."""
    return {**config, "seed_everything": seed}


def recipe_name(grid: Grid, config: Mapping[str, Any]) -> str:
    """The recipe's name: as the grid has it, else the data class's name in snake case (``Digits``: ``digits``).

    Raises:
        ValueError: the grid names none and the config has no data.
    """
    if grid.recipe is not None:
        return grid.recipe
    data = config.get("data")
    class_path = str(data.get("class_path") or "") if isinstance(data, Mapping) else ""
    if not class_path:
        raise ValueError(f"grid {grid.name!r} has no recipe and the config no `data`; give one of them")
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", class_path.rpartition(".")[2]).lower()


def grid_folder(grid: Grid, recipe: str) -> Path:
    """``<results>/<grid>/<recipe>``."""
    return Path(grid.results) / grid.name / recipe


def run_folder(folder: Path, cell: str, seed: int, digest: str) -> Path:
    """A run's folder in its grid's folder: ``<cell>/seed<k>-<hash8>``."""
    return folder / cell / f"seed{seed}-{digest}"


def write_grid_file(grid: Grid, runs: Sequence[Run], command: str) -> Path:
    """Write ``grid.yaml``, the list of a grid's current runs, atomically.

    Every cell of the grid as it is now is listed, whatever ``grid.only`` runs. A seed that an earlier file lists for a
    cell, and that this grid does not ask for, stays listed as long as its hash is that of the cell's present config
    with that seed; so seeds may be run in portions, while runs of a config that has changed drop out of the tables.

    Args:
        grid: the grid.
        runs: all of `resolve_runs`, not a selection.
        command: what a user types to run the grid again.

    Returns:
        The path of the file.

    Raises:
        ValueError: the runs lack a cell of the grid, or the file in place is no grid file.
        OSError: the file cannot be written.
    """
    cells = expand(grid)
    first = {cell.name: [run for run in runs if run.cell.name == cell.name][:1] for cell in cells}
    lacking = [name for name, found in first.items() if not found]
    if lacking:
        raise ValueError(f"the runs lack the cells {', '.join(lacking)}; {GRID_FILE} lists all of them")
    folder = runs[0].folder.parent.parent
    path = folder / GRID_FILE
    folder.mkdir(parents=True, exist_ok=True)
    # Two jobs of an array may run different seeds of one grid at the same time.
    with FileLock(folder / f".{GRID_FILE}.lock"):
        before = read_grid_file(folder)["cells"] if path.is_file() else {}
        listed = {}
        for name, (sample,) in first.items():
            hashes = {run.seed: run.config_hash for run in runs if run.cell.name == name}
            for seed, digest in before.get(name, {"runs": {}})["runs"].items():
                if seed not in hashes and config_hash(with_seed(sample.config, seed), grid.test) == digest:
                    hashes[seed] = digest
            listed[name] = {"toggles": _plain(sample.cell.toggles), "runs": dict(sorted(hashes.items()))}
        content = {
            "name": grid.name,
            "recipe": runs[0].recipe,
            "baseline": grid.baseline,
            "against": dict(grid.against),
            "groups": {title: dict(cells) for title, cells in grid.groups.items()},
            "test": grid.test,
            "results": Path(grid.results).as_posix(),
            "command": command,
            "toggles": list(toggle_names([key for cell in cells for key in cell.overrides]).values()),
            "cells": listed,
        }
        write_atomic(path, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=10_000))
    return path


def read_grid_file(folder: Path) -> dict[str, Any]:
    """Read the ``grid.yaml`` of a grid's folder.

    Returns:
        ``name, recipe, baseline, against, groups, test, results, command, toggles`` and ``cells``: name -> {"toggles":
        {...}, "runs": {seed: hash}}.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no whole grid file.
    """
    path = Path(folder) / GRID_FILE
    fix = "run `fit` on the grid again, which writes it anew, after moving this file aside"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is truncated or damaged; expected the list of a grid's runs; {fix}") from error
    whole = isinstance(content, dict) and set(content) >= _GRID_FILE_KEYS
    if not whole or not isinstance(content["cells"], dict) or not isinstance(content["toggles"], list):
        raise ValueError(
            f"{path} is no whole grid file; expected name, recipe, baseline, command, toggles and cells; {fix}"
        )
    for name, cell in content["cells"].items():
        runs = cell.get("runs") if isinstance(cell, dict) else None
        if not isinstance(runs, dict) or not isinstance(cell.get("toggles"), dict):
            raise ValueError(f"{path}: cell {name!r} is {cell!r}, expected toggles and runs; {fix}")
        for seed, digest in runs.items():
            if not isinstance(seed, int) or not isinstance(digest, str) or not _HASH.fullmatch(digest):
                raise ValueError(
                    f"{path}: cell {name!r} lists {seed!r}: {digest!r}, expected seed: 8 hex digits; {fix}"
                )
    # A file of an earlier version has no groups, and says nothing of the test.
    listed = {"against": {}, "groups": {}, "test": True, "results": "results", **content}
    if not isinstance(listed["test"], bool):
        raise ValueError(f"{path}: 'test' is {listed['test']!r}, expected true or false; {fix}")
    return listed


def check_results_root(path: Path) -> None:
    """Make sure, before anything trains, that results can be kept in a folder; it is made where it is missing.

    Args:
        path: the results root, or the folder of one grid.

    Raises:
        OSError: a file lies in its place, it cannot be written to, or less than `MIN_FREE_BYTES` are free.
    """
    path = Path(path)
    choose = "choose another --grid.results"
    blocking = next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None)
    if blocking is not None:
        raise NotADirectoryError(f"results folder {path}: {blocking} is a file, expected a folder; move it or {choose}")
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
        free = disk_usage(path).free
    except OSError as error:
        raise OSError(f"results folder {path} cannot be written to ({error.strerror}); fix that or {choose}") from error
    if free < MIN_FREE_BYTES:
        raise OSError(
            f"no space for results in {path}: {free / 1e6:.0f} MB free, "
            f"expected at least {MIN_FREE_BYTES / 1e6:.0f} MB; free some space or {choose}"
        )


def _check_seeds(seeds: Sequence[int]) -> None:
    if not seeds:
        raise ValueError("grid.seeds is empty; expected at least one seed, such as [0]")
    for seed in seeds:
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise ValueError(f"grid.seeds holds {seed!r}; expected whole numbers from 0 to 4294967295")
    repeated = [seed for index, seed in enumerate(seeds) if seed in seeds[:index]]
    if repeated:
        raise ValueError(f"grid.seeds holds {repeated[0]} twice in {list(seeds)}; give each seed once")


def _check_key(key: str) -> None:
    if key == "seed_everything" or key.partition(".")[0] == "grid":
        fix = "use grid.seeds" if key == "seed_everything" else "expected a key of the experiment, such as data.x"
        raise ValueError(f"a grid cannot set {key!r}; {fix}")


def _check_axis(key: str, values: Any) -> None:
    _check_key(key)
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"grid axis {key!r} is {values!r}; expected a list of values, such as [{values!r}]")
    if not values:
        raise ValueError(f"grid axis {key!r} is empty; give it values, or drop it")
    seen: set[str] = set()
    for value in values:
        text = canonical(value)
        if text in seen:
            raise ValueError(f"grid axis {key!r} holds {value!r} twice in {list(values)!r}; give each value once")
        seen.add(text)


def _check_table(grid: Grid, cells: Iterable[str]) -> None:
    """Check what the grid says of its table: which rows are compared, and how they are grouped."""
    named = [("against", name) for pair in grid.against.items() for name in pair]
    named += [("groups", name) for group in grid.groups.values() for name in group]
    for section, name in named:
        if name not in cells:
            raise ValueError(
                f"grid.{section} names {name!r}, which is no cell of grid {grid.name!r}; {nearest(name, cells)}"
            )
    for name, other in grid.against.items():
        if name in (other, grid.baseline):
            raise ValueError(
                f"grid.against compares {name!r} with {other!r}; expected a cell other than itself, and none for the "
                "baseline, which differences refer to"
            )
    grouped = [name for section, name in named if section == "groups"]
    repeated = next((name for index, name in enumerate(grouped) if name in grouped[:index]), None)
    if repeated is not None:
        raise ValueError(f"grid.groups names {repeated!r} twice; give each cell one group")


def _add_cell(
    cells: dict[str, Cell], name: str, overrides: Mapping[str, Any], short: Mapping[str, str], section: str
) -> None:
    check_name(f"cell name (grid.{section})", name, reserved=_RESERVED_CELLS)
    clash = next((other for other in cells if other.lower() == name.lower()), None)
    if clash is not None:
        raise ValueError(
            f"two cells are named {name!r}"
            + ("" if clash == name else f" and {clash!r}, one folder on some systems")
            + " (in grid.axes and grid.cells together); rename or drop one"
        )
    cells[name] = Cell(name, dict(overrides), {short[key]: value for key, value in overrides.items()})


def cell_toggles(cell: Cell, config: Mapping[str, Any], short: Mapping[str, str]) -> dict[str, Any]:
    """Every toggle of a grid with its value in a cell; absent where the cell's config has no such key.

    Args:
        cell: out of `expand`.
        config: the cell's, resolved.
        short: dotted key -> name of the toggle.
    """
    toggles = {}
    for key, name in short.items():
        try:
            value = cell.overrides[key] if key in cell.overrides else get_path(config, key)
        except KeyError:
            continue
        if key not in cell.overrides and isinstance(value, Mapping):
            # A subtree that another cell replaces: here it is the base config's, too long to spell out.
            value = str(value.get("class_path", "base")).rpartition(".")[2]
        toggles[name] = value
    return toggles


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
