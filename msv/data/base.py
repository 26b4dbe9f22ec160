"""What every data module of msv has in common: loaders, seeds, splits, the summary in a record."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from msv.data.image_paths import ImagePaths
from msv.data.sampling import WORKERS, EpochLoader, EpochSampler, ShardSampler, generator

MIN_IMAGE_SIZE = 32


class ImageSet(Dataset):
    """Labelled images, (image float32 (C, H, W) normalised, label) each, indexed by an int or by (epoch, int)."""

    @abstractmethod
    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Splits:
    """The three data sets of a data module; `train` alone is augmented."""

    train: ImageSet
    val: ImageSet
    test: ImageSet


class ImageData(LightningDataModule, ABC):
    """Base of the data modules: batches are (images float32 (B, C, H, W) normalised, labels int64 (B,)).

    A subclass sets `num_classes`, `in_chans`, `class_names` and `name` at the latest in its constructor, and fills in
    `load_splits`, `eval_transform`, `augmentation` and, where something can be downloaded, `prepare_data`.

    The order of the training images and their augmentation depend on (seed, epoch, image) alone: not on the number of
    workers, not on the global random state, and not on whether the run was interrupted between epochs.

    Args:
        image_size: Height and width of the images that the network gets, in pixels; at least 32.
        batch_size: Images in a batch, for each device.
        num_workers: Processes that load images; 0 loads in the training process.
        seed: Seed of order and augmentation; never of the split.
        pin_memory: Copy batches to page-locked memory; without a CUDA device this does nothing.
        predict_paths: Image files or folders that `predict` reads.

    Raises:
        ValueError: if a number is out of its range.
    """

    num_classes: int
    in_chans: int
    class_names: list[str]
    name: str
    collate: Callable | None = None  # None is torch's own

    def __init__(
        self,
        image_size: int,
        batch_size: int,
        num_workers: int,
        seed: int,
        pin_memory: bool,
        predict_paths: list[str] | None,
    ):
        super().__init__()
        if image_size < MIN_IMAGE_SIZE:
            raise ValueError(
                f"image_size={image_size} is too small: the network halves the map five times, so it needs at least "
                f"{MIN_IMAGE_SIZE} px; smaller images are enlarged, set --data.image_size {MIN_IMAGE_SIZE} or more"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is not a batch; set --data.batch_size 1 or more")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} is negative; set --data.num_workers 0 (no workers) or more")
        self.image_size = image_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.pin_memory = pin_memory
        self.predict_paths = predict_paths
        self._splits: Splits | None = None

    @abstractmethod
    def load_splits(self) -> Splits:
        """Reads the three splits.

        Raises:
            OSError: if a file or folder is missing.
            ValueError: if what is there is not what was expected.
        """

    @abstractmethod
    def eval_transform(self) -> Callable[[Image.Image], Tensor]:
        """What makes an image file of any size the network's input (C, H, W), as in validation."""

    @abstractmethod
    def augmentation(self) -> dict[str, Any]:
        """The settings of the training images' augmentation, as JSON values."""

    @property
    def test_split(self) -> Literal["test", "val"]:
        """The split that `test` and the tables' top-1 are of."""
        return "test"

    def note(self) -> str | None:
        """One sentence that tables of this data must carry, if there is one."""
        return None

    @property
    def splits(self) -> Splits:
        """The three data sets, read when first asked for."""
        if self._splits is None:
            self._splits = self.load_splits()
        return self._splits

    def setup(self, stage: str | None = None) -> None:
        """Reads the data once; `predict` needs none of it."""
        if stage != "predict":
            _ = self.splits

    def check(self) -> None:
        """Makes the data ready (downloading it if that is asked for) or says what is wrong, before anything trains.

        Raises:
            OSError: if a file, folder or split is missing and cannot be had.
            ValueError: if what is there is not what was expected, or is less than one batch.
        """
        self.prepare_data()
        self.setup("fit")
        self._train_sampler()

    def summary(self) -> dict[str, Any]:
        """What a record says of its data, as JSON values: sizes, splits, augmentation, and `note` (or None)."""
        return {
            "name": self.name,
            "train_images": len(self.splits.train),
            "val_images": len(self.splits.val),
            "test_images": len(self.splits.test),
            "test_split": self.test_split,
            "image_size": self.image_size,
            "num_classes": self.num_classes,
            "in_chans": self.in_chans,
            "augmentation": self.augmentation(),
            "note": self.note(),
        }

    def train_dataloader(self) -> DataLoader:
        """Batches in an order that is new each epoch; the incomplete last batch is dropped."""
        return self._loader(self.splits.train, self._train_sampler(), drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Every validation image once, in order."""
        return self._loader(self.splits.val, ShardSampler(self.splits.val, *self._replica()))

    def test_dataloader(self) -> DataLoader:
        """Every test image once, in order."""
        return self._loader(self.splits.test, ShardSampler(self.splits.test, *self._replica()))

    def predict_dataset(self, paths: Sequence[str | Path]) -> ImagePaths:
        """The images of files and folders, prepared as for validation; see `ImagePaths`."""
        return ImagePaths(paths, self.eval_transform(), mode="L" if self.in_chans == 1 else "RGB")

    def predict_dataloader(self) -> DataLoader:
        """Batches (images, indices into the data set's `paths`) of `predict_paths`.

        Raises:
            ValueError: if there are no `predict_paths`.
        """
        if not self.predict_paths:
            raise ValueError("predict has no images: give files or folders, --data.predict_paths '[photo.jpg, folder]'")
        # Lightning puts its own sampler in, which also keeps each image once over several devices.
        return DataLoader(
            self.predict_dataset(self.predict_paths),
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory and torch.cuda.is_available(),
            generator=generator(WORKERS, self.seed),
        )

    def _replica(self) -> tuple[int, int]:
        return (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)

    def _train_sampler(self) -> EpochSampler:
        sampler = EpochSampler(self.splits.train, *self._replica(), seed=self.seed)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} is more than the {len(sampler)} training images that one device gets; "
                f"incomplete batches are dropped, so nothing would be trained: set --data.batch_size {len(sampler)} "
                "or less"
            )
        return sampler

    def _keep_on_device(self, dataset: ImageSet) -> bool:
        """Puts a data set on the training's device, where that can be; returns whether it is a GPU's now."""
        return False

    def _loader(self, dataset: ImageSet, sampler: EpochSampler | ShardSampler, drop_last: bool = False) -> DataLoader:
        on_gpu = self._keep_on_device(dataset)
        workers = 0 if on_gpu else self.num_workers
        return EpochLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            collate_fn=self.collate,
            pin_memory=self.pin_memory and torch.cuda.is_available() and not on_gpu,
            drop_last=drop_last,
            persistent_workers=workers > 0,
            # Its own generator: an iterator draws a base seed, which must not move the training's random state.
            generator=generator(WORKERS, self.seed),
        )
