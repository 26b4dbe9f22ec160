"""The scan's benchmark on a GPU: beside a copy of the same bytes, the parallel scan, and Mamba's CUDA kernel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from msv.kept import FAILED, Row, number
from msv.kernels import Backend

from .batches import time_batches, time_eagerly
from .measuring import one_line
from .scan_call import Call
from .scan_gpu_cases import Case
from .scan_rivals import SUPPORTED_MAPS, Kernel, RivalCall, rival_call
from .timing import Timing, Work, nbytes, peak_memory

COLUMNS = (
    *("name", "operator", "B", "K", "D", "L", "N", "R", "map", "routes", "carry_state", "dtype", "backend"),
    *("forward_ms", "forward_min_ms", "forward_backward_ms", "forward_backward_min_ms"),
    *("eager_forward_ms", "eager_forward_backward_ms"),
    *("floor_bytes", "copy_ms", "forward_over_copy", "copy_x_ms", "forward_over_copy_x"),
    *("rival", "rival_forward_ms", "rival_forward_backward_ms", "forward_speedup", "forward_backward_speedup"),
    *("rival_difference", "rival_note"),
    *("parallel_forward_ms", "parallel_forward_backward_ms", "parallel_note"),
    *("anchor_floor_ms", "anchor_forward_ms", "anchor_forward_backward_ms"),
    *("saved_bytes", "saved_ratio", "io_bytes", "peak_bytes", "memory_ratio"),
    *("method", "input_sets", "repeats", "method_note", "status", "error", "command"),
)
"""Of the CSV, beside where a row was measured; empty where there is nothing to tell.

Times are medians of one call, `min` the least. Ours, the copies and the rival are timed in turns, as `method` says:
`graph`, batches of calls captured as CUDA graphs, without the host's part; or `calls`, the same calls from Python. A
batch is one call on each of `input_sets` sets of tensors. `eager` is a call from Python as a network makes it.
Forward plus backward gives the gradients of all inputs, weights included.

- `copy` moves `floor_bytes`, what the operator must read and write at least; `copy_x` copies the map alone.
- `rival` gets the same tensors; its forward and backward are called directly, without autograd. `speedup` is its time
  over ours; `rival_difference` is ‖ours - its‖ / ‖its‖ of y. For SS2D it adds the routes, which ours does not.
- `parallel` is the scan in torch, called from Python, a few times.
- `anchor` columns were measured before, on an H100 80GB HBM3, and are not part of this run.
- `saved` is what the operator keeps for its backward beside its inputs, `saved_ratio` its bytes over those of u or x in
  float32, x counted once for each route. `io_bytes` are inputs and output, `peak_bytes` the most alive during forward
  plus backward, gradients and what comes in included, `memory_ratio` their quotient.
"""

BATCH_BYTES = 256 << 20
"""What a batch's calls touch together at least: several times the L2, so that none finds its inputs there."""
PARALLEL_SECONDS, PARALLEL_BYTES = 1.0, 20e9
"""Above these the parallel scan is not timed any further."""


@dataclass(frozen=True)
class Effort:
    """How long a case is timed.

    Attributes:
        repeats: turns at most.
        seconds: after which no further turn begins.
        batch_bytes: what a batch touches at least.
        eager_calls: calls from Python at most.
    """

    repeats: int = 30
    seconds: float = 1.0
    batch_bytes: int = BATCH_BYTES
    eager_calls: int = 10


QUICK = Effort(repeats=1, seconds=0.0, batch_bytes=0, eager_calls=1)


def measure_case(
    case: Case,
    device: torch.device,
    backend: Backend = "triton",
    kernel: Kernel | None = None,
    parallel: bool = True,
    effort: Effort = Effort(),
) -> dict[str, Any]:
    """Measures one case; returns its columns.

    Args:
        case: what to measure.
        device: where.
        backend: of ours.
        kernel: the rival's, if there is one.
        parallel: whether to time the parallel scan too.
        effort: how long to time.
    """
    row: dict[str, Any] = {"backend": backend, "floor_bytes": case.floor_bytes}
    row |= {f"anchor_{name}_ms": value for name, value in vars(case.anchor).items()}
    row |= _ours_and_rival(case, device, backend, kernel, effort)
    if parallel and backend != "parallel":
        row |= _parallel(case, device)
    return row


