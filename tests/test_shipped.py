"""The shipped models: their sizes, diffusers' loading and sampling, what the classifier reads."""

import importlib.util
from functools import partial
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from linvideo_jax import checkpoints, pipeline
from linvideo_jax.data import captions, digits
from linvideo_jax.metrics import agreement, classifier, frechet
from linvideo_jax.models import module
from linvideo_jax.models.wan import WanTransformer

ASSETS = Path(__file__).parents[1] / "assets"
SHIPPED = ASSETS / "digits_classifier"
NUM_FRAMES = 25


@pytest.fixture(scope="module")
def shipped():
    return classifier.load(SHIPPED, "pixels")


@pytest.fixture(scope="module")
def clips():
    attributes = digits.sample_attributes(np.random.default_rng(7), 48, split="test")
    video = np.asarray(digits.render(attributes, jnp.asarray(digits.digit_images())))
    return attributes, video, digits.labels_of(attributes)


@pytest.mark.parametrize(
    "name, mebibytes",
    [
        ("wan_digits", 20),
        ("wan_digits_linear", 14),
        ("wan_digits_four_step", 14),
        ("digits_classifier", 2),
    ],
)
def test_shipped_folders_stay_small(name, mebibytes):
    sizes = [path.stat().st_size for path in (ASSETS / name).rglob("*") if path.is_file()]
    assert 0 < sum(sizes) <= mebibytes * 2**20


PROMPTS = ["a red 3 moves slowly straight right on a green background", "the blue seven"]


def error_beside_diffusers(pipe, checkpoint, prompts, steps, dtype=None) -> float:
    """Relative error of our latents: same prompts, same noise, trained weights, with guidance."""
    ours = pipeline.Pipeline(checkpoint, dtype)
    settings = pipeline.Settings.of(checkpoint, num_inference_steps=steps)
    seeds = list(range(len(prompts)))
    noise = pipeline.noise(seeds, ours.latent_shape(settings))
    theirs = pipe(
        prompts,
        height=96,
        width=96,
        num_frames=25,
        num_inference_steps=steps,
        guidance_scale=settings.guidance_scale,
        latents=torch.from_numpy(np.array(noise)).permute(0, 4, 1, 2, 3),
        output_type="latent",
    ).frames.permute(0, 2, 3, 4, 1)
    latents = np.asarray(ours.latents(prompts, seeds, settings, len(prompts)))
    return np.linalg.norm(latents - theirs.numpy()) / np.linalg.norm(latents)


@pytest.fixture(scope="module")
def pipe():
    loaded = diffusers.WanPipeline.from_pretrained(ASSETS / "wan_digits")
    loaded.to(torch.float32).set_progress_bar_config(disable=True)
    return loaded


def test_diffusers_loads_the_shipped_model_without_a_warning(no_warning):
    with no_warning():
        diffusers.WanTransformer3DModel.from_pretrained(ASSETS / "wan_digits/transformer")
        diffusers.WanTransformer3DModel.from_pretrained(ASSETS / "wan_digits_linear/transformer")
        diffusers.AutoencoderKLWan.from_pretrained(ASSETS / "wan_digits/vae")


def test_diffusers_samples_the_shipped_model_as_we_do(pipe):
    checkpoint = checkpoints.load(ASSETS / "wan_digits")
    assert error_beside_diffusers(pipe, checkpoint, PROMPTS, 2) < 1e-4


def test_diffusers_samples_the_shipped_student_as_we_do(pipe):
    """With the processor that lies beside it, as its model card says."""
    folder = ASSETS / "wan_digits_linear"
    student = checkpoints.load(folder)
    transformer = diffusers.WanTransformer3DModel.from_pretrained(folder / "transformer")
    linear = diffusers.WanPipeline(**{**pipe.components, "transformer": transformer})
    linear.set_progress_bar_config(disable=True)
    spec = importlib.util.spec_from_file_location("shipped", folder / "linvideo_processor.py")
    processor = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(processor)
    maps = str(folder / "linvideo.safetensors")
    assert processor.use_linear_layers(transformer, maps) == list(student.linear_layers)
    assert error_beside_diffusers(linear, student, PROMPTS[:1], 2) < 1e-3


