"""Pictures of one coloured shape on a coloured ground, their captions, and a test that reads them back.

A `Scene` names four attributes: size, colour, shape and ground. `caption` puts a scene into words,
`draw` turns scenes into 64x64 RGB pictures (anti-aliased by averaging a grid of samples in every pixel,
the centre and radius jittered), and `measure` tells from a picture alone which scene it shows. `measure`
contains nothing learned: it takes the ground from the border, the colour from the pixels that differ most
from it, and the shape and size from the template that overlaps best. So it can judge a generative model
without being part of it.

All shapes are defined on the square [-1, 1] x [-1, 1] and touch its four sides; "radius" is half the side
of that square in pixels, and the size words are ranges of it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

PICTURE_SIDE = 64
SAMPLES_PER_PIXEL_SIDE = 4
CENTRE_JITTER = 5.0
RADIUS_JITTER = 0.05

RADII: dict[str, float] = {"small": 11.0, "medium": 16.5, "large": 23.5}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 32, 38),
    "orange": (255, 136, 0),
    "yellow": (255, 228, 30),
    "green": (26, 158, 62),
    "cyan": (0, 212, 232),
    "blue": (38, 86, 240),
    "purple": (136, 40, 196),
    "pink": (255, 128, 196),
}

GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "grey": (128, 128, 128),
    "black": (12, 12, 12),
    "navy": (18, 26, 92),
    "sand": (214, 192, 144),
}

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "hourglass")

# What `measure` answers for an attribute that it cannot tell.
UNCLEAR = "unclear"

RING_HOLE = 0.55
CROSS_ARM = 0.34
HELD_OUT_SEED = 20_240_601
HELD_OUT_COUNT = 96


@dataclass(frozen=True, order=True)
class Scene:
    """What a picture shows: one shape of one size and colour on one ground."""

    size: str
    colour: str
    shape: str
    ground: str


@dataclass(frozen=True)
class Measurement:
    """What `measure` found, with the overlap of the best template (1 is a perfect match)."""

    scene: Scene
    radius: float
    overlap: float


ATTRIBUTES: tuple[str, ...] = ("size", "colour", "shape", "ground")
ALL_SCENES: tuple[Scene, ...] = tuple(Scene(*words) for words in itertools.product(RADII, COLOURS, SHAPES, GROUNDS))


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """Return (scenes to train on, scenes never trained on), always the same split."""
    order = np.random.default_rng(HELD_OUT_SEED).permutation(len(ALL_SCENES))
    held_out = sorted(ALL_SCENES[index] for index in order[:HELD_OUT_COUNT])
    seen = sorted(ALL_SCENES[index] for index in order[HELD_OUT_COUNT:])
    return seen, held_out


def caption(scene: Scene, phrasing: int = 0) -> str:
    """Put a scene into words; phrasing 0 is the usual one, 1 the longer one."""
    if phrasing == 0:
        return f"a {scene.size} {scene.colour} {scene.shape} on {scene.ground}"
    return f"a {scene.size} {scene.colour} {scene.shape} on a {scene.ground} ground"


def scene_of(text: str) -> Scene | None:
    """The scene that `text` is a caption of, in either phrasing; None for any other text."""
    return _scenes().get(text)


@functools.cache
def _scenes() -> dict[str, Scene]:
    return {caption(scene, phrasing): scene for scene in ALL_SCENES for phrasing in (0, 1)}


def vocabulary() -> list[str]:
    """Return every word that a caption can contain, in a fixed order."""
    return ["a", "on", "ground", *RADII, *COLOURS, *SHAPES, *GROUNDS]


def _star(across: FloatArray, down: FloatArray) -> BoolArray:
    """Five-pointed star: the points inside at least four of the pentagram's five half-planes."""
    tip_angles = np.deg2rad(np.array([-90.0, -18.0, 54.0, 126.0, 198.0]))
    half_width, top, bottom = float(np.cos(np.deg2rad(18.0))), -1.0, float(np.sin(np.deg2rad(54.0)))
    # The regular star does not fill its square, so stretch the coordinates until it does.
    regular_across = across * np.float32(half_width)
    regular_down = (down + 1.0) * np.float32((bottom - top) / 2.0) + np.float32(top)
    # Each line joins two tips that are not neighbours; it lies cos(72 degrees) from the centre.
    limit = np.float32(np.cos(np.deg2rad(72.0)))
    inside = np.zeros(np.broadcast_shapes(across.shape, down.shape), dtype=np.int8)
    for angle in tip_angles:
        side = np.float32(np.cos(angle)) * regular_across + np.float32(np.sin(angle)) * regular_down
        inside += side <= limit
    return inside >= 4


