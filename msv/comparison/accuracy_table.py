"""Table 1: parameters, FLOPs and accuracy of all its systems, measured here and as the paper printed them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from msv.ablation.markdown import NONE, fixed, pipe_table
from msv.kept import Filter, Row, every, number

from . import accuracy
from .pages import COMMAND, as_csv, page, told_place
from .systems import SYSTEMS, System, counts

PAPER = "arXiv 2405.14174"
VERSIONS = ("torch", "timm", "msv")
"""What counts depend on; the commit stays out of them, for every later one would rewrite pages that say the same."""


@dataclass(frozen=True)
class Table1Row:
    """A system with what was found here.

    Attributes:
        system: with the paper's row.
        params: parameters with 1000 classes; None where there is no such network here.
        gflops: FLOPs in 10^9 of the paper's convention at 1x3x224x224.
        evaluation: its row in `accuracy.csv`, if its weights were evaluated here.
    """

    system: System
    params: int | None
    gflops: float | None
    evaluation: Row | None

    @property
    def top1(self) -> float | None:
        """Top-1 accuracy measured here, in percent."""
        return None if self.evaluation is None else number(self.evaluation, "top1")


def table_1(folder: Path | None = None, takes: Filter = every) -> list[Table1Row]:
    """The systems of Table 1, counted here, and with the accuracies that a folder keeps.

    Args:
        folder: where `accuracy.csv` lies, if it does.
        takes: which of its rows are taken.

    Raises:
        ValueError: that file is damaged.
    """
    kept = {row["model"]: row for row in accuracy.store(folder).read() if takes(row)} if folder else {}
    rows = []
    for system in SYSTEMS:
        if not system.in_table_1:
            continue
        if system.key is None:
            rows.append(Table1Row(system, None, None, None))
            continue
        found = counts(system.key)
        rows.append(Table1Row(system, found.params, found.flops_fvcore / 1e9, kept.get(system.key)))
    return rows


def render_csv(rows: Sequence[Table1Row], where: Mapping[str, str]) -> str:
    """Params in 10^6, FLOPs in 10^9, accuracies in percent; what is the paper's is in columns named so."""
    lines = []
    for row in rows:
        paper, evaluation = row.system.paper, row.evaluation or {}
        lines.append(
            {
                "system": row.system.name,
                "source": row.system.source,
                "model": row.system.key or "",
                "params_m": "" if row.params is None else f"{row.params / 1e6:.3f}",
                "gflops_fvcore": "" if row.gflops is None else f"{row.gflops:.3f}",
                "top1": "" if row.top1 is None else f"{row.top1:.2f}",
                "top1_images": evaluation.get("images", ""),
                "paper_params_m": f"{paper.params_m:g}" if paper else "",
                "paper_gflops": f"{paper.gflops:.1f}" if paper else "",
                "paper_top1": f"{paper.top1:.1f}" if paper else "",
                "note": row.system.note,
                **{name: where[name] if row.params is not None else "" for name in VERSIONS},
            }
        )
    return as_csv(lines)


def render_markdown(rows: Sequence[Table1Row], where: Mapping[str, str]) -> str:
    """The page: head, table, notes, and where accuracies were measured."""
    versions = ", ".join(f"{name} {where[name]}" for name in VERSIONS if where[name])
    evaluated = [row for row in rows if row.evaluation]
    head = [
        (
            "params, GFLOPs",
            "counted here, at 1×3×224×224 with 1000 classes, from the networks themselves: those of this project and "
            f"those of timm ({versions})",
        ),
        (
            "FLOPs",
            "all in the convention of the paper's own models: a multiply-accumulate counts once, attention's matrix "
            "products too; scans 9·L·D·N and L·D, LayerNorm 5 an element, interpolation 4 an output, average pooling 1 "
            "an input; activations, gates, sums, softmax and BatchNorm (folded into its convolution) nothing. What the "
            "paper prints of the systems that are not its own was counted by others, who differ in such details",
        ),
        (
            "top-1, %",
            "measured here, below; empty where no weights were given"
            if evaluated
            else "measured here; none yet, since no weights were given (see below)",
        ),
        (
            "paper",
            f"printed in Table 1 of {PAPER}: ImageNet-1K; of all but MSVMamba the paper cites others",
        ),
        ("not in this project", "neither this project nor timm has the network: the paper's numbers stand alone"),
    ]
    titles = ["system", "network here", "params, M", "GFLOPs", "top-1, %"]
    titles += ["*paper: params, M*", "*paper: GFLOPs*", "*paper: top-1, %*"]
    lines: list[list[str]] = []
    notes: list[str] = []
    for row in rows:
        name, paper = row.system.name, row.system.paper
        if row.system.note:
            notes.append(f"{len(notes) + 1}. {name}: {row.system.note}.")
            name += f" ({len(notes)})"
        network = f"`{row.system.key}` ({row.system.source})" if row.system.key else row.system.source
        lines.append(
            [
                name,
                network,
                fixed(None if row.params is None else row.params / 1e6, 3),
                fixed(row.gflops, 3),
                fixed(row.top1, 2),
                f"*{paper.params_m:g}*" if paper else NONE,
                f"*{paper.gflops:.1f}*" if paper else NONE,
                f"*{paper.top1:.1f}*" if paper else NONE,
            ]
        )
    return page(
        "Table 1: the systems compared on ImageNet-1K",
        head,
        pipe_table(titles, lines, 2),
        "Notes:\n\n" + "\n".join(notes),
        _evaluated(evaluated),
        f"Made by\n\n```\n{COMMAND}\n```\n\nand with the accuracies of weights at hand by\n\n"
        f"```\n{COMMAND} --weights DIR --data-root DIR\n```\n\n"
        "`fig_1.png` shows these accuracies against FLOPs.",
    )


def _evaluated(rows: Sequence[Table1Row]) -> str:
    if not rows:
        return ""
    lines = []
    for row in rows:
        kept = row.evaluation or {}
        images = int(kept["images"])
        short = "" if images == accuracy.VAL_IMAGES else f" of {accuracy.VAL_IMAGES:,}"
        lines.append(
            [
                f"`{kept['model']}`",
                f"{kept['file']} ({kept['sha256']})",
                f"{kept['image_size']} px, crop {kept['crop_pct']}, {kept['interpolation']}, {kept['precision']}",
                told_place(kept),
                kept["commit"] or "unknown",
                f"{images:,}{short}",
                fixed(row.top1, 2),
            ]
        )
    titles = ["network", "weights (sha256)", "images as", "machine", "commit", "images", "top-1, %"]
    return "## Accuracies measured here\n\nOf the images in `val/`.\n\n" + pipe_table(titles, lines, 5)
