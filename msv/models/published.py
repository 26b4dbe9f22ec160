"""The importer of published weights: their names and layout turned into this project's.

The published models keep the S6 weights of all routes of a mixer in one tensor: index 0 (the first D rows of A_logs
and Ds) belongs to the half branch, 1.. to the full routes in order; in SS2D all belong to the four routes.
"""

import logging
import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .network import MSVMamba

log = logging.getLogger(__name__)

OLD_NAMES = (
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.", "classifier.head."),
)
"""Names of older published files, and what newer ones have instead."""

_NAMES = (
    (r"^stem\.proj\.", "patch_embed.0."),
    (r"^stem\.norm\.", "patch_embed.2."),
    (r"^norm\.", "classifier.norm."),
    (r"^head\.fc\.", "classifier.head."),
    (r"\.norm1\.", ".norm."),
    (r"\.mixer\.norm\.", ".op.out_norm."),
    (r"\.mixer\.dwconv(_full)?\.", ".op.conv2d."),
    (r"\.mixer\.dwconv_half\.", ".op.conv2d_b1."),
    (r"\.mixer\.se\.reduce\.", ".op.se.fc.0."),
    (r"\.mixer\.se\.expand\.", ".op.se.fc.2."),
    (r"\.mixer\.s6(_full|_half)?\.", ".op."),
    (r"\.mixer\.", ".op."),
    (r"\.ffn\.expand\.", ".convFFN.linear1."),
    (r"\.ffn\.reduce\.", ".convFFN.linear2."),
    (r"\.ffn\.dwconv\.", ".convFFN.dwc."),
    (r"\.x_proj$", ".x_proj_weight"),
    (r"\.dt_weight$", ".dt_projs_weight"),
    (r"\.dt_bias$", ".dt_projs_bias"),
    (r"\.A_log$", ".A_logs"),
    (r"\.D_skip$", ".Ds"),
)


@dataclass(frozen=True)
class LoadReport:
    """What `load_published` did.

    Attributes:
        source: the file, or `state dict`.
        weights: which of the file's weights were loaded: `model`, `model_ema` or `state dict`.
        tensors: published tensors loaded.
        left_out: published tensors left out on request.
    """

    source: str
    weights: str
    tensors: int
    left_out: tuple[str, ...]


def load_published(
    model: MSVMamba,
    source: str | Path | Mapping[str, Any],
    weights: Literal["auto", "model", "model_ema"] = "auto",
    drop_head: bool = False,
) -> LoadReport:
    """Loads weights in the published naming, old or new, into a model of the same architecture.

    Args:
        model: the network to fill.
        source: a published checkpoint file, its dict, or a state dict.
        weights: `model`, `model_ema`, or `auto`: `model_ema` where the file has it. Which of the two gave the
            published accuracy is not recorded.
        drop_head: whether a classifier of another number of classes is left out instead of refused.

    Returns:
        What was loaded.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no such checkpoint, or a tensor is missing, extra or misshapen; the message names it.
    """
    name = str(source) if isinstance(source, str | Path) else "state dict"
    content = read_checkpoint(source) if isinstance(source, str | Path) else source
    which, published = _choose(content, weights, name)
    published = {_new_name(key): value for key, value in published.items()}
    left_out = []
    if drop_head:
        own = model.state_dict()
        for part in ("weight", "bias"):
            theirs = published.get(f"classifier.head.{part}")
            if theirs is not None and getattr(own.get(f"head.fc.{part}"), "shape", None) != theirs.shape:
                left_out.append(f"classifier.head.{part}")
                log.warning("%s: classifier.head.%s %s is left out", name, part, tuple(theirs.shape))
    state = from_published(model, published, set(left_out), name)
    model.load_state_dict(state, strict=not left_out)
    log.info("%s: loaded %d tensors of %s", name, len(published) - len(left_out), which)
    return LoadReport(name, which, len(published) - len(left_out), tuple(left_out))


def from_published(
    model: MSVMamba, published: Mapping[str, Tensor], left_out: Collection[str] = (), source: str = "state dict"
) -> dict[str, Tensor]:
    """Turns a state dict in the newer published naming into the model's own.

    Raises:
        ValueError: a tensor is missing, extra or misshapen, or the model has parts that published weights lack.
    """
    state, used, problems = {}, set(left_out), []
    for name, parameter in model.state_dict().items():
        theirs = published_name(name)
        if theirs in left_out:
            continue
        if theirs not in published:
            problems.append(f"missing {theirs}")
            continue
        used.add(theirs)
        tensor = _part(name, published[theirs], parameter)
        if tensor is None:
            problems.append(f"misshapen {theirs} {tuple(published[theirs].shape)} for {name} {tuple(parameter.shape)}")
        else:
            state[name] = tensor
    problems += [f"extra {name}" for name in published if name not in used]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ValueError(
            f"{source} does not fit this network: {shown}. Expected a checkpoint of the same dims, depths, d_state, "
            "full_scans, se and conv_ffn: choose the preset it was trained as"
        )
    return state


def published_name(name: str) -> str:
    """The published name of a parameter of `MSVMamba`."""
    for pattern, published in _NAMES:
        name = re.sub(pattern, published, name)
    # Theirs is the downsampling that leaves a stage, ours the one that enters the next.
    name = re.sub(r"^stages\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
    return re.sub(r"^stages\.", "layers.", name)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a checkpoint without running code of it; the configuration node that published files hold becomes a dict.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, or truncated, or holds objects that are no weights.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: give the path of a file")
    try:
        # A published file holds a node of yacs, which may not be installed: it is read as a dict, its code not run.
        with torch.serialization.safe_globals([(OrderedDict, "yacs.config.CfgNode")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds, none of which says what to do
        foreign = re.search(r"Unsupported (?:global|class)[^.\n]*", str(error))
        reason = foreign[0] if foreign else "it may be truncated: get it again"
        raise ValueError(f"{path} cannot be read as a checkpoint of weights: {reason}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict of weights")
    return dict(content)


def _part(name: str, theirs: Tensor, own: Tensor) -> Tensor | None:
    """The part of a published tensor that is the parameter `name`, in its shape, or None where it does not fit."""
    if ".s6" in name:
        if theirs.dim() < 3 and theirs.shape[0] % own.shape[1] == 0:  # A_logs, Ds and a bias, routes stacked in rows
            stacked = theirs.shape[0] != own.shape[0] or theirs.shape[1:] != own.shape[1:]
            theirs = theirs.unflatten(0, (-1, own.shape[1])) if stacked else theirs
        if ".s6_half." in name:
            theirs = theirs[:1]
        elif ".s6_full." in name:
            theirs = theirs[1:]
    elif ".ffn." in name and theirs.dim() == 4 and own.dim() == 2:
        theirs = theirs.flatten(1)  # a 1×1 convolution
    return theirs.clone() if theirs.shape == own.shape else None


def _new_name(name: str) -> str:
    for old, new in OLD_NAMES:
        name = re.sub(old, new, name)
    return name


def _choose(content: Mapping[str, Any], weights: str, source: str) -> tuple[str, Mapping[str, Tensor]]:
    held = [key for key in ("model_ema", "model") if isinstance(content.get(key), Mapping)]
    if held:
        which = held[0] if weights == "auto" else weights
        if which not in held:
            raise ValueError(f"{source} has no {which!r}; expected one of {', '.join(held)}")
        content = content[which]
    elif weights != "auto":
        raise ValueError(f"{source} is a plain state dict and has no {weights!r}: use weights='auto'")
    else:
        which = "state dict"
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"{source} holds no weights; expected a published checkpoint or a state dict")
    return which, tensors
