"""Trains the classifier on clips made on the fly, and validates it on held-out ones.

Its training clips use training images and combinations only. Besides clean clips it sees what a
video model may get wrong: digits that turn into others, vanish, flicker, stand still or jump about.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from linvideo_jax.data import digits
from linvideo_jax.data.digits import ABSENT, INCONSISTENT, UNSAID, Attributes, Labels
from linvideo_jax.metrics import agreement
from linvideo_jax.metrics.classifier import (
    NO_DIRECTION,
    ClassifierConfig,
    DigitsClassifier,
    read,
)
from linvideo_jax.models.module import Params, bind, init

Encode = Callable[[Float[Array, "b frames 96 96 3"]], Float[Array, "b f h w c"]]

_SPOILT = 0.2  # share of digits that turn into something else
_STILL = 0.04  # share of clips whose digits stand still, and again of clips in shuffled order


class Examples(NamedTuple):
    """Inputs of the classifier with what is to be read; f frames of the input."""

    inputs: Float[Array, "b f h w c"]
    labels: Labels
    positions: Float[Array, "b 6 f xy"]  # share of the frame's side


class _Bank(NamedTuple):
    """Training images, and their rows by class (repeated to equal lengths)."""

    images: Float[Array, "images 8 8"]
    by_class: Int[Array, "10 rows"]


def _bank() -> _Bank:
    rows = digits.image_rows("train")
    longest = max(map(len, rows))
    return _Bank(
        jnp.asarray(digits.digit_images()), jnp.stack([np.resize(r, longest) for r in rows])
    )


def _handle(draws, glyphs):
    """Turns, shears, stretches and thickens ink [..., 8, 8] as another hand might.

    draws: uniform in [0, 1], [7, ...].
    """
    turn, shear, wide, high, dx, dy, ink = 2 * draws - 1
    sin, cos = jnp.sin(0.2 * turn), jnp.cos(0.2 * turn)
    wide, high = 1 + 0.1 * wide, 1 + 0.1 * high
    grid = jnp.arange(8.0) - 3.5
    y, x = jnp.meshgrid(grid, grid, indexing="ij")

    def at(coefficient):
        return coefficient[..., None, None]

    xs = at(cos) * x - at(sin - 0.15 * shear) * y
    ys = at(sin) * x + at(cos) * y
    xs, ys = xs / at(wide) + at(0.4 * dx) + 3.5, ys / at(high) + at(0.3 * dy) + 3.5
    # Bilinear resampling as weights: 64 x 64 a glyph, no gathers.
    wx = jnp.maximum(0, 1 - jnp.abs(xs[..., None] - jnp.arange(8.0)))
    wy = jnp.maximum(0, 1 - jnp.abs(ys[..., None] - jnp.arange(8.0)))
    moved = jnp.einsum("...yxi,...yxj,...ij->...yx", wy, wx, glyphs)
    return jnp.clip(moved * at(1.05 + 0.15 * ink), 0, 1)


def _spoil(key, bank, attributes, num_frames):
    """Ink of every frame, and per digit whether it still is one digit, and whether it stays.

    Some digits turn into another image of their class (still right), of another class or into
    nothing, once or to and fro.
    """
    shape = attributes.digit.shape
    # One call for all draws: each costs a second of compilation on a CPU.
    kind, which, row, moment, width, turned, period, phase, repeated, *hand = jax.random.uniform(
        key, (9 + 14, *shape)
    )
    kind = kind / _SPOILT  # below 1: spoilt
    same, gone = (kind >= 0.7) & (kind < 1), kind < 0.15
    shift = jnp.where(same, 0, 1 + jnp.floor(9 * which).astype(jnp.int32))
    rows = bank.by_class.shape[1]
    other = bank.by_class[(attributes.digit + shift) % 10, jnp.floor(rows * row).astype(jnp.int32)]
    both = bank.images[jnp.stack([attributes.image, other])]
    first, second = _handle(jnp.stack(hand).reshape(7, 2, *shape), both)
    second = jnp.where(gone[..., None, None], 0.0, second)

    def at(coefficient):
        return coefficient[..., None]

    time = jnp.linspace(0, 1, num_frames)
    once = jax.nn.sigmoid((time - at(0.25 + 0.5 * moment)) / at(0.005 + 0.08 * width))
    once = jnp.where(at(turned) < 0.5, once, 1 - once)
    period = 2 + 14 * period**2
    fro = (jnp.arange(num_frames) + at(phase * period)) % at(period) < at(period / 2)
    share = jnp.where(at(repeated) < 0.5, once, fro.astype(jnp.float32))
    share = jnp.where(at(kind < 1), share, 0.0)[..., None, None]
    glyphs = first[:, :, None] * (1 - share) + second[:, :, None] * share
    return glyphs, ~((kind < 1) & ~same), ~gone


def _by_colour(attributes, values, empty):
    """values [b, 2, ...] moved to the colour slots [b, 6, ...]; `empty` where there is no digit."""
    hit = attributes.colour[:, None] == jnp.arange(len(digits.COLOURS))[:, None]
    hit &= (attributes.digit >= 0)[:, None]
    hit = hit.reshape(*hit.shape, *[1] * (values.ndim - 2))
    chosen = jnp.sum(jnp.where(hit, values[:, None], 0), 2)
    return jnp.where(hit.any(2), chosen, empty)


def make_examples(
    key, bank: _Bank, attributes: Attributes, num_frames: int, encode: Encode | None
) -> Examples:
    """Training clips of these attributes, spoilt here and there; traceable."""
    keys = jax.random.split(key, 4)
    b = len(attributes.background)
    fate = jax.random.uniform(keys[0], (b,))
    still, shuffled = fate < _STILL, (fate >= _STILL) & (fate < 2 * _STILL)
    path = digits.paths(attributes, num_frames)
    path = jnp.where(still[:, None, None, None], path[:, :, num_frames // 2, None], path)
    glyphs, one_digit, stays = _spoil(keys[1], bank, attributes, num_frames)
    order = jnp.argsort(jax.random.uniform(keys[2], (b, num_frames)), axis=1)
    order = jnp.where(shuffled[:, None], order, jnp.arange(num_frames))
    path = jnp.take_along_axis(path, order[:, None, :, None], 2)
    glyphs = jnp.take_along_axis(glyphs, order[:, None, :, None, None], 2)
    video, _ = digits.draw(attributes, glyphs, path)
    path = path / digits.FRAME
    video = _degrade(keys[3], video)

    moves = stays & ~(still | shuffled)[:, None]
    says = {
        "direction": jnp.where((still | shuffled)[:, None], NO_DIRECTION, attributes.direction),
        "speed": jnp.where(moves, attributes.speed, UNSAID),
        "bounce": jnp.where(moves, attributes.bounce, UNSAID),
    }
    says["direction"] = jnp.where(stays, says["direction"], UNSAID)
    says = {name: _by_colour(attributes, value, UNSAID) for name, value in says.items()}
    digit = jnp.where(one_digit, attributes.digit, INCONSISTENT)
    labels = Labels(_by_colour(attributes, digit, ABSENT), background=attributes.background, **says)
    path = _by_colour(attributes, jnp.where(stays[..., None, None], path, jnp.nan), jnp.nan)
    if encode is None:
        return Examples(video, labels, path)
    inputs = encode(video)
    if inputs.shape[1] != num_frames:
        # A latent frame is the first frame, then the mean of four.
        later = path[:, :, 1:].reshape(*path.shape[:2], -1, 4, 2).mean(3)
        path = jnp.concatenate([path[:, :, :1], later], 2)
    return Examples(inputs, labels, path)


def _degrade(key, video):
    """Slight blur, noise, and changes of contrast and tint."""
    per_clip, per_pixel = jax.random.split(key)
    draws = jax.random.uniform(per_clip, (8, len(video), 1, 1, 1, 1))
    blur = 0.5 * jnp.maximum(0, draws[0] - 0.5)  # half of the clips stay sharp
    for axis in (2, 3):
        beside = jnp.roll(video, 1, axis) + jnp.roll(video, -1, axis)
        video = (1 - 2 * blur) * video + blur * beside
    gain, tint = 2 * jnp.moveaxis(draws[1:7].reshape(2, 3, *video.shape[:1], 1, 1, 1), 1, -1) - 1
    video = video * (1 + 0.06 * gain) + 0.05 * tint
    strength = 0.12 * draws[7] ** 2
    return video + strength * jax.random.normal(per_pixel, video.shape, video.dtype)


def loss_fn(params, config: ClassifierConfig, examples: Examples):
    """Mean cross entropy of what is labelled, plus the squared error of the digits' centres.

    Returns (loss, share of clips of which every labelled attribute is read right).
    """
    out = bind(DigitsClassifier, config, params)(examples.inputs)
    labels = examples.labels
    right = jnp.argmax(out.background, -1) == labels.background
    loss = optax.softmax_cross_entropy_with_integer_labels(out.background, labels.background).mean()
    for name, logits in out.logits.items():
        label = getattr(labels, name)
        said = label != UNSAID
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0))
        # The many empty colours count less than the one or two digits.
        weight = jnp.where(label == ABSENT, 0.2, 1.0) if name == "digit" else said
        loss += jnp.sum(weight * entropy) / jnp.maximum(jnp.sum(weight), 1)
        right &= ((jnp.argmax(logits, -1) == label) | ~said).all(-1)
    known = ~jnp.isnan(examples.positions)
    error = jnp.where(known, out.positions - jnp.nan_to_num(examples.positions), 0.0)
    return loss + 20 * jnp.sum(error**2) / jnp.maximum(known.sum(), 1), right.mean()


def train(
    config: ClassifierConfig,
    num_steps: int,
    batch_size: int = 128,
    *,
    encode: Encode | None = None,
    num_frames: tuple[int, ...] = (25, 81),
    pool_clips: int | None = None,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: Callable[[int, float, float], None] | None = None,
    every: int = 50,
) -> Params:
    """Trains from scratch; returns the moving average of the parameters (float32).

    encode: traceable map from video to the classifier's input (None: pixels themselves), for
    instance the VAE's encoder with normalisation, or its round trip. pool_clips: render and encode
    that many clips of the short length (a quarter of the longer ones) once and reuse them with
    fresh noise, for an encode that is dearer than the classifier. Lengths take turns; a batch of a
    longer one has fewer clips. progress(step, loss, share right) is called every `every` steps.
    """
    rng, bank = np.random.default_rng(seed), _bank()
    # XLA's own generator: noise for every pixel is a large part of a step otherwise.
    key = jax.random.key(seed, impl="rbg")
    params = init(DigitsClassifier, config, seed)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(100, num_steps // 10), num_steps, learning_rate / 100
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.02)
    )
    turns = [min(num_frames)] * 2 + [f for f in num_frames if f != min(num_frames)]
    batches = {f: max(1, batch_size * min(num_frames) // f) for f in turns}
    sources = {}
    for f in batches:
        clips = pool_clips or 200_000
        clips = max(batches[f], clips if f == min(num_frames) else clips // 4)
        drawn = jax.device_put(digits.sample_attributes(rng, clips, f))
        key, own = jax.random.split(key)
        sources[f] = drawn if pool_clips is None else _pool(own, bank, drawn, f, encode, batches[f])

    @functools.partial(jax.jit, static_argnames="f", donate_argnums=0)
    def update(state, source, key, f):
        params, average, moments, step = state
        pick, make, noise = jax.random.split(jax.random.fold_in(key, step), 3)
        rows = jax.random.randint(pick, (batches[f],), 0, len(jax.tree.leaves(source)[0]))
        batch = jax.tree.map(lambda leaf: leaf[rows], source)
        if pool_clips is None:
            batch = make_examples(make, bank, batch, f, encode)
        if encode is not None:
            batch = batch._replace(inputs=_noisy(noise, batch.inputs))
        (loss, right), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, config, batch)
        updates, moments = optimizer.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(0.998, (1 + step) / (10 + step))
        average = optax.incremental_update(params, average, 1 - decay)
        return (params, average, moments, step + 1), loss, right

    state = (params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.int32(0))
    for step in range(num_steps):
        f = turns[step % len(turns)]
        state, loss, right = update(state, sources[f], key, f)
        if progress is not None and ((step + 1) % every == 0 or step + 1 == num_steps):
            progress(step + 1, float(loss), float(right))
    return state[1]


def _noisy(key, inputs):
    strength, noise = jax.random.split(key)
    strength = 0.15 * jax.random.uniform(strength, (len(inputs), 1, 1, 1, 1))
    return inputs + strength * jax.random.normal(noise, inputs.shape, inputs.dtype)


def _pool(key, bank, attributes, num_frames, encode, batch):
    """Examples of all attributes, encoded batch by batch; inputs in bfloat16."""
    make = jax.jit(functools.partial(make_examples, num_frames=num_frames, encode=encode))
    parts = []
    for begin in range(0, len(attributes.background) - batch + 1, batch):
        key, own = jax.random.split(key)
        part = make(own, bank, attributes.take(slice(begin, begin + batch)))
        parts.append(part._replace(inputs=part.inputs.astype(jnp.bfloat16)))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def validate(
    params: Params,
    config: ClassifierConfig,
    *,
    encode: Encode | None = None,
    num_clips: int = 2048,
    num_frames: int = 25,
    batch_size: int = 32,
    seed: int = 1,
) -> dict[str, float]:
    """Agreement with the truth on held-out real clips (held-out images and combinations).

    Per attribute and "all", as `agreement.rates`: the ceiling of any score by this classifier.
    """
    attributes = digits.sample_attributes(
        np.random.default_rng(seed), num_clips, num_frames, "test"
    )
    images = jnp.asarray(digits.digit_images())
    config = replace(config, dtype="float32")

    @jax.jit
    def make(part):
        video = digits.render(part, images, num_frames)
        return video if encode is None else encode(video)

    readings = [
        read(params, config, make(attributes.take(slice(i, i + batch_size))), batch_size).labels
        for i in range(0, num_clips, batch_size)
    ]
    seen = jax.tree.map(lambda *parts: np.concatenate(parts), *readings)
    return agreement.rates(agreement.agree(digits.labels_of(attributes), seen))
