"""All that is published, made again from what is kept: tables, counts, the comparison, and the index of them."""

from pathlib import Path

from msv import comparison
from msv.ablation.counted import write_counts
from msv.ablation.tables import make_table
from msv.files import shipped_grids
from msv.publishing.index import COMPARED, COUNTED, kept_folders, write_index


def write_all(results: Path) -> list[Path]:
    """Make every table that the published records and the counts allow, the comparison, and the index.

    Args:
        results: folder that holds ``measured/`` and what the comparison kept, and gets the rest.

    Returns:
        The files written.

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
    written += comparison.write_all(results / COMPARED)
    if problems:
        raise ValueError("; ".join(problems))
    return [*written, write_index(results)]
