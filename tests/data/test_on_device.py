"""Small data sets on the device that trains."""

from types import SimpleNamespace

import pytest
import torch

from msv.data import Digits
from msv.data.in_memory import ShiftFlip, TensorImages

CUDA = pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
])  # fmt: skip


def training_on(device: str) -> SimpleNamespace:
    return SimpleNamespace(world_size=1, global_rank=0, strategy=SimpleNamespace(root_device=torch.device(device)))


def images(size: int) -> TensorImages:
    made = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8, generator=made)
    return TensorImages(pixels, torch.arange(20), size, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), ShiftFlip(0.25, 0.5, seed=3))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("size", [8, 16])
def test_batches_are_those_of_the_cpu(device, size):
    there, here = images(size), images(size)
    there.to(torch.device(device))
    batch = [(epoch, index) for epoch in (0, 1) for index in (3, 1, 19)]
    for found, wanted in zip(there.__getitems__(batch), here.__getitems__(batch), strict=True):
        assert found.device.type == device
        # Divided and resized, values may be rounded otherwise elsewhere.
        exact = device == "cpu" and size == 8
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=0 if exact else 1e-5)


def test_on_a_gpu_neither_workers_nor_page_locked_copies(monkeypatch):
    moved = []
    monkeypatch.setattr(TensorImages, "to", lambda self, device: moved.append(device.type))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    data = Digits(num_workers=2)
    data.trainer = training_on("cuda")
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert (loader.num_workers, loader.pin_memory, loader.persistent_workers) == (0, False, False)
    assert moved == ["cuda"] * 3


def test_on_a_cpu_workers_stay():
    data = Digits(num_workers=2)
    data.trainer = training_on("cpu")
    assert data.train_dataloader().num_workers == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_loaders_of_a_gpu_give_the_cpu_s_batches():
    one, other = Digits(batch_size=64), Digits(batch_size=64)
    other.trainer = training_on("cuda")
    for here, there in zip(one.train_dataloader(), other.train_dataloader(), strict=True):
        assert there[0].device.type == "cuda"
        assert torch.equal(here[1], there[1].cpu())
        torch.testing.assert_close(here[0], there[0].cpu(), rtol=0, atol=1e-5)
