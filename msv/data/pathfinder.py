"""Pathfinder, the long-range task: are two dots joined by a dashed path, among others? Drawn here, not downloaded."""

import json
import logging
import zlib
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from msv.data.dashed_paths import Layout, draw
from msv.data.in_memory import InMemoryData, Labelled
from msv.data.sampling import PICTURES, random_bits
from msv.files import write_atomic

log = logging.getLogger(__name__)

SIZES = range(64, 257, 32)
DRAWING = 1  # counts the changes of what is drawn for the same settings


@dataclass(frozen=True)
class Level:
    """A difficulty: how long the two paths are, and among how many others, at 64 px."""

    dashes: int
    distractors: int
    distractor_dashes: int


LEVELS = {1: Level(4, 2, 2), 2: Level(6, 3, 2), 3: Level(8, 4, 3), 4: Level(10, 5, 3), 5: Level(12, 6, 3)}


def layout_of(image_size: int, difficulty: int) -> Layout:
    """What pictures of a size and difficulty hold.

    Raises:
        ValueError: if there is no such size or difficulty.
    """
    if image_size not in SIZES:
        raise ValueError(
            f"image_size={image_size} is not drawn; expected a multiple of {SIZES.step} from {SIZES[0]} to {SIZES[-1]} "
            "px: set --data.image_size 64 or 128"
        )
    if difficulty not in LEVELS:
        raise ValueError(f"difficulty={difficulty} is unknown; expected 1 (easiest) to {len(LEVELS)}")
    level = LEVELS[difficulty]
    return Layout(
        size=image_size,
        dashes=level.dashes * image_size // 64,
        distractors=level.distractors * image_size**2 // 64**2,
        distractor_dashes=level.distractor_dashes,
        gap=2,
        turn=8,
    )


