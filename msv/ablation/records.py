"""What a run leaves behind: ``record.json``, read strictly and written atomically.

A record is the only thing a table is made from, so it is either whole or not there.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from msv.files import write_atomic

RECORD_SCHEMA = 1
RECORD_NAME = "record.json"

RunStatus = Literal["running", "done", "failed", "unfinished"]
RUN_STATUSES: tuple[str, ...] = get_args(RunStatus)

_IDENTITY: dict[str, type] = {"grid": str, "recipe": str, "cell": str, "seed": int, "config_hash": str, "status": str}
_SECTIONS = ("toggles", "network", "metrics", "counts", "data", "schedule", "timing", "env")


def write_record(path: Path, record: Mapping[str, Any]) -> None:
    """Write a run's record atomically as strict JSON; numbers that are not finite become null.

    Args:
        path: the ``record.json`` of the run.
        record: the record; ``schema`` is filled in when it is absent.

    Raises:
        ValueError: a field that identifies the run is missing or wrong, or the status is unknown.
        TypeError: a value has no JSON form.
        OSError: the file cannot be written.
    """
    complete = {"schema": RECORD_SCHEMA, **record}
    problem = _problem(complete)
    if problem:
        raise ValueError(f"{path}: this record cannot be written: {problem}")
    write_atomic(Path(path), json.dumps(_to_json(complete), indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    """Read a run's record and check that it is a whole record of this schema.

    Args:
        path: the ``record.json`` of the run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, no record, or of another schema; names the file, what was expected, the fix.
    """
    path = Path(path)
    fix = f"move {path.parent} aside and run the grid again: this run trains anew, the others are kept"
    try:
        record = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = f"it breaks off or goes wrong at character {error.pos}" if hasattr(error, "pos") else "it is no text"
        raise ValueError(
            f"{path} is truncated or damaged ({where}); expected a whole JSON record of schema {RECORD_SCHEMA}; {fix}"
        ) from error
    if not isinstance(record, dict) or "schema" not in record:
        raise ValueError(f"{path} is no record of a run; expected a JSON object with schema {RECORD_SCHEMA}; {fix}")
    if record["schema"] != RECORD_SCHEMA:
        raise ValueError(
            f"{path} has schema {record['schema']!r}; this version of msv reads schema {RECORD_SCHEMA}; "
            f"use the version of msv that wrote it, or {fix}"
        )
    problem = _problem(record)
    if problem:
        raise ValueError(f"{path}: {problem}; {fix}")
    return record


def judged_by(tested: bool) -> Literal["test", "val"]:
    """The split that a run ends with, whose metrics its record has: `test_top1`, or `val_top1` without a test."""
    return "test" if tested else "val"


def _problem(record: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a record, None if nothing is."""
    for key, kind in _IDENTITY.items():
        value = record.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            return f"{key!r} is {value!r}, expected {kind.__name__}"
    if record["status"] not in RUN_STATUSES:
        return f"'status' is {record['status']!r}, expected one of {', '.join(RUN_STATUSES)}"
    tested = record.get("tested", True)  # said of runs alone that are not
    if not isinstance(tested, bool):
        return f"'tested' is {tested!r}, expected true or false"
    for key in _SECTIONS:
        if not isinstance(record.get(key) or {}, Mapping):
            return f"{key!r} is {record[key]!r}, expected an object"
    if record["status"] == "done":
        metrics, name = record.get("metrics") or {}, f"{judged_by(tested)}_top1"
        top1 = metrics.get(name)
        if not isinstance(top1, (int, float)) or not 0 <= top1 <= 1:
            return f"the run is done and its metrics.{name} is {top1!r}, expected a fraction from 0 to 1"
        seen = [] if tested else [metric for metric in metrics if metric.startswith("test")]
        if seen:
            return f"'tested' is False, and there are {', '.join(seen)}; expected nothing of the test split"
    return None


def _to_json(value: Any) -> Any:
    """Plain JSON values: tuples as lists, paths as text, numpy and torch scalars as numbers, NaN and inf as null."""
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        return _to_json(value.item())
    raise TypeError(f"{value!r} of type {type(value).__name__} has no JSON form; a record holds plain values")
