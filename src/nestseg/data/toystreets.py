"""ToyStreets: street scenes drawn on the spot, so that a fresh machine can train without a download.

A scene is a small three-dimensional world in metres (x to the right, y up, z ahead, the camera above the
origin) that a pinhole camera projects and a painter fills in from far to near. The painter writes every shape
into the image and into the ground truth at once, on a canvas of twice the size: the image is averaged down,
the ground truth is sampled, so no label is ever a mixture.

Colours are shared between classes on purpose (grey houses, roads and cars; green cars; brown leaves): what a
pixel is has to be told from shape, texture and place. That colour alone does badly is proved by
``tests/property/test_toystreets_rgb_baseline.py``.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import ClassVar, NamedTuple, final

import cv2
import numpy as np
from numpy.typing import NDArray

from nestseg.core.errors import DataError
from nestseg.core.taxonomy import Taxonomy
from nestseg.core.types import Sample, Size
from nestseg.data.dataset import SegmentationDataset

_Colour = tuple[float, float, float]
_Point = tuple[float, float]
_Corner = tuple[float, float, float]


def _colours(text: str) -> tuple[_Colour, ...]:
    """Read colours in hexadecimal RGB."""
    return tuple((float(word[0]), float(word[1]), float(word[2])) for word in map(bytes.fromhex, text.split()))


TAXONOMY = Taxonomy(
    name="toystreets",
    classes=("sky", "building", "road", "pavement", "vegetation", "car", "person", "pole"),
    palette=(
        (120, 190, 240),
        (150, 110, 100),
        (92, 84, 112),
        (226, 196, 160),
        (96, 160, 84),
        (48, 96, 200),
        (228, 72, 88),
        (244, 204, 64),
    ),
)
"""The eight classes of ToyStreets and the colours to draw them with."""

SKY, BUILDING, ROAD, PAVEMENT, VEGETATION, CAR, PERSON, POLE = range(8)

_OVERSAMPLE = 2
_NEAREST_Z = 0.6  # metres; what is nearer is pulled to it, which distorts only what lies outside the picture
_FARTHEST_Z = 130.0
_KERB = 0.13  # metres the pavement stands above the road
_TURN = [(math.cos(step * math.pi / 6), math.sin(step * math.pi / 6)) for step in range(12)]

_ASPHALT = _colours("606166 6c6c6e 7e7c78 4e5058 56585e 6c645e")
_PAVING = _colours("a6a5a2 b8ac9a b0907e 989288 8a888a c0b8aa")
_WALLS = _colours("989694 76787e a05c4a 8a4a3e ceba98 dcd2c2 7086a0 84987c c48e70 605856 d6b06c b0949c ece8e2")
_ROOFS = _colours("96503c 5c5e68 765c4c 464a54 80423a 607060")
_LEAVES = _colours("4c803a 3a683e 689042 808a3e c48434 96603a b24c34 e2a0b0")
_LEAF_ODDS = (0.32, 0.24, 0.20, 0.08, 0.07, 0.03, 0.03, 0.03)
_BARK = _colours("604a3a 786c60 50423c")
_PAINTS = _colours("96989c 606268 34363c e2e2e0 b02e2a 345696 48784c d6a834 80604c 78a0b2 965078 cc6e36")
_CLOTHES = _colours("3c4254 7a7c80 b43e3a 3a5c96 548052 d8b24c 82624c dedad2 8c5482 2e2e32 d68054 5e9ca4 e296a8")
_SHOES = _colours("2e2e32 5a4234 dedad2 8c4038")
_SKINS = _colours("ecc4a8 d6a480 a06e50 684834")
_HAIRS = _colours("2c221e 5c3e2a c49e5c 8c8a88 964828")
_METALS = _colours("5a5e64 484c52 3e584c 3a4048 6e5a48 7e8286")
_SIGNS = _colours("c4302c 2e58a8 e8e8e4 e2b63c 467c50")
_GLASS = _colours("485468 60748c 3a3e48")
_BLACK, _WHITE, _RED, _SILVER = _colours("1e1e21 eeeae4 c83230 a8aaae")

_TRIANGLE: tuple[_Point, ...] = ((-1.0, -0.6), (0.0, 1.05), (1.0, -0.6))
_DIAMOND: tuple[_Point, ...] = ((-1.0, 0.0), (0.0, 1.0), (1.0, 0.0), (0.0, -1.0))
_PARASOL: tuple[_Point, ...] = ((-1.0, 0.0), (-0.6, 0.36), (0.0, 0.48), (0.6, 0.36), (1.0, 0.0))


class _Mood(NamedTuple):
    """The light of a scene: sun and shade are factors on a surface's own colour, visibility is in metres."""

    colours: tuple[_Colour, ...]  # zenith, horizon, clouds, haze
    sun: _Colour
    shade: _Colour
    shadow: float
    visibility: float
    windows_lit: float
    night: bool = False


_MOODS = (  # noon, morning, sunset, overcast, fog, dusk
    _Mood(_colours("3e7ccc bcd8ee fcfcfc c4d4e4"), (1.10, 1.07, 1.00), (0.66, 0.70, 0.80), 0.46, 110, 0.04),
    _Mood(_colours("6098ce f6debe fff0e1 e8d8c4"), (1.12, 1.02, 0.86), (0.62, 0.64, 0.74), 0.42, 80, 0.10),
    _Mood(_colours("5c5694 fca668 fabeaa e2a482"), (1.14, 0.90, 0.68), (0.56, 0.50, 0.60), 0.40, 80, 0.35),
    _Mood(_colours("a0a8b2 d0d2d4 e2e4e6 c4c8cd"), (0.90, 0.90, 0.92), (0.80, 0.81, 0.84), 0.10, 90, 0.12),
    _Mood(_colours("babec0 cecfcc d6d6d4 c8cac8"), (0.88, 0.88, 0.88), (0.80, 0.81, 0.82), 0.06, 42, 0.25),
    _Mood(_colours("1a2452 80628c 584e76 58527a"), (0.56, 0.56, 0.72), (0.44, 0.45, 0.62), 0.12, 90, 0.6, True),
)
_MOOD_ODDS = (0.36, 0.20, 0.13, 0.18, 0.05, 0.08)


class _Street(NamedTuple):
    """The plan of a street: metres to the right of the camera, and where the sun stands."""

    kerbs: tuple[float, float]
    walls: tuple[float, float]
    sun_side: int
    slant: tuple[float, float]
    leaves: _Colour

    def kerb(self, side: int) -> float:
        """Where the pavement begins on a side (-1 left, 1 right)."""
        return self.kerbs[side > 0]

    def wall(self, side: int) -> float:
        """Where the houses begin on a side (-1 left, 1 right)."""
        return self.walls[side > 0]


