"""`python cli.py benchmark scan`: what the scan costs on this machine, in time and memory, as a CSV and a table."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from msv.files import write_atomic
from msv.kept import Row

from . import mamba_cuda, scan_cpu, scan_cpu_cases, scan_gpu, scan_gpu_bars, scan_gpu_cases
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
from .timing import torch_threads


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark measures, and how it is told.

    Attributes:
        file: name of the CSV, without its ending.
        columns: of the CSV.
        key: those that tell its rows apart.
        cases: in order.
        measure: gives the columns of a case.
        table: of rows, and where they were measured.
        remarks: lines about rows, below the table.
    """

    file: str
    columns: Sequence[str]
    key: Sequence[str]
    cases: Sequence[Any]
    measure: Callable[[Any], Mapping[str, Any]]
    table: Callable[[Sequence[Row], Mapping[str, str]], Table]
    remarks: Callable[[Sequence[Row]], list[str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the arguments after `scan`; returns the exit status, 1 if a row could not be measured.

    Raises:
        ValueError: an option does not fit: there is no GPU for `--device cuda`, no row for `--only`, no rival in
            `--rival`; `--threads` is below 1; an option of the GPU's table is given for the CPU's; or the file there
            is none of these.
        OSError: a row cannot be written, or the GPU is of no use any more.
    """
    options = _parser().parse_args(argv)
    device = checked_device(options)
    console = wide_console()
    kernels = device.type == "cuda" or (options.quick and os.environ.get("TRITON_INTERPRET") == "1")
    benchmark = gpu_benchmark(options, device, console) if kernels else cpu_benchmark(options)
    kept = kept_file(options.out, benchmark.file, benchmark.columns, benchmark.key)
    options.rival = options.rival and Path(options.rival).name
    command = command_line("benchmark scan", options, _parser())
    with torch_threads(options.threads):
        found = measure_all(
            benchmark.cases, benchmark.measure, device, kept, command, options.again, console, both_ways
        )
    console.print(benchmark.table(found.rows, found.where))
    for line in benchmark.remarks(found.rows):
        say(console, line)
    written = kept.path.with_suffix(".md")
    write_atomic(written, page("The scan", kept.read(), benchmark.table, benchmark.remarks))
    say(console, f"written to {kept.path} and {written}")
    return found.status


def _with_bars(rows: Sequence[Row]) -> list[str]:
    return [*scan_gpu.notes(rows), *scan_gpu_bars.verdicts(rows)]


def cpu_benchmark(options: argparse.Namespace) -> Benchmark:
    """The table of a CPU.

    Raises:
        ValueError: an option of the GPU's table is given.
    """
    for option in ("only", "rival", "without", "backend"):
        if getattr(options, option):
            raise ValueError(f"--{option} belongs to the GPU's table; use it with --device cuda")
    return Benchmark(
        f"scan_cpu{'_quick' if options.quick else ''}",
        scan_cpu.COLUMNS,
        scan_cpu.KEY,
        scan_cpu_cases.cases(options.quick),
        scan_cpu.measure_case,
        scan_cpu.table,
        scan_cpu.verdicts,
    )


def gpu_benchmark(options: argparse.Namespace, device: torch.device, console: Console) -> Benchmark:
    """The table of a GPU, whose tiny sizes run on a CPU too where Triton's interpreter does.

    Raises:
        ValueError: `--only` names no row, or `--rival` is no rival.
    """
    cases = scan_gpu_cases.cases(options.quick, tuple(options.only))
    kernel: mamba_cuda.Rival | None = None
    without = list(options.without)
    if (device.type == "cuda" or options.rival) and "rival" not in without:
        try:
            kernel = mamba_cuda.load(options.rival)
        except mamba_cuda.RivalMissingError as missing:
            if options.rival is not None:
                raise ValueError(f"--rival is {options.rival}: {missing}") from missing
            say(console, f"without Mamba's CUDA kernel: {missing}")
            without.append("rival")
    measure = partial(
        scan_gpu.measure_case,
        device=device,
        backend=options.backend or "triton",
        kernel=kernel,
        parallel="parallel" not in without,
        effort=scan_gpu.QUICK if options.quick else scan_gpu.Effort(),
    )

    remarks = scan_gpu.notes if options.quick else _with_bars
    # Rows that lack something, or are of another backend, must not take the place of the whole ones.
    parts = [
        "scan",
        "cuda" if device.type == "cuda" else "interpreter",
        *([options.backend] if options.backend else []),
    ]
    parts += [f"without_{what}" for what in sorted(set(without))]
    parts += ["quick"] if options.quick else []
    return Benchmark("_".join(parts), scan_gpu.COLUMNS, ("name",), cases, measure, scan_gpu.table, remarks)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py benchmark scan",
        description="The scan's time and memory: on a GPU its kernels, beside a copy of the same bytes, the parallel "
        "scan and Mamba's CUDA kernel; on a CPU the parallel scan, beside what surrounds it in a training step.",
    )
    add_options(
        parser, "tiny sizes, no bars: only to see that it runs; on a CPU with TRITON_INTERPRET=1 the GPU's table"
    )
    gpu = parser.add_argument_group("of the GPU's table")
    gpu.add_argument("--only", nargs="+", default=(), metavar="PART", help="rows whose name contains one of these")
    gpu.add_argument("--backend", choices=("triton", "auto", "parallel"), help="what is timed (default: triton)")
    gpu.add_argument(
        "--rival",
        metavar="SOURCE",
        help="Mamba's CUDA kernel: mamba_ssm's source package, its unpacked folder, or a built .so (default: the "
        "installed package, else built from the package index; left out, saying so, where that fails)",
    )
    gpu.add_argument(
        "--without",
        nargs="+",
        default=(),
        choices=("rival", "parallel"),
        help="leave out what ours is compared with; such rows have a file of their own",
    )
    return parser
