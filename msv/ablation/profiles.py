"""`python cli.py profile`: what models cost, beside what the paper prints of the same networks."""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from msv.ablation.profile_tables import FORMATS, Line
from msv.ablation.step_trace import trace_step
from msv.ablation.subjects import GRIDS, subjects
from msv.files import shipped_grids, write_atomic
from msv.models import PRESETS
from msv.models.network import MIN_SIZE
from msv.profiling import profile_model
from msv.profiling.devices import DEVICES
from msv.profiling.steps import MODES, MODES_TOLD, PRECISIONS

# What the paper's counts are of: channels, height and width, classes.
PAPER_SETTING = (3, (224, 224), 1000)
_TRACED = ("inference", "mode", "precision", "device", "steps")
"""Options that say how a step is traced."""
_BY_SUFFIX = {".csv": "csv", ".md": "markdown", ".json": "json", ".txt": "table"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the arguments after `profile`; returns the exit status.

    Raises:
        ValueError: an unknown model, a number out of its range, an image that a model does not take, a batch that
            does not fit into memory, an output file whose format cannot be told.
        OSError: a grid's YAML cannot be read, or the output file not be written.
    """
    options = _parser().parse_args(argv)
    size = _size(options)
    named = [*options.models, *options.model]
    style = _format(options)
    _check(options)
    if options.trace is not None:
        return trace_step(named, size, style, options)
    console, status = Console(soft_wrap=True, markup=False, highlight=False), Console(stderr=True)
    batch = (options.batch_size or 1) if options.memory else None
    lines = []
    with status.status("counting") as spinner:
        for subject in subjects(named):
            spinner.update(f"{'measuring' if options.memory else 'counting'} {subject.name}")
            try:
                profile = profile_model(
                    subject.factory, size, options.in_chans, options.num_classes, name=subject.name, batch_size=batch
                )
            except ValueError as error:
                raise ValueError(f"{subject.name}: {error}") from error
            lines.append(Line(subject.group, profile, subject.printed))
    if (options.in_chans, size, options.num_classes) != PAPER_SETTING:
        lines = [replace(line, printed=None) for line in lines]
    # Someone who names models wants to know them; a list of all is for comparing.
    parts = bool(named) and style == "table" if options.parts is None else options.parts
    text = FORMATS[style](lines, parts)
    if options.out is None:
        console.print(text, end="")
    else:
        write_atomic(options.out, text)
        console.print(f"written to {options.out}")
    return 0


def _size(options: argparse.Namespace) -> tuple[int, int]:
    height, width = options.size or (options.image_size, options.image_size)
    if min(height, width) < MIN_SIZE:
        given = f"--size is {height} {width}" if options.size else f"--image_size is {height}"
        raise ValueError(f"{given}; expected {'both sides ' * bool(options.size)}{MIN_SIZE} or more")
    if options.batch_size is not None and options.batch_size < 1:
        raise ValueError(f"--batch_size is {options.batch_size}; expected 1 or more")
    return height, width


def _check(options: argparse.Namespace) -> None:
    """Refuse options that what is asked for has no use of."""
    given = [name for name in _TRACED if (value := getattr(options, name)) is not None and value is not False]
    if given and options.trace is None:
        raise ValueError(f"--{given[0]} belongs to --trace FILE; add that")
    if options.trace is not None and (options.memory or options.parts is not None):
        raise ValueError(f"--{'memory' if options.memory else 'parts'} belongs to counting; give it without --trace")
    if options.batch_size is not None and not options.memory and options.trace is None:
        raise ValueError("--batch_size belongs to --memory or --trace FILE; add one of them")


def _format(options: argparse.Namespace) -> str:
    if options.format is not None or options.out is None:
        return options.format or "table"
    if options.out.suffix not in _BY_SUFFIX:
        raise ValueError(
            f"--out {options.out}: the name tells no format; end it in {', '.join(_BY_SUFFIX)}, or give --format"
        )
    return _BY_SUFFIX[options.out.suffix]


def _parser() -> argparse.ArgumentParser:
    grids = ", ".join(path.stem for path in shipped_grids())
    parser = argparse.ArgumentParser(
        prog="cli.py profile",
        description="Counts parameters, FLOPs and activations of models beside the paper's figures, and measures the "
        f"peak memory of training. Without a name: all presets and all rows of {' and '.join(GRIDS.values())}.",
    )
    parser.add_argument(
        "models",
        nargs="*",
        metavar="NAME",
        help=f"a preset ({', '.join(PRESETS)}), any model of timm's registry, a grid ({grids}), one of its rows "
        "as GRID/ROW, or a path to a grid's YAML",
    )
    parser.add_argument("--model", nargs="+", default=[], metavar="NAME", help="the same, as an option")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="height and width of the image in pixels")
    sizes.add_argument("--image_size", type=int, default=224, help="side of a square image (default: 224)")
    parser.add_argument("--in_chans", type=int, default=3, help="channels of the image (default: 3)")
    parser.add_argument("--num_classes", type=int, default=1000, help="classes of the head (default: 1000)")
    parser.add_argument(
        "--parts",
        action=argparse.BooleanOptionalAction,
        help="parameters and FLOPs by part of the network (default: where models are named and a table is printed)",
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="measure the peak memory of a forward and backward pass in float32 on this machine; on a CPU this takes "
        "minutes for the large models",
    )
    parser.add_argument(
        "--batch_size", type=int, help="images of that batch (default: 1; with --trace 128, on a CPU 8)"
    )
    traced = parser.add_argument_group("where a step goes")
    traced.add_argument(
        "--trace",
        type=Path,
        metavar="FILE",
        help="instead of counting, run one model's training step, write a Chrome trace to FILE (.json or .json.gz), "
        "and show how the time falls to families of kernels",
    )
    traced.add_argument("--inference", action="store_true", help="a forward in evaluation mode instead")
    traced.add_argument("--mode", choices=MODES, help=f"default: eager; {MODES_TOLD}")
    traced.add_argument("--precision", choices=tuple(PRECISIONS), help="default: bf16; on a CPU float32")
    traced.add_argument("--device", choices=DEVICES, help="default: auto, a GPU if there is one")
    traced.add_argument("--steps", type=int, metavar="N", help="steps that are profiled (default: 3)")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--format", choices=list(FORMATS), help="default: the one of --out's name, else table")
    formats.add_argument("--json", action="store_const", dest="format", const="json", help="the same as --format json")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write into a file, whole or not at all")
    return parser