@final
class _Painter:
    """A canvas for image and ground truth with a pinhole camera in front of it.

    Outlines are in metres; colours are a surface's own, which light and haze then change.
    """

    def __init__(self, size: Size, *, mood: _Mood, focal: float, eye: float, centre: _Point) -> None:
        self.height, self.width = size
        self.mood = mood
        self.image: NDArray[np.uint8] = np.zeros((*size, 3), np.uint8)
        self.target: NDArray[np.uint8] = np.zeros(size, np.uint8)
        self.shadows: NDArray[np.uint8] = np.zeros(size, np.uint8)
        self.glows: list[tuple[float, float, float, _Colour]] = []
        self.focal = focal * self.height
        self.eye = eye
        self.centre_x = centre[0] * self.width
        self.horizon = centre[1] * self.height

    def project(self, outline: Iterable[_Corner]) -> NDArray[np.int32]:
        """Project one outline to canvas pixels.

        Shape:
            - returns: (num_corners, 2) int32, (column, row) as OpenCV wants them
        """
        pixels = []  # plain floats: for a handful of corners far faster than arrays
        for x, y, z in outline:
            scale = self.focal / (z if z > _NEAREST_Z else _NEAREST_Z)
            pixels.append((round(self.centre_x + scale * x), round(self.horizon + scale * (self.eye - y))))
        return np.array(pixels, np.int32)

    def project_each(self, outlines: Sequence[Sequence[_Corner]]) -> list[NDArray[np.int32]]:
        """Project many outlines with equally many corners, see `project`."""
        world = np.array(outlines)
        scale = self.focal / np.maximum(world[..., 2:], _NEAREST_Z)
        pixels = (world[..., :2] * (1, -1) + (0, self.eye)) * scale + (self.centre_x, self.horizon)
        return list(np.rint(pixels).astype(np.int32))

    def lit(self, colour: _Colour, z: float, sun: float = 1.0) -> _Colour:
        """Colour of a surface z metres away in this light; ``sun`` 0 is shade and 1 is full sun."""
        clear = math.exp(-z / self.mood.visibility)
        light, shade, haze = self.mood.sun, self.mood.shade, self.mood.colours[3]
        return (
            clear * (colour[0] * (shade[0] + sun * (light[0] - shade[0])) - haze[0]) + haze[0],
            clear * (colour[1] * (shade[1] + sun * (light[1] - shade[1])) - haze[1]) + haze[1],
            clear * (colour[2] * (shade[2] + sun * (light[2] - shade[2])) - haze[2]) + haze[2],
        )

    def fill(self, outline: Sequence[_Corner], colour: _Colour, label: int | None, *, sun: float = 1.0) -> None:
        """Fill one polygon.

        Args:
            outline: At least three corners; the first and the third tell how far away it is.
            colour: The surface's own colour.
            label: Train id, or None for a detail inside a shape that was labelled before.
            sun: How much of the sun reaches the surface.
        """
        z = (outline[0][2] + outline[2][2]) / 2
        self._fill([self.project(outline)], self.lit(colour, z, sun), label)

    def fill_each(
        self, outlines: Sequence[Sequence[_Corner]], colour: _Colour, label: int | None, *, sun: float = 1.0
    ) -> None:
        """Fill polygons of one colour and corner count that do not overlap; see `fill` for the arguments."""
        z = (outlines[0][0][2] + outlines[-1][2][2]) / 2
        self._fill(self.project_each(outlines), self.lit(colour, z, sun), label)

    def pave(self, outlines: Sequence[Sequence[_Corner]], colour: _Colour, label: int | None) -> None:
        """Fill polygons of the ground, whose haze, which varies along them, comes with the shadows."""
        self._fill(self.project_each(outlines), self.lit(colour, 0.0), label)

    def _fill(self, pixels: Sequence[NDArray[np.int32]], colour: _Colour, label: int | None) -> None:
        cv2.fillPoly(self.image, pixels, colour)
        if label is not None:
            cv2.fillPoly(self.target, pixels, label)

    def lines(self, ends: Sequence[tuple[_Corner, _Corner]], colour: _Colour, *, z: float, sun: float = 1.0) -> None:
        """Draw hairlines, about z metres away, into the image only."""
        cv2.polylines(self.image, self.project_each(ends), False, self.lit(colour, z, sun))

    def shadow(self, outline: Sequence[_Corner], strength: float) -> None:
        """Take a share of the light from a polygon of the ground."""
        cv2.fillPoly(self.shadows, [self.project(outline)], round(255 * strength))

    def glow(self, at: _Corner, colour: _Colour, *, radius: float) -> None:
        """Let a lamp shine into the picture at night; the ground truth does not change."""
        if self.mood.night:
            x, y, z = at
            scale = self.focal / z
            place = self.centre_x + scale * x, self.horizon + scale * (self.eye - y)
            self.glows.append((*place, scale * radius, colour))


@final
class _Board:
    """A flat figure that stands upright at one place and faces the camera.

    Points are metres from its foot, or multiples of ``scale`` metres.
    """

    def __init__(self, painter: _Painter, foot: _Corner, *, label: int, scale: float = 1.0) -> None:
        x, y, self.z = foot
        pixels_per_metre = painter.focal / self.z
        self.painter, self.label = painter, label
        self.scale = pixels_per_metre * scale
        self.x = painter.centre_x + pixels_per_metre * x
        self.y = painter.horizon + pixels_per_metre * (painter.eye - y)

    def _pixel(self, point: _Point) -> tuple[int, int]:
        return round(self.x + self.scale * point[0]), round(self.y - self.scale * point[1])

    def polygon(
        self,
        points: Iterable[_Point],
        colour: _Colour,
        *,
        sun: float = 1.0,
        at: _Point = (0.0, 0.0),
        times: _Point = (1.0, 1.0),
    ) -> None:
        """Fill a polygon, stretched by ``times`` and then moved to ``at``."""
        outline = np.array([self._pixel((at[0] + times[0] * x, at[1] + times[1] * y)) for x, y in points], np.int32)
        cv2.fillPoly(self.painter.image, [outline], self.painter.lit(colour, self.z, sun))
        cv2.fillPoly(self.painter.target, [outline], self.label)

    def box(self, low: _Point, high: _Point, colour: _Colour, *, sun: float = 1.0) -> None:
        """Fill an upright rectangle between two opposite corners."""
        first, second = self._pixel(low), self._pixel(high)
        cv2.rectangle(self.painter.image, first, second, self.painter.lit(colour, self.z, sun), cv2.FILLED)
        cv2.rectangle(self.painter.target, first, second, self.label, cv2.FILLED)

    def disc(self, centre: _Point, radius: float, colour: _Colour, *, sun: float = 1.0) -> None:
        """Fill a circle."""
        middle, pixels = self._pixel(centre), max(1, round(self.scale * radius))
        cv2.circle(self.painter.image, middle, pixels, self.painter.lit(colour, self.z, sun), cv2.FILLED)
        cv2.circle(self.painter.target, middle, pixels, self.label, cv2.FILLED)

    def stroke(self, points: Iterable[_Point], colour: _Colour, *, width: float, sun: float = 1.0) -> None:
        """Draw a thick line with round ends through points."""
        outline = np.array([self._pixel(point) for point in points], np.int32)
        pixels = max(1, round(self.scale * width))
        cv2.polylines(self.painter.image, [outline], False, self.painter.lit(colour, self.z, sun), pixels)
        cv2.polylines(self.painter.target, [outline], False, self.label, pixels)


class _Scene(NamedTuple):
    """What everything that plans or draws a part of a scene needs."""

    rng: np.random.Generator
    painter: _Painter
    street: _Street

    def cast(self, x: float, z: float, *, width: float, height: float) -> None:
        """Lay the shadow of something thin and upright on the ground."""
        dx, dz = height * self.street.slant[0], height * self.street.slant[1]
        half = width / 2
        outline = [(x - half, 0, z), (x + half, 0, z), (x + half + dx, 0, z + dz), (x - half + dx, 0, z + dz)]
        self.painter.shadow(outline, self.painter.mood.shadow)


_Plan = tuple[float, Callable[[], None]]
"""A depth in metres to sort by, and what draws the thing there. Plans draw no random numbers when called."""