def inside_shape(shape: str, across: FloatArray, down: FloatArray) -> BoolArray:
    """Tell which points of the shape's own square lie inside it; both arguments broadcast."""
    if shape == "circle":
        return across * across + down * down <= 1.0
    if shape == "ring":
        distance = across * across + down * down
        return (distance <= 1.0) & (distance >= RING_HOLE**2)
    if shape == "star":
        return _star(across, down)
    width, height = np.abs(across), np.abs(down)
    in_square = (width <= 1.0) & (height <= 1.0)
    if shape == "square":
        return in_square
    if shape == "triangle":
        return (2.0 * width <= down + 1.0) & (height <= 1.0)
    if shape == "diamond":
        return width + height <= 1.0
    if shape == "cross":
        return in_square & ((width <= CROSS_ARM) | (height <= CROSS_ARM))
    if shape == "hourglass":
        return in_square & (width <= height)
    raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")


def coverage(shape: str, centres: FloatArray, radii: FloatArray, samples: int) -> FloatArray:
    """Return how much of every pixel each shape covers, as [count, side, side] between 0 and 1.

    centres is [count, 2] (across, down) in pixels, radii is [count].
    """
    positions = ((np.arange(PICTURE_SIDE * samples) + 0.5) / samples).astype(np.float32)
    across = (positions[None, :] - centres[:, :1]) / radii[:, None]
    down = (positions[None, :] - centres[:, 1:]) / radii[:, None]
    inside = inside_shape(shape, across[:, None, :], down[:, :, None])
    blocks = inside.reshape(len(radii), PICTURE_SIDE, samples, PICTURE_SIDE, samples)
    shares: FloatArray = blocks.mean(axis=(2, 4), dtype=np.float32)
    return shares


def draw(scenes: Sequence[Scene], generator: np.random.Generator) -> ByteArray:
    """Draw one picture per scene, [count, 64, 64, 3], with random centres and slightly random radii."""
    count = len(scenes)
    offsets = generator.uniform(-CENTRE_JITTER, CENTRE_JITTER, (count, 2))
    centres = (PICTURE_SIDE / 2 + offsets).astype(np.float32)
    stretch = generator.uniform(1 - RADIUS_JITTER, 1 + RADIUS_JITTER, count)
    radii = (np.array([RADII[scene.size] for scene in scenes]) * stretch).astype(np.float32)
    covered = np.empty((count, PICTURE_SIDE, PICTURE_SIDE, 1), dtype=np.float32)
    for shape in SHAPES:
        chosen = np.array([scene.shape == shape for scene in scenes])
        if chosen.any():
            covered[chosen, :, :, 0] = coverage(shape, centres[chosen], radii[chosen], SAMPLES_PER_PIXEL_SIDE)
    colours = np.array([COLOURS[scene.colour] for scene in scenes], dtype=np.float32)[:, None, None, :]
    grounds = np.array([GROUNDS[scene.ground] for scene in scenes], dtype=np.float32)[:, None, None, :]
    return np.rint(grounds + covered * (colours - grounds)).astype(np.uint8)


def _nearest(colour: FloatArray, palette: dict[str, tuple[int, int, int]]) -> str:
    """Return the palette's nearest colour, or UNCLEAR if even that one is far off."""
    furthest_allowed = 75.0
    distances = {name: float(np.linalg.norm(colour - np.array(value))) for name, value in palette.items()}
    name = min(distances, key=lambda candidate: distances[candidate])
    return name if distances[name] <= furthest_allowed else UNCLEAR


