"""What the comparison's tables have in common: a page with a head, a CSV, their command."""

import csv
import io
from collections.abc import Mapping, Sequence

from msv.ablation.markdown import machine
from msv.kept import ENVIRONMENT

COMMAND = "python cli.py compare"


def page(title: str, head: Sequence[tuple[str, str]], *parts: str) -> str:
    """A Markdown page: a title, what its numbers are, and parts, of which empty ones are left out."""
    told = "\n".join(f"- **{label}**: {text}" for label, text in head)
    return "\n\n".join(part for part in (f"# {title}", told, *parts) if part) + "\n"


def place_section(rows: Sequence[Mapping[str, str]], table: str, **lists: Sequence[str]) -> str:
    """What was measured in one place: where, and by which commands; a table, and lists under their titles.

    Args:
        rows: kept ones, all of that place.
        table: what it says of them.
        lists: by title, with `_` for a space; empty ones are left out.
    """
    first = rows[0]
    commands = dict.fromkeys(f"`{row['command']}`" for row in rows)
    commit = first["commit"] or "unknown"
    head = [("Machine", told_place(first)), ("Commit", commit), ("Command", ", ".join(commands))]
    parts = [
        f"## {first['device'] or 'unknown device'}, commit {commit}",
        "\n".join(f"- **{label}**: {text}" for label, text in head),
        table,
        *(
            "\n".join([f"{title.replace('_', ' ')}:", "", *(f"- {line}" for line in listed)])
            for title, listed in lists.items()
            if listed
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def told_place(row: Mapping[str, str]) -> str:
    """Where a kept row was measured, in words; its commit is told apart."""
    found: dict[str, str | int] = {name: row[name] for name in ENVIRONMENT if row[name]}
    if row["threads"].isdecimal():
        found["threads"] = int(row["threads"])
    return machine(found)


def as_csv(lines: Sequence[Mapping[str, str]]) -> str:
    """Lines that all have the same columns, as CSV."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(lines[0]) if lines else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()
