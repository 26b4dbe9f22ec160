"""Profiles as a table on the screen, Markdown, CSV or JSON; the paper's figures stand in columns of their own.

Readers get millions and 10^9, machines every digit, so that parts add up exactly.
"""

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from msv.ablation.markdown import pipe_table
from msv.ablation.paper import Printed
from msv.ablation.subjects import GRIDS
from msv.profiling import Profile

ALIKE, OTHER, NONE = "✓", "≠", "–"
PAPER = "paper: "
"""How the titles of the paper's columns begin."""
NOTES = (
    "GFLOPs, paper's way: a multiply-accumulate is one, a scan 9·L·D·N and L·D, LayerNorm 5 an element, interpolation "
    "4 an output, average pooling 1 an input.",
    "GFLOPs, plain: a multiply-accumulate is two, as torch's counter has it, a scan 9·L·D·N and 2·L·D; nothing else.",
    "Activations: elements that convolutions, matrix products and scans put out, as in timm's tables.",
)
PAPER_NOTE = f"Paper: what arXiv 2405.14174 prints; {ALIKE} where our count rounds to it, {OTHER} where it does not."

_SOURCE = f"{PAPER}table and row"
_TITLES = {"presets": "Presets", "timm": "Models of timm"}


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        group: `presets`, `timm`, or the name of a grid.
        profile: what the model costs.
        printed: the paper's figures of the same network and image, if it prints any.
    """

    group: str
    profile: Profile
    printed: Printed | None


@dataclass(frozen=True)
class _Block:
    """A table without its form: title, names of columns, rows of text; the first column holds words."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def as_table(lines: Sequence[Line], parts: bool) -> str:
    """For a screen: a table a group, and with `parts` one a model; no name or number is broken where it is narrow."""
    # A file or a pipe has room for the table.
    screen = shutil.get_terminal_size((140, 24)).columns
    out = io.StringIO()
    for block in _blocks(lines, parts):
        table = Table(title=block.title, title_justify="left")
        least = 1
        for number, column in enumerate(block.columns):
            title = column.replace(PAPER, "paper:\n").replace(", ", ",\n", 1)
            texts = [row[number] for row in block.rows]
            if column == _SOURCE:
                texts = " ".join(texts).split()  # words, between which a line may be broken
            width = max(map(len, (*title.splitlines(), *texts)))
            table.add_column(title, justify="right" if number else "left", min_width=width)
            least += width + 3
        for row in block.rows:
            table.add_row(*row)
        Console(file=out, width=max(screen, least), highlight=False).print(table)
    Console(file=out, width=screen, highlight=False).print("\n".join(_notes(lines)))
    return out.getvalue()


def as_markdown(lines: Sequence[Line], parts: bool) -> str:
    """A page: what the numbers are, a table a group, and with `parts` one a model."""
    page = ["# Parameters and FLOPs", "\n".join(f"- {note}" for note in _notes(lines))]
    for block in _blocks(lines, parts):
        italic = [column.startswith(PAPER) for column in block.columns]
        rows = [
            [f"*{text}*" if it and text != NONE else text for it, text in zip(italic, row, strict=True)]
            for row in (block.columns, *block.rows)
        ]
        page += [f"## {block.title}", pipe_table(rows[0], rows[1:], 1)]
    return "\n\n".join(page) + "\n"


