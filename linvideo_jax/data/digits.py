"""Clips of one or two moving handwritten digits: attributes on the host, pixels in JAX.

A clip is fully described by `Attributes`; `render` draws it. Positions follow a closed motion law
(`paths`): straight, or reflected at the walls as a billiard ball.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

FRAME = 96  # height and width in px

COLOURS = {
    "red": (232, 32, 40),
    "orange": (255, 138, 0),
    "yellow": (255, 236, 60),
    "blue": (40, 120, 255),
    "purple": (190, 70, 255),
    "white": (255, 255, 255),
}
BACKGROUNDS = {
    "black": (8, 8, 10),
    "gray": (84, 86, 90),
    "green": (16, 84, 44),
    "brown": (84, 52, 30),
}
# Unit vectors (x to the right, y down) in px.
_D = 0.5**0.5
DIRECTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up right": (_D, -_D),
    "up left": (-_D, -_D),
    "down right": (_D, _D),
    "down left": (-_D, _D),
}
SPEEDS = {"slowly": (0.5, 0.7), "quickly": (1.3, 1.7)}  # px per frame, uniform in the range
SIZES = (28.0, 38.0)  # px, uniform in the range
TWO_DIGITS = 0.3  # share of clips with two digits
FIRST_WALL = (0.3, 0.7)  # a bouncing digit first meets a wall at this share of the clip

ABSENT, INCONSISTENT = 10, 11  # digit classes of a colour slot besides 0 to 9
UNSAID = -1  # label of an attribute that a caption leaves open or an absent digit does not have


class Attributes(NamedTuple):
    """What is in n clips, one column per digit; the second digit is -1 where there is one only."""

    digit: Int[Array, "clips 2"]
    colour: Int[Array, "clips 2"]
    direction: Int[Array, "clips 2"]
    speed: Int[Array, "clips 2"]
    bounce: Int[Array, "clips 2"]
    background: Int[Array, " clips"]
    image: Int[Array, "clips 2"]  # row of `digit_images()`
    size: Float[Array, "clips 2"]  # px
    start: Float[Array, "clips 2 2"]  # centre (x, y) at frame 0, px
    velocity: Float[Array, "clips 2 2"]  # (x, y) at frame 0, px per frame

    def take(self, rows) -> "Attributes":
        """The clips `rows` (a slice or an index array)."""
        return Attributes(*(field[rows] for field in self))


class Labels(NamedTuple):
    """What is judged, per colour slot: digit 0-9 or ABSENT; UNSAID where nothing is said."""

    digit: Int[Array, "*clips 6"]
    direction: Int[Array, "*clips 6"]
    speed: Int[Array, "*clips 6"]
    bounce: Int[Array, "*clips 6"]
    background: Int[Array, "*clips"]


@functools.cache
def _handwriting() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return (data.images / 16.0).astype(np.float32), data.target.astype(np.int32)


def digit_images() -> Float[np.ndarray, "images 8 8"]:
    """All handwritten digits of scikit-learn, ink in [0, 1] (1,797 images of 8 x 8)."""
    return _handwriting()[0]


@functools.cache
def image_rows(split: str) -> tuple[np.ndarray, ...]:
    """Rows of `digit_images()` of each class 0-9: every fifth image of a class is "test"."""
    target = _handwriting()[1]
    rows = [np.flatnonzero(target == digit) for digit in range(10)]
    held = [np.arange(len(r)) % 5 == 4 for r in rows]
    return tuple(r[h if _is_test(split) else ~h] for r, h in zip(rows, held, strict=True))


def _is_test(split: str) -> bool:
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    return split == "test"


@functools.cache
def combinations(split: str) -> np.ndarray:
    """(digit, colour, direction, background) rows of a split; a fixed hash holds out about 1 in 20.

    Shape [combinations, 4], int32.
    """
    sizes = (10, len(COLOURS), len(DIRECTIONS), len(BACKGROUNDS))
    rows = np.indices(sizes).reshape(4, -1).T
    code = np.ravel_multi_index(tuple(rows.T), sizes).astype(np.uint64)
    mixed = (code * np.uint64(2654435761) + np.uint64(97)) & np.uint64(0xFFFFFFFF)
    mixed = ((mixed ^ (mixed >> np.uint64(15))) * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
    held = ((mixed ^ (mixed >> np.uint64(13))) % np.uint64(20)) == 0
    return rows[held if _is_test(split) else ~held].astype(np.int32)


def sample_attributes(
    rng: np.random.Generator, n: int, num_frames: int = 25, split: str = "train"
) -> Attributes:
    """Draws n clips whose combinations and digit images all belong to `split` (numpy arrays).

    A start depends on num_frames: straight digits meet no wall within it, bouncing ones do.
    """
    first, second = _draw_combinations(rng, n, split)
    digit, colour, direction, background = np.stack([first, second], axis=1).transpose(2, 0, 1)
    rows = image_rows(split)
    counts, offsets = np.array([len(r) for r in rows]), np.cumsum([0] + [len(r) for r in rows[:-1]])
    pick = (rng.random((n, 2)) * counts[digit]).astype(np.int64)
    image = np.concatenate(rows)[offsets[digit] + pick].astype(np.int32)

    size = rng.uniform(*SIZES, (n, 2)).astype(np.float32)
    speed = rng.integers(len(SPEEDS), size=(n, 2), dtype=np.int32)
    slowest, fastest = np.array(list(SPEEDS.values())).T
    pace = slowest[speed] + (fastest - slowest)[speed] * rng.random((n, 2))
    velocity = np.array(list(DIRECTIONS.values()))[direction] * pace[..., None]
    room = FRAME - size
    too_far = np.abs(velocity).max(-1) * (num_frames - 1) > room
    bounce = (too_far | (rng.random((n, 2)) < 0.5)).astype(np.int32)
    start = _draw_starts(rng, size, velocity, bounce, num_frames)

    two = rng.random(n) < TWO_DIGITS
    digit = np.where(np.stack([np.ones(n, bool), two], 1), digit, -1).astype(np.int32)
    attributes = Attributes(
        digit, colour, direction, speed, bounce, background[:, 0], image, size,
        start.astype(np.float32), velocity.astype(np.float32),
    )  # fmt: skip
    _part(rng, attributes, np.flatnonzero(two), num_frames)
    return attributes


def _draw_combinations(rng, n, split):
    table = combinations(split)
    first = table[rng.integers(len(table), size=n)]
    second = np.empty_like(first)
    for background in range(len(BACKGROUNDS)):
        choices = table[table[:, 3] == background]
        rows = np.flatnonzero(first[:, 3] == background)
        while len(rows):
            second[rows] = choices[rng.integers(len(choices), size=len(rows))]
            rows = rows[second[rows, 1] == first[rows, 1]]
    return first, second


def _draw_starts(rng, size, velocity, bounce, num_frames):
    """Centres at frame 0 for digits of any leading shape; see `sample_attributes`."""
    last = num_frames - 1
    low, high = (size / 2)[..., None], (FRAME - size / 2)[..., None]
    # No wall before `free` frames: the whole clip, or until a bounce may come.
    free = np.where(bounce, FIRST_WALL[0] * last, last)[..., None]
    reach = velocity * free
    first, final = low + np.maximum(0, -reach), high - np.maximum(0, reach)
    start = first + (final - first) * rng.random(velocity.shape)
    # One moving axis of a bouncing digit meets its wall at a drawn moment.
    hit = rng.random(velocity.shape) * (velocity != 0)
    hit = (hit == hit.max(-1, keepdims=True)) & (velocity != 0) & (bounce == 1)[..., None]
    pace = np.maximum(np.abs(velocity), 1e-6)
    latest = np.minimum(FIRST_WALL[1] * last, (high - low) / pace)
    moment = free + (latest - free) * rng.random(velocity.shape)
    return np.where(hit, np.where(velocity > 0, high, low) - velocity * moment, start)


def _part(rng, attributes, rows, num_frames, rounds=8):
    """Redraws second digits in place where they cover the first in over a fifth of the clip."""
    moments = np.linspace(0, num_frames - 1, 13)

    def covered(clips):
        a, b = np.moveaxis(_positions(clips, moments), 1, 0)
        near = 0.75 * clips.size.mean(-1)[:, None]
        return (np.linalg.norm(a - b, axis=-1) < near).mean(-1)

    cover = covered(attributes.take(rows))
    for _ in range(rounds):
        rows, cover = rows[cover > 0.2], cover[cover > 0.2]
        if not len(rows):
            return
        clips = attributes.take(rows)
        clips.start[:, 1] = _draw_starts(
            rng, clips.size[:, 1], clips.velocity[:, 1], clips.bounce[:, 1], num_frames
        )
        redrawn = covered(clips)
        better = redrawn < cover
        attributes.start[rows[better]] = clips.start[better]
        cover = np.minimum(cover, redrawn)


def _positions(attributes, moments):
    low = (attributes.size / 2)[:, :, None, None]
    room = FRAME - 2 * low
    free = attributes.start[:, :, None] - low
    free = free + attributes.velocity[:, :, None] * moments[:, None]
    return low + room - abs(free % (2 * room) - room)


def paths(attributes: Attributes, num_frames: int) -> Float[Array, "clips 2 frames xy"]:
    """Centres of the digits in px: uniform motion, folded at the walls (the billiard law)."""
    return _positions(attributes, np.arange(num_frames, dtype=np.float32))


def labels_of(attributes: Attributes) -> Labels:
    """The labels of clips by colour slot, numpy int32 [clips, 6] (background [clips])."""
    n = len(attributes.background)

    def by_colour(values, empty):
        out = np.full((n, len(COLOURS)), empty, np.int32)
        for slot in range(2):
            rows = np.flatnonzero(attributes.digit[:, slot] >= 0)
            out[rows, attributes.colour[rows, slot]] = values[rows, slot]
        return out

    return Labels(
        by_colour(attributes.digit, ABSENT),
        by_colour(attributes.direction, UNSAID),
        by_colour(attributes.speed, UNSAID),
        by_colour(attributes.bounce, UNSAID),
        np.asarray(attributes.background, np.int32),
    )


def _resampling(centre, size):
    """Catmull-Rom weights from 8 cells, `size` px wide in all, to pixels: [..., 96, 8]."""
    pixel = jnp.arange(FRAME, dtype=jnp.float32) + 0.5
    cell = (pixel - centre[..., None] + size[..., None] / 2) * (8 / size[..., None]) - 0.5
    x = jnp.abs(cell[..., None] - jnp.arange(8, dtype=jnp.float32))
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))


def draw(
    attributes: Attributes,
    glyphs: Float[Array, "clips 2 #frames 8 8"],
    position: Float[Array, "clips 2 frames xy"],
) -> tuple[Float[Array, "clips frames 96 96 3"], Bool[Array, "clips frames 96 96"]]:
    """Draws the given ink at the given centres (px), in the sizes and colours of `attributes`.

    Returns (video, mask) as `render`; traceable.
    """
    size = jnp.broadcast_to(attributes.size[:, :, None], position.shape[:3])
    glyphs = jnp.broadcast_to(glyphs, (*position.shape[:3], 8, 8))
    rows, columns = (_resampling(position[..., axis], size) for axis in (1, 0))
    ink = jnp.einsum("ndfyi,ndfij,ndfxj->ndfyx", rows, glyphs, columns)
    # Ink is the share of a cell that is covered: a steep ramp around the middle is the stroke's
    # edge, about 1.5 px wide, so it moves smoothly below a pixel.
    alpha = jnp.clip((ink - 0.46) * 2.5 + 0.5, 0, 1)
    alpha = alpha * (attributes.digit >= 0)[:, :, None, None, None]
    palette = jnp.array(list(COLOURS.values()), jnp.float32) / 127.5 - 1
    grounds = jnp.array(list(BACKGROUNDS.values()), jnp.float32) / 127.5 - 1
    video = grounds[attributes.background][:, None, None, None]
    for slot in range(2):
        cover = alpha[:, slot, ..., None]
        video = video + cover * (palette[attributes.colour[:, slot]][:, None, None, None] - video)
    return video, jnp.max(alpha, axis=1) > 0.5


@functools.partial(jax.jit, static_argnames=("num_frames", "mask"))
def render(
    attributes: Attributes,
    images: Float[Array, "images 8 8"],
    num_frames: int = 25,
    mask: bool = False,
):
    """Clips as float32 video [clips, frames, 96, 96, 3] in [-1, 1]; `images` is `digit_images()`.

    With mask=True also bool [clips, frames, 96, 96]: the pixels that belong to a digit.
    """
    glyphs = images[attributes.image][:, :, None]
    video, digits = draw(attributes, glyphs, paths(attributes, num_frames))
    return (video, digits) if mask else video
