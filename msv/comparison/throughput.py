"""Images a second of the systems in inference (Table 6): which rows there are to measure, and those that are kept."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import torch

from msv.ablation.paper import TABLE_6
from msv.kept import Filter, Kept, Row, every, number, place
from msv.profiling import networks
from msv.profiling.networks import Case
from msv.profiling.steps import PRECISIONS

from .systems import COMPILED_TOO, MODELS, REFERENCE, order

MODES = ("eager", "compiled")


def stores(folder: Path) -> list[Kept]:
    """The files of a folder that have such rows, whether or not they are there."""
    return [networks.store(folder, kind) for kind in ("cuda", "cpu")]


def kept_rows(folder: Path, takes: Filter = every) -> list[Row]:
    """The rows of Table 6 among those that a folder keeps of whole networks: inference in one of `MODES`.

    Args:
        folder: where `network_cuda.csv` and `network_cpu.csv` lie, if they do.
        takes: which of their rows are taken.

    Raises:
        ValueError: a file is damaged, or has a row of another model.
    """
    rows = []
    for kept in stores(folder):
        found = [row for row in kept.read() if row["task"] == "inference" and row["mode"] in MODES and takes(row)]
        for row in found:
            if row["model"] not in MODELS:
                raise ValueError(f"{kept.path} has a row of {row['model']!r}, which is no model here")
        rows += found
    return rows


def plan(
    device: torch.device,
    batch: int | None = None,
    size: int = 224,
    only: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
) -> list[Case]:
    """The rows to measure, the paper's own models first.

    On a GPU those four run in every precision, eager and compiled, at batch 128; the others eager in bf16, Swin-T and
    ConvNeXt-T compiled, too. On a CPU, where that would take days, all run eager in float32 at batch 2.

    Args:
        device: of either kind.
        batch: instead of that batch.
        size: side of the images in pixels.
        only: these models alone, of `MODELS`.
        precisions: these instead, for every model.
        modes: these instead, for every model.
    """
    on_gpu = device.type == "cuda"
    cases = []
    for model in sorted(only or MODELS, key=order):
        own, compiled_too = model in TABLE_6, model in TABLE_6 or model in COMPILED_TOO
        usual = (tuple(PRECISIONS) if own else ("bf16",)) if on_gpu else ("float32",)
        ways = MODES if on_gpu and compiled_too else MODES[:1]
        cases += [
            Case(model, "inference", mode, precision, batch or (128 if on_gpu else 2), size)
            for precision, mode in itertools.product(precisions or usual, modes or ways)
        ]
    return cases


def ratio_to_reference(row: Row, rows: Sequence[Row]) -> float | None:
    """Images a second in multiples of VMamba-Tiny's of the same task, mode, precision, batch, size and place.

    None where `rows` have no such row of it, or one of the two failed.
    """

    def like(row: Row) -> tuple[str, ...]:
        return (*(row[name] for name in networks.KEY[1:]), *place(row))

    same = (other for other in rows if other["model"] == REFERENCE and like(other) == like(row))
    own, reference = number(row, "images_per_s"), next((number(other, "images_per_s") for other in same), None)
    return own / reference if own and reference else None
