"""The scan's benchmark on a CPU: time beside a yardstick, and memory."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.table import Table

from msv.kept import FAILED, Row, number

from .scan_cpu_cases import Case, Made
from .timing import Timing, Work, medians_interleaved, nbytes, peak_memory

KEY = ("what", "N", "dtype", "yardstick")
COLUMNS = (
    *("what", "operator", "B", "K", "D", "L", "N", "R", "map", "dtype", "backend", "calls"),
    *("forward_ms", "forward_min_ms", "forward_backward_ms", "forward_backward_min_ms"),
    *("yardstick", "yardstick_ms", "yardstick_min_ms", "ratio", "max_ratio"),
    *("io_bytes", "peak_bytes", "memory_ratio", "max_memory_ratio", "repeats", "status", "error", "command"),
)
"""Of the CSV, beside where a row was measured. Times are of one call, or of `calls` calls one after another: the median
of `repeats`, and the least; the forward alone keeps nothing for a backward. `ratio` is forward plus backward over the
yardstick. `io_bytes` are the operator's inputs and output; `peak_bytes` the most bytes alive during forward plus
backward: inputs, output, the gradient that comes in and those that go out, and what the scan needs besides.
"""
_CPU = torch.device("cpu")


def measure_case(case: Case) -> dict[str, Any]:
    """Times a case and its yardstick in turns and measures its memory; returns its columns."""
    made = case.make()
    works: dict[str, Work] = {
        "yardstick": made.yardstick,
        "forward": partial(_run, [call.forward for call in made.calls]),
        "forward_backward": partial(_run, [call.forward_backward for call in made.calls]),
    }
    times = medians_interleaved(works, _CPU, case.repeats)
    row = {
        **made.shape,
        "backend": "auto",
        "calls": len(made.calls),
        "ratio": times["forward_backward"].median / times["yardstick"].median,
        "max_ratio": case.max_ratio,
        "repeats": case.repeats,
    }
    for name, timing in times.items():
        row |= _milliseconds(name, timing)
    return {**row, **_memory(case, made)}


def table(rows: Sequence[Row], where: Mapping[str, str]) -> Table:
    """Kept rows for a reader."""
    title = "{device}, {threads} threads, torch {torch}".format(**where)
    found = Table("scan", title=title, title_justify="left", caption="medians in ms", caption_justify="left")
    for column in ("forward", "fwd+bwd", "yardstick", "ratio", "peak MB", "/ in+out"):
        found.add_column(column, justify="right")
    for row in rows:
        if row["status"] == FAILED:
            found.add_row(f"{row['what']}, N={row['N']}", "failed")
            continue
        size = "×".join(row[name] for name in ("B", "K", "D")) + f", {row['map'] or row['L']}"
        shape = size if row["calls"] == "1" else f"{row['calls']} calls"
        times = [f"{float(row[f'{name}_ms']):.4g}" for name in ("forward", "forward_backward", "yardstick")]
        peak, ratio = number(row, "peak_bytes"), number(row, "memory_ratio")
        memory = ["" if peak is None else f"{peak / 1e6:.2f}", "" if ratio is None else f"{ratio:.2f}"]
        found.add_row(f"{row['what']}\n{shape}, N={row['N']}", *times, f"{float(row['ratio']):.3g}", *memory)
    return found


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for each bar: whether it is met, what was measured, what the bar is."""
    lines = []
    for row in rows:
        name = f"{row['what']}, N={row['N']}"
        if row["status"] == FAILED:
            lines.append(f"MISSED: {name}: not measured: {row['error']}")
            continue
        ratio, bar = number(row, "ratio"), number(row, "max_ratio")
        if ratio is not None and bar is not None:
            met = "met" if ratio <= bar else "MISSED"
            lines.append(f"{met}: {name}: {ratio:.2f} times {row['yardstick']} (at most {bar:g})")
        ratio, bar = number(row, "memory_ratio"), number(row, "max_memory_ratio")
        if ratio is not None and bar is not None:
            met = "met" if ratio < bar else "MISSED"
            lines.append(f"{met}: {name}: peak memory {ratio:.2f} times inputs plus output (under {bar:g})")
    return lines


def _run(works: Sequence[Work]) -> None:
    for work in works:
        work()


def _memory(case: Case, made: Made) -> dict[str, Any]:
    """The memory columns; none for several calls, of which each has a peak of its own."""
    if len(made.calls) > 1:
        return {}
    (call,) = made.calls
    inputs = nbytes(*call.tensors)
    io_bytes = inputs + nbytes(call.forward())
    peak_bytes = inputs + nbytes(call.upstream) + peak_memory(call.forward_backward, _CPU)
    sizes = {"io_bytes": io_bytes, "peak_bytes": peak_bytes, "memory_ratio": peak_bytes / io_bytes}
    return {**sizes, "max_memory_ratio": case.max_memory_ratio}


def _milliseconds(name: str, timing: Timing) -> dict[str, float]:
    return {f"{name}_ms": 1e3 * timing.median, f"{name}_min_ms": 1e3 * timing.minimum}
