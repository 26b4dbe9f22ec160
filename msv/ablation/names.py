"""Names of a grid: of its cells (which are folders), of its toggles (which are columns), of values in both."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from msv.toggles import idle_toggles

_SAFE_NAME = re.compile(r"[A-Za-z0-9_=+][A-Za-z0-9._=+,-]*")
# Folder names end at 255 bytes on common file systems; suffixes (a run moved aside) need room.
_LONGEST_NAME = 200


def check_name(what: str, name: str, reserved: Iterable[str] = ()) -> None:
    """Raise ValueError, with a suggestion, for a name that cannot be a folder's on every system.

    Args:
        what: the setting that gives the name, for the message.
        name: the name.
        reserved: names, in lower case, that are taken.
    """
    if not _SAFE_NAME.fullmatch(name):
        suggestion = re.sub(r"[^A-Za-z0-9._=+,-]+", "-", name).lstrip("-.,") or "run"
        raise ValueError(
            f"{what} {name!r} is no safe folder name; expected letters, digits and . _ = + , - (no . , - first), "
            f"such as {suggestion!r}"
        )
    if len(name) > _LONGEST_NAME:
        raise ValueError(
            f"{what} {name!r} has {len(name)} characters, expected at most {_LONGEST_NAME}; name it under `grid.cells`"
        )
    if name.lower() in reserved:
        raise ValueError(f"{what} {name!r} is kept for something else in the results folder; choose another name")


def name_part(key: str, value: Any) -> str:
    """A value as it stands in the name of a cell made from axes; ValueError for a dict, which makes no short name."""
    if isinstance(value, Mapping) or (isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value)):
        raise ValueError(f"grid axis {key!r} holds {value!r}, which makes no name; name such cells under `grid.cells`")
    return re.sub(r"[^A-Za-z0-9._=+,-]+", "-", format_value(value))


def toggle_names(keys: Iterable[str]) -> dict[str, str]:
    """Dotted key -> its last part, or the shortest suffix that tells it from the other keys."""
    unique = list(dict.fromkeys(keys))
    names = {}
    for key in unique:
        parts = key.split(".")
        suffixes = [".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1)]
        others = [f".{other}" for other in unique if other != key]
        names[key] = next((name for name in suffixes if not any(o.endswith(f".{name}") for o in others)), key)
    return names


def acting(toggles: Mapping[str, Any], network: Mapping[str, Any] | None) -> dict[str, Any]:
    """The toggles of a cell without those that cannot act in its network, whatever their value.

    Args:
        toggles: short name -> value.
        network: of the cell, resolved; None where no run has left it, and then the toggles alone say.
    """
    if network is None:
        settings = dict(toggles)
    elif str(network.get("class_path", "")).rpartition(".")[2] == "MSVMamba":
        settings = network.get("init_args") or {}
    else:
        return dict(toggles)
    full_scans = settings.get("full_scans")
    if not isinstance(full_scans, int):
        return dict(toggles)
    idle = idle_toggles(full_scans, settings.get("share_half") is not False, settings.get("recurrence") is not False)
    return {name: value for name, value in toggles.items() if name.rpartition(".")[2] not in idle}


def format_value(value: Any) -> str:
    """A toggle's value as tables and cell names show it: ``true``, ``null``, ``1-2-5-2``, a class by its name."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "-".join(format_value(item) for item in value)
    if isinstance(value, Mapping):
        name = str(value.get("class_path", "")).rpartition(".")[2]
        arguments = value.get("init_args") or {} if name else value
        inside = ", ".join(f"{key}={format_value(item)}" for key, item in arguments.items())
        return f"{name}({inside})" if name and inside else name or inside
    return str(value)
