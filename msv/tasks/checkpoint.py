"""Reading and writing weights: atomically out, and in with errors that name the tensors that do not fit."""

import errno
import logging
import os
import pickle
import uuid
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn

from msv.models import MSVMamba, load_published

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


def read_checkpoint(path: str | Path, map_location: str = "cpu", fix: str = "get it again") -> dict[str, Any]:
    """Read a ``torch.save`` file of plain tensors and containers.

    Args:
        path: the file.
        map_location: where the tensors go; ``"meta"`` reads names and shapes only.
        fix: what the error about a damaged file advises.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is truncated or is no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; give the path of a .ckpt, .pt, .pth or .safetensors file")
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: truncated or not a checkpoint ({path.stat().st_size} bytes, expected the zip file "
            f"that torch.save writes); {fix}"
        )
    try:
        content = torch.load(path, map_location=map_location, weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds objects other than tensors and plain containers, which are not loaded from "
            f"an unknown file ({str(error).splitlines()[0]})"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path}: truncated or damaged checkpoint ({str(error).splitlines()[0]}); {fix}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a dict of tensors, found {type(content).__name__}")
    return content


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


def load_pretrained(network: nn.Module, path: str | Path) -> None:
    """Load pretrained weights into ``network``; a classifier for another number of classes is left out.

    Args:
        network: what receives the weights.
        path: a ``.safetensors`` file, a plain state dict, a checkpoint of our own training (its averaged weights
            are taken) or a published checkpoint of MSVMamba or VMamba.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds another architecture.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give the path of the weights to start from")
        try:
            weights: dict[str, Any] = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated or damaged safetensors file ({error})") from error
    elif _is_published(path):
        if not isinstance(network, MSVMamba):
            raise ValueError(
                f"{path} is a published checkpoint of MSVMamba or VMamba, and the network is {type(network).__name__}; "
                "set model.init_args.network to msv.models.MSVMamba, or msv.models.TimmModel with one of its presets"
            )
        load_published(network, path, drop_head=network.num_classes != 1000)
        return
    else:
        content = read_checkpoint(path)
        weights = content.get("state_dict", content)

    if all(name.startswith("network.") for name in weights):
        weights = {name.removeprefix("network."): value for name, value in weights.items()}
    own = network.state_dict()
    classifier = tuple(_classifier_names(network))
    left_out = [
        name
        for name, value in weights.items()
        if name.startswith(classifier)
        and name in own
        and value.shape != own[name].shape
        and value.shape[1:] == own[name].shape[1:]
    ]
    kept = {name: value for name, value in weights.items() if name not in left_out}
    check_architecture({name: value for name, value in own.items() if name not in left_out}, kept, str(path))
    network.load_state_dict(kept, strict=False)
    if left_out:
        log.warning("%s: the classifier (%s) is for another number of classes; it starts anew", path, left_out[0])


def _is_published(path: Path) -> bool:
    """Whether ``path`` is a training checkpoint of the published code: model, optimizer and a config in one dict."""
    try:
        content = read_checkpoint(path, map_location="meta")
    except ValueError as error:
        # Its config is an object of a package that is not needed here, so a safe load refuses the file.
        return isinstance(error.__cause__, pickle.UnpicklingError)
    return any(isinstance(content.get(key), dict) for key in ("model", "model_ema"))


def _classifier_names(network: nn.Module) -> list[str]:
    """Prefixes of the classifier's tensors, by timm's configuration."""
    config = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None) or {}
    names = config.get("classifier", "head")
    return [names] if isinstance(names, str) else list(names)
