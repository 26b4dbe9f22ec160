"""`python cli.py benchmark scan`: what the scan costs on this machine, in time and memory, as a CSV and a table."""

import argparse
import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table

from msv.files import write_atomic
from msv.provenance import environment

from .scan_cases import Case, Group, groups
from .timing import Timing, Work, medians_interleaved, nbytes, peak_memory

ENVIRONMENT = ("device", "cpu", "threads", "torch", "triton", "msv", "commit")
COLUMNS = (
    *("what", "operator", "B", "K", "D", "L", "N", "R", "map", "dtype", "backend", "calls"),
    *("forward_ms", "forward_min_ms", "forward_backward_ms", "forward_backward_min_ms"),
    *("yardstick", "yardstick_ms", "yardstick_min_ms", "ratio", "max_ratio"),
    *("io_bytes", "peak_bytes", "memory_ratio", "max_memory_ratio", "repeats"),
    *ENVIRONMENT,
)
"""Of the CSV. Times are of one call, or of `calls` calls one after another: the median of `repeats`, and the least; the
forward alone keeps nothing for a backward. `ratio` is forward plus backward over the yardstick. `io_bytes` are the
operator's inputs and output; `peak_bytes` the most bytes alive during forward plus backward: inputs, output, the
gradient that comes in and those that go out, and what the scan needs besides.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the arguments after `benchmark`; returns the exit status.

    Raises:
        ValueError: there is no GPU for `--device cuda`, or `--threads` is below 1.
        OSError: the CSV cannot be written.
    """
    options = _parser().parse_args(argv)
    if options.threads is not None and options.threads < 1:
        raise ValueError(f"--threads is {options.threads}; expected 1 or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no GPU here; use --device cpu, or auto for what there is")
    name: Literal["cpu", "cuda"] = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    path = Path(options.out) / f"scan_{name}{'_quick' if options.quick else ''}.csv"
    console = Console()
    with _threads(options.threads):
        env = environment(name)
        rows = []
        for group in groups(torch.device(name), options.quick):
            with console.status(f"timing against: {group.yardstick}"):
                rows += measure(group, torch.device(name))
    rows = [{**row, **{column: env[column] for column in ENVIRONMENT}} for row in rows]
    write_atomic(path, as_csv(rows))
    console.print(_table(rows, f"{env['device']}, {env['threads']} threads, torch {env['torch']}"))
    for line in verdicts(rows):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"written to {path}", highlight=False, soft_wrap=True)
    return 0


def measure(group: Group, device: torch.device) -> list[dict[str, Any]]:
    """Times a group's cases and its yardstick in turns and measures their memory; returns a row a case."""
    works: dict[str, Work] = {"yardstick": group.yardstick_work}
    for number, case in enumerate(group.cases):
        works[f"{number} forward"] = partial(_run, [call.forward for call in case.calls])
        works[f"{number} both"] = partial(_run, [call.forward_backward for call in case.calls])
    times = medians_interleaved(works, device, group.repeats)
    rows = []
    for number, case in enumerate(group.cases):
        both, yardstick = times[f"{number} both"], times["yardstick"]
        row = {
            "what": case.what,
            "operator": case.operator,
            **case.shape,
            "dtype": str(case.calls[0].tensors[0].dtype).removeprefix("torch."),
            "backend": case.backend,
            "calls": len(case.calls),
            **_milliseconds("forward", times[f"{number} forward"]),
            **_milliseconds("forward_backward", both),
            "yardstick": group.yardstick,
            **_milliseconds("yardstick", yardstick),
            "ratio": both.median / yardstick.median,
            "max_ratio": case.max_ratio,
            "repeats": group.repeats,
        }
        rows.append({**row, **_memory(case, device)})
    return rows


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as CSV of `COLUMNS`; a number that was not measured is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _format(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A line for each bar: whether it is met, what was measured, what the bar is."""
    lines = []
    for row in rows:
        name = f"{row['what']}, N={row['N']}"
        if (bar := row["max_ratio"]) is not None:
            met = "met" if row["ratio"] <= bar else "MISSED"
            lines.append(f"{met}: {name}: {row['ratio']:.2f} times {row['yardstick']} (at most {bar:g})")
        if (bar := row["max_memory_ratio"]) is not None:
            met = "met" if row["memory_ratio"] < bar else "MISSED"
            lines.append(
                f"{met}: {name}: peak memory {row['memory_ratio']:.2f} times inputs plus output (under {bar:g})"
            )
    return lines


def _run(works: Sequence[Work]) -> None:
    for work in works:
        work()


def _memory(case: Case, device: torch.device) -> dict[str, Any]:
    """The memory columns; empty for several calls, of which each has a peak of its own."""
    if len(case.calls) > 1:
        return dict.fromkeys(("io_bytes", "peak_bytes", "memory_ratio", "max_memory_ratio"))
    call = case.calls[0]
    inputs = nbytes(*call.tensors)
    io_bytes = inputs + nbytes(call.forward())
    peak_bytes = inputs + nbytes(call.upstream) + peak_memory(call.forward_backward, device)
    sizes = {"io_bytes": io_bytes, "peak_bytes": peak_bytes, "memory_ratio": peak_bytes / io_bytes}
    return {**sizes, "max_memory_ratio": case.max_memory_ratio}


def _milliseconds(name: str, timing: Timing) -> dict[str, float]:
    return {f"{name}_ms": 1e3 * timing.median, f"{name}_min_ms": 1e3 * timing.minimum}


def _format(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


def _table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    table = Table("scan", title=title, title_justify="left", caption="medians in ms", caption_justify="left")
    for column in ("forward", "fwd+bwd", "yardstick", "ratio", "peak MB", "/ in+out"):
        table.add_column(column, justify="right")
    for row in rows:
        size = "×".join(str(row[name]) for name in ("B", "K", "D")) + f", {row['map'] or row['L']}"
        shape = size if row["calls"] == 1 else f"{row['calls']} calls"
        times = [f"{row[f'{name}_ms']:.4g}" for name in ("forward", "forward_backward", "yardstick")]
        memory = ["", ""]
        if row["peak_bytes"] is not None:
            memory = [f"{row['peak_bytes'] / 1e6:.2f}", f"{row['memory_ratio']:.2f}"]
        table.add_row(f"{row['what']}\n{shape}, N={row['N']}", *times, f"{row['ratio']:.3g}", *memory)
    return table


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="cli.py benchmark", description="Measures what msv costs on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    scan = commands.add_parser("scan", help="the scan's time and memory", description="The scan's time and memory.")
    scan.add_argument("--out", default="results/benchmarks", metavar="DIR", help="where scan_<device>.csv is written")
    scan.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU where there is one"
    )
    scan.add_argument("--quick", action="store_true", help="tiny sizes, no bars: only to see that everything runs")
    scan.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch (default: torch's own choice)")
    return parser
