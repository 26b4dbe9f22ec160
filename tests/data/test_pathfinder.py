"""Pathfinder: the same bits for ever, classes that differ in nothing but what joins the dots, and what is kept."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from msv.data import Pathfinder, dashed_paths, pathfinder, pathfinder_sheet
from msv.data.dashed_paths import Layout, Scenes, draw
from msv.data.sampling import random_bits
from msv.data.strokes import COMPASS, PIXEL

LEVEL_3 = Layout(size=64, dashes=8, distractors=4, distractor_dashes=3, gap=2, turn=8)


def make(root=None, **arguments):
    settings = {"train_images": 24, "val_images": 8, "test_images": 8, "batch_size": 8, "num_workers": 0, **arguments}
    return Pathfinder(root=None if root is None else str(root), **settings)


@pytest.fixture(scope="module")
def scenes():
    """Some 300 pictures of difficulty 3, as what is in them."""
    made = Scenes(LEVEL_3, random_bits(5, np.arange(1200)))
    made.add_path(LEVEL_3.dashes)
    made.add_twin()
    for _ in range(LEVEL_3.distractors):
        made.add_path(LEVEL_3.distractor_dashes)
    assert len(made.kept) > 150
    return made


# The same bits everywhere.


@pytest.mark.parametrize(
    ("image_size", "difficulty", "digest"),
    [
        (64, 1, "027fcd46f749b58fb25328e204d2088530c42fcf1ea415a8f38b744f62869bbb"),
        (64, 3, "3309d34bbe4ca44964cf043e04709603f56ec37a6ce60bd3d2ebf485a5a409a3"),
        (64, 5, "ed077dfa3ea385ad74ab53f6b064d44712421725365c49e87a5bc3608a8f0692"),
        (128, 3, "28f07b145b325c804b57cbec95b1cf8d0e7a6fa4fffc368372e83a85e1874795"),
    ],
)
def test_bits(image_size, difficulty, digest):
    data = make(image_size=image_size, difficulty=difficulty)
    found = hashlib.sha256()
    for split in ("train", "val", "test"):
        found.update(data.draw(split)[:6].tobytes() + data.labels(split)[:6].astype(np.uint8).tobytes())
    assert found.hexdigest() == digest, "other pictures than before: is that meant? Then raise pathfinder.DRAWING, too"


def test_a_picture_depends_on_its_seed_split_and_number_alone():
    few, many = make(), make(train_images=61, batch_size=4, seed=3)
    assert np.array_equal(many.draw("train")[:24], few.draw("train"))
    assert np.array_equal(many.labels("train")[:24], few.labels("train"))
    splits = [few.draw("train")[:8], few.draw("val"), few.draw("test"), make(images_seed=1).draw("val")]
    assert len({picture.tobytes() for split in splits for picture in split}) == 32


def test_chunks_change_nothing(monkeypatch):
    keys, joined = random_bits(1, np.arange(10)), np.arange(10) % 2 == 0
    whole = draw(LEVEL_3, keys, joined)
    monkeypatch.setattr(dashed_paths, "CHUNK", 3)
    assert np.array_equal(draw(LEVEL_3, keys, joined), whole)
    assert np.array_equal(draw(LEVEL_3, keys[7:8], joined[7:8]), whole[7:8])
    assert draw(LEVEL_3, keys[:0], joined[:0]).shape == (0, 64, 64)


def test_directions_stand_far_from_a_rounding_edge():
    angles = np.arange(64) * np.pi / 32
    exact = PIXEL * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    assert np.abs(exact - COMPASS).max() < 0.499


# What is in a picture.


def test_paths_are_as_described(scenes):
    paths = list(zip(scenes.middles, scenes.headings, strict=True))
    assert [headings.shape[1] for _, headings in paths] == [8, 8, 3, 3, 3, 3]
    for middles, headings in paths:
        turns = (np.diff(headings) + 32) % 64 - 32
        assert np.abs(turns).max() <= 8
        strides = np.sqrt((np.diff(middles, axis=1) ** 2).sum(axis=-1)) / PIXEL
        assert (strides > 5).all()  # half a dash, a gap and half a dash, bent by 45 degrees at most
        assert (strides < 6.1).all()
        assert middles.min() > 3 * PIXEL
        assert middles.max() < 61 * PIXEL


def test_paths_keep_clear_of_each_other_and_of_themselves(scenes):
    along = np.arange(-2, 3)[:, None] * PIXEL // 2  # five points of each dash
    points = [
        (middles[:, :, None] + COMPASS[headings][:, :, None] * along // PIXEL) / PIXEL
        for middles, headings in zip(scenes.middles, scenes.headings, strict=True)
    ]
    for i, one in enumerate(points):
        for other in points[i + 1 :]:
            assert distances(one, other).min() > 3.4  # 1.5 of which are ink
        apart = distances(one, one)  # (B, dashes, dashes)
        dashes = np.arange(one.shape[1])
        far = np.abs(dashes[:, None] - dashes) > 1
        assert apart[:, far].min() > 3.4


def distances(one, other):
    """The least distance between any points of two dashes, in pixels: (B, dashes, dashes of the other)."""
    gaps = one[:, :, None, :, None] - other[:, None, :, None]
    return np.sqrt((gaps**2).sum(axis=-1)).min(axis=(3, 4))


def test_the_dots_of_both_classes_are_alike(scenes):
    (first, into_first), (second, into_second) = scenes.ends(0), scenes.ends(1)
    rows, shared = np.arange(len(first)), scenes.rival
    start, ahead = first[rows, shared] / PIXEL, into_first[rows, shared]
    seen = []
    for end, back in (
        (first[rows, 1 - shared] / PIXEL, into_first[rows, 1 - shared]),
        (second[:, 0] / PIXEL, into_second[:, 0]),
    ):
        way = end - start
        bearing = np.arctan2(way[:, 1], way[:, 0])
        angles = np.stack([bearing - ahead * np.pi / 32, bearing + np.pi - back * np.pi / 32])
        # Mirrored or swapped they count as the same.
        aims = np.sort(np.abs((angles + np.pi) % (2 * np.pi) - np.pi), axis=0)
        bent = np.sign(np.sin(angles)).prod(axis=0)
        edge = np.minimum(end, 64 - end).min(axis=1)
        middle = (start + end) / 2
        seen.append((np.hypot(*way.T), aims, bent, edge, np.minimum(middle, 64 - middle).min(axis=1)))
    one, two = seen
    assert np.abs(one[0] - two[0]).max() < 0.5
    assert np.abs(one[1] - two[1]).max() < 0.05
    clear = one[1].min(axis=0) > 0.05  # nearly straight ahead, left and right are rounding
    assert clear.sum() > 100
    assert (np.abs(one[2] - two[2])[clear] < 0.1).all()
    assert np.abs(one[3] - two[3]).max() <= 2
    assert np.abs(one[4] - two[4]).max() <= 3


def test_the_label_moves_one_dot_and_no_stroke():
    keys = random_bits(2, np.arange(40))
    joined, apart = (draw(LEVEL_3, keys, np.full(40, label)) for label in (True, False))
    changed = joined != apart
    assert (changed.sum(axis=(1, 2)) > 10).all()
    assert (changed.sum(axis=(1, 2)) < 2 * 25).all()
    ink = joined.sum(axis=(1, 2), dtype=np.int64) - apart.sum(axis=(1, 2), dtype=np.int64)
    assert np.abs(ink).max() < 6 * 255


def test_the_label_can_be_read_from_the_pixels():
    # Grown by half a gap, the dashes of a path become one region. A dot is wider and now and then meets a neighbour.
    data = make(difficulty=3, train_images=60)
    right = 0
    for picture, label in zip(data.draw("train"), data.labels("train"), strict=True):
        dots, count = ndimage.label(ndimage.uniform_filter(picture / 255, 3) > 0.95)
        assert count == 2
        ink = ndimage.zoom(picture.astype(float), 4, order=1) > 40
        regions, _ = ndimage.label(ndimage.binary_dilation(ink, iterations=4))
        first, second = np.round(np.array(ndimage.center_of_mass(dots > 0, dots, [1, 2])) * 255 / 63).astype(int)
        right += (regions[tuple(first)] == regions[tuple(second)]) == label
    assert right >= 54


def test_no_class_is_told_by_pixels_or_sums():
    data = make(difficulty=3, train_images=6000)
    pictures, labels = data.draw("train").astype(np.float32) / 255, data.labels("train")
    assert labels.mean() == 0.5
    assert (labels.reshape(-1, 2).sum(axis=1) == 1).all()
    pooled = pictures.reshape(-1, 16, 4, 16, 4).mean(axis=(2, 4)).reshape(-1, 256)
    sums = np.stack([pictures.mean(axis=(1, 2)), pictures.std(axis=(1, 2)), (pictures > 0.5).mean(axis=(1, 2))], axis=1)
    for seen in (pooled, (sums - sums.mean(axis=0)) / sums.std(axis=0)):
        found = cross_val_score(LogisticRegression(C=0.1, max_iter=500), seen, labels, cv=4).mean()
        assert abs(found - 0.5) < 4 * 0.5 / len(labels) ** 0.5  # four standard deviations of chance


def test_ink_between_the_dots_tells_of_short_paths_alone():
    assert told_between_the_dots(difficulty=1) > 0.65
    assert told_between_the_dots(difficulty=5) < 0.6


def told_between_the_dots(difficulty):
    """How often the class is told from the ink at most 4 px off the line between the dots."""
    data = make(difficulty=difficulty, train_images=1200)
    seen = []
    for picture in data.draw("train") / 255:
        smooth = ndimage.uniform_filter(picture, 3)
        dots, _ = ndimage.label(smooth > 0.95)
        start, end = np.array(ndimage.center_of_mass(dots > 0, dots, [1, 2]))
        way = end - start
        aside = np.array([-way[1], way[0]]) / np.linalg.norm(way)
        places = [start + share * way + off * aside for off in range(-4, 5, 2) for share in np.arange(1, 8) / 8]
        ink = ndimage.map_coordinates(smooth, np.array(places).T, order=1).reshape(5, 7).max(axis=0)
        seen.append([*np.sort(ink), ink.mean(), np.linalg.norm(way)])
    seen = np.array(seen)
    seen = (seen - seen.mean(axis=0)) / seen.std(axis=0)
    return cross_val_score(LogisticRegression(max_iter=500), seen, data.labels("train"), cv=4).mean()


# The data module.


def test_splits_and_batches(tmp_path):
    data = make(tmp_path, hflip=0.0)
    data.check()
    assert data.class_names == ["apart", "joined"]
    assert (data.num_classes, data.in_chans) == (2, 1)
    for split, images in (("train", data.splits.train), ("val", data.splits.val), ("test", data.splits.test)):
        assert np.array_equal(images.images[:, 0].numpy(), data.draw(split))
        assert np.array_equal(images.labels.numpy(), data.labels(split))
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (8, 1, 64, 64)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    summary = json.loads(json.dumps(data.summary()))
    assert summary["augmentation"] == {"max_shift": 0.0, "hflip": 0.0}
    assert (summary["train_images"], summary["val_images"], summary["test_images"]) == (24, 8, 8)
    assert summary["name"] == "Pathfinder 64 px, difficulty 3"


def test_drawn_once_and_kept(tmp_path, monkeypatch):
    first = make(tmp_path)
    first.check()
    assert len(list((tmp_path / "pathfinder").glob("*.pictures"))) == 3
    monkeypatch.setattr(pathfinder, "draw", pytest.fail)
    again = make(tmp_path, seed=4, batch_size=4)
    again.check()
    assert torch.equal(again.splits.train.images, first.splits.train.images)
    assert torch.equal(again.splits.val.labels, first.splits.val.labels)


@pytest.mark.parametrize(
    "other", [{"difficulty": 2}, {"images_seed": 1}, {"train_images": 22, "val_images": 6, "test_images": 10}], ids=str
)
def test_pictures_of_other_settings_are_not_taken(tmp_path, other):
    make(tmp_path).prepare_data()
    data = make(tmp_path, **other)
    data.check()
    assert np.array_equal(data.splits.test.images[:, 0].numpy(), make(**other).draw("test"))
    assert len(list((tmp_path / "pathfinder").glob("*.pictures"))) == 6


@pytest.mark.parametrize("damage", ["cut", "renamed", "flipped", "empty"])
def test_a_damaged_file_is_drawn_anew(tmp_path, damage, caplog):
    data = make(tmp_path)
    data.prepare_data()
    file = data.file("test")
    good = file.read_bytes()
    if damage == "renamed":
        make(tmp_path, difficulty=1).prepare_data()
        file.write_bytes(make(tmp_path, difficulty=1).file("test").read_bytes())
    else:
        bad = bytearray(good)
        bad[-40] ^= 1
        file.write_bytes({"cut": good[:-9], "flipped": bytes(bad), "empty": b""}[damage])
    data.check()
    assert "not taken" in caplog.text
    assert file.read_bytes() == good
    assert np.array_equal(data.splits.test.images[:, 0].numpy(), data.draw("test"))


def test_without_a_root_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = make()
    data.check()
    assert len(data.splits.train) == 24
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 32}, "image_size=32 is not drawn; expected a multiple of 32 from 64 to 256"),
        ({"image_size": 100}, "image_size=100 is not drawn"),
        ({"image_size": 512}, "image_size=512 is not drawn"),
        ({"difficulty": 0}, r"difficulty=0 is unknown; expected 1 \(easiest\) to 5"),
        ({"difficulty": 6}, "difficulty=6 is unknown"),
        ({"train_images": 0}, "train_images=0 .*1 or more"),
        ({"val_images": 0}, "val_images=0 .*1 or more"),
        ({"test_images": -1}, "test_images=-1 .*1 or more"),
        ({"images_seed": -1}, "images_seed=-1 is no seed"),
        ({"hflip": 2.0}, "hflip=2.0"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_sheet(tmp_path, capsys):
    assert pathfinder_sheet.main(["--out", str(tmp_path / "a.png"), "--columns", "2", "--zoom", "1"]) == 0
    assert Image.open(tmp_path / "a.png").size == (2 * 65 - 1, 10 * (64 + pathfinder_sheet.LINE))
    with pytest.raises(ValueError, match="--zoom 0 leaves nothing to see"):
        pathfinder_sheet.main(["--zoom", "0"])
