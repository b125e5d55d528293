"""The training of a few-step generator: its state, and the updates of both networks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from linvideo_jax import optimizers
from linvideo_jax.flow import rectified, solvers
from linvideo_jax.models import wan
from linvideo_jax.models.layout import Layout
from linvideo_jax.models.module import Params
from linvideo_jax.transfer import distillation, guidance, scores, training
from linvideo_jax.transfer.objectives import Latents, Times, Velocity

State = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """Static: another value is another program. The fake score has the sizes of `fake`.

    sigmas: of the steps, a 0 behind them; shape: of one video's latents; accumulate: parts of a
    batch, one after the other; moving_scores: whether layers are still chosen by scores (transfer
    and distillation in one stage); layout: of the mesh, None on one device; start_sampler,
    start_sigmas: of the teacher's samples in `update_start`.
    """

    student: wan.WanConfig
    teacher: wan.WanConfig
    fake: wan.WanConfig
    sigmas: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    batch_size: int
    remat: str
    betas: tuple[float, float]
    weight_decay: float
    clip_norm: float
    accumulate: int = 1
    moving_scores: bool = False
    layout: Layout | None = None
    # The network is told 1000 t as it is, as the few-step samplers tell it.
    sampler: str = "renoise"
    start_sampler: str = "unipc"
    start_sigmas: tuple[float, ...] = (1.0, 0.0)

    @classmethod
    def of(
        cls,
        settings,
        *,
        student,
        teacher,
        fake,
        sigmas,
        start_sampler: str,
        start_sigmas,
        shape,
        dtype,
        layout: Layout | None = None,
    ) -> "Recipe":
        """From `config.distill`, as `stages.distill.check` lets it pass."""
        return cls(
            student,
            teacher,
            fake,
            tuple(np.asarray(sigmas).tolist()),
            tuple(shape),
            np.dtype(dtype),
            settings.batch_size,
            settings.remat,
            tuple(settings.betas),
            settings.weight_decay,
            settings.clip_norm,
            settings.accumulate,
            settings.one_stage,
            layout,
            start_sampler=start_sampler,
            start_sigmas=tuple(np.asarray(start_sigmas).tolist()),
        )


class Knobs(NamedTuple):
    """Runtime arguments of the updates. The last four are of one stage alone."""

    generator_rate: jax.Array | float
    fake_rate: jax.Array | float
    guidance_scale: float
    flow_shift: float
    normalise: bool
    ema_decay: float
    ema_age: int
    r_learning_rate: float = 0.0
    lambda_: float = 0.0
    alpha: jax.Array | float = 2.0
    target: int = 0


class Texts(NamedTuple):
    """Embeddings of a batch of prompts, padded alike, and of the negative prompt for each."""

    text: Float[Array, "batch tokens text_dim"]
    lengths: Int[Array, " batch"]
    negative_text: Float[Array, "batch tokens text_dim"]
    negative_lengths: Int[Array, " batch"]


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW of rate 1 behind a clipped gradient, for both networks."""
    b1, b2 = recipe.betas
    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adam(1.0, b1, b2),
        optimizers.decay_of_matrices(recipe.weight_decay),
    )


def initial_state(
    recipe: Recipe, student: Params, fake: Params, r: np.ndarray, mode: np.ndarray
) -> State:
    """Both networks with their optimisers, the generator's average, and every layer's kind.

    Every leaf is a buffer of its own, for the updates give them back.
    """
    copied = partial(jax.tree.map, jnp.array)
    student, average, fake = copied(student), copied(student), copied(fake)
    return {
        "params": student,
        "optimizer": optimizer(recipe).init(student),
        "ema": average,
        "fake": {"params": fake, "optimizer": optimizer(recipe).init(fake)},
        "r": jnp.array(r, jnp.float32),
        "mode": jnp.array(mode, jnp.int32),
    }


