"""The update of a student: parts of a batch, optimisers, averages, dtypes, and what is kept."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits
from linvideo_jax.errors import UserError
from linvideo_jax.models import module
from linvideo_jax.models.wan import WanConfig, WanTransformer
from linvideo_jax.transfer import training
from linvideo_jax.transfer.recipe import Recipe, knobs_at
from linvideo_jax.transfer.samples import Batch

TEACHER = WanConfig(
    num_layers=2, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
    text_dim=8, freq_dim=8, ffn_dim=40,
)  # fmt: skip
STUDENT = training.student_config(TEACHER)


def settings(**changes):
    transfer = digits.get_config().transfer
    own = {"batch_size": 6, "remat": "none", "target": 1, "objective": "mse"}
    transfer.update(own | changes)
    return transfer


def recipe(dtype="float32", options=None, **changes):
    options = {"sigmas": (1.0, 0.5, 0.0), "store_velocity": "both"} | (options or {})
    return Recipe.of(settings(**changes), STUDENT, TEACHER, "unipc", dtype, **options)


def draw(shapes, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(scale=0.3, size=s.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def teacher():
    return draw(module.shapes(WanTransformer, TEACHER), 0)


@pytest.fixture(scope="module")
def batch():
    shape = (6, 3, 4, 4, 4)
    x, u, text = draw([jax.ShapeDtypeStruct(s, "f4") for s in (shape, shape, (6, 5, 8))], 1)
    t = np.linspace(0.9, 0.3, 6, dtype=np.float32)
    return Batch(x, u, t, t - 0.1, text, np.array([4, 3, 1, 2, 4, 4], np.int32))


def gradients(teacher, batch, **changes):
    state = training.initial_state(settings(**changes), STUDENT, teacher)
    knobs = knobs_at(settings(**changes), 300, 1e-3, 2.0, True)
    compiled = jax.jit(training.gradients, static_argnums=0)
    return compiled(recipe(**changes), state, teacher, batch, None, knobs)


def assert_equal_to_rounding(ours, theirs):
    norm = optax.tree.norm(theirs)
    assert norm > 1e-3
    assert optax.tree.norm(optax.tree.sub(ours, theirs)) < 3e-6 * norm


@pytest.fixture(scope="module")
def whole(teacher, batch):
    return gradients(teacher, batch)


def test_parts_of_a_batch_give_the_gradient_of_the_whole(teacher, batch, whole):
    whole, metrics = whole
    ours, again = gradients(teacher, batch, accumulate=3)
    assert_equal_to_rounding(ours, whole)
    for name, value in metrics.items():
        np.testing.assert_allclose(again[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("policy", ["products", "full"])
def test_what_the_backward_pass_keeps_changes_no_gradient(teacher, batch, whole, policy):
    ours, _ = gradients(teacher, batch, remat=policy)
    assert_equal_to_rounding(ours, whole[0])


def test_adamw_is_optaxs_with_decay_of_matrices_and_a_common_norm(teacher):
    changes = {"optimizer": "adamw", "weight_decay": 0.1}
    state = training.initial_state(settings(**changes), STUDENT, teacher)
    knobs = knobs_at(settings(**changes), 300, 1e-2, 2.0, True)._replace(feature_map_rate=1.0)
    grads = [draw({"params": state["params"], "r": state["r"]}, seed) for seed in (2, 3)]
    params = state["params"]
    decays = jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
    # Biases and the rest take Adam's step alone; matrices decay by the rate times 0.1.
    theirs = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1, mask=decays)
    )
    moments = theirs.init(params)

    @jax.jit
    def their_step(grads, moments, params):
        changes, moments = theirs.update(grads, moments, params)
        return optax.apply_updates(params, changes), moments

    step = jax.jit(training.stepped, static_argnums=0)
    for grad in grads:
        params, moments = their_step(grad["params"], moments, params)
        state, _ = step(recipe(**changes), state, grad, knobs)
    state["params"]["blocks"]["attn1"].pop("feature_map")
    params["blocks"]["attn1"].pop("feature_map")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), state["params"], params)


def test_the_average_follows_and_begins_anew_where_layers_are_placed(teacher):
    chosen = settings(ema_decay=0.9, optimizer="adamw")
    own, state = recipe(optimizer="adamw"), training.initial_state(chosen, STUDENT, teacher)
    step = jax.jit(training.stepped, static_argnums=0)
    before = state["ema"]
    grads = draw({"params": state["params"], "r": state["r"]}, 2)
    knobs = knobs_at(chosen, 250, 1e-2, 2.0, True)
    assert knobs.ema_age == 50 and knobs_at(chosen, 1403, 1.0, 2.0, False).ema_age == 3
    assert knobs_at(chosen, 7, 1.0, 2.0, True).ema_age == 0
    manual = settings(selection="manual", layers=(0,))
    assert knobs_at(manual, 1403, 1.0, 2.0, False).ema_age == 1203
    for age, decay in ((50, 51 / 60), (0, 0.1), (1000, 0.9)):
        new, _ = step(own, state, grads, knobs._replace(ema_age=age))
        wanted = jax.tree.map(lambda a, p, d=decay: d * a + (1 - d) * p, before, new["params"])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new["ema"], wanted)
    assert "ema" not in training.initial_state(settings(), STUDENT, teacher)


@pytest.mark.parametrize("objective", ["mse", "adm_score", "own_points"])
def test_a_state_shares_no_buffer(teacher, objective):
    """Neither with the teacher nor within itself: it could not be donated."""
    chosen, teacher = settings(ema_decay=0.9), jax.tree.map(jnp.asarray, teacher)
    state = training.initial_state(chosen, STUDENT, teacher)
    own = recipe(objective=objective)
    state |= training.objectives_state(own, teacher, (3, 4, 4, 4), (5, 8))
    leaves = jax.tree.leaves((teacher, state))
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_the_warmup_gives_back_the_buffers_of_its_state_alone(teacher, batch):
    """As `update` does, which is in test_passes.py and parallel_cases.py."""
    chosen, teacher = settings(ema_decay=0.9), jax.tree.map(jnp.asarray, teacher)
    given = training.initial_state(chosen, STUDENT, teacher)
    knobs = knobs_at(chosen, 0, 1e-3, 2.0, True)
    state, metrics = training.warmup(recipe(), given, batch, knobs)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((teacher, state, metrics)))


def test_weights_and_moments_stay_float32_under_bfloat16_products(teacher, batch):
    chosen = settings(ema_decay=0.9, optimizer="adamw")
    own = recipe("bfloat16", optimizer="adamw")
    state = training.initial_state(chosen, STUDENT, teacher)
    knobs = knobs_at(chosen, 300, 1e-5, 2.0, True)

    @jax.jit
    def update(state):
        grads, _ = training.gradients(own, state, teacher, batch, None, knobs)
        return training.stepped(own, state, grads, knobs)[0]

    new = update(state)
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves(new)}
    assert kinds == {"float32", "int32"}
    kernel = [s["params"]["blocks"]["attn1"]["to_q"]["kernel"] for s in (state, new)]
    moved = np.mean(kernel[0] != kernel[1])  # a step that bfloat16 would round away
    assert moved > 0.5


def test_forwards_are_counted():
    counted = {name: recipe(objective=name, rollout_steps=4).forwards for name in
               ("mse", "adm", "own_points", "adm_score", "dmd")}  # fmt: skip
    # A gradient is 3; adm adds a student and a teacher; a critic's update 4 + 3, five times. Two of
    # six samples are a share of 0.2 in whole numbers; they add two of the student and a teacher.
    assert counted == {"mse": 3, "adm": 5, "own_points": 4, "adm_score": 40, "dmd": 49}
    # A velocity that is not stored is the teacher's once more, where it was not asked before.
    lean = {name: recipe(options={"store_velocity": "none"}, objective=name).forwards for name in
            ("mse", "adm", "own_points")}  # fmt: skip
    assert lean == {"mse": 4, "adm": 6, "own_points": pytest.approx(3 + 2 / 3 + 1)}
    assert recipe(objective="own_points", own_share=1.0).forwards == 6
    assert recipe(options={"store_velocity": "none"}, objective="adm", beta=0.0).forwards == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer is 'sgd': choose one of muon, adamw"),
        ({"remat": "some"}, "remat is 'some': choose one of none, products, full, offload"),
        ({"remat": "offload"}, "no host memory for it: choose full"),
        ({"accumulate": 4}, "accumulate is 4: choose a divisor of transfer.batch_size, 6"),
        ({"accumulate": 0}, "accumulate is 0: choose 1 or more"),
        ({"own_share": 0.0}, "own_share is 0.0: choose a share of the batch above 0, at most 1"),
    ],
)
def test_wrong_recipes_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        recipe(**changes)
