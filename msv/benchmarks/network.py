"""`python cli.py benchmark network`: images a second of whole networks in training and inference, and their memory."""

import argparse
import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from rich.table import Table

from msv.ablation.markdown import NONE, pipe_table
from msv.ablation.paper import TABLE_6
from msv.comparison.pages import page, place_section
from msv.comparison.systems import REFERENCE, SWIN, find, order
from msv.comparison.throughput import ratio_to_reference
from msv.files import write_atomic
from msv.kept import FAILED, Row, number, place
from msv.profiling import networks
from msv.profiling.commands import add_options, checked_device, command_line, measure_all, say, wide_console
from msv.profiling.networks import Case
from msv.profiling.steps import TASKS
from msv.profiling.timing import torch_threads

from .network_bars import CPU_BATCH, CPU_MODEL, CPU_THREADS, anchor, verdicts
from .options import add_ways

NETWORKS = ("msvmamba_nano", "msvmamba_micro", "msvmamba_tiny", "vmamba_tiny", SWIN, "convnext_tiny")


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments after `network`; returns the exit status, 1 where a row failed.

    Raises:
        ValueError: an option does not fit, a model is unknown, or the file there is none of these.
        OSError: a file cannot be written, or the GPU is of no use any more.
    """
    options = _parser().parse_args(argv)
    device = checked_device(options)
    options.only = [find(name, "--only") for name in options.only]
    console, kept = wide_console(), networks.store(Path(options.out), device, options.quick)
    command = command_line("benchmark network", options, _parser())
    threads = options.threads or (None if device.type == "cuda" or options.quick else CPU_THREADS)
    with torch_threads(threads):
        measure = partial(networks.measure_case, device=device, effort=networks.usual_effort(device, options.quick))
        cases = plan(device, options)
        found = measure_all(cases, measure, device, kept, command, options.again, console, networks.speed)
    shown = [row for row in kept.read() if place(row) == tuple(found.where.values())]
    console.print(table(shown, found.where))
    for line in [] if options.quick else verdicts(shown):
        say(console, line)
    written = kept.path.with_suffix(".md")
    write_atomic(written, markdown(kept.read()))
    say(console, f"written to {kept.path} and {written}")
    return found.status


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


HEADS = ("task", "mode", "precision", "batch", "img/s", "ms", "GiB", "before", "×", "GiB before", "× VMamba-T", "paper")


def table(rows: Sequence[Row], where: Mapping[str, str]) -> Table:
    """Kept rows of one place for a reader."""
    title = f"{where['device']}, torch {where['torch']}, triton {where['triton']}, commit {where['commit']}"
    found = Table("network", title=title, title_justify="left", caption_justify="left", pad_edge=False)
    found.caption = (
        "img/s and ms: medians; GiB: the most of tensors alive at once; before: as measured on an H100 80GB HBM3, of "
        "our models the published code;\n×: over it; × VMamba-T: over vmamba_tiny here, and in the paper's Table 6"
    )
    for head in HEADS:
        numeric = head not in ("task", "mode", "precision", "batch")
        found.add_column(head, justify="right" if numeric else "left", no_wrap=numeric)
    for row in in_order(rows):
        found.add_row(row["model"], *cells(row, rows))
    return found


def markdown(rows: Sequence[Row]) -> str:
    """The kept rows as a page: for each place a table, its bars, and what measured it; nothing is measured anew."""
    head = [
        ("img/s, ms", "measured here: images a second, and milliseconds of a step, at the median time of a training "
         "step (autocast in the precision named, cross-entropy, fused AdamW) or of a forward (weights and images in "
         "it), of random images that lie on the device already; compilation is not timed"),
        ("mode", "`graphs`: captured in CUDA graphs, whose memory is not measured; `compiled`: by `torch.compile` with "
         "its defaults; `compiled-graphs`: both"),
        ("GiB", "measured here: the most of tensors alive at once in a step, weights and AdamW's averages included"),
        ("× VMamba-T", "images a second over `vmamba_tiny`'s of the same task, mode, precision, batch, size and place"),
        ("paper", "the same ratio in Table 6 of arXiv 2405.14174"),
        ("before", "measured before on an H100 80GB HBM3, batch 128, 224×224, in fp16, and no part of these runs: of "
         "our models the published code, eager; of others timm's. × is what was measured here over it"),
    ]  # fmt: skip
    places = dict.fromkeys(place(row) for row in rows)
    return page("Whole networks", head, *(_section([row for row in rows if place(row) == one]) for one in places))


def _section(rows: Sequence[Row]) -> str:
    heads = [f"*{name}*" if name in _NOT_MEASURED else name for name in HEADS]
    lines = [[f"`{row['model']}`", *(cell or NONE for cell in cells(row, rows))] for row in in_order(rows)]
    rivals = [
        f"{_told(row)}, batch {row['batch']}, {row['size']}×{row['size']}: {float(row['ratio']):.2f} times the time of "
        f"`{row['rival']}` ({float(row['rival_ms']):.4g} ms) in the same turns"
        for row in rows
        if row["ratio"]
    ]
    failed = [f"{_told(row)}: {row['error']}" for row in rows if row["status"] == FAILED]
    table = pipe_table(["network", *heads], lines, 5)
    return place_section(rows, table, Rivals=rivals, Bars=verdicts(rows), Failed_rows=failed)


def _told(row: Row) -> str:
    return f"`{row['model']}`, {row['task']}, {row['mode']}, {row['precision']}"


_NOT_MEASURED = ("before", "GiB before", "paper")


def in_order(rows: Sequence[Row]) -> list[Row]:
    """By size and batch, then by model."""
    return sorted(rows, key=lambda row: (int(row["size"]), int(row["batch"]), order(row["model"])))


def cells(row: Row, rows: Sequence[Row]) -> list[str]:
    """What tables say of a row beside others of its place, under `HEADS`; what is not known is empty."""
    about = [row["task"], row["mode"], row["precision"], f"{row['batch']}, {row['size']}×{row['size']}"]
    if row["status"] == FAILED:
        return [*about, "failed", *[""] * (len(HEADS) - len(about) - 1)]
    speed, peak, before = float(row["images_per_s"]), number(row, "peak_bytes"), anchor(row)
    least, most = (before.images_per_s, before.images_per_s_high) if before else (None, None)
    ratio, printed = ratio_to_reference(row, rows), TABLE_6.get(row["model"])
    return [
        *about,
        f"{speed:,.1f}",
        f"{number(row, 'step_ms'):.4g}",
        "" if peak is None else f"{peak / 2**30:.2f}",
        "" if least is None else f"{least:,g}" + ("" if most is None else f"-{most:,g}"),
        "" if least is None else f"{speed / (most or least):.2f}",
        f"{before.peak_gib:.1f}" if before and before.peak_gib else "",
        "" if ratio is None else f"{ratio:.2f}",
        "" if printed is None or row["task"] != "inference" else f"{printed / TABLE_6[REFERENCE]:.2f}",
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py benchmark network",
        description="Images a second of whole networks, eager and compiled, on a batch that lies on the device: a "
        "training step (bf16 autocast, cross-entropy, fused AdamW) and inference (weights in bf16), and the peak "
        f"memory of both: {', '.join(NETWORKS)}. On a CPU {CPU_MODEL} beside {networks.CPU_RIVALS[CPU_MODEL]}. What is "
        "measured is kept row by row, for Table 6 (`compare`) too: run again, and it goes on where it was.",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these models alone; swin_tiny will do")
    parser.add_argument("--batch", type=int, metavar="N", help=f"images of a step (default: 128; on a CPU {CPU_BATCH})")
    parser.add_argument("--size", type=int, metavar="N", help="their side (default: 224)")
    parser.add_argument("--task", nargs="+", choices=TASKS, help="one of them alone")
    add_ways(parser)
    add_options(parser)
    return parser
