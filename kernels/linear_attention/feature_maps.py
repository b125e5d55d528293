"""Feature maps by name: Hedgehog, and those of the paper's ablation.

All take the same projections, `[heads, head_dim, features]`. With F features of the projection a
state holds, per head, that many numbers times head_dim:

| map | features | at Wan's head_dim 128 (F 64) | at wan-digits' 32 (F 16) |
|---|---|---|---|
| `hedgehog` | 2 F | 128 | 32 |
| `relu` | 2 F | 128 | 32 |
| `taylor` | 1 + F + F^2 | 4,161 | 273 |

So Taylor's products with the state cost 33 times (9 times) as much as Hedgehog's. Hedgehog alone
has kernels; the others are plain JAX.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from kernels.dispatch import einsum_float32

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def project(
    x: Float[Array, "batch tokens heads head_dim"],
    weight: Float[Array, "heads head_dim features"],
) -> Float[Array, "batch tokens heads features"]:
    """x W of every head, float32."""
    return einsum_float32("bthd,hdf->bthf", x, weight.astype(x.dtype))


def hedgehog(
    x: Float[Array, "batch tokens heads head_dim"],
    weight: Float[Array, "heads head_dim features"],
) -> Float[Array, "batch tokens heads double_features"]:
    """[softmax(x W), softmax(-x W)], in float32, rounded to x's dtype."""
    y = project(x, weight)
    features = jnp.concatenate([jax.nn.softmax(y), jax.nn.softmax(-y)], axis=-1)
    return features.astype(x.dtype)


def relu(
    x: Float[Array, "batch tokens heads head_dim"],
    weight: Float[Array, "heads head_dim features"],
) -> Float[Array, "batch tokens heads double_features"]:
    """[relu(x W), relu(-x W)], in float32, rounded to x's dtype."""
    y = project(x, weight)
    return jax.nn.relu(jnp.concatenate([y, -y], axis=-1)).astype(x.dtype)


def taylor(
    x: Float[Array, "batch tokens heads head_dim"],
    weight: Float[Array, "heads head_dim features"],
) -> Float[Array, "batch tokens heads expanded"]:
    """[1, y, y y^T / sqrt(2)] of y = x W: products are 1 + s + s^2 / 2, exp(s) to second order.

    s = y_q . y_k; the products are at least 1/2. Rounded to x's dtype.
    """
    y = project(x, weight)
    squares = (y[..., :, None] * y[..., None, :]).reshape(*y.shape[:-1], -1) / 2**0.5
    return jnp.concatenate([jnp.ones_like(y[..., :1]), y, squares], axis=-1).astype(x.dtype)


class Features(NamedTuple):
    """A map, and how many features it makes of a projection's."""

    of: Callable[[Array, Array], Array]
    count: Callable[[int], int]


FEATURES = {
    "hedgehog": Features(hedgehog, lambda features: 2 * features),
    "relu": Features(relu, lambda features: 2 * features),
    "taylor": Features(taylor, lambda features: 1 + features + features**2),
}
