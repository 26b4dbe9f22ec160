"""Scikit-learn's scanned digits: embedded, so that everything runs without a download."""

import torch
from sklearn.datasets import load_digits

from msv.data.in_memory import InMemoryData, Labelled
from msv.data.sampling import hold_out


class Digits(InMemoryData):
    """Scikit-learn's 1,797 scanned digits, 8x8 px, enlarged: 1,077 to train, 360 to validate, 360 to test.

    Embedded in the package, so that nothing is downloaded. The splits are stratified and always the same, whatever
    the seed. Small enough for a CPU, and soon saturated: it shows the machinery and ranks nothing.

    Args:
        image_size: Side of the network's input in pixels; at least 32.
        batch_size: Images in a batch, for each device.
        num_workers: Processes that prepare batches; 0 is fastest here, a batch takes about a millisecond.
        seed: Seed of order and augmentation; the training's seed if not set. The split has its own.
        max_shift: Largest random shift of a training image, as a fraction of its side (0.125 is one
            scanned pixel); 0 for none. Digits are never mirrored.
        pin_memory: Copy batches to page-locked memory; without a CUDA device this does nothing.
        predict_paths: Image files or folders that `predict` reads: light strokes on a dark ground, read as grey.

    Raises:
        ValueError: if a number is out of its range.
    """

    num_classes = 10
    in_chans = 1
    name = "digits"
    mean = (0.309,)
    std = (0.350,)
    test_images = 360

    def __init__(
        self,
        image_size: int = 32,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
        max_shift: float = 0.125,
        pin_memory: bool = True,
        predict_paths: list[str] | None = None,
    ):
        super().__init__(
            image_size=image_size,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            val_images=360,
            max_shift=max_shift,
            hflip=0.0,
            pin_memory=pin_memory,
            predict_paths=predict_paths,
        )
        self.class_names = [str(digit) for digit in range(10)]

    def read(self) -> tuple[Labelled, Labelled]:
        """Holds out the test images of the 1,797."""
        digits = load_digits()
        # Ink from 0 to 16.
        images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[:, None]
        labels = torch.from_numpy(digits.target).long()
        rest, test = hold_out(labels, self.test_images, self.split_seed)
        source = "scikit-learn's digits"
        return Labelled(images[rest], labels[rest], source), Labelled(images[test], labels[test], source)

    def note(self) -> str:
        """Why nobody should rank models by this table."""
        return (
            f"{self.test_images} test images, one image is {100 / self.test_images:.2f} points, saturated: this shows "
            "the machinery and ranks nothing; recipes/fashion_mnist is for the question"
        )
