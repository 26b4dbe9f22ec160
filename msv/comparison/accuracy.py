"""Top-1 accuracy on ImageNet's validation images of the systems whose weights are at hand (Table 1, Fig. 1)."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from timm.models import load_state_dict
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from msv.data.image_folder import FolderImages
from msv.kept import Kept, Row, place
from msv.models import PRESETS
from msv.profiling.devices import without_weights
from msv.provenance import names_code
from msv.tasks.checkpoint import load_pretrained

from .systems import MODELS, TABLE_1_MODELS, create, find, order

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin", ".tar")
VAL_IMAGES = 50_000
FILE = "accuracy.csv"
COLUMNS = (
    *("model", "file", "sha256", "top1", "images", "image_size", "crop_pct", "interpolation", "precision"),
    "command",
)
"""Of the CSV. `top1` is in percent, of `images` images; `file` is the weights' name without its folder, `sha256` the
first 16 digits of its digest; the image's size, crop and interpolation are those its weights are published with.
"""


def store(folder: Path) -> Kept:
    """The accuracies kept in a folder, the latest of each model."""
    return Kept(folder / FILE, COLUMNS, ("model",))


@dataclass(frozen=True)
class Weights:
    """A file of weights.

    Attributes:
        model: of `MODELS`.
        path: the file.
    """

    model: str
    path: Path

    @property
    def sha256(self) -> str:
        """The first 16 digits of the file's digest."""
        with self.path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 22):
                digest.update(chunk)
        return digest.hexdigest()[:16]


def find_weights(given: Sequence[str], only: Sequence[str] | None = None) -> list[Weights]:
    """The files of weights that a user names.

    Args:
        given: folders, whose files are called by a model's name (`vmamba_tiny.pth`), or `NAME=FILE`.
        only: these models alone, of `MODELS`.

    Raises:
        FileNotFoundError: a folder or file does not exist, or a folder has no weights.
        ValueError: a file is of no model here, or two are of the same.
    """
    found: dict[str, Path] = {}
    for word in given:
        for name, path, option in _named(word):
            model = find(name, option, TABLE_1_MODELS)
            if model in found:
                raise ValueError(
                    f"--weights: {found[model]} and {path} are both for {model}; name one, as {model}=FILE"
                )
            found[model] = path
    chosen = [model for model in sorted(found, key=order) if only is None or model in only]
    if not chosen:
        raise ValueError(f"--only {' '.join(only or ())}: --weights has only {', '.join(found)}; name some of these")
    return [Weights(model, found[model]) for model in chosen]


def _named(word: str) -> Iterable[tuple[str, Path, str]]:
    """Model's name, file, and what an error about the name says first."""
    name, equals, file = word.partition("=")
    if equals and not Path(word).exists():
        if not Path(file).is_file():
            raise FileNotFoundError(f"--weights {word}: there is no file {file}; give NAME=FILE, or a folder")
        return [(name, Path(file), f"--weights {word}")]
    folder = Path(word)
    if not folder.is_dir():
        what = (
            "is a file; say whose, as NAME=FILE" if folder.is_file() else "does not exist; give a folder or NAME=FILE"
        )
        raise FileNotFoundError(f"--weights {word} {what}")
    files = [path for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES and path.is_file()]
    if not files:
        raise FileNotFoundError(
            f"--weights {word} has no weights; expected files called by a model's name, such as vmamba_tiny.pth "
            f"({', '.join(SUFFIXES)})"
        )
    return [(path.stem, path, f"--weights {path} (rename it, or give NAME=FILE)") for path in files]


def load(weights: Weights) -> nn.Module:
    """The network with these weights, in evaluation, on the CPU; no code of the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or of another network or number of classes.
    """
    if weights.model in PRESETS:
        network = create(weights.model)
        classifier: nn.Module = network.get_classifier()  # type: ignore[operator]
        # A classifier of another size is left out, and nothing could be measured without it: told apart by its NaN.
        for parameter in classifier.parameters():
            nn.init.constant_(parameter, float("nan"))
        load_pretrained(network, str(weights.path), drop_head=True)
        if any(parameter.isnan().all() for parameter in classifier.parameters()):
            raise ValueError(f"{weights.path} has no classifier of 1000 classes; give weights trained on ImageNet-1K")
        return network.eval()
    state = _read(weights.path)
    try:
        # timm's way in for weights at hand: it knows the names that each model's authors used.
        overlay = {"state_dict": state, "num_classes": 1000}
        name = MODELS[weights.model].model or weights.model
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    except (RuntimeError, KeyError, IndexError) as error:
        raise ValueError(
            f"{weights.path} does not fit {weights.model}: {' '.join(str(error).split())[:300]}; give weights of that "
            "network, with 1000 classes"
        ) from error


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        state = load_state_dict(str(path), weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, OSError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as weights ({reason}); get the file again") from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict; expected names and tensors, as torch.save writes them")
    prefix = "network."  # a checkpoint of this project's own training
    if all(name.startswith(prefix) for name in state):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def imagenet_classes() -> list[str]:
    """The 1000 class folders of ImageNet-1K, in the order of the labels."""
    return ImageNetInfo("imagenet-1k").label_names()


