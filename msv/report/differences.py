"""What tells the configs of a grid's cells apart, key by key."""

from collections.abc import Mapping
from typing import Any

from msv.ablation.config import canonical
from msv.ablation.names import toggle_names

# What follows the seed, or says where and not what is trained.
_LEFT_OUT = frozenset({"seed_everything"})
ABSENT = object()
"""Stands for a key that a config does not have."""


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def differences(configs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The keys in which configs are not all the same.

    Args:
        configs: cell -> config.

    Returns:
        Dotted key -> cell -> value, `ABSENT` where a config has no such key; in the order of the configs.
    """
    values = {cell: flat(config) for cell, config in configs.items()}
    keys = dict.fromkeys(key for config in values.values() for key in config if key not in _LEFT_OUT)
    found = {}
    for key in keys:
        row = {cell: config.get(key, ABSENT) for cell, config in values.items()}
        if len({"absent" if value is ABSENT else canonical([value]) for value in row.values()}) > 1:
            found[key] = row
    return found


def short_names(keys: Mapping[str, Any]) -> dict[str, str]:
    """Dotted key -> the shortest end of it that tells it from the others."""
    return toggle_names(keys)
