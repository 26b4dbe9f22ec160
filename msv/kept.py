"""What was measured, kept as CSV: a row a measurement, with where it was made, written whole as soon as it is done."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from msv.files import write_atomic
from msv.provenance import environment

Row = dict[str, str]
Filter = Callable[[Row], bool]
"""Which kept rows a table takes."""
ENVIRONMENT = ("device", "cpu", "threads", "torch", "cuda", "triton", "timm", "msv", "python", "commit")
"""Columns that say where a row was measured: rows that agree in them may be compared, and need not be made again."""
MACHINE = ("device", "threads")
"""Those of them that tell a table's rows apart, of which it keeps the latest; threads on a CPU alone."""
DONE, FAILED = "done", "failed"
"""What a column `status` says, where there is one; empty, in rows from before there was, is done."""


@dataclass(frozen=True)
class Kept:
    """A CSV of measurements.

    Attributes:
        path: the file.
        columns: of a measurement, before those of `ENVIRONMENT`.
        key: columns that tell measurements apart; a new one takes the place of the old one with the same key.
            `threads` counts where there is no GPU.
    """

    path: Path
    columns: Sequence[str]
    key: Sequence[str]

    def read(self) -> list[Row]:
        """The rows there are; none where there is no file. Columns that it lacks, being older, are empty.

        Raises:
            ValueError: the file is none of these, or is cut short.
        """
        if not self.path.is_file():
            return []
        names = [*self.columns, *ENVIRONMENT]
        try:
            with self.path.open(encoding="utf-8", newline="") as file:
                reader = csv.DictReader(file, strict=True)
                found = list(reader.fieldnames or ())
                rows = list(reader)
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{self.path} is no CSV ({error}); move it aside and measure again") from error
        required = set(self.key) - set(ENVIRONMENT)
        if not required <= set(found) <= set(names):
            raise ValueError(
                f"{self.path} has the columns {', '.join(found) or 'of an empty file'}; "
                f"expected {', '.join(names)}: move it aside and measure again"
            )
        for number, row in enumerate(rows, start=2):
            if None in row or None in row.values():
                raise ValueError(f"{self.path}, row {number}: expected {len(found)} values; mend or remove the row")
        return [{name: row.get(name, "") for name in names} for row in rows]

    def put(self, measured: Mapping[str, object], where: Mapping[str, str]) -> Row:
        """Keep a measurement made at `where`, in the place of an older one of the same; returns its row.

        One that is not done takes no place of one that is done and was made at `where`, too: that one stays.

        Raises:
            OSError: the file cannot be written.
            ValueError: the file there is none of these.
        """
        row = {name: _text(measured.get(name)) for name in self.columns} | {name: where[name] for name in ENVIRONMENT}
        rows = self.read()
        same = [number for number, old in enumerate(rows) if self.identity(old) == self.identity(row)]
        if not same:
            rows.append(row)
        elif is_done(row) or not is_done(rows[same[0]]) or place(row) != place(rows[same[0]]):
            rows[same[0]] = row
        out = io.StringIO()
        writer = csv.DictWriter(out, [*self.columns, *ENVIRONMENT], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path, out.getvalue())
        return row

    def identity(self, row: Mapping[str, str]) -> tuple[str, ...]:
        """What tells a row apart."""
        return tuple(row[name] for name in self.key if name != "threads" or not row["cuda"])


def here(device: torch.device) -> dict[str, str]:
    """Where a measurement on `device` is made, as the columns of `ENVIRONMENT`."""
    found = {**environment("cuda" if device.type == "cuda" else "cpu"), "cuda": None}
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    return {name: _text(found[name]) for name in ENVIRONMENT}


def is_done(row: Mapping[str, str]) -> bool:
    """Whether a row has what was to be measured."""
    return row.get("status") in (None, "", DONE)


def place(row: Mapping[str, str]) -> tuple[str, ...]:
    """Where a row was measured."""
    return tuple(row[name] for name in ENVIRONMENT)


def number(row: Mapping[str, str], column: str) -> float | None:
    """A column as a number, None where it is empty.

    Raises:
        ValueError: it is neither.
    """
    text = row[column]
    try:
        return float(text) if text else None
    except ValueError as error:
        raise ValueError(f"{column} is {text!r} in a kept row; expected a number: mend or remove the row") from error


def every(row: Row) -> bool:
    """The `Filter` that takes all rows."""
    return True


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