def draw_scene(rng: np.random.Generator, size: Size = (128, 256)) -> Sample:
    """Draw one street scene.

    All that the generator decides about a scene is decided before the first draw that depends on the size, so
    equal seeds give the same street at every size of one shape; only the grain of the sensor differs.

    Args:
        rng: Where every random decision comes from.
        size: (height, width) of the sample; meant for a width of about twice the height.

    Returns:
        An image and its ground truth, without ignored pixels.

    Shape:
        - returns.image: (H, W, 3) uint8 RGB
        - returns.target: (H, W) uint8 train ids in 0-7
    """
    painter = _Painter(
        (size[0] * _OVERSAMPLE, size[1] * _OVERSAMPLE),
        mood=_MOODS[_choose(rng, _MOOD_ODDS)],
        focal=rng.uniform(0.95, 1.15),
        eye=rng.uniform(1.55, 2.0),
        centre=(rng.uniform(0.40, 0.60), rng.uniform(0.43, 0.52)),
    )
    scene = _Scene(rng, painter, _plan_street(rng))
    _draw_sky(scene)
    _draw_horizon(scene)
    _draw_ground(scene)
    plots = [plot for side in (-1, 1) for plot in _plan_plots(scene, side)]
    things = _plan_things(scene)
    _lay_shadows(painter)
    # A house never hides what stands between it and the road, so all houses come first.
    for plans in (plots, things):
        for _, draw in sorted(plans, key=lambda plan: -plan[0]):
            draw()
    return _develop(scene, size)


def _pick(rng: np.random.Generator, colours: Sequence[_Colour], *, spread: float = 16.0) -> _Colour:
    """One of the colours, made a little lighter or darker and a little more colourful."""
    which, tone, *tints = rng.random(5).tolist()
    red, green, blue = (
        min(250.0, max(12.0, channel + spread * (2 * tone - 1) + 0.5 * spread * (2 * tint - 1)))
        for channel, tint in zip(colours[int(which * len(colours))], tints, strict=True)
    )
    return red, green, blue


def _choose(rng: np.random.Generator, odds: Sequence[float]) -> int:
    """An index, drawn with these odds, which sum to 1."""
    return min(bisect(list(accumulate(odds)), float(rng.random())), len(odds) - 1)


def _blend(first: _Colour, second: _Colour, share: float) -> _Colour:
    red, green, blue = (a + share * (b - a) for a, b in zip(first, second, strict=True))
    return red, green, blue


def _times(colour: _Colour, factor: float) -> _Colour:
    return min(255.0, colour[0] * factor), min(255.0, colour[1] * factor), min(255.0, colour[2] * factor)


def _value_noise(rng: np.random.Generator, shape: Size, cells: Sequence[Size]) -> NDArray[np.float32]:
    """Smooth noise about 0: random grids, enlarged, each with half the weight of the one before."""
    noise = np.zeros(shape, np.float32)
    for octave, grid in enumerate(cells):
        coarse = rng.random(grid, dtype=np.float32) - 0.5
        noise += cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC) * 0.5**octave
    return noise


def _plan_street(rng: np.random.Generator) -> _Street:
    half, shift = rng.uniform(3.0, 4.6), rng.uniform(-1.4, 1.4)
    sun_side = 1 if rng.random() < 0.5 else -1
    return _Street(
        kerbs=(shift - half, shift + half),
        walls=(shift - half - rng.uniform(2.4, 4.0), shift + half + rng.uniform(2.4, 4.0)),
        sun_side=sun_side,
        slant=(-sun_side * rng.uniform(0.35, 0.9), rng.uniform(-0.5, 0.6)),
        leaves=_LEAVES[_choose(rng, _LEAF_ODDS)],
    )


def _draw_sky(scene: _Scene) -> None:
    rng, painter, street = scene
    mood = painter.mood
    rows, columns = 48, 96  # the sky is soft: a small picture of it, enlarged, is as good and much faster
    horizon = rows * painter.horizon / painter.height
    above, low, cloud = np.array(mood.colours[:3], np.float32)
    down = np.clip(np.arange(rows, dtype=np.float32) / horizon, 0, 1)[:, None, None] ** rng.uniform(0.7, 1.3)
    sky = above * (1 - down) + low * down
    sky = np.repeat(sky, columns, axis=1)
    cover = rng.uniform(-0.25, 0.25)
    noise = _value_noise(rng, (rows, columns), ((5, 5), (10, 12), (20, 26)))
    clouds = np.clip((noise + cover) * 3.0, 0, 0.92)[..., None]
    relief = 1 - 0.14 * np.clip(noise - np.roll(noise, -2, axis=0), -0.6, 0.6)[..., None]
    sky += clouds * (cloud * relief - sky)
    sun_x, sun_y = 0.5 + street.sun_side * rng.uniform(0.1, 0.42), rng.uniform(0.1, 0.7) * horizon / rows
    if mood.shadow > 0.3 and rng.random() < 0.6:
        shine = np.zeros((rows, columns), np.float32)
        cv2.circle(shine, (round(sun_x * columns), round(sun_y * rows)), 3, 1.0, cv2.FILLED)
        halo = cv2.GaussianBlur(shine, (0, 0), 5) * 2.2 + cv2.GaussianBlur(shine, (0, 0), 0.8)
        sky += np.minimum(halo, 1.0)[..., None] * (np.array((255, 248, 225), np.float32) - sky)
    canvas = (painter.width, painter.height)
    painter.image[:] = cv2.resize(np.clip(sky, 0, 255).astype(np.uint8), canvas, interpolation=cv2.INTER_LINEAR)
    stars = rng.random((26, 3)).tolist()
    if mood.night:
        for across, up, glint in stars:
            place = round(across * painter.width), round(up * 0.8 * painter.horizon)
            cv2.circle(painter.image, place, round(painter.height / 256 * (0.5 + glint)), (210, 214, 232), cv2.FILLED)
        x, y, size = sun_x * painter.width, sun_y * painter.height, painter.height / 20
        cv2.circle(painter.image, (round(x), round(y)), round(size), (238, 234, 214), cv2.FILLED)
        for dx, dy, radius in ((-0.3, -0.2, 0.22), (0.35, 0.25, 0.16), (0.1, -0.45, 0.12)):
            crater = round(x + dx * size), round(y + dy * size)
            cv2.circle(painter.image, crater, round(radius * size), (214, 210, 194), cv2.FILLED)


def _draw_horizon(scene: _Scene) -> None:
    """The end of the street: a far skyline or a far wood, both deep in the haze."""
    rng, painter, _ = scene
    z = _FARTHEST_Z
    board = _Board(painter, (0, 0, z), label=BUILDING)
    x = -95.0
    if rng.random() < 0.6:
        while x < 95.0:
            width, height = rng.uniform(5, 13), rng.uniform(6, 26)
            wall = _pick(rng, _WALLS)
            board.box((x, 0), (x + width, height), wall, sun=0.5)
            if rng.random() < 0.3:
                board.polygon(_TRIANGLE, _times(wall, 0.8), at=(x + width / 2, height + 2), times=(width / 2, 4))
            x += width
        return
    board.label = VEGETATION
    leaves = _pick(rng, _LEAVES[:4])
    board.box((-110, 0), (110, 7), leaves)
    while x < 95.0:
        board.disc((x, rng.uniform(5, 8)), rng.uniform(3, 6), _times(leaves, rng.uniform(0.8, 1.2)))
        x += rng.uniform(4, 8)


