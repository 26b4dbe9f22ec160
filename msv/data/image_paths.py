"""Image files: finding them, decoding them, and the data set that `predict` reads."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS


def find_images(folder: Path) -> list[str]:
    """Every image file under a folder, at any depth, sorted; by extension in any case, hidden files left out."""
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.join(parent, name)  # noqa: PTH118 (a Path is slow, and ImageNet has a million)
            for name in files
            if not name.startswith(".") and name.lower().endswith(tuple(IMG_EXTENSIONS))
        ]
    return sorted(found)


def read_image(path: str | os.PathLike[str], mode: str) -> Image.Image:
    """Decodes one image file.

    Args:
        path: The file.
        mode: Pillow's mode of the result, "RGB" or "L" (grey).

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: naming the file, if it is no image or is damaged.
    """
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except FileNotFoundError:
        raise FileNotFoundError(f"the image {os.fspath(path)} does not exist (was it moved meanwhile?)") from None
    # Pillow's decoders raise any of these on damaged files, depending on the format.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot read the image {os.fspath(path)}: {error}; expected a whole image file: replace it or remove it"
        ) from error


class ImagePaths(Dataset):
    """Images without labels, for `predict`: (image float32 (C, H, W), index into `paths`) each.

    Args:
        paths: Image files, or folders that are searched at any depth; in this order.
        transform: What makes a decoded image the network's input.
        mode: "RGB" or "L": what images are converted to first. Grey images are not inverted: digits are light strokes
            on a dark ground in the training data, so a photo of ink on paper has to be inverted beforehand.

    Attributes:
        paths: The files that were found, list of Path.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if there is no path, or a folder without images; when read, if a file is no image or is damaged.
    """

    def __init__(self, paths: Sequence[str | Path], transform: Callable[[Image.Image], Tensor], mode: str = "RGB"):
        if not paths:
            raise ValueError("no images were given: name at least one image file or a folder with images")
        self.paths: list[Path] = []
        for path in map(Path, paths):
            if path.is_dir():
                found = find_images(path)
                if not found:
                    raise ValueError(
                        f"the folder {path} has no images; expected files ending in {', '.join(IMG_EXTENSIONS)}, "
                        "in it or in its folders"
                    )
                self.paths += map(Path, found)
            elif path.exists():
                self.paths.append(path)
            else:
                raise FileNotFoundError(f"{path} does not exist; expected an image file or a folder with images")
        self.transform = transform
        self.mode = mode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(read_image(self.paths[index], self.mode)), index
