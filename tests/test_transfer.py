"""Collect and transfer on a tiny random teacher: what is stored, resumed, learned and written."""

import dataclasses
import json
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linvideo_jax import checkpoints, evaluation, loop
from linvideo_jax.data import loader
from linvideo_jax.errors import UserError
from linvideo_jax.models.module import shapes
from linvideo_jax.models.wan import LINEAR, MIX, SOFTMAX, WanTransformer
from linvideo_jax.stages import collect, profile, transfer
from linvideo_jax.transfer import selection, training
from linvideo_jax.transfer.recipe import knobs_at

LAYERS, TARGET = 3, 2


@pytest.fixture(scope="module")
def teacher(tiny_teacher):
    return tiny_teacher


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config


def drawn(config, settings, teacher, workdir):
    """The recipe of these settings, and samples of the pairs that `workdir` holds."""
    pairs = collect.opened(config, workdir, teacher, settings.batch_size)
    recipe = transfer.recipe_of(config, settings, pairs.index, teacher)
    return recipe, transfer.samples_of(pairs, recipe, settings, config.seed)


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """Workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("run")
    collect.run(config, workdir)
    transfer.run(config, workdir)
    return workdir


def test_training_ends_with_the_target(trained):
    lines = loop.read_metrics(trained / "state" / "transfer")
    assert [line["step"] for line in lines] == list(range(1, 25))
    moved = [line["r"] for line in lines[6:16]]
    assert min(moved[-1]) < 0.85  # from 0.9, by the constraint
    final = checkpoints.load(trained / "final")
    assert len(final.linear_layers) == TARGET
    assert [i for i, r in enumerate(lines[-1]["r"]) if r == 0.0] == list(final.linear_layers)
    assert set(lines[-1]["r"]) == {0.0, 1.0}
    assert lines[-1]["constraint"] == 0.0


def test_updates_bring_a_linear_student_nearer_to_its_teacher(config, trained, teacher):
    loaded = checkpoints.load(teacher)
    wan_config = training.student_config(loaded.wan_config)
    settings = config.transfer.copy_and_resolve_references()
    settings.objective = "adm"
    state = training.initial_state(settings, wan_config, loaded.transformer)
    state = selection.placed(state, range(LAYERS))
    recipe, dataset = drawn(config, settings, loaded, trained)
    knobs = knobs_at(settings, settings.round_at, 3e-3, 2.0, False)
    batch, anchors = next(loader.batches(dataset, settings.batch_size, num_threads=0)), []
    for _ in range(40):
        state, metrics = training.update(
            recipe, state, loaded.transformer, batch, knobs, jax.random.key(0)
        )
        anchors.append(float(metrics["anchor"]))
    assert anchors[-1] < 0.5 * anchors[0], anchors
    assert state["r"].tolist() == [0.0] * LAYERS


def test_interrupted_and_resumed_equals_undisturbed(config, trained, tmp_path, monkeypatch):
    (tmp_path / "pairs").symlink_to(trained / "pairs")
    write = loop.MetricsFile.write

    def killed(self, step, values):
        if step == 15:
            raise RuntimeError("killed")
        write(self, step, values)

    monkeypatch.setattr(loop.MetricsFile, "write", killed)
    with pytest.raises(RuntimeError, match="killed"):
        transfer.run(config, tmp_path)
    assert not (tmp_path / "final").exists()
    monkeypatch.setattr(loop.MetricsFile, "write", write)
    transfer.run(config, tmp_path)
    ours, theirs = (checkpoints.load(w / "final") for w in (tmp_path, trained))
    assert ours.linear_layers == theirs.linear_layers
    jax.tree.map(np.testing.assert_array_equal, ours.transformer, theirs.transformer)


def test_warmup_brings_linear_attention_near_softmax(config, trained, teacher):
    loaded = checkpoints.load(teacher)
    wan_config = training.student_config(loaded.wan_config)
    state = training.initial_state(config.transfer, wan_config, loaded.transformer)
    recipe, dataset = drawn(config, config.transfer, loaded, trained)
    knobs = knobs_at(config.transfer, 0, 3e-2, 2.0, True)
    batch, errors = next(loader.batches(dataset, recipe.batch_size, num_threads=0)), []
    for _ in range(40):
        state, metrics = training.warmup(recipe, state, batch, knobs)
        errors.append(np.asarray(metrics["attention_errors"]))
    assert np.all(errors[-1] < 0.7 * errors[0])
    for name in ("to_q", "to_out"):
        now, then = (p["blocks"]["attn1"][name] for p in (state["params"], loaded.transformer))
        jax.tree.map(np.testing.assert_array_equal, now, then)


@pytest.mark.parametrize("objective", ["adm_score", "own_points", "dmd"])
def test_every_objective_trains_is_compiled_once_and_resumes(
    objective, config, trained, teacher, tmp_path
):
    loaded = checkpoints.load(teacher)
    wan_config = training.student_config(loaded.wan_config)
    settings = config.transfer.copy_and_resolve_references()
    settings.update(objective=objective, score_updates=2, rollout_steps=2, remat="none")
    settings.own_share = 1.0
    recipe, dataset = drawn(config, settings, loaded, trained)
    state = training.initial_state(settings, wan_config, loaded.transformer)
    sample = dataset[0]
    shapes = sample.x.shape, sample.text.shape
    state |= training.objectives_state(recipe, loaded.transformer, *shapes)
    state = jax.tree.map(np.array, state)
    gradients = []

    def step(state, i, batch):
        changes = {"lambda_": 0.01 * (i + 1), "target": i, "beta": 0.5, "freeze_steps": 50 * i}
        changes |= {"negative_fraction": float(i % 2), "r_learning_rate": 0.1}
        knobs = knobs_at(settings, 8 + i, 1e-3, 2.0, True)._replace(**changes)
        key = jax.random.key(i)
        state, metrics = training.update(recipe, state, loaded.transformer, batch, knobs, key)
        gradients.append(float(metrics["gradient_norm"]))
        return state, metrics

    def run(name, num_steps):
        options = {"folder": tmp_path / name, "save_every": 2, "log_every": 1}
        options["data"] = loader.batches(dataset, settings.batch_size, num_threads=2)
        begin = jax.device_put(state, jax.devices()[0])  # as a restored one, or it compiles twice
        return loop.run("test", step, begin, num_steps=num_steps, **options)

    compiled = training.update._cache_size()
    undisturbed = run("a", 4)
    assert training.update._cache_size() == compiled + 1
    run("b", 2)
    resumed = run("b", 4)
    jax.tree.map(np.testing.assert_array_equal, undisturbed, resumed)
    lines = loop.read_metrics(tmp_path / "a")
    assert len(lines) == 4 and objective in lines[0]
    # Of the conditional branch alone, then of the negative one alone.
    assert all(norm > 1e-6 for norm in gradients[:4])
    for part in ("score", "own"):
        if part in state:
            before, after = (jax.tree.leaves(s[part])[0] for s in (state, undisturbed))
            assert float(jnp.abs(after - before).max()) > 0


def test_layers_that_are_not_learned_are_placed_after_the_warmup(
    config, trained, tmp_path, monkeypatch
):
    (tmp_path / "pairs").symlink_to(trained / "pairs")
    own = config.copy_and_resolve_references()
    own.transfer.update(selection="manual", layers=(2, 0), num_steps=17)
    seen = []

    def update(recipe, state, teacher, batch, knobs, key):
        seen.append((state["mode"].tolist(), knobs.r_learning_rate))
        return state, {"loss": jnp.zeros(())}

    monkeypatch.setattr(training, "update", update)
    transfer.run(own, tmp_path)
    assert seen == [([LINEAR, SOFTMAX, LINEAR], 0.0)] * 11
    assert checkpoints.load(tmp_path / "final").linear_layers == (0, 2)
    written = json.loads((tmp_path / "selection.json").read_text())
    assert written == {"selection": "manual", "target": 2, "layers": [0, 2]}


def test_weights_begin_anew_after_the_selection(config, trained, tmp_path, monkeypatch):
    """As the teacher's, with fresh moments; what the feature maps have learned stays."""
    (tmp_path / "pairs").symlink_to(trained / "pairs")
    own = config.copy_and_resolve_references()
    own.transfer.update(rewind=True, num_steps=17, ema_decay=0.5)
    seen = []

    def update(recipe, state, teacher, batch, knobs, key):
        seen.append(jax.tree.map(np.asarray, state))
        moved = {
            name: jax.tree.map(lambda x: x + 1, state[name]) for name in ("params", "optimizer")
        }
        return state | moved, {"loss": jnp.zeros(())}

    monkeypatch.setattr(training, "update", update)
    transfer.run(own, tmp_path)
    first, *_, last, after = seen
    teacher = checkpoints.load(own.checkpoint, ("transformer",)).transformer
    maps = after["params"]["blocks"]["attn1"].pop("feature_map")
    jax.tree.map(np.testing.assert_array_equal, after["params"], teacher)
    before = last["params"]["blocks"]["attn1"]["feature_map"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b + 1, atol=1e-5), maps, before)
    jax.tree.map(np.testing.assert_array_equal, after["optimizer"], first["optimizer"])
    assert any(np.any(leaf) for leaf in jax.tree.leaves(last["optimizer"]))
    after["ema"]["blocks"]["attn1"].pop("feature_map")
    jax.tree.map(np.testing.assert_array_equal, after["ema"], teacher)
    assert after["mode"].tolist().count(LINEAR) == own.transfer.target


