"""Files of weights: read without running code of theirs, told apart, and searched for numbers that are none."""

import logging
import pickle
import re
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

log = logging.getLogger(__name__)

_PUBLISHED = re.compile(r"layers\.\d+\.blocks\.\d+\.(op|self_attention)\.")
_SHOWN = 5


def read_checkpoint(path: str | Path, map_location: str = "cpu", fix: str = "get it again") -> dict[str, Any]:
    """Reads a file of torch.save or of safetensors; no code of the file runs.

    Args:
        path: the file.
        map_location: where the tensors go; `meta` reads names and shapes alone, of safetensors the whole.
        fix: what the error about a damaged file advises.

    Returns:
        What the file holds. The configuration that published files hold, an object of yacs, is a plain dict in it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or truncated, or holds objects that are no weights.
    """
    path = Path(path)
    if not path.is_file():
        what = "it is a folder" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"no checkpoint at {path}: {what}; give a .ckpt, .pt, .pth or .safetensors file")
    bad = f"{path} cannot be read as a checkpoint of weights"
    torn = f"{bad}: it may be truncated or damaged ({path.stat().st_size:,} bytes); {fix}"
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(torn) from error

    with path.open("rb") as file:
        head = file.read(2)
    zipped = zipfile.is_zipfile(path)  # what torch.save writes; before torch 1.6 it wrote a row of pickles
    if not zipped and head in (b"", b"PK"):
        raise ValueError(torn)
    if not zipped and head[:1] != b"\x80":
        raise ValueError(f"{bad}: expected a file that torch.save wrote, or .safetensors; {fix}")
    try:
        # Namespace: timm's training keeps its arguments in one, beside the weights.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode"), Namespace]):
            content = torch.load(path, map_location=map_location, weights_only=True, mmap=zipped)
    except Exception as error:  # torch.load raises a dozen kinds, none of which says what to do
        # Torch writes "Unsupported global: GLOBAL a.b", "Unsupported class a.b", and of a module that it blocks
        # "unsupported GLOBAL posix.system whose module posix is blocked".
        foreign = re.search(r"unsupported (?:global|class):? (?:GLOBAL )?([\w.]+)", str(error), re.IGNORECASE)
        if isinstance(error, pickle.UnpicklingError) and foreign:
            raise ValueError(
                f"{bad}: it holds a {foreign[1]} beside weights, and to load that would run code of an unknown file; "
                "save its state dict alone, where you trust it"
            ) from error
        raise ValueError(torn) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict of weights")
    return dict(content)


def choose_weights(content: Mapping[str, Any], weights: str, source: str) -> tuple[str, dict[str, Tensor]]:
    """The weights of a checkpoint that holds several, or of a state dict.

    Args:
        content: of the checkpoint.
        weights: `model`, `model_ema`, or `auto`: `model_ema` where there is one.
        source: the name that errors give it.

    Returns:
        Which they are, `model`, `model_ema` or `state dict`, and the tensors by name.

    Raises:
        ValueError: there are no such weights.
    """
    held = [key for key in ("model_ema", "model") if isinstance(content.get(key), Mapping)]
    which = "state dict"
    if held:
        which = held[0] if weights == "auto" else weights
        if which not in held:
            raise ValueError(f"{source} has no {which!r}; expected one of {', '.join(held)}")
        if weights == "auto" and len(held) > 1:
            log.warning("%s: takes model_ema; the file has model too", source)
        content = content[which]
    elif weights != "auto":
        raise ValueError(f"{source} is a plain state dict and has no {weights!r}: use weights='auto'")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{source} holds no weights; expected a published checkpoint or a state dict")
    return which, tensors


def is_published(content: Mapping[str, Any]) -> bool:
    """Whether a checkpoint has the names of the published models of MSVMamba and VMamba, old or new."""
    dicts = [content, *(content[key] for key in ("model_ema", "model") if isinstance(content.get(key), Mapping))]
    return any(_PUBLISHED.match(str(name)) for names in dicts for name in names)


def warn_not_finite(tensors: Mapping[str, Tensor], source: str) -> tuple[str, ...]:
    """Logs a warning that names the tensors with NaN or infinite values, and returns their names."""
    counts = {name: int(value.numel() - value.isfinite().sum()) for name, value in tensors.items()}
    found = tuple(name for name, count in counts.items() if count)
    if found:
        shown = ", ".join(f"{name} ({counts[name]} of {tensors[name].numel()})" for name in found[:_SHOWN])
        more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
        log.warning("%s: NaN or infinite weights in %d tensor(s): %s%s", source, len(found), shown, more)
    return found
