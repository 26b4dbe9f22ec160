"""Images a second of the systems in inference, row by row (Table 6), and the memory that they need for it."""

import gc
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from msv.ablation.paper import TABLE_6
from msv.profiling.batches import turns
from msv.profiling.timing import Work, call_seconds, nbytes, peak_memory

from .kept import Kept, Row, place
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
    return Kept(folder / FILE, COLUMNS, ("model", "precision", "mode", "batch", "size", "device"))


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


@dataclass(frozen=True)
class Effort:
    """How long a row is measured.

    Attributes:
        calls: forwards of a turn, one after another, so that the host can run ahead of a GPU as it does in use.
        turns: at most; three at least.
        seconds: after which no further turn begins.
        warmup: calls before anything is timed, in which kernels are compiled and loaded.
    """

    calls: int
    turns: int
    seconds: float
    warmup: int


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


def missing(cases: Sequence[Case], kept: Kept, where: dict[str, str], again: bool = False) -> list[Case]:
    """The cases that have no finished row from this very place; those that failed here come last.

    A case that takes the whole process with it must not keep the others from being measured.
    """
    if again:
        return list(cases)
    at_hand = [row for row in kept.read() if place(row) == tuple(where.values())]

    def state(case: Case) -> str | None:
        return next((row["status"] for row in at_hand if case.columns.items() <= row.items()), None)

    states = {case: state(case) for case in cases}
    return sorted((case for case in cases if states[case] != "done"), key=lambda case: states[case] == "failed")


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
    for case in cases:
        found: dict[str, Any] = {"status": "done", "error": None}
        try:
            found |= measure_case(case, device, effort)
        except Exception as error:  # compilers and drivers raise dozens of kinds, and none may stop the other rows
            found |= {"status": "failed", "error": _one_line(error)}
        yield kept.put({**case.columns, **found, "command": command}, where)
        _forget(device, case)


@torch.inference_mode()
def measure_case(case: Case, device: torch.device, effort: Effort) -> dict[str, float | int]:
    """Times the forward of one case on random images and measures its memory; returns those columns.

    Weights and images are in the case's precision, as timm's own benchmark has them; the scan keeps its states in
    float32 in any of them.
    """
    dtype = PRECISIONS[case.precision]
    network = create(case.model).eval().to(device, dtype)
    images = torch.randn(case.batch, 3, case.size, case.size, device=device, dtype=dtype)
    weights = nbytes(*network.parameters(), *network.buffers())
    forward: Callable[..., Any] = torch.compile(network) if case.mode == "compiled" else network
    work = partial(forward, images)
    for _ in range(effort.warmup):
        work()
    seconds = turns(
        {"forward": partial(_repeat, work, effort.calls)},
        lambda batches: {name: call_seconds(batch, device) for name, batch in batches.items()},
        effort.turns,
        effort.seconds,
    )["forward"]
    one = [value / effort.calls for value in seconds]
    median = statistics.median(one)
    return {
        "images_per_s": case.batch / median,
        "forward_ms": 1e3 * median,
        "forward_min_ms": 1e3 * min(one),
        "turns": len(one),
        "peak_bytes": weights + nbytes(images) + peak_memory(work, device),
    }


def _repeat(work: Work, calls: int) -> None:
    for _ in range(calls):
        work()


def _forget(device: torch.device, case: Case) -> None:
    """Give back what a case left: compiled code, memory."""
    torch.compiler.reset()
    gc.collect()
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise OSError(
            f"after {case} the GPU is of no use to this process ({_one_line(error)}); run the same command again: it "
            "skips what is finished and tries that row last"
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