def test_settled_layers_are_frozen_without_another_compilation(config, trained, tmp_path, caplog):
    (tmp_path / "pairs").symlink_to(trained / "pairs")
    own = config.copy_and_resolve_references()
    own.transfer.update(freeze_steps=2, lambda_=0.3, r_learning_rate=0.3)
    compiled = training.update._cache_size()
    with caplog.at_level("INFO", "absl"):
        transfer.run(own, tmp_path)
    assert training.update._cache_size() == compiled
    lines = loop.read_metrics(tmp_path / "state" / "transfer")[6:16]
    mixed = [line["mixed_layers"] for line in lines]
    assert mixed[0] == LAYERS and mixed == sorted(mixed, reverse=True) and mixed[-1] < LAYERS
    assert caplog.text.count("frozen as") == LAYERS - mixed[-1]
    final = checkpoints.load(tmp_path / "final", ("transformer",)).linear_layers
    for layer in range(LAYERS):
        if f"layer {layer} frozen as linear" in caplog.text:
            assert layer in final
        if f"layer {layer} frozen as softmax" in caplog.text:
            assert layer not in final


def test_the_learned_selection_is_written(trained):
    written = json.loads((trained / "selection.json").read_text())
    assert written["layers"] == list(checkpoints.load(trained / "final").linear_layers)
    assert len(written["scores"]) == LAYERS and written["selection"] == "selective"