def validation_images(root: Path, transform: Callable[[Any], Tensor]) -> FolderImages:
    """The images of `root/val/<class>/`, in the labels' order that all published weights share.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: its class folders are not ImageNet's.
    """
    classes = imagenet_classes()
    expected = f"expected {root}/val/{classes[0]}/*.JPEG and so on, one folder for each of {len(classes)} classes"
    folder = root / "val"
    if not folder.is_dir():
        what = "has no folder val" if root.is_dir() else "is no folder"
        raise FileNotFoundError(f"--data-root: {root} {what}; {expected}")
    there = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")}
    lacking, besides = sorted(set(classes) - there), sorted(there - set(classes))
    if lacking or besides:
        wrong = [f"lacks {len(lacking)} classes, such as {lacking[0]}"] * bool(lacking)
        wrong += [f"has {len(besides)} others, such as {besides[0]}"] * bool(besides)
        raise ValueError(f"--data-root: {folder} {' and '.join(wrong)}; {expected}")
    return FolderImages(folder, classes, transform)


def data_config(model: str) -> dict[str, Any]:
    """How images are prepared for a model: what timm has of its weights, or the paper's 256 and centre crop of 224."""
    return resolve_data_config(model=without_weights(lambda: create(model)))


def evaluate(
    weights: Sequence[Weights],
    root: Path,
    device: torch.device,
    kept: Kept,
    where: dict[str, str],
    command: str,
    batch: int,
    workers: int,
    again: bool = False,
    progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda batches, name: batches,
) -> Iterator[Row]:
    """Measures the top-1 of each file of weights and yields its row, which is kept by then.

    All files and the images are looked at before the first is measured. A file that was measured at this very place
    on as many images is not measured again, if the commit says which code did it.

    Args:
        weights: the files.
        root: with the layout `val/<class>/*.JPEG`.
        device: where networks run, in float32.
        kept: where rows go.
        where: columns of `kept.ENVIRONMENT`.
        command: that the row names.
        batch: images of a forward.
        workers: processes that load images.
        again: whether to measure what was measured.
        progress: shows the batches going by.

    Raises:
        FileNotFoundError: images or weights are missing.
        ValueError: images or weights are not what was expected, or a network's outputs are not finite.
    """
    todo = []
    for entry in weights:
        load(entry)
        config = data_config(entry.model)
        images = validation_images(root, create_transform(**config, is_training=False))
        if len(images) != VAL_IMAGES:
            log.warning("%s has %d images; ImageNet's validation set has %d", root / "val", len(images), VAL_IMAGES)
        row = {
            "model": entry.model,
            "file": entry.path.name,
            "sha256": entry.sha256,
            "images": len(images),
            "image_size": config["input_size"][-1],
            "crop_pct": config["crop_pct"],
            "interpolation": config["interpolation"],
            "precision": "float32",
        }
        todo.append((entry, images, row))
    for entry, images, row in todo:
        same = next((old for old in kept.read() if old["model"] == entry.model), None)
        told = {name: str(value) for name, value in row.items()}
        finished = same and told.items() <= same.items() and place(same) == tuple(where.values())
        if same and finished and not again and names_code(where["commit"]):
            yield same
            continue
        loader = DataLoader(images, batch, num_workers=workers, pin_memory=device.type == "cuda")
        top1 = 100 * accuracy(load(entry).to(device), progress(loader, entry.model), device)
        yield kept.put({**row, "top1": f"{top1:.3f}", "command": command}, where)


@torch.inference_mode()
def accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> float:
    """The share of images whose most likely class is the right one.

    Args:
        network: images (B, 3, H, W) to logits (B, 1000), on `device`.
        batches: images and labels (B,).
        device: where to compute.

    Raises:
        ValueError: logits are not finite.
    """
    found = MulticlassAccuracy(1000, average="micro", validate_args=False).to(device)
    for images, labels in batches:
        logits = network(images.to(device, non_blocking=True))
        if not logits.isfinite().all():
            raise ValueError("the network's outputs are not finite: its weights hold NaN or inf; get the file again")
        found.update(logits, labels.to(device, non_blocking=True))
    return float(found.compute())
