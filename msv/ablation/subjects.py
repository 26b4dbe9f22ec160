"""What `profile` counts: presets, the rows of grids, and any model of timm's registry, each with what the paper prints.

The rows of Tables 4 and 5 are the cells of the grids that train them; no second list can say anything else.
"""

import difflib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before jsonargparse is imported; its names that version 5 will drop are not our users' concern.
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")

import timm
import yaml
from jsonargparse import ArgumentParser
from torch import nn

from msv.ablation.config import apply_overrides, get_path, nearest
from msv.ablation.grid import cell_toggles, expand
from msv.ablation.names import acting, toggle_names
from msv.ablation.paper import Printed, printed
from msv.files import EXPERIMENTS, shipped_grids
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
        toggles: of a cell, what its grid varies in the network: short name -> value.
        acting: those of them that can act in this network.
    """

    group: str
    name: str
    factory: Factory
    printed: Printed | None
    toggles: dict[str, Any] = field(default_factory=dict)
    acting: dict[str, Any] = field(default_factory=dict)


def subjects(names: Sequence[str] = ()) -> list[Subject]:
    """The models of some names, in their order and each once; without names all presets and all rows of `GRIDS`.

    Args:
        names: a preset or any model of timm's registry; a grid of `experiments/`, or one of its rows as GRID/CELL; a
            path to a grid's YAML.

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


def grid_rows(path: Path) -> tuple[Grid, list[Subject]]:
    """A grid and its cells, each with its own network; what else a cell sets costs nothing at a given image.

    Args:
        path: the grid's YAML, which has the network at `model.init_args.network`.

    Returns:
        The `grid` section, and the cells in its order.

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
    base = _config(parsed.network.as_dict())
    cells = expand(grid)
    names = toggle_names([key for cell in cells for key in cell.overrides])
    names = {key: name for key, name in names.items() if _in_network(key)}
    found = []
    for cell in cells:
        overrides = {key: value for key, value in cell.overrides.items() if _in_network(key)}
        try:
            network = get_path(apply_overrides(base, overrides), _NETWORK)
            with readable_errors():
                parsed = parser.parse_object({**sections, "network": network})
        except (TypeError, ValueError) as error:
            raise ValueError(f"cell {cell.name!r} of grid {grid.name!r}: {error}") from error
        network = parsed.network.as_dict()
        factory = parser.instantiate_classes(parsed).network
        toggles = cell_toggles(cell, _config(network), names)
        found.append(Subject(grid.name, cell.name, factory, printed(network), toggles, acting(toggles, network)))
    return grid, found


def _in_network(key: str) -> bool:
    return f"{key}.".startswith(f"{_NETWORK}.")


def _config(network: dict[str, Any]) -> dict[str, Any]:
    """As much of an experiment's config as has the network."""
    return {"model": {"init_args": {"network": network}}}


def _shipped(grid: str) -> list[Subject]:
    return grid_rows(EXPERIMENTS / f"{grid}.yaml")[1]


def _find(name: str) -> list[Subject]:
    if name in PRESETS:
        return [preset(name)]
    if Path(name).suffix in (".yaml", ".yml"):
        return grid_rows(Path(name))[1]
    grid = name.partition("/")[0]
    grids = [path.stem for path in shipped_grids()]
    if grid in grids:
        cells = _shipped(grid)
        chosen = [row for row in cells if name in (grid, f"{grid}/{row.name}")]
        if not chosen:
            raise ValueError(f"no row {name!r}; {nearest(name, [f'{grid}/{row.name}' for row in cells])}")
        return chosen
    if timm.is_model(name):
        return [Subject("timm", name, TimmModel(name), None)]
    ours = [*PRESETS, *grids]
    # timm's names are asked for, but a thousand of them help nobody who is near none.
    near = difflib.get_close_matches(name, dict.fromkeys([*ours, *timm.list_models()]), n=3)
    meant = f"did you mean {' or '.join(near)}? There are " if near else "there are "
    raise ValueError(
        f"no model, grid or row {name!r}; {meant}the presets {', '.join(PRESETS)}, the grids {', '.join(grids)}, and "
        "timm's models"
    )
