"""The part of the page that one grid has: its table, its plots, its configs, its runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from msv.ablation.cell import CONFIG_NAME
from msv.ablation.cost import duration
from msv.ablation.curves import plot_curves
from msv.ablation.grid import run_folder
from msv.ablation.markdown import NONE, commands_elsewhere, delta_text, fixed, machine, table_head, top1_text
from msv.ablation.names import format_value
from msv.ablation.plots import plot_accuracy
from msv.ablation.records import judged_by
from msv.ablation.rows import Row, Table
from msv.report.differences import ABSENT, differences, short_names
from msv.report.html import Html, join, picture, tag
from msv.report.sortable import Column, Line, Part, Value, lines_of, sortable

PAPER = "the paper, ImageNet-1K"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """A grid under one recipe.

    Args:
        folder: ``<measured>/<recipe>/<grid>``.
        table: its table.
        configs: cell -> config and its text, of a finished run.
    """

    folder: Path
    table: Table
    configs: Mapping[str, tuple[dict[str, Any], str]]

    @property
    def anchor(self) -> str:
        """The id of its heading."""
        return f"{self.table.recipe}/{self.table.name}"

    def render(self) -> Html:
        """All of it."""
        table = self.table
        return join(
            tag("h2", table.name, tag("span", f" · {table.recipe}", class_="soft"), id=self.anchor),
            _results(table),
            _answers(table),
            _plot("points", plot_accuracy(table, "svg"), *_ACCURACY, table),
            _plot("curves", plot_curves(table, "svg"), *_CURVES, table),
            tag("h3", "What the numbers are"),
            lines_of(dict(table_head(table))),
            tag("h3", "Configurations"),
            _configs(table, self.configs),
            tag("h3", "Runs"),
            _runs(table),
            tag("h3", "Trained by"),
            tag("pre", "\n".join(_commands(table))),
        )


_ACCURACY = (
    "Top-1 accuracy of each cell against its FLOPs",
    "Accuracy of the last epoch against the cost of one image as trained; the paper's numbers are not in it, they are "
    "of other data.",
)
_CURVES = (
    "Training loss and validation accuracy of each cell over the epochs",
    "Training loss and validation accuracy, by epoch. The first tenth of the epochs may lie outside the axes.",
)


def read_configs(folder: Path, table: Table) -> dict[str, tuple[dict[str, Any], str]]:
    """The config of the first finished run of each cell that has one, and its text.

    Raises:
        ValueError: a config cannot be read as YAML.
        OSError: it cannot be read at all.
    """
    found = {}
    for cell, runs in table.records.items():
        for seed, record in runs.items():
            if record is None or record["status"] != "done":
                continue
            path = run_folder(folder, cell, seed, record["config_hash"]) / CONFIG_NAME
            try:
                text = path.read_text(encoding="utf-8")
                config = yaml.safe_load(text)
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ValueError(f"{path} is damaged; put the run's config back, or keep the run again") from error
            if not isinstance(config, dict):
                raise ValueError(f"{path} holds no config; put the run's config back, or keep the run again")
            found[cell] = config, text
            break
    return found


def _results(table: Table) -> Html:
    delta, paper = any(row.against for row in table.rows), any(row.paper for row in table.rows)
    own = any(row.against not in (None, table.baseline) for row in table.rows)
    columns = [Column("cell", words=True), *(Column(name, words=True) for name in table.toggles)]
    columns += [
        Column(f"{table.split} top-1, %", hint="last epoch, EMA; mean ± standard deviation over the seeds"),
        Column("n", hint="finished seeds"),
    ]
    if delta:
        over = "difference" + ("" if own else f" to {table.baseline}") + ", points"
        columns += [Column("to", words=True, over=over)] if own else []
        columns += [
            Column("Δ with 95% interval", over=over, hint="paired by seed; Student's t"),
            Column("", words=True, over=over, hint="drawn: the line is zero"),
            Column("p (Holm)", over=over, hint="corrected over the rows of this table"),
            Column("differs", words=True, over=over, hint="p below 0.05 after the correction"),
        ]
    columns += [
        Column("params, M", hint="at the data's own channels and classes", over="as trained"),
        Column("GFLOPs", hint="at the data's own image size", over="as trained"),
        Column("params, M", hint="with 1000 classes", over="at 224×224"),
        Column("GFLOPs", hint="a multiply-accumulate counts once", over="at 224×224"),
    ]
    if paper:
        columns += [Column(name, over=PAPER, style="paper") for name in ("params, M", "GFLOPs", "top-1, %")]
    reach = max((abs(end) for row in table.rows for end in _ends(row)), default=0.0)
    parts = [
        Part(title, [Line(_values(table, row, delta, own, paper, reach), _style(table, row)) for row in rows])
        for title, rows in table.groups.items()
    ]
    return sortable(columns, parts)


def _values(table: Table, row: Row, delta: bool, own: bool, paper: bool, reach: float) -> list[Value]:
    name = f"{row.cell} (baseline)" if row.cell == table.baseline else row.cell
    values = [Value(name if row.status == "done" else f"{name}: {row.status}")]
    values += [Value(format_value(row.toggles[key]) if key in row.toggles else NONE) for key in table.toggles]
    values += [Value(top1_text(row), row.top1_mean), Value(str(row.n), row.n)]
    if delta:
        difference = row.difference
        values += [Value(row.against or NONE)] if own else []
        values += [
            Value(delta_text(row), difference.mean if difference else None),
            Value(_bar(row, reach)),
            Value(fixed(row.p_holm, 4), row.p_holm),
            Value(NONE if row.differs is None else "yes" if row.differs else "no", style="yes" if row.differs else ""),
        ]
    trained, counted = (row.params_trained_m, row.gflops_trained), (row.params_m, row.gflops_fvcore)
    for number, digits in zip((*trained, *counted), (3, 4, 3, 3), strict=True):
        values.append(Value(fixed(number, digits), number))
    if paper:
        printed = row.paper
        numbers = [(printed.params_m, 1), (printed.gflops, 2), (printed.top1, 1)] if printed else [(None, 0)] * 3
        values += [Value(fixed(number, digits), number) for number, digits in numbers]
    return values


def _style(table: Table, row: Row) -> str:
    return "baseline" if row.cell == table.baseline else ""


def _ends(row: Row) -> list[float]:
    difference = row.difference
    if difference is None:
        return []
    return [end for end in (difference.low, difference.mean, difference.high) if end is not None]


def _bar(row: Row, reach: float) -> Html:
    """A difference and its interval on the scale that all rows of a table share."""
    difference = row.difference
    if difference is None:
        return Html("")

    def place(points: float) -> str:
        return f"{70 + (60 * points / reach if reach else 0.0):.1f}"

    colour = "#0b5cad" if row.differs else "#7b8594"
    parts = [tag("line", x1=70, x2=70, y1=1, y2=17, stroke="#c9ced6")]
    if difference.low is not None and difference.high is not None:
        ends = {"x1": place(difference.low), "x2": place(difference.high)}
        parts.append(tag("line", **ends, y1=9, y2=9, stroke=colour, stroke_width=1.5))
    parts.append(tag("circle", cx=place(difference.mean), cy=9, r=3, fill=colour))
    return tag("svg", *parts, class_="bar", viewBox="0 0 140 18", role="img", aria_label=delta_text(row))


def _answers(table: Table) -> Html | None:
    told = [row for row in table.rows if row.answers]
    if not told:
        return None
    lines = [tag("li", tag("code", row.cell), f" {row.answers}") for row in told]
    return tag("details", tag("summary", "What the rows answer"), tag("ul", *lines, class_="answers"))


def _plot(kind: str, svg: bytes | None, alt: str, caption: str, table: Table) -> Html | None:
    if svg is None:
        return None
    image = picture(svg, f"{alt}: {table.name}, {table.recipe}")
    return tag("figure", tag("div", image, class_="plot", tabindex=0), tag("figcaption", caption), class_=kind)


def _configs(table: Table, configs: Mapping[str, tuple[dict[str, Any], str]]) -> Html:
    if not configs:
        return tag("p", "No finished run has left one.", class_="soft")
    first = table.baseline if table.baseline is not None and table.baseline in configs else next(iter(configs))
    found = differences({cell: config for cell, (config, _) in configs.items()})
    whole = tag(
        "details", tag("summary", f"The whole configuration of {first}"), tag("pre", configs[first][1].rstrip("\n"))
    )
    if not found:
        return join(tag("p", "All cells have the same one."), whole)
    names = short_names(found)
    columns = [Column("cell", words=True), *(Column(names[key], words=True, hint=key) for key in found)]
    lines = [
        Line(
            [Value(f"{cell} (baseline)" if cell == table.baseline else cell)]
            + [
                Value(_setting(row[cell]), style="same" if _setting(row[cell]) == _setting(row[first]) else "other")
                for row in found.values()
            ],
            "",
        )
        for cell in configs
    ]
    told = f"What tells them apart; grey is as in {first}. All else is the same, but for the seed."
    return join(tag("p", told, class_="soft"), sortable(columns, [Part("", lines)]), whole)


def _setting(value: Any) -> str:
    return NONE if value is ABSENT else format_value(value)


def _runs(table: Table) -> Html:
    columns = [
        Column("cell", words=True),
        Column("seed"),
        Column("config", words=True, hint="hash of the configuration"),
        Column("status", words=True),
        Column(f"{table.split} top-1, %"),
        Column("raw, %", hint="of the weights themselves, without averaging"),
        Column("last val top-1, %"),
        Column("train loss", hint="of the last epoch"),
        Column("epochs"),
        Column("trained", hint="training and validation"),
        Column("images/s", hint="median over the epochs"),
        Column("side by side", hint="runs that shared the device"),
        Column("device", words=True),
        Column("torch", words=True),
        Column("triton", words=True),
        Column("commit", words=True),
        Column("finished", words=True, hint="UTC"),
        Column("taken over from", words=True, hint="another grid, which trained the same configuration"),
    ]
    lines = [
        _run(cell, seed, record)
        for cell, runs in table.records.items()
        for seed, record in runs.items()
        if record is not None
    ]
    machines = list(dict.fromkeys(machine(record.get("env") or {}) for record in table.finished))
    return join(
        sortable(columns, [Part("", lines)]),
        *(tag("p", text, class_="soft") for text in machines),
        *(tag("p", f"{cell} seed {seed}: {record['error']}", class_="bad") for cell, seed, record in _failed(table)),
    )


def _failed(table: Table) -> list[tuple[str, int, Record]]:
    return [
        (cell, seed, record)
        for cell, runs in table.records.items()
        for seed, record in runs.items()
        if record is not None and record["status"] == "failed"
    ]


def _run(cell: str, seed: int, record: Record) -> Line:
    metrics, timing, env = (record.get(name) or {} for name in ("metrics", "timing", "env"))
    history = record.get("history") or []
    last = history[-1] if history else {}
    split = judged_by(record.get("tested", True))
    workers = timing.get("workers")
    seconds = timing.get("train_seconds")
    values = [
        Value(cell),
        Value(str(seed), seed),
        Value(record["config_hash"]),
        Value(record["status"], style="" if record["status"] == "done" else "bad"),
        _number(metrics.get(f"{split}_top1"), 2, 100),
        _number(metrics.get(f"{split}_top1_raw"), 2, 100),
        _number(last.get("val_top1"), 2, 100),
        _number(last.get("train_loss"), 4),
        Value(str(len(history)), len(history)),
        Value(NONE if seconds is None else duration(seconds), seconds),
        _number(timing.get("images_per_second"), 0),
        Value(NONE if workers is None else str(workers), workers),
        *(Value(str(env.get(name) or NONE)) for name in ("device", "torch", "triton")),
        Value(str(env.get("commit") or "unknown")),
        Value(str(timing.get("finished") or NONE).partition("+")[0].replace("T", " ")),
        Value(str(record.get("trained_as") or NONE)),
    ]
    return Line(values)


def _number(value: float | None, digits: int, scale: float = 1.0) -> Value:
    return Value(fixed(None if value is None else scale * value, digits), value)


def _commands(table: Table) -> Sequence[str]:
    elsewhere = [record for record in table.finished if record.get("trained_as")]
    own = [table.command] if len(elsewhere) < len(table.finished) or not elsewhere else []
    return list(dict.fromkeys([*own, *commands_elsewhere(elsewhere)]))
