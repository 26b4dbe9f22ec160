"""`python cli.py pathfinder`: a sheet of Pathfinder's pictures, both classes at each difficulty, to see and solve."""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from msv.data.pathfinder import LEVELS, Pathfinder
from msv.files import write_atomic

LINE = 14  # pixels for a row's title


def sheet(image_size: int, columns: int, images_seed: int, zoom: int) -> Image.Image:
    """Two rows a difficulty, of training pictures: dots apart, then joined."""
    rows = []
    for difficulty in LEVELS:
        # Of two neighbours one is joined.
        data = Pathfinder(None, image_size, difficulty, train_images=2 * columns, images_seed=images_seed)
        pictures, labels = data.draw("train"), data.labels("train")
        for label, name in enumerate(data.class_names):
            rows.append((f"difficulty {difficulty}: {name}", pictures[labels == label]))
    side = image_size * zoom
    page = Image.new("L", (columns * (side + 1) - 1, len(rows) * (side + LINE)), 255)
    for row, (title, pictures) in enumerate(rows):
        top = row * (side + LINE)
        ImageDraw.Draw(page).text((2, top + 1), title, fill=0)
        for column, picture in enumerate(np.kron(pictures, np.ones((1, zoom, zoom), np.uint8))):
            page.paste(Image.fromarray(picture), (column * (side + 1), top + LINE))
    return page


def main(argv: Sequence[str]) -> int:
    """Write the sheet."""
    parser = argparse.ArgumentParser(prog="cli.py pathfinder", description="Draw a sheet of Pathfinder's pictures.")
    parser.add_argument("--out", type=Path, default=Path("pathfinder.png"), help="a PNG file (default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=64, help="side of a picture (default: %(default)s)")
    parser.add_argument("--images_seed", type=int, default=0, help="seed of the pictures (default: %(default)s)")
    parser.add_argument("--columns", type=int, default=8, help="pictures in a row (default: %(default)s)")
    parser.add_argument("--zoom", type=int, default=2, help="sheet's pixels for one of theirs (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for name in ("columns", "zoom"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)} leaves nothing to see; expected 1 or more")
    png = io.BytesIO()
    sheet(arguments.image_size, arguments.columns, arguments.images_seed, arguments.zoom).save(png, "PNG")
    write_atomic(arguments.out, png.getvalue())
    print(f"wrote {arguments.out}")
    return 0