def test_profile_measures_every_range_and_resumes(config, trained, tmp_path, monkeypatch):
    (tmp_path / "pairs").symlink_to(trained / "pairs")
    own = config.copy_and_resolve_references()
    own.transfer.update(warmup_steps=0, remat="none")
    own.profile.update(width=2, num_steps=4, num_validation=2, num_prompts=2)
    sampled = []

    def sample(contender, prompts, seed, settings, batch_size, folder):
        sampled.append((contender.checkpoint.linear_layers, len(prompts)))
        return evaluation.Videos(np.zeros((2, 1)), 1.0, 0.5, "mark")

    def measure(judge, said, ours, theirs, pixels):
        return {"right.all": np.array([True, False]), "distance_latents": np.array([1.0, 2.0])}

    monkeypatch.setattr(profile.classifier, "load", lambda folder, kind: None)
    monkeypatch.setattr(evaluation, "sample", sample)
    monkeypatch.setattr(evaluation, "measure", measure)
    profile.run(own, tmp_path)
    assert sampled == [((), 2), ((0, 1), 2), ((1, 2), 2)]
    path = tmp_path / "profile" / "profile.json"
    first = json.loads(path.read_text())
    assert [row["layers"] for row in first["rows"]] == [[0, 1], [1, 2]]
    assert first["updates"] == 8 and first["num_layers"] == LAYERS
    for row in first["rows"]:
        assert row["error_before"] > 0 and row["error_after"] not in (0, row["error_before"])
        assert (row["all_right"], row["distance_latents"]) == (0.5, 1.5)
    drawn = ElementTree.parse(tmp_path / "profile" / "profile.svg").getroot()
    charts = drawn.findall("{http://www.w3.org/2000/svg}svg")
    assert [int(chart.get("y")) for chart in charts] == [24, 268, 512]

    # The first range is lost, the second is kept: the same figures come again.
    (tmp_path / "profile" / "rows" / "000-001.json").unlink()
    sampled.clear()
    profile.run(own, tmp_path)
    assert sampled == [((), 2), ((0, 1), 2)]
    again = json.loads(path.read_text())
    assert again["rows"][1] == first["rows"][1]
    assert again["rows"][0] | {"seconds": 0} == first["rows"][0] | {"seconds": 0}

    own.transfer.selection = "grid"
    read = transfer.read_profile(own.transfer, tmp_path)
    found = selection.before_training(own.transfer, LAYERS, read)
    best = min(first["rows"], key=lambda row: row["error_after"])
    assert list(found) == best["layers"]
    own.profile.width = 4
    with pytest.raises(UserError, match="width is 4: choose 1 to 3"):
        profile.run(own, tmp_path)
    own.profile.update(width=1, num_validation=6)
    with pytest.raises(UserError, match="num_validation is 6: choose 1 to below the 6 videos"):
        profile.run(own, tmp_path)


