"""Images a second of the systems in inference, row by row (Table 6), and the memory that they need for it."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from msv.ablation.paper import TABLE_6
from msv.kept import MACHINE, Kept, Row
from msv.profiling import measuring
from msv.profiling.measuring import Effort, time_call
from msv.profiling.steps import inference_step, random_images
from msv.profiling.timing import peak_memory

from .systems import COMPILED_TOO, MODELS, create, order

PRECISIONS = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MODES = ("eager", "compiled")
FILE = "throughput.csv"
COLUMNS = (
    *("model", "precision", "mode", "batch", "size", "status"),
    *("images_per_s", "forward_ms", "forward_min_ms", "turns", "peak_bytes", "error", "command"),
)
"""Of the CSV. Times are of one forward: the median and the least of `turns` turns. `peak_bytes` are the most bytes of
tensors alive at once: weights, images and what the forward needs. `status` is done or failed.
"""


def store(folder: Path) -> Kept:
    """The rows kept in a folder: one for each case and device."""
    return Kept(folder / FILE, COLUMNS, ("model", "precision", "mode", "batch", "size", *MACHINE))


@dataclass(frozen=True)
class Case:
    """What one row measures.

    Attributes:
        model: of `MODELS`.
        precision: of weights and images, one of `PRECISIONS`.
        mode: `eager` or `compiled`.
        batch: images of a forward.
        size: their side in pixels.
    """

    model: str
    precision: str
    mode: str
    batch: int
    size: int

    @property
    def columns(self) -> dict[str, str]:
        """As a row has it."""
        return {field.name: str(getattr(self, field.name)) for field in fields(self)}

    def __str__(self) -> str:
        return f"{self.model}, {self.precision}, {self.mode}"


ON_GPU = Effort(calls=10, turns=20, seconds=10.0, warmup=3)
ON_CPU = Effort(calls=1, turns=5, seconds=10.0, warmup=0)


def plan(
    on_gpu: bool,
    batch: int | None = None,
    size: int = 224,
    only: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
) -> list[Case]:
    """The rows to measure, the paper's own models first.

    On a GPU those four run in every precision, eager and compiled, at batch 128; the others eager in bf16, Swin-T and
    ConvNeXt-T compiled, too. On a CPU, where that would take days, all run eager in float32 at batch 2.

    Args:
        on_gpu: which of the two.
        batch: instead of that batch.
        size: side of the images in pixels.
        only: these models alone, of `MODELS`.
        precisions: these instead, for every model.
        modes: these instead, for every model.
    """
    cases = []
    for model in sorted(only or MODELS, key=order):
        own, compiled_too = model in TABLE_6, model in TABLE_6 or model in COMPILED_TOO
        usual = (tuple(PRECISIONS) if own else ("bf16",)) if on_gpu else ("float32",)
        ways = MODES if on_gpu and compiled_too else MODES[:1]
        cases += [
            Case(model, precision, mode, batch or (128 if on_gpu else 2), size)
            for precision, mode in itertools.product(precisions or usual, modes or ways)
        ]
    return cases


def measure(
    cases: Sequence[Case],
    device: torch.device,
    effort: Effort,
    kept: Kept,
    where: dict[str, str],
    command: str,
) -> Iterator[Row]:
    """Measures one case after another and yields its row, which is kept by then; a failing one has its error there.

    Raises:
        OSError: a row cannot be written; or the GPU is of no use to this process any more.
    """
    return measuring.measure(cases, lambda case: measure_case(case, device, effort), device, kept, where, command)


def measure_case(case: Case, device: torch.device, effort: Effort) -> dict[str, float | int]:
    """Times the forward of one case on random images and measures its memory; returns those columns.

    Weights and images are in the case's precision, as timm's own benchmark has them; the scan keeps its states in
    float32 in any of them.
    """
    network = create(case.model, case.size).to(device, PRECISIONS[case.precision])
    step = inference_step(network, random_images(network, case.batch, case.size), case.mode)
    found = time_call(step.work, device, effort)
    return {
        "images_per_s": case.batch / found.median,
        "forward_ms": 1e3 * found.median,
        "forward_min_ms": 1e3 * found.minimum,
        "turns": found.turns,
        "peak_bytes": step.held_bytes + peak_memory(step.work, device),
    }
