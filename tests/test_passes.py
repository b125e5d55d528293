"""What an update computes, on networks of two matrices: counted passes, buffers, branches."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from configs import digits
from linvideo_jax.models.wan import MIX, WanConfig
from linvideo_jax.transfer import training
from linvideo_jax.transfer.recipe import Passes, Recipe, knobs_at, passes
from linvideo_jax.transfer.samples import Batch, Fresh

BATCH, SHAPE, TEXT = 4, (1, 2, 2, 3), (3, 2)
SIZE = 12  # of SHAPE
RANKS = {"student": 3, "teacher": 5, "score": 7}  # a network is known by its rank
LAYERS = 2


def settings(**changes):
    transfer = digits.get_config().transfer
    transfer.update({"batch_size": BATCH, "target": 1, "remat": "none", **changes})
    return transfer


def recipe_of(own, store_velocity="both"):
    sizes = WanConfig(num_layers=LAYERS)
    options = {"sigmas": (1.0, 0.8, 0.5, 0.2, 0.0), "store_velocity": store_velocity}
    return Recipe.of(own, training.student_config(sizes), sizes, "euler", "float32", **options)


def matrices(name, seed=0):
    rng = np.random.default_rng([seed, RANKS[name]])
    shapes = {"first": (SIZE, RANKS[name]), "second": (RANKS[name], SIZE)}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def network(recipe, config, params, r=None, mode=None, remat="none"):
    """u = (x F S) x the mean of the text, and r in the student's so that it has a gradient."""

    def velocity(x, t, text, text_lengths):
        flat = x.reshape(len(x), -1) @ params["first"] @ params["second"]
        scale = jnp.mean(text, (1, 2)) * (1.0 if r is None else jnp.sum(r))
        return (flat * scale[:, None]).reshape(x.shape)

    return velocity


@pytest.fixture
def whole(monkeypatch):
    """whole(settings, store_velocity) -> recipe, state, teacher, batch, knobs of an update."""
    monkeypatch.setattr(training, "network", network)
    rng = np.random.default_rng(1)

    def text(*axes):
        return jnp.asarray(rng.normal(size=(*axes, *TEXT)), jnp.float32), jnp.full(axes, 2)

    def whole(own, store_velocity="both"):
        recipe = recipe_of(own, store_velocity)
        params = matrices("student")
        state = {
            "params": params,
            "optimizer": training.weights_optimizer(own).init(params),
            "r": jnp.full(LAYERS, 0.8),
            "mode": jnp.full(LAYERS, MIX),
            "settled": jnp.zeros(LAYERS, jnp.int32),
        }
        state |= training.objectives_state(recipe, matrices("score"), SHAPE, TEXT)

        def draw(*axes):
            x, u = (jnp.asarray(rng.normal(size=(*axes, *SHAPE)), jnp.float32) for _ in range(2))
            if recipe.velocity != "stored":
                u = None
            return Batch(x, u, jnp.full(axes, 0.8), jnp.full(axes, 0.5), *text(*axes))

        batch = draw(BATCH)
        if recipe.has_score_network:
            others = draw(BATCH, recipe.score_updates)._replace(u_teacher=None)
            batch = batch._replace(others=others)
        if recipe.objective == "own_points":
            fresh = Fresh(batch.x, jnp.zeros(BATCH, jnp.int32), *text(BATCH), *text(BATCH))
            batch = batch._replace(fresh=fresh)
        knobs = knobs_at(own, own.warmup_steps, 1e-3, 3.0, True)
        return SimpleNamespace(
            recipe=recipe, state=state, teacher=matrices("teacher"), batch=batch, knobs=knobs
        )

    return whole


def counted(jaxpr, times=1):
    """{rank: [forwards, gradients]} of the products with a first matrix, in batches."""
    found = {rank: np.zeros(2) for rank in RANKS.values()}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            shape, (left, right) = equation.outvars[0].aval.shape, equation.invars
            for rank in RANKS.values():
                if shape[-1] == rank and right.aval.shape == (SIZE, rank):
                    found[rank][0] += times * shape[0] / BATCH
                if sorted(shape) == sorted((SIZE, rank)) and SIZE in left.aval.shape:
                    found[rank][1] += times * left.aval.shape[0] / BATCH
        more = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for inner in jaxprs_in_params(equation.params):
            for rank, numbers in counted(inner, more).items():
                found[rank] += numbers
    return found


@pytest.mark.parametrize(
    ("changes", "store_velocity", "again"),
    [
        ({"objective": "mse"}, "both", 0),
        ({"objective": "mse"}, "none", 0),
        ({"objective": "adm"}, "both", 0),
        ({"objective": "own_points", "own_share": 1.0}, "both", 0),
        ({"objective": "own_points", "own_share": 0.4}, "both", 0),
        ({"objective": "own_points", "own_share": 0.4}, "none", 0),
        ({"objective": "adm_score", "score_updates": 2, "rollout_steps": 3}, "both", 0),
        # The backward pass of a rollout computes its steps again.
        ({"objective": "dmd", "score_updates": 2, "rollout_steps": 3}, "both", 3),
    ],
)
def test_passes_are_those_of_an_update(whole, changes, store_velocity, again):
    own = settings(**changes)
    it = whole(own, store_velocity)
    arguments = (it.state, it.teacher, it.batch, it.knobs, jax.random.key(0))
    update = training.update.__wrapped__
    jaxpr = jax.make_jaxpr(lambda *given: update(it.recipe, *given))(*arguments)
    found = {name: counted(jaxpr.jaxpr)[rank] for name, rank in RANKS.items()}
    expected = passes(it.recipe)
    ours = Passes(
        student=found["student"][0] - found["student"][1] - again,
        student_gradients=found["student"][1],
        teacher=found["teacher"][0],
        score=found["score"][0] - found["score"][1],
        score_gradients=found["score"][1],
    )
    assert ours == expected and found["teacher"][1] == 0


@pytest.mark.parametrize("objective", ["mse", "adm", "adm_score", "own_points", "dmd"])
def test_an_update_gives_back_the_buffers_of_its_state_alone(whole, objective):
    it = whole(settings(objective=objective))
    given = it.state
    for step in range(2):
        state, metrics = training.update(
            it.recipe, given, it.teacher, it.batch, it.knobs, jax.random.key(step)
        )
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
        given = state
    kept = jax.tree.leaves((it.teacher, it.batch, state, metrics))
    assert not any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in kept)


@pytest.mark.parametrize("objective", ["mse", "adm", "adm_score", "own_points", "dmd"])
def test_every_sample_of_either_branch_has_a_gradient(whole, objective):
    """A sample's text is that of its branch; its gradient reaches the weights through it."""
    it = whole(settings(objective=objective))
    noised = (it.batch.x, it.batch.t_from)

    def loss(text, weights):
        batch = it.batch._replace(text=text)
        trained = {"params": weights, "r": it.state["r"]}
        return training.loss(trained, it.recipe, it.state, it.teacher, batch, noised, it.knobs)[0]

    of_text = jax.jit(jax.jacobian(jax.grad(loss, argnums=1)))
    of_weights = of_text(it.batch.text, it.state["params"])
    through = jnp.abs(of_weights["first"]).sum((0, 1))  # by sample, token and coordinate
    assert through.shape == (BATCH, *TEXT) and float(through.min()) > 1e-6
