"""The distill stage on a tiny random teacher: training, resuming, what it writes and refuses."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sample
from convert import from_torch, to_torch
from linvideo_jax import checkpoints, evaluation, loop, report
from linvideo_jax.errors import UserError
from linvideo_jax.flow import solvers
from linvideo_jax.models.module import shapes
from linvideo_jax.models.wan import LINEAR, MIX, SOFTMAX, WanTransformer
from linvideo_jax.pipeline import Pipeline, Settings
from linvideo_jax.stages import distill, monitoring
from linvideo_jax.transfer import distill_training, training

PROMPTS = ("a red 3 moves right", "the yellow nine bounces on black", "a blue 7 moves up")
STEPS = 8


def save_like(whole, folder, **changes):
    """A checkpoint with the text encoder and VAE of another one."""
    parts = {"transformer": whole.transformer, "config": whole.config} | changes
    checkpoints.save(
        folder,
        **parts,
        vae=whole.vae,
        text_encoder=whole.text_encoder,
        tokenizer=whole.tokenizer_folder,
        scheduler=whole.scheduler,
    )
    return str(folder)


@pytest.fixture(scope="module")
def linear(ours, tmp_path_factory):
    """The tiny model with layer 1 linear, its maps and weights moved a little."""
    student = evaluation.untrained(checkpoints.load(ours), (1,))
    moved = jax.tree.map(lambda leaf: leaf * 1.05, student.transformer)
    folder = tmp_path_factory.mktemp("student") / "linear"
    return save_like(student, folder, transformer=moved)


@pytest.fixture(scope="module")
def config(tiny_pipeline, linear, tmp_path_factory):
    """configs/digits_dmd2.py, cut down to the tiny models and a few steps.

    The teacher is a folder in diffusers' layout, as wan-digits is, the student one of ours.
    """
    path = Path(__file__).parents[1] / "configs" / "digits_dmd2.py"
    spec = importlib.util.spec_from_file_location("digits_dmd2", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    config.checkpoint, config.teacher = linear, str(tiny_pipeline.folder)
    config.prompts, config.dtype = str(prompts), "float32"
    config.distill.update(
        num_steps=STEPS,
        batch_size=2,
        generator_every=2,
        learning_rate=1e-3,
        fake_learning_rate=1e-3,
        lr_warmup_steps=1,
        start_steps=2,
        start_sampling_steps=2,
        start_learning_rate=5e-4,
        remat="none",
        save_every=2,
        log_every=2,
        sample_prompts=1,
        sample_every=STEPS,
    )
    size = {"height": 32, "width": 48, "num_frames": 5}
    config.evaluate.update(prompts=str(prompts), **size)
    return config


def changed(config, **values):
    """A copy with fields of `distill`, or of the top level, set otherwise."""
    own = config.copy_and_resolve_references()
    for name, value in values.items():
        (own.distill if name in own.distill else own)[name] = value
    return own


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """States begin as restored ones are, committed to a device: else jit compiles for both."""
    begin = distill_training.initial_state
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            distill_training,
            "initial_state",
            lambda *args: jax.device_put(begin(*args), jax.devices()[0]),
        )
        yield


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    """Workdir of an undisturbed run."""
    workdir = tmp_path_factory.mktemp("run")
    distill.run(config, workdir)
    return workdir


def test_both_networks_are_trained_and_linear_layers_stay_linear(config, trained, linear):
    lines = loop.read_metrics(trained / "state" / "distill")
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    start, *rest = lines
    assert start["regression"] > 0 and "generator_loss" not in start
    for line in lines:
        assert line["loss"] > 0 and line["gradient_norm"] > 1e-6
        assert line["fake_gradient_norm"] > 1e-6
    for line in rest:
        assert line["generator_loss"] > 0 and line["exit_step"] in range(4)
    before, after = checkpoints.load(linear), checkpoints.load(trained / "final")
    assert after.linear_layers == (1,) and after.wan_config == before.wan_config
    moved = jax.tree.map(
        lambda a, b: float(jnp.abs(a - b).max()), before.transformer, after.transformer
    )
    assert moved["blocks"]["attn1"]["feature_map"]["q"] > 1e-6
    assert moved["proj_out"]["kernel"] > 1e-6
    jax.tree.map(np.testing.assert_array_equal, before.text_encoder, after.text_encoder)


def test_the_report_has_both_losses_and_samples_on_the_way(trained):
    assert (trained / "state/distill/samples/0000008.webp").stat().st_size > 100
    page = report.write(trained).read_text()
    for words in ("Loss of the generator", "Gradient norm of the fake score", "Seconds a step"):
        assert words in page
    assert "Samples on the way" in page and "r is the share of softmax" not in page
    assert f"{STEPS} updates" in page and " s each (the median)" in page


def test_a_first_step_that_stays_at_the_mean_is_told(tmp_path, caplog):
    def told(first):
        lines = [{"step": i, "exit_step": i % 4, "sample_deviation": 0.4} for i in range(4)]
        deviations = (first, 1.05, 1.0, 1.1)
        lines += [
            {"step": 4 + i, "exit_step": i, "sample_deviation": deviations[i]} for i in range(4)
        ]
        text = "\n".join(map(json.dumps, lines))
        (tmp_path / "metrics.jsonl").write_text(text + "\n")
        caplog.clear()
        monitoring.warn_of_a_flat_first_step(tmp_path)
        return caplog.text

    assert "standard deviation of 0.45, those of later steps 1.05" in told(0.45)
    assert told(0.9) == ""


def test_interrupted_and_resumed_equals_undisturbed(config, trained, tmp_path, monkeypatch):
    write = loop.MetricsFile.write

    def killed(self, step, values):
        if step == 6:
            raise RuntimeError("killed")
        write(self, step, values)

    monkeypatch.setattr(loop.MetricsFile, "write", killed)
    with pytest.raises(RuntimeError, match="killed"):
        distill.run(config, tmp_path)
    assert not (tmp_path / "final").exists()
    monkeypatch.setattr(loop.MetricsFile, "write", write)
    states = []
    run = loop.run
    monkeypatch.setattr(
        loop, "run", lambda *args, **named: (states.append(run(*args, **named)), states[-1])[1]
    )
    distill.run(config, tmp_path)
    distill.run(config, trained)  # a finished run restores its last state
    resumed, undisturbed = states
    assert set(resumed) == {"params", "optimizer", "ema", "fake", "r", "mode"}
    jax.tree.map(np.testing.assert_array_equal, resumed, undisturbed)


def parts(config, student, teacher, **recipe):
    """(recipe, state, texts, knobs) of a run."""
    settings = distill.few_step_sampling(teacher.sampling, config.distill)
    sizes, params, r, mode = distill.first_state(student, config)
    shape = Pipeline(teacher).latent_shape(settings)
    made = distill.recipe_of(config, sizes, teacher.wan_config, teacher.sampling, shape)
    made = dataclasses.replace(made, **recipe)
    state = distill_training.initial_state(made, params, teacher.transformer, r, mode)
    texts = distill.Prompts(config.prompts, Pipeline(teacher), "", made.batch_size)
    texts = texts.draw(0, 0, np.arange(made.batch_size))
    return made, state, texts, distill.knobs_at(config, 0, 2.0, 1.0)


def test_each_update_moves_its_own_network_alone(config, ours, linear):
    """That no gradient reaches the others is in test_distillation.py."""
    teacher, student = checkpoints.load(ours), checkpoints.load(linear)
    recipe, given, texts, knobs = parts(config, student, teacher)
    key, state = jax.random.key(3), jax.tree.map(np.array, given)

    def gone(tree):
        return {leaf.is_deleted() for leaf in jax.tree.leaves(tree)}

    after, _ = distill_training.update_fake_score(recipe, given, texts, knobs, key)
    assert gone(given) == {True} and gone((student.transformer, teacher.transformer)) == {False}
    for name in ("params", "optimizer", "ema", "r", "mode"):
        jax.tree.map(np.testing.assert_array_equal, after[name], state[name])
    given = jax.device_put(state, jax.devices()[0])
    after, metrics = distill_training.update_generator(
        recipe, given, teacher.transformer, texts, knobs, key
    )
    assert gone(given) == {True} and gone(teacher.transformer) == {False}
    for name in ("fake", "r", "mode"):
        jax.tree.map(np.testing.assert_array_equal, after[name], state[name])
    assert state["mode"].tolist() == [SOFTMAX, LINEAR] and metrics["gradient_norm"] > 0
    # (1 + 0) / (10 + 0) of a young average.
    np.testing.assert_allclose(
        after["ema"]["proj_out"]["kernel"],
        0.1 * state["ema"]["proj_out"]["kernel"] + 0.9 * after["params"]["proj_out"]["kernel"],
        rtol=1e-5,
        atol=1e-7,
    )


def test_the_start_regresses_the_first_step_on_the_teachers_samples(config, ours, linear):
    teacher, student = checkpoints.load(ours), checkpoints.load(linear)
    recipe, given, texts, knobs = parts(config, student, teacher)
    key, state = jax.random.key(5), jax.tree.map(np.array, given)
    noise = distill_training._drawn(recipe, knobs, key)[1].noise

    def x_0(params, sizes, guidance_scale, sigmas, **kinds):
        network = training.network(recipe, sizes, params, **kinds)
        halves = (texts.text, texts.lengths), (texts.negative_text, texts.negative_lengths)

        def velocity(x, t):
            t = jnp.full(len(x), t)
            cond, uncond = (network(x, t, *half) for half in halves)
            return uncond + guidance_scale * (cond - uncond)

        return solvers.sample(velocity, noise, np.asarray(sigmas), recipe.start_sampler)

    kinds = {"r": state["r"], "mode": state["mode"]}
    ours = x_0(student.transformer, recipe.student, 1.0, (recipe.sigmas[0], 0.0), **kinds)
    theirs = x_0(teacher.transformer, recipe.teacher, knobs.guidance_scale, recipe.start_sigmas)
    assert len(recipe.start_sigmas) == 3 and recipe.start_sampler == "unipc"
    after, metrics = distill_training.update_start(
        recipe, given, teacher.transformer, texts, knobs, key
    )
    expected = np.mean(np.square(np.asarray(ours) - np.asarray(theirs)))
    np.testing.assert_allclose(metrics["regression"], expected, rtol=1e-4)
    for name in ("fake", "r", "mode"):
        jax.tree.map(np.testing.assert_array_equal, after[name], state[name])
    moved = after["params"]["proj_out"]["kernel"] - state["params"]["proj_out"]["kernel"]
    assert 0 < float(jnp.abs(moved).max()) < 2 * knobs.generator_rate  # Adam's first step
    averaged = after["ema"]["proj_out"]["kernel"] - state["ema"]["proj_out"]["kernel"]
    np.testing.assert_allclose(averaged, 0.9 * moved, rtol=1e-3, atol=1e-7)


def test_parts_of_a_batch_move_both_networks_as_the_whole(config, ours, linear):
    teacher, student = checkpoints.load(ours), checkpoints.load(linear)

    def moved(accumulate):
        recipe, state, texts, knobs = parts(config, student, teacher, accumulate=accumulate)
        state = jax.device_put(state, jax.devices()[0])
        key = jax.random.key(4)
        state, told = distill_training.update_generator(
            recipe, state, teacher.transformer, texts, knobs, key
        )
        state, more = distill_training.update_fake_score(recipe, state, texts, knobs, key)
        return state, told | more

    (whole, told), (in_parts, again) = moved(1), moved(2)
    for name in ("generator_loss", "loss", "gradient_norm", "fake_gradient_norm", "exit_step"):
        np.testing.assert_allclose(again[name], told[name], rtol=2e-5, err_msg=name)
    for network in ("optimizer", "fake"):
        moments = [jax.tree.leaves(one[network]) for one in (in_parts, whole)]
        for ours, theirs in zip(*moments, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)


def test_rates_and_the_averages_age_in_the_start_and_after(config):
    run = changed(config, start_steps=4, start_learning_rate=1e-4)
    knobs = [distill.knobs_at(run, step, 2.0, 0.5) for step in range(8)]
    assert [one.ema_age for one in knobs] == [0, 1, 2, 3, 4, 4, 5, 5]
    rates = [one.generator_rate for one in knobs]
    assert rates == pytest.approx([5e-5] * 4 + [5e-4] * 4)
    assert {one.fake_rate for one in knobs} == {5e-4}


def test_a_distilled_model_needs_no_flags(trained, tmp_path, capsys):
    words = [f"--checkpoint={trained / 'final'}", f"--out={tmp_path}", f"--prompt={PROMPTS[0]}"]
    assert sample.main(["sample.py", *words]) == 0
    assert sample.main(["sample.py", *words]) == 0, capsys.readouterr().err
    made = json.loads((tmp_path / "manifest.json").read_text())["settings"]
    assert (made["sampler"], made["num_inference_steps"], made["guidance_scale"]) == (
        "renoise",
        4,
        1.0,
    )
    assert made["denoising_steps"] == [1000, 750, 500, 250] and made["flow_shift"] == 3.0
    assert sample.main(["sample.py", *words, "--denoising_steps=1,x"]) == 2
    assert "is no list of numbers: write --denoising_steps=1000,750" in capsys.readouterr().err
    assert sample.main(["sample.py", *words, "--denoising_steps=250,500"]) == 2
    assert "denoising_steps is 250, 500: give timesteps that fall" in capsys.readouterr().err
    assert sample.main(["sample.py", *words, "--denoising_steps=1000,500", "--sampler=unipc"]) == 2
    assert "goes with the samplers renoise and euler, not with unipc" in capsys.readouterr().err


def test_fresh_noise_is_each_videos_own(trained):
    checkpoint = checkpoints.load(trained / "final")
    pipeline, settings = Pipeline(checkpoint), Settings.of(checkpoint)
    first = pipeline.latents(PROMPTS[:2], [7, 9], settings, 1)
    other_order = pipeline.latents(PROMPTS[1::-1], [9, 7], settings, 1)
    np.testing.assert_array_equal(first, other_order[::-1])
    assert np.abs(pipeline.latents(PROMPTS[:1], [8], settings, 1)[0] - first[0]).max() > 0.1


def test_export_and_import_keep_how_it_is_sampled(trained, tmp_path):
    words = [f"--checkpoint={trained / 'final'}", f"--out={tmp_path / 'out'}"]
    assert to_torch.main(["to_torch.py", *words]) == 0
    scheduler = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
    assert (scheduler["solver_order"], scheduler["flow_shift"]) == (1, 3.0)
    assert scheduler["disable_corrector"] == [0, 1, 2, 3]
    assert "denoising_steps: 1000, 750, 500, 250" in (tmp_path / "out/README.md").read_text()
    words = [f"--source={tmp_path / 'out'}", f"--out={tmp_path / 'back'}"]
    assert from_torch.main(["from_torch.py", *words]) == 0
    kept = checkpoints.load(trained / "final").sampling
    for folder in ("out", "back"):
        loaded = checkpoints.load(tmp_path / folder, ("transformer",))
        assert Settings.of(loaded) == Settings(**kept) and loaded.linear_layers == (1,)


def test_a_dense_model_is_distilled_too(config, ours, tmp_path, monkeypatch):
    """Traced, with remat, and not compiled."""
    run = changed(config, checkpoint=str(ours), require_selection=False, num_steps=4)
    run.distill.update(sampler="euler", warp_steps=False, denoising_steps=(1000.0, 500.0))
    run.distill.update(remat="products", sample_every=0)
    traced = []

    def traced_only(update):
        def call(recipe, state, *arguments):
            new, metrics = jax.eval_shape(partial(update, recipe), state, *arguments)
            same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, new, state)
            assert jax.tree.all(same) and all(m.shape == () for m in metrics.values())
            traced.append(update.__name__)
            return state, {name: jnp.ones(()) for name in metrics}

        return call

    for name in ("update_start", "update_generator", "update_fake_score"):
        update = getattr(distill_training, name)
        monkeypatch.setattr(distill_training, name, traced_only(update))
    distill.run(run, tmp_path)
    start, generator, fake = "update_start", "update_generator", "update_fake_score"
    assert traced == [start, fake, start, fake, fake, generator, fake]
    final = checkpoints.load(tmp_path / "final")
    assert final.linear_layers == () and final.wan_config.feature_map is None
    assert final.sampling["denoising_steps"] == [1000, 500]
    assert (final.sampling["sampler"], final.sampling["flow_shift"]) == ("euler", 1.0)


def test_one_stage_chooses_layers_while_it_distils(config, ours, tmp_path, monkeypatch):
    monkeypatch.setattr(
        distill_training, "update_fake_score", lambda recipe, state, *rest: (state, {"loss": 1.0})
    )
    run = changed(config, checkpoint=str(ours), one_stage=True, round_at=4, num_steps=6)
    run.distill.start_steps = 0
    run.transfer.update(target=1, r_learning_rate=0.05, lambda_=1.0)
    run.distill.sample_every = 0
    distill.run(run, tmp_path)
    lines = loop.read_metrics(tmp_path / "state" / "distill")
    assert lines[0]["r"] == pytest.approx([0.9, 0.9]) and max(lines[1]["r"]) < 0.9
    assert set(lines[2]["r"]) == {0.0, 1.0}
    layers = checkpoints.load(tmp_path / "final").linear_layers
    assert len(layers) == 1
    assert json.loads((tmp_path / "selection.json").read_text())["layers"] == list(layers)
    start = distill.first_state(checkpoints.load(ours), run)
    assert start[3].tolist() == [MIX, MIX] and start[2].tolist() == pytest.approx([0.9, 0.9])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"checkpoint": "TEACHER"}, "has no linear layers: give what the transfer stage made"),
        ({"teacher": "LINEAR"}, "has linear layers: name the model it came from"),
        ({"teacher": ""}, "teacher is empty: name the folder"),
        ({"fake_score": "LINEAR"}, "distill.fake_score, .* has linear layers"),
        ({"fake_score": "OTHER"}, "distill.fake_score, .* has other sizes than the teacher"),
        ({"teacher": "FAMILY"}, "has in_channels 4, the teacher .* 6: choose two models of one"),
        ({"denoising_steps": (1000.0, 250.0, 500.0)}, "is 1000, 250, 500: give timesteps that"),
        ({"denoising_steps": ()}, "denoising_steps is empty: give timesteps"),
        ({"denoising_steps": (1200.0, 500.0)}, "fall from at most 1000 to above 0"),
        ({"sampler": "unipc"}, "distill.sampler is 'unipc': choose one of renoise, euler"),
        ({"guidance_convention": "none"}, "choose one of standard, from_conditional"),
        ({"log_every": 3}, "log_every is 3: choose a multiple of generator_every, 2"),
        ({"start_steps": 3}, "start_steps is 3: choose 0, or a multiple of generator_every, 2"),
        ({"start_steps": STEPS}, "start_steps is 8: choose 0, or a multiple"),
        ({"batch_size": 0}, "distill.batch_size is 0: choose 1 or more"),
        ({"accumulate": 3}, "distill.accumulate is 3: choose a divisor of distill.batch_size, 2"),
        ({"one_stage": True}, "has linear layers already, and distill.one_stage chooses them"),
        ({"one_stage": True, "round_at": 99}, "distill.round_at is 99: choose a step above start_"),
        (
            {"one_stage": True, "round_at": 2},
            "distill.round_at is 2: choose a step above start_steps",
        ),
        ({"start_sampling_steps": 0}, "distill.start_sampling_steps is 0: choose 1 or more"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_made(
    config, ours, linear, others, tmp_path, values, message
):
    folders = {"TEACHER": str(ours), "LINEAR": linear, **others}
    values = {name: folders.get(value, value) if isinstance(value, str) else value
              for name, value in values.items()}  # fmt: skip
    with pytest.raises(UserError, match=message):
        distill.run(changed(config, **({"round_at": 4} | values)), tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def others(ours, tmp_path_factory):
    """Models of other sizes: another feed-forward width, another number of latent channels."""
    whole, folder = checkpoints.load(ours), tmp_path_factory.mktemp("others")
    found = {}
    for name, change in (("OTHER", {"ffn_dim": 16}), ("FAMILY", {"in_channels": 6})):
        sizes = dataclasses.replace(whole.wan_config, **change)
        wanted = shapes(WanTransformer, sizes)
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), wanted)
        made = checkpoints.make_config(sizes, whole.vae_config, whole.umt5_config)
        found[name] = save_like(whole, folder / name, config=made, transformer=zeros)
    return found


def test_a_mesh_of_four_devices_trains_alike(tmp_path):
    """Weights and tokens shared: the same losses and gradients as on one device, in float32."""
    path = Path(__file__).with_name("distill_cases.py")
    words = [sys.executable, str(path), str(tmp_path / "out.json")]
    root = str(path.parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (single, _), (shared, lies) = json.loads((tmp_path / "out.json").read_text())
    assert lies, "the state is kept as the table of rules says"
    np.testing.assert_allclose(shared[0], single[0], rtol=2e-4)
    np.testing.assert_allclose(shared, single, rtol=2e-2)  # Adam's steps of dead weights are noise
