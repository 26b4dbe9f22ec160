"""Weights of a finished run small enough for git: averaged, in half precision, for timm's `checkpoint_path`."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from msv.ablation.config import canonical
from msv.experiment import LAST
from msv.models import PRESETS, MSVMamba
from msv.models.checkpoint_file import read_checkpoint
from msv.tasks.checkpoint import own_weights
from msv.tasks.export import network_arguments

WEIGHTS_NAME = "ema_fp16.safetensors"
MOST_BYTES = 16 * 2**20
# What acts in training alone, or chooses among ways to compute the same.
_NOT_ARCHITECTURE = frozenset(
    {"drop_path_rate", "drop_rate", "ffn_drop_rate", "grad_checkpointing", "ssm_weight_decay", "backend"}
)


def half_weights(run: Path) -> bytes:
    """The averaged weights of a run as float16 in the safetensors format, with what makes their network.

    Args:
        run: folder of a finished run, with its checkpoint and config.

    Raises:
        FileNotFoundError: the run has no checkpoint.
        ValueError: its network is none of this project, a weight has no finite float16, or the file would be larger
            than `MOST_BYTES`.
    """
    path = run / LAST
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no checkpoint, so there are no weights to keep; run where it was trained, or bring it with "
            "`python cli.py pack --checkpoints`"
        )
    arguments = {name: value for name, value in network_arguments(str(path)).items() if name not in _NOT_ARCHITECTURE}
    weights = {}
    for name, value in own_weights(read_checkpoint(path), str(path)).items():
        half = value.half() if value.is_floating_point() else value
        if not bool(torch.isfinite(half).all()):
            raise ValueError(f"{path}: {name} has values up to {value.abs().max():.3g}, beyond float16 (65504) or NaN")
        weights[name] = half.contiguous()
    preset, _ = _nearest_preset(arguments)
    metadata = {"format": "pt", "model": preset, "arguments": json.dumps(arguments), "weights": "ema"}
    content = save(weights, metadata)
    if len(content) > MOST_BYTES:
        raise ValueError(
            f"{path}: its weights are {len(content) / 2**20:.1f} MiB in float16, expected at most "
            f"{MOST_BYTES / 2**20:.0f}, which git can hold; leave the cell out of --weights"
        )
    return content


def create_call(content: Mapping[str, str], path: Path) -> str:
    """The call of timm that makes a network with kept weights.

    Args:
        content: metadata of the file.
        path: of the file.
    """
    preset, different = _nearest_preset(json.loads(content["arguments"]))
    told = "".join(f", {name}={value!r}" for name, value in different.items())
    return f'timm.create_model("{preset}"{told}, checkpoint_path="{path.as_posix()}")'


def _nearest_preset(arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The preset that the fewest arguments tell from a network, and these."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(MSVMamba).parameters.items()}
    found = {
        name: {
            key: value
            for key, value in arguments.items()
            if canonical([value]) != canonical([{**defaults, **preset}.get(key)])
        }
        for name, preset in PRESETS.items()
    }
    best = min(found, key=lambda name: len(found[name]))
    return best, found[best]
