"""`python cli.py benchmark scaling`: images a second against batch and against image size."""

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from rich.table import Table

from msv.ablation.markdown import NONE, pipe_table
from msv.comparison.pages import page, place_section
from msv.comparison.systems import SWIN, find
from msv.files import write_atomic
from msv.kept import DONE, FAILED, Row, number, place
from msv.profiling import networks
from msv.profiling.commands import add_options, checked_device, command_line, kept_file, measure_all, say, wide_console
from msv.profiling.measuring import Effort, is_out_of_memory
from msv.profiling.networks import KEY, MEASURED, Case
from msv.profiling.steps import TASKS
from msv.profiling.timing import torch_threads

from .options import add_ways
from .scaling_plot import AXES, Series, plot

NETWORKS = ("msvmamba_nano", "msvmamba_tiny", SWIN)
COLUMNS = (*KEY, "status", *MEASURED, "error", "command")
"""Of the CSV, beside where a row was measured. `status` is done, failed, or that of `TOO_LARGE`."""
TOO_LARGE = "does not fit"
SIZE = 224
"""Of the images whose batch grows."""
BATCHES = {"cuda": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512), "cpu": (1, 2, 4, 8)}
SIZES = {"cuda": (224, 256, 320, 384, 448, 512, 640, 768, 896, 1024), "cpu": (224, 256, 320, 384)}
FIXED_BATCH = {"cuda": 32, "cpu": 2}
"""Of the images that grow."""


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments after `scaling`; returns the exit status, 1 where a cell failed.

    That a cell does not fit in memory is no failure.

    Raises:
        ValueError: an option does not fit, a model is unknown, or the file there is none of these.
        OSError: a file cannot be written, or the GPU is of no use any more.
    """
    options = _parser().parse_args(argv)
    device, console = checked_device(options), wide_console()
    command = command_line("benchmark scaling", options, _parser())
    stem = f"scaling_{device.type}{'_quick' * options.quick}"
    kept = kept_file(options.out, stem, COLUMNS, KEY)
    usual = networks.usual_effort(device, options.quick)
    measure = partial(measure_case, device=device, effort=replace(usual, seconds=usual.seconds / 2))
    cells = series(device, options)
    with torch_threads(options.threads):
        cases = list(dict.fromkeys(case for one in cells for case in one))
        outcome = measure_all(cases, measure, device, kept, command, options.again, console, told)
    rows, where = dict(zip(cases, outcome.rows, strict=True)), outcome.where
    found = [[(case, rows[case]) for case in one] for one in cells]
    console.print(table(outcome.rows, where))
    for line in [] if options.quick else growth(found):
        say(console, line)
    picture = kept.path.with_suffix(".png")
    write_atomic(picture, plot(as_series(found), f"{where['device']}, torch {where['torch']}, {cases[0].precision}"))
    written = kept.path.with_suffix(".md")
    write_atomic(written, markdown(kept.read()))
    say(console, f"written to {kept.path}, {written} and {picture}")
    return outcome.status


def series(device: torch.device, options: argparse.Namespace) -> list[list[Case]]:
    """The cells: for each model, task and mode those of growing batches, and those of growing images."""
    kind = device.type
    batches, sizes, fixed, size = BATCHES[kind], SIZES[kind], FIXED_BATCH[kind], SIZE
    if options.quick:
        batches, sizes, fixed, size = (1, 2), (64, 96), 1, 64
    batches, sizes, fixed = tuple(options.batches or batches), tuple(options.sizes or sizes), options.batch or fixed
    precision = options.precision or ("bf16" if kind == "cuda" else "float32")
    found = []
    models = [find(name, "--only") for name in options.only] or NETWORKS
    for model, task, mode in itertools.product(models, options.task or TASKS, options.mode or ("eager",)):
        found.append([Case(model, task, mode, precision, batch, size) for batch in batches])
        found.append([Case(model, task, mode, precision, fixed, side) for side in sizes])
    return found


def measure_case(case: Case, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Measures one cell; one that does not fit in memory says so."""
    try:
        return networks.measure_step(case, device, effort)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return {"status": TOO_LARGE}


def told(row: Row) -> str:
    """What came of a cell."""
    return networks.speed(row) if row["status"] == DONE else row["status"]


def markdown(rows: Sequence[Row]) -> str:
    """The kept cells as a page: for each place tables of series, against batch and against size, and their growth."""
    head = [
        ("Cells", "images a second, measured here: of training steps (autocast in the precision named, cross-entropy, "
         "fused AdamW) or of forwards (weights and images in it), of random images that lie on the device already, at "
         f"the median time; or `{TOO_LARGE}`, where a step runs out of memory"),
        ("Growth", "of a step's time with the pixels of an image: the slope between their logarithms, 1 in proportion"),
    ]  # fmt: skip
    places = dict.fromkeys(place(row) for row in rows)
    return page("Scaling", head, *(_section([row for row in rows if place(row) == one]) for one in places))


