"""`python cli.py benchmark loop`: what the training loop adds to a step."""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from msv.ablation.markdown import NONE, pipe_table
from msv.comparison.pages import page, place_section
from msv.comparison.systems import find
from msv.data.in_memory import InMemoryData, Labelled
from msv.experiment import quiet
from msv.files import write_atomic
from msv.kept import FAILED, Row, place
from msv.profiling import networks
from msv.profiling.commands import add_options, checked_device, command_line, kept_file, measure_all, say, wide_console
from msv.profiling.devices import wait_for
from msv.profiling.networks import CLASSES, make_step
from msv.profiling.timing import Work, torch_threads
from msv.tasks import EMA, Classification, History

from .options import add_ways


@dataclass(frozen=True)
class Case(networks.Case):
    """What one row measures.

    Attributes:
        steps: of a round.
        rounds: of which medians are taken.
    """

    steps: int
    rounds: int


KEY = tuple(field.name for field in fields(Case))
COLUMNS = (*KEY, "status", "step_ms", "fit_ms", "overhead", "error", "command")
"""Of the CSV, beside where a row was measured. `step_ms` is a bare step on one batch that lies on the device; `fit_ms`
a step of `fit` with data, logging, schedule, history and moving average; medians of `rounds` rounds of `steps` steps.
`overhead` is the median over rounds of how much longer the second takes, as a share of the first.
"""
BAR = 0.03
PIXELS = 32
"""Side of the stored images, as CIFAR's; they are resized on their way to the network."""
WARMUP = 5


class RandomImages(InMemoryData):
    """Random images in memory, as many as a number of batches takes, resized as those of a small data set are."""

    num_classes = CLASSES
    in_chans = 3
    name = "random"
    mean = (0.5, 0.5, 0.5)
    std = (0.25, 0.25, 0.25)

    def __init__(self, batches: int, batch_size: int, image_size: int):
        super().__init__(
            image_size, batch_size, num_workers=0, seed=0, val_images=CLASSES, max_shift=0.125, hflip=0.5,
            pin_memory=True, predict_paths=None,
        )  # fmt: skip
        self.class_names = [str(label) for label in range(CLASSES)]
        self.images = batches * batch_size

    def read(self) -> tuple[Labelled, Labelled]:
        """Images of noise, each class in turn."""
        sizes = (self.images + self.val_images, self.val_images)
        train, test = (
            Labelled(
                torch.randint(256, (size, 3, PIXELS, PIXELS), dtype=torch.uint8), torch.arange(size) % CLASSES, "noise"
            )
            for size in sizes
        )
        return train, test


class Stopwatch(pl.Callback):
    """Seconds of some steps in the middle of a training, from the start of one batch to that of another.

    Args:
        first: number of the batch at which it starts.
        last: number of the batch at which it stops.
    """

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.seconds = first, last, 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, idx: int) -> None:
        """Start or stop, once the device has caught up."""
        if idx in (self.first, self.last):
            wait_for(pl_module.device)
            self.seconds = time.perf_counter() - self.seconds


def main(argv: Sequence[str]) -> int:
    """Runs the command with the arguments after `loop`; returns the exit status, 1 where a row failed.

    Raises:
        ValueError: an option does not fit, a model is unknown, or the file there is none of these.
        OSError: a row cannot be written, or the GPU is of no use any more.
    """
    options = _parser().parse_args(argv)
    device, console = checked_device(options), wide_console()
    quiet()
    command = command_line("benchmark loop", options, _parser())
    kept = kept_file(options.out, f"loop_{device.type}{'_quick' * options.quick}", COLUMNS, KEY)
    with torch_threads(options.threads):
        measure = partial(measure_case, device=device)
        found = measure_all(plan(device, options), measure, device, kept, command, options.again, console, overhead)
    for row in found.rows:
        say(console, told(row, options.quick))
    written = kept.path.with_suffix(".md")
    write_atomic(written, markdown(kept.read(), options.quick))
    say(console, f"written to {kept.path} and {written}")
    return found.status


def plan(device: torch.device, options: argparse.Namespace) -> list[Case]:
    """The rows to measure: on a GPU at batch 128, 64×64 and 224×224, eager and compiled; on a CPU at 64, 32×32."""
    on_gpu = device.type == "cuda"
    sizes = options.size or ([224, 64] if on_gpu else [32])
    modes = options.mode or (["eager", "compiled"] if on_gpu else ["eager"])
    precision = options.precision or ("bf16" if on_gpu else "float32")
    batch = options.batch or (2 if options.quick else 128 if on_gpu else 64)
    steps, rounds = options.steps or (2 if options.quick else 50), options.rounds or (1 if options.quick else 5)
    models = [find(name, "--only") for name in options.only]
    return [
        Case(model, "training", mode, precision, batch, size, steps, rounds)
        for model, size, mode in itertools.product(models, sizes, modes)
    ]


