"""Writing the comparison's tables and figure from what can be counted and what was kept."""

from pathlib import Path

import torch

from msv.files import write_atomic
from msv.kept import Filter, every, here

from . import accuracy_table, architecture_table, throughput_table
from .accuracy_plot import figure_1


def write_all(out: Path, timed: Path, takes: Filter = every) -> list[Path]:
    """Writes every table that can be made without measuring anything.

    That is Table 1 (counts, and the accuracies that `out` keeps), Table 7 and Fig. 1; Table 6 where `timed` keeps rows
    of it.

    Args:
        out: folder that has, or will have, `accuracy.csv`, and gets the tables.
        timed: folder that has, or will have, the rows of whole networks (`msv.profiling.networks.store`).
        takes: which of the rows measured there the tables take.

    Returns:
        The files written.

    Raises:
        OSError: a file cannot be written.
        ValueError: a kept file is damaged.
    """
    out = Path(out)
    where = here(torch.device("cpu"))
    compared = accuracy_table.table_1(out, takes)
    architectures = architecture_table.table_7()
    speeds = throughput_table.table_6(timed, takes)
    files: dict[str, str | bytes] = {
        "table_1.md": accuracy_table.render_markdown(compared, where),
        "table_1.csv": accuracy_table.render_csv(compared, where),
        "fig_1.png": figure_1(compared),
        "table_7.md": architecture_table.render_markdown(architectures),
        "table_7.csv": architecture_table.render_csv(architectures),
    }
    if speeds:
        files["table_6.md"] = throughput_table.render_markdown(speeds)
        files["table_6.csv"] = throughput_table.render_csv(speeds)
    else:
        for name in ("table_6.md", "table_6.csv"):  # of rows that the table takes no more
            (out / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_atomic(out / name, content)
    return [out / name for name in files]