def _section(rows: Sequence[Row]) -> str:
    cells = [(_case(row), row) for row in rows]
    failed = [f"{case}: {row['error']}" for case, row in cells if row["status"] == FAILED]
    tables, sized = [], []
    for axis, fixed in (AXES, AXES[::-1]):
        found: dict[Case, dict[int, Row]] = {}
        for case, row in cells:
            of_line = replace(case, batch=0) if axis == "batch" else replace(case, size=0)
            found.setdefault(of_line, {})[getattr(case, axis)] = row
        for value in sorted({getattr(case, fixed) for case, line in found.items() if len(line) > 1}):
            lines = {case: line for case, line in found.items() if getattr(case, fixed) == value}
            title = f"Against {axis}, " + (f"batch {value}" if fixed == "batch" else f"{value}×{value}")
            tables.append(f"{title}:\n\n{_table(lines)}")
        if axis == "size":
            sized = [[(replace(case, size=x), line[x]) for x in sorted(line)] for case, line in found.items()]
    return place_section(rows, "\n\n".join(tables), Growth=growth(sized), Failed_cells=failed)


def _case(row: Row) -> Case:
    batch, size = int(row["batch"]), int(row["size"])
    return Case(row["model"], row["task"], row["mode"], row["precision"], batch, size)


def _table(lines: Mapping[Case, Mapping[int, Row]]) -> str:
    """Series as lines, a column for each batch or size."""
    columns = sorted({x for line in lines.values() for x in line})
    told = [
        [
            *(f"`{case.model}`", case.task, case.mode, case.precision),
            *(_cell(line[x]) if x in line else NONE for x in columns),
        ]
        for case, line in lines.items()
    ]
    return pipe_table(["network", "task", "mode", "precision", *map(str, columns)], told, 4)


def _cell(row: Row) -> str:
    return f"{number(row, 'images_per_s'):,.1f}" if row["status"] == DONE else row["status"]


def growth(found: Sequence[Sequence[tuple[Case, Row]]]) -> list[str]:
    """A line for each series of images: how the time of a step grows with their pixels, 1 being in proportion."""
    lines = []
    for one in found:
        points = [(case.size**2, number(row, "step_ms") or 0.0) for case, row in one if row["status"] == DONE]
        if len({pixels for pixels, _ in points}) < 2:
            continue
        case, (least, most) = one[0][0], (math.isqrt(points[0][0]), math.isqrt(points[-1][0]))
        lines.append(
            f"{case.model}, {case.task}, {case.mode}, batch {case.batch}: time grows as pixels to the power of "
            f"{exponent(points):.2f} from {least}×{least} to {most}×{most}"
        )
    return lines


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of a straight line through the logarithms of points (x, y), by least squares."""
    x, y = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((one - middle_x) * (other - middle_y) for one, other in zip(x, y, strict=True))
    return over / sum((one - middle_x) ** 2 for one in x)


def as_series(found: Sequence[Sequence[tuple[Case, Row]]]) -> list[Series]:
    """The cells as lines of the plot."""
    drawn = []
    for one in found:
        case = one[0][0]
        by_size = len({case.size for case, _ in one}) > 1
        values = [(cell.size if by_size else cell.batch, row) for cell, row in one]
        drawn.append(
            Series(
                case.model.partition("_patch")[0] + ("" if case.mode == "eager" else f", {case.mode}"),
                case.task,
                "size" if by_size else "batch",
                case.batch if by_size else case.size,
                tuple((x, number(row, "images_per_s") or 0.0) for x, row in values if row["status"] == DONE),
                tuple(x for x, row in values if row["status"] == TOO_LARGE),
            )
        )
    return drawn


def table(rows: Sequence[Row], where: dict[str, str]) -> Table:
    """The cells for a reader."""
    title = f"{where['device']}, torch {where['torch']}, commit {where['commit']}"
    found = Table(title=title, title_justify="left")
    found.add_column("network", no_wrap=True)
    for head in ("task", "mode", "batch", "size", "img/s", "ms", "GiB"):
        found.add_column(head, justify="right" if head in ("batch", "size", "img/s", "ms", "GiB") else "left")
    for row in rows:
        about = [row[name] for name in ("model", "task", "mode", "batch", "size")]
        if row["status"] != DONE:
            found.add_row(*about, row["status"])
            continue
        peak = number(row, "peak_bytes")
        gib = "" if peak is None else f"{peak / 2**30:.2f}"
        found.add_row(*about, f"{number(row, 'images_per_s'):,.1f}", f"{number(row, 'step_ms'):.4g}", gib)
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py benchmark scaling",
        description=f"Images a second against the batch, at {SIZE}×{SIZE}, and against the size of the images, at a "
        "fixed batch; a CSV, its page and a plot. A cell that does not fit in memory is shown as such. What is "
        "measured is kept cell by cell: run again, and it goes on where it was.",
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help=f"models (default: {', '.join(NETWORKS)})"
    )
    parser.add_argument("--batches", type=int, nargs="+", metavar="N", help="default: 1 to 512; on a CPU 1 to 8")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="default: 224 to 1024; on a CPU 224 to 384")
    parser.add_argument("--batch", type=int, metavar="N", help="of the images that grow (default: 32; on a CPU 2)")
    parser.add_argument("--task", nargs="+", choices=TASKS, help="one of them alone")
    add_ways(parser)
    add_options(parser)
    return parser
