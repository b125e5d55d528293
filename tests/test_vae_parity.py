"""The VAE against diffusers' AutoencoderKLWan, float32, random weights, and against itself."""

import dataclasses
from functools import cache, partial

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from convert import keys
from linvideo_jax.errors import UserError
from linvideo_jax.models import module
from linvideo_jax.models.vae import VAEConfig, WanVAE, _decode_step, denormalize, normalize
from linvideo_jax.models.vae_layers import rms_norm

TINY = VAEConfig(base_dim=4, num_res_blocks=1)
OTHER = VAEConfig(
    base_dim=8,
    decoder_base_dim=4,
    z_dim=3,
    dim_mult=(1, 2, 2),
    num_res_blocks=2,
    temperal_downsample=(True, True),
    latents_mean=(0.1, -0.2, 0.3),
    latents_std=(1.0, 2.0, 0.5),
)
SMALLEST = VAEConfig(
    base_dim=4,
    z_dim=2,
    dim_mult=(1, 2),
    num_res_blocks=1,
    temperal_downsample=(True,),
    latents_mean=(0.0, 0.0),
    latents_std=(1.0, 1.0),
)
# Configuration, [frames, height, width], and whether in one pass as well: both are compiled once
# for every shape, the step by chunks once for every height and width.
CASES = [
    (TINY, (1, 16, 24), True),
    (TINY, (5, 16, 24), False),
    (TINY, (9, 16, 24), False),
    (TINY, (13, 16, 24), True),
    (OTHER, (9, 20, 12), True),
]


