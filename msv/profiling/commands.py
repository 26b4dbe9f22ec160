"""What the commands that measure have in common: options, rows measured one by one, and what is said of them."""

import argparse
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from msv.kept import FAILED, MACHINE, Kept, Row, here, is_done, place

from .devices import DEVICES, chosen_device
from .measuring import C, measure, missing

_LEAST = {
    **dict.fromkeys(("threads", "batch", "batches", "steps", "rounds"), 1),
    **dict.fromkeys(("size", "sizes"), 32),
}
"""Options that are numbers, and how small they may be."""
_OF_THIS_MACHINE = ("out", "again")
"""Options that a row's command leaves out."""


@dataclass(frozen=True)
class Outcome:
    """What came of some cases.

    Attributes:
        where: they were measured.
        rows: that are kept of them, measured there now or before, in their order.
        status: 1 where one of them could not be measured, else 0.
    """

    where: dict[str, str]
    rows: list[Row]
    status: int


def add_options(parser: argparse.ArgumentParser, quick: str = "tiny sizes, no bars: only to see that it runs") -> None:
    """The options that all of these commands have."""
    folder = "results/benchmarks"
    parser.add_argument("--out", default=folder, metavar="DIR", help="where files are written (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=DEVICES, help="auto: a GPU if there is one")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's own choice)")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured on this very machine")
    parser.add_argument("--quick", action="store_true", help=quick)


def checked_device(options: argparse.Namespace) -> torch.device:
    """The device of `--device`.

    Raises:
        ValueError: there is no GPU for `cuda`, or a number is too small.
    """
    for name, least in _LEAST.items():
        value = getattr(options, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                raise ValueError(f"--{name} is {number}; expected {least} or more")
    return chosen_device(options.device)


def command_line(
    name: str, options: argparse.Namespace, parser: argparse.ArgumentParser, without: Sequence[str] = ()
) -> str:
    """What measures the rows again, without the folders of this machine.

    Args:
        name: of the command, `benchmark scan`.
        options: as given.
        parser: of the command.
        without: options that do not matter to the rows.
    """
    words = [f"python cli.py {name}"]
    for option, value in vars(options).items():
        if option not in (*_OF_THIS_MACHINE, *without) and value != parser.get_default(option):
            values = value if isinstance(value, list | tuple) else [] if value is True else [value]
            words += [f"--{option}", *(shlex.quote(str(one)) for one in values)]
    return " ".join(words)


def kept_file(folder: str | Path, stem: str, columns: Sequence[str], key: Sequence[str]) -> Kept:
    """Where a command keeps its rows: one for each case of a machine, the latest."""
    return Kept(Path(folder) / f"{stem}.csv", columns, (*key, *MACHINE))


def measure_all(
    cases: Sequence[C],
    measure_case: Callable[[C], Mapping[str, Any]],
    device: torch.device,
    kept: Kept,
    command: str,
    again: bool,
    console: Console,
    told: Callable[[Row], str],
) -> Outcome:
    """Measures the cases that have no finished row from this machine and code, and says how it goes.

    Args:
        cases: in order.
        measure_case: gives the columns of one.
        device: where.
        kept: takes the rows.
        command: that they name.
        again: whether to measure what is finished.
        console: to say it.
        told: what is said of a row that did not fail.

    Raises:
        ValueError: the file there is none of these.
        OSError: a row cannot be written, or the GPU is of no use any more.
    """
    where = here(device)
    todo = missing(cases, kept, where, again)
    if len(todo) < len(cases):
        say(console, f"{len(cases) - len(todo)} rows are finished and skipped; --again measures them anew")
    failed = False
    for count, row in enumerate(measure(todo, measure_case, device, kept, where, command), 1):
        failed = failed or row["status"] == FAILED
        line = f"failed: {row['error']}" if row["status"] == FAILED else told(row)
        if not is_done(row) and row not in kept.read():
            line += "; what was measured before stays"
        say(console, f"{count}/{len(todo)} {todo[count - 1]}: {line}")
    at_hand = [row for row in kept.read() if place(row) == tuple(where.values())]
    found = [next((row for row in at_hand if case.columns.items() <= row.items()), None) for case in cases]
    rows = [row for row in found if row is not None]
    return Outcome(where, rows, int(failed or any(row["status"] == FAILED for row in rows)))


def page(
    title: str,
    rows: Sequence[Row],
    table: Callable[[Sequence[Row], Mapping[str, str]], Table],
    remarks: Callable[[Sequence[Row]], Sequence[str]],
) -> str:
    """Kept rows as Markdown: for each place the table that the command prints, its remarks, and what measured it.

    Args:
        title: of the page.
        rows: of any places; nothing is measured anew.
        table: of rows of one place, and that place.
        remarks: lines about rows of one place.
    """
    parts = [f"# {title}"]
    for where in dict.fromkeys(place(row) for row in rows):
        found = [row for row in rows if place(row) == where]
        first, made = found[0], table(found, found[0])
        versions = [f"{name} {first[name]}" for name in ("torch", "triton", "cuda", "msv", "python") if first[name]]
        commands = dict.fromkeys(f"`{row['command']}`" for row in found if row["command"])
        parts += [f"## {first['device']}, commit {first['commit'] or 'unknown'}", ", ".join(versions), _as_pipes(made)]
        parts += [str(made.caption or ""), "\n".join(f"- {line}" for line in remarks(found))]
        parts += [f"By {', '.join(commands)}."] if commands else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _as_pipes(table: Table) -> str:
    heads = [str(column.header) for column in table.columns]
    rules = ["---:" if column.justify == "right" else "---" for column in table.columns]
    lines = zip(*(column.cells for column in table.columns), strict=True)
    texts = [[str(cell).replace("\n", ", ") for cell in line] for line in (heads, rules, *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in texts)


def both_ways(row: Row) -> str:
    """What is said of an operator's row."""
    return f"{float(row['forward_ms']):.4g} ms, {float(row['forward_backward_ms']):.4g} with the backward"


def wide_console() -> Console:
    """A console with room for a table, be it a file or a pipe."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 190)
    return console


def say(console: Console, line: str) -> None:
    """Prints a line as it is."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)
