"""Ways of choosing the linear layers, their bad input, and the freezing of settled scores."""

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from linvideo_jax.errors import UserError
from linvideo_jax.models.wan import LINEAR, MIX, SOFTMAX
from linvideo_jax.transfer import selection

LAYERS = 6


def settings(**changes):
    known = {
        "selection": "selective",
        "rounding": "target",
        "target": 3,
        "layers": (),
        "selection_seed": 0,
        "r_init": 0.9,
        "freeze_steps": 50,
    }
    return ConfigDict(known | changes)


def profile(errors, width=1, num_layers=LAYERS):
    rows = [
        {"layers": list(range(first, first + width)), "error_after": error}
        for first, error in enumerate(errors)
    ]
    return {"num_layers": num_layers, "rows": rows}


def test_selective_learns_and_the_others_are_known_before():
    assert selection.before_training(settings(), LAYERS, None) is None
    manual = settings(selection="manual", layers=(5, 0, 3))
    assert selection.before_training(manual, LAYERS, None) == (0, 3, 5)
    grid = settings(selection="grid")
    found = selection.before_training(grid, LAYERS, profile([3, 1, 6, 2, 5, 4]))
    assert found == (0, 1, 3)


def test_random_depends_on_its_seed_alone():
    def chosen(seed):
        own = settings(selection="random", selection_seed=seed)
        return selection.before_training(own, 30, None)

    assert chosen(0) == chosen(0) and len({chosen(seed) for seed in range(5)}) > 1
    assert all(len(set(chosen(seed))) == 3 for seed in range(5))


def test_grid_takes_whole_ranges_and_cuts_the_last():
    assert selection.by_profile(profile([5, 1, 4, 2, 3], width=2), 3, LAYERS) == (1, 2, 3)
    assert selection.by_profile(profile([5, 1, 4, 2, 3], width=2), 4, LAYERS) == (1, 2, 3, 4)
    assert selection.by_profile(profile([5, 1, 4, 2, 3], width=2), 0, LAYERS) == ()
    with pytest.raises(UserError, match="a model with 4 layers, this one has 6"):
        selection.by_profile(profile([1, 2, 3, 4], num_layers=4), 2, LAYERS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": "greedy"}, "selection is 'greedy': choose one of selective, manual, grid"),
        ({"rounding": "up"}, "rounding is 'up': choose one of target, nearest"),
        ({"target": 7}, "target is 7: choose 0 to 6"),
        ({"target": -1}, "target is -1: choose 0 to 6"),
        ({"selection": "manual", "layers": (0, 1, 6)}, "names layer 6: the model has layers 0 to"),
        ({"selection": "manual", "layers": (0, -1, 2)}, "names layer -1"),
        ({"selection": "manual", "layers": (0, 1.5, 2)}, "names layer 1.5"),
        ({"selection": "manual", "layers": (0, 1)}, "name 3 different layers, as many as"),
        ({"selection": "manual", "layers": (0, 1, 1)}, "name 3 different layers, as many as"),
        ({"selection": "manual"}, r"layers is \(\): name 3 different layers"),
        ({"r_init": 0.99}, "r_init is 0.99, where transfer.freeze_steps freezes"),
    ],
)
def test_what_cannot_be_chosen_is_refused_in_one_sentence(changes, message):
    with pytest.raises(UserError, match=message) as caught:
        selection.check(settings(**changes), LAYERS)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_good_settings_pass():
    for changes in ({}, {"target": 0}, {"target": 6}, {"r_init": 1.0, "freeze_steps": 0}):
        selection.check(settings(**changes), LAYERS)
    selection.check(settings(selection="manual", layers=(5, 0, 3)), LAYERS)


def frozen(history, target=3, steps=3):
    """(r, mode) after the scores of `history`, updated as in training."""
    mode = jnp.full(LAYERS, MIX)
    settled = jnp.zeros(LAYERS, jnp.int32)
    r = jnp.full(LAYERS, 0.5)
    for row in history:
        r = jnp.where(mode == MIX, jnp.asarray(row), r)
        r, mode, settled = selection.freeze(r, mode, settled, target, steps)
    return np.asarray(r).tolist(), np.asarray(mode).tolist()


def test_a_layer_is_frozen_after_that_many_updates_and_never_reopened():
    near = [0.01, 0.99, 0.03, 0.97, 0.5, 1.0]
    assert frozen([near] * 2)[1] == [MIX] * LAYERS
    r, mode = frozen([near] * 3)
    assert mode == [LINEAR, SOFTMAX, MIX, MIX, MIX, SOFTMAX]
    np.testing.assert_allclose(r, [0.0, 1.0, 0.03, 0.97, 0.5, 1.0], rtol=1e-6)
    assert frozen([near] * 3 + [[0.5] * LAYERS] * 5)[1] == mode
    # An update away from the ends begins the count again.
    assert frozen([near, near, [0.5] * LAYERS, near, near])[1] == [MIX] * LAYERS
    assert frozen([near] * 9, steps=0)[1] == [MIX] * LAYERS


def test_no_more_layers_are_frozen_than_the_target_leaves():
    assert frozen([[0.0] * LAYERS] * 5)[1].count(LINEAR) == 3
    assert frozen([[1.0] * LAYERS] * 5)[1].count(SOFTMAX) == 3
    assert frozen([[0.0] * LAYERS] * 5, target=0)[1] == [MIX] * LAYERS
    # The final rule leaves frozen layers as they are, also where others have the same score.
    layers, told = selection.by_scores(
        jnp.array([0.0, 0.0, 1.0, 0.3]), jnp.array([MIX, LINEAR, SOFTMAX, MIX]), 1
    )
    assert layers == (1,) and told["rounded"] == 3


def test_rounding_to_the_nearest_takes_whatever_number_comes_out():
    r, mode = jnp.array([0.4, 0.6, 0.9, 0.1]), jnp.array([MIX, MIX, LINEAR, SOFTMAX])
    assert selection.by_scores(r, mode, 3)[0] == (0, 1, 2)
    assert selection.by_scores(r, mode, 3, "nearest")[0] == (0, 2)
