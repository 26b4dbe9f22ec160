"""`python -m msv.profiling.merge`: the time of what follows the scans on a GPU, beside torch's and a copy.

Routes are merged and gated, from the scans' outputs to out_proj's input, on maps of msvmamba_tiny's four stages, of one
image, and of images of 1024×1024 pixels. torch gets the same tensors under autocast, as a network trains; in place of
squeeze-excitation's two small products stands a sigmoid.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from msv.files import write_atomic
from msv.kernels import Backend, gate, merge_routes
from msv.provenance import environment

from .batches import time_batches
from .benchmark import as_csv
from .scan_call import Call, leaves
from .timing import Work

ENVIRONMENT = ("device", "torch", "triton", "msv", "commit")
TIMES = ("ms", "torch_ms", "copy_ms", "speedup", "over_copy")
COLUMNS = (
    *("name", "B", "H", "W", "D", "full", "half", "se", "dtype"),
    *(f"{way}_{time}" for way in ("forward", "forward_backward") for time in TIMES),
    *("method", "repeats", "method_note"),
    *ENVIRONMENT,
)
"""Of the CSV. Times are medians of one call; forward plus backward gives the gradients of routes, norm and gate. `copy`
moves the bytes that the kernels move. `speedup` is torch's time over ours.
"""

BATCH_BYTES = 256 << 20
"""What a batch's calls touch together at least: several times the L2."""


@dataclass(frozen=True)
class Kind:
    """A split of the routes, Table 5's.

    Attributes:
        full: routes on the full map.
        half: routes on the half map; with no full routes they are normalised after their sum.
        se: whether squeeze-excitation is between the two operators.
    """

    full: int
    half: int
    se: bool


KINDS = {"1/3 SE": Kind(1, 3, True), "4/0": Kind(4, 0, False), "0/4 SE": Kind(0, 4, True)}


@dataclass(frozen=True)
class Case:
    """A mixer's merge and gate.

    Attributes:
        kind: of `KINDS`.
        shape: of the map, (B, H, W, D).
        dtype: of the maps; norms are float32.
    """

    kind: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"

    @property
    def half_shape(self) -> tuple[int, int, int, int]:
        """Of the half map."""
        batch, height, width, channels = self.shape
        return batch, -(-height // 2), -(-width // 2), channels

    @property
    def moved_bytes(self) -> tuple[int, int]:
        """Bytes of maps that the kernels read and write: in a forward, and with the backward."""
        kind = KINDS[self.kind]
        full, half = torch.Size(self.shape).numel(), torch.Size(self.half_shape).numel()
        merged = kind.full * full + (kind.half + 2) * half * (kind.half > 0) + full
        kept = full * (kind.full > 1) + half * (kind.half > 1 and not kind.full)
        normalised = 3 * full * (kind.full > 0)
        if kind.half:
            normalised += full + 2 * half * (kind.half if kind.full else 1)
        forward, backward = merged + 3 * full, kept + 5 * full + normalised
        return forward * self.dtype.itemsize, (forward + backward) * self.dtype.itemsize

    def call(self, device: torch.device, backend: Backend) -> Call:
        """Both operators on tensors of their own, the same for every backend; z is half of in_proj's output."""
        kind, generator = KINDS[self.kind], torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, device=device, generator=generator)
        batch, *_, channels = self.shape
        maps = [
            normal(batch, routes, *shape[1:], dtype=self.dtype)
            for routes, shape in ((kind.full, self.shape), (kind.half, self.half_shape))
            if routes
        ]
        z = normal(*self.shape[:3], 2 * channels, dtype=self.dtype)[..., channels:]

        def merge(weight: Tensor, bias: Tensor, z: Tensor, *maps: Tensor) -> Tensor:
            norm = (weight, bias)
            full, half = (maps[0] if kind.full else None, maps[-1] if kind.half else None)
            m, means = merge_routes(
                full, half, *norm, *norm, self.shape[1:3], sum_first=not kind.full, means=kind.se, backend=backend
            )
            out = gate(m, None if means is None else means.sigmoid(), z, backend=backend)
            return out.to(self.dtype)

        def trained(*tensors: Tensor) -> Tensor:
            mixed = self.dtype != torch.float32 and backend == "parallel"
            with torch.autocast(device.type, self.dtype) if mixed else nullcontext():
                return merge(*tensors)

        tensors = leaves(normal(channels), normal(channels), z, *maps)
        return Call(trained, tensors, normal(*self.shape, dtype=self.dtype))


