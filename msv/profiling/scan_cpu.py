"""The scan's benchmark on a CPU: time beside a yardstick, and memory."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from rich.table import Table

from .scan_cpu_cases import Case, Group, groups
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


def measure(quick: bool) -> Iterator[dict[str, Any]]:
    """Measures all cases, or the same at tiny sizes; yields rows, `COLUMNS` but for the environment."""
    device = torch.device("cpu")
    for group in groups(device, quick):
        yield from measure_group(group, device)


def measure_group(group: Group, device: torch.device) -> list[dict[str, Any]]:
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


def table(rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> Table:
    """The rows for a reader."""
    title = "{device}, {threads} threads, torch {torch}".format(**environment)
    found = Table("scan", title=title, title_justify="left", caption="medians in ms", caption_justify="left")
    for column in ("forward", "fwd+bwd", "yardstick", "ratio", "peak MB", "/ in+out"):
        found.add_column(column, justify="right")
    for row in rows:
        size = "×".join(str(row[name]) for name in ("B", "K", "D")) + f", {row['map'] or row['L']}"
        shape = size if row["calls"] == 1 else f"{row['calls']} calls"
        times = [f"{row[f'{name}_ms']:.4g}" for name in ("forward", "forward_backward", "yardstick")]
        memory = ["", ""]
        if row["peak_bytes"] is not None:
            memory = [f"{row['peak_bytes'] / 1e6:.2f}", f"{row['memory_ratio']:.2f}"]
        found.add_row(f"{row['what']}\n{shape}, N={row['N']}", *times, f"{row['ratio']:.3g}", *memory)
    return found


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
