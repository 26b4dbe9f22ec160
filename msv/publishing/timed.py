"""The timed tables of ``results/benchmarks/``, as far as they may be published."""

import csv
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from msv.kept import FAILED
from msv.publishing.guard import commit_problem

TIMED = "benchmarks"
# Dry runs and parts of a table have further words in their names.
_WHOLE_TABLE = re.compile(r"([a-z]+)_(cpu|cuda)")


@dataclass(frozen=True)
class TimedTable:
    """What ``benchmark NAME`` has left on one kind of device.

    Args:
        path: of the CSV.
        benchmark: the name.
        rows: those that are finished, of a clean commit of this history.
        left_out: why each of the others is not among them.
    """

    path: Path
    benchmark: str
    rows: list[dict[str, str]]
    left_out: list[str]

    @property
    def commands(self) -> list[str]:
        """What timed the rows, as they say themselves where they do."""
        return list(
            dict.fromkeys(row.get("command") or f"python cli.py benchmark {self.benchmark}" for row in self.rows)
        )

    @property
    def page(self) -> Path | None:
        """The table as Markdown, where there is one."""
        return self._beside(".md")

    @property
    def plot(self) -> Path | None:
        """Its figure, where there is one."""
        return self._beside(".png")

    def _beside(self, suffix: str) -> Path | None:
        path = self.path.with_suffix(suffix)
        return path if path.is_file() else None


def timed_tables(results: Path) -> list[TimedTable]:
    """The whole tables that benchmarks have left in a results folder, in the order of their names."""
    of_commit = cache(lambda commit: commit_problem(commit, "measure"))  # git is asked once for each
    tables = []
    for path in sorted((results / TIMED).glob("*.csv")):
        found = _WHOLE_TABLE.fullmatch(path.stem)
        if not found:
            continue
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        problems = [_failure(row) or of_commit(row.get("commit")) for row in rows]
        tables.append(
            TimedTable(
                path,
                found[1],
                [row for row, problem in zip(rows, problems, strict=True) if problem is None],
                [f"row {number}: {problem}" for number, problem in enumerate(problems, start=2) if problem],
            )
        )
    return tables


def _failure(row: dict[str, str]) -> str | None:
    failed = row.get("status") == FAILED or row.get("error")
    return f"it failed: {row.get('error') or 'without a word'}" if failed else None
