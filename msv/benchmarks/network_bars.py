"""What the speed of whole networks is held to, and what was measured before of published code and of rivals."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from msv.comparison.systems import SWIN
from msv.kept import FAILED, Row, number
from msv.profiling.networks import CPU_RIVALS

BATCH, SIZE, PRECISION = "128", "224", "bf16"
"""What bars and anchors are of."""


@dataclass(frozen=True)
class Anchor:
    """Measured before on one H100 80GB HBM3, batch 128, 224×224, in fp16, and no part of any run here.

    Attributes:
        images_per_s: the least of several measurements.
        images_per_s_high: the most of them, where there were several.
        peak_gib: peak memory in training.
    """

    images_per_s: float
    images_per_s_high: float | None = None
    peak_gib: float | None = None


PUBLISHED: dict[tuple[str, str], Anchor] = {
    ("msvmamba_nano", "inference"): Anchor(2115, 3349),
    ("msvmamba_nano", "training"): Anchor(795, 1129, 8.1),
    ("msvmamba_micro", "inference"): Anchor(2213, 2312),
    ("msvmamba_micro", "training"): Anchor(909, 958, 10.7),
    ("msvmamba_tiny", "inference"): Anchor(1559),
    ("msvmamba_tiny", "training"): Anchor(525, peak_gib=20.1),
    ("vmamba_tiny", "inference"): Anchor(850),
    ("vmamba_tiny", "training"): Anchor(276, peak_gib=27.4),
}
"""The published code of our models, eager, by model and task."""

RIVALS: dict[tuple[str, str, str], Anchor] = {
    (SWIN, "inference", "eager"): Anchor(5203),
    (SWIN, "inference", "compiled"): Anchor(10413),
    (SWIN, "training", "eager"): Anchor(1833, peak_gib=9.1),
    (SWIN, "training", "compiled"): Anchor(3286),
    ("convnext_tiny", "inference", "eager"): Anchor(7337),
    ("convnext_tiny", "inference", "compiled"): Anchor(14075),
    ("convnext_tiny", "training", "eager"): Anchor(2262, peak_gib=8.1),
    ("convnext_tiny", "training", "compiled"): Anchor(3398),
}
"""timm's networks, by model, task and mode."""

SPEEDS: tuple[tuple[str, str, float | str, float | str], ...] = (
    ("msvmamba_tiny", "training", "eager", "compiled"),
    ("msvmamba_tiny", "inference", "eager", "compiled"),
    ("msvmamba_nano", "training", 5000, 9000),
    ("msvmamba_nano", "inference", 18000, 35000),
    ("vmamba_tiny", "training", 1000, 1800),
    ("vmamba_tiny", "inference", 3000, 5000),
)
"""Model, task, bar and moonshot: at least so many images a second, or as many as Swin-T in that mode."""
MEMORY_GIB = 10.0
"""Under this msvmamba_tiny trains; its moonshot is Swin-T's memory."""
CPU_MODEL, CPU_RATIO, CPU_BATCH, CPU_THREADS = "msvmamba_nano", 1.5, 8, 2
"""On a CPU: the time of the model's forward over its rival's, at most, in float32 and eager."""
_CPU_BAR = {
    **{
        "model": CPU_MODEL,
        "task": "inference",
        "mode": "eager",
        "precision": "float32",
        "rival": CPU_RIVALS[CPU_MODEL],
    },
    **{"batch": str(CPU_BATCH), "size": SIZE, "threads": str(CPU_THREADS)},
}


def anchor(row: Mapping[str, str]) -> Anchor | None:
    """What was measured before of a row's model and task; of the published code in whatever mode the row is."""
    if (row["batch"], row["size"]) != (BATCH, SIZE) or row["precision"] == "float32":
        return None
    return PUBLISHED.get((row["model"], row["task"])) or RIVALS.get((row["model"], row["task"], row["mode"]))


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for each bar and moonshot that the rows bear on: whether it is met, what was measured, what the bar is.

    Args:
        rows: of one place, so that they may be compared.
    """
    lines = [f"MISSED: {_name(row)}: not measured: {row['error']}" for row in rows if row["status"] == FAILED]
    rows = [row for row in rows if row["status"] != FAILED]
    for row in rows:
        ratio = number(row, "ratio")
        if ratio is not None and _CPU_BAR.items() <= row.items():
            measured = f"{ratio:.2f} times the time of {row['rival']} in the same turns, {row['threads']} threads"
            lines.append(_line(ratio <= CPU_RATIO, False, _name(row), measured, f"at most {CPU_RATIO:g}"))
    rows = [row for row in rows if (row["precision"], row["batch"], row["size"]) == (PRECISION, BATCH, SIZE)]
    for model, task, bar, moonshot in SPEEDS:
        ours = [row for row in rows if (row["model"], row["task"]) == (model, task)]
        if ours:
            best = max(ours, key=_speed)
            for least, is_moonshot in ((bar, False), (moonshot, True)):
                lines += _speed_line(best, least, is_moonshot, rows)
            # CUDA graphs keep their tensors in a pool, which is not measured.
            weighed = [row for row in ours if row["peak_bytes"]]
            if (model, task) == ("msvmamba_tiny", "training") and weighed:
                lines += _memory_lines(max(weighed, key=_speed), rows)
    return lines


def _speed_line(best: Row, least: float | str, is_moonshot: bool, rows: Sequence[Row]) -> Iterator[str]:
    measured = f"{_speed(best):,.0f} img/s"
    if isinstance(least, str):
        wanted = (SWIN, best["task"], least)
        here = [_speed(row) for row in rows if (row["model"], row["task"], row["mode"]) == wanted]
        whose = f"Swin-T {least} {'on this machine' if here else 'as measured before on an H100'}"
        least = here[0] if here else RIVALS[wanted].images_per_s
        bar = f"at least {least:,.0f}, {whose}"
    else:
        bar = f"at least {least:,g}{_where(best)}"
    yield _line(_speed(best) >= least, is_moonshot, _name(best), measured, bar)


def _memory_lines(best: Row, rows: Sequence[Row]) -> Iterator[str]:
    gib = _gib(best)
    measured = f"{gib:.2f} GiB at the peak"
    yield _line(gib < MEMORY_GIB, False, _name(best), measured, f"under {MEMORY_GIB:g} GiB")
    eager_swin = (SWIN, "training", "eager")
    swins = [_gib(row) for row in rows if (row["model"], row["task"], row["mode"]) == eager_swin and row["peak_bytes"]]
    least, whose = RIVALS[eager_swin].peak_gib or 0.0, "as measured before on an H100"
    if swins:
        least, whose = swins[0], "on this machine"
    yield _line(gib < least, True, _name(best), measured, f"under {least:.2f} GiB, Swin-T eager {whose}")


def _line(met: bool, is_moonshot: bool, name: str, measured: str, bar: str) -> str:
    words = ("moonshot met" if met else "moonshot open") if is_moonshot else ("met" if met else "MISSED")
    return f"{words}: {name}: {measured} ({bar})"


def _name(row: Row) -> str:
    return f"{row['model']}, {row['task']}, {row['mode']}"


def _speed(row: Row) -> float:
    return number(row, "images_per_s") or 0.0


def _gib(row: Row) -> float:
    return (number(row, "peak_bytes") or 0.0) / 2**30


def _where(row: Row) -> str:
    return "" if "H100" in row["device"] else ", on an H100"
