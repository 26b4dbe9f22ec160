"""Small data sets: all images in memory as one tensor, whole batches resized, augmented and normalised at once."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision import transforms

from msv.data.base import ImageData, ImageSet, Splits
from msv.data.sampling import AUGMENT, hold_out, split_index, uniform


@dataclass(frozen=True)
class ShiftFlip:
    """Random translation (as padding and cropping) and mirroring of a batch, drawn for each image by itself.

    Attributes:
        max_shift: Largest shift either way, as a fraction of the image's side; what comes in from outside is black.
        hflip: Probability of mirroring left to right.
        seed: The training's seed.
    """

    max_shift: float
    hflip: float
    seed: int

    def __call__(self, images: Tensor, epochs: Any, indices: Any) -> Tensor:
        """Augments images (B, C, S, S) in [0, 1], whose draws are keyed by (seed, epoch, index), arrays (B,)."""
        batch, channels, size, _ = images.shape
        keyed = uniform(AUGMENT, self.seed, epochs[:, None], indices[:, None], torch.arange(3).numpy())
        draws = on_device(torch.from_numpy(keyed), images.device)
        margin = int(self.max_shift * size)
        offsets = (draws[:, :2] * (2 * margin + 1)).long()  # (B, 2), from 0 to 2 margin
        line = torch.arange(size, device=images.device)
        rows = offsets[:, :1] + line  # (B, S), in the padded image
        columns = offsets[:, 1:] + torch.where(draws[:, 2:] < self.hflip, line.flip(0), line)
        padded = F.pad(images, (margin,) * 4)
        cells = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]  # (B, S, S)
        cells = cells.view(batch, 1, -1).expand(-1, channels, -1)
        return padded.flatten(2).gather(2, cells).view(batch, channels, size, size)


class TensorImages(ImageSet):
    """Labelled images of one tensor.

    Args:
        images: uint8 (N, C, h, w).
        labels: int64 (N,).
        image_size: Side of the images given out; they are resized to it (bicubic).
        mean: Mean of each channel, of values in [0, 1].
        std: Standard deviation of each channel.
        augment: What changes training images, or None.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        augment: ShiftFlip | None = None,
    ):
        self.images = images
        self.labels = labels
        self.size = (image_size, image_size)
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)
        self.augment = augment

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> None:
        """Moves the images; batches are made and given out where they lie."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def __getitems__(self, batch: Sequence[int | tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """A whole batch, (images float32 (B, C, S, S), labels (B,)); the DataLoader calls this where it exists."""
        epochs, indices = split_index(batch)
        chosen = on_device(torch.from_numpy(indices), self.images.device)
        images = self.images[chosen].float() / 255
        if images.shape[-2:] != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp_(0, 1)
        if self.augment is not None:
            images = self.augment(images, epochs, indices)
        return (images - self.mean) / self.std, self.labels[chosen]

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; a GPU is not waited for, which page-locked memory takes."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The collate function of data that comes in batches."""
    return batch


@dataclass(frozen=True)
class Labelled:
    """Images uint8 (N, C, h, w) with labels int64 (N,), and the file that errors name."""

    images: Tensor
    labels: Tensor
    source: str


class InMemoryData(ImageData):
    """Base of the data modules that hold their images in memory: the GPU's where one GPU or several train.

    On a GPU its own process picks, resizes and augments whole batches there, with the draws that a CPU would make, and
    neither workers nor page-locked copies are needed.

    A subclass fills in `read` and sets `mean` and `std`, beside what `ImageData` asks for.

    Args:
        image_size: Side of the network's input in pixels; at least 32.
        batch_size: Images in a batch, for each device.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        seed: Seed of order and augmentation.
        val_images: Images held out of the training images for validation, always the same ones.
        max_shift: Largest random shift of a training image, as a fraction of its side; 0 for none.
        hflip: Probability of mirroring a training image; 0 for never.
        pin_memory: Copy batches to page-locked memory.
        predict_paths: Image files or folders that `predict` reads.

    Raises:
        ValueError: if a number is out of its range.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    split_seed: int = 0
    collate = staticmethod(as_it_is)

    def __init__(
        self,
        image_size: int,
        batch_size: int,
        num_workers: int,
        seed: int,
        val_images: int,
        max_shift: float,
        hflip: float,
        pin_memory: bool,
        predict_paths: list[str] | None,
    ):
        super().__init__(image_size, batch_size, num_workers, seed, pin_memory, predict_paths)
        if not 0 <= max_shift <= 0.5:
            raise ValueError(f"max_shift={max_shift} is a fraction of the image's side; expected 0 to 0.5")
        if not 0 <= hflip <= 1:
            raise ValueError(f"hflip={hflip} is a probability; expected 0 to 1")
        if val_images < 1:
            raise ValueError(f"val_images={val_images} leaves nothing to validate on; set --data.val_images 1 or more")
        self.val_images = val_images
        self.max_shift = max_shift
        self.hflip = hflip

    @abstractmethod
    def read(self) -> tuple[Labelled, Labelled]:
        """The images for training and validation together, and the test images."""

    def divide(self, rest: Labelled) -> tuple[Tensor, Tensor]:
        """Which of the images are for training, and which for validation: a stratified part, always the same."""
        return hold_out(rest.labels, self.val_images, self.split_seed)

    def load_splits(self) -> Splits:
        """Reads the images, checks their labels, and holds out the validation images class by class.

        Raises:
            OSError: if a file is missing.
            ValueError: if a file is damaged, a label is out of range, or there are too few images.
        """
        rest, test = self.read()
        for part in (rest, test):
            self._check_labels(part)
        if self.val_images >= len(rest.labels):
            raise ValueError(
                f"val_images={self.val_images} leaves none of the {len(rest.labels)} images of {rest.source} to train "
                f"on; set --data.val_images to less"
            )
        train, val = self.divide(rest)
        augment = ShiftFlip(self.max_shift, self.hflip, self.seed)
        return Splits(
            self._images(rest.images[train], rest.labels[train], augment),
            self._images(rest.images[val], rest.labels[val]),
            self._images(test.images, test.labels),
        )

    def eval_transform(self) -> Callable[[Image.Image], Tensor]:
        """Shorter side to `image_size` (bicubic), the square in the middle, normalised; exactly as in validation."""
        return transforms.Compose(
            [
                transforms.ToTensor(),  # first: Pillow would resize in 8 bits
                transforms.Resize(self.image_size, transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(self.image_size),
                partial(torch.clamp, min=0, max=1),
                transforms.Normalize(self.mean, self.std),
            ]
        )

    def augmentation(self) -> dict[str, Any]:
        """Settings of `ShiftFlip`."""
        return {"max_shift": self.max_shift, "hflip": self.hflip}

    def _keep_on_device(self, dataset: ImageSet) -> bool:
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if isinstance(dataset, TensorImages):
            dataset.to(device if device.type == "cuda" else torch.device("cpu"))
        return device.type == "cuda"

    def _images(self, images: Tensor, labels: Tensor, augment: ShiftFlip | None = None) -> TensorImages:
        return TensorImages(images, labels, self.image_size, self.mean, self.std, augment)

    def _check_labels(self, part: Labelled) -> None:
        if len(part.labels) == 0:
            raise ValueError(f"{part.source} has no images; replace it with the original file")
        wrong = (part.labels < 0) | (part.labels >= self.num_classes)
        if wrong.any():
            at = int(wrong.nonzero()[0])
            raise ValueError(
                f"label {int(part.labels[at])} of image {at} in {part.source} is out of range; expected 0 to "
                f"{self.num_classes - 1} for {self.name}: replace the file with the original"
            )
