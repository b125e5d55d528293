"""The feature maps of the paper's ablation beside Hedgehog, and attention with any of them.

All take the same projections as Hedgehog, `[heads, head_dim, features]`, and are plain JAX. With F
features of the projection a state holds, per head, that many numbers times head_dim:

| map | features | at Wan's head_dim 128 (F 64) | at wan-digits' 32 (F 16) |
|---|---|---|---|
| Hedgehog (`reference.hedgehog`) | 2 F | 128 | 32 |
| `relu` | 2 F | 128 | 32 |
| `taylor` | 1 + F + F^2 | 4,161 | 273 |

So Taylor's products with the state cost 33 times (9 times) as much as Hedgehog's.
`attention` picks one by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from kernels.linear_attention.interface import linear_attention
from kernels.linear_attention.reference import (
    apply_to_features,
    hedgehog,
    project,
    state_of_features,
)

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from kernels.linear_attention.types import FeatureMap


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


def attend(
    phi_q: Float[Array, "batch tokens heads features"],
    phi_k: Float[Array, "batch keys heads features"],
    v: Float[Array, "batch keys heads head_dim"],
) -> Float[Array, "batch tokens heads head_dim"]:
    """phi_q (phi_k^T v) / (phi_q sum phi_k) (LinVideo, eq. 5), sums and division in float32."""
    return apply_to_features(phi_q, state_of_features(phi_k, v)).astype(v.dtype)


FEATURES = {"hedgehog": hedgehog, "relu": relu, "taylor": taylor}


def attention(
    name: str,
    q: Float[Array, "batch tokens heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    feature_map: FeatureMap,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Linear attention with the features of this name; Hedgehog's alone have kernels."""
    if name == "hedgehog":
        return linear_attention(q, k, v, feature_map)
    features = FEATURES[name]
    return attend(features(q, feature_map.q), features(k, feature_map.k), v)
