"""Memory of one chip by a formula from shapes, for machines whose compiler is not here.

What both stages count alike; attention is without stored logits. Its constants were set by what
TPU's compiler needs for both Wan models (docs/pods.md).
"""

import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from linvideo_jax.metrics.step_flops import Size
from linvideo_jax.models.wan import WanConfig
from linvideo_jax.parallel import mesh as meshes

FLOAT32, BFLOAT16 = 4, 2


def held(tree: Any) -> int:
    """Bytes on one chip of a tree of ShapeDtypeStructs with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def tokens(mesh: Mesh | AbstractMesh, samples: int, size: Size) -> int:
    """Of one chip, of so many samples at a time on all chips."""
    return samples // meshes.batch_devices(mesh) * -(-size.tokens // mesh.shape["context"])


def layers(mesh: Mesh | AbstractMesh, config: WanConfig) -> int:
    """Two gathered layers, and the gradient of one."""
    shared = mesh.shape["fsdp"] * mesh.shape["context"] > 1
    return 3 * BFLOAT16 * (8 * config.dim**2 + 2 * config.dim * config.ffn_dim) * shared


def kept(config: WanConfig, tokens: int, remat: str) -> int:
    """What the backward pass keeps of every layer."""
    dim, ffn = config.dim, config.ffn_dim
    products = {"products": 7 * dim + ffn, "none": 20 * dim + 3 * ffn}.get(remat, 0)
    inputs = 0 if remat == "offload" else FLOAT32 * dim
    return config.num_layers * tokens * (inputs + BFLOAT16 * products)


def working(config: WanConfig, tokens: int, text_tokens: int) -> int:
    """One layer's own arrays in the backward pass: states and their gradients, the hidden layer of
    the feed-forward, the text's logits."""
    logits = config.num_attention_heads * text_tokens
    return tokens * (8 * FLOAT32 * config.dim + 4 * BFLOAT16 * config.ffn_dim + FLOAT32 * logits)
