"""Where a model's arrays lie: the questions that the transformer asks, answered for one device.

The transformer knows nothing of meshes. `linvideo_jax/parallel/layout.py` answers the same
questions for tokens, batches and parameters that are shared between devices.
"""

from typing import Any

from jaxtyping import Array, Float

from kernels.linear_attention import FeatureMap, linear_attention
from kernels.softmax_attention import softmax_attention

Tokens = Float[Array, "batch tokens heads head_dim"]


class Layout:
    """All tokens and all parameters in one place."""

    def for_tokens(self, tokens: int) -> "Layout":
        """The layout for videos of so many tokens."""
        return self

    def blocks(self, batch: int) -> int:
        """In how many blocks a batch of so many samples lies, one behind the other."""
        return 1

    def enter(self, x: Array, axis: int) -> Array:
        """From all tokens along `axis` to the layers' tokens: shared out, with pads at the end."""
        return x

    def leave(self, x: Float[Array, "batch tokens ..."]) -> Array:
        """From the layers' tokens back to all tokens."""
        return x

    def layer(self, params: Any) -> Any:
        """The parameters of one layer, whole, from the shards in which they are kept."""
        return params

    def features(self, x: Float[Array, "rows features"]) -> Array:
        """Few rows before a product with a large kernel: shared out as the kernel's inputs are."""
        return x

    def rows(self, x: Float[Array, "rows ..."]) -> Array:
        """Results of such products, back to where the batch is."""
        return x

    def keep(self, tree: Any) -> Any:
        """Parameters, or anything with their names, back to how they are kept."""
        return tree

    def softmax_attention(self, q: Tokens, k: Tokens, v: Tokens) -> Tokens:
        """Softmax attention of all tokens to all tokens; a pad is no key and gets zeros."""
        return softmax_attention(q, k, v)

    def linear_attention(self, q: Tokens, k: Tokens, v: Tokens, maps: FeatureMap) -> Tokens:
        """Linear attention of all tokens to all tokens; a pad is no key and gets zeros."""
        return linear_attention(q, k, v, maps)

    def cross_attention(
        self,
        q: Tokens,
        k: Float[Array, "batch text heads head_dim"],
        v: Float[Array, "batch text heads head_dim"],
        bias: Float[Array, "batch 1 1 text"] | None,
    ) -> Tokens:
        """Softmax attention of the tokens to the text, which every device has whole."""
        return softmax_attention(q, k, v, bias=bias)


WHOLE = Layout()
