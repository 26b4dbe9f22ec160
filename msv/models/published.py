"""The importer of published weights: their names and layout turned into this project's.

The published models keep the S6 weights of all routes of a mixer in one tensor: index 0 (the first D rows of A_logs
and Ds) belongs to the half branch, 1.. to the full routes in order; in SS2D all belong to the four routes.
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .checkpoint_file import choose_weights, is_published, read_checkpoint, warn_not_finite
from .mixers import S6, SS2D
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
        not_finite: published tensors with NaN or infinite values; a warning has named them.
    """

    source: str
    weights: str
    tensors: int
    left_out: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()


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
        drop_head: whether a classifier of another number of classes is left out, with a warning, instead of refused.

    Returns:
        What was loaded.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: the model is no `MSVMamba`.
        ValueError: the file is no such checkpoint, or a tensor is missing, extra or misshapen; the message names it,
            and the model is as it was.
    """
    if not isinstance(model, MSVMamba):
        raise TypeError(
            f"load_published got a {type(model).__name__}; expected an MSVMamba, such as timm.create_model makes of a "
            "preset without features_only"
        )
    name = str(source) if isinstance(source, str | Path) else "state dict"
    content = read_checkpoint(source) if isinstance(source, str | Path) else source
    which, published = published_weights(content, weights, name)
    left_out = []
    if drop_head:
        own = model.state_dict()
        for part in ("weight", "bias"):
            theirs = published.get(f"classifier.head.{part}")
            if theirs is not None and getattr(own.get(f"head.fc.{part}"), "shape", None) != theirs.shape:
                left_out.append(f"classifier.head.{part}")
                log.warning("%s: classifier.head.%s %s is left out", name, part, tuple(theirs.shape))
    state = from_published(model, published, left_out, name)
    not_finite = warn_not_finite(published, name)
    for toggle in _unpublished_toggles(model):
        log.warning("%s: the published model has no %s: its weights were trained for another function", name, toggle)
    model.load_state_dict(state, strict=not left_out)
    report = LoadReport(name, which, len(published) - len(left_out), tuple(left_out), not_finite)
    log.info("%s: loaded %d tensors of %s", name, report.tensors, which)
    return report


def published_weights(content: Mapping[str, Any], weights: str, source: str) -> tuple[str, dict[str, Tensor]]:
    """The weights of a published checkpoint or state dict, in the newer naming, and which they are.

    Raises:
        ValueError: there are no such weights, or their names are not the published ones.
    """
    if not is_published(content):
        names = content["state_dict"] if isinstance(content.get("state_dict"), Mapping) else content
        if any(re.match(r"(network\.)?stages\.\d+\.blocks", str(name)) for name in names):
            raise ValueError(
                f"{source} is in this project's own naming, not the published one: --model.pretrained takes it as it "
                "is, and timm's checkpoint_path if it is .safetensors"
            )
    which, found = choose_weights(content, weights, source)
    if not is_published(found):
        raise ValueError(
            f"{source} is a checkpoint of another model: it has {', '.join(list(found)[:3])}; expected a published "
            "checkpoint of MSVMamba or VMamba, with names such as layers.0.blocks.0.op.A_logs"
        )
    return which, {_new_name(name): value for name, value in found.items()}


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
    problems = list(dict.fromkeys(problems))  # two parts, half and full, may lack the same tensor
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        fix = (
            "Only the head is of another size: leave it out with drop_head=True (--model.drop_head true)"
            if all("classifier.head." in problem for problem in problems)
            else "Expected a checkpoint of the same dims, depths, d_state, full_scans, se and conv_ffn: choose the "
            "preset it was trained as"
        )
        raise ValueError(f"{source} does not fit this network: {shown}. {fix}")
    return state


def infer_arguments(published: Mapping[str, Tensor], source: str = "state dict") -> dict[str, Any]:
    """The arguments of `MSVMamba` that weights in the newer published naming were made with, from names and shapes.

    The published code has no split 0/4, whose tensors would be named and shaped as those of 4/0.

    Raises:
        ValueError: a tensor that tells is missing.
    """
    stages = sorted({int(name.split(".")[1]) for name in published if re.match(r"layers\.\d+\.blocks", name)})
    depths = [len({name.split(".")[3] for name in published if name.startswith(f"layers.{i}.blocks.")}) for i in stages]
    block = "layers.0.blocks.0"
    try:
        sets = len(published[f"{block}.op.x_proj_weight"])
        return {
            "in_chans": published["patch_embed.0.weight"].shape[1],
            "num_classes": len(published["classifier.head.bias"]) if "classifier.head.bias" in published else 0,
            "dims": tuple(len(published[f"layers.{i}.blocks.0.norm.weight"]) for i in stages),
            "depths": tuple(depths),
            "d_state": published[f"{block}.op.A_logs"].shape[-1],
            "full_scans": sets - 1 if f"{block}.op.conv2d_b1.weight" in published else 4,
            "se": f"{block}.op.se.fc.0.weight" in published,
            "conv_ffn": f"{block}.convFFN.linear1.weight" in published,
        }
    except KeyError as error:
        raise ValueError(
            f"{source}: missing {error.args[0]}; expected a published checkpoint of MSVMamba or VMamba"
        ) from error


def published_name(name: str) -> str:
    """The published name of a parameter of `MSVMamba`."""
    for pattern, published in _NAMES:
        name = re.sub(pattern, published, name)
    # Theirs is the downsampling that leaves a stage, ours the one that enters the next.
    name = re.sub(r"^stages\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name)
    return re.sub(r"^stages\.", "layers.", name)


def _part(name: str, theirs: Tensor, own: Tensor) -> Tensor | None:
    """The part of a published tensor that is the parameter `name`, in its shape, or None where it does not fit."""
    if theirs.dim() == 0:
        return None
    if ".s6" in name:
        if theirs.dim() < 3 and len(theirs) % own.shape[1] == 0:  # A_logs, Ds and a bias, routes stacked in rows
            stacked = theirs.shape[0] != own.shape[0] or theirs.shape[1:] != own.shape[1:]
            theirs = theirs.unflatten(0, (-1, own.shape[1])) if stacked else theirs
        if ".s6_half." in name:
            theirs = theirs[:1]
        elif ".s6_full." in name:
            theirs = theirs[1:]
    elif ".ffn." in name and theirs.dim() == 4 and own.dim() == 2:
        theirs = theirs.flatten(1)  # a 1×1 convolution
    return theirs.clone(memory_format=torch.contiguous_format) if theirs.shape == own.shape else None


def _new_name(name: str) -> str:
    for old, new in OLD_NAMES:
        name = re.sub(old, new, name)
    return name


def _unpublished_toggles(model: MSVMamba) -> list[str]:
    """What the model does that published weights were not trained for, though their shapes fit."""
    mixers = list(model.modules())
    found = []
    if any(isinstance(m, SS2D) and m.dwconv.stride[0] == 2 for m in mixers):
        found.append("split 0/4 (full_scans=0)")
    if any(isinstance(m, S6) and len(m.routes) > 1 and len(m.x_proj) == 1 and not m.carry_state for m in mixers):
        found.append("reset at the seams (carry_state=False)")
    return found
