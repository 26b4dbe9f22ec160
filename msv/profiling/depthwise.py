"""`python -m msv.profiling.depthwise`: the depthwise convolutions' time on a GPU, beside cuDNN's and a copy.

The maps are those of msvmamba_tiny's four stages, of one image, and of images of 1024×1024 pixels. cuDNN's convolution
gets the same tensors, its weights in the map's dtype, and is followed by torch's sum and activation.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from msv.files import write_atomic
from msv.kernels import Activation, Backend, depthwise_conv
from msv.provenance import environment

from .batches import time_batches
from .benchmark import as_csv
from .scan_call import Call, leaves
from .timing import Work

ENVIRONMENT = ("device", "torch", "triton", "msv", "commit")
TIMES = ("ms", "cudnn_ms", "copy_ms", "speedup", "over_copy")
COLUMNS = (
    *("name", "B", "H", "W", "C", "kernel", "stride", "activation", "dtype"),
    *(f"{way}_{time}" for way in ("forward", "forward_backward") for time in TIMES),
    *("method", "repeats", "method_note"),
    *ENVIRONMENT,
)
"""Of the CSV. Times are medians of one call; forward plus backward gives the gradients of map, weights and bias. `copy`
moves the bytes that must be moved: forward x and y, backward x, dy and dx. `speedup` is cuDNN's time over ours.
"""

BATCH_BYTES = 256 << 20
"""What a batch's calls touch together at least: several times the L2."""


@dataclass(frozen=True)
class Case:
    """A convolution of the network.

    Attributes:
        kind: of `KINDS`.
        shape: of the map, (B, H, W, C).
        dtype: of the map; weights are float32.
    """

    kind: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        return f"{self.kind} {'x'.join(map(str, self.shape))} {str(self.dtype).removeprefix('torch.')}"

    @property
    def floor_bytes(self) -> tuple[int, int]:
        """Bytes to move at least: of the forward, and with the backward."""
        batch, height, width, channels = self.shape
        stride = KINDS[self.kind].stride
        x = batch * height * width * channels * self.dtype.itemsize
        y = batch * -(-height // stride) * -(-width // stride) * channels * self.dtype.itemsize
        return x + y, 3 * x + 2 * y

    def call(self, device: torch.device, backend: Backend) -> Call:
        """The convolution on tensors of its own, the same for every backend."""
        kind, generator = KINDS[self.kind], torch.Generator(device).manual_seed(0)
        normal = partial(torch.randn, device=device, generator=generator)
        batch, height, width, channels = self.shape
        x = normal(batch, height, width, (2 if kind.half else 1) * channels, dtype=self.dtype)[..., :channels]
        weight, bias = normal(channels, 1, kind.size, kind.size) / kind.size, normal(channels)

        def convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return depthwise_conv(x, weight, bias, kind.stride, kind.activation, kind.residual, backend=backend)

        upstream = normal(batch, -(-height // kind.stride), -(-width // kind.stride), channels, dtype=self.dtype)
        return Call(convolve, leaves(x, weight, bias), upstream)


@dataclass(frozen=True)
class Kind:
    """Where in the network a convolution stands.

    Attributes:
        size: K of the K×K kernel.
        half: whether the map is half of another one, as the mixers' x beside its gate.
    """

    size: int
    stride: int
    activation: Activation
    residual: bool = False
    half: bool = False


KINDS = {
    "mixer 3x3": Kind(3, 1, "silu", half=True),
    "mixer 7x7": Kind(7, 2, "silu", half=True),
    "ffn 3x3": Kind(3, 1, "gelu", residual=True),
}


def cases(quick: bool) -> list[Case]:
    """What is measured; with `quick` tiny maps."""
    stages = [(128, 56 >> stage, 56 >> stage, 192 << stage) for stage in range(4)]
    maps = [(2, 8, 7, 6)] if quick else [*stages, (1, 56, 56, 192), (4, 256, 256, 192)]
    found = [Case(kind, shape) for shape in maps for kind in KINDS]
    return found if quick else [*found, Case("mixer 3x3", maps[0], torch.float32)]


def measure(cases: Sequence[Case], device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Times one case after another; yields rows, `COLUMNS` but for the environment."""
    for case in cases:
        sets = 1 if quick else min(8, -(-BATCH_BYTES // case.floor_bytes[0]))
        works: dict[str, list[Work]] = {}
        backends: tuple[tuple[str, Backend], ...] = (("", "triton"), ("cudnn_", "parallel"))
        for prefix, backend in backends:
            calls = [case.call(device, backend) for _ in range(sets)]
            works[f"forward_{prefix}ms"] = [call.forward for call in calls]
            works[f"forward_backward_{prefix}ms"] = [call.forward_backward for call in calls]
        for way, count in zip(("forward", "forward_backward"), case.floor_bytes, strict=True):
            sources = [torch.zeros(count // 2, dtype=torch.uint8, device=device) for _ in range(sets)]
            works[f"{way}_copy_ms"] = [partial(torch.empty_like(source).copy_, source) for source in sources]
        measured = time_batches(works, device, *((1, 0.0) if quick else (30, 1.0)))
        row = {name: 1e3 * timing.median for name, timing in measured.times.items()}
        for way in ("forward", "forward_backward"):
            row[f"{way}_speedup"] = row[f"{way}_cudnn_ms"] / row[f"{way}_ms"]
            row[f"{way}_over_copy"] = row[f"{way}_ms"] / row[f"{way}_copy_ms"]
        kind = KINDS[case.kind]
        shape = dict(zip("BHWC", case.shape, strict=True))
        what = {"kernel": kind.size, "stride": kind.stride, "activation": kind.activation}
        how = {"method": measured.method, "repeats": measured.repeats, "method_note": measured.note}
        yield {"name": case.name, **shape, **what, "dtype": str(case.dtype).removeprefix("torch."), **row, **how}


def table(rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> Table:
    """The rows for a reader; times in ms."""
    title = "{device}, torch {torch}, triton {triton}".format(**found)
    made = Table("depthwise", title=title, title_justify="left", caption="medians in ms", caption_justify="left")
    for way in ("fwd", "fwd+bwd"):
        for head in (way, "cuDNN", "copy", "faster", "×copy"):
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
    parser = argparse.ArgumentParser(prog="python -m msv.profiling.depthwise", description=__doc__)
    parser.add_argument("--out", default="results/benchmarks", metavar="DIR", help="where depthwise_<device>.csv goes")
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
    path = Path(options.out) / f"depthwise_{name}{'_part' * bool(options.only)}{'_quick' * options.quick}.csv"
    rows = []
    for row in measure(chosen, device, options.quick):
        rows.append({**row, **known})
        write_atomic(path, as_csv(rows, COLUMNS))  # what is measured stays, whatever comes
    console.print(table(rows, found))
    console.print(f"written to {path}", highlight=False, soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
