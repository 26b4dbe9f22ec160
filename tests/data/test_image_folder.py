"""ImageNet's layout: the published recipe's transforms read back, exactness over workers, and bad folders."""

import json
import math
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from msv.data import ImageFolder

CLASSES = ["n01440764", "n01443537", "n01484850"]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """Three classes of small JPEGs; not to be changed: `copy` is."""
    root = tmp_path_factory.mktemp("data") / "tiny"
    rng = np.random.default_rng(0)
    for split, n in [("train", 8), ("val", 3)]:
        for wnid in CLASSES:
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for i in range(n):
                name = f"{wnid}_{i}.JPEG" if split == "train" else f"ILSVRC2012_val_{i:08}.JPEG"
                pixels = rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((60 + i, 50), Image.Resampling.BICUBIC).save(folder / name)
    return root


@pytest.fixture
def copy(imagenet, tmp_path):
    return shutil.copytree(imagenet, tmp_path / "tiny")


def make(root, **arguments):
    return ImageFolder(**{"root": str(root), "image_size": 32, "batch_size": 4, "num_workers": 0, **arguments})


def batches(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def equal(left, right):
    return len(left) == len(right) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True)
    )


def test_known_before_any_image_is_listed(imagenet):
    data = make(imagenet)
    assert (data.num_classes, data.in_chans, data.image_size, data.class_names) == (3, 3, 32, CLASSES)
    assert data.name == "ImageNet layout: tiny"


def test_splits_and_batches(imagenet):
    data = make(imagenet)
    data.check()
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 32, 32)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.cat([labels for _, labels in data.val_dataloader()]).tolist() == [0] * 3 + [1] * 3 + [2] * 3
    summary = json.loads(json.dumps(data.summary()))
    assert [summary[f"{split}_images"] for split in ("train", "val", "test")] == [24, 9, 9]
    assert "val split" in summary["note"]
    assert summary["test_split"] == "val"
    assert summary["augmentation"]["auto_augment"] == "rand-m9-mstd0.5-inc1"
    assert summary["augmentation"]["color_jitter"] is None


def test_a_test_folder_is_the_test_split(copy):
    shutil.copytree(copy / "val", copy / "test")
    (copy / "test" / CLASSES[0] / "ILSVRC2012_val_00000000.JPEG").unlink()
    data = make(copy)
    assert len(data.splits.test) == 8
    assert (data.summary()["note"], data.summary()["test_split"]) == (None, "test")


def test_training_transform_is_the_published_recipe(imagenet):
    steps = ImageFolder(root=str(imagenet)).train_transform().transforms
    assert [type(step) for step in steps] == [
        RandomResizedCropAndInterpolation,
        transforms.RandomHorizontalFlip,
        RandAugment,  # and no ColorJitter beside it
        type(steps[3]),
        transforms.Normalize,
        RandomErasing,
    ]
    crop, flip, augment, _, normalise, erasing = steps
    assert crop.size == (224, 224)
    assert crop.scale == (0.08, 1.0)
    assert crop.ratio == pytest.approx((3 / 4, 4 / 3))
    assert crop.interpolation == transforms.InterpolationMode.BICUBIC
    assert flip.p == 0.5
    assert (augment.num_layers, len(augment.ops)) == (2, 15)
    assert {(op.magnitude, op.magnitude_std, op.prob) for op in augment.ops} == {(9, 0.5, 0.5)}
    assert "PosterizeIncreasing" in [op.name for op in augment.ops]
    assert normalise.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert normalise.std.tolist() == pytest.approx([0.229, 0.224, 0.225])
    assert (erasing.probability, erasing.max_count, erasing.per_pixel) == (0.25, 1, True)


def test_evaluation_transform_is_the_published_recipe(imagenet):
    resize, crop, _, normalise = ImageFolder(root=str(imagenet)).eval_transform().transforms
    assert (resize.size, resize.interpolation) == (256, transforms.InterpolationMode.BICUBIC)
    assert crop.size == (224, 224)
    assert normalise.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_settings_reach_the_transform(imagenet):
    data = make(imagenet, auto_augment=None, color_jitter=0.3, re_prob=0.0, hflip=0.0, interpolation="bilinear")
    crop, jitter, *rest = data.train_transform().transforms
    assert crop.interpolation == transforms.InterpolationMode.BILINEAR
    assert jitter.brightness == pytest.approx((0.7, 1.3))
    assert len(rest) == 2
    assert data.augmentation()["color_jitter"] == 0.3


def test_batches_do_not_depend_on_workers_or_the_global_random_state(imagenet):
    straight = [batches(make(imagenet, seed=3, re_prob=1.0), epoch) for epoch in range(2)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    workers = make(imagenet, seed=3, re_prob=1.0, num_workers=2)
    loader = workers.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        assert equal(list(loader), straight[epoch])
    assert equal(batches(make(imagenet, seed=3, re_prob=1.0), 1), straight[1])
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])
    assert not equal(straight[0], straight[1])
    assert not equal(batches(make(imagenet, seed=4, re_prob=1.0), 0), straight[0])


