"""Images for `predict`."""

import pytest
import torch
from PIL import Image

from msv.data import Digits


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos" / "more").mkdir(parents=True)
    Image.new("RGB", (90, 60), (255, 255, 255)).save(tmp_path / "photos" / "b.JPG")
    Image.new("L", (20, 20), 0).save(tmp_path / "photos" / "a.png")
    Image.new("RGBA", (10, 300), (255, 0, 0, 255)).save(tmp_path / "photos" / "more" / "c.webp")
    (tmp_path / "photos" / "notes.txt").write_text("none")
    return tmp_path / "photos"


def test_a_folder_and_files_in_the_order_given(photos):
    dataset = Digits().predict_dataset([photos / "b.JPG", str(photos)])
    assert [path.name for path in dataset.paths] == ["b.JPG", "a.png", "b.JPG", "c.webp"]
    assert len(dataset) == 4
    image, index = dataset[0]
    # Grey, resized, cropped and normalised as Digits are: white is (1 - mean) / std.
    assert (image.shape, index) == ((1, 32, 32), 0)
    assert torch.allclose(image, torch.full((1, 32, 32), (1 - 0.309) / 0.350), atol=1e-5)
    assert torch.allclose(dataset[1][0], torch.full((1, 32, 32), -0.309 / 0.350), atol=1e-5)


def test_loader_gives_images_with_their_indices(photos):
    loader = Digits(predict_paths=[str(photos)], batch_size=2).predict_dataloader()
    batches = list(loader)
    assert [images.shape for images, _ in batches] == [(2, 1, 32, 32), (1, 1, 32, 32)]
    assert torch.cat([indices for _, indices in batches]).tolist() == [0, 1, 2]


def test_a_digit_saved_as_a_file_comes_back_as_in_validation(tmp_path):
    data = Digits()
    scan = data.splits.val.images[0, 0]
    Image.fromarray(scan.numpy()).save(tmp_path / "digit.png")
    image, _ = data.predict_dataset([tmp_path / "digit.png"])[0]
    assert torch.allclose(image, data.splits.val[0][0], atol=1e-6)


def test_what_is_not_there(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lost.png does not exist; expected an image file or a folder"):
        Digits().predict_dataset([photos, tmp_path / "lost.png"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the folder .*empty has no images; expected files ending in .jpg"):
        Digits().predict_dataset([tmp_path / "empty"])
    with pytest.raises(ValueError, match="no images were given"):
        Digits().predict_dataset([])
    with pytest.raises(ValueError, match=r"predict has no images: .*--data.predict_paths"):
        Digits().predict_dataloader()


def test_a_file_that_is_no_image(photos):
    dataset = Digits().predict_dataset([photos / "notes.txt"])
    with pytest.raises(ValueError, match=r"cannot read the image .*notes.txt"):
        dataset[0]