def _strip(left: float, right: float, y: float, near: float = _NEAREST_Z, far: float = _FARTHEST_Z) -> list[_Corner]:
    """A rectangle that lies flat."""
    return [(left, y, near), (left, y, far), (right, y, far), (right, y, near)]


def _ring(x: float, z: float, radius: float) -> list[_Corner]:
    """A circle on the ground."""
    return [(x + radius * across, 0.0, z + radius * ahead) for across, ahead in _TURN]


def _draw_ground(scene: _Scene) -> None:
    rng, painter, street = scene
    asphalt, paving = _pick(rng, _ASPHALT), _pick(rng, _PAVING)
    kerbstone, joint = _times(paving, rng.uniform(0.8, 1.25)), _times(paving, 0.84)
    left, right = street.kerbs
    painter.pave([_strip(-400, 400, 0)], street.leaves, VEGETATION)
    painter.pave([_strip(left, right, 0)], asphalt, ROAD)
    for _ in range(int(rng.integers(0, 4))):  # patches where somebody dug
        x, z, width, length = rng.uniform((left, 3, 0.7, 1), (right - 1.2, 20, 1.8, 6)).tolist()
        patch = _times(asphalt, rng.uniform(0.82, 1.12))
        painter.pave([_strip(x, min(x + width, right), 0, z, z + length)], patch, None)
    _draw_markings(scene)
    for side in (-1, 1):
        kerb, wall = street.kerb(side), street.wall(side)
        low, high = ((kerb, y, _NEAREST_Z) for y in (0.0, _KERB))
        far_low, far_high = ((kerb, y, _FARTHEST_Z) for y in (0.0, _KERB))
        painter.pave([_strip(kerb, wall, _KERB)], paving, PAVEMENT)
        painter.pave([_strip(kerb, kerb + side * 0.25, _KERB)], kerbstone, PAVEMENT)
        painter.pave([[low, high, far_high, far_low]], _times(kerbstone, 0.72), PAVEMENT)
        painter.lines([((kerb, _KERB, 2 + 1.2 * row), (wall, _KERB, 2 + 1.2 * row)) for row in range(12)], joint, z=0)
        thirds = [kerb + (wall - kerb) * share / 3 for share in (1, 2)]
        painter.lines([((x, _KERB, 1.0), (x, _KERB, 24.0)) for x in thirds], joint, z=0)
        if rng.random() < 0.35:  # grass between pavement and houses
            verge = wall - side * rng.uniform(0.6, 1.0)
            painter.pave([_strip(verge, wall, _KERB)], _pick(rng, (street.leaves, _LEAVES[2])), VEGETATION)


def _draw_markings(scene: _Scene) -> None:
    rng, painter, street = scene
    left, right = street.kerbs
    middle = (left + right) / 2
    paint = _WHITE if rng.random() < 0.75 else (226.0, 190.0, 80.0)
    style = rng.random()
    if style < 0.65:
        first = rng.uniform(1.5, 5.0)
        starts = [first + 5.5 * dash for dash in range(12)]
        painter.pave([_strip(middle - 0.09, middle + 0.09, 0, z, z + 2.6) for z in starts], paint, None)
    elif style < 0.85:
        painter.pave([_strip(middle + at, middle + at + 0.12, 0) for at in (-0.2, 0.08)], paint, None)
    if rng.random() < 0.4:
        painter.pave([_strip(x, x + 0.12, 0) for x in (left + 0.35, right - 0.47)], _WHITE, None)
    if rng.random() < 0.35:
        z = rng.uniform(6, 16)
        stripes = np.arange(left + 0.3, right - 0.6, 1.0).tolist()
        painter.pave([_strip(x, x + 0.55, 0, z, z + 3.0) for x in stripes], _WHITE, None)
    if rng.random() < 0.5:
        painter.pave([_ring(rng.uniform(left + 0.8, right - 0.8), rng.uniform(5, 12), 0.36)], (70, 66, 64), None)


def _lay_shadows(painter: _Painter) -> None:
    """Lay the collected shadows and the haze over the ground: nothing else is below the horizon as yet."""
    top = math.ceil(painter.horizon)
    depth = painter.focal * painter.eye / (np.arange(top, painter.height) + 1 - painter.horizon)
    clear = np.exp(-depth / painter.mood.visibility)[:, None]
    light = 255 - cv2.GaussianBlur(painter.shadows[top:], (0, 0), painter.height / 200)
    kept = cv2.multiply(light, np.repeat(np.rint(255 * clear).astype(np.uint8), painter.width, axis=1), scale=1 / 255)
    veil = np.rint((1 - clear) * np.array(painter.mood.colours[3])).astype(np.uint8)[:, None]
    ground = cv2.multiply(painter.image[top:], cv2.merge([kept] * 3), scale=1 / 255)
    painter.image[top:] = cv2.add(ground, np.repeat(veil, painter.width, axis=1))


def _plan_plots(scene: _Scene, side: int) -> list[_Plan]:
    """Line one side of the street with houses and gardens."""
    rng = scene.rng
    plots: list[_Plan] = []
    z = rng.uniform(0.8, 4.0)
    while z < 70.0:
        if rng.random() < 0.22:
            length = rng.uniform(6, 8)
            plots.append(_plan_garden(scene, side, start=z, length=length))
        else:
            length = rng.uniform(6, 13)
            plots.append(_plan_house(scene, side, start=z, length=length))
            length += 1.5 if rng.random() < 0.33 else 0.0
        z += length
    return plots


