"""`python cli.py goldens`: how far this code's numbers are from the published model's, on the same weights and images.

The published code ran on small networks, whose weights lie in `tests/goldens/` beside what it computed.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from torch import Tensor, nn

from msv.ablation.markdown import pipe_table
from msv.comparison.pages import page, told_place
from msv.files import write_atomic
from msv.kept import Filter, Kept, Row, every, here, number, place
from msv.kernels import Backend
from msv.models import MSVMamba, load_published
from msv.models.published import infer_arguments
from msv.profiling.devices import chosen_device

FOLDER = Path(__file__).parents[2] / "tests" / "goldens"
COMMAND = "python cli.py goldens"
DEFAULTS = {"device": ["cpu"], "backend": ["auto", "reference"]}
COLUMNS = ("golden", "network", "size", "backend", "quantity", "difference", "tolerance", "measure", "command")
"""Of the CSV: the largest difference in a set of tensors, and the one that is allowed on a CPU in float32."""


@dataclass(frozen=True)
class Quantity:
    """A set of tensors that is compared.

    Args:
        name: of the set.
        about: what is in it.
        tolerance: the largest difference that is allowed on a CPU in float32.
        measure: what is called the difference.
    """

    name: str
    about: str
    tolerance: float
    measure: str


LOGITS = Quantity("logits", "the output", 3e-6, "largest absolute difference")
MAPS = Quantity(
    "maps",
    "after the stem, each stage, each downsampling, the last norm and the pooling",
    5e-5,
    "largest absolute difference",
)
GRADIENT = Quantity("input gradient", "of a weighted sum of the logits", 4e-6, "norm of the difference over the norm")
QUANTITIES = (LOGITS, MAPS, GRADIENT)


def main(argv: Sequence[str]) -> int:
    """``goldens``: compare, keep the differences, and write the page; 1 where one is larger than is allowed.

    Raises:
        FileNotFoundError: there are no goldens.
        ValueError: there is no GPU for ``--device cuda``, or a kept file is damaged.
        OSError: a file cannot be written.
    """
    options = _parser().parse_args(argv)
    device = chosen_device(options.device)
    files = sorted(options.goldens.glob("*.pt"))
    if not files:
        raise FileNotFoundError(f"no *.pt in {options.goldens}; expected the goldens of a checkout, tests/goldens")
    kept, where = store(options.out), here(device)
    command = " ".join([COMMAND, *_words("device", [options.device]), *_words("backend", options.backend)])
    rows = []
    for file in files:
        for backend in options.backend:
            rows += [kept.put({**row, "command": command}, where) for row in compare(file, device, backend)]
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    console.print(render(rows))
    written = [kept.path, *write_page(options.out)]
    console.print(f"wrote {' and '.join(map(str, written))}")
    return int(not all(map(agrees, rows)))


def _words(option: str, values: Sequence[str]) -> list[str]:
    """An option as it is typed, where it is not the default."""
    return [] if values == DEFAULTS[option] else [f"--{option}", *values]


def store(folder: Path) -> Kept:
    """The differences kept in a folder: one for each golden, image size, backend, set of tensors and device."""
    return Kept(folder / "goldens.csv", COLUMNS, ("golden", "size", "backend", "quantity", "device"))


def page_path(folder: Path) -> Path:
    """The differences as a page."""
    return folder / "goldens.md"


def write_page(folder: Path, takes: Filter = every) -> list[Path]:
    """Write the page of the differences that a folder keeps; returns its path, or nothing where none is taken.

    Raises:
        OSError: the file cannot be written.
        ValueError: the kept file is damaged.
    """
    rows = [row for row in store(folder).read() if takes(row)]
    if not rows:
        page_path(folder).unlink(missing_ok=True)
        return []
    write_atomic(page_path(folder), render(rows))
    return [page_path(folder)]


def compare(file: Path, device: torch.device, backend: Backend = "auto") -> Iterator[dict[str, Any]]:
    """Run a golden's network on its weights and images; yields a row for each set of tensors and size of images.

    Args:
        file: of `tests/goldens/`.
        device: where; in float32 without TF32.
        backend: of the scans.
    """
    golden = torch.load(file, weights_only=True)
    arguments = infer_arguments(golden["state_dict"], str(file))
    model = MSVMamba(**arguments, backend=backend)
    load_published(model, golden["state_dict"])
    model.to(device).eval()
    for size, case in golden["cases"].items():
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found = differences(model, case, device)
        for quantity, difference in found.items():
            yield {
                "golden": file.stem,
                "network": describe(arguments),
                "size": size,
                "backend": backend,
                "quantity": quantity.name,
                "difference": difference,
                "tolerance": quantity.tolerance,
                "measure": quantity.measure,
            }


def differences(model: MSVMamba, case: Mapping[str, Any], device: torch.device) -> dict[Quantity, float]:
    """How far a network is from what the published code computed on the same images, by set of tensors."""
    maps: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, key=key: maps.__setitem__(key, output.detach().cpu()))
        for key, module in _modules(model).items()
    ]
    images = case["input"].to(device, copy=True).requires_grad_()
    logits = model(images)
    (gradient,) = torch.autograd.grad((logits * case["weight"].to(device)).sum(), images)
    for hook in hooks:
        hook.remove()
    expected = case["grad_input"]
    return {
        LOGITS: _largest(logits.detach().cpu(), case["logits"]),
        MAPS: torch.tensor([_largest(maps[key], stage) for key, stage in case["stages"].items()]).max().item(),
        GRADIENT: ((gradient.cpu() - expected).norm() / expected.norm()).item(),
    }


def describe(arguments: Mapping[str, Any]) -> str:
    """A golden's network in words."""
    full = arguments["full_scans"]
    parts = ["SS2D" if full == 4 else f"MS2D {full}/{4 - full}", f"N = {arguments['d_state']}"]
    parts += [name for name, on in (("SE", arguments["se"]), ("ConvFFN", arguments["conv_ffn"])) if on]
    return ", ".join(parts)


