"""`python cli.py compare`: the paper's comparison of whole systems, counted, and measured on request."""

import argparse
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from msv.kept import here
from msv.profiling import networks
from msv.profiling.commands import command_line, measure_all
from msv.profiling.devices import DEVICES, chosen_device
from msv.profiling.steps import PRECISIONS

from . import accuracy, throughput
from .pages import COMMAND
from .systems import MODELS, find
from .write import write_all


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the arguments after `compare`; returns the exit status, 1 where a row failed.

    Raises:
        FileNotFoundError: weights or images do not exist.
        ValueError: an option does not fit, a model is unknown, or weights or images are not what was expected.
        OSError: a file cannot be written, or a GPU is of no use any more.
    """
    options = _parser().parse_args(argv)
    _check(options)
    only = [find(name, "--only") for name in options.only] if options.only else None
    device = chosen_device(options.device)
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    logging.basicConfig(format="%(message)s")
    status = 0
    if options.weights:
        _evaluate(options, only, device, console)
    if options.measure:
        status = _measure(options, only, device, console)
    paths = write_all(options.out, options.timed)
    shown = ["table_6.md"] if options.measure else ["table_1.md"] if options.weights else ["table_1.md", "table_7.md"]
    for path in paths:
        if path.name in shown:
            console.print(path.read_text(encoding="utf-8"))
    for path in paths:
        console.print(f"wrote {path}")
    return status


def _evaluate(options: argparse.Namespace, only: list[str] | None, device: torch.device, console: Console) -> None:
    weights = accuracy.find_weights(options.weights, only)
    names = ", ".join(entry.model for entry in weights)
    console.print(f"top-1 of {names} on {_told(device)}{_slow(device)}")
    rows = accuracy.evaluate(
        weights,
        options.data_root,
        device,
        accuracy.store(options.out),
        here(device),
        f"{COMMAND} --weights DIR --data-root DIR",
        options.batch or (128 if device.type == "cuda" else 16),
        options.workers,
        options.again,
        lambda batches, name: track(batches, name, console=console, transient=True),
    )
    for row in rows:
        console.print(f"{row['model']}: {row['top1']}% of {int(row['images']):,} images ({row['file']})")


def _measure(options: argparse.Namespace, only: list[str] | None, device: torch.device, console: Console) -> int:
    """Measures what is missing; returns the exit status."""
    cases = throughput.plan(device, options.batch, options.size, only, options.precision, options.mode)
    console.print(
        f"throughput on {_told(device)}: {len(cases)} rows of batch {cases[0].batch}, {options.size}×{options.size}"
    )
    if device.type == "cpu":
        console.print(
            "a CPU: by default a small batch, float32, eager, few turns; --batch, --precision and --mode choose "
            "others. Its ratios say nothing about a GPU's"
        )
    options.only = only
    command = command_line("compare", options, _parser(), without=("timed", "weights", "data_root", "workers"))
    measure = partial(networks.measure_case, device=device, effort=networks.usual_effort(device))
    kept = networks.store(options.timed, device)
    return measure_all(cases, measure, device, kept, command, options.again, console, networks.speed).status


def _told(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU (no GPU is used)"


def _slow(device: torch.device) -> str:
    return "" if device.type == "cuda" else "; of 50,000 images that takes hours"


def _check(options: argparse.Namespace) -> None:
    if bool(options.weights) != bool(options.data_root):
        given, other = ("--weights", "--data-root") if options.weights else ("--data-root", "--weights")
        raise ValueError(
            f"{given} needs {other}: accuracy is measured with weights (--weights DIR or NAME=FILE) on the images of "
            "--data-root DIR, which has val/<class>/*.JPEG"
        )
    for name in ("precision", "mode"):
        if getattr(options, name) and not options.measure:
            raise ValueError(f"--{name} belongs to --measure throughput; add that")
    for name in ("only", "batch", "again"):
        if getattr(options, name) and not (options.measure or options.weights):
            raise ValueError(f"--{name} belongs to --measure throughput or --weights; add one of them")
    if options.size < 32:
        raise ValueError(f"--size is {options.size}; expected 32 or more")
    if options.size != 224 and not options.measure:
        raise ValueError("--size belongs to --measure throughput; counts are at 224×224, as the paper's are")
    if options.batch is not None and options.batch < 1:
        raise ValueError(f"--batch is {options.batch}; expected 1 or more")
    if options.workers < 0:
        raise ValueError(f"--workers is {options.workers}; expected 0 or more")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py compare",
        description="The paper's comparison of whole systems: Table 1 (parameters, FLOPs, accuracy), Table 7 "
        "(architectures) and Fig. 1 (accuracy against FLOPs); with --measure throughput also Table 6. What is measured "
        "here and what the paper printed have columns of their own.",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/comparison"), metavar="DIR", help="for tables and accuracies "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", choices=DEVICES, help="auto: a GPU if there is one")
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help=f"measure these models alone: {', '.join(MODELS)}; swin_tiny will do"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="images of a forward (default: 128; on a CPU 2, or 16 for accuracy)"
    )
    parser.add_argument("--again", action="store_true", help="measure anew what was measured on this very machine")
    top1 = parser.add_argument_group("accuracy (Table 1, Fig. 1)")
    top1.add_argument(
        "--weights", nargs="+", metavar="DIR or NAME=FILE",
        help="files of weights: a folder with files called by a model's name (vmamba_tiny.pth), or NAME=FILE",
    )  # fmt: skip
    top1.add_argument(
        "--data-root", "--data_root", type=Path, metavar="DIR", help="ImageNet: the folder that has val/<class>/*.JPEG"
    )
    top1.add_argument("--workers", type=int, default=8, metavar="N", help="processes that load images (default: 8)")
    speed = parser.add_argument_group("throughput (Table 6)")
    speed.add_argument(
        "--measure", choices=("throughput",), help="images a second in inference, and memory; rows that are finished "
        "are skipped, so that it goes on where it was",
    )  # fmt: skip
    speed.add_argument(
        "--timed", type=Path, default=Path("results/benchmarks"), metavar="DIR", help="where those rows are kept, with "
        "those of `benchmark network` (default: %(default)s)",
    )  # fmt: skip
    speed.add_argument("--size", type=int, default=224, metavar="N", help="side of the images (default: 224)")
    speed.add_argument("--precision", nargs="+", choices=tuple(PRECISIONS), help="instead of the usual ones")
    speed.add_argument("--mode", nargs="+", choices=throughput.MODES, help="instead of the usual ones")
    return parser
