"""`python cli.py profile`: parameters and FLOPs of models, by part, for reading or for machines."""

import argparse
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from msv.models import PRESETS, TimmModel

from .counts import Counts, count


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the arguments after `profile`; returns the exit status.

    Raises:
        ValueError: an unknown model, or an image it does not take.
    """
    options = _parser().parse_args(argv)
    if options.image_size < 32:
        raise ValueError(f"--image_size is {options.image_size}; expected 32 or more")
    found = {
        name: count(TimmModel(name)(options.in_chans, options.num_classes), options.in_chans, options.image_size)
        for name in options.model
    }
    if options.json:
        size = {"image_size": options.image_size, "in_chans": options.in_chans, "num_classes": options.num_classes}
        entries = [{"model": name, **size, **as_json(counts)} for name, counts in found.items()]
        print(json.dumps(entries[0] if len(entries) == 1 else entries, indent=2))
        return 0
    console = Console()
    console.print(_summary(found, options.image_size, options.num_classes))
    for name, counts in found.items():
        console.print(_by_part(name, counts))
    console.print(
        "GFLOPs (paper): a multiply-accumulate is one, scans 9·L·D·N and L·D, LayerNorm 5 an element, interpolation 4 "
        "an output.\nGFLOPs (plain): a multiply-accumulate is two, scans 9·L·D·N and 2·L·D, nothing else.",
        highlight=False,
    )
    return 0


def as_json(counts: Counts) -> dict:
    """`params`, `gflops_fvcore` (the paper's convention), `gflops` (plain), and the same for each part."""

    def entry(params: int, fvcore: int, plain: int) -> dict:
        return {"params": params, "gflops_fvcore": fvcore / 1e9, "gflops": plain / 1e9}

    total = entry(counts.params, counts.flops_fvcore, counts.flops)
    return {**total, "parts": {part: entry(*numbers) for part, numbers in counts.parts.items()}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cli.py profile", description="Counts parameters and FLOPs of models.")
    parser.add_argument(
        "--model",
        nargs="+",
        default=list(PRESETS),
        metavar="NAME",
        help=f"models of timm's registry (default: the presets {', '.join(PRESETS)})",
    )
    parser.add_argument("--image_size", type=int, default=224, help="side of the image in pixels (default: 224)")
    parser.add_argument("--in_chans", type=int, default=3, help="channels of the image (default: 3)")
    parser.add_argument("--num_classes", type=int, default=1000, help="classes of the head (default: 1000)")
    parser.add_argument("--json", action="store_true", help="print JSON for machines: an object, or a list of them")
    return parser


def _table(title: str, first: str) -> Table:
    table = Table(first, title=title, title_justify="left")
    for column in ("params", "GFLOPs (paper)", "GFLOPs (plain)"):
        table.add_column(column, justify="right")
    return table


def _row(params: int, fvcore: int, plain: int) -> tuple[str, str, str]:
    return f"{params:,}", f"{fvcore / 1e9:.3f}", f"{plain / 1e9:.3f}"


def _summary(found: dict[str, Counts], image_size: int, num_classes: int) -> Table:
    table = _table(f"one image of {image_size}×{image_size}, {num_classes} classes", "model")
    for name, counts in found.items():
        table.add_row(name, *_row(counts.params, counts.flops_fvcore, counts.flops))
    return table


def _by_part(name: str, counts: Counts) -> Table:
    table = _table(name, "part")
    for part, numbers in counts.parts.items():
        if any(numbers):
            table.add_row(part, *_row(*numbers))
    return table
