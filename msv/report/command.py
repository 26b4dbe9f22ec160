"""`python cli.py report`: all that is published as one page, to be read anywhere or sent."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from msv.files import write_atomic
from msv.report.page import render_report

REPORT_NAME = "report.html"


def main(argv: Sequence[str]) -> int:
    """``report``: write the page.

    Args:
        argv: the arguments after the word ``report``.

    Returns:
        0: the page is written.

    Raises:
        FileNotFoundError: nothing is published.
        ValueError: a published record or config is damaged.
        OSError: the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="cli.py report",
        description="Write all that is published in <results>/measured as one HTML page that needs nothing else: "
        "tables to sort, plots, configurations and their differences, every record. The same records make the same "
        "bytes.",
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="results folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, help=f"the page (default: <results>/{REPORT_NAME})")
    arguments = parser.parse_args(argv)
    out = arguments.out or arguments.results / REPORT_NAME
    page = render_report(arguments.results)
    write_atomic(out, page)
    console = Console(soft_wrap=True, markup=False, highlight=False, emoji=False)
    console.print(f"wrote {out}, {len(page.encode()) / 1e6:.1f} MB")
    return 0
