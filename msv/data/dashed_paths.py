"""Pathfinder's pictures: dashed curves that never touch, two of them long, and a dot at two of the long ones' ends.

All is integer arithmetic on `random_bits`, so that a key gives the same bits on every machine. Many pictures are drawn
at once, each from a key of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from msv.data.sampling import random_bits
from msv.data.strokes import COMPASS, PIXEL, TURN, Canvas, capsules, mirrored, pixels_of, step, turned

DASH = 4 * PIXEL
HALF_WIDTH = 3 * PIXEL // 4
DOT_RADIUS = 9 * PIXEL // 4
CLEARANCE = 5 * PIXEL // 2  # by which the middles of two paths' strokes are farther apart than a gap is long
TIP_TOLERANCE = 2 * PIXEL  # the dots of both classes are as far from the picture's edge, to within this,
MIDDLE_TOLERANCE = 3 * PIXEL  # and the middles between them to within this
BORDER = 4  # pixels between the middle of a stroke and the picture's edge
CHOICES = 8  # turns that are looked at for a dash, a byte of random bits each
ATTEMPTS = 24  # paths that are begun before the picture is begun again
CHUNK = 1024  # pictures made at once

Begin = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""From pictures' numbers (B,) and random bits (B,): where a path begins, (B, 2), and in which direction, (B,)."""


@dataclass(frozen=True)
class Layout:
    """What a picture holds.

    Attributes:
        size: side of the picture in pixels.
        dashes: of each of the two long paths.
        distractors: number of short paths.
        distractor_dashes: of each short path.
        gap: between two dashes of a path, in pixels.
        turn: largest turn from a dash to the next, in 64ths of a full turn (5.6 degrees).
    """

    size: int
    dashes: int
    distractors: int
    distractor_dashes: int
    gap: int
    turn: int


def draw(layout: Layout, keys: np.ndarray, joined: np.ndarray) -> np.ndarray:
    """Pictures uint8 (N, size, size), light strokes on black; each is a function of its own key and label.

    A key's strokes are the same whatever its label: the label says which ends the dots are on.

    Args:
        layout: of the pictures.
        keys: uint64 (N,).
        joined: bool (N,), whether the two dots are the ends of one path, or of two.
    """
    pictures = np.zeros((len(keys), layout.size, layout.size), np.uint8)
    waiting, begun = np.arange(len(keys)), 0
    while len(waiting):
        failed = []
        for chunk in np.split(waiting, range(CHUNK, len(waiting), CHUNK)):
            scenes = Scenes(layout, random_bits(keys[chunk], begun))
            scenes.add_path(layout.dashes)
            scenes.add_twin()
            for _ in range(layout.distractors):
                scenes.add_path(layout.distractor_dashes)
            done = chunk[scenes.kept]
            pictures[done] = scenes.render(joined[done])
            failed.append(np.delete(chunk, scenes.kept))
        waiting = np.concatenate(failed)
        begun += 1
    return pictures


