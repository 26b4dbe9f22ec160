"""A table as Markdown: a head that says what the numbers are, the table, what failed, how to make it again."""

import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from msv.ablation.names import format_value
from msv.ablation.paper import CONFOUNDED
from msv.ablation.rows import Row, Table
from msv.ablation.statistics import CONFIDENCE

Record = Mapping[str, Any]
NONE = "–"
_SPOKEN_FOR = {
    "name",
    "train_images",
    "val_images",
    "test_images",
    "image_size",
    "num_classes",
    "in_chans",
    "note",
    "test_split",
}


def render_markdown(table: Table) -> str:
    """The whole page. The paper's numbers have columns of their own, in italics, and never a place in a mean."""
    parts = [
        f"# {table.name} · {table.recipe}",
        "\n".join(f"- **{label}**: {text}" for label, text in _head(table)),
        _body(table),
        _errors(table),
        _trained(table),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _trained(table: Table) -> str:
    """The foot: what trained the runs, here or in the grids that they are taken over from, and makes the table."""
    runs = table.finished
    elsewhere = [record for record in runs if record.get("trained_as")]
    again = f"```\n{table.command}\n```\n\nand from the records alone by `{table.again}`."
    if not elsewhere:
        return f"Trained, and made again with the records of finished runs, by\n\n{again}"
    commands = "\n".join(commands_elsewhere(elsewhere))
    ours = "Trained, and made again" if len(elsewhere) < len(runs) else "Made"
    return (
        f"{len(elsewhere)} of {len(runs)} runs are taken over from {grids_elsewhere(elsewhere)}, where they were "
        f"trained by\n\n```\n{commands}\n```\n\n{ours} with the records of finished runs, by\n\n{again}"
    )


def grids_elsewhere(records: Iterable[Record]) -> str:
    """The grids that records are taken over from."""
    return ", ".join(dict.fromkeys(str(record["trained_as"]).partition("/")[0] for record in records))


def commands_elsewhere(records: Iterable[Record]) -> list[str]:
    """What trained the records that are taken over, as they say themselves; cells and seeds of one grid in a line."""
    found: dict[str, dict[str, list[Any]]] = {}
    for record in records:
        base, only, cell_and_seed = str(record.get("command") or "").partition(" --grid.only ")
        if base:
            chosen = found.setdefault(base, {"only": [], "seeds": []})
            if only and cell_and_seed:
                chosen["only"].append(str(record["trained_as"]).rpartition("/")[2])
                chosen["seeds"].append(record["seed"])
    commands = []
    for base, chosen in found.items():
        options = {name: json.dumps(list(dict.fromkeys(values))) for name, values in chosen.items() if values}
        commands.append(base + "".join(f" --grid.{name} {shlex.quote(value)}" for name, value in options.items()))
    return commands


def _head(table: Table) -> list[tuple[str, str]]:
    every = [(cell, record) for cell, runs in table.records.items() for record in runs.values() if record is not None]
    # What the numbers stand on are the finished runs; before there is one, the others say what is under way.
    used = [(cell, record) for cell, record in every if record["status"] == "done"] or every
    not_tested = "runs end with validation (`grid.test: false`), to choose by: no number here is of the test split"
    head = [
        ("Not tested", "" if table.tested else not_tested),
        ("Data", _agreed(used, describe_data, _varies(table, "difficulty", "image_size"))),
        ("Augmentation", _agreed(used, _augmentation, _varies(table, "max_shift", "hflip"))),
        ("Schedule", _agreed(used, _schedule, _varies(table, "lr", "batch_size", "max_epochs"))),
        ("Cut short", _agreed(used, _limits) if any(map(_limits, (record for _, record in used))) else ""),
        ("Seeds", _seeds(table)),
        ("Commit", _agreed(used, lambda record: str(_section(record, "env").get("commit") or "unknown"))),
        ("Machine", _agreed(used, lambda record: machine(_section(record, "env")))),
    ]
    notes = list(dict.fromkeys(note for _, record in used if (note := _section(record, "data").get("note"))))
    head += [("Note", str(note)) for note in notes]
    head.append(("Trained in other grids", _taken_over(used)))
    head.append(("Confounded", CONFOUNDED.get(table.name, "")))
    recounted = [cell for cell in table.records if _disagree(used, cell)]
    if recounted:
        head.append(("Counts", f"the seeds of {', '.join(recounted)} disagree; those of the first finished seed stand"))
    head += [
        (
            "top-1, %",
            f"of the {table.split} split, last epoch, EMA weights, never the best over epochs; "
            "mean ± sample standard deviation over the n finished seeds",
        ),
        (
            "params, GFLOPs",
            "counted at 1×3×224×224 with 1000 classes; *as trained*: at the data's own image size, channels and "
            "classes. FLOPs in the paper's convention: a multiply-accumulate counts once",
        ),
    ]
    if _has_delta(table):
        level = f"{CONFIDENCE:.0%}"
        head += [
            (
                "Δ to the cell named beside it" if _has_own_references(table) else f"Δ to `{table.baseline}`",
                f"difference in points, paired by seed, with Student's {level} interval (none of a single seed, or "
                "where all seeds differ by the same)",
            ),
            (
                "differs",
                f"“yes” only where p < {1 - CONFIDENCE:.2g} after Holm's correction over this table's rows; “no” "
                f"means not shown, not equal; {NONE} means that nothing can be tested",
            ),
        ]
    if any(row.paper for row in table.rows):
        sources = sorted({name for row in table.rows if row.paper for name in row.paper.tables})
        head.append(
            (
                "paper",
                f"printed in {' and '.join(sources)} of arXiv 2405.14174: ImageNet-1K, 100 epochs; "
                "other data and schedule than this table's unless its head says the same",
            )
        )
    return [(label, text) for label, text in head if text]


def _body(table: Table) -> str:
    """The rows, a table for each group of them, with what its rows answer."""
    parts = []
    for title, rows in table.groups.items():
        parts += [f"## {title}"] if title else []
        parts.append(_rows(table, rows))
        answers = [f"- `{row.cell}`: {row.answers}" for row in rows if row.answers]
        parts += ["\n".join(answers)] if answers else []
    return "\n\n".join(parts)


def _rows(table: Table, rows: Sequence[Row]) -> str:
    delta, paper = _has_delta(table), any(row.paper for row in rows)
    titles = ["cell", *table.toggles, "status", "params, M", "GFLOPs", "params as trained, M", "GFLOPs as trained"]
    titles += ["top-1, %", "n"]
    titles += ["Δ to"] if _has_own_references(table) else []
    titles += ["Δ, points", "differs"] if delta else []
    titles += ["*paper: params, M*", "*paper: GFLOPs*", "*paper: top-1, % (ImageNet, 100 epochs)*"] if paper else []
    lines = []
    for row in rows:
        values = [f"{row.cell} (baseline)" if row.cell == table.baseline else row.cell]
        values += [format_value(row.toggles[name]) if name in row.toggles else NONE for name in table.toggles]
        values += [row.status, fixed(row.params_m, 3), fixed(row.gflops_fvcore, 3)]
        values += [fixed(row.params_trained_m, 3), fixed(row.gflops_trained, 4), _top1(row), str(row.n)]
        values += [row.against or NONE] if _has_own_references(table) else []
        if delta:
            values += [_delta(row), NONE if row.differs is None else "yes" if row.differs else "no"]
        if paper:
            printed = row.paper
            numbers = [(printed.params_m, 1), (printed.gflops, 2), (printed.top1, 1)] if printed else []
            values += [f"*{fixed(value, digits)}*" for value, digits in numbers] or [NONE] * 3
        lines.append(values)
    words = 2 + len(table.toggles)  # left-aligned: names and states; the rest are numbers
    return pipe_table(titles, lines, words)


def _has_delta(table: Table) -> bool:
    return any(row.against is not None for row in table.rows)


def _has_own_references(table: Table) -> bool:
    """Whether some row's difference refers to another cell than the baseline."""
    return any(row.against not in (None, table.baseline) for row in table.rows)


def pipe_table(titles: Sequence[str], lines: Sequence[Sequence[str]], words: int) -> str:
    """A pipe table that reads as well unrendered.

    Args:
        titles: of the columns.
        lines: the cells of each line.
        words: how many columns, from the left, hold words; the others hold numbers, which stand to the right.
    """
    cells = [[value.replace("|", "\\|").replace("\n", " ") for value in line] for line in (titles, *lines)]
    widths = [max(3, *(len(line[column]) for line in cells)) for column in range(len(titles))]

    def line(values: Sequence[str]) -> str:
        padded = (v.ljust(w) if i < words else v.rjust(w) for i, (v, w) in enumerate(zip(values, widths, strict=True)))
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * width if i < words else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(cells[0]), line(rule), *(line(values) for values in cells[1:])])


