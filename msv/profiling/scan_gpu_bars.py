"""The bars that the scan on a GPU is held to, and whether measured rows meet them."""

from collections.abc import Iterator, Sequence

from msv.kept import FAILED, Row, number

WAYS = {"forward": "forward", "forward_backward": "forward plus backward"}
SPEEDUPS = {1: (1.5, 1.8), 8: (2.0, 2.0), 16: (2.0, 2.0)}
"""1-D, bf16: for each N, how many times as fast as the CUDA kernel forward, and forward plus backward, must be."""
OVER_COPY_X, ROW_MS, ROW_BOTH_MS = 2.5, 0.26, 0.8
"""2-D, one row route of the first stage: the forward over a copy of x and in ms; forward plus backward in ms."""
COLUMN_OVER_ROW = 1.4
SS2D_BOTH_MS = 15.0
SAVED = 1 / 16
"""At N = 1: what is saved for the backward over the input in float32."""


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for each bar that the rows bear on: whether it is met, what was measured, what the bar is."""
    failed = [row for row in rows if row["status"] == FAILED]
    lines = [f"MISSED: {row['name']}: not measured: {row['error']}" for row in failed]
    rows = [row for row in rows if row["status"] != FAILED]
    for row in rows:
        if row["operator"] == "1d" and row["dtype"] == "bfloat16" and row["anchor_forward_ms"]:
            lines += _speedups(row)
    lines += _first_stage(rows)
    single = [row for row in rows if row["N"] == "1"]
    if single:
        most = max(single, key=lambda row: _value(row, "saved_ratio"))
        ratio, where = _value(most, "saved_ratio"), f"{len(single)} rows of N=1, the most in {most['name']}"
        lines.append(_line(ratio <= SAVED, where, f"{ratio:.4f} of the input in float32 saved", "at most 1/16"))
    return lines


def _speedups(row: Row) -> Iterator[str]:
    for (way, words), bar in zip(WAYS.items(), SPEEDUPS[int(row["N"])], strict=True):
        rival, whose = number(row, f"rival_{way}_ms"), row["rival"]
        if rival is None:
            rival, whose = _value(row, f"anchor_{way}_ms"), "the anchor, measured before on an H100 80GB HBM3"
        speedup = rival / _value(row, f"{way}_ms")
        yield _line(speedup >= bar, row["name"], f"{words} {speedup:.2f} times as fast as {whose}", f"at least {bar:g}")


def _first_stage(rows: Sequence[Row]) -> Iterator[str]:
    """The bars of the fused operator, all of them on the first stage, D = 192, batch 128, in bf16."""

    def find(routes: str, side: int, d_state: int) -> Row | None:
        wanted = {"operator": "2d", "dtype": "bfloat16", "B": "128", "D": "192", "routes": routes}
        wanted |= {"map": f"{side}x{side}", "N": str(d_state)}
        return next((row for row in rows if wanted.items() <= row.items()), None)

    row, half = find("row:0", 56, 1), find("col:0 rowR:0 colR:0", 28, 1)
    if row is not None:
        ratio = _value(row, "forward_over_copy_x")
        yield _line(
            ratio <= OVER_COPY_X, row["name"], f"forward {ratio:.2f} times a copy of x", f"at most {OVER_COPY_X:g}"
        )
        yield _milliseconds(row, "forward", ROW_MS)
        yield _milliseconds(row, "forward_backward", ROW_BOTH_MS)
        beside = [(column, COLUMN_OVER_ROW) for name in ("col:0", "colR:0") if (column := find(name, 56, 1))]
        beside += [(half, 1.0)] if half is not None else []
        for other, bar in beside:
            for way, words in WAYS.items():
                ratio = _value(other, f"{way}_ms") / _value(row, f"{way}_ms")
                yield _line(
                    ratio <= bar, other["name"], f"{words} {ratio:.2f} times that of {row['name']}", f"at most {bar:g}"
                )
    ss2d = find("row:0 col:1 rowR:2 colR:3", 56, 16)
    if ss2d is not None:
        yield _milliseconds(ss2d, "forward_backward", SS2D_BOTH_MS)


def _milliseconds(row: Row, way: str, bar: float) -> str:
    ms = _value(row, f"{way}_ms")
    where = "" if "H100" in row["device"] else ", on an H100"
    return _line(ms < bar, row["name"], f"{WAYS[way]} {ms:.3f} ms", f"under {bar:g} ms{where}")


def _value(row: Row, column: str) -> float:
    """Of a column that every finished row has."""
    return float(row[column])


def _line(met: bool, name: str, measured: str, bar: str) -> str:
    return f"{'met' if met else 'MISSED'}: {name}: {measured} ({bar})"