class Scenes:
    """Pictures in the making, B of them; those that cannot be finished are dropped on the way.

    Attributes:
        kept: (B,) which of the pictures begun these are.
        middles: for each path (B, dashes, 2), x and y of the dashes' middles.
        headings: for each path (B, dashes), the dashes' directions.
        rival: (B,), the end of the first path, 0 or 1, that the second path's first end vies for; see `add_twin`.
    """

    def __init__(self, layout: Layout, keys: np.ndarray):
        self.layout, self.keys = layout, keys
        self.kept = np.arange(len(keys))
        self.middles: list[np.ndarray] = []
        self.headings: list[np.ndarray] = []
        self.rival = np.zeros(len(keys), np.int64)
        self.pitch = DASH + layout.gap * PIXEL
        # The map of taken pixels, flat, with a margin that a step from anywhere inside cannot leave.
        self.margin = -(-2 * self.pitch // PIXEL)
        self.width = layout.size + 2 * self.margin
        inner = slice(self.margin + BORDER, self.margin + layout.size - BORDER)
        taken = np.ones((self.width, self.width), bool)
        taken[inner, inner] = False
        self.taken = np.repeat(taken.reshape(1, -1), len(keys), axis=0)
        # What a dash in each direction covers, seen from the gap's middle before it, and what the next would.
        eighths = np.arange(1, 16, 2)[:, None, None] * self.pitch // 8
        self.covers = self._cells(pixels_of(COMPASS * eighths // PIXEL + PIXEL // 2))  # (8, TURN)
        self.clearance = layout.gap * PIXEL + CLEARANCE
        near = range(-self.clearance // PIXEL, self.clearance // PIXEL + 1)
        disc = [y * self.width + x for y in near for x in near if (x * x + y * y) * PIXEL**2 <= self.clearance**2]
        self.shadows = self.covers[:4, :, None] + np.array(disc)  # (4, TURN, cells)

    def add_path(self, dashes: int) -> None:
        """Adds a path to each picture, from anywhere in any direction."""
        inside = (self.layout.size - 2 * BORDER) * PIXEL

        def anywhere(rows: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            place = np.stack([below(inside, bits, 0, 24), below(inside, bits, 24, 24)], axis=1) + BORDER * PIXEL
            return place, below(TURN, bits, 48, 16)

        self._add(dashes, anywhere)

    def add_twin(self) -> None:
        """Adds a path as long as the first, whose first end is to an end of the first as that's two are to each other.

        As far away, and under the same two angles: mirrored, or with the angles swapped, or both. Where in the picture
        the two are is alike, too. So the dots' places, and the directions in which paths leave them, do not tell
        whether one path joins them. Pictures that have no room for such an end are dropped.
        """
        end, swap, mirror = np.array([0, 1] * 3), np.array([0, 0, 1, 1, 1, 1]), np.array([1, 1, 1, 1, 0, 0])
        ends, inward = self.ends(0)
        # How the other end is seen from `origin`, which looks along `axis`...
        origin = end ^ swap
        way, axis, view = ends[:, 1 - origin] - ends[:, origin], inward[:, origin], inward[:, 1 - origin]
        # ... as seen from `end`, which looks along `target`: (B, 6, 2) and (B, 6).
        target = inward[:, end]
        way = np.where(mirror[:, None], mirrored(way, axis + target), turned(way, target - axis))
        headings = np.where(mirror, axis + target - view, target - axis + view) % TURN
        tips = ends[:, end] + way
        places = tips - step(headings, self.layout.gap * PIXEL // 2)

        fits = self._room(places)
        fits &= np.abs(self._depth(tips) - self._depth(ends[:, 1 - end])) <= TIP_TOLERANCE
        middles = (tips + ends[:, end]) // 2, ends.sum(axis=1, keepdims=True) // 2
        fits &= np.abs(self._depth(middles[0]) - self._depth(middles[1])) <= MIDDLE_TOLERANCE
        some = np.flatnonzero(fits.any(axis=1))
        fits, places, headings = fits[some], places[some], headings[some]
        self._keep(some)

        def rival(rows: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            nth = fits[rows].cumsum(axis=1)
            which = (nth == 1 + below(nth[:, -1], bits, 0, 16)[:, None]).argmax(axis=1)
            self.rival[rows] = end[which]
            return places[rows, which], headings[rows, which]

        self._add(self.layout.dashes, rival, straight=True)

    def ends(self, path: int) -> tuple[np.ndarray, np.ndarray]:
        """The tips (B, 2, 2) of a path's first and last dash, and the directions (B, 2) from there into the path."""
        middles, headings = self.middles[path][:, [0, -1]], self.headings[path][:, [0, -1]]
        inward = (headings + np.array([0, TURN // 2])) % TURN
        return middles - step(inward, DASH // 2), inward

    def render(self, joined: np.ndarray) -> np.ndarray:
        """The pictures, uint8 (B, size, size), with the dots on one path where `joined` (B,), else on two."""
        canvas = Canvas(len(self.keys), self.layout.size)
        for middles, headings in zip(self.middles, self.headings, strict=True):
            for dash in range(headings.shape[1]):
                canvas.put(_DASHES, headings[:, dash], middles[:, dash])
        (first, _), (second, _) = self.ends(0), self.ends(1)
        rows, other = np.arange(len(joined)), 1 - self.rival
        canvas.put(_DOT, 0, first[rows, self.rival])
        canvas.put(_DOT, 0, np.where(joined[:, None], first[rows, other], second[:, 0]))
        return canvas.pictures()

    def _add(self, dashes: int, begin: Begin, straight: bool = False) -> None:
        """Adds a path to each picture, and drops those pictures where none was found."""
        count, number = len(self.keys), len(self.middles)
        middles, headings = np.zeros((count, dashes, 2), np.int64), np.zeros((count, dashes), np.int64)
        waiting = np.arange(count)
        for attempt in range(ATTEMPTS):
            if not len(waiting):
                break
            bits = random_bits(self.keys[waiting, None], number, attempt, np.arange(dashes + 1))
            # For each dash and choice a byte.
            turns = below(2 * self.layout.turn + 1, bits[:, 1:, None], 8 * np.arange(CHOICES), 8) - self.layout.turn
            if straight:
                turns[:, 0] = 0
            found, *path = self._walk(waiting, *begin(waiting, bits[:, 0]), turns)
            free = waiting[found]
            middles[free], headings[free] = path
            waiting = np.delete(waiting, found)
        self.middles.append(middles)
        self.headings.append(headings)
        self._keep(np.delete(np.arange(count), waiting))
        self._take(self.middles[-1], self.headings[-1])

    def _walk(
        self, rows: np.ndarray, place: np.ndarray, heading: np.ndarray, turns: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Walks through pictures `rows` (B,), dash by dash, where there is room.

        Args:
            rows: numbers of the pictures, (B,).
            place: (B, 2), half a gap before the first dash.
            heading: (B,), the first dash's, but for its turn.
            turns: (B, dashes, CHOICES), what each dash may turn by.

        Returns:
            Which of the B walks found their way, and their dashes' middles and headings.
        """
        apart = (self.clearance + self.pitch // 2) ** 2
        dashes = turns.shape[1]
        middles, headings = np.zeros((len(rows), dashes, 2), np.int64), np.zeros((len(rows), dashes), np.int64)
        walks = np.arange(len(rows))
        for dash in range(dashes):
            ways = (heading[:, None] + turns[walks, dash]) % TURN  # (B, CHOICES)
            ahead = place[:, None] + step(ways, self.pitch // 2)
            here = rows[walks, None] * self.width**2 + self._cells(pixels_of(place) + self.margin)[:, None]
            shut = self._covered(self.covers[:4], here, ways)
            for earlier in range(dash - 1):  # the dash before is too near to be kept clear of
                x, y = middles[walks, earlier].T[:, :, None]
                shut |= (ahead[..., 0] - x) ** 2 + (ahead[..., 1] - y) ** 2 < apart
            # The first turn that has room, for the next dash as well if that can be.
            dead_end = self._covered(self.covers[4:], here, ways) if dash + 1 < dashes else False
            choice = (2 * shut + dead_end).argmin(axis=1)
            each = np.arange(len(walks))
            free = each[~shut[each, choice]]
            walks, choice = walks[free], choice[free]
            middle, heading = ahead[free, choice], ways[free, choice]
            middles[walks, dash], headings[walks, dash] = middle, heading
            place = 2 * middle - place[free]
        return walks, middles[walks], headings[walks]

    def _covered(self, covers: np.ndarray, here: np.ndarray, ways: np.ndarray) -> np.ndarray:
        """Whether something taken is among what dashes cover, from cells (B, 1) of the maps in ways (B, CHOICES)."""
        taken = self.taken.reshape(-1)
        found = taken.take(here + covers[0].take(ways))
        for cover in covers[1:]:
            found |= taken.take(here + cover.take(ways))
        return found

    def _take(self, middles: np.ndarray, headings: np.ndarray) -> None:
        """Marks what lies too near to a path."""
        starts = self._cells(pixels_of(middles - step(headings, self.pitch // 2)) + self.margin)
        rows = np.arange(len(starts))[:, None]
        for dash in range(starts.shape[1]):
            for shadow in self.shadows:
                self.taken[rows, starts[:, dash, None] + shadow[headings[:, dash]]] = True

    def _room(self, places: np.ndarray) -> np.ndarray:
        """Whether nothing is near places (B, n, 2) of the pictures: bool (B, n)."""
        last = self.layout.size * PIXEL - 1
        cells = self._cells(pixels_of(np.clip(places, 0, last)) + self.margin)  # the edge is taken, too
        return ~self.taken[np.arange(len(places))[:, None], cells]

    def _depth(self, places: np.ndarray) -> np.ndarray:
        """How far places (..., 2) are from the nearest edge."""
        return np.minimum(places, self.layout.size * PIXEL - places).min(axis=-1)

    def _keep(self, chosen: np.ndarray) -> None:
        """Drops all pictures but the chosen ones, indices (B,)."""
        if len(chosen) == len(self.keys):
            return
        self.kept, self.keys, self.taken = self.kept[chosen], self.keys[chosen], self.taken[chosen]
        self.middles = [middles[chosen] for middles in self.middles]
        self.headings = [headings[chosen] for headings in self.headings]
        self.rival = self.rival[chosen]

    def _cells(self, pixels: np.ndarray) -> np.ndarray:
        """Places on the flat map of pixels (..., 2)."""
        return pixels[..., 1] * self.width + pixels[..., 0]


def below(bound: int | np.ndarray, bits: np.ndarray, shift: int | np.ndarray, width: int) -> np.ndarray:
    """Integers from 0 to bound - 1, int64, of `width` bits of each word from bit `shift` on."""
    part = (bits >> np.asarray(shift, np.uint64)) & np.uint64(2**width - 1)
    return (part * np.asarray(bound, np.uint64) >> np.uint64(width)).astype(np.int64)


_DASHES = capsules(np.arange(TURN), DASH, HALF_WIDTH)
_DOT = capsules(np.arange(1), 2 * DOT_RADIUS, DOT_RADIUS)
