"""How the operators beside the scan are timed: ours, torch's on the same tensors, and a copy of the same bytes.

What `depthwise.py`, `merge.py` and `norm.py` have in common. A benchmark is a list of cases, each an operator of the
network on a map.
"""

import argparse
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.table import Table

from msv.files import write_atomic
from msv.kept import FAILED, Row
from msv.kernels import Backend

from .batches import time_batches
from .commands import (
    add_options,
    both_ways,
    checked_device,
    command_line,
    kept_file,
    measure_all,
    page,
    say,
    wide_console,
)
from .measuring import NamedCase
from .scan_call import Call, dtype_name
from .timing import Work, torch_threads

WAYS = ("forward", "forward_backward")
TIMES = ("ms", "torch_ms", "copy_ms", "speedup", "over_copy")

BATCH_BYTES = 256 << 20
"""What a batch's calls touch together at least: several times the L2."""

QUICK_MAPS = ((2, 8, 7, 6),)
MAPS = (*((128, 56 >> stage, 56 >> stage, 192 << stage) for stage in range(4)), (1, 56, 56, 192), (4, 256, 256, 192))
"""Of msvmamba_tiny's four stages, of one image, and of images of 1024×1024 pixels: (B, H, W, D)."""


@dataclass(frozen=True)
class MapCase(NamedCase):
    """What is timed: an operator on a map.

    Attributes:
        kind: which of the operator's.
        shape: of the map, (B, H, W, D).
        dtype: of the map.
    """

    kind: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.shape))} {dtype_name(self.dtype)}"

    @property
    @abstractmethod
    def moved_bytes(self) -> tuple[int, int]:
        """Bytes to move at least, of a forward, and with the backward."""

    @abstractmethod
    def call(self, device: torch.device, backend: Backend) -> Call:
        """The operator on tensors of its own, the same for every backend."""


@dataclass(frozen=True)
class Benchmark:
    """An operator's benchmark.

    Attributes:
        name: of the command and the CSV.
        description: what it times, for --help.
        cases: in order.
        quick_cases: of tiny maps.
    """

    name: str
    description: str
    cases: Sequence[MapCase]
    quick_cases: Sequence[MapCase]

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the CSV, beside where a row was measured.

        Times are medians of one call; forward plus backward gives all gradients. `copy` moves as many bytes as the
        kernels must; `speedup` is torch's time over ours.
        """
        times = (f"{way}_{time}" for way in WAYS for time in TIMES)
        how = ("method", "repeats", "method_note", "status", "error", "command")
        return (*self.cases[0].columns, *times, *how)

    def main(self, argv: Sequence[str]) -> int:
        """Runs the command; returns the exit status, 1 where a row failed.

        Raises:
            ValueError: there is no such row; no GPU, and it is not a dry run in Triton's interpreter; or the file
                there is none of these.
            OSError: a row cannot be written, or the GPU is of no use any more.
        """
        parser = argparse.ArgumentParser(prog=f"cli.py benchmark {self.name}", description=self.description)
        add_options(parser, "tiny maps, only to see that it runs; without a GPU with TRITON_INTERPRET=1")
        parser.add_argument(
            "--only", nargs="+", default=[], metavar="PART", help="rows whose name contains one of these"
        )
        options = parser.parse_args(argv)
        device = checked_device(options)
        if device.type == "cpu" and not options.quick:
            raise ValueError("there is no GPU here to time; use --quick with TRITON_INTERPRET=1 to see that it runs")
        cases = self.quick_cases if options.quick else self.cases
        chosen = [case for case in cases if not options.only or any(part in case.name for part in options.only)]
        if not chosen:
            names = ", ".join(case.name for case in cases)
            raise ValueError(
                f"--only is {' '.join(options.only)}, which is part of no row's name; expected of: {names}"
            )
        kept = kept_file(options.out, f"{self.name}_{device.type}{'_quick' * options.quick}", self.columns, ("name",))
        command = command_line(f"benchmark {self.name}", options, parser)
        console = wide_console()
        with torch_threads(options.threads):
            measure = partial(measure_case, device=device, quick=options.quick)
            found = measure_all(chosen, measure, device, kept, command, options.again, console, both_ways)
        console.print(self.table(found.rows, found.where))
        written = kept.path.with_suffix(".md")
        write_atomic(written, self.markdown(kept.read()))
        say(console, f"written to {kept.path} and {written}")
        return found.status

    def markdown(self, rows: Sequence[Row]) -> str:
        """Kept rows as a page; nothing is measured anew."""
        return page(self.description, rows, self.table, notes)

    def table(self, rows: Sequence[Row], where: Mapping[str, str]) -> Table:
        """Kept rows for a reader; times in ms."""
        title = "{device}, torch {torch}, triton {triton}".format(**where)
        made = Table(self.name, title=title, title_justify="left", caption="medians in ms", caption_justify="left")
        for way in ("fwd", "fwd+bwd"):
            for head in (way, "torch", "copy", "faster", "×copy"):
                made.add_column(head, justify="right", no_wrap=True)
        for row in rows:
            numbers = [f"{way}_{time}" for way in WAYS for time in TIMES]
            told = ["failed"] if row["status"] == FAILED else [f"{float(row[name]):.3g}" for name in numbers]
            made.add_row(row["name"], *told)
        return made


def measure_case(case: MapCase, device: torch.device, quick: bool) -> dict[str, Any]:
    """Times one case; returns its columns."""
    sets = 1 if quick else min(8, -(-BATCH_BYTES // case.moved_bytes[0]))
    works: dict[str, list[Work]] = {}
    backends: tuple[tuple[str, Backend], ...] = (("", "triton"), ("torch_", "parallel"))
    for prefix, backend in backends:
        calls = [case.call(device, backend) for _ in range(sets)]
        works[f"forward_{prefix}ms"] = [call.forward for call in calls]
        works[f"forward_backward_{prefix}ms"] = [call.forward_backward for call in calls]
    for way, count in zip(WAYS, case.moved_bytes, strict=True):
        sources = [torch.zeros(count // 2, dtype=torch.uint8, device=device) for _ in range(sets)]
        works[f"{way}_copy_ms"] = [partial(torch.empty_like(source).copy_, source) for source in sources]
    measured = time_batches(works, device, *((1, 0.0) if quick else (30, 1.0)))
    row: dict[str, Any] = {name: 1e3 * timing.median for name, timing in measured.times.items()}
    for way in WAYS:
        row[f"{way}_speedup"] = row[f"{way}_torch_ms"] / row[f"{way}_ms"]
        row[f"{way}_over_copy"] = row[f"{way}_ms"] / row[f"{way}_copy_ms"]
    return {**row, "method": measured.method, "repeats": measured.repeats, "method_note": measured.note}


def notes(rows: Sequence[Row]) -> list[str]:
    """A line for each row that failed, or was not timed as the others are."""
    return [
        f"{row['name']}: {row['error'] or row['method_note']}" for row in rows if row["error"] or row["method_note"]
    ]