def generator(recipe: Recipe, params: Params, r, mode, texts: Texts, remat="none") -> Velocity:
    """The student's velocity for a batch's prompts."""
    kinds = {} if recipe.student.feature_map is None else {"r": r, "mode": mode}
    return _on(training.network(recipe, recipe.student, params, remat=remat, **kinds), texts)


def _on(velocity, texts: Texts) -> Velocity:
    return lambda x, t: velocity(x, t, texts.text, texts.lengths)


def _teacher(recipe: Recipe, params: Params, texts: Texts, guidance_scale) -> Velocity:
    texts = texts[:2], texts[2:]
    network = training.network(recipe, recipe.teacher, params)
    return guidance.guided(network, *texts, guidance_scale)


class Drawn(NamedTuple):
    """What an update draws for each sample of a batch, so that parts of it draw alike.

    noise, keys: of its way to the step that is trained; later_noise, t: where its x_0 is noised to.
    """

    noise: Latents
    keys: Key[Array, " batch"]
    later_noise: Latents
    t: Times


def _drawn(recipe: Recipe, knobs: Knobs, key: jax.Array) -> tuple[Int[Array, ""], Drawn]:
    """(step of the sampling, the rest); the key is the same on all hosts, and so is the step."""
    exit_key, first, way, later, times = jax.random.split(key, 5)
    step = jax.random.randint(exit_key, (), 0, len(recipe.sigmas) - 1)
    shape = (recipe.batch_size, *recipe.shape)
    return step, Drawn(
        jax.random.normal(first, shape),
        jax.random.split(way, recipe.batch_size),
        jax.random.normal(later, shape),
        distillation.draw_times(times, recipe.batch_size, knobs.flow_shift),
    )


def _met(recipe: Recipe, frozen: Velocity, step: Int[Array, ""], drawn: Drawn):
    """(x_t, t) that the generator meets at the step."""
    sigmas = np.asarray(recipe.sigmas)
    return distillation.backward_simulation(frozen, drawn.noise, sigmas, step, drawn.keys)


def _x_0(velocity: Velocity, x: Latents, t: Array) -> Latents:
    return rectified.x0_from_velocity(x, velocity(x, t), t)


def _mean_over_parts(recipe: Recipe, of_part: Callable[..., Any], texts: Texts, drawn: Drawn):
    def laid_out(part):
        return training.kept(recipe, of_part(*part))

    return optimizers.mean_over_parts(laid_out, (texts, drawn), recipe.accumulate)


def _applied(recipe: Recipe, params: Params, moments, grads: Params, rate):
    changes, moments = optimizer(recipe).update(grads, moments, params)
    return optimizers.apply(params, changes, rate), moments


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def update_fake_score(recipe: Recipe, state: State, texts: Texts, knobs: Knobs, key: jax.Array):
    """(state, metrics): flow matching on constant samples of the present generator.

    The buffers of the state that is given are gone after it (donated): use the new one alone.
    """
    step, drawn = _drawn(recipe, knobs, key)
    fake = state["fake"]

    def of_part(texts, drawn):
        student = generator(recipe, state["params"], state["r"], state["mode"], texts)
        x_0 = _x_0(student, *_met(recipe, student, step, drawn))

        def loss(params):
            network = _on(training.network(recipe, recipe.fake, params, remat=recipe.remat), texts)
            return distillation.fake_score_loss(network, x_0, drawn.later_noise, drawn.t)

        return jax.value_and_grad(loss)(fake["params"])

    value, grads = _mean_over_parts(recipe, of_part, texts, drawn)
    params, moments = _applied(recipe, fake["params"], fake["optimizer"], grads, knobs.fake_rate)
    metrics = {"loss": value, "fake_gradient_norm": optax.tree.norm(grads)}
    new = state | {"fake": {"params": params, "optimizer": moments}}
    return training.kept(recipe, new), training.kept(recipe, metrics)


