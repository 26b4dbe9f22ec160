"""Fashion-MNIST, read from its own IDX files: torchvision's folder, or a flat one such as Debian's package has."""

import gzip
import logging
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torchvision import datasets

from msv.data.in_memory import InMemoryData, Labelled

log = logging.getLogger(__name__)

DOWNLOAD_ROOT = Path("data")
DEBIAN_ROOT = Path("/usr/share/datasets/fashion-mnist")  # apt install dataset-fashion-mnist

TRAIN_FILES = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
TEST_FILES = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"


def find_file(folder: Path, name: str) -> Path | None:
    """`name` or `name`.gz in the folder, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_idx(path: Path, dims: int) -> Tensor:
    """Reads an IDX file of unsigned bytes, gzip or not.

    Args:
        path: The file; gzip if its name ends in .gz.
        dims: Dimensions it must have: 3 for images (N, h, w), 1 for labels (N,).

    Raises:
        ValueError: naming the file, if it is damaged, truncated or of another format.
    """
    fix = "replace it with the original file, or remove it to have it downloaded"
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path}: {error}; {fix}") from error
    start = 4 + 4 * dims
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions; then each dimension, big-endian.
    if len(data) < start or data[:4] != bytes([0, 0, 8, dims]):
        raise ValueError(
            f"{path} is no IDX file of unsigned bytes in {dims} dimension(s): it begins {data[:4]!r}; {fix}"
        )
    shape = np.frombuffer(data, ">u4", count=dims, offset=4).tolist()
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"{path} has {len(data) - start} bytes of data where its header says {math.prod(shape)} ({shape}); {fix}"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=start).reshape(shape).copy())


class FashionMNIST(InMemoryData):
    """70,000 grey images of clothes, 28x28 px, 10 classes: 55,000 to train, 5,000 to validate, 10,000 to test.

    The validation images are a stratified part of the 60,000 training images, always the same ones.

    Args:
        root: Folder of the data, in either layout: torchvision's (`root/FashionMNIST/raw/`), or the four files flat in
            `root`, gzip or not, as Debian's package `dataset-fashion-mnist` installs them. Not set: `data` here, then
            `/usr/share/datasets/fashion-mnist`, then downloaded to `data`.
        download: Download into `root` what is not found. A folder that has the files is never written to.
        image_size: Side of the network's input in pixels; at least 32. At 32 the third stage, which has most blocks,
            sees 2x2 maps and its half-resolution routes a single cell, so that scanning at two scales could hardly
            matter; at 64 these are 4x4 and 2x2.
        batch_size: Images in a batch, for each device.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        seed: Seed of order and augmentation; the training's seed if not set. The split has its own.
        val_images: Training images held out for validation.
        max_shift: Largest random shift of a training image, as a fraction of its side; 0 for none.
        hflip: Probability of mirroring a training image; 0 for never.
        pin_memory: Copy batches to page-locked memory; without a CUDA device this does nothing.
        predict_paths: Image files or folders that `predict` reads: light clothes on a dark ground, read as grey.

    Raises:
        ValueError: if a number is out of its range.
    """

    num_classes = 10
    in_chans = 1
    name = "Fashion-MNIST"
    mean = (0.2860,)
    std = (0.3530,)

    def __init__(
        self,
        root: str | None = None,
        download: bool = True,
        image_size: int = 64,
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
            image_size, batch_size, num_workers, seed, val_images, max_shift, hflip, pin_memory, predict_paths
        )
        self.root = root
        self.download = download
        self.class_names = list(datasets.FashionMNIST.classes)

    def prepare_data(self) -> None:
        """Downloads the files if they are not found and `download` is set.

        Raises:
            OSError: if they are not found and not downloaded.
            ValueError: if only some of the four files are in `root`.
        """
        if self.find() is not None:
            return
        target = DOWNLOAD_ROOT if self.root is None else Path(self.root)
        if not self.download:
            raise FileNotFoundError(f"{self._not_found()}, or set --data.download true")
        try:
            target.mkdir(parents=True, exist_ok=True)
            with FileLock(target / ".download.lock"):  # cells of a grid may start at once
                if self.find() is None:
                    log.info("downloading Fashion-MNIST (30 MB) to %s", target)
                    datasets.FashionMNIST(target, download=True)
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())  # torchvision's has several lines
            raise OSError(f"{self._not_found()}; downloading to {target} failed: {reason}") from error

    def find(self) -> Path | None:
        """The folder that has the four files, or None.

        Raises:
            ValueError: if a flat folder has some of them.
        """
        roots = [DOWNLOAD_ROOT, DEBIAN_ROOT] if self.root is None else [Path(self.root)]
        names = TRAIN_FILES + TEST_FILES
        for root in roots:
            for folder in (root / "FashionMNIST" / "raw", root):
                missing = [name for name in names if find_file(folder, name) is None]
                if not missing:
                    return folder
                # An interrupted download is in torchvision's layout and goes on by itself.
                if folder == root and len(missing) < len(names):
                    raise ValueError(
                        f"{root} lacks {', '.join(missing)} of Fashion-MNIST (.gz or not); copy what is missing there, "
                        "or give another --data.root to download to"
                    )
        return None

    def read(self) -> tuple[Labelled, Labelled]:
        """Reads the four files.

        Raises:
            FileNotFoundError: if they are not there.
            ValueError: if one is damaged.
        """
        folder = self.find()
        if folder is None:
            raise FileNotFoundError(self._not_found())
        return self._read_part(folder, *TRAIN_FILES), self._read_part(folder, *TEST_FILES)

    def _not_found(self) -> str:
        where = f"{DOWNLOAD_ROOT} or {DEBIAN_ROOT}" if self.root is None else self.root
        names = ", ".join(TRAIN_FILES + TEST_FILES)
        return (
            f"Fashion-MNIST is not in {where}; expected {names} (.gz or not) there or in its FashionMNIST/raw; "
            "give the folder that has them with --data.root, or install Debian's dataset-fashion-mnist"
        )

    def _read_part(self, folder: Path, images_name: str, labels_name: str) -> Labelled:
        images_file, labels_file = find_file(folder, images_name), find_file(folder, labels_name)
        if images_file is None or labels_file is None:
            raise FileNotFoundError(self._not_found())
        images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
        if len(images) != len(labels):
            raise ValueError(
                f"{images_file} has {len(images)} images and {labels_file} has {len(labels)} labels; expected as many: "
                "replace both with the original files"
            )
        return Labelled(images[:, None], labels.long(), str(labels_file))
