"""The systems that the paper's Table 1 compares, and the networks here that are the same."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from torch import nn

from msv.ablation.config import nearest
from msv.ablation.paper import TABLE_1, TABLE_6, ComparisonRow
from msv.models import PRESETS
from msv.profiling import Counts, count, networks
from msv.profiling.devices import without_weights

REFERENCE = "vmamba_tiny"
"""The model that throughput is told in multiples of, as the paper's text does."""

# The weights that the paper's row quotes, or come nearest to it, decide how an image is prepared for the network.
_TIMM = {
    "RegNetY-800M": "regnety_008.pycls_in1k",
    "RegNetY-1.6G": "regnety_016.pycls_in1k",
    "RegNetY-4G": "regnety_040.pycls_in1k",
    "DeiT-S": "deit_small_patch16_224.fb_in1k",
    "DeiT-B": "deit_base_patch16_224.fb_in1k",
    "Swin-T": "swin_tiny_patch4_window7_224.ms_in1k",
    "Swin-S": "swin_small_patch4_window7_224.ms_in1k",
    "Swin-B": "swin_base_patch4_window7_224.ms_in1k",
}


@dataclass(frozen=True)
class System:
    """A system to compare.

    Attributes:
        name: as tables show it.
        family: the name without its size.
        model: its name in timm's registry, with the tag of its weights; None where there is no such network here.
        paper: its row of Table 1, if it has one.
        note: what a reader of the row has to know.
        in_table_1: whether it stands in Table 1 here; otherwise its throughput alone is measured.
    """

    name: str
    family: str
    model: str | None
    paper: ComparisonRow | None
    note: str = ""
    in_table_1: bool = True

    @property
    def key(self) -> str | None:
        """The model's name without a tag: what options, files and tables call it."""
        return None if self.model is None else self.model.partition(".")[0]

    @property
    def source(self) -> str:
        """Where its network comes from."""
        if self.model is None:
            return "not in this project"
        return "this project" if self.key in PRESETS else "timm"


def _system(row: ComparisonRow) -> System:
    name = 'VMamba-S (printed as "VMamba-B")' if row.preset == "vmamba_small" else row.name
    return System(name, row.name.partition("-")[0], row.preset or _TIMM.get(row.name), row, row.note)


def _systems() -> tuple[System, ...]:
    found = []
    for row in TABLE_1:
        found.append(_system(row))
        if row.preset == "vmamba_small":
            note = "VMamba's own Base; the paper prints no numbers of it"
            found.append(System("VMamba-B", "VMamba", "vmamba_base", None, note))
    return (*found, System("ConvNeXt-T", "ConvNeXt", "convnext_tiny", None, in_table_1=False))


SYSTEMS: tuple[System, ...] = _systems()
"""Table 1 in the paper's order, VMamba's own Base beside the row that has its name, and ConvNeXt-T for its speed."""

MODELS: dict[str, System] = {system.key: system for system in SYSTEMS if system.key is not None}
"""Those that can be run, by name of their model."""

TABLE_1_MODELS = [key for key, system in MODELS.items() if system.in_table_1]
"""Those whose accuracy is compared."""

SWIN = "swin_tiny_patch4_window7_224"
COMPILED_TOO = (SWIN, "convnext_tiny")
"""Models beside those of Table 6 whose throughput is measured compiled, too."""


def find(name: str, option: str, models: Iterable[str] = MODELS) -> str:
    """The model that a user means: its name, with or without timm's tag, or its part before the patch size.

    Raises:
        ValueError: no model here has that name.
    """
    models = list(models)
    short = {model.partition("_patch")[0]: model for model in models}
    plain = name.partition(".")[0]
    if plain in models or plain in short:
        return short.get(plain, plain)
    for family in dict.fromkeys(system.family for system in SYSTEMS if system.model is None):
        usual = family.lower()
        spellings = (usual, usual.replace("eff", "efficient"))
        if re.split(r"[-_]", plain.lower())[0] in spellings:
            raise ValueError(
                f"{option}: {name!r}: {family} is not in this project; its numbers are quoted from the paper alone. "
                f"Expected one of {', '.join(models)}"
            )
    raise ValueError(f"{option}: {name!r} is no model of the comparison; {nearest(plain, [*short, *models])}")


def order(model: str) -> int:
    """Where a model stands in tables of speed: those of the paper's Table 6 first, then Table 1's order."""
    first = list(TABLE_6)
    return first.index(model) if model in first else len(first) + list(MODELS).index(model)


def create(model: str, image_size: int = 224) -> nn.Module:
    """The network of a model of `MODELS` for 1000 classes and square images, with random weights."""
    return networks.create(MODELS[model].model or model, image_size)


@cache
def counts(model: str, image_size: int = 224) -> Counts:
    """Parameters and FLOPs of a model of `MODELS` for one image with 1000 classes; no memory is filled for it."""
    return count(without_weights(lambda: create(model, image_size)), image_size=image_size)
