"""How the operators beside the scan are timed: ours, torch's on the same tensors, and a copy of the same bytes.

What `depthwise.py` and `merge.py` have in common. A benchmark is a list of cases, each an operator of the network
on a map.
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from rich.console import Console
from rich.table import Table

from msv.files import write_atomic
from msv.kernels import Backend
from msv.provenance import environment

from .batches import time_batches
from .benchmark import as_csv
from .scan_call import Call
from .timing import Work

ENVIRONMENT = ("device", "torch", "triton", "msv", "commit")
WAYS = ("forward", "forward_backward")
TIMES = ("ms", "torch_ms", "copy_ms", "speedup", "over_copy")

BATCH_BYTES = 256 << 20
"""What a batch's calls touch together at least: several times the L2."""

QUICK_MAPS = ((2, 8, 7, 6),)
MAPS = (*((128, 56 >> stage, 56 >> stage, 192 << stage) for stage in range(4)), (1, 56, 56, 192), (4, 256, 256, 192))
"""Of msvmamba_tiny's four stages, of one image, and of images of 1024×1024 pixels: (B, H, W, D)."""


class Case(Protocol):
    """What is timed.

    `moved_bytes` are those of a forward, and with the backward; `call` makes it on tensors of its own, the same for
    every backend; `row` has the columns that tell it.
    """

    @property
    def name(self) -> str: ...

    @property
    def moved_bytes(self) -> tuple[int, int]: ...

    def call(self, device: torch.device, backend: Backend) -> Call: ...

    def row(self) -> dict[str, Any]: ...


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
    cases: Sequence[Case]
    quick_cases: Sequence[Case]

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the CSV.

        Times are medians of one call; forward plus backward gives all gradients. `copy` moves as many bytes as the
        kernels must; `speedup` is torch's time over ours.
        """
        times = (f"{way}_{time}" for way in WAYS for time in TIMES)
        return (*self.cases[0].row(), *times, "method", "repeats", "method_note", *ENVIRONMENT)

    def main(self, argv: Sequence[str]) -> int:
        """Runs the command, and returns its exit status.

        Raises:
            ValueError: there is no such row; or no GPU, and it is not a dry run in Triton's interpreter.
            OSError: the CSV cannot be written.
        """
        parser = argparse.ArgumentParser(prog=f"cli.py benchmark {self.name}", description=self.description)
        parser.add_argument(
            "--out", default="results/benchmarks", metavar="DIR", help=f"where {self.name}_<device>.csv is written"
        )
        parser.add_argument("--quick", action="store_true", help="tiny maps; without a GPU with TRITON_INTERPRET=1")
        parser.add_argument("--only", nargs="+", metavar="PART", help="rows whose name contains one of these")
        options = parser.parse_args(argv)
        name: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and not options.quick:
            raise ValueError("torch finds no GPU here; use --quick with TRITON_INTERPRET=1 to see that everything runs")
        cases = self.quick_cases if options.quick else self.cases
        chosen = [case for case in cases if not options.only or any(part in case.name for part in options.only)]
        if not chosen:
            names = ", ".join(case.name for case in cases)
            raise ValueError(
                f"--only is {' '.join(options.only)}, which is part of no row's name; expected of: {names}"
            )
        found = environment(name)
        known = {column: found[column] for column in ENVIRONMENT}
        path = Path(options.out) / f"{self.name}_{name}{'_part' * bool(options.only)}{'_quick' * options.quick}.csv"
        rows = []
        for row in measure(chosen, torch.device(name), options.quick):
            rows.append({**row, **known})
            write_atomic(path, as_csv(rows, self.columns))  # what is measured stays, whatever comes
        console = Console(width=160)
        console.print(table(self.name, rows, found))
        console.print(f"written to {path}", highlight=False, soft_wrap=True, markup=False)
        return 0


def measure(cases: Sequence[Case], device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Times one case after another; yields rows, without the environment."""
    for case in cases:
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
        row = {name: 1e3 * timing.median for name, timing in measured.times.items()}
        for way in WAYS:
            row[f"{way}_speedup"] = row[f"{way}_torch_ms"] / row[f"{way}_ms"]
            row[f"{way}_over_copy"] = row[f"{way}_ms"] / row[f"{way}_copy_ms"]
        how = {"method": measured.method, "repeats": measured.repeats, "method_note": measured.note}
        yield {**case.row(), **row, **how}


def table(name: str, rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> Table:
    """The rows for a reader; times in ms."""
    title = "{device}, torch {torch}, triton {triton}".format(**found)
    made = Table(name, title=title, title_justify="left", caption="medians in ms", caption_justify="left")
    for way in ("fwd", "fwd+bwd"):
        for head in (way, "torch", "copy", "faster", "×copy"):
            made.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(row["name"], *(f"{row[f'{way}_{time}']:.3g}" for way in WAYS for time in TIMES))
    return made


def dtype_name(dtype: torch.dtype) -> str:
    """Without the word torch."""
    return str(dtype).removeprefix("torch.")
