"""CIFAR from folders in CIFAR's own format: small ones, whose MD5 sums take the place of the originals'."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torchvision import datasets

from msv.data import CIFAR10, CIFAR100

LAYOUTS = {
    CIFAR10: (
        datasets.CIFAR10,
        {**{f"data_batch_{i}": 40 for i in range(1, 6)}, "test_batch": 20},
        "labels",
        {"label_names": CIFAR10().class_names},
    ),
    CIFAR100: (
        datasets.CIFAR100,
        {"train": 400, "test": 200},
        "fine_labels",
        {"fine_label_names": CIFAR100().class_names},
    ),
}


@pytest.fixture(params=[CIFAR10, CIFAR100], ids=["CIFAR10", "CIFAR100"])
def folder(request, tmp_path, monkeypatch):
    """Writes a small data set, tells torchvision its MD5 sums, and returns our class and the written arrays."""
    source, sizes, key, meta = LAYOUTS[request.param]
    rng = np.random.default_rng(0)
    (tmp_path / source.base_folder).mkdir()
    sums, written = {}, {}
    for name, n in sizes.items():
        images = rng.integers(0, 256, (n, 3072), dtype=np.uint8)
        written[name] = images, np.arange(n) % request.param.num_classes
        sums[name] = dump(tmp_path / source.base_folder / name, {"data": images, key: written[name][1].tolist()})
    sums["meta"] = dump(tmp_path / source.base_folder / source.meta["filename"], meta)
    monkeypatch.setattr(source, "train_list", [[name, sums[name]] for name, _ in source.train_list])
    monkeypatch.setattr(source, "test_list", [[name, sums[name]] for name, _ in source.test_list])
    monkeypatch.setattr(source, "meta", {**source.meta, "md5": sums["meta"]})
    return request.param, written


def dump(path, content):
    path.write_bytes(pickle.dumps(content))
    return hashlib.md5(path.read_bytes()).hexdigest()


def make(cls, root, **arguments):
    return cls(root=str(root), val_images=100, batch_size=32, num_workers=0, **arguments)


def test_reads_and_splits(folder, tmp_path):
    cls, written = folder
    data = make(cls, tmp_path)
    assert (data.in_chans, data.image_size, len(data.class_names)) == (3, 32, data.num_classes)
    data.check()
    test = next(written[name] for name in written if name.startswith("test"))
    assert np.array_equal(data.splits.test.images.flatten(1).numpy(), test[0])
    assert np.array_equal(data.splits.test.labels.numpy(), test[1])
    assert torch.bincount(data.splits.val.labels).tolist() == [100 // cls.num_classes] * cls.num_classes
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (32, 3, 32, 32)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    # Evaluation images are the pixels, normalised and nothing else.
    mean, std = torch.tensor(cls.mean).view(3, 1, 1), torch.tensor(cls.std).view(3, 1, 1)
    expected = (torch.from_numpy(test[0][0]).view(3, 32, 32) / 255 - mean) / std
    assert torch.allclose(data.splits.test[0][0], expected)
    assert data.summary()["num_classes"] == cls.num_classes


def test_a_missing_file_is_named(folder, tmp_path):
    cls, _ = folder
    data = make(cls, tmp_path, download=False)
    (data.folder / "meta" if cls is CIFAR100 else data.folder / "batches.meta").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{data.name} is not in .* lacks .*meta; .*--data.root"):
        data.check()


def test_a_damaged_file_is_named_and_never_unpickled(folder, tmp_path):
    cls, written = folder
    data = make(cls, tmp_path)
    file = data.folder / next(name for name in written if name.startswith("test"))
    file.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match=rf"damaged, by the MD5 sum: .*{file.name}; replace"):
        data.check()


def test_a_missing_root(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"CIFAR-10 is not in .*nowhere: .*lacks data_batch_1.*data.download"):
        CIFAR10(root=str(tmp_path / "nowhere"), download=False).check()


def test_a_download_that_fails_says_how_to_go_on(tmp_path, monkeypatch):
    def download(self):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets.CIFAR100, "download", download)
    with pytest.raises(OSError, match=r"cifar-100-python.tar.gz there; downloading to .* failed: no route to host"):
        CIFAR100(root=str(tmp_path / "new")).check()


def test_a_label_out_of_range(folder, tmp_path, monkeypatch):
    cls, _ = folder
    data = make(cls, tmp_path)
    source, _, key, _ = LAYOUTS[cls]
    name = source.test_list[0][0]
    sum_ = dump(data.folder / name, {"data": np.zeros((2, 3072), np.uint8), key: [0, cls.num_classes]})
    monkeypatch.setattr(source, "test_list", [[name, sum_]])
    with pytest.raises(ValueError, match=rf"label {cls.num_classes} of image 1 in .*\(test\) is out of range"):
        data.check()


def test_class_names_are_in_the_order_of_the_labels():
    assert CIFAR10().class_names == sorted(CIFAR10().class_names)
    assert len(set(CIFAR100().class_names)) == 100
    assert CIFAR100().class_names == sorted(CIFAR100().class_names)
