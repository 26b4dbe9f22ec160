"""Table 6: throughput in inference, beside the paper's, from the rows that were measured and kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from msv.ablation.markdown import NONE, fixed, pipe_table
from msv.ablation.paper import TABLE_6
from msv.kept import ENVIRONMENT, FAILED, Filter, Row, every, number, place
from msv.profiling.steps import PRECISIONS

from . import throughput
from .pages import as_csv, page, told_place
from .systems import MODELS, REFERENCE, order


@dataclass(frozen=True)
class Table6Row:
    """A kept row, and what it says beside others of the same place.

    Attributes:
        kept: its row.
        ratio: images a second in multiples of VMamba-Tiny's, of the same precision, mode, batch, size and place; None
            where that was not measured.
    """

    kept: Row
    ratio: float | None

    @property
    def images_per_s(self) -> float | None:
        """Measured images a second."""
        return number(self.kept, "images_per_s")

    @property
    def peak_mib(self) -> float | None:
        """The most memory of tensors alive at once, weights and images included, in MiB."""
        found = number(self.kept, "peak_bytes")
        return None if found is None else found / 2**20

    @property
    def paper(self) -> float | None:
        """Images a second that the paper prints for the model."""
        return TABLE_6.get(self.kept["model"])

    @property
    def paper_ratio(self) -> float | None:
        """The paper's images a second in multiples of its VMamba-Tiny."""
        return None if self.paper is None else self.paper / TABLE_6[REFERENCE]

    @property
    def setting(self) -> tuple[str, ...]:
        """Where and how it was measured: rows of one setting may be compared."""
        return (self.kept["batch"], self.kept["size"], *place(self.kept))


def table_6(folder: Path, takes: Filter = every) -> list[Table6Row]:
    """The throughput rows that a folder keeps, by setting, in the order of `systems.order`; none measures anew.

    Args:
        folder: where the rows of whole networks lie, if they do.
        takes: which of them are taken.

    Raises:
        ValueError: a file there is damaged.
    """
    kept = throughput.kept_rows(folder, takes)
    rows = [Table6Row(row, throughput.ratio_to_reference(row, kept)) for row in kept]
    settings = list(dict.fromkeys(row.setting for row in rows))
    ways = [(p, m) for p in PRECISIONS for m in throughput.MODES]
    return sorted(
        rows,
        key=lambda row: (
            settings.index(row.setting),
            order(row.kept["model"]),
            ways.index((row.kept["precision"], row.kept["mode"])),
        ),
    )


def render_csv(rows: Sequence[Table6Row]) -> str:
    """Every row with its place; what is the paper's is in columns named so."""
    return as_csv(
        [
            {
                "system": MODELS[row.kept["model"]].name,
                **{name: row.kept[name] for name in ("model", "precision", "mode", "batch", "size", "status")},
                "images_per_s": "" if row.images_per_s is None else f"{row.images_per_s:.2f}",
                "ratio_to_vmamba_tiny": "" if row.ratio is None else f"{row.ratio:.3f}",
                "peak_mib": "" if row.peak_mib is None else f"{row.peak_mib:.1f}",
                "paper_images_per_s": "" if row.paper is None else f"{row.paper:.2f}",
                "paper_ratio_to_vmamba_tiny": "" if row.paper_ratio is None else f"{row.paper_ratio:.2f}",
                "error": row.kept["error"],
                **{name: row.kept[name] for name in ENVIRONMENT},
            }
            for row in rows
        ]
    )


def render_markdown(rows: Sequence[Table6Row]) -> str:
    """The page: head, and a table for each setting."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    head = [
        (
            "img/s",
            "measured here: images a second in inference on random images that lie on the device already, at the "
            "median time of a forward; weights and images in the precision named, the scan's states in float32 in "
            "any; on a GPU timed by its events, TF32 as torch has it by default",
        ),
        ("compiled", "by `torch.compile` with its defaults; the compilation is not timed"),
        ("peak, MiB", "measured here: the most bytes of tensors alive at once: weights, images, the forward's own"),
        (
            "× VMamba-Tiny",
            "images a second over those of `vmamba_tiny` of the same precision and mode, measured at the same place",
        ),
        (
            "paper",
            "printed in Table 6 of arXiv 2405.14174: batch 128, 224×224, one RTX 2080 Ti; it does not say in "
            "which precision. Its ratios may be compared with those here, its images a second may not",
        ),
    ]
    return page(
        "Table 6: throughput in inference", head, *(_section([r for r in rows if r.setting == s]) for s in settings)
    )


def _section(rows: Sequence[Table6Row]) -> str:
    first = rows[0].kept
    on_gpu = bool(first["cuda"])
    commands = list(dict.fromkeys(row.kept["command"] for row in rows))
    head = [
        ("Machine", told_place(first)),
        ("Commit", first["commit"] or "unknown"),
        ("Command", ", ".join(f"`{command}`" for command in commands)),
    ]
    if not on_gpu:
        head.append(("Note", "a CPU, not a GPU: its ratios say nothing about a GPU's, nor about the paper's"))
    titles = ["system", "network", "precision", "mode", "img/s", "peak, MiB", "× VMamba-Tiny"]
    titles += ["*paper: img/s*", "*paper: × VMamba-Tiny*"]
    lines = [
        [
            MODELS[row.kept["model"]].name,
            f"`{row.kept['model']}`",
            row.kept["precision"],
            row.kept["mode"],
            "failed" if row.kept["status"] == FAILED else fixed(row.images_per_s, 1),
            fixed(row.peak_mib, 0),
            fixed(row.ratio, 2),
            NONE if row.paper is None else f"*{row.paper:.2f}*",
            NONE if row.paper_ratio is None else f"*{row.paper_ratio:.2f}*",
        ]
        for row in rows
    ]
    failed = [
        f"- `{row.kept['model']}`, {row.kept['precision']}, {row.kept['mode']}: {row.kept['error']}"
        for row in rows
        if row.kept["status"] == FAILED
    ]
    parts = [
        f"## {first['device'] or 'unknown device'}, batch {first['batch']}, {first['size']}×{first['size']}",
        "\n".join(f"- **{label}**: {text}" for label, text in head),
        pipe_table(titles, lines, 4),
        "\n".join(["Failed rows:", "", *failed]) if failed else "",
    ]
    return "\n\n".join(part for part in parts if part)
