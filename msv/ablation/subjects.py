"""What `profile` counts: presets, the rows of grids, and any model of timm's registry, each with what the paper prints.

The rows of Tables 4 and 5 are the cells of the grids that train them; no second list can say anything else.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before jsonargparse is imported; its names that version 5 will drop are not our users' concern.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import timm
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from msv.ablation.config import apply_overrides, get_path, nearest
from msv.ablation.grid import expand
from msv.ablation.paper import Printed, printed
from msv.files import EXPERIMENTS
from msv.grid_section import Grid
from msv.models import PRESETS, TimmModel
from msv.parse_errors import readable_errors
from msv.profiling.profile import Factory

GRIDS = {"ablate_components": "Table 4", "ablate_scans": "Table 5"}
"""Grids that `profile` shows unasked, and the paper's tables that they are."""

_NETWORK = "model.init_args.network"


@dataclass(frozen=True)
class Subject:
    """A model to profile.

    Attributes:
        group: what it stands among: `presets`, `timm`, or the name of a grid.
        name: of the preset, the cell or timm's model.
        factory: makes the network from the channels of an image and the number of classes.
        printed: the paper's figures of the same network, for images of 3×224×224 and 1000 classes.
    """

    group: str
    name: str
    factory: Factory
    printed: Printed | None


def subjects(names: Sequence[str] = ()) -> list[Subject]:
    """The models of some names, in their order and each once; without names all presets and all rows of `GRIDS`.

    Args:
        names: a preset or any model of timm's registry; a grid of `GRIDS`, or one of its rows as GRID/CELL; a path to
            a grid's YAML.

    Raises:
        ValueError: a name that is none of these, with the nearest that are; a YAML that is no grid.
        OSError: a YAML that cannot be read.
    """
    if not names:
        return [*map(preset, PRESETS), *(row for grid in GRIDS for row in _shipped(grid))]
    found = [subject for name in dict.fromkeys(names) for subject in _find(name)]
    return list({(subject.group, subject.name): subject for subject in found}.values())


def preset(name: str) -> Subject:
    """A preset of this package."""
    network = {"class_path": "msv.models.MSVMamba", "init_args": PRESETS[name]}
    return Subject("presets", name, TimmModel(name), printed(network, name))


def rows(path: Path) -> list[Subject]:
    """The cells of a grid, each with its own network; what else a cell sets costs nothing at a given image.

    Args:
        path: the grid's YAML, which has the network at `model.init_args.network`.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no grid, or a cell's network has an unknown argument or one of a wrong type.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        sections = {"network": get_path(content, _NETWORK), "grid": get_path(content, "grid")}
    except (KeyError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} is no YAML with {_NETWORK} and grid; expected an experiment such as "
            f"experiments/{next(iter(GRIDS))}.yaml"
        ) from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--network", type=Callable[[int, int], nn.Module] | TimmModel)
    parser.add_argument("--grid", type=Grid)
    with readable_errors():
        parsed = parser.parse_object(sections)
    grid = Grid(**parsed.grid)
    base: Any = {"network": parsed.network.as_dict()}
    for key in reversed(_NETWORK.split(".")[:-1]):
        base = {key: base}
    found = []
    for cell in expand(grid):
        overrides = {key: value for key, value in cell.overrides.items() if f"{key}.".startswith(f"{_NETWORK}.")}
        try:
            network = get_path(apply_overrides(base, overrides), _NETWORK)
            with readable_errors():
                parsed = parser.parse_object({**sections, "network": network})
        except (TypeError, ValueError) as error:
            raise ValueError(f"cell {cell.name!r} of grid {grid.name!r}: {error}") from error
        factory = parser.instantiate_classes(parsed).network
        found.append(Subject(grid.name, cell.name, factory, printed(parsed.network.as_dict())))
    return found


def _shipped(grid: str) -> list[Subject]:
    return rows(EXPERIMENTS / f"{grid}.yaml")


def _find(name: str) -> list[Subject]:
    if name in PRESETS:
        return [preset(name)]
    if Path(name).suffix in (".yaml", ".yml"):
        return rows(Path(name))
    grid = name.partition("/")[0]
    if grid in GRIDS:
        cells = _shipped(grid)
        chosen = [row for row in cells if name in (grid, f"{grid}/{row.name}")]
        if not chosen:
            raise ValueError(f"no row {name!r}; {nearest(name, [f'{grid}/{row.name}' for row in cells])}")
        return chosen
    if timm.is_model(name):
        return [Subject("timm", name, TimmModel(name), None)]
    raise ValueError(f"no model, grid or row {name!r}; {nearest(name, [*GRIDS, *timm.list_models()])}")