def table(rows: Sequence[Row], where: Mapping[str, str]) -> Table:
    """Kept rows for a reader; times in ms."""
    title = "{device}, torch {torch}, triton {triton}".format(**where)
    found = Table("scan", title=title, title_justify="left", caption_justify="left", pad_edge=False)
    found.caption = (
        "ms, medians of one call; copy: of the same bytes; ×x: over a copy of x; CUDA: the rival, in the same run;\n"
        "anchor: the fastest CUDA kernel as measured before on an H100 80GB HBM3; saved: over the input in float32"
    )
    heads = ("copy", "fwd", "×copy", "×x", "CUDA", "faster", "anchor", "fwd+bwd", "CUDA", "faster", "anchor", "eager")
    for head in (*heads, "parallel", "saved", "peak MB"):
        found.add_column(head, justify="right", no_wrap=True)
    names = ["copy_ms", "forward_ms", "forward_over_copy", "forward_over_copy_x"]
    names += ["rival_forward_ms", "forward_speedup", "anchor_forward_ms"]
    names += ["forward_backward_ms", "rival_forward_backward_ms", "forward_backward_speedup"]
    names += [f"{name}_forward_backward_ms" for name in ("anchor", "eager", "parallel")]
    for row in rows:
        if row["status"] == FAILED:
            found.add_row(row["name"], *[""] * 14, "failed")
            continue
        peak = (number(row, "peak_bytes") or 0.0) / 1e6
        values = [*(number(row, name) for name in names), number(row, "saved_ratio"), peak]
        found.add_row(row["name"], *("" if value is None else f"{value:.3g}" for value in values))
    return found


def notes(rows: Sequence[Row]) -> list[str]:
    """A line for each thing that was not measured, and why."""
    lines = []
    for what in ("error", "method_note", "rival_note", "parallel_note"):
        reasons: dict[str, list[str]] = {}
        for row in rows:
            if row[what]:
                reasons.setdefault(row[what], []).append(row["name"])
        for reason, names in reasons.items():
            where = names[0] if len(names) == 1 else f"{len(names)} rows"
            lines.append(f"{what.removesuffix('_note')}: {where}: {reason}")
    return lines