def measure_case(case: Case, device: torch.device) -> dict[str, Any]:
    """Times rounds of bare steps and of steps of `fit` in turns; returns the columns of one case."""
    step = make_step(case, device)
    for _ in range(WARMUP):
        step.work()
    bare, fitted = [], []
    for _ in range(case.rounds):
        bare.append(bare_seconds(step.work, device, case.steps))
        fitted.append(fit_seconds(case, device))
    return {
        "step_ms": 1e3 * statistics.median(bare),
        "fit_ms": 1e3 * statistics.median(fitted),
        "overhead": statistics.median(fit / step - 1 for fit, step in zip(fitted, bare, strict=True)),
    }


def bare_seconds(work: Work, device: torch.device, steps: int) -> float:
    """Seconds of a step made by hand."""
    wait_for(device)
    start = time.perf_counter()
    for _ in range(steps):
        work()
    wait_for(device)
    return (time.perf_counter() - start) / steps


def fit_seconds(case: Case, device: torch.device) -> float:
    """Seconds of a step in a training of the same network on data in memory."""
    stopwatch = Stopwatch(WARMUP, WARMUP + case.steps)
    data = RandomImages(WARMUP + case.steps + 1, case.batch, case.size)
    model = Classification(
        lambda in_chans, classes: networks.create(case.model, case.size),
        CLASSES,
        compile="compiled" in case.mode,
        cuda_graphs="graphs" in case.mode,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_epochs=1, limit_val_batches=0,
            precision="32-true" if case.precision == "float32" else "bf16-mixed", logger=TensorBoardLogger(folder),
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[stopwatch, History(), EMA()],
        )  # fmt: skip
        trainer.fit(model, datamodule=data)
    return stopwatch.seconds / case.steps


def markdown(rows: Sequence[Row], quick: bool = False) -> str:
    """The kept rows as a page: for each place a table, its bars unless they are quick ones, and what measured it."""
    head = [
        ("bare", "milliseconds of a step made by hand on one batch that lies on the device: forward, cross-entropy, "
         "backward, optimizer; the median of rounds"),
        ("fit", "of a step of `python cli.py fit` on a data set in memory, with logging, schedule, history and moving "
         "average; rounds of both are taken in turns"),
        ("overhead", "how much longer the second takes than the first, at the median of rounds"),
    ]  # fmt: skip
    places = dict.fromkeys(place(row) for row in rows)
    sections = (_section([row for row in rows if place(row) == one], quick) for one in places)
    return page("What the training loop adds to a step", head, *sections)


def _section(rows: Sequence[Row], quick: bool) -> str:
    lines = []
    for row in rows:
        setting = f"{row['batch']}, {row['size']}×{row['size']}"
        about = [f"`{row['model']}`", row["mode"], row["precision"], setting, f"{row['rounds']} of {row['steps']}"]
        if row["status"] == FAILED:
            lines.append([*about, "failed", NONE, NONE])
        else:
            lines.append([*about, *(f"{float(row[name]):.4g}" for name in ("step_ms", "fit_ms")), overhead(row)])
    table = pipe_table(["network", "mode", "precision", "batch", "rounds", "bare", "fit", "overhead"], lines, 5)
    done = [told(row, quick) for row in rows if row["status"] != FAILED]
    failed = [told(row, quick) for row in rows if row["status"] == FAILED]
    return place_section(rows, table, Bars=[] if quick else done, Failed_rows=failed)


def told(row: Row, quick: bool) -> str:
    """A row as a line; of the real sizes, with the bar."""
    about = f"{row['model']}, {row['mode']}, {row['precision']}, {row['batch']} of {row['size']}×{row['size']}"
    if row["status"] == FAILED:
        return f"{about}: failed: {row['error']}"
    share = float(row["overhead"])
    line = f"{about}: a step of fit takes {float(row['fit_ms']):.4g} ms, a bare one {float(row['step_ms']):.4g}"
    verdict = "" if quick else "met: " if share < BAR else "MISSED: "
    return f"{verdict}{line}: {overhead(row)} (under {100 * BAR:g}%)"


def overhead(row: Row) -> str:
    """What the loop adds to a step, in percent."""
    return f"{100 * float(row['overhead']):+.1f}%"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py benchmark loop",
        description="What the training loop adds to a step: a step of `fit` (data in memory, logging, schedule, "
        "moving average) beside the bare one (forward, loss, backward, optimizer) of the same network and batch, in "
        "turns.",
    )
    parser.add_argument("--only", nargs="+", default=["msvmamba_nano"], metavar="NAME", help="models (default: nano)")
    parser.add_argument("--batch", type=int, metavar="N", help="images of a step (default: 128; on a CPU 64)")
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="their side (default: 224 64; on a CPU 32)")
    parser.add_argument("--steps", type=int, metavar="N", help="of a round (default: 50)")
    parser.add_argument("--rounds", type=int, metavar="N", help="of both, in turns (default: 5)")
    add_ways(parser)
    add_options(parser)
    return parser