def test_score_networks_that_do_not_match_are_refused(trained, teacher, tmp_path):
    loaded = checkpoints.load(teacher)
    same = transfer.score_network("", loaded)
    jax.tree.map(np.testing.assert_array_equal, same, loaded.transformer)
    again = transfer.score_network(str(teacher), loaded)
    jax.tree.map(np.testing.assert_array_equal, again, loaded.transformer)
    with pytest.raises(UserError, match="has linear layers: choose a model without"):
        transfer.score_network(str(trained / "final"), loaded)
    other = dataclasses.replace(loaded.wan_config, ffn_dim=16)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes(WanTransformer, other))
    checkpoints.save(
        tmp_path / "other",
        config=checkpoints.make_config(other, loaded.vae_config, loaded.umt5_config),
        transformer=zeros,
    )
    with pytest.raises(UserError, match="has other sizes than the teacher"):
        transfer.score_network(str(tmp_path / "other"), loaded)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("objective", "kl", "objective is 'kl': choose one of adm, adm_score, mse, own_points"),
        ("t_to", "far", "t_to is 'far': choose one of next, uniform"),
        ("weighting", "none", "weighting is 'none': choose one of paper, clipped"),
        ("score_updates", 0, "score_updates is 0: choose 1 or more"),
        ("selection", "none", "selection is 'none': choose one of selective, manual, grid, random"),
        ("selection", "grid", "profile.json is missing: put the stage profile before transfer"),
        ("final_weights", "best", "final_weights is 'best': choose one of raw, ema"),
        ("final_weights", "ema", "final_weights is 'ema': set transfer.ema_decay above 0, too"),
    ],
)
def test_unknown_choices_are_refused(config, trained, field, value, message):
    wrong = config.copy_and_resolve_references()
    wrong.transfer[field] = value
    with pytest.raises(UserError, match=message):
        transfer.run(wrong, trained)


def test_rounding_keeps_the_smallest_scores(config):
    state = {"r": jnp.array([0.4, 0.45, 0.3]), "mode": jnp.full((3,), MIX)}
    layers, told = selection.by_scores(state["r"], state["mode"], TARGET)
    placed = selection.placed(state, layers)
    assert placed["mode"].tolist() == [LINEAR, SOFTMAX, LINEAR]
    assert placed["r"].tolist() == [0.0, 1.0, 0.0]
    assert (told["rounded"], told["moved"], told["undecided"]) == (3, [1], 3)


def test_wrong_settings_are_refused(config, trained, tmp_path):
    wrong = config.copy_and_resolve_references()
    wrong.transfer.target = LAYERS + 1
    with pytest.raises(UserError, match="choose 0 to 3"):
        transfer.run(wrong, trained)
    wrong = config.copy_and_resolve_references()
    wrong.transfer.round_at = wrong.transfer.num_steps
    with pytest.raises(UserError, match="round_at is 24: choose a step from warmup_steps, 6"):
        transfer.run(wrong, trained)
    with pytest.raises(UserError, match="run the collect stage first"):
        transfer.run(config, tmp_path)
