"""`python cli.py benchmark network`: images a second of whole networks in training and inference, and their memory."""

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from msv.ablation.paper import TABLE_6
from msv.comparison.systems import REFERENCE, find, order
from msv.kept import ENVIRONMENT, MACHINE, Kept, Row, here, number, place
from msv.profiling.measuring import FAILED, Effort, measure, missing, time_calls
from msv.profiling.timing import torch_threads

from .network_bars import CPU_BATCH, CPU_MODEL, CPU_RIVAL, CPU_THREADS, anchor, verdicts
from .networks import (
    KEY,
    MEASURED,
    ON_CPU,
    ON_GPU,
    QUICK,
    SWIN,
    TASKS,
    Case,
    add_options,
    chosen_device,
    command,
    file_stem,
    make_step,
    measure_step,
    say,
)  # fmt: skip

NETWORKS = ("msvmamba_nano", "msvmamba_micro", "msvmamba_tiny", "vmamba_tiny", SWIN, "convnext_tiny")
COLUMNS = (
    *(*KEY, "status", *MEASURED, "rival", "rival_ms", "ratio"),
    *("anchor_images_per_s", "anchor_images_per_s_high", "anchor_peak_gib", "error", "command"),
)
"""Of the CSV, beside where a row was measured; empty where there is nothing to tell.

- `rival` takes turns with the model, in the same mode and precision; `rival_ms` is its median, `ratio` the model's time
  over it.
- `anchor` columns were measured before, on an H100 80GB HBM3 in fp16, and are not part of this run: of our models the
  published code, of others timm's.
"""


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments after `network`; returns the exit status, 1 where a row failed.

    Raises:
        ValueError: an option does not fit, a model is unknown, or the file there is none of these.
        OSError: a row cannot be written, or the GPU is of no use any more.
    """
    options = _parser().parse_args(argv)
    device = chosen_device(options)
    options.only = [find(name, "--only") for name in options.only]
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 190)  # a file or a pipe has room for the table
    threads = options.threads or (None if device.type == "cuda" or options.quick else CPU_THREADS)
    with torch_threads(threads):
        cases = plan(device, options)
        kept, where = store(Path(options.out), device, options.quick), here(device)
        todo = missing(cases, kept, where, options.again)
        if len(todo) < len(cases):
            say(console, f"{len(cases) - len(todo)} rows are finished and skipped; --again measures them anew")
        again = command("network", options, _parser())
        effort = QUICK if options.quick else ON_GPU if device.type == "cuda" else ON_CPU
        rows = measure(todo, lambda case: measure_case(case, device, effort), device, kept, where, again)
        for count, row in enumerate(rows, 1):
            found = f"failed: {row['error']}" if row["status"] == FAILED else f"{float(row['images_per_s']):,.1f} img/s"
            say(console, f"{count}/{len(todo)} {row['model']}, {row['task']}, {row['mode']}: {found}")
    asked = [case.columns.items() for case in cases]
    shown = [row for row in kept.read() if place(row) == tuple(where.values())]
    console.print(table(shown, where))
    for line in [] if options.quick else verdicts(shown):
        say(console, line)
    say(console, f"written to {kept.path}")
    return int(any(row["status"] == FAILED and any(case <= row.items() for case in asked) for row in shown))


def store(folder: Path, device: torch.device, quick: bool) -> Kept:
    """The rows kept in a folder: one for each case and device."""
    return Kept(folder / f"{file_stem('network', device, quick)}.csv", COLUMNS, (*KEY, *MACHINE))


def plan(device: torch.device, options: argparse.Namespace) -> list[Case]:
    """The rows to measure: on a GPU all of `NETWORKS` at batch 128, on a CPU the one that has a bar."""
    on_gpu = device.type == "cuda"
    models = options.only or (NETWORKS if on_gpu or options.quick else (CPU_MODEL,))
    tasks = options.task or (TASKS if on_gpu or options.quick else TASKS[:1])
    modes = options.mode or (("eager", "compiled") if on_gpu else ("eager",))
    precision = options.precision or ("bf16" if on_gpu else "float32")
    batch = options.batch or (2 if options.quick else 128 if on_gpu else CPU_BATCH)
    size = options.size or (64 if options.quick else 224)
    # A model's modes and tasks stand together; rivals come last.
    return [
        Case(model, task, mode, precision, batch, size)
        for model, task, mode in itertools.product(sorted(models, key=order), tasks, modes)
    ]


def measure_case(case: Case, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Measures one case; returns its columns."""
    found = measure_step(case, device, effort)
    before = anchor(case.columns)
    if before is not None:
        found |= {f"anchor_{name}": value for name, value in vars(before).items()}
    if device.type == "cpu" and (case.model, case.task) == (CPU_MODEL, "inference"):
        found |= beside_rival(case, device, effort)
    return found


