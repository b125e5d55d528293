"""Memory of one chip by a formula from shapes, for machines whose compiler is not here."""

from jax.sharding import Mesh

from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.plan.compiled import Held
from linvideo_jax.rehearsal import Problem
from linvideo_jax.transfer.recipe import Recipe

_FLOAT32, _BFLOAT16 = 4, 2


def estimate(recipe: Recipe, given: Problem, mesh: Mesh, held: Held) -> dict:
    """Bytes at the busiest moment, the backward pass, by name; attention without stored logits.

    held: once, for the new state is written over the old one (donated). gradients: float32, shared
    as the weights are. copies: both networks in the dtype of the products. layers: two gathered
    ones, and the gradient of one. kept: what the backward pass keeps of every layer. working: one
    layer's own arrays, whose count was set by what TPU's compiler needs for both Wan models
    (docs/pods.md).
    """
    config = recipe.student
    dim, ffn, layers = config.dim, config.ffn_dim, config.num_layers
    context = mesh.shape["context"]
    samples = recipe.batch_size // recipe.accumulate // meshes.batch_devices(mesh)
    tokens = samples * -(-given.size.tokens // context)
    layer = _BFLOAT16 * (8 * dim**2 + 2 * dim * ffn) * (mesh.shape["fsdp"] * context > 1)
    products = {"products": 7 * dim + ffn, "none": 20 * dim + 3 * ffn}.get(recipe.remat, 0)
    kept = 0 if recipe.remat == "offload" else _FLOAT32 * dim
    logits = config.num_attention_heads * given.size.text_tokens
    return {
        "held": held.total,
        "gradients": held.parameters,
        "copies": (held.parameters + held.teacher) // 2 if recipe.dtype.itemsize == 2 else 0,
        "layers": 3 * layer,
        "kept": layers * tokens * (kept + _BFLOAT16 * products),
        # States and their gradients; the hidden layer of the feed-forward; the text's logits.
        "working": tokens * (8 * _FLOAT32 * dim + 4 * _BFLOAT16 * ffn + _FLOAT32 * logits),
    }