def generator_objective(
    trained: dict[str, Any],
    recipe: Recipe,
    state: State,
    teacher_params: Params,
    texts: Texts,
    step: Int[Array, ""],
    drawn: Drawn,
    knobs: Knobs,
):
    """(loss, metrics) of `trained`, which holds "params" and "r": DMD2's generator loss.

    With moving scores lambda (L_con + L_reg) is added (LinVideo, eq. 14).
    """
    frozen = jax.lax.stop_gradient((trained["params"], trained["r"]))
    x, t = _met(recipe, generator(recipe, *frozen, state["mode"], texts), step, drawn)
    student = generator(
        recipe, trained["params"], trained["r"], state["mode"], texts, remat=recipe.remat
    )
    x_0 = _x_0(student, x, t)
    fake = training.network(recipe, recipe.fake, state["fake"]["params"])
    teacher = _teacher(recipe, teacher_params, texts, knobs.guidance_scale)
    value = distillation.generator_loss(
        x_0,
        drawn.later_noise,
        drawn.t,
        _on(fake, texts),
        teacher,
        knobs.normalise,
    )
    metrics = {"generator_loss": value, "sample_deviation": jnp.std(x_0)}
    if recipe.moving_scores:
        con = scores.constraint(trained["r"], knobs.target)
        reg = scores.regulariser(trained["r"], knobs.alpha)
        value += knobs.lambda_ * (con + reg)
        metrics |= {"constraint": con, "regulariser": reg, "r": trained["r"]}
    return value, metrics


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def update_generator(
    recipe: Recipe,
    state: State,
    teacher_params: Params,
    texts: Texts,
    knobs: Knobs,
    key: jax.Array,
):
    """(state, metrics): one step of the generator against the present fake score.

    Layers keep their kinds; a score moves only in a mixed layer, by plain descent as in transfer.
    The state is given back as in `update_fake_score`.
    """
    trained = {"params": state["params"], "r": state["r"]}
    step, drawn = _drawn(recipe, knobs, key)

    def of_part(*part):
        arguments = recipe, state, teacher_params, part[0], step, part[1], knobs
        return jax.grad(generator_objective, has_aux=True)(trained, *arguments)

    grads, metrics = _mean_over_parts(recipe, of_part, texts, drawn)
    metrics |= {"exit_step": step}
    new, more = _generator_moved(recipe, state, grads["params"], knobs)
    new["r"] = training.descended(state, grads["r"], knobs.r_learning_rate)
    return training.kept(recipe, new), training.kept(recipe, metrics | more)


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def update_start(
    recipe: Recipe,
    state: State,
    teacher_params: Params,
    texts: Texts,
    knobs: Knobs,
    key: jax.Array,
):
    """(state, metrics): the generator's first step learns where the teacher leads from its noise.

    The teacher is sampled here, with guidance. The state is given back as in `update_fake_score`.
    """
    _, drawn = _drawn(recipe, knobs, key)

    def of_part(texts, drawn):
        noise = drawn.noise
        teacher = _teacher(recipe, teacher_params, texts, knobs.guidance_scale)
        x_0 = solvers.sample(
            lambda x, t: teacher(x, jnp.full(x.shape[:1], t)),
            noise,
            np.asarray(recipe.start_sigmas),
            recipe.start_sampler,
        )
        t = jnp.full(noise.shape[:1], recipe.sigmas[0])

        def loss(params):
            student = generator(
                recipe, params, state["r"], state["mode"], texts, remat=recipe.remat
            )
            return distillation.regression_loss(student, noise, t, x_0)

        return jax.value_and_grad(loss)(state["params"])

    value, grads = _mean_over_parts(recipe, of_part, texts, drawn)
    new, metrics = _generator_moved(recipe, state, grads, knobs)
    return training.kept(recipe, new), training.kept(recipe, metrics | {"regression": value})


def _generator_moved(recipe: Recipe, state: State, grads: Params, knobs: Knobs):
    params, moments = _applied(
        recipe, state["params"], state["optimizer"], grads, knobs.generator_rate
    )
    average = optimizers.moving_average(state["ema"], params, knobs.ema_decay, knobs.ema_age)
    new = state | {"params": params, "optimizer": moments, "ema": average}
    return new, {"gradient_norm": optax.tree.norm(grads)}