def agrees(row: Row) -> bool:
    """Whether a kept difference is as small as is allowed; NaN is not."""
    difference, tolerance = number(row, "difference"), number(row, "tolerance")
    return difference is not None and tolerance is not None and difference <= tolerance


def largest(rows: Sequence[Row]) -> list[Row]:
    """Of each set of tensors the row that is furthest from what is allowed."""
    sets = ([row for row in rows if row["quantity"] == quantity.name] for quantity in QUANTITIES)
    return [max(found, key=lambda row: (not agrees(row), number(row, "difference") or 0.0)) for found in sets if found]


def render(rows: Sequence[Row]) -> str:
    """The page: what is compared, and a table for each place where it was."""
    head = [
        (
            "goldens",
            "small networks on which the published code ran on a CPU in float32, with weights away from their initial "
            "values; `tests/goldens/` has the weights, the images, and what it computed. Here the same weights come "
            "through the importer of published checkpoints",
        ),
        *((q.name, f"{q.about}: {q.measure}, at most {q.tolerance:g} on a CPU in float32") for q in QUANTITIES),
        ("elsewhere", "other splits, sides that differ and odd ones: `tests/models/test_goldens.py`"),
    ]
    places = list(dict.fromkeys(place(row) for row in rows))
    sections = (_section([row for row in rows if place(row) == where]) for where in places)
    return page("Agreement with the published model", head, *sections)


def _section(rows: Sequence[Row]) -> str:
    first = rows[0]
    head = [
        ("Machine", told_place(first)),
        ("Commit", first["commit"] or "unknown"),
        ("Command", ", ".join(f"`{command}`" for command in dict.fromkeys(row["command"] for row in rows))),
    ]
    titles = ["golden", "network", "images", "scans", *(f"{q.name} (≤ {q.tolerance:g})" for q in QUANTITIES), "agrees"]
    lines = []
    for case in dict.fromkeys(_case(row) for row in rows):
        found = {row["quantity"]: row for row in rows if _case(row) == case}
        told = [f"{float(found[q.name]['difference']):.1e}" if q.name in found else "–" for q in QUANTITIES]
        lines.append([*case, *told, "yes" if all(map(agrees, found.values())) else "NO"])
    return "\n\n".join(
        [
            f"## {first['device'] or 'unknown device'}",
            "\n".join(f"- **{label}**: {text}" for label, text in head),
            pipe_table(titles, lines, words=4),
        ]
    )


def _case(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("golden", "network", "size", "backend"))


def _modules(model: MSVMamba) -> dict[str, nn.Module]:
    """What makes the maps, by their names in a golden."""
    modules = {"patch_embed": model.stem, "norm": model.norm, "pooled": model.head.global_pool}
    modules |= {f"stage{number}": stage for number, stage in enumerate(model.stages)}
    return modules | {f"down{number}": stage.downsample for number, stage in enumerate(model.stages[1:])}


def _largest(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        raise ValueError(f"a map is {tuple(found.shape)}, and {tuple(expected.shape)} in the golden; expected the same")
    return (found - expected).abs().max().item()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py goldens",
        description="How far this code's numbers are from those of the published code, on the same weights and images.",
    )
    parser.add_argument(
        "--goldens", type=Path, default=FOLDER, metavar="DIR", help="the *.pt files (default: tests/goldens)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/comparison"), metavar="DIR",
        help="for goldens.csv and goldens.md (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: %(default)s")
    parser.add_argument(
        "--backend", nargs="+", default=DEFAULTS["backend"], choices=get_args(Backend), help="of the scans"
    )
    return parser