def _split_ground(picture: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Return the ground's colour, the shape's colour and how much of every pixel is shape (0 to 1)."""
    border = np.concatenate(
        [
            picture[:2].reshape(-1, 3),
            picture[-2:].reshape(-1, 3),
            picture[:, :2].reshape(-1, 3),
            picture[:, -2:].reshape(-1, 3),
        ]
    )
    ground = np.median(border, axis=0).astype(np.float32)
    difference = np.linalg.norm(picture - ground, axis=-1)
    # The strongest two dozen pixels set the scale; single outliers must not.
    strongest = np.sort(difference, axis=None)[-24:]
    solid = difference >= 0.75 * float(np.median(strongest))
    colour = np.median(picture[solid], axis=0).astype(np.float32)
    direction = colour - ground
    share = (picture - ground) @ direction / max(float(direction @ direction), 1e-6)
    return ground, colour, _steepen(share)


def _steepen(share: FloatArray) -> FloatArray:
    """Stretch the middle of the range over all of it, so that faint noise on the ground counts as nothing."""
    steepened: FloatArray = np.clip((share - 0.25) / 0.5, 0.0, 1.0).astype(np.float32)
    return steepened


def _largest_extent(share: FloatArray) -> tuple[float, float, float] | None:
    """Return centre (across, down) and radius of the box around the covered pixels, if there are any."""
    solid = share >= 0.5
    # One stray pixel in an otherwise empty row or column is noise, not part of the shape.
    columns = np.flatnonzero(solid.sum(axis=0) >= 2)
    rows = np.flatnonzero(solid.sum(axis=1) >= 2)
    if len(columns) < 3 or len(rows) < 3:
        return None
    left, right = float(columns[0]), float(columns[-1] + 1)
    top, bottom = float(rows[0]), float(rows[-1] + 1)
    return (left + right) / 2, (top + bottom) / 2, (right - left + bottom - top) / 4


def _match_shape(share: FloatArray, across: float, down: float, radius: float) -> tuple[str, float, float]:
    """Return the shape whose template overlaps best, that template's radius and the overlap."""
    # Pointed tips vanish below half coverage, so the true shape may be larger than its box and off centre.
    growths = np.array([-0.5, 0.0, 0.5, 1.0, 1.5, 2.25], dtype=np.float32)
    lifts = np.array([-1.0, -0.5, 0.0, 0.5, 1.0], dtype=np.float32)
    growth, lift = (grid.reshape(-1) for grid in np.meshgrid(growths, lifts))
    centres = np.stack([np.full_like(lift, across), lift + np.float32(down)], axis=1).astype(np.float32)
    radii = (growth + np.float32(radius)).astype(np.float32)
    best = (UNCLEAR, radius, 0.0)
    for shape in SHAPES:
        templates = _steepen(coverage(shape, centres, radii, 2))
        shared = np.minimum(templates, share).sum(axis=(1, 2))
        joined = np.maximum(templates, share).sum(axis=(1, 2))
        overlaps = shared / joined
        index = int(overlaps.argmax())
        if overlaps[index] > best[2]:
            best = (shape, float(radii[index]), float(overlaps[index]))
    return best


def _size_of(radius: float) -> str:
    """Return the size word whose radius is nearest in proportion."""
    return min(RADII, key=lambda size: abs(float(np.log(radius / RADII[size]))))


def measure(picture: ByteArray) -> Measurement:
    """Tell which scene a 64x64 RGB picture shows; attributes that cannot be told are UNCLEAR."""
    if picture.shape != (PICTURE_SIDE, PICTURE_SIDE, 3):
        raise ValueError(f"expected a picture of shape (64, 64, 3), got {picture.shape}")
    faintest_contrast, poorest_overlap = 40.0, 0.6
    ground, colour, share = _split_ground(picture.astype(np.float32))
    ground_word = _nearest(ground, GROUNDS)
    extent = _largest_extent(share)
    if extent is None or float(np.linalg.norm(colour - ground)) < faintest_contrast:
        return Measurement(Scene(UNCLEAR, UNCLEAR, UNCLEAR, ground_word), 0.0, 0.0)
    shape, radius, overlap = _match_shape(share, *extent)
    if overlap < poorest_overlap:
        shape = UNCLEAR
    scene = Scene(_size_of(radius), _nearest(colour, COLOURS), shape, ground_word)
    return Measurement(scene, radius, overlap)


def matches(wanted: Scene, found: Scene) -> tuple[bool, ...]:
    """Tell for each of ATTRIBUTES whether it is right."""
    return tuple(left == right for left, right in zip(astuple(wanted), astuple(found), strict=True))
