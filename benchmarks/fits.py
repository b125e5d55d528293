"""What sampling takes of a GPU's memory, for each network and size, by the compiler: no GPU needed.

python benchmarks/fits.py --out=runs/fits.json

Text encoder, transformer and VAE take turns on the device, so the largest counts. Compiled for an
H100 as sample.py runs them: weights in bfloat16, guidance (two rows a forward), the VAE one latent
frame at a time. Arguments, results and temporary memory of the programs; to say whether a card
holds them, 0.6 GiB are added for what CUDA and the libraries keep. Needs JAX's CUDA plugin, no
driver (kernels/ahead_of_time.py). Each line is written when it is known, and kept by the next run.
"""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run by its path: the packages are in the folder above, not in this one
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp

from benchmarks import measure
from kernels.ahead_of_time import compile_for_gpu
from linvideo_jax import command_line, loop, pipeline, text
from linvideo_jax.flow import grids
from linvideo_jax.models import module, registry, vae
from linvideo_jax.models.umt5 import UMT5Encoder
from linvideo_jax.models.wan import TEXT_TOKENS, WanTransformer

FLAGS = {"out": (None, "JSON file of the figures")}
SIZES = {
    "1.3B, 480 x 832": (registry.wan2_1_t2v_1_3b, 480, 832),
    "14B, 480 x 832": (registry.wan2_1_t2v_14b, 480, 832),
    "14B, 720 x 1280": (registry.wan2_1_t2v_14b, 720, 1280),
}
FRAMES, DTYPE = 81, jnp.dtype(jnp.bfloat16)
CARDS = {"12 GB": 12.0, "24 GB": 24.0, "40 GB": 40.0, "80 GB": 79.6}  # GiB that they have
CONTEXT = 0.6  # GiB that CUDA and the libraries keep


def shape(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """Of an array."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def weights(network: type, config: Any, dtype: Any) -> Any:
    """Shapes of the parameters as `turns.Turns` leaves them on the device."""
    return jax.eval_shape(lambda: measure.random_params(network, config, dtype))


def text_encoder(models: registry.ModelSizes) -> int:
    """Bytes of encoding a prompt of the longest kind."""
    config = models.text_encoder

    def encode(params, ids, lengths):
        return module.bind(UMT5Encoder, config, params)(ids, lengths, dtype=DTYPE)

    rows = max(1, text.TOKENS_AT_ONCE // TEXT_TOKENS)
    ids, lengths = shape(rows, TEXT_TOKENS, dtype=jnp.int32), shape(rows, dtype=jnp.int32)
    return _bytes(encode, weights(UMT5Encoder, config, DTYPE), ids, lengths)


def transformer(models: registry.ModelSizes, height: int, width: int) -> int:
    """Bytes of the sampling loop with guidance."""
    config = models.transformer
    latents = pipeline.latent_shape(config, models.vae, height, width, FRAMES)
    loop = partial(
        pipeline.denoise,
        mode=None,
        config=config,
        sampler="unipc",
        sigmas=tuple(grids.sigma_grid(50, 5.0).tolist()),
        dtype=DTYPE,
    )
    inputs = (
        shape(1, *latents),
        shape(1, dtype=jnp.uint32),
        shape(2, TEXT_TOKENS, config.text_dim),
        shape(2, dtype=jnp.int32),
        shape(),
    )
    return _bytes(loop, weights(WanTransformer, config, DTYPE), *inputs)


def decoder(models: registry.ModelSizes, height: int, width: int) -> int:
    """Bytes of decoding one latent frame with what those before left, and of pixels that wait."""
    config = models.vae
    params = weights(vae.WanVAE, config, jnp.float32)
    latents = shape(1, 1, height // 8, width // 8, config.z_dim)
    step = partial(vae._pixels_step.__wrapped__, config, dtype=DTYPE)
    (_, past) = jax.eval_shape(partial(step, past=None), params, latents)
    waiting = vae.PIECES_AHEAD * config.scale_factor_temporal * height * width * 3
    return waiting + _bytes(lambda *inputs: step(*inputs), params, latents, past, donate_argnums=2)


def _bytes(function, *inputs, **options) -> int:
    return measure.program_bytes(compile_for_gpu(function, *inputs, **options))


def table(found: dict[str, dict[str, int]]) -> str:
    """GiB of each network, and the cards that hold the largest, as Markdown."""
    cards = " | ".join(CARDS)
    lines = [
        f"| 81 frames | text encoder | transformer | VAE | {cards} |",
        "|---|---|---|---|" + "---|" * len(CARDS),
    ]
    for name, parts in found.items():
        gib = {part: size / measure.GIB for part, size in parts.items()}
        fits = ("yes" if max(gib.values()) + CONTEXT <= x else "no" for x in CARDS.values())
        cells = (f"{gib[part]:.1f} GiB" for part in ("text encoder", "transformer", "VAE"))
        lines.append(f"| {name} | {' | '.join([*cells, *fits])} |")
    return "\n".join(lines)


def program(argv: Sequence[str]) -> None:
    """The benchmark; UserError for wrong input."""
    given = command_line.parse(command_line.define(FLAGS), argv, __doc__)
    command_line.required(given, "out")
    path = Path(given["out"])
    found = loop.read_json(path) if path.exists() else {}
    for name, (sizes, height, width) in SIZES.items():
        models, row = sizes(), found.setdefault(name, {})
        for part, size in (
            ("text encoder", partial(text_encoder, models)),
            ("transformer", partial(transformer, models, height, width)),
            ("VAE", partial(decoder, models, height, width)),
        ):
            if part not in row:
                print(f"{name}: {part}", flush=True)
                row[part] = size()
                loop.write_json(path, found)
    print(table(found))


def main(argv: Sequence[str]) -> int:
    """Runs `argv` (its own name first) and returns its exit code."""
    return command_line.run(program, argv, "the same command goes on with what lacks")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