def _errors(table: Table) -> str:
    lines = [
        f"- `{cell}`, seed {seed}: {' '.join(str(record.get('error') or 'no error was recorded').split())} "
        f"(`{cell}/seed{seed}-{record['config_hash']}`)"
        for cell, runs in table.records.items()
        for seed, record in runs.items()
        if record is not None and record["status"] == "failed"
    ]
    return "\n".join(["Failed runs:", "", *lines]) if lines else ""


def _varies(table: Table, *options: str) -> bool:
    """Whether the grid itself varies one of some options."""
    return any(name.rpartition(".")[2] in options for name in table.toggles)


def _agreed(used: Sequence[tuple[str, Record]], describe: Callable[[Record], str], varies: bool = False) -> str:
    """What the records say of one thing; each version with its cells where they do not agree, or are not to."""
    if not used:
        return "no run has left a record yet"
    versions: dict[str, list[str]] = {}
    for cell, record in used:
        cells = versions.setdefault(describe(record), [])
        if cell not in cells:
            cells.append(cell)
    if len(versions) == 1:
        return next(iter(versions))
    told = (f"{text or NONE} ({', '.join(f'`{cell}`' for cell in cells)})" for text, cells in versions.items())
    varies = varies and sum(map(len, versions.values())) == len({cell for cell, _ in used})
    return ("by cell: " if varies else "**the records disagree**: ") + "; ".join(told)


