"""All that is published, made again from what is kept: tables, counts, the comparison, and the index of them."""

from dataclasses import dataclass
from pathlib import Path

from msv import comparison
from msv.ablation.counted import write_counts
from msv.ablation.tables import make_table
from msv.comparison import accuracy
from msv.files import shipped_grids
from msv.kept import Row
from msv.publishing import goldens
from msv.publishing.guard import row_problem
from msv.publishing.index import COMPARED, COUNTED, kept_folders, write_index
from msv.publishing.timed import TIMED, timed_tables


@dataclass(frozen=True)
class Written:
    """What came of making all that is published.

    Args:
        files: those written.
        left_out: measured and timed rows that the tables and the index do not take, each with the reason.
    """

    files: list[Path]
    left_out: list[str]


def write_all(results: Path) -> Written:
    """Make every table that the published records and the counts allow, the comparison, and the index.

    Args:
        results: folder that holds ``measured/`` and what the comparison kept, and gets the rest.

    Returns:
        The files written, and the measured rows left out of them because they failed, or because nobody can say which
        code measured them.

    Raises:
        ValueError: a published record is damaged; all other tables are written.
        OSError: a file cannot be written.
    """
    written: list[Path] = []
    problems = []
    for folder in kept_folders(results):
        try:
            made = make_table(folder)
        except (OSError, ValueError) as error:
            problems.append(str(error))
        else:
            written += [path for path in (made.csv, made.markdown, made.plot) if path is not None]
    for file in shipped_grids():
        written += write_counts(file, results / COUNTED)
    written += comparison.write_all(results / COMPARED, results / TIMED, _may_be_published)
    written += goldens.write_page(results / COMPARED, _may_be_published)
    if problems:
        raise ValueError("; ".join(problems))
    return Written([*written, write_index(results)], _left_out(results))


def _may_be_published(row: Row) -> bool:
    return row_problem(row) is None


def _left_out(results: Path) -> list[str]:
    told = [f"{table.path}, {reason}" for table in timed_tables(results) for reason in table.left_out]
    for store in (accuracy.store(results / COMPARED), goldens.store(results / COMPARED)):
        for row in store.read():
            if problem := row_problem(row):
                told.append(f"{store.path}: {', '.join(store.identity(row))}: {problem}")
    return told