def _plan_house(scene: _Scene, side: int, *, start: float, length: float) -> _Plan:
    rng, painter, street = scene
    mood = painter.mood
    x, far = street.wall(side) + side * (0.7 if rng.random() < 0.33 else 0.0), start + length
    back, ridge = x + side * 9.0, x + side * 4.0
    floors, storey = 1 + _choose(rng, (0.20, 0.34, 0.28, 0.13, 0.05)), rng.uniform(2.7, 3.3)
    height = floors * storey + rng.uniform(0.5, 1.0)
    top = height + rng.uniform(1.8, 3.2)
    pitched, chimney, shop, brick = (rng.random(4) < (0.55, 0.6, 0.35, 0.4)).tolist()
    wall, roof, cloth, glass = (_pick(rng, colours) for colours in (_WALLS, _ROOFS, _CLOTHES, _GLASS))
    trim = _blend(wall, _WHITE, rng.uniform(0.4, 0.9))
    lamplight = (430.0, 350.0, 205.0) if mood.night else (250.0, 214.0, 140.0)
    columns = max(2, round(length / rng.uniform(2.2, 3.0)))
    bay, door = length / columns, int(rng.integers(columns))
    wide, tall = rng.uniform(0.42, 0.6) * bay, rng.uniform(0.46, 0.62) * storey
    panes = np.where(rng.random((5, 6)) < mood.windows_lit, 2, rng.random((5, 6)) < 0.2).tolist()
    sun, gable_sun = 0.05 if street.sun_side == side else 0.95, 0.45
    if street.sun_side == side:
        dx, dz = street.slant[0] * height * 0.45, street.slant[1] * height * 0.45
        painter.shadow([(x, 0, start), (x, 0, far), (x + dx, 0, far + dz), (x + dx, 0, start + dz)], mood.shadow)

    def face(low: float, high: float, near: float, away: float) -> list[_Corner]:
        """A rectangle of the wall that looks at the street."""
        return [(x, low, near), (x, high, near), (x, high, away), (x, low, away)]

    def draw() -> None:
        end: list[_Corner] = [(x, 0, start), (x, height, start), (back, height, start), (back, 0, start)]
        painter.fill(end, wall, BUILDING, sun=gable_sun)
        if pitched:
            painter.fill(
                [(x, height, start), (ridge, top, start), (ridge, top, far), (x, height, far)],
                roof,
                BUILDING,
                sun=sun,
            )
            painter.fill(
                [(x, height, start), (ridge, top, start), (back, height, start)],
                wall,
                BUILDING,
                sun=gable_sun,
            )
        if pitched and chimney:
            board = _Board(painter, (x + side * 2.6, height + 0.8, start + 0.6 * length), label=BUILDING)
            board.box((-0.4, 0), (0.4, 2.4), _times(wall, 0.8), sun=0.5)
            board.box((-0.5, 2.3), (0.5, 2.55), _times(wall, 0.6), sun=0.5)
        painter.fill(face(0, height, start, far), wall, BUILDING, sun=sun)
        if brick and start < 24:
            courses = np.arange(0.3, height, 0.45).tolist()
            ends = [((x, y, start), (x, y, far)) for y in courses]
            painter.lines(ends, _times(wall, 0.86), z=start + length / 2, sun=sun)
        bands = [face(height - 0.35, height, start, far), face(0, 0.5, start, far)]
        painter.fill_each(bands, trim, None, sun=0.8 * sun)
        if start < 45:
            draw_windows()
        if start < 35:
            draw_entrance()

    def draw_windows() -> None:
        frames: list[list[_Corner]] = []
        kinds: tuple[list[list[_Corner]], ...] = ([], [], [])
        for floor in range(floors):
            low = max(floor * storey + 0.5 * (storey - tall), 0.95)
            for column in range(columns):
                if floor == 0 and (shop or column == door):
                    continue
                near = start + (column + 0.5) * bay - wide / 2
                frames.append(face(low - 0.12, low + tall + 0.12, near - 0.12, near + wide + 0.12))
                kinds[panes[floor][column]].append(face(low, low + tall, near, near + wide))
        if not frames:
            return
        painter.fill_each(frames, trim, None, sun=sun)
        for outlines, colour in zip(kinds, (glass, (206.0, 196.0, 188.0), lamplight), strict=True):
            if outlines:
                painter.fill_each(outlines, colour, None)
        if start < 22:  # glazing bars
            spans = [(low, high, (near + away) / 2) for (_, low, near), (_, high, _), (_, _, away), _ in frames]
            bars = [((x, low, at), (x, high, at)) for low, high, at in spans]
            painter.lines(bars, trim, z=start + length / 2, sun=sun)

    def draw_entrance() -> None:
        middle = start + (door + 0.5) * bay
        if not shop:
            painter.fill(face(_KERB, 2.45, middle - 0.75, middle + 0.75), trim, None, sun=sun)
            painter.fill(face(_KERB, 2.3, middle - 0.55, middle + 0.55), cloth, None, sun=sun)
            return
        painter.fill(face(0.6, 2.3, start + 0.5, far - 0.5), lamplight if mood.night else glass, None)
        painter.fill(face(_KERB, 2.25, middle - 0.55, middle + 0.55), _times(cloth, 0.6), None, sun=sun)
        out = x - side * 0.9
        stripes = [start + 0.3 + (length - 0.6) * stripe / 8 for stripe in range(9)]
        awning: list[list[_Corner]] = [
            [(x, 2.95, near), (out, 2.4, near), (out, 2.4, away), (x, 2.95, away)] for near, away in pairwise(stripes)
        ]
        painter.fill_each(awning[::2], cloth, BUILDING, sun=max(sun, 0.5))
        painter.fill_each(awning[1::2], _WHITE, BUILDING, sun=max(sun, 0.5))

    return start, draw


def _plan_garden(scene: _Scene, side: int, *, start: float, length: float) -> _Plan:
    rng, painter, street = scene
    x = street.wall(side)
    places = [(x + side * rng.uniform(1.8, 5.0), 0.0, start + length * share) for share in (0.75, 0.3)]
    trees = [_plan_tree(scene, place) for place in places]
    hedge = _pick(rng, (street.leaves, _LEAVES[0]))
    steps = np.arange(length - 0.5, 0.0, -0.9)
    bushes = [(max(start + step, 1.0), *rng.uniform((0.5, 0.8), (0.8, 1.2)).tolist()) for step in steps.tolist()]

    def draw() -> None:
        for _, draw_tree in trees:
            draw_tree()
        for z, radius, tone in bushes:
            board = _Board(painter, (x + side * 0.5, 0, z), label=VEGETATION)
            board.box((-radius, 0), (radius, 0.5), _times(hedge, 0.7 * tone))
            board.disc((0, 0.55), radius, _times(hedge, 0.8 * tone))
            board.disc((0.1, 0.8), 0.7 * radius, _times(hedge, tone))

    return start, draw


def _plan_tree(scene: _Scene, foot: _Corner) -> _Plan:
    rng, painter, street = scene
    z, sun_side = foot[2], street.sun_side
    leaves = _pick(rng, (street.leaves, street.leaves, _LEAVES[int(rng.integers(4))]))
    bark = _pick(rng, _BARK)
    fir = rng.random() < 0.18
    stem, radius, trunk = rng.uniform((1.9, 1.2, 0.16), (2.7, 1.9, 0.24)).tolist()
    across, up = (0.6 * radius, 1.9 * radius) if rng.random() < 0.24 else (radius, radius)
    count = 26 if z < 16 else 13  # far crowns are small: fewer and larger puffs do
    puffs = rng.uniform((0, 0, -0.1, 0.3), (2 * math.pi, 1, 0.1, 0.5), (26, 4))[:count].tolist()

    def draw() -> None:
        board = _Board(painter, foot, label=VEGETATION)
        trapezium = [(-trunk, 0.0), (-0.6 * trunk, stem + 1), (0.6 * trunk, stem + 1), (trunk, 0.0)]
        board.polygon(trapezium, bark, sun=0.6)
        if fir:
            for tier in range(4):
                low, wide, tone = 1.6 + 0.95 * tier, radius * (1.0 - 0.21 * tier), 0.62 + 0.08 * tier
                board.polygon(_TRIANGLE, _times(leaves, tone), at=(0, low), times=(wide, 1.15), sun=0.6)
                lit_half = [(0.25 * sun_side, -0.55), (0.0, 1.0), (sun_side, -0.55)]
                board.polygon(lit_half, _times(leaves, tone + 0.18), at=(0, low), times=(wide, 1.15))
            return
        middle = stem + 0.85 * up
        board.polygon(_TURN, _times(leaves, 0.55), at=(0, middle), times=(0.7 * across, 0.7 * up), sun=0.3)
        for angle, reach, tone, size in sorted(puffs, key=lambda puff: puff[1] * math.sin(puff[0])):
            dx, dy = (0.72 * math.sqrt(reach) * turn for turn in (math.cos(angle), math.sin(angle)))
            light = min(1.0, max(0.0, 0.5 + 0.35 * dy + 0.25 * sun_side * dx))
            at = across * dx, middle + up * dy
            grown = size * across * math.sqrt(26 / count)
            board.disc(at, grown, _times(leaves, 0.52 + 0.5 * light + tone), sun=light)
            if tone > 0:
                glint = at[0] + 0.4 * sun_side * grown, at[1] + 0.4 * grown
                board.disc(glint, 0.22 * grown, _times(leaves, 0.8 + 0.5 * light + tone))

    return z, draw


