"""One forward of a Wan transformer of any size, ours and diffusers', with random weights."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from linvideo_jax import compiled_programs, pipeline
from linvideo_jax.flow import grids
from linvideo_jax.metrics import flops
from linvideo_jax.models.module import Params, bind
from linvideo_jax.models.wan import LINEAR, SOFTMAX, WanConfig, WanTransformer

TEXT_LENGTH = 120  # tokens of the prompt; the rest of Wan's 512 are pads


class Run(NamedTuple):
    """run() does one forward and returns when it is done; program: XLA's text of ours."""

    run: Callable[[], Any]
    peak_bytes: Callable[[], int]
    compile_seconds: float
    operations: int
    program: str = ""


@partial(compiled_programs.jit, static_argnames=("config", "dtype", "layout"))
def velocity(params, latents, time, text, mode, *, config, dtype, layout=None):
    """The network as a sampling loop calls it: text and time are embedded before."""
    model = bind(WanTransformer, config, params)
    return model(latents, time, text, None, mode=mode, dtype=dtype, layout=layout)


@partial(jax.jit, static_argnames=("config", "video_tokens", "dtype"))
def embedded(params, timestep, text, lengths, *, config, video_tokens, dtype):
    """What a sampling loop prepares: (time, text)."""
    model = bind(WanTransformer, config, params)
    words = model.embed_text(text, lengths, video_tokens=video_tokens, dtype=dtype)
    return model.embed_time(timestep), words


def sampling_loop(
    config: WanConfig,
    params: Params,
    shape: Sequence[int],
    lengths: Sequence[int],
    steps: int,
    dtype: Any,
    mode: np.ndarray | None = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of `pipeline.denoise` for one video of noise and random text, by place and by name.

    lengths: tokens of the prompt and, with guidance, of the negative one.
    """
    lengths = jnp.array(lengths)
    words = jax.random.normal(jax.random.key(0), (len(lengths), 160, config.text_dim))
    words = words * (jnp.arange(160) < lengths[:, None])[..., None]
    text = (words.astype(dtype), lengths)
    seeds = jnp.zeros(1, jnp.uint32)
    inputs = (params, pipeline.noise([0], shape), seeds, *text, jnp.float32(5.0), mode)
    sigmas = tuple(grids.sigma_grid(steps, 5.0).tolist())
    return inputs, {"config": config, "sampler": "unipc", "sigmas": sigmas, "dtype": dtype}


class Ours:
    """Our transformer with feature maps, its parameters on the device once for all sizes."""

    def __init__(self, config: WanConfig, dtype: Any, params: Params | None = None):
        self.config, self.dtype = replace(config, feature_map="hedgehog"), dtype
        self.params = params or measure.random_params(WanTransformer, self.config, dtype)

    def mode(self, linear_layers: Sequence[int]) -> np.ndarray:
        """The mode of each layer."""
        mode = np.full(self.config.num_layers, SOFTMAX, np.int32)
        mode[list(linear_layers)] = LINEAR
        return mode

    def inputs(self, shape: Sequence[int], batch: int = 1) -> tuple[Any, ...]:
        """(params, latents, time, text) of `velocity`, of latents `[batch, *shape]`."""
        latents = jax.random.normal(jax.random.key(1), (batch, *shape))
        words = jax.random.normal(jax.random.key(2), (batch, 160, self.config.text_dim))
        words = words * (jnp.arange(160) < TEXT_LENGTH)[:, None]
        prepared = embedded(
            self.params,
            jnp.full((batch,), 700.0),
            words,
            jnp.full((batch,), TEXT_LENGTH),
            video_tokens=flops.video_tokens(self.config, shape),
            config=self.config,
            dtype=self.dtype,
        )
        return self.params, latents, *prepared

    def forward(
        self, shape: Sequence[int], linear_layers: Sequence[int] | None, batch: int = 1
    ) -> Run:
        """Of latents `[batch, *shape]`; linear_layers None: a teacher, without run-time modes."""
        tokens = flops.video_tokens(self.config, shape)
        mode = None if linear_layers is None else self.mode(linear_layers)
        inputs = (*self.inputs(shape, batch), mode)
        start = time.perf_counter()
        compiled = velocity.lower(*inputs, config=self.config, dtype=self.dtype).compile()
        seconds = time.perf_counter() - start
        return Run(
            lambda: jax.block_until_ready(compiled(*inputs)),
            lambda: measure.program_bytes(compiled),
            seconds,
            batch * flops.forward(self.config, tokens, linear_layers or ()),
            compiled.as_text(),
        )


class Diffusers:
    """diffusers' transformer in bfloat16, what it keeps in float32 excepted.

    All its blocks share one block's weights, so that a 14B model fits beside ours. They are read
    anew for every layer, being far larger than a GPU's cache, and are counted for every layer in
    the memory.
    """

    def __init__(self, config: WanConfig):
        import diffusers
        import torch

        diffusers.logging.set_verbosity_error()
        self.config, self._torch = config, torch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(self.device):
                one = {**config.to_dict(), "num_layers": 1}
                self.model = diffusers.WanTransformer3DModel(**one).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        kept = self.model._keep_in_fp32_modules
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if any(part in name.split(".") for part in kept):
                    parameter.data = parameter.data.float()
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
        (block,) = self.model.blocks
        self.model.blocks = torch.nn.ModuleList([block] * config.num_layers)
        size = sum(parameter.nbytes for parameter in block.parameters())
        self.shared_bytes = (config.num_layers - 1) * size

    def forward(self, shape: Sequence[int], backend: str) -> Run:
        """Of one video; backend: one of diffusers' attention backends."""
        from diffusers.models.attention_dispatch import attention_backend

        torch, device = self._torch, self.device
        frames, height, width, channels = shape
        options = {"device": device, "dtype": torch.bfloat16}
        latents = torch.randn(1, channels, frames, height, width, **options)
        text = torch.randn(1, 512, self.config.text_dim, **options)
        text[:, TEXT_LENGTH:] = 0
        timestep = torch.full((1,), 700.0, device=device)
        peak = 0

        def run():
            nonlocal peak
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with torch.no_grad(), attention_backend(backend):
                self.model(latents, timestep, text, return_dict=False)
            if device == "cuda":
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated() + self.shared_bytes

        tokens = flops.video_tokens(self.config, shape)
        return Run(run, lambda: peak, 0.0, flops.forward(self.config, tokens))

    def backends(self) -> dict[str, str]:
        """Rows of the table, and diffusers' names."""
        if self.device == "cpu":
            return {"diffusers": "native"}
        return {
            "diffusers, FlashAttention": "_native_flash",
            "diffusers, cuDNN": "_native_cudnn",
        }
