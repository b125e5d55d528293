"""Optimisers by name, on parameter trees whose layers are stacked on their first axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, muon

# Of the transformer, then of the text encoder.
MATRICES = {"to_q", "to_k", "to_v", "to_out", "linear_1", "linear_2"}
MATRICES |= {"q", "k", "v", "o", "wi_0", "wi_1", "wo"}

OPTIMIZERS = ("muon", "adamw")


def warmup_cosine(learning_rate: float, num_steps: int, warmup_steps: int, end: float = 0.0):
    """Linear warm-up, then a cosine to `end * learning_rate` at `num_steps`."""
    return optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps, max(num_steps, warmup_steps + 1), end * learning_rate
    )


def _matrix_axes(params: Any) -> Any:
    """Muon's axes for the weight matrices of transformer blocks; None (Adam) for all else."""

    def axes(path, leaf):
        names = [str(getattr(key, "key", key)) for key in path]
        stacked_matrix = "blocks" in names and names[-1] == "kernel" and leaf.ndim == 3
        return MuonDimensionNumbers(1, 2) if stacked_matrix and names[-2] in MATRICES else None

    return jax.tree_util.tree_map_with_path(axes, params)


def muon_with_adam() -> optax.GradientTransformation:
    """Muon for the matrices of the blocks (one orthogonalisation a layer), Adam for the rest.

    Updates are scaled to Adam's root mean square (0.2), so that one rate suits both. The rate is 1:
    `apply` multiplies by that of the step, so one compilation serves runs of any length.
    """
    return muon(
        1.0,
        adam_b2=0.99,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_matrix_axes,
    )


def named(name: str) -> optax.GradientTransformation:
    """An optimiser of `OPTIMIZERS`, of rate 1, without its weight decay (`decay_of_matrices`).

    adamw: Adam with b1 = 0.9, b2 = 0.999, what PyTorch's AdamW and the training codes for Wan take.
    Both treat stacked layers one by one. Raises: ValueError for an unknown name.
    """
    match name:
        case "muon":
            return muon_with_adam()
        case "adamw":
            return optax.adam(1.0)
    raise ValueError(f"the optimiser is {name!r}: one of {', '.join(OPTIMIZERS)}")


def decay_of_matrices(weight_decay: float) -> optax.GradientTransformation:
    """AdamW's decoupled decay at rate 1, -weight_decay * p, of the kernels of linear layers.

    Biases, norms, modulation tables, embeddings and feature maps do not decay.
    """

    def matrices(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: getattr(path[-1], "key", None) == "kernel", params
        )

    return optax.add_decayed_weights(-weight_decay, matrices)


def moving_average(average: Any, params: Any, decay: jax.Array | float, age: jax.Array | int):
    """The average after an update that gave `params`; `age` updates were averaged before.

    The decay rises to its value with the age, (1 + age) / (10 + age), so that a young average
    forgets where it began.
    """
    decay = jnp.minimum(decay, (1.0 + age) / (10.0 + age))
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)


def mean_over_parts(function: Callable[[Any], Any], batch: Any, parts: int) -> Any:
    """The mean of `function` over `parts` equal parts of the batch, one after the other.

    For a gradient of a mean over samples that is the gradient of the whole batch, in the memory of
    a part. Part i has every `parts`-th sample from i on: of a batch that is spread over devices in
    blocks, each device then keeps its own. Leaves of `batch` are [batch, ...].
    """
    if parts == 1:
        return function(batch)

    def split(leaf):
        return jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0)

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(part)), None

    batch = jax.tree.map(split, batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda leaf: leaf[0], batch))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, batch)
    return jax.tree.map(lambda leaf: leaf / parts, total)


def apply(params: Any, changes: Any, learning_rate: jax.Array | float) -> Any:
    """params + learning_rate * changes, where the changes are those of an optimiser of rate 1."""
    return jax.tree.map(lambda p, c: p + learning_rate * c, params, changes)
