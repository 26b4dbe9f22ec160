"""Drawing in integers: strokes with round ends and smooth edges, on many pictures at once.

Lengths are in units of 1/256 px, directions are numbers of 64ths of a turn.
"""

import math

import numpy as np

PIXEL = 256  # units of length
TURN = 64  # units of direction
REACH = 3  # pixels that a shape covers, at most, on each side of its middle's
PHASES = 4  # places of a shape's middle in a pixel, along each axis
SAMPLES = 8  # of a pixel, along each axis, that make an edge smooth

# A cosine's error is far below its distance to the next half, so that every libm gives these integers.
_ANGLES = [2 * math.pi * k / TURN for k in range(TURN)]
COMPASS = np.array([[round(PIXEL * math.cos(a)), round(PIXEL * math.sin(a))] for a in _ANGLES], dtype=np.int64)
"""(TURN, 2): x and y of one pixel's length in each direction."""


class Canvas:
    """Black pictures on which shapes are put, one in each picture at a time, the lighter pixel winning.

    Args:
        count: B, how many pictures.
        size: their side in pixels.
    """

    def __init__(self, count: int, size: int):
        self.size, self.width = size, size + 2 * REACH
        self.pixels = np.zeros((count, self.width**2), np.uint8)
        square = np.arange(2 * REACH + 1)
        self.square = (square[:, None] * self.width + square).reshape(-1)

    def put(self, shapes: np.ndarray, which: np.ndarray | int, places: np.ndarray) -> None:
        """Puts a shape with its middle at `places` (B, 2) of the pictures; `shapes` as of `capsules`."""
        column, row = pixels_of(places).T
        phase = places % PIXEL * PHASES // PIXEL
        cells = (row * self.width + column)[:, None] + self.square
        rows = np.arange(len(places))[:, None]
        shape = shapes[which, phase[:, 1], phase[:, 0]]
        self.pixels[rows, cells] = np.maximum(self.pixels[rows, cells], shape)

    def pictures(self) -> np.ndarray:
        """The pictures, uint8 (B, size, size)."""
        inner = slice(REACH, REACH + self.size)
        return self.pixels.reshape(-1, self.width, self.width)[:, inner, inner]


def capsules(headings: np.ndarray, length: int, radius: int) -> np.ndarray:
    """Strokes with round ends, as light as they cover a pixel: uint8 (headings, PHASES, PHASES, (2·REACH + 1)²).

    Args:
        headings: directions.
        length: from tip to tip.
        radius: half the width.

    Returns:
        For each heading and each place of the middle within a pixel, y first, a square round that pixel, flat.
    """
    line = (np.arange(-REACH * SAMPLES, (REACH + 1) * SAMPLES) * 2 + 1) * PIXEL // (2 * SAMPLES)
    phase = (2 * np.arange(PHASES) + 1) * PIXEL // (2 * PHASES)
    axis = line - phase[:, None]  # (PHASES, samples): from the middle
    shapes = []
    for x, y in COMPASS[headings]:
        right, down = axis[None, :, None, :], axis[:, None, :, None]
        half = length // 2 - radius
        along = np.clip((right * x + down * y) // PIXEL, -half, half)
        distance = (right - along * x // PIXEL) ** 2 + (down - along * y // PIXEL) ** 2
        inside = (distance <= radius**2).reshape(PHASES, PHASES, 2 * REACH + 1, SAMPLES, 2 * REACH + 1, SAMPLES)
        covered = inside.sum(axis=(3, 5))
        shapes.append((covered * 255 // SAMPLES**2).reshape(PHASES, PHASES, -1))
    return np.stack(shapes).astype(np.uint8)


def step(headings: np.ndarray, length: int) -> np.ndarray:
    """A length in directions (...,) as x and y, (..., 2)."""
    return COMPASS[headings] * length // PIXEL


def pixels_of(places: np.ndarray) -> np.ndarray:
    """The pixels in which places lie."""
    return places // PIXEL


def turned(ways: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Vectors (..., 2) turned by (...,) 64ths."""
    x, y, (cos, sin) = ways[..., 0], ways[..., 1], np.moveaxis(COMPASS[by % TURN], -1, 0)
    return np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1) // PIXEL


def mirrored(ways: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Vectors (..., 2) of directions a as vectors of directions `by` - a."""
    x, y, (cos, sin) = ways[..., 0], ways[..., 1], np.moveaxis(COMPASS[by % TURN], -1, 0)
    return np.stack([cos * x + sin * y, sin * x - cos * y], axis=-1) // PIXEL
