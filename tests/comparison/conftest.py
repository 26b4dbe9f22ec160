"""Small stand-ins: a network that is counted and timed at once, and ImageNet with three classes."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from msv.comparison import accuracy

CLASSES = ["n01440764", "n01443537", "n01484850"]


class Means(nn.Module):
    """Says class 0, 1 or 2 of a red, green or blue image."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, images):
        return nn.functional.pad(images.mean(dim=(2, 3)) * self.scale, (0, 997), value=-1e4)


@pytest.fixture
def means():
    return Means()


@pytest.fixture
def imagenet(tmp_path, monkeypatch) -> Path:
    """Six images in `val/`, a red, a green and a blue class; one image lies in the wrong one."""
    monkeypatch.setattr(accuracy, "imagenet_classes", lambda: CLASSES)
    root = tmp_path / "imagenet"
    for label, name in enumerate(CLASSES):
        (root / "val" / name).mkdir(parents=True)
        for number in range(2):
            shown = 2 if (label, number) == (0, 1) else label
            colour = tuple(255 if channel == shown else 0 for channel in range(3))
            Image.new("RGB", (40, 30), colour).save(root / "val" / name / f"{number}.png")
    return root