def cases(quick: bool) -> list[Case]:
    """What is measured; with `quick` tiny maps."""
    stages = [(128, 56 >> stage, 56 >> stage, 192 << stage) for stage in range(4)]
    maps = [(2, 8, 7, 6)] if quick else [*stages, (1, 56, 56, 192), (4, 256, 256, 192)]
    found = [Case(kind, shape) for shape in maps for kind in KINDS]
    return found if quick else [*found, Case("1/3 SE", maps[0], torch.float32)]


def measure(cases: Sequence[Case], device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Times one case after another; yields rows, `COLUMNS` but for the environment."""
    for case in cases:
        sets = 1 if quick else min(8, -(-BATCH_BYTES // case.moved_bytes[0]))
        works: dict[str, list[Work]] = {}
        backends: tuple[tuple[str, Backend], ...] = (("", "triton"), ("torch_", "parallel"))
        for prefix, backend in backends:
            calls = [case.call(device, backend) for _ in range(sets)]
            works[f"forward_{prefix}ms"] = [call.forward for call in calls]
            works[f"forward_backward_{prefix}ms"] = [call.forward_backward for call in calls]
        for way, count in zip(("forward", "forward_backward"), case.moved_bytes, strict=True):
            sources = [torch.zeros(count // 2, dtype=torch.uint8, device=device) for _ in range(sets)]
            works[f"{way}_copy_ms"] = [partial(torch.empty_like(source).copy_, source) for source in sources]
        measured = time_batches(works, device, *((1, 0.0) if quick else (30, 1.0)))
        row = {name: 1e3 * timing.median for name, timing in measured.times.items()}
        for way in ("forward", "forward_backward"):
            row[f"{way}_speedup"] = row[f"{way}_torch_ms"] / row[f"{way}_ms"]
            row[f"{way}_over_copy"] = row[f"{way}_ms"] / row[f"{way}_copy_ms"]
        kind = KINDS[case.kind]
        shape = dict(zip("BHWD", case.shape, strict=True))
        what = {"full": kind.full, "half": kind.half, "se": kind.se}
        how = {"method": measured.method, "repeats": measured.repeats, "method_note": measured.note}
        yield {"name": case.name, **shape, **what, "dtype": str(case.dtype).removeprefix("torch."), **row, **how}


def table(rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> Table:
    """The rows for a reader; times in ms."""
    title = "{device}, torch {torch}, triton {triton}".format(**found)
    made = Table("merge and gate", title=title, title_justify="left", caption="medians in ms", caption_justify="left")
    for way in ("fwd", "fwd+bwd"):
        for head in (way, "torch", "copy", "faster", "×copy"):
            made.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        made.add_row(
            row["name"], *(f"{row[f'{way}_{t}']:.3g}" for way in ("forward", "forward_backward") for t in TIMES)
        )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Raises:
        ValueError: there is no GPU, and it is not a dry run in Triton's interpreter.
        OSError: the CSV cannot be written.
    """
    parser = argparse.ArgumentParser(prog="python -m msv.profiling.merge", description=__doc__)
    parser.add_argument("--out", default="results/benchmarks", metavar="DIR", help="where merge_<device>.csv goes")
    parser.add_argument("--quick", action="store_true", help="tiny maps; without a GPU with TRITON_INTERPRET=1")
    parser.add_argument("--only", default="", metavar="PART", help="rows whose name contains this")
    options = parser.parse_args(argv)
    name: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu" and not options.quick:
        raise ValueError("torch finds no GPU here; use --quick with TRITON_INTERPRET=1 to see that everything runs")
    chosen = [case for case in cases(options.quick) if options.only in case.name]
    if not chosen:
        raise ValueError(f"--only is {options.only}, which is part of no row's name, such as {cases(False)[0].name!r}")
    console = Console(width=160)
    found = environment(name)
    known = {column: found[column] for column in ENVIRONMENT}
    path = Path(options.out) / f"merge_{name}{'_part' * bool(options.only)}{'_quick' * options.quick}.csv"
    rows = []
    for row in measure(chosen, device, options.quick):
        rows.append({**row, **known})
        write_atomic(path, as_csv(rows, COLUMNS))  # what is measured stays, whatever comes
    console.print(table(rows, found))
    console.print(f"written to {path}", highlight=False, soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
