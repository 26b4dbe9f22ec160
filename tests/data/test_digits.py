"""Digits, and with them what all sets in memory share."""

import hashlib
import json

import pytest
import torch

from msv.data import Digits
from msv.data.in_memory import ShiftFlip, TensorImages
from msv.data.sampling import AUGMENT, uniform


@pytest.fixture(scope="module")
def digits():
    return Digits()


def epoch_of(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches])


def test_known_before_anything_is_read(digits):
    assert (digits.num_classes, digits.in_chans, digits.image_size, digits.batch_size) == (10, 1, 32, 64)
    assert digits.class_names == list("0123456789")
    assert digits.name == "digits"


def test_splits_are_stratified_disjoint_and_always_the_same(digits):
    digits.check()
    splits = [digits.splits.train, digits.splits.val, digits.splits.test]
    assert [len(split) for split in splits] == [1077, 360, 360]
    for split in splits[1:]:
        counts = torch.bincount(split.labels)
        assert counts.min() >= 34
        assert counts.max() <= 37
    # No scan is in two splits: there are no two equal scans in the whole set.
    scans = [bytes(image.numpy().tobytes()) for split in splits for image in split.images]
    assert len(set(scans)) == 1797
    test = splits[2]
    digest = hashlib.sha256(test.images.numpy().tobytes() + test.labels.numpy().tobytes()).hexdigest()
    assert digest == "7bf2b22a6bb38f8b1f618eeec2ddeaf8c7da086637d136b5582141a7322dfaf6"
    assert torch.equal(Digits(seed=7, image_size=48).splits.test.images, test.images)


def test_batches(digits):
    images, labels = next(iter(digits.train_dataloader()))
    assert images.shape == (64, 1, 32, 32)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert abs(images.mean()) < 0.1
    assert 0.9 < images.std() < 1.1
    # The incomplete last batch is dropped in training and kept in evaluation.
    assert len(list(digits.train_dataloader())) == len(digits.train_dataloader()) == 16
    for loader, split in [(digits.val_dataloader(), digits.splits.val), (digits.test_dataloader(), digits.splits.test)]:
        assert torch.equal(torch.cat([labels for _, labels in loader]), split.labels)
    assert next(iter(Digits(image_size=45).val_dataloader()))[0].shape == (64, 1, 45, 45)


def test_batches_do_not_depend_on_workers_or_the_global_random_state():
    torch.manual_seed(1)
    straight = [epoch_of(Digits(seed=5), epoch) for epoch in range(3)]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    workers = Digits(seed=5, num_workers=2)
    loader = workers.train_dataloader()  # one loader, persistent workers, epochs in turn
    for epoch, (images, labels) in enumerate(straight):
        loader.sampler.set_epoch(epoch)
        batches = list(loader)
        assert torch.equal(torch.cat([batch for batch, _ in batches]), images)
        assert torch.equal(torch.cat([batch for _, batch in batches]), labels)
    # Resumed: a new process starts at epoch 2.
    assert torch.equal(epoch_of(Digits(seed=5), 2)[0], straight[2][0])
    list(workers.val_dataloader())
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(straight[0][1], straight[1][1])
    assert not torch.equal(epoch_of(Digits(seed=6), 0)[1], straight[0][1])


def test_augmentation_depends_on_seed_epoch_and_image_alone(digits):
    train = digits.splits.train
    alone, among = train[(3, 17)][0], train.__getitems__([(3, 5), (3, 17), (4, 17)])[0]
    assert torch.equal(alone, among[1])
    assert not torch.equal(among[1], among[2])
    # A plain index, which Trainer(overfit_batches=...) gives, is of epoch 0.
    assert torch.equal(train[17][0], train[(0, 17)][0])
    assert torch.equal(digits.splits.val[3][0], digits.splits.val[(9, 3)][0])


def test_shift_and_flip_against_a_loop():
    images = torch.rand(64, 2, 16, 16)
    epochs, indices = torch.full((64,), 2).numpy(), torch.arange(64).numpy()
    got = ShiftFlip(max_shift=0.25, hflip=0.5, seed=1)(images, epochs, indices)
    flips, shifts = 0, set()
    for i, image in enumerate(images):
        down, right, mirror = uniform(AUGMENT, 1, 2, i, torch.arange(3).numpy())
        down, right = int(down * 9) - 4, int(right * 9) - 4
        expected = torch.zeros(2, 16, 16)
        for y in range(16):
            for x in range(16):
                if 0 <= y + down < 16 and 0 <= x + right < 16:
                    expected[:, y, x] = image[:, y + down, x + right]
        if mirror < 0.5:
            expected = expected.flip(-1)
            flips += 1
        shifts |= {down, right}
        assert torch.equal(got[i], expected)
    assert shifts == set(range(-4, 5))
    assert 20 <= flips <= 44


def test_no_augmentation_leaves_the_images():
    images = torch.rand(4, 1, 32, 32)
    indices = torch.arange(4).numpy()
    assert torch.equal(ShiftFlip(0.0, 0.0, 0)(images, indices, indices), images)
    assert torch.equal(ShiftFlip(0.0, 1.0, 0)(images, indices, indices), images.flip(-1))


def test_images_are_resized_and_normalised():
    scans = torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    image, label = TensorImages(scans, torch.tensor([3]), 32, mean=[0.5], std=[0.25])[0]
    assert torch.allclose(image, torch.full((1, 32, 32), 2.0))
    assert label == 3


def test_summary(digits):
    summary = json.loads(json.dumps(digits.summary()))
    assert summary["train_images"] == 1077
    assert summary["val_images"] == summary["test_images"] == 360
    assert summary["augmentation"] == {"max_shift": 0.125, "hflip": 0.0}
    for part in ("360 test images", "0.28 points", "saturated", "ranks nothing", "recipes/fashion_mnist"):
        assert part in summary["note"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 31}, "image_size=31 is too small.*at least 32 px"),
        ({"batch_size": 0}, "batch_size=0.*1 or more"),
        ({"num_workers": -1}, "num_workers=-1 is negative"),
        ({"max_shift": 0.6}, "max_shift=0.6.*expected 0 to 0.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Digits(**arguments)


def test_a_batch_larger_than_the_training_set():
    with pytest.raises(ValueError, match=r"batch_size=1078 is more than the 1077 training images.*1077 or less"):
        Digits(batch_size=1078).check()


def test_setup_reads_once_and_predict_reads_nothing():
    data = Digits()
    data.load_splits = pytest.fail
    data.setup("predict")
    data = Digits()
    data.setup("fit")
    splits = data.splits
    data.setup("test")
    data.setup()
    assert data.splits is splits
