"""Fashion-MNIST from IDX files in each layout, and what is said of damaged ones."""

import gzip
import struct

import numpy as np
import pytest
import torch
from torchvision import datasets

from msv.data import FashionMNIST, fashion_mnist

FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder, zipped, train=200, test=40):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    arrays = []
    for n in (train, test):
        arrays += [rng.integers(0, 256, (n, 28, 28), dtype=np.uint8), np.arange(n, dtype=np.uint8) % 10]
    for name, array in zip(FILES, arrays, strict=True):
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


def make(root, **arguments):
    return FashionMNIST(root=str(root), val_images=50, batch_size=32, num_workers=0, **arguments)


@pytest.mark.parametrize("zipped", [True, False], ids=["gzip", "plain"])
@pytest.mark.parametrize("layout", ["", "FashionMNIST/raw"], ids=["flat", "torchvision"])
def test_reads_each_layout(tmp_path, layout, zipped):
    arrays = write(tmp_path / layout, zipped)
    before = sorted(tmp_path.rglob("*"))
    data = make(tmp_path)
    data.check()
    assert [len(split) for split in (data.splits.train, data.splits.val, data.splits.test)] == [150, 50, 40]
    assert torch.bincount(data.splits.val.labels).tolist() == [5] * 10
    assert np.array_equal(data.splits.test.images[:, 0].numpy(), arrays[2])
    assert np.array_equal(data.splits.test.labels.numpy(), arrays[3])
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, 1, 64, 64)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert sorted(tmp_path.rglob("*")) == before  # nothing was written there
    assert data.summary()["augmentation"] == {"max_shift": 0.125, "hflip": 0.5}


def test_validation_images_are_the_same_for_every_seed(tmp_path):
    write(tmp_path, zipped=False)
    assert torch.equal(make(tmp_path, seed=0).splits.val.images, make(tmp_path, seed=9).splits.val.images)


def test_default_roots_in_turn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_ROOT", tmp_path / "debian")
    data = FashionMNIST(val_images=50, download=False)
    with pytest.raises(FileNotFoundError, match=r"not in data or .*debian; expected train-images-idx3-ubyte"):
        data.check()
    write(tmp_path / "debian", zipped=True)
    assert data.find() == tmp_path / "debian"
    write(tmp_path / "data", zipped=True)
    assert data.find() == fashion_mnist.DOWNLOAD_ROOT


def test_downloads_what_is_not_found(tmp_path, monkeypatch):
    def download(self):
        write(tmp_path / "new" / "FashionMNIST" / "raw", zipped=False)

    monkeypatch.setattr(datasets.FashionMNIST, "download", download)
    data = make(tmp_path / "new")
    data.check()
    assert len(data.splits.test) == 40


def test_a_download_that_fails_says_how_to_go_on(tmp_path, monkeypatch):
    def download(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nno route to host")

    monkeypatch.setattr(datasets.FashionMNIST, "download", download)
    expected = r"not in .*new; expected train.*--data.root.*dataset-fashion-mnist.*failed: Error.*: no route to host$"
    with pytest.raises(OSError, match=expected):
        make(tmp_path / "new").check()
    with pytest.raises(FileNotFoundError, match=r"not in .*other; .*--data.download true"):
        make(tmp_path / "other", download=False).check()
    assert not (tmp_path / "other").exists()


def test_a_root_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"Fashion-MNIST is not in .*file"):
        make(tmp_path / "file").check()


def test_a_flat_folder_that_lacks_a_file(tmp_path):
    write(tmp_path, zipped=True)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match="lacks t10k-labels-idx1-ubyte of Fashion-MNIST"):
        make(tmp_path).check()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train-images-idx3-ubyte.gz", b"\x1f\x8b broken", "cannot read .*train-images-idx3-ubyte.gz"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(b"PNG, surely not IDX"), "t10k-images.* is no IDX file"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(b""), "t10k-labels.* is no IDX file"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(np.zeros(40, np.uint8))[:-3]), "37 bytes .* says 40"),
        ("t10k-labels-idx1-ubyte.gz", gzip.compress(idx(np.zeros(39, np.uint8))), "40 images .* 39 labels"),
        (
            "train-labels-idx1-ubyte.gz",
            gzip.compress(idx(np.array([3] * 7 + [10] + [0] * 192, np.uint8))),
            "label 10 of image 7 in .*train-labels-idx1-ubyte.gz is out of range; expected 0 to 9",
        ),
    ],
    ids=["gzip", "magic", "empty", "truncated", "fewer-labels", "label-range"],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    write(tmp_path, zipped=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        make(tmp_path).check()


def test_a_gzip_file_cut_short_is_named(tmp_path):
    write(tmp_path, zipped=True)
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cannot read .*train-images-idx3-ubyte.gz: .*replace it"):
        make(tmp_path).check()


def test_no_images_and_too_few(tmp_path):
    write(tmp_path / "empty", zipped=False, test=0)
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte has no images"):
        make(tmp_path / "empty").check()
    write(tmp_path / "few", zipped=False, train=50)
    with pytest.raises(ValueError, match="val_images=50 leaves none of the 50 images"):
        make(tmp_path / "few").check()
    with pytest.raises(ValueError, match="val_images=0"):
        FashionMNIST(val_images=0)
    with pytest.raises(ValueError, match=r"hflip=1.5 .*expected 0 to 1"):
        FashionMNIST(hflip=1.5)
