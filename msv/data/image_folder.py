"""Folders of images in ImageNet's layout, with timm's transforms."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from msv.data.base import ImageData, ImageSet, Splits
from msv.data.image_paths import find_images, read_image
from msv.data.sampling import AUGMENT, seeded

SHOWN = 5  # class names that an error lists


class FolderImages(ImageSet):
    """The labelled image files of one split.

    Args:
        folder: Has a folder for each class.
        class_names: The class folders, in the order of the labels.
        transform: What makes a decoded image the network's input.
        seed: The training's seed where the transform is random, else None.

    Raises:
        ValueError: naming the class folders that have no images.
    """

    def __init__(
        self,
        folder: Path,
        class_names: list[str],
        transform: Callable[[Image.Image], Tensor],
        seed: int | None = None,
    ):
        found = {name: find_images(folder / name) for name in class_names}
        empty = [name for name, files in found.items() if not files]
        if empty:
            raise ValueError(
                f"{len(empty)} class folder(s) of {folder} have no images: {_some(empty)}; "
                "put images there (.JPEG, .png, ...), or remove these folders from every split"
            )
        # One array rather than a million str: workers do not copy it by counting references.
        self.files = np.array([os.fsencode(file) for files in found.values() for file in files])
        self.labels = np.repeat(np.arange(len(found)), [len(files) for files in found.values()])
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = index if isinstance(index, tuple) else (0, index)
        image = read_image(os.fsdecode(self.files[index]), "RGB")
        label = int(self.labels[index])
        if self.seed is None:
            return self.transform(image), label
        with seeded(AUGMENT, self.seed, epoch, index):
            return self.transform(image), label


class ImageFolder(ImageData):
    """Images in ImageNet's layout: `root/train/<class>/*.JPEG`, `root/val/<class>/*`, perhaps `root/test/<class>/*`.

    Without a `test` folder the test split is `val`, as papers report ImageNet. The classes are the folders' names,
    sorted. The defaults are the published recipe's augmentation (its code; ImageNet-1K, 224 px).

    Args:
        root: Folder that has `train` and `val`; never written to.
        image_size: Side of the network's input in pixels; at least 32.
        batch_size: Images in a batch, for each device.
        num_workers: Processes that load images, for each device.
        seed: Seed of order and augmentation; the training's seed if not set.
        scale: Smallest and largest part of the image's area that a random crop takes.
        ratio: Smallest and largest ratio of width to height of a random crop.
        hflip: Probability of mirroring a training image.
        color_jitter: Strength of colour jitter. It acts only with `auto_augment: null`: beside RandAugment timm leaves
            it out, and so did the published training.
        auto_augment: timm's policy, such as `rand-m9-mstd0.5-inc1` (RandAugment of magnitude 9), or null for none.
        interpolation: How images are resized.
        re_prob: Probability of random erasing.
        re_mode: What erased parts get: noise (`pixel`), one random colour (`rand`), or the mean colour (`const`).
        re_count: Most parts erased of one image.
        crop_pct: Part of the evaluation image that the centre crop takes: 0.875 resizes the shorter side to 256 for
            224 px.
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        pin_memory: Copy batches to page-locked memory; without a CUDA device this does nothing.
        predict_paths: Image files or folders that `predict` reads.

    Raises:
        FileNotFoundError: if `root`, `train` or `val` is missing or has no class folders.
        ValueError: if the splits' classes differ, or a number or the policy is not valid.
    """

    in_chans = 3

    def __init__(
        self,
        root: str,
        image_size: int = 224,
        batch_size: int = 128,
        num_workers: int = 8,
        seed: int = 0,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        color_jitter: float = 0.4,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
        re_prob: float = 0.25,
        re_mode: Literal["pixel", "rand", "const"] = "pixel",
        re_count: int = 1,
        crop_pct: float = 0.875,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        pin_memory: bool = True,
        predict_paths: list[str] | None = None,
    ):
        super().__init__(image_size, batch_size, num_workers, seed, pin_memory, predict_paths)
        _check_range("scale", scale, 0.001, 1)
        _check_range("ratio", ratio, 0.01, 100)
        _check_range("hflip", (hflip,), 0, 1)
        _check_range("re_prob", (re_prob,), 0, 1)
        _check_range("re_count", (re_count,), 1, 100)
        _check_range("crop_pct", (crop_pct,), 0.01, 1)
        self.root = Path(root)
        self.scale = scale
        self.ratio = ratio
        self.hflip = hflip
        self.color_jitter = color_jitter
        self.auto_augment = auto_augment
        self.interpolation = interpolation
        self.re_prob = re_prob
        self.re_mode = re_mode
        self.re_count = re_count
        self.crop_pct = crop_pct
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.train_transform()
        self.name = f"ImageNet layout: {self.root.resolve().name}"
        self.class_names = self._find_classes()
        self.num_classes = len(self.class_names)

    @property
    def has_test(self) -> bool:
        """Whether there is a `test` folder; else the test split is `val`."""
        return (self.root / "test").is_dir()

    def train_transform(self) -> Callable[[Image.Image], Tensor]:
        """Makes the training transform of timm.

        Raises:
            ValueError: if `auto_augment` is no policy of timm's.
        """
        try:
            return create_transform(
                self.image_size,
                is_training=True,
                scale=self.scale,
                ratio=self.ratio,
                hflip=self.hflip,
                color_jitter=self.color_jitter,
                auto_augment=self.auto_augment,
                interpolation=self.interpolation,
                re_prob=self.re_prob,
                re_mode=self.re_mode,
                re_count=self.re_count,
                mean=self.mean,
                std=self.std,
            )
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(
                f"auto_augment={self.auto_augment!r} is no policy that timm knows; expected one such as "
                "'rand-m9-mstd0.5-inc1', 'augmix-m3' or 'original', or null for none"
            ) from error

    def eval_transform(self) -> Callable[[Image.Image], Tensor]:
        """The evaluation transform of timm: resize to `image_size / crop_pct`, centre crop, normalise."""
        return create_transform(
            self.image_size,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            mean=self.mean,
            std=self.std,
        )

    def augmentation(self) -> dict[str, Any]:
        """The arguments of timm's transforms; `color_jitter` is None where it does not act."""
        return {
            "scale": list(self.scale),
            "ratio": list(self.ratio),
            "hflip": self.hflip,
            "color_jitter": None if self.auto_augment else self.color_jitter,
            "auto_augment": self.auto_augment,
            "interpolation": self.interpolation,
            "re_prob": self.re_prob,
            "re_mode": self.re_mode,
            "re_count": self.re_count,
            "crop_pct": self.crop_pct,
        }

    @property
    def test_split(self) -> Literal["test", "val"]:
        """`test` where there is such a folder, else `val`."""
        return "test" if self.has_test else "val"

    def note(self) -> str | None:
        """What test means here, where it is not a split of its own."""
        return None if self.has_test else "top-1 is of the val split; there is no test split"

    def load_splits(self) -> Splits:
        """Lists the images of each class; they are decoded when they are needed.

        Raises:
            ValueError: naming the class folders that have no images.
        """
        train = FolderImages(self.root / "train", self.class_names, self.train_transform(), self.seed)
        val = FolderImages(self.root / "val", self.class_names, self.eval_transform())
        if not self.has_test:
            return Splits(train, val, val)
        return Splits(train, val, FolderImages(self.root / "test", self.class_names, self.eval_transform()))

    def _find_classes(self) -> list[str]:
        """Class folders of `train`, after a check that the other splits have the same."""
        expected = f"expected {self.root}/train/<class>/*.JPEG and {self.root}/val/<class>/*.JPEG"
        if not self.root.is_dir():
            what = "is not a folder" if self.root.exists() else "does not exist"
            raise FileNotFoundError(f"the image root {self.root} {what}; {expected}: set --data.root")
        classes: list[str] = []
        for split in ["train", "val"] + ["test"] * self.has_test:
            folder = self.root / split
            if not folder.is_dir():
                raise FileNotFoundError(f"{self.root} has no {split} folder; {expected}")
            found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
            if not found:
                raise FileNotFoundError(
                    f"{folder} has no class folders; {expected}: sort its images into one folder a class"
                )
            if split == "train":
                classes = found
            elif found != classes:
                lacks, extra = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
                differences = [f"lacks {_some(lacks)}"] * bool(lacks) + [f"has {_some(extra)} besides"] * bool(extra)
                raise ValueError(
                    f"the classes of {folder} differ from those of {self.root / 'train'}: it "
                    f"{', and '.join(differences)}; expected the same class folders in every split: add or remove some"
                )
        if len(classes) < 2:
            raise ValueError(f"{self.root / 'train'} has one class folder, {classes[0]}; expected two or more")
        return classes


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > SHOWN else "")


def _check_range(name: str, values: tuple[float, ...], low: float, high: float) -> None:
    if not all(low <= value <= high for value in values) or list(values) != sorted(values):
        shown = values[0] if len(values) == 1 else values
        order = "" if len(values) == 1 else ", the smaller number first"
        raise ValueError(f"{name}={shown} is out of range; expected {low} to {high}{order}")
