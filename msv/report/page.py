"""The whole page, from the kept records alone: the same records make the same bytes."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msv.ablation.cost import duration
from msv.ablation.markdown import NONE, describe_data, fixed
from msv.ablation.rows import Table
from msv.ablation.tables import load_table
from msv.publishing.index import MEASURED, kept_folders
from msv.report.html import Html, join, tag
from msv.report.look import SCRIPT, STYLE
from msv.report.section import Section, read_configs
from msv.report.sortable import Column, Line, Part, Value, sortable

# The page needs nothing from anywhere, and is kept from asking.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_INTRODUCTION = (
    "Each number here is computed from the records of finished runs that are kept beside the code, one record a run. "
    "Accuracy is that of the last epoch, never the best over epochs. Differences are paired by seed, with Student's "
    "95% interval; a row is said to differ only where that survives Holm's correction over its table. The paper is "
    "arXiv 2405.14174, Multi-Scale VMamba; what it printed stands in columns of its own, of other data than ours "
    "unless a table's data says the same."
)


def render_report(results: Path) -> str:
    """The page of all that is published in a results folder.

    Raises:
        FileNotFoundError: nothing is.
        ValueError: a record, a grid file or a config is damaged.
        OSError: one cannot be read.
    """
    folders = kept_folders(results)
    if not folders:
        raise FileNotFoundError(
            f"no records in {results / MEASURED}: there is nothing to report; train a grid, such as `python cli.py fit "
            "--config experiments/ablate_scans.yaml`, then `python cli.py keep`"
        )
    sections = []
    for folder in folders:
        table = load_table(folder)
        sections.append(Section(folder, table, read_configs(folder, table)))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", "msv: what was measured"),
        tag("style", Html(STYLE)),
    )
    body = tag(
        "body",
        tag("h1", "What was measured"),
        tag("p", _INTRODUCTION, class_="soft"),
        _overview(sections),
        *(section.render() for section in sections),
        tag("footer", "Made by ", tag("code", "python cli.py report"), f" from {_counted(sections)}."),
        tag("script", Html(SCRIPT)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _overview(sections: Sequence[Section]) -> Html:
    columns = [
        Column("grid", words=True),
        Column("recipe", words=True),
        Column("data", words=True),
        Column("cells"),
        Column("runs", hint="finished"),
        Column("seeds", hint="of the cell that has most"),
        Column("baseline", words=True),
        Column("its top-1, %"),
        Column("rows that differ", hint="of those that could be tested, after Holm's correction"),
        Column("trained", hint="training and validation, each run counted once"),
    ]
    return sortable(columns, [Part("", [_overview_line(section) for section in sections])])


def _overview_line(section: Section) -> Line:
    table = section.table
    baseline = next((row for row in table.rows if row.cell == table.baseline), None)
    tested = [row for row in table.rows if row.differs is not None]
    differ = sum(bool(row.differs) for row in tested)
    seconds = _seconds(table.finished)
    seeds = max((row.n for row in table.rows), default=0)
    top1 = baseline.top1_mean if baseline else None
    return Line(
        [
            Value(tag("a", table.name, href=f"#{section.anchor}"), table.name),
            Value(table.recipe),
            Value(", ".join(dict.fromkeys(describe_data(record).partition(";")[0] for record in table.finished))),
            Value(str(len(table.rows)), len(table.rows)),
            Value(_done(table), len(table.finished)),
            Value(str(seeds), seeds),
            Value(table.baseline or NONE),
            Value(fixed(top1, 2), top1),
            Value(f"{differ} of {len(tested)}" if tested else NONE, differ if tested else None),
            Value(duration(seconds) if seconds else NONE, seconds or None),
        ]
    )


def _done(table: Table) -> str:
    every = sum(len(runs) for runs in table.records.values())
    return str(every) if every == len(table.finished) else f"{len(table.finished)} of {every}"


def _seconds(records: Sequence[Any]) -> float:
    """What runs took together; one that several grids have was trained once."""
    timing = {
        (record["recipe"], record["config_hash"], (record.get("timing") or {}).get("started")): (
            (record.get("timing") or {}).get("train_seconds") or 0.0
        )
        for record in records
    }
    return math.fsum(timing.values())


def _counted(sections: Sequence[Section]) -> Html:
    records = [record for section in sections for record in section.table.finished]
    spent = _seconds(records)
    took = f", {duration(spent)} of training in all" if spent else ""
    return join(f"{len(records)} records in {len(sections)} {'grid' if len(sections) == 1 else 'grids'}{took}")
