"""`python cli.py export`: a preset or trained weights as a `torch.export` program or an ONNX file."""

import argparse
import difflib
import inspect
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from msv.models import PRESETS, MSVMamba
from msv.models.checkpoint_file import is_published, read_checkpoint
from msv.models.export import LEAST_SIDE, check_size, check_target, export_onnx, export_pt2
from msv.models.published import infer_arguments, published_weights
from msv.tasks.checkpoint import load_pretrained, own_weights

log = logging.getLogger(__name__)

TOLERANCE = 1e-3
"""How far outputs of a file may be off, of the network's largest; float32 leaves 1e-5."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the arguments after `export`; returns the exit status.

    Raises:
        OSError: a file that is missing, is there already, or cannot be written.
        ValueError: a model, size or opset that cannot be exported, weights that do not fit or make outputs that are not
            finite, or a file whose outputs are off by more than `TOLERANCE`.
    """
    options = _parser().parse_args(argv)
    target = check_target(options.target, tuple(LEAST_SIDE), options.force)
    height, width = options.size
    check_size(height, width, LEAST_SIDE[target.suffix])
    network = load_network(options.source, options.model)
    images = torch.randn(2, network.in_chans, height, width)
    with torch.no_grad():
        expected = network(images)
    largest = expected.abs().max().item()
    if not math.isfinite(largest):
        raise ValueError(f"{options.source}: outputs of its network are not finite, so there is nothing to export")
    if target.suffix == ".onnx":
        export_onnx(network, target, options.opset, options.force)
    else:
        export_pt2(network, target, (height, width), options.force)
    error = (run(target, images) - expected).abs().max().item()
    params = sum(parameter.numel() for parameter in network.parameters())
    print(f"{target}: {params:,} parameters; images (B, {network.in_chans}, H, W), sides in multiples of 32")
    print(f"run with {tuple(images.shape)}: off by {error:.1e} at most, of outputs up to {largest:.1e}")
    if not error <= TOLERANCE * largest:
        raise ValueError(
            f"{target} is off by {error:.1e}, more than {TOLERANCE:g} of the largest output: do not use it; torch, "
            "onnxscript and onnxruntime may be of versions that do not fit together"
        )
    return 0


def load_network(source: str, model: str | None = None) -> MSVMamba:
    """The network that a preset's name or a file of weights stands for, in evaluation mode.

    Args:
        source: a preset, with untrained weights; or a published checkpoint, what `convert` made of one, a `last.ckpt`
            beside its config.yaml, or other weights of this project with `model`.
        model: the preset that the weights are of; None takes what the file, or the config beside it, says.

    Raises:
        FileNotFoundError: there is neither such a preset nor such a file.
        ValueError: an unknown preset, weights that do not fit, or no word of which network they are of.
    """
    if model is not None and model not in PRESETS:
        raise ValueError(f"--model {model}: no such preset; {_near(model)}")
    if source in PRESETS:
        if model is not None:
            raise ValueError(f"--model {model}: {source} is a preset itself; leave one of them out")
        log.warning("%s has untrained weights: give a file of weights to export trained ones", source)
        return MSVMamba(**PRESETS[source]).eval()
    if not Path(source).exists():
        raise FileNotFoundError(f"{source} is neither a file of weights nor a preset; {_near(source)}")
    network = MSVMamba(**network_arguments(source, model))
    load_pretrained(network, source)
    return network.eval()


def run(path: Path, images: Tensor) -> Tensor:
    """What an exported file makes of images."""
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cli.py export",
        description="Writes a network as a torch.export program (.pt2) or an ONNX file (.onnx), for any batch and any "
        "sides in multiples of 32, and runs the file once against the network: more than 1e-3 off is an error.",
    )
    parser.add_argument("source", metavar="MODEL_OR_CHECKPOINT", help=f"a file of weights, or {', '.join(PRESETS)}")
    parser.add_argument("target", metavar="OUT.onnx|OUT.pt2", help="the file to write")
    parser.add_argument(
        "--model",
        metavar="PRESET",
        help="what the weights are of (default: what the file says, or the config.yaml beside it)",
    )
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=[224, 224],
        metavar=("H", "W"),
        help="of the images that the file is run with (default: 224 224)",
    )
    parser.add_argument("--opset", type=int, default=18, metavar="N", help="of ONNX, 18 or later (default: 18)")
    parser.add_argument("--force", action="store_true", help="overwrite the file")
    return parser


def network_arguments(source: str, model: str | None = None) -> dict[str, Any]:
    """The arguments of the network that weights are of; the channels and classes are always the weights' own.

    Args:
        source: a file of weights, as for `load_network`.
        model: the preset that they are of; None takes what the file, or the config beside it, says.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the weights are of another network, or nothing says of which.
    """
    content = read_checkpoint(source)
    if is_published(content):
        found = infer_arguments(published_weights(content, "auto", source)[1], source)
        return {**found, **PRESETS[model]} if model else found
    weights = own_weights(content, source)
    if "stem.proj.weight" not in weights:
        raise ValueError(f"{source} holds weights of another network: it has {', '.join(list(weights)[:3])}")
    chosen = PRESETS[model] if model else _architecture(Path(source))
    classes = len(weights["head.fc.bias"]) if "head.fc.bias" in weights else 0
    return {**chosen, "in_chans": weights["stem.proj.weight"].shape[1], "num_classes": classes, "backend": "auto"}


def _architecture(path: Path) -> dict[str, Any]:
    """What `convert` wrote into a .safetensors file, or `fit` into the config.yaml beside a checkpoint."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            written = (file.metadata() or {}).get("arguments")
        if written:
            return json.loads(written)
    config = path.parent / "config.yaml"
    if not config.is_file():
        raise ValueError(
            f"{path} does not say which network its weights are of, and there is no config.yaml beside it: give "
            f"--model with one of {', '.join(PRESETS)}"
        )
    class_path, arguments = _network_of(config)
    if not class_path.endswith(".MSVMamba"):
        if arguments.get("name") not in PRESETS:
            raise ValueError(
                f"{config}: its network is {arguments.get('name', class_path)}; only MSVMamba and its presets can be "
                f"exported: {', '.join(PRESETS)}"
            )
        arguments = {**PRESETS[arguments["name"]], **(arguments.get("model_args") or {})}
    if unknown := arguments.keys() - inspect.signature(MSVMamba).parameters:
        raise ValueError(
            f"{config}: MSVMamba has no {', '.join(sorted(unknown))}; if the file is not of these weights, give "
            f"--model with one of {', '.join(PRESETS)}"
        )
    return arguments


def _network_of(config: Path) -> tuple[str, dict[str, Any]]:
    """The class and the arguments of the network in a run's config.yaml."""
    try:
        found = yaml.safe_load(config.read_text(encoding="utf-8"))
        for key in ("model", "init_args", "network"):
            found = found[key]
        return str(found["class_path"]), dict(found.get("init_args") or {})
    except (yaml.YAMLError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{config} is not what `fit` writes: it names no network. If it is not of these weights, give --model with "
            f"one of {', '.join(PRESETS)}"
        ) from error


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, PRESETS, n=2)
    return f"did you mean {' or '.join(near)}?" if near else f"the presets are {', '.join(PRESETS)}"