def test_bfloat16_stays_within_its_bound():
    """What accelerators compute in by default, trained weights.

    The student has layers of both kinds.
    """
    checkpoint = checkpoints.load(ASSETS / "wan_digits_linear")
    exact, rounded = (pipeline.Pipeline(checkpoint, d) for d in (jnp.float32, jnp.bfloat16))
    (text, lengths), (low, _) = (p.encode_prompts(PROMPTS) for p in (exact, rounded))

    @partial(jax.jit, static_argnames="dtype")
    def velocity(params, dtype):
        model = module.bind(WanTransformer, checkpoint.wan_config, params)
        time = jnp.array([990.0, 100.0])
        return model(latents, time, text, lengths, mode=exact.mode, dtype=dtype)

    latents = pipeline.noise([0, 1], exact.latent_shape(pipeline.Settings.of(checkpoint)))
    u = [velocity(checkpoint.transformer, dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    for value, wanted in ((low, text), (u[1], u[0])):
        error = jnp.linalg.norm(value - wanted) / jnp.linalg.norm(wanted)
        assert 0 < error < pipeline.BFLOAT16_BOUND
    # Latents as the sampler leaves them are what the decoder was trained on.
    made = exact.latents(
        PROMPTS[:1], [0], pipeline.Settings.of(checkpoint, num_inference_steps=4), 1
    )
    clip, rough = (p.decode(made).astype(np.float32) / 127.5 for p in (exact, rounded))
    assert pipeline.VAE_PSNR_BOUND < 10 * np.log10(4 / np.mean(np.square(clip - rough))) < 100


@pytest.mark.parametrize("name", ["wan_digits_linear", "wan_digits_four_step"])
def test_shipped_students_have_half_of_the_layers_linear(name):
    student = checkpoints.load(ASSETS / name, ("transformer",))
    assert len(student.linear_layers) == student.wan_config.num_layers // 2


@pytest.mark.parametrize("name", ["wan_digits_linear", "wan_digits_four_step"])
def test_shipped_processors_are_the_converters(name):
    """Each folder has its own, so that it can be copied alone."""
    ours = (ASSETS.parent / "convert" / "linvideo_processor.py").read_text()
    assert (ASSETS / name / "linvideo_processor.py").read_text() == ours


def test_four_steps_show_what_the_prompts_say():
    """As its config.json says, without a flag; 6 of 8, where docs/results.md has 95%."""
    model = checkpoints.load(ASSETS / "wan_digits_four_step")
    settings = pipeline.Settings.of(model)
    assert (settings.num_inference_steps, settings.guidance_scale) == (4, 1.0)
    prompts = (ASSETS / "prompts_digits_test.txt").read_text().splitlines()[:8]
    latents = pipeline.Pipeline(model, jnp.float32).latents(prompts, list(range(8)), settings, 8)
    read = classifier.load(SHIPPED, "latents").read(np.asarray(latents)).labels
    said = captions.stack([captions.labels(prompt) for prompt in prompts])
    assert agreement.agree(said, read)["all"].sum() >= 6


def share_right(shipped, video, said):
    return agreement.rates(agreement.agree(said, shipped.read(video).labels))


def test_shipped_reads_held_out_clips(shipped, clips):
    _, video, said = clips
    assert share_right(shipped, video, said)["all"] >= 0.93
    sentences = captions.captions(clips[0], np.random.default_rng(0))
    read = captions.stack([captions.labels(s) for s in sentences])
    assert share_right(shipped, video, read)["all"] >= 0.93


def test_shipped_ranks_corrupted_clips_below(shipped, clips):
    attributes, video, said = clips
    rng = np.random.default_rng(0)
    clean = shipped.read(video)
    rows = rng.choice(np.concatenate(digits.image_rows("test")), (len(video), 2, NUM_FRAMES))
    paths = digits.paths(attributes, NUM_FRAMES)
    changing, _ = digits.draw(attributes, jnp.asarray(digits.digit_images()[rows]), paths)
    corrupted = {
        "noise": (video + 0.5 * rng.normal(size=video.shape)).astype(np.float32),
        "frozen": np.repeat(video[:, :1], NUM_FRAMES, 1),
        "shuffled": video[:, rng.permutation(NUM_FRAMES)],
        "changing": np.asarray(changing),
    }
    half = len(video) // 2
    apart = frechet.frechet_distance(clean.features[:half], clean.features[half:])
    for name, worse in corrupted.items():
        seen = shipped.read(worse)
        assert agreement.agree(said, seen.labels)["all"].mean() < 0.5, name
        assert frechet.frechet_distance(clean.features[:half], seen.features[half:]) > apart, name
    wrong = digits.Labels(*(np.roll(field, 1, axis=0) for field in said))
    assert agreement.agree(wrong, clean.labels)["all"].mean() < 0.1