def _plan_things(scene: _Scene) -> list[_Plan]:
    """Put cars, people, poles and street trees into the scene."""
    rng, painter, street = scene
    things: list[_Plan] = []
    for side in (-1, 1):
        kerb, wall = street.kerb(side), street.wall(side)
        z = rng.uniform(5.0, 9.0)
        while z < 42.0:  # parked cars
            if rng.random() < 0.5:
                things.append(_plan_car(scene, kerb - side * 1.05, z=z, oncoming=side < 0))
            z += rng.uniform(5.6, 10.0)
        z = rng.uniform(5.0, 9.0)
        while z < 20.0:  # poles and trees take turns along the kerb
            x, what = kerb + side * rng.uniform(0.4, 0.65), rng.random()
            if what < 0.62:
                things.append(_plan_pole(scene, (x, _KERB, z), side=side))
            elif what < 0.88:
                things.append(_plan_tree(scene, (x, _KERB, z + 4.0)))
                painter.shadow(
                    _ring(x + 2.4 * street.slant[0], z + 4.0 + 2.4 * street.slant[1], 1.4),
                    painter.mood.shadow,
                )
            z += rng.uniform(4.0, 6.5)
        for _ in range(int(rng.integers(2, 5))):
            x = rng.uniform(min(kerb, wall) + 0.5, max(kerb, wall) - 0.5)
            things.append(_plan_person(scene, (x, _KERB, rng.uniform(4.0, 7.5))))
    left, right = street.kerbs
    for _ in range(int(rng.integers(0, 3))):
        things.append(_plan_person(scene, (rng.uniform(left + 0.5, right - 0.5), 0.0, rng.uniform(4.5, 8.0))))
    lane = (right - left) / 4
    if rng.random() < 0.55:
        things.append(_plan_car(scene, right - lane - 0.7, z=rng.uniform(9, 30), oncoming=False))
    if rng.random() < 0.45:
        things.append(_plan_car(scene, left + lane + 0.7, z=rng.uniform(12, 35), oncoming=True))
    if rng.random() < 0.16:
        things.append(_plan_crossing_car(scene, (rng.uniform(left + 1.5, right - 1.5), 0.0, rng.uniform(9, 15))))
    return things


def _plan_person(scene: _Scene, foot: _Corner) -> _Plan:
    rng, painter, street = scene
    x, _, z = foot
    height = rng.uniform(1.68, 1.95) if rng.random() < 0.88 else rng.uniform(1.25, 1.45)
    coat, trousers, bag = (_pick(rng, _CLOTHES) for _ in range(3))
    skin, hair, shoes = (_pick(rng, colours, spread=6) for colours in (_SKINS, _HAIRS, _SHOES))
    dress, long_hair, pack, hat, parasol = (rng.random(5) < (0.25, 0.4, 0.22, 0.18, 0.08)).tolist()
    stride, swing, top, wide = rng.uniform((-0.17, 0.04, -0.02, 0.19), (0.17, 0.16, 0.02, 0.23)).tolist()
    ahead, sun_side = 1 if rng.random() < 0.5 else -1, street.sun_side
    scene.cast(x, z, width=0.36, height=height)
    painter.shadow(_ring(x, z, 0.3), 0.45)

    def draw() -> None:  # lengths are shares of the body height
        board = _Board(painter, foot, label=PERSON, scale=height)
        sleeve, hip, hand = _times(coat, 0.82), 0.62 * wide + 0.02, ahead * (wide - 0.04 + swing)
        board.stroke(
            [(-ahead * 0.03, 0.74), (-ahead * (0.07 + swing), 0.6), (-ahead * swing, 0.47)],
            sleeve,
            width=0.075,
            sun=0.6,
        )
        for step, tone in ((-stride, 0.78), (stride, 1.0)):
            leg = [(math.copysign(0.035, step), 0.5), (0.75 * step, 0.26), (step, 0.04)]
            board.stroke(leg, _times(skin if dress else trousers, tone), width=0.10, sun=0.8)
            board.stroke([(step, 0.025), (step + ahead * 0.06, 0.025)], shoes, width=0.055, sun=0.7)
        if dress:
            board.polygon([(-0.1, 0.56), (-wide - 0.03, 0.27), (wide + 0.03, 0.27), (0.1, 0.56)], coat)
        if pack:
            board.box((-ahead * wide - 0.04, 0.54), (-ahead * wide + 0.08, 0.8), bag)
        shoulders = [(top + dx, dy) for dx, dy in ((wide, 0.76), (0.07, 0.83), (-0.07, 0.83), (-wide, 0.76))]
        board.polygon([*shoulders, (-hip, 0.46), (hip, 0.46)], coat)
        board.polygon(
            [(top, 0.82), (top - sun_side * wide, 0.76), (-sun_side * hip, 0.46), (0, 0.46)],
            _times(coat, 0.84),
        )
        board.stroke([(ahead * (wide - 0.03), 0.75), (ahead * (wide + 0.01), 0.61), (hand, 0.48)], sleeve, width=0.075)
        board.disc((hand, 0.465), 0.032, skin)
        if long_hair:
            board.box((top - 0.075, 0.80), (top + 0.075, 0.93), hair)
        board.disc((top, 0.92), 0.08, hair)
        board.disc((top + ahead * 0.018, 0.905), 0.066, skin)
        if hat:
            board.box((top - 0.1, 0.945), (top + 0.1, 0.965), bag)
            board.box((top - 0.065, 0.955), (top + 0.065, 1.02), bag)
        if parasol:
            board.stroke([(hand, 0.48), (hand, 1.2)], _BLACK, width=0.02)
            board.polygon(_PARASOL, bag, at=(hand, 1.1), times=(0.36, 0.36))

    return z, draw