def test_augmentation_is_drawn_anew_for_each_epoch_and_image(imagenet):
    train = make(imagenet).splits.train
    assert torch.equal(train[(1, 0)][0], train[(1, 0)][0])
    assert not torch.equal(train[(1, 0)][0], train[(2, 0)][0])
    val = make(imagenet).splits.val
    assert torch.equal(val[0][0], val[(5, 0)][0])


def test_workers_can_be_spawned(imagenet):
    splits = make(imagenet).splits
    again = pickle.loads(pickle.dumps(splits))
    assert torch.equal(again.train[(1, 2)][0], splits.train[(1, 2)][0])


def test_any_extension_in_any_case_and_no_hidden_files(copy):
    folder = copy / "train" / CLASSES[0]
    Image.new("L", (40, 40)).save(folder / "grey.PNG")
    Image.new("RGBA", (40, 40)).save(folder / "deeper.png")
    (folder / "deep").mkdir()
    (folder / "deeper.png").rename(folder / "deep" / "deeper.png")
    (folder / "._grey.PNG").write_bytes(b"left by a file manager")
    (folder / "readme.txt").write_text("not an image")
    (copy / "train" / ".cache").mkdir()
    data = make(copy)
    assert data.class_names == CLASSES
    assert len(data.splits.train) == 26
    assert len(list(data.train_dataloader())) == 6


@pytest.mark.parametrize(("damage", "workers"), [("truncated", 0), ("empty", 0), ("text", 0), ("truncated", 1)])
def test_a_corrupt_image_is_named(copy, damage, workers):
    file = copy / "val" / CLASSES[1] / "ILSVRC2012_val_00000001.JPEG"
    content = file.read_bytes()
    file.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"404 not found"}[damage])
    data = make(copy, num_workers=workers)
    data.check()  # decodes nothing
    with pytest.raises(ValueError, match=rf"cannot read the image .*{CLASSES[1]}/{file.name}: .*replace it"):
        list(data.val_dataloader())


def test_an_image_that_has_gone(copy):
    data = make(copy)
    data.check()
    (copy / "val" / CLASSES[0] / "ILSVRC2012_val_00000000.JPEG").unlink()
    with pytest.raises(FileNotFoundError, match=r"ILSVRC2012_val_00000000.JPEG does not exist"):
        list(data.val_dataloader())


def test_a_class_folder_without_images(copy):
    for file in (copy / "train" / CLASSES[2]).iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=rf"1 class folder\(s\) of .*train have no images: {CLASSES[2]};"):
        make(copy).check()


def test_splits_with_other_classes(copy):
    (copy / "val" / CLASSES[0]).rename(copy / "val" / "dogs")
    with pytest.raises(ValueError, match=rf"val differ from .*train: it lacks {CLASSES[0]}, and has dogs besides;"):
        make(copy)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split(copy, split):
    shutil.rmtree(copy / split)
    with pytest.raises(FileNotFoundError, match=rf"has no {split} folder; expected .*val/<class>"):
        make(copy)


def test_a_root_that_is_missing_or_a_file_or_empty(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere does not exist; expected .*train/<class>/\*.JPEG.*--data.root"
    ):
        make(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="file is not a folder"):
        make(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="has no train folder"):
        make(tmp_path)


def test_a_flat_validation_folder(copy):
    for folder in list((copy / "val").iterdir()):
        shutil.rmtree(folder)
    Image.new("RGB", (40, 40)).save(copy / "val" / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(FileNotFoundError, match=r"val has no class folders.*one folder a class"):
        make(copy)


def test_a_single_class(copy):
    for split in ("train", "val"):
        for wnid in CLASSES[1:]:
            shutil.rmtree(copy / split / wnid)
    with pytest.raises(ValueError, match=f"one class folder, {CLASSES[0]}; expected two or more"):
        make(copy)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 16}, "image_size=16 is too small"),
        ({"auto_augment": "rond-m9"}, "auto_augment='rond-m9' is no policy"),
        ({"auto_augment": "rand-x9"}, "auto_augment='rand-x9' is no policy"),
        ({"scale": (0.5, 0.1)}, r"scale=\(0.5, 0.1\) is out of range.*smaller number first"),
        ({"ratio": (0.0, 1.0)}, "ratio="),
        ({"hflip": 2.0}, "hflip=2.0 is out of range; expected 0 to 1"),
        ({"re_prob": math.nan}, "re_prob=nan"),
        ({"re_count": 0}, "re_count=0"),
        ({"crop_pct": 1.5}, "crop_pct=1.5"),
    ],
    ids=lambda value: "-".join(map(str, *value.items())) if isinstance(value, dict) else "",
)
def test_bad_arguments(imagenet, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(imagenet, **arguments)