class Pathfinder(InMemoryData):
    """Two dots among dashed paths on black, grey, 64x64 px or more; class `joined` where one path ends in both dots.

    Every picture has two long paths of as many dashes, and shorter ones. A path turns by 45 degrees at most from a dash
    to the next, crosses neither itself nor another, and keeps about as far off as its dashes are apart, or farther. The
    strokes of both classes are drawn alike, and the label only says which ends of the two long paths have dots: both
    ends of one, or one of each. These pairs of ends are alike: as far apart, under the same angles to the paths that
    leave them (mirrored, or the two angles swapped), and as far from the picture's edge to within 3 px. So neither
    pixels, nor counts of them, nor the dots' places tell the class; what is left is to look for a path between them.

    | difficulty | dashes of the two paths | other paths | their dashes |
    |---|---|---|---|
    | 1 | 4 | 2 | 2 |
    | 2 | 6 | 3 | 2 |
    | 3 | 8 | 4 | 3 |
    | 4 | 10 | 5 | 3 |
    | 5 | 12 | 6 | 3 |

    That is at 64 px. A dash is 4 px long and 1.5 px wide, a gap 2 px, at every size: at a side s times as long the two
    paths have s times as many dashes, and there are s² times as many others. A short path runs near the line between
    its dots, so that at difficulty 1 the ink there tells more than chance; the longer the paths, the less it does.

    The task is that of Linsley et al. (NeurIPS 2018, arXiv 1805.08315), which the Long Range Arena (Tay et al. 2021,
    arXiv 2011.04006) made a test of long sequences. Theirs are fixed sets of files with settings of their own for
    paths and strokes; here pictures come from a seed, and the two pairs of ends are made alike. Accuracies do not
    compare with theirs.

    Each picture depends on (images_seed, split, number) alone and is the same to the bit on every machine: more
    pictures leave the first ones as they are. What has been drawn is kept in `root`, compressed; a file of other
    settings is not taken.

    Args:
        root: Folder whose `pathfinder/` keeps what was drawn; null draws anew each time and writes nothing.
        image_size: Side of the pictures in pixels: a multiple of 32 from 64 to 256.
        difficulty: 1 to 5, see above.
        train_images: Pictures to train on; as everywhere half of them are of each class.
        val_images: Pictures to validate on.
        test_images: Pictures to test on.
        images_seed: Seed of the pictures; `seed` leaves them as they are.
        batch_size: Images in a batch, for each device.
        num_workers: Processes that prepare batches; 0 prepares them in the training process.
        seed: Seed of order and augmentation; the training's seed if not set.
        hflip: Probability of mirroring a training image; 0 for never. Never shifted, which would cut paths.
        pin_memory: Copy batches to page-locked memory; without a CUDA device this does nothing.
        predict_paths: Image files or folders that `predict` reads: light strokes on a dark ground, read as grey.

    Raises:
        ValueError: if a number is out of its range.
    """

    num_classes = 2
    in_chans = 1
    mean = (0.05,)
    std = (0.18,)

    def __init__(
        self,
        root: str | None = "data",
        image_size: int = 64,
        difficulty: int = 3,
        train_images: int = 50000,
        val_images: int = 5000,
        test_images: int = 10000,
        images_seed: int = 0,
        batch_size: int = 128,
        num_workers: int = 2,
        seed: int = 0,
        hflip: float = 0.5,
        pin_memory: bool = True,
        predict_paths: list[str] | None = None,
    ):
        super().__init__(image_size, batch_size, num_workers, seed, val_images, 0.0, hflip, pin_memory, predict_paths)
        for name, images in (("train_images", train_images), ("test_images", test_images)):
            if images < 1:
                raise ValueError(f"{name}={images} is no number of pictures; set --data.{name} 1 or more")
        if not 0 <= images_seed < 2**63:
            raise ValueError(f"images_seed={images_seed} is no seed; expected 0 to 2**63 - 1")
        self.layout = layout_of(image_size, difficulty)
        self.root = root
        self.images_seed = images_seed
        self.counts = {"train": train_images, "val": val_images, "test": test_images}
        self.name = f"Pathfinder {image_size} px, difficulty {difficulty}"
        self.class_names = ["apart", "joined"]

    def prepare_data(self) -> None:
        """Draws the pictures that `root` does not have, and keeps them there.

        Raises:
            OSError: if they cannot be written.
        """
        if self.root is None:
            return
        folder = Path(self.root) / "pathfinder"
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".draw.lock"):  # cells of a grid may start at once
            for split, count in self.counts.items():
                if self._kept(split) is None:
                    log.info("drawing %d pictures of %s for %s", count, self.name, split)
                    packed = zlib.compress(self.draw(split).tobytes(), 1)
                    write_atomic(self.file(split), self._heading(split) + packed)

    def draw(self, split: str) -> np.ndarray:
        """The pictures of a split (train, val or test), uint8 (N, S, S)."""
        keys = self._keys(split, np.arange(self.counts[split]))
        return draw(self.layout, keys, self.labels(split) == 1)

    def labels(self, split: str) -> np.ndarray:
        """The classes of a split, int64 (N,): of two neighbours, 0 and 1, then 2 and 3, one is joined."""
        index = np.arange(self.counts[split])
        coins = self._keys(split, index - index % 2) >> np.uint64(63)
        return (index + coins.astype(np.int64)) % 2

    def file(self, split: str) -> Path:
        """Where the pictures of a split are kept; the name tells all settings that they depend on."""
        name = f"{split}-{self.layout.size}px-{sha256(self._heading(split)).hexdigest()[:16]}.pictures"
        return Path(self.root or "") / "pathfinder" / name

    def read(self) -> tuple[Labelled, Labelled]:
        """The pictures to train and then those to validate on, and those to test on; drawn if they are not kept."""
        images = {split: self._read_split(split) for split in self.counts}
        labels = {split: torch.from_numpy(self.labels(split)) for split in self.counts}
        rest = [torch.cat([part["train"], part["val"]]) for part in (images, labels)]
        return Labelled(rest[0], rest[1], self.name), Labelled(images["test"], labels["test"], self.name)

    def divide(self, rest: Labelled) -> tuple[Tensor, Tensor]:
        """The first for training, the last for validation, as `read` has them."""
        train, val = torch.arange(len(rest.labels)).split([self.counts["train"], self.counts["val"]])
        return train, val

    def _keys(self, split: str, index: np.ndarray) -> np.ndarray:
        return random_bits(PICTURES, self.images_seed, list(self.counts).index(split), index)

    def _read_split(self, split: str) -> Tensor:
        kept = self._kept(split)
        return torch.from_numpy(self.draw(split) if kept is None else kept)[:, None]

    def _heading(self, split: str) -> bytes:
        """The first line of a split's file: all that its pictures depend on."""
        settings = {"drawing": DRAWING, **asdict(self.layout), "images_seed": self.images_seed, "split": split}
        return json.dumps({**settings, "count": self.counts[split]}).encode() + b"\n"

    def _kept(self, split: str) -> np.ndarray | None:
        """The pictures that `root` has, or None where it has none, or others, or damaged ones."""
        if self.root is None or not self.file(split).is_file():
            return None
        heading, size = self._heading(split), self.layout.size
        content = self.file(split).read_bytes()
        try:
            pixels = np.frombuffer(bytearray(zlib.decompress(content[len(heading) :])), np.uint8)
        except zlib.error as error:  # which checks a sum
            log.warning("%s is damaged (%s) and not taken", self.file(split), error)
            return None
        if not content.startswith(heading) or pixels.size != self.counts[split] * size**2:
            log.warning("%s holds other pictures than its name says and is not taken", self.file(split))
            return None
        return pixels.reshape(-1, size, size)