def _plan_pole(scene: _Scene, foot: _Corner, *, side: int) -> _Plan:
    rng, painter, street = scene
    x, _, z = foot
    kind = ("lamp", "sign", "lights", "wires")[_choose(rng, (0.38, 0.32, 0.18, 0.12))]
    height = {"lamp": rng.uniform(4.6, 6.2), "sign": rng.uniform(2.5, 2.9), "lights": 3.0, "wires": 6.5}[kind]
    width = max(rng.uniform(0.34, 0.44), 0.05 * z)  # never too thin to be seen
    metal, colour, shape = _pick(rng, _METALS), _pick(rng, _SIGNS, spread=6), int(rng.integers(4))
    scene.cast(x, z, width=width, height=height)
    if kind == "lamp":
        painter.glow((x - side * 1.1, height - 0.1, z), (255, 206, 120), radius=0.9)

    def draw() -> None:
        board = _Board(painter, foot, label=POLE)
        half = width / 2
        board.box((-half, 0), (half, height), metal, sun=0.7)
        board.box((0, 0), (street.sun_side * half, height), _times(metal, 1.3))
        board.box((-1.5 * half, 0), (1.5 * half, 0.45), _times(metal, 0.8), sun=0.6)
        draw_head(board)

    def draw_head(board: _Board) -> None:
        middle = (0.0, height)
        if kind == "lamp":
            arm = [(0, height - 0.1), (-side * 0.5, height + 0.12), (-side * 1.0, height + 0.08)]
            board.stroke(arm, metal, width=0.8 * width, sun=0.8)
            board.box((-side * 0.8, height - 0.12), (-side * 1.45, height + 0.12), _times(metal, 0.8))
            bulb = (400.0, 370.0, 260.0) if painter.mood.night else _WHITE
            board.box((-side * 0.85, height - 0.2), (-side * 1.4, height - 0.08), bulb)
        elif kind == "lights":
            board.box((-0.26, height - 0.85), (0.26, height + 0.3), _BLACK)
            for lamp, light in enumerate(_colours("e23c32 e6b43c 46c86e")):
                on = lamp == (0 if shape < 2 else 2)
                board.disc((0, height + 0.08 - 0.36 * lamp), 0.15, _times(light, 1.3 if on else 0.35))
        elif kind == "wires":
            for arm_y in (height - 0.4, height - 1.1):
                board.box((-0.9, arm_y - 0.09), (0.9, arm_y + 0.09), _times(metal, 0.85))
        elif shape == 0:  # no entry
            board.disc(middle, 0.38, _WHITE)
            board.disc(middle, 0.31, colour)
            board.box((-0.21, height - 0.06), (0.21, height + 0.06), _WHITE)
        elif shape == 1:  # danger
            board.polygon(_TRIANGLE, _RED, at=middle, times=(0.44, 0.44))
            board.polygon(_TRIANGLE, _WHITE, at=middle, times=(0.27, 0.27))
        elif shape == 2:  # parking
            board.box((-0.38, height - 0.38), (0.38, height + 0.38), colour)
            board.box((-0.19, height - 0.23), (-0.08, height + 0.23), _WHITE)
            board.disc((0.04, height + 0.1), 0.15, _WHITE)
        else:  # priority
            board.polygon(_DIAMOND, _WHITE, at=middle, times=(0.46, 0.46))
            board.polygon(_DIAMOND, _SIGNS[3], at=middle, times=(0.33, 0.33))

    return z, draw


class _CarShape(NamedTuple):
    """Side view of a car, metres: the decks are what the body is longer than the cabin, boot and bonnet."""

    length: float
    waist: float
    roof: float
    boot: float
    bonnet: float


_CAR_SHAPES = (  # saloon, hatchback, van
    _CarShape(4.4, 0.92, 1.45, 0.75, 1.0),
    _CarShape(3.8, 0.95, 1.52, 0.2, 1.0),
    _CarShape(4.6, 1.15, 2.1, 0.1, 0.7),
)


def _plan_car(scene: _Scene, x: float, *, z: float, oncoming: bool) -> _Plan:
    """A car parallel to the street; oncoming ones show us their front."""
    rng, painter, _ = scene
    paint, glass = _pick(rng, _PAINTS), (58.0, 68.0, 84.0)
    length, waist, roof, boot, bonnet = _CAR_SHAPES[_choose(rng, (0.40, 0.42, 0.18))]
    half, sun = rng.uniform(0.84, 0.93), rng.uniform(0.4, 1.0)
    end = z + length
    near, far = (z + bonnet, end - boot) if oncoming else (z + boot, end - bonnet)  # the cabin at the waist
    near_top, far_top = (near + 0.5, far - 0.15) if oncoming else (near + 0.15, far - 0.45)  # and at the roof
    inward = -1 if x < 0 else 1
    flank_x = x - inward * half  # the side we can see
    lamp = _colours("faf0ce" if oncoming else "c42222")[0]
    painter.shadow(_strip(x - half - 0.15, x + half + 0.15, 0, z - 0.2, end), 0.7)
    for wing in (-1, 1):
        painter.glow((x + wing * (half - 0.26), waist - 0.26, z), _times(lamp, 1.5), radius=0.45)

    def flank(outline: Sequence[_Corner], colour: _Colour, label: int | None, sun: float) -> None:
        """Fill a polygon of the visible side, given as (z, y, lean inward)."""
        painter.fill([(flank_x + inward * lean, y, at) for at, y, lean in outline], colour, label, sun=sun)

    def across(low: _Corner, high: _Corner, colour: _Colour, label: int | None, sun: float) -> None:
        """Fill a panel from side to side between two edges, given as (z, y, lean inward)."""
        (z0, y0, lean0), (z1, y1, lean1) = low, high
        wide0, wide1 = half - lean0, half - lean1
        outline = [(x - wide0, y0, z0), (x - wide1, y1, z1), (x + wide1, y1, z1), (x + wide0, y0, z0)]
        painter.fill(outline, colour, label, sun=sun)

    def draw() -> None:
        top, pillar = roof - 0.1, (near + far) / 2
        flank([(z, 0.25, 0), (z, waist, 0), (end, waist, 0), (end, 0.25, 0)], paint, CAR, 0.35)
        flank(
            [(z, waist - 0.16, 0), (z, waist - 0.08, 0), (end, waist - 0.08, 0), (end, waist - 0.16, 0)],
            _times(paint, 1.25),
            None,
            0.6,
        )
        for axle in (z + 0.75, end - 0.8):
            for radius, colour in ((0.34, _BLACK), (0.19, _SILVER)):
                rim = [(axle + radius * ahead, 0.34 + radius * up, -0.02) for ahead, up in _TURN]
                flank(rim, colour, CAR, 0.6)
        across((z, waist, 0), (end, waist, 0), _times(paint, 1.12), CAR, 1.0)
        flank(
            [(near, waist, 0.04), (near_top, roof, 0.16), (far_top, roof, 0.16), (far, waist, 0.04)],
            paint,
            CAR,
            0.3,
        )
        window = [(near + 0.2, waist + 0.06, 0.05), (near_top + 0.1, top, 0.14), (far_top - 0.1, top, 0.14)]
        flank([*window, (far - 0.2, waist + 0.06, 0.05)], glass, None, 0.7)
        post = [(pillar - 0.06, waist, 0.04), (pillar - 0.06, roof, 0.16), (pillar + 0.06, roof, 0.16)]
        flank([*post, (pillar + 0.06, waist, 0.04)], paint, None, 0.4)
        across((near_top, roof, 0.16), (far_top, roof, 0.16), _times(paint, 1.15), CAR, 1.0)
        across((near, waist, 0.04), (near_top, roof, 0.16), paint, CAR, sun)
        across((near, waist + 0.05, 0.2), (near_top, roof - 0.09, 0.26), glass, None, 1.0)
        shine = [
            (-0.5, waist + 0.05, near),
            (-0.15, top, near_top),
            (0.05, top, near_top),
            (-0.3, waist + 0.05, near),
        ]
        painter.fill([(x + dx, y, at) for dx, y, at in shine], (120, 136, 156), None)
        draw_end()

    def draw_end() -> None:
        board = _Board(painter, (x, 0, z), label=CAR)
        high = waist - 0.16
        for wing in (-1, 1):
            board.box((wing * (half - 0.3), 0.0), (wing * (half - 0.06), 0.4), _BLACK, sun=0.5)
        board.box((-half, 0.27), (half, waist), paint, sun=sun)
        board.box((-half, waist - 0.12), (half, waist), _times(paint, 1.15), sun=sun)
        board.box((-half - 0.02, 0.24), (half + 0.02, 0.42), _blend(paint, (46, 46, 50), 0.75), sun=sun)
        if oncoming:
            board.box((-half + 0.5, 0.5), (half - 0.5, high), (44, 44, 48))
        for wing in (-1, 1):
            if oncoming:
                board.disc((wing * (half - 0.26), high - 0.1), 0.13, _times(lamp, 1.2))
            else:
                board.box((wing * (half - 0.28), high - 0.2), (wing * (half - 0.04), high), lamp)
        board.box((-0.26, 0.45), (0.26, 0.57), _WHITE)

    return z, draw


