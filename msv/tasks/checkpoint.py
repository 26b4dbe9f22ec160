"""Weights of a training: atomically out, and in with errors that name the tensors that do not fit."""

import errno
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from msv.models import MSVMamba, load_published
from msv.models.checkpoint_file import choose_weights, is_published, read_checkpoint, warn_not_finite

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its final name and renames it, so that a kill leaves the old one or the new one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save ``checkpoint`` at ``path``.

        Raises:
            OSError: The disk is full or the folder cannot be written; the file of before is untouched.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            reason = "no space is left on the device" if full else str(error)
            raise OSError(
                f"{path}: the checkpoint could not be written ({reason}); free some space or choose another "
                "results folder with --grid.results, then run again to go on"
            ) from error
        finally:
            temporary.unlink(missing_ok=True)


def differences(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """What keeps ``other`` from being loaded into ``own``, one phrase a kind with the first names of it."""
    missing = [name for name in own if name not in other]
    unexpected = [name for name in other if name not in own]
    misshapen = [
        f"{name} is {tuple(other[name].shape)}, expected {tuple(value.shape)}"
        for name, value in own.items()
        if name in other and other[name].shape != value.shape
    ]
    found = []
    for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            found.append(f"{len(names)} {kind}: {', '.join(names[:3])}{more}")
    return found


def check_architecture(own: Mapping[str, Tensor], other: Mapping[str, Tensor], source: str) -> None:
    """Raise a ValueError that names the first tensors of ``other`` that do not fit ``own``."""
    found = differences(own, other)
    if found:
        raise ValueError(
            f"{source} is a checkpoint of another architecture: {'; '.join(found)}; give the checkpoint "
            "of this network, or the network's options (model.init_args.network) of that checkpoint"
        )


def load_pretrained(network: nn.Module, path: str | Path, drop_head: bool = False) -> bool:
    """Load pretrained weights into ``network``.

    Args:
        network: what receives the weights.
        path: a ``.safetensors`` file, a plain state dict, a checkpoint of our own training (its averaged weights
            are taken) or a published checkpoint of MSVMamba or VMamba.
        drop_head: whether a classifier for another number of classes is left out, with a warning, instead of refused.

    Returns:
        Whether the classifier was left out, and has to be trained before it says anything.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds another architecture.
    """
    content = read_checkpoint(path)
    if is_published(content):
        if not isinstance(network, MSVMamba):
            raise ValueError(
                f"{path} is a published checkpoint of MSVMamba or VMamba, and the network is {type(network).__name__}; "
                "set model.init_args.network to msv.models.MSVMamba, or msv.models.TimmModel with one of its presets"
            )
        return bool(load_published(network, path, drop_head=drop_head).left_out)
    weights = own_weights(content, str(path))
    own = network.state_dict()
    classifier = tuple(_classifier_names(network))
    other_head = [
        name
        for name, value in weights.items()
        if name.startswith(classifier)
        and name in own
        and value.shape != own[name].shape
        and value.shape[1:] == own[name].shape[1:]
    ]
    kept = {name: value for name, value in weights.items() if name not in other_head}
    check_architecture({name: value for name, value in own.items() if name not in other_head}, kept, str(path))
    if other_head and not drop_head:
        name = other_head[0]
        raise ValueError(
            f"{path}: the classifier is for another number of classes ({name} is {tuple(weights[name].shape)}, "
            f"expected {tuple(own[name].shape)}); set model.drop_head to true to leave it out and "
            "have `fit` train it anew"
        )
    warn_not_finite(kept, str(path))
    network.load_state_dict(kept, strict=False)
    if other_head:
        log.warning("%s: the classifier (%s) is for another number of classes; it starts anew", path, other_head[0])
    return bool(other_head)


def own_weights(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """The weights of a checkpoint of ours or a state dict, by the names that they have in the network.

    Raises:
        ValueError: there are none.
    """
    _, weights = choose_weights(content.get("state_dict", content), "auto", source)
    if all(name.startswith("network.") for name in weights):
        return {name.removeprefix("network."): value for name, value in weights.items()}
    return weights


def _classifier_names(network: nn.Module) -> list[str]:
    """Prefixes of the classifier's tensors, by timm's configuration."""
    config = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None) or {}
    names = config.get("classifier", "head")
    return [names] if isinstance(names, str) else list(names)