@cache
def diffusers_model(config: VAEConfig) -> diffusers.AutoencoderKLWan:
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan.from_config(config.to_dict()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Away from one and zero, so that no factor can hide.
            if "gamma" in name or "bias" in name:
                weight.add_(0.2 * torch.randn_like(weight))
    return model


def converted(config: VAEConfig, weights: dict[str, torch.Tensor]) -> module.Params:
    """Tensors under diffusers' names as our tree; each must be used."""
    shapes = module.shapes(WanVAE, config)
    flat = jax.tree_util.tree_flatten_with_path(shapes)[0]
    names = {path: ".".join(str(p.key) for p in path) for path, _ in flat}
    entries = keys.torch_entries("vae", {names[path]: leaf.shape for path, leaf in flat})
    assert entries.keys() == weights.keys()
    ours = {e.ours: e.transform.to_ours(weights[k].numpy()) for k, e in entries.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(ours[names[path]]), shapes)


@cache
def our_params(config: VAEConfig) -> module.Params:
    """The weights of `diffusers_model`."""
    return converted(config, diffusers_model(config).state_dict())


@partial(jax.jit, static_argnames=("config", "method", "dtype"))
def run(config, method, params, x, dtype=jnp.float32):
    return getattr(module.bind(WanVAE, config, params), method)(x, dtype)


def video(frames: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    shape = (2, frames, height, width, channels)
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def to_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def from_torch(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


def assert_close(ours, theirs, tolerance: float) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    np.testing.assert_array_less(np.abs(ours - theirs).max(), tolerance * np.abs(theirs).max())


@pytest.mark.parametrize(("config", "shape", "whole"), CASES)
def test_encode_equals_diffusers(config, shape, whole):
    x = video(*shape)
    with torch.no_grad():
        theirs = diffusers_model(config).encode(to_torch(x)).latent_dist
    ours = [module.bind(WanVAE, config, our_params(config)).encode_chunks(x)]
    ours += [run(config, "encode", our_params(config), x)] if whole else []
    for mean, logvar in ours:
        assert mean.dtype == logvar.dtype == jnp.float32
        assert_close(mean, from_torch(theirs.mean), 1e-5)
        assert_close(logvar, from_torch(theirs.logvar), 1e-5)


@pytest.mark.parametrize(("config", "shape", "whole"), CASES)
def test_decode_equals_diffusers(config, shape, whole):
    frames, height, width = shape
    factor = config.scale_factor_spatial
    z = video((frames - 1) // 4 + 1, height // factor, width // factor, config.z_dim)
    with torch.no_grad():
        theirs = from_torch(diffusers_model(config).decode(to_torch(z)).sample)
    ours = [module.bind(WanVAE, config, our_params(config)).decode_chunks(z)]
    ours += [jnp.clip(run(config, "decode", our_params(config), z), -1, 1)] if whole else []
    for decoded in ours:
        assert decoded.shape == (2, *shape, 3)
        assert_close(decoded, theirs, 1e-5)


def test_chunks_of_decode_are_compiled_twice_at_most():
    vae = module.bind(WanVAE, SMALLEST, our_params(SMALLEST))
    _decode_step.clear_cache()
    for frames in (4, 2, 1):
        vae.decode_chunks(video(frames, 4, 4, SMALLEST.z_dim))
    assert _decode_step._cache_size() == 2


def test_only_decode_by_chunks_clips():
    params = our_params(SMALLEST)
    vae = module.bind(WanVAE, SMALLEST, jax.tree.map(lambda leaf: leaf, params))
    vae.decoder.conv_out.bias[...] += 3.0
    z = video(2, 2, 2, SMALLEST.z_dim)
    assert vae.decode(z).max() > 1
    assert vae.decode_chunks(z).max() == 1


def test_normalization_is_that_of_the_published_statistics():
    z = video(2, 3, 3, 16)
    mean, std = np.array(TINY.latents_mean), np.array(TINY.latents_std)
    assert_close(normalize(z, TINY), (z - mean) / std, 1e-6)
    assert_close(denormalize(normalize(z, TINY), TINY), z, 1e-6)


@partial(jax.jit, static_argnames="dtype")
@jax.grad
def gradient(params, x, dtype):
    vae = module.bind(WanVAE, SMALLEST, params)
    mean, logvar = vae.encode(x, dtype)
    return jnp.mean(jnp.square(vae.decode(mean, dtype) - x)) + 1e-3 * jnp.mean(jnp.exp(logvar))


def test_gradient_equals_that_of_diffusers():
    x = 0.1 * video(9, 8, 12)
    model = diffusers_model(SMALLEST)
    posterior = model.encode(to_torch(x)).latent_dist
    # Their decode clamps, and has no gradient where it does: not here, as the assert makes sure.
    decoded = model.decode(posterior.mean).sample
    assert decoded.abs().max() < 1
    loss = (decoded - to_torch(x)).square().mean() + 1e-3 * posterior.logvar.exp().mean()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    theirs = converted(SMALLEST, dict(zip(parameters, gradients, strict=True)))
    ours = gradient(our_params(SMALLEST), x, jnp.float32)
    jax.tree.map(partial(assert_close, tolerance=1e-4), ours, theirs)


def test_bfloat16_is_near_float32_and_its_gradient_finite():
    params = our_params(SMALLEST)
    x = video(9, 8, 12)
    mean, _ = run(SMALLEST, "encode", params, x)
    low, _ = run(SMALLEST, "encode", params, x, jnp.bfloat16)
    assert low.dtype == jnp.float32
    assert_close(low, mean, 0.05)
    x[:, :, :4] = 0  # a blank region: a norm of zero must not divide
    for leaf in jax.tree.leaves(gradient(params, x, jnp.bfloat16)):
        assert leaf.dtype == jnp.float32
        assert jnp.isfinite(leaf).all()


def test_gradient_of_the_norm_of_zero_is_finite():
    slope = jax.grad(lambda x: rms_norm(x, jnp.ones(4)).sum())(jnp.zeros((1, 4)))
    assert jnp.isfinite(slope).all()


@pytest.mark.parametrize(
    ("shape", "words"), [((4, 16, 16), "frames"), ((5, 12, 16), "height"), ((5, 16, 20), "width")]
)
def test_videos_that_do_not_fit_are_refused(shape, words):
    vae = module.bind(WanVAE, TINY, our_params(TINY))
    for encode in (vae.encode, vae.encode_chunks):
        with pytest.raises(UserError, match=words):
            encode(video(*shape))


def test_config_is_that_of_diffusers():
    model = diffusers_model(OTHER)
    assert VAEConfig.from_dict(dict(model.config)) == OTHER
    assert VAEConfig.from_dict(OTHER.to_dict()) == OTHER
    with pytest.raises(UserError, match="is_residual"):
        VAEConfig.from_dict(OTHER.to_dict() | {"is_residual": True})
    with pytest.raises(UserError, match="wings"):
        VAEConfig.from_dict({"wings": 2})
    with pytest.raises(UserError, match="z_dim"):
        dataclasses.replace(OTHER, z_dim=4)


def test_random_parameters_have_the_tree_of_shapes():
    params = module.init(WanVAE, SMALLEST, seed=1)
    shapes = module.shapes(WanVAE, SMALLEST)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