def as_csv(lines: Sequence[Line], parts: bool) -> str:
    """A row a model, `total`, and with `parts` one for each of its parts, which add up to it; no value as nothing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for number, line in enumerate(lines):
        record = _record(line)
        if not number:
            writer.writerow(record)
        writer.writerow([_plain(value) for value in record.values()])
        for part, numbers in line.profile.counts.parts.items() if parts else ():
            row = {**_setting(line), "part": part, **_counted(*numbers)}
            writer.writerow([_plain(row.get(column)) for column in record])
    return out.getvalue()


def as_json(lines: Sequence[Line], parts: bool = True) -> str:
    """An object, or a list of them where there are several models; parts always stand in it."""
    entries = []
    for line in lines:
        entry = _record(line)
        del entry["part"]
        entry["parts"] = {part: _counted(*numbers) for part, numbers in line.profile.counts.parts.items()}
        entries.append(entry)
    return json.dumps(entries[0] if len(entries) == 1 else entries, indent=2, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Sequence[Line], bool], str]] = {
    "table": as_table,
    "csv": as_csv,
    "markdown": as_markdown,
    "json": as_json,
}


def _blocks(lines: Sequence[Line], parts: bool) -> Iterator[_Block]:
    for group, found in groupby(lines, lambda line: line.group):
        title = f"{GRIDS[group]}: the rows of {group}" if group in GRIDS else _TITLES.get(group, group)
        rows = [_shown(line) for line in found]
        # A column without a value in any row says nothing.
        columns = [name for name in rows[0] if any(row[name] != NONE for row in rows)]
        yield _Block(title, columns, [[row[name] for name in columns] for row in rows])
    for line in lines if parts else ():
        parted = [
            [part, f"{params:,}", _giga(fvcore), _giga(plain)]
            for part, (params, fvcore, plain) in line.profile.counts.parts.items()
            if params or fvcore or plain
        ]
        columns = ["part", "params", "GFLOPs, paper's way", "GFLOPs, plain"]
        yield _Block(f"{line.profile.name} ({line.group}) by part", columns, parted)


def _shown(line: Line) -> dict[str, str]:
    counts, memory, printed = line.profile.counts, line.profile.memory, line.printed
    return {
        "model": line.profile.name,
        "params": f"{counts.params:,}",
        f"{PAPER}params, M": _marked(printed.params_m, printed.params_alike(counts.params)) if printed else NONE,
        "GFLOPs, paper's way": _giga(counts.flops_fvcore),
        f"{PAPER}GFLOPs": _marked(printed.gflops, printed.flops_alike(counts.flops_fvcore)) if printed else NONE,
        "GFLOPs, plain": _giga(counts.flops),
        "activations, M": f"{counts.activations / 1e6:.2f}",
        "training memory, MiB": f"{memory.nbytes / 2**20:,.0f}" if memory else NONE,
        _SOURCE: printed.source if printed else NONE,
    }


def _notes(lines: Sequence[Line]) -> list[str]:
    profile, memory = lines[0].profile, lines[0].profile.memory
    channels, (height, width) = profile.in_chans, profile.size
    notes = [f"Counted for one image of {channels}×{height}×{width}, {profile.num_classes} classes.", *NOTES]
    if memory is not None:
        images = "one image" if memory.batch_size == 1 else f"{memory.batch_size} images"
        notes.append(
            f"Training memory: peak of a forward and backward pass of {images} in float32 on "
            f"{memory.device}: weights, gradients and what is kept between; no optimizer."
        )
    if any(line.printed for line in lines):
        notes.append(PAPER_NOTE)
    explained = {line.profile.name: line.printed.note for line in lines if line.printed and line.printed.note}
    return [*notes, *(f"{name}: {note}." for name, note in explained.items())]


def _setting(line: Line) -> dict[str, Any]:
    profile = line.profile
    return {
        "group": line.group,
        "model": profile.name,
        "in_chans": profile.in_chans,
        "height": profile.size[0],
        "width": profile.size[1],
        "num_classes": profile.num_classes,
    }


def _record(line: Line) -> dict[str, Any]:
    counts, memory, printed = line.profile.counts, line.profile.memory, line.printed
    return {
        **_setting(line),
        "part": "total",
        **_counted(counts.params, counts.flops_fvcore, counts.flops),
        "activations": counts.activations,
        "memory_bytes": memory.nbytes if memory else None,
        "memory_batch_size": memory.batch_size if memory else None,
        "memory_device": memory.device if memory else None,
        "paper_params_m": printed.params_m if printed else None,
        "paper_params_alike": printed.params_alike(counts.params) if printed else None,
        "paper_gflops": printed.gflops if printed else None,
        "paper_gflops_alike": printed.flops_alike(counts.flops_fvcore) if printed else None,
        "paper_source": printed.source if printed else None,
    }


def _counted(params: int, fvcore: int, plain: int) -> dict[str, int | float]:
    return {"params": params, "gflops_fvcore": fvcore / 1e9, "gflops": plain / 1e9}


def _plain(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.9f}" if isinstance(value, float) else str(value)


def _giga(flops: int) -> str:
    return f"{flops / 1e9:.3f}"


def _marked(text: str, alike: bool) -> str:
    return f"{text} {ALIKE if alike else OTHER}"