def _section(record: Record, name: str) -> Mapping[str, Any]:
    return record.get(name) or {}


def describe_data(record: Record) -> str:
    """A record's data in a line: name, images, classes."""
    data = _section(record, "data")
    splits = [f"{data[f'{split}_images']:,} {split}" for split in ("train", "val", "test") if f"{split}_images" in data]
    size = f"{data.get('in_chans', '?')}×{data.get('image_size', '?')}×{data.get('image_size', '?')}"
    return f"{data.get('name', '?')}; {', '.join(splits)} images of {size}; {data.get('num_classes', '?')} classes"


def _augmentation(record: Record) -> str:
    settings = {key: value for key, value in _section(record, "data").items() if key not in _SPOKEN_FOR}
    nested = settings.pop("augmentation", None)
    settings |= nested if isinstance(nested, Mapping) else {}
    return ", ".join(f"{key} {format_value(value)}" for key, value in settings.items())


def _schedule(record: Record) -> str:
    schedule = {key: value for key, value in _section(record, "schedule").items() if key != "limits"}
    epochs, batch = schedule.pop("epochs", "?"), schedule.pop("global_batch_size", "?")
    lr, precision = schedule.pop("lr", "?"), schedule.pop("precision", "?")
    rest = "".join(f", {key} {format_value(value)}" for key, value in schedule.items())
    return f"{epochs} epochs, batch {batch}, lr {lr}, precision {precision}{rest}"


def _limits(record: Record) -> str:
    limits = _section(record, "schedule").get("limits") or {}
    return ", ".join(f"{key} {format_value(value)}" for key, value in limits.items())


def machine(environment: Mapping[str, Any]) -> str:
    """The device and the versions of `msv.provenance.environment`, in words; its commit is told apart."""
    env = {name: value for name, value in environment.items() if name != "commit"}
    device, cpu, threads = env.pop("device", None) or "unknown device", env.pop("cpu", None), env.pop("threads", None)
    device += f" on {cpu}" if cpu and cpu != device else ""
    device += f", {threads} thread{'s'[: threads != 1]}" if threads else ""
    versions = ", ".join(f"{name} {version}" for name, version in env.items() if version)
    return f"{device}; {versions}" if versions else str(device)


def _seeds(table: Table) -> str:
    versions: dict[str, list[str]] = {}
    for cell, runs in table.records.items():
        versions.setdefault(", ".join(map(str, runs)), []).append(cell)
    if len(versions) == 1:
        return next(iter(versions))
    return "; ".join(f"{seeds} ({', '.join(f'`{cell}`' for cell in cells)})" for seeds, cells in versions.items())


def _taken_over(used: Sequence[tuple[str, Record]]) -> str:
    """Cells whose runs another grid has trained, with the names they have there."""
    found = {cell: record["trained_as"] for cell, record in used if record.get("trained_as")}
    return ", ".join(f"`{cell}` as `{name}`" for cell, name in found.items())


def _disagree(used: Sequence[tuple[str, Record]], cell: str) -> bool:
    counts = [record["counts"] for name, record in used if name == cell and record.get("counts")]
    return any(other != counts[0] for other in counts)


def fixed(value: float | None, digits: int) -> str:
    """A number with so many digits, a dash for none."""
    return NONE if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def _top1(row: Row) -> str:
    if row.top1_mean is None:
        return NONE
    spread = "" if row.top1_std is None else f" ± {row.top1_std:.2f}"
    return f"{row.top1_mean:.2f}{spread}"


def _delta(row: Row) -> str:
    difference = row.difference
    if difference is None:
        return NONE
    text = _signed(difference.mean)
    if difference.low is None or difference.high is None:
        return text
    return f"{text} [{_signed(difference.low)}, {_signed(difference.high)}]"


def _signed(value: float) -> str:
    rounded = round(value, 2) + 0.0
    return f"{rounded:+.2f}" if rounded else "0.00"
