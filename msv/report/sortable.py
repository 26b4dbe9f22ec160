"""Tables whose rows a reader sorts by a click on a column's head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from msv.report.html import Html, join, marked, tag


@dataclass(frozen=True)
class Column:
    """A column.

    Args:
        title: its head.
        words: whether it holds words, which stand to the left; others hold numbers.
        over: a head that it shares with its neighbours, "" for none.
        style: class of its cells.
        hint: what the head says when pointed at.
    """

    title: str
    words: bool = False
    over: str = ""
    style: str = ""
    hint: str = ""


@dataclass(frozen=True)
class Value:
    """A cell.

    Args:
        shown: text or markup.
        key: what it is sorted by; by default the text that is shown, of numbers nothing, which is last.
        style: class of this cell alone.
    """

    shown: str
    key: float | str | None = None
    style: str = ""


@dataclass(frozen=True)
class Line:
    """A row; the first of its values names it."""

    values: Sequence[Value]
    style: str = ""


@dataclass(frozen=True)
class Part:
    """Rows that stand together, and are sorted among themselves."""

    title: str
    lines: Sequence[Line] = field(default_factory=list)


def sortable(columns: Sequence[Column], parts: Sequence[Part]) -> Html:
    """A table of some parts."""
    heads = [tag("tr", *(_head(column) for column in columns))]
    if any(column.over for column in columns):
        heads.insert(0, tag("tr", *_over(columns), class_="over"))
    bodies = [tag("tbody", *_part(columns, part)) for part in parts]
    return tag("div", tag("table", tag("thead", *heads), *bodies, class_="sorts"), class_="scroll", tabindex=0)


def lines_of(mapping: Mapping[str, str]) -> Html:
    """Labels with what they say, both lines of Markdown."""
    return tag("dl", *(join(tag("dt", marked(label)), tag("dd", marked(text))) for label, text in mapping.items()))


def _head(column: Column) -> Html:
    classes = " ".join(filter(None, ["word" if column.words else "", column.style]))
    kind = "word" if column.words else "number"
    button = tag("button", column.title, type="button", title=column.hint or f"sort by {column.title}")
    return tag("th", button, class_=classes or None, data_kind=kind, scope="col")


def _over(columns: Sequence[Column]) -> list[Html]:
    return [
        tag("th", title, colspan=len(list(members)), scope="colgroup" if title else None)
        for title, members in groupby(column.over for column in columns)
    ]


def _part(columns: Sequence[Column], part: Part) -> list[Html]:
    rows = []
    if part.title:
        head = tag("th", part.title, colspan=len(columns), scope="rowgroup")
        rows.append(tag("tr", head, class_="part"))
    for line in part.lines:
        cells = []
        for number, (column, value) in enumerate(zip(columns, line.values, strict=True)):
            classes = " ".join(filter(None, ["word" if column.words else "", column.style, value.style]))
            key = value.key if value.key is not None else (None if column.words else "")
            name = "th" if number == 0 else "td"
            scope = "row" if number == 0 else None
            cells.append(tag(name, value.shown, class_=classes or None, data_key=key, scope=scope))
        rows.append(tag("tr", *cells, class_=line.style or None))
    return rows