def _ours_and_rival(
    case: Case, device: torch.device, backend: Backend, kernel: Kernel | None, effort: Effort
) -> dict[str, Any]:
    input_sets = min(8, max(1, -(-effort.batch_bytes // case.floor_bytes)))
    calls = [case.call(device, backend) for _ in range(input_sets)]
    row = _memory(case, calls[0], device, backend)
    works: dict[str, list[Work]] = {
        "forward": [call.forward for call in calls],
        "forward_backward": [call.forward_backward for call in calls],
        **_copies(case, calls, device),
    }
    rivals, why_not = _rivals(case, calls, kernel)
    if rivals:
        try:
            row["rival_difference"] = _difference(rivals[0].alike(calls[0].forward()), rivals[0].forward())
            rivals[0].forward_backward()
        except RuntimeError as error:
            rivals, why_not = [], f"it fails: {one_line(error)}"
    works |= {f"rival_{name}": [getattr(rival, name) for rival in rivals] for name in _WAYS if rivals}
    measured = time_batches(works, device, effort.repeats, effort.seconds)
    for name in _WAYS:
        row[f"eager_{name}_ms"] = 1e3 * time_eagerly(works[name][0], device, effort.eager_calls)
        row |= _milliseconds(name, measured.times[name])
    times = measured.times
    for name in ("copy", "copy_x"):
        if name in times:
            row[f"{name}_ms"] = 1e3 * times[name].median
            row[f"forward_over_{name}"] = times["forward"].median / times[name].median
    if rivals and kernel is not None:
        between = "" if case.operator == "1d" else "cross-scan, CUDA scan, cross-merge: "
        row["rival"] = f"{between}{kernel.name} {kernel.version}"
        for name in _WAYS:
            row[f"rival_{name}_ms"] = 1e3 * times[f"rival_{name}"].median
            row[f"{name}_speedup"] = times[f"rival_{name}"].median / times[name].median
    how = {"method": measured.method, "repeats": measured.repeats, "method_note": measured.note or None}
    return {**row, **how, "input_sets": input_sets, "rival_note": why_not}


_WAYS = ("forward", "forward_backward")


def _copies(case: Case, calls: Sequence[Call], device: torch.device) -> dict[str, list[Work]]:
    """A copy that reads and writes as many bytes as the operator must, and for a map one of the map."""

    def copy(source: Tensor) -> Work:
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    halves = [torch.zeros(case.floor_bytes // 2, dtype=torch.uint8, device=device) for _ in calls]
    works = {"copy": [copy(half) for half in halves]}
    if case.operator == "2d":
        works["copy_x"] = [copy(call.tensors[0].detach()) for call in calls]
    return works


def _rivals(case: Case, calls: Sequence[Call], kernel: Kernel | None) -> tuple[list[RivalCall], str | None]:
    """The rival's calls on the tensors of ours; or none, and why."""
    if kernel is None:
        return [], None
    found = [rival_call(kernel, case, call.tensors, call.upstream) for call in calls]
    rivals = [rival for rival in found if rival is not None]
    return rivals, None if rivals else SUPPORTED_MAPS


def _memory(case: Case, call: Call, device: torch.device, backend: Backend) -> dict[str, Any]:
    triton = backend == "triton" or (backend == "auto" and device.type == "cuda")
    with torch.no_grad():
        saved_bytes = nbytes(case.saved(call.tensors, triton))
    inputs = nbytes(*call.tensors)
    io_bytes = inputs + nbytes(call.forward())
    peak_bytes = inputs + nbytes(call.upstream) + peak_memory(call.forward_backward, device)
    saved = {"saved_bytes": saved_bytes, "saved_ratio": saved_bytes / (4 * case.elements)}
    return {**saved, "io_bytes": io_bytes, "peak_bytes": peak_bytes, "memory_ratio": peak_bytes / io_bytes}


def _parallel(case: Case, device: torch.device) -> dict[str, Any]:
    """The columns of the parallel scan, timed as far as it is worth it."""
    # In float32: inputs, output, gradients and what the backward holds; the states at every sixteenth step.
    needed = 4 * case.elements * (12 + case.d_state / 16)
    if needed > PARALLEL_BYTES:
        return {"parallel_note": f"not timed: it needs some {needed / 1e9:.0f} GB"}
    row: dict[str, Any] = {}
    try:
        call = case.call(device, "parallel")
        for name in _WAYS:
            seconds = time_eagerly(getattr(call, name), device, repeats=5, seconds=PARALLEL_SECONDS / 2)
            row[f"parallel_{name}_ms"] = 1e3 * seconds
            if name == "forward" and seconds > PARALLEL_SECONDS:
                row["parallel_note"] = f"the backward not timed: the forward alone takes {seconds:.1f} s"
                break
    except RuntimeError as error:  # out of memory, above all: what ours is compared with must not cost ours
        row["parallel_note"] = f"it fails: {one_line(error)}"
    return row


def _milliseconds(name: str, timing: Timing) -> dict[str, float]:
    return {f"{name}_ms": 1e3 * timing.median, f"{name}_min_ms": 1e3 * timing.minimum}


def _difference(ours: Tensor, theirs: Tensor) -> float:
    theirs = theirs.float()
    return ((ours.float() - theirs).norm() / theirs.norm()).item()
