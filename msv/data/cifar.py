"""CIFAR-10 and CIFAR-100, read and checked by torchvision."""

import logging
from abc import abstractmethod
from pathlib import Path

import torch
from filelock import FileLock
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from msv.data.in_memory import InMemoryData, Labelled

log = logging.getLogger(__name__)

CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""


class CIFAR(InMemoryData):
    """60,000 colour photos, 32x32 px: 45,000 to train, 5,000 to validate, 10,000 to test.

    The validation images are a stratified part of the 50,000 training images, always the same ones.

    Args:
        root: Folder that has, or is to get, torchvision's `cifar-10-batches-py/` or `cifar-100-python/`.
        download: Download into `root` what is not found.
        image_size: Side of the network's input in pixels; at least 32, the photos' own size.
        batch_size: Images in a batch, for each device.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        seed: Seed of order and augmentation; the training's seed if not set. The split has its own.
        val_images: Training images held out for validation.
        max_shift: Largest random shift of a training image, as a fraction of its side (0.125 is the usual padding by 4
            of 32 px); 0 for none.
        hflip: Probability of mirroring a training image; 0 for never.
        pin_memory: Copy batches to page-locked memory; without a CUDA device this does nothing.
        predict_paths: Image files or folders that `predict` reads.

    Raises:
        ValueError: if a number is out of its range.
    """

    in_chans = 3
    classes: str  # names in the order of the labels, with spaces between

    def __init__(
        self,
        root: str = "data",
        download: bool = True,
        image_size: int = 32,
        batch_size: int = 128,
        num_workers: int = 2,
        seed: int = 0,
        val_images: int = 5000,
        max_shift: float = 0.125,
        hflip: float = 0.5,
        pin_memory: bool = True,
        predict_paths: list[str] | None = None,
    ):
        super().__init__(
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            val_images=val_images,
            max_shift=max_shift,
            hflip=hflip,
            pin_memory=pin_memory,
            predict_paths=predict_paths,
        )
        self.root = root
        self.download = download
        self.class_names = self.classes.split()

    @property
    @abstractmethod
    def source(self) -> type[datasets.CIFAR10]:
        """Torchvision's class."""

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return Path(self.root) / self.source.base_folder

    def prepare_data(self) -> None:
        """Downloads the files if some are missing and `download` is set.

        Raises:
            OSError: if files are missing and not downloaded.
        """
        if not self._missing():
            return
        if not self.download:
            raise FileNotFoundError(f"{self._not_found()}, or set --data.download true")
        try:
            Path(self.root).mkdir(parents=True, exist_ok=True)
            with FileLock(Path(self.root) / ".download.lock"):  # cells of a grid may start at once
                if self._missing():
                    log.info("downloading %s (170 MB) to %s", self.name, self.root)
                    self.source(self.root, download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())  # torchvision's has several lines
            raise OSError(f"{self._not_found()}; downloading to {self.root} failed: {reason}") from error

    def read(self) -> tuple[Labelled, Labelled]:
        """Reads the pickled batches, whose MD5 sums torchvision checks before it unpickles anything.

        Raises:
            FileNotFoundError: if files are missing.
            ValueError: if one is damaged.
        """
        if self._missing():
            raise FileNotFoundError(self._not_found())
        return self._read_part(train=True), self._read_part(train=False)

    def _read_part(self, train: bool) -> Labelled:
        try:
            part = self.source(self.root, train=train)
        except RuntimeError as error:
            damaged = [str(self.folder / name) for name, md5 in self._files().items() if not self._intact(name, md5)]
            raise ValueError(
                f"damaged, by the MD5 sum: {', '.join(damaged) or self.folder}; replace with the original file, or "
                "remove it to have it downloaded"
            ) from error
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return Labelled(images, torch.tensor(part.targets), f"{self.folder} ({'train' if train else 'test'})")

    def _files(self) -> dict[str, str]:
        """Names and MD5 sums of all files."""
        meta = self.source.meta
        return {**dict([*self.source.train_list, *self.source.test_list]), meta["filename"]: meta["md5"]}

    def _intact(self, name: str, md5: str) -> bool:
        return check_integrity(str(self.folder / name), md5)

    def _missing(self) -> list[str]:
        return [name for name in self._files() if not (self.folder / name).is_file()]

    def _not_found(self) -> str:
        return (
            f"{self.name} is not in {self.root}: {self.folder} lacks {', '.join(self._missing())}; give the folder "
            f"that has {self.source.base_folder}/ with --data.root, or unpack {self.source.filename} there"
        )


class CIFAR10(CIFAR):
    """CIFAR-10: photos of 10 classes; sizes, splits and arguments as in `CIFAR`."""

    num_classes = 10
    name = "CIFAR-10"
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)
    source = datasets.CIFAR10
    classes = "airplane automobile bird cat deer dog frog horse ship truck"


class CIFAR100(CIFAR):
    """CIFAR-100: photos of 100 classes; sizes, splits and arguments as in `CIFAR`."""

    num_classes = 100
    name = "CIFAR-100"
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)
    source = datasets.CIFAR100
    classes = CIFAR100_CLASSES