def _plan_crossing_car(scene: _Scene, foot: _Corner) -> _Plan:
    """A car seen from the side, on its way across the street."""
    rng, painter, _ = scene
    x, _, z = foot
    paint, glass = _pick(rng, _PAINTS), (62.0, 74.0, 92.0)
    way = 1 if rng.random() < 0.5 else -1
    painter.shadow(_strip(x - 2.1, x + 2.1, 0, z - 0.3, z + 1.6), 0.6)

    def draw() -> None:
        board = _Board(painter, foot, label=CAR)
        flip = (way, 1.0)
        body = [(-2.1, 0.3), (-2.1, 0.86), (-1.9, 0.95), (0.95, 0.98), (1.9, 0.84), (2.12, 0.62), (2.12, 0.3)]
        board.polygon(body, paint, times=flip, sun=0.8)
        board.polygon([(-1.85, 0.93), (-1.35, 1.46), (0.1, 1.5), (1.0, 0.95)], paint, times=flip)
        board.polygon([(-1.55, 0.97), (-1.25, 1.37), (-0.55, 1.39), (-0.55, 0.97)], glass, times=flip)
        board.polygon([(-0.43, 0.97), (-0.43, 1.39), (0.06, 1.4), (0.75, 0.97)], glass, times=flip)
        board.box((-2.1, 0.3), (2.12, 0.46), _times(paint, 0.6), sun=0.6)
        board.box((way * 1.95, 0.62), (way * 2.1, 0.76), (250, 236, 190))
        board.box((way * -2.1, 0.66), (way * -1.96, 0.82), _RED)
        for wheel in (-1.3, 1.3):
            board.disc((way * wheel, 0.34), 0.35, _BLACK, sun=0.6)
            board.disc((way * wheel, 0.34), 0.19, _SILVER, sun=0.8)

    return z, draw


_ROUGHNESS = np.array([0.4, 2.5, 4.0, 3.5, 7.0, 1.5, 2.0, 1.5], np.float32)
"""How uneven the surface of each class looks, grey levels of standard deviation."""


def _draw_grain(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Noise of mean 0 and deviation 1: two random bytes added up, faster than normal noise."""
    first, second = (rng.integers(0, 256, shape, np.uint8) for _ in range(2))
    grain = first.astype(np.float32)
    grain += second
    grain -= 255
    grain *= 1 / 104.5
    return grain


def _develop(scene: _Scene, size: Size) -> Sample:
    """Turn the canvas into a photograph: lamps, exposure, white balance, lens blur, grain."""
    rng, painter, _ = scene
    height, width = size
    exposure = rng.uniform(0.86, 1.14) * (1 + rng.normal(0, 0.035, 3))
    patches = 1 + 0.16 * _value_noise(rng, size, ((3, 5),))
    blur, noise = rng.uniform(0.0, 0.55), rng.uniform(0.8, 2.6)
    target = np.ascontiguousarray(painter.target[1::_OVERSAMPLE, 1::_OVERSAMPLE])
    photo = cv2.resize(painter.image, (width, height), interpolation=cv2.INTER_AREA)
    if blur > 0.25:
        photo = cv2.GaussianBlur(photo, (3, 3), blur * height / 128)
    if painter.glows:
        shrink = 2 * _OVERSAMPLE
        glow = np.zeros((height // 2, width // 2, 3), np.float32)
        for x, y, radius, colour in painter.glows:
            cv2.circle(
                glow,
                (round(x / shrink), round(y / shrink)),
                max(1, round(radius / shrink)),
                colour,
                cv2.FILLED,
            )
        shine = cv2.resize(cv2.GaussianBlur(glow, (0, 0), height / 50), (width, height))
        photo = cv2.addWeighted(photo, 1.0, shine, 0.55, 0.0, dtype=cv2.CV_8U)
    # Channels first: arithmetic over long rows is fast.
    planes = np.array(cv2.split(photo), np.float32)
    planes *= exposure.astype(np.float32)[:, None, None] * patches
    planes += _draw_grain(rng, size) * _ROUGHNESS[target]
    planes += _draw_grain(rng, planes.shape) * np.float32(noise)
    np.clip(planes, 0, 255, out=planes)
    image = np.ascontiguousarray(planes.astype(np.uint8).transpose(1, 2, 0))
    return Sample(image=image, target=target)


_STREAM = 0x70_57_EE_75
"""Root of every scene's seed, so that no other use of small integers as seeds meets it."""


@final
class ToyStreets(SegmentationDataset):
    """Street scenes that are drawn when they are first asked for.

    Equal (split, index, size) give equal scenes in every process that has the same OpenCV; train and val
    share no seed. A scene that was drawn is kept: 130 kB at 128x256, 67 MB for all 512 of train, in every
    process that asked for them. Each read returns a fresh copy, which the caller may write to.

    Args:
        root: Must be None: there are no files. The argument is there because every data set has it.
        split: ``"train"`` or ``"val"``.
        num_images: How many scenes; by default 512 of train and 64 of val.
        size: (height, width) of every scene.

    Raises:
        DataError: E-DATA-021 for an unknown split, E-DATA-090 if a folder is given, E-DATA-091 if the number
            or the size is too small.

    Example:
        >>> scenes = ToyStreets(None, "val", size=(64, 128))
        >>> len(scenes), scenes.name(7), scenes.read(7).image.shape
        (64, 'val_0007', (64, 128, 3))
    """

    taxonomy: ClassVar[Taxonomy] = TAXONOMY
    splits: ClassVar[tuple[str, ...]] = ("train", "val")
    terms = "drawn by code, none needed"
    official_counts: ClassVar[Mapping[str, int]] = {"train": 512, "val": 64}

    def __init__(
        self, root: str | Path | None, split: str, *, num_images: int | None = None, size: Size = (128, 256)
    ) -> None:
        self.split = self.check_split(split)
        if root is not None:
            raise DataError(
                "E-DATA-090",
                "toystreets is drawn, not read; allowed folder: none",
                fix="leave the folder out (--data on the command line)",
                path=root,
            )
        count = self.official_counts[split] if num_images is None else num_images
        if count < 1 or min(size) < 32:
            raise DataError(
                "E-DATA-091",
                f"{count} images of {size[0]}x{size[1]}; allowed: at least 1 image, of at least 32x32",
                fix="ask for more",
                path=TAXONOMY.name,
            )
        self.size = size
        self._scenes: list[Sample | None] = [None] * count

    def __len__(self) -> int:
        return len(self._scenes)

    def name(self, index: int) -> str:
        """Return a sample's name, see `SegmentationDataset.name`; for example ``"train_0007"``."""
        return f"{self.split}_{range(len(self))[index]:04d}"

    def read(self, index: int) -> Sample:
        """Draw a scene, or copy it where it was drawn before; see `SegmentationDataset.read`.

        Shape:
            - returns.image: (H, W, 3) uint8 RGB
            - returns.target: (H, W) uint8 train ids in 0-7

        Raises:
            IndexError: If there is no such sample.
        """
        index = range(len(self))[index]  # the seed must not depend on how the sample was named: -1 is the last one
        scene = self._scenes[index]
        if scene is None:
            seed = np.random.SeedSequence((_STREAM, self.splits.index(self.split), index))
            scene = self._scenes[index] = draw_scene(np.random.default_rng(seed), self.size)
        return Sample(image=scene.image.copy(), target=scene.target.copy())
