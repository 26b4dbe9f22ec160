"""`python cli.py convert`: a published checkpoint made into a file that timm's `checkpoint_path` loads."""

import argparse
import difflib
import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save

from msv.files import write_atomic

from .checkpoint_file import read_checkpoint, warn_not_finite
from .network import PRESETS, MSVMamba
from .published import from_published, infer_arguments, published_weights

ARCHITECTURE = ("dims", "depths", "d_state", "full_scans", "se", "conv_ffn")
"""The arguments of `MSVMamba` that tell the presets apart."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        preset: whose architecture the weights have; None for another point of the design space.
        arguments: of `MSVMamba` that make the network of the weights.
        weights: which of the file's weights these are: `model`, `model_ema` or `state dict`.
        tensors: published tensors read.
        params: parameters written.
        not_finite: published tensors with NaN or infinite values; a warning has named them.
    """

    preset: str | None
    arguments: dict[str, Any]
    weights: str
    tensors: int
    params: int
    not_finite: tuple[str, ...]


def convert(
    source: str | Path,
    target: str | Path,
    model: str | None = None,
    weights: Literal["auto", "model", "model_ema"] = "auto",
    force: bool = False,
) -> Conversion:
    """Writes the weights of a published checkpoint in the names and shapes of `MSVMamba`.

    Args:
        source: the published file.
        target: the .safetensors file to write; either the whole of it is there in the end, or what was there before.
        model: the preset that the weights must be of; None takes whatever their names and shapes say.
        weights: `model`, `model_ema`, or `auto`: `model_ema` where the file has it.
        force: whether an existing target is overwritten.

    Raises:
        FileNotFoundError: there is no such source.
        FileExistsError: the target exists, and `force` is not given.
        ValueError: an unknown preset, another suffix than .safetensors, no published checkpoint, or the weights of
            another architecture than the preset's; the message names the tensors.
    """
    target = Path(target)
    if model is not None and model not in PRESETS:
        near = difflib.get_close_matches(model, PRESETS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(PRESETS)}"
        raise ValueError(f"--model {model}: no such preset; {hint}")
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: expected a name that ends in .safetensors, by which timm knows the format")
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists; give another name, or --force to overwrite it")

    name = str(source)
    which, published = published_weights(read_checkpoint(source), weights, name)
    arguments = infer_arguments(published, name)
    found = _preset(arguments)
    own = PRESETS[model] if model else {}
    try:
        with torch.device("meta"):  # only names and shapes are asked for
            network = MSVMamba(**{**arguments, **own})
        state = from_published(network, published, source=name)
    except ValueError as error:
        hint = f"; the weights look like {found or _shown(arguments)}" if model not in (None, found) else ""
        raise ValueError(f"{error}{hint}") from error
    not_finite = warn_not_finite(published, name)
    metadata = {"format": "pt", "model": found or "MSVMamba", "arguments": json.dumps(arguments), "weights": which}
    write_atomic(target, save(state, metadata))
    params = sum(parameter.numel() for parameter in network.parameters())
    return Conversion(found, arguments, which, len(published), params, not_finite)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the arguments after `convert`; returns the exit status.

    Raises:
        OSError: a file that is missing, is there already, or cannot be written.
        ValueError: what `convert` refuses.
    """
    options = _parser().parse_args(argv)
    done = convert(options.source, options.target, options.model, options.weights, options.force)
    extra = "".join(
        f", {name}={done.arguments[name]}"
        for name, usual in (("in_chans", 3), ("num_classes", 1000))
        if done.arguments[name] != usual
    )
    print(f"{options.target}: {done.params:,} parameters from {done.tensors} tensors of {done.weights}")
    if done.preset:
        print(f'timm.create_model("{done.preset}"{extra}, checkpoint_path="{options.target}")')
    else:
        print(f"no preset has this architecture: {_shown(done.arguments)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py convert",
        description="Makes a published checkpoint of MSVMamba or VMamba a file for timm's checkpoint_path.",
    )
    parser.add_argument("source", metavar="FILE", help="the published file")
    parser.add_argument("target", metavar="OUT.safetensors", help="the file to write")
    parser.add_argument(
        "--model", metavar="PRESET", help=f"{', '.join(PRESETS)} (default: what the shapes say, whichever that is)"
    )
    parser.add_argument(
        "--weights",
        choices=["auto", "model", "model_ema"],
        default="auto",
        help="which of the file's weights (default: auto, the averaged ones where there are any)",
    )
    parser.add_argument("--force", action="store_true", help="overwrite OUT.safetensors")
    return parser


def _preset(arguments: dict[str, Any]) -> str | None:
    defaults = {name: parameter.default for name, parameter in inspect.signature(MSVMamba).parameters.items()}
    for name, preset in PRESETS.items():
        if all(arguments[key] == {**defaults, **preset}[key] for key in ARCHITECTURE):
            return name
    return None


def _shown(arguments: dict[str, Any]) -> str:
    return f"MSVMamba({', '.join(f'{name}={value}' for name, value in arguments.items())})"
