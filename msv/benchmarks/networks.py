"""What the benchmarks of whole networks have in common: the networks, their rows, the options of the commands."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from rich.console import Console

from msv.comparison.systems import create
from msv.profiling.measuring import Effort, time_call
from msv.profiling.steps import MODES, Step, inference_step, random_images, training_step
from msv.profiling.timing import peak_memory

SWIN = "swin_tiny_patch4_window7_224"
CLASSES = 1000
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
TASKS = ("inference", "training")

ON_GPU = Effort(calls=10, turns=20, seconds=4.0, warmup=3)
ON_CPU = Effort(calls=1, turns=15, seconds=30.0, warmup=1)
QUICK = Effort(calls=1, turns=1, seconds=0.0, warmup=1)

MEASURED = ("images_per_s", "step_ms", "step_min_ms", "turns", "peak_bytes")
"""Columns of `measure_step`: times of one step, the median and the least of `turns` turns; the most bytes of tensors
alive at once in a step, weights, AdamW's averages and images included."""


@dataclass(frozen=True)
class Case:
    """What one row measures.

    Attributes:
        model: of `msv.comparison.systems.MODELS`.
        task: of `TASKS`.
        mode: of `msv.profiling.steps.MODES`.
        precision: of `PRECISIONS`: of weights and images in inference; in training that of autocast, over weights in
            float32.
        batch: images of a step.
        size: their side in pixels.
    """

    model: str
    task: str
    mode: str
    precision: str
    batch: int
    size: int

    @property
    def columns(self) -> dict[str, str]:
        """As a row has it."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        return f"{self.model}, {self.task}, {self.mode}, {self.precision}, {self.batch} of {self.size}×{self.size}"


KEY = tuple(field.name for field in fields(Case))


def make_step(case: Case, device: torch.device) -> Step:
    """The step of a case, on random weights and a random batch that lies on the device already."""
    network, dtype = create(case.model, case.size).to(device), PRECISIONS[case.precision]
    if case.task == "inference":
        network = network.to(dtype)
        return inference_step(network, random_images(network, case.batch, case.size), case.mode)
    images = random_images(network, case.batch, case.size)
    labels = torch.randint(CLASSES, (case.batch,), device=device)
    return training_step(network, images, labels, case.mode, None if dtype is torch.float32 else dtype)


def measure_step(case: Case, device: torch.device, effort: Effort) -> dict[str, Any]:
    """Times a case and measures its memory; returns the columns of `MEASURED`."""
    step = make_step(case, device)
    found = time_call(step.work, device, effort)
    return {
        "images_per_s": case.batch / found.median,
        "step_ms": 1e3 * found.median,
        "step_min_ms": 1e3 * found.minimum,
        "turns": found.turns,
        "peak_bytes": step.held_bytes + peak_memory(step.work, device),
    }


def add_options(parser: argparse.ArgumentParser, modes: Sequence[str] = tuple(MODES)) -> None:
    """Options that these commands share."""
    folder = "results/benchmarks"
    parser.add_argument("--out", default=folder, metavar="DIR", help="where files are written (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one")
    parser.add_argument("--mode", nargs="+", choices=tuple(modes), help="graphs: compiled, with CUDA graphs")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), help="default: bf16; on a CPU float32")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of torch")
    parser.add_argument("--again", action="store_true", help="measure anew what was measured on this very machine")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, no bars: only to see that everything runs")


def chosen_device(options: argparse.Namespace) -> torch.device:
    """The device of `--device`.

    Raises:
        ValueError: there is no GPU for `cuda`, or `--threads`, `--batch` or `--size` is too small.
    """
    for name, least in (
        *((name, 1) for name in ("threads", "batch", "batches", "steps", "rounds")),
        *((name, 32) for name in ("size", "sizes")),
    ):
        value = getattr(options, name, None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < least:
                raise ValueError(f"--{name} is {number}; expected {least} or more")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, but torch finds no GPU here; use --device cpu, or auto for what there is")
    return torch.device("cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu")


def file_stem(name: str, device: torch.device, quick: bool) -> str:
    """Name of a benchmark's files, without their ending; tiny sizes must not take the place of the real ones."""
    return f"{name}_{device.type}{'_quick' if quick else ''}"


def command(name: str, options: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """What measures the rows again, without the folders of this machine."""
    words = [f"python cli.py benchmark {name}"]
    for option, value in vars(options).items():
        if option not in ("out", "again") and value != parser.get_default(option):
            values = value if isinstance(value, list) else [] if value is True else [value]
            words += [f"--{option}", *map(str, values)]
    return " ".join(words)


def say(console: Console, line: str) -> None:
    """Prints a line as it is."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)
