"""`python cli.py benchmark scan`: what the scan costs on this machine, in time and memory, as a CSV and a table."""

import argparse
import csv
import io
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from msv.files import write_atomic
from msv.provenance import environment

from . import mamba_cuda, scan_cpu, scan_gpu, scan_gpu_bars, scan_gpu_cases
from .timing import torch_threads

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """What a benchmark measures, and how it is told.

    Attributes:
        file: name of the CSV, without its ending.
        columns: of the CSV.
        rows: measured while one iterates.
        table: of rows and the environment.
        remarks: lines about rows, below the table.
        failed: whether rows are missing what they should have.
    """

    file: str
    columns: Sequence[str]
    rows: Iterable[dict[str, Any]]
    table: Callable[[Rows, dict[str, Any]], Table]
    remarks: Callable[[Rows], list[str]]
    failed: Callable[[Rows], bool]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the arguments after `scan`; returns the exit status, 1 if a row could not be measured.

    Raises:
        ValueError: an option does not fit: there is no GPU for `--device cuda`, no row for `--only`, no rival in
            `--rival`; `--threads` is below 1; an option of the GPU's table is given for the CPU's.
        OSError: the CSV cannot be written.
    """
    options = _parser().parse_args(argv)
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads is {options.threads}; expected 1 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no GPU here; use --device cpu, or auto for what there is")
    name: Literal["cpu", "cuda"] = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 190)  # a file or a pipe has room for the table
    with torch_threads(options.threads):
        found: dict[str, Any] = {**environment(name), "cuda": torch.version.cuda}
        kernels = name == "cuda" or (options.quick and os.environ.get("TRITON_INTERPRET") == "1")
        benchmark = gpu_benchmark(options, torch.device(name), console) if kernels else cpu_benchmark(options)
        env = {column: found[column] for column in found if column in benchmark.columns}
        path = Path(options.out) / f"{benchmark.file}.csv"
        rows: list[dict[str, Any]] = []
        with console.status("timing"):
            for row in benchmark.rows:
                rows.append({**row, **env})
                write_atomic(path, as_csv(rows, benchmark.columns))  # what is measured stays, whatever comes
    console.print(benchmark.table(rows, found))
    for line in benchmark.remarks(rows):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    console.print(f"written to {path}", highlight=False, soft_wrap=True, markup=False)
    return int(benchmark.failed(rows))


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
        scan_cpu.measure(options.quick),
        scan_cpu.table,
        scan_cpu.verdicts,
        lambda rows: False,
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
            console.print(f"without Mamba's CUDA kernel: {missing}", highlight=False, soft_wrap=True, markup=False)
    rows = scan_gpu.measure(
        cases,
        device,
        options.backend or "triton",
        kernel,
        "parallel" not in without,
        scan_gpu.QUICK if options.quick else scan_gpu.Effort(),
    )

    def remarks(rows: Rows) -> list[str]:
        return [*scan_gpu.notes(rows), *([] if options.quick else scan_gpu_bars.verdicts(rows))]

    parts = ["scan", "cuda" if device.type == "cuda" else "interpreter"]
    # A part of the table must not take the place of the whole.
    parts += ["part"] if options.only or without or options.backend else []
    parts += ["quick"] if options.quick else []
    return Benchmark("_".join(parts), scan_gpu.COLUMNS, rows, scan_gpu.table, remarks, scan_gpu.failed)


def as_csv(rows: Rows, columns: Sequence[str]) -> str:
    """The rows as CSV of these columns; what was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _format(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _format(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py benchmark scan",
        description="The scan's time and memory: on a GPU its kernels, beside a copy of the same bytes, the parallel "
        "scan and Mamba's CUDA kernel; on a CPU the parallel scan, beside what surrounds it in a training step.",
    )
    parser.add_argument("--out", default="results/benchmarks", metavar="DIR", help="where scan_<device>.csv is written")
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU where there is one"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, no bars: only to see that everything runs; on a CPU with TRITON_INTERPRET=1 the GPU's table",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's own choice)")
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
        "--without", nargs="+", default=(), choices=("rival", "parallel"), help="leave out what ours is compared with"
    )
    return parser