def beside_rival(case: Case, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Times a case and its rival in turns, since a CPU's speed changes with what else it does."""
    rival = Case(CPU_RIVAL, *list(vars(case).values())[1:])
    works = {each.model: make_step(each, device).work for each in (case, rival)}
    times = time_calls(works, device, effort)
    own, other = times[case.model].median, times[CPU_RIVAL].median
    return {"rival": CPU_RIVAL, "rival_ms": 1e3 * other, "ratio": own / other}


def table(rows: Sequence[Row], where: dict[str, str]) -> Table:
    """Kept rows of one place for a reader."""
    title = ", ".join(
        [where["device"], f"torch {where['torch']}", f"triton {where['triton']}", f"commit {where['commit']}"]
    )
    found = Table("network", title=title, title_justify="left", caption_justify="left", pad_edge=False)
    found.caption = (
        "img/s and ms: medians; GiB: the most of tensors alive at once; before: as measured on an H100 80GB HBM3, of "
        "our models the published code;\n×: over it; × VMamba-T: over vmamba_tiny here, and in the paper's Table 6"
    )
    for head in ("task", "mode", "precision", "batch"):
        found.add_column(head)
    for head in ("img/s", "ms", "GiB", "before", "×", "GiB before", "× VMamba-T", "paper"):
        found.add_column(head, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: (int(row["size"]), int(row["batch"]), order(row["model"]))):
        about = [
            row["model"],
            row["task"],
            row["mode"],
            row["precision"],
            f"{row['batch']}, {row['size']}×{row['size']}",
        ]
        if row["status"] == FAILED:
            found.add_row(*about, "failed")
            continue
        speed, before = number(row, "images_per_s") or 0.0, number(row, "anchor_images_per_s")
        high, before_gib = number(row, "anchor_images_per_s_high"), number(row, "anchor_peak_gib")
        ratio, printed = ratio_to_reference(row, rows), TABLE_6.get(row["model"])
        found.add_row(
            *about,
            f"{speed:,.1f}",
            f"{number(row, 'step_ms'):.4g}",
            f"{(number(row, 'peak_bytes') or 0.0) / 2**30:.2f}",
            "" if before is None else f"{before:,g}" + ("" if high is None else f"-{high:,g}"),
            "" if before is None else f"{speed / (high or before):.2f}",
            "" if before_gib is None else f"{before_gib:.1f}",
            "" if ratio is None else f"{ratio:.2f}",
            "" if printed is None or row["task"] != "inference" else f"{printed / TABLE_6[REFERENCE]:.2f}",
        )
    return found


def ratio_to_reference(row: Row, rows: Sequence[Row]) -> float | None:
    """Images a second in multiples of VMamba-Tiny's of the same task, mode, precision, batch, size and place."""

    def like(row: Row) -> tuple[str, ...]:
        return (*(row[name] for name in KEY[1:]), *(row[name] for name in ENVIRONMENT))

    same = (other for other in rows if other["model"] == REFERENCE and like(other) == like(row))
    speed, reference = number(row, "images_per_s"), next((number(other, "images_per_s") for other in same), None)
    return speed / reference if speed and reference else None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py benchmark network",
        description="Images a second of whole networks, eager and compiled, on a batch that lies on the device: a "
        "training step (bf16 autocast, cross-entropy, fused AdamW) and inference (weights in bf16), and the peak "
        f"memory of both: {', '.join(NETWORKS)}. On a CPU {CPU_MODEL} beside {CPU_RIVAL}. What is measured is kept row "
        "by row: run again, and it goes on where it was.",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these models alone; swin_tiny will do")
    parser.add_argument("--batch", type=int, metavar="N", help=f"images of a step (default: 128; on a CPU {CPU_BATCH})")
    parser.add_argument("--size", type=int, metavar="N", help="their side (default: 224)")
    parser.add_argument("--task", nargs="+", choices=TASKS, help="one of them alone")
    add_options(parser)
    return parser
