"""`python cli.py profile --trace`: where the time of a model's step goes."""

import argparse
import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table

from msv.ablation.markdown import pipe_table
from msv.ablation.subjects import subjects
from msv.files import write_atomic
from msv.profiling.devices import chosen_device
from msv.profiling.steps import random_step
from msv.profiling.trace import Trace, trace

LONGEST = 12
"""Kernels that stand below the families, where a table is printed."""


@dataclass(frozen=True)
class Share:
    """A row of the table: a family, or a kernel of one."""

    family: str
    kernel: str
    ms: float
    share: float
    calls: int


def trace_step(named: Sequence[str], size: tuple[int, int], style: str, options: argparse.Namespace) -> int:
    """Traces the one model that is named, prints or writes the table; returns the exit status.

    Raises:
        ValueError: none or several models are named, an option does not fit, or there is no GPU for `--device cuda`.
        OSError: the trace or the table cannot be written.
    """
    chosen = subjects(named) if named else []
    if len(chosen) != 1:
        raise ValueError(f"--trace takes one model, and {len(chosen)} are named; name a preset, such as msvmamba_nano")
    if options.trace.suffixes[-2:] != [".json", ".gz"] and options.trace.suffix != ".json":
        raise ValueError(f"--trace {options.trace}: expected a file that ends in .json or .json.gz")
    steps = 3 if options.steps is None else options.steps
    if steps < 1:
        raise ValueError(f"--steps is {steps}; expected 1 or more")
    device, mode = chosen_device(options.device or "auto"), options.mode or "eager"
    precision = options.precision or ("bf16" if device.type == "cuda" else "float32")
    task = "inference" if options.inference else "training"
    batch = options.batch_size or (128 if device.type == "cuda" else 8)
    network = chosen[0].factory(options.in_chans, options.num_classes).to(device)
    step = random_step(network, (batch, options.in_chans, *size), options.num_classes, task, mode, precision)
    with Console(stderr=True).status("tracing"):
        found = trace(step.work, device, options.trace, steps)
    what = "forward" if options.inference else "training step"
    title = (
        f"{chosen[0].name}, {what}, {mode}, {precision}, {batch} images of {size[0]}×{size[1]}, "
        f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}: "
        f"{1e3 * found.seconds / found.steps:.4g} ms, the profiler's part included"
    )
    text = _FORMATS[style](title, rows(found))
    console = Console(soft_wrap=True, markup=False, highlight=False)
    if options.out is None:
        console.print(text, end="")
    else:
        write_atomic(options.out, text)
        console.print(f"written to {options.out}")
    console.print(f"trace in {options.trace}: open it in ui.perfetto.dev or chrome://tracing")
    return 0


def rows(found: Trace) -> list[Share]:
    """The families of a trace in their order, then its longest kernels; times and calls of one step."""
    families = [Share(name, "", 1e3 * s, share, calls) for name, (s, share, calls) in found.shares().items()]
    kernels = [
        Share(
            one.family, one.name, 1e3 * one.seconds / found.steps, one.seconds / found.seconds, one.calls // found.steps
        )
        for one in found.kernels[:LONGEST]
    ]
    return families + kernels


def _table(title: str, found: Sequence[Share]) -> str:
    out = io.StringIO()
    console = Console(file=out, width=140, highlight=False)
    console.print(title, soft_wrap=True)
    for kernels, name in ((False, "family"), (True, "longest kernels")):
        table = Table(name)
        if kernels:
            table.add_column("family")
        for column in ("ms a step", "share", "calls"):
            table.add_column(column, justify="right")
        for row in found:
            if bool(row.kernel) == kernels:
                names = [row.kernel[:70], row.family] if kernels else [row.family]
                table.add_row(*names, *_numbers(row))
        console.print(table)
    return out.getvalue()


def _markdown(title: str, found: Sequence[Share]) -> str:
    lines = [[row.family, f"`{row.kernel}`" if row.kernel else "", *_numbers(row)] for row in found]
    return f"# {title}\n\n{pipe_table(['family', 'kernel', 'ms a step', 'share', 'calls'], lines, 2)}\n"


def _csv(title: str, found: Sequence[Share]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(Share.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in found)
    return out.getvalue()


def _json(title: str, found: Sequence[Share]) -> str:
    return json.dumps({"what": title, "rows": [asdict(row) for row in found]}, indent=1, ensure_ascii=False) + "\n"


def _numbers(row: Share) -> list[str]:
    return [f"{row.ms:.3f}", f"{100 * row.share:.1f}%", str(row.calls) if row.calls else ""]


_FORMATS = {"table": _table, "csv": _csv, "markdown": _markdown, "json": _json}
