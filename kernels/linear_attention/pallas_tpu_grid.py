"""How arrays are cut into the blocks that a TPU kernel sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int, Int32

LANES = 128  # numbers in a row of a register

Block = tuple["jax.Array | jax.ShapeDtypeStruct", pl.BlockSpec]


class Grid(NamedTuple):
    """(batch, groups of heads, tiles of tokens), and the blocks of the arrays it runs over.

    Heads narrower than a register are taken in groups that fill one. The last group may be in
    part past the last head, and the last tile past the last token: what is read there is
    anything, and what is written there is dropped.
    """

    batch: int
    length: int
    heads: int
    head_dim: int
    tile: int
    group: int

    @classmethod
    def of(cls, x: Float[Array, "batch tokens heads head_dim"], tile: int) -> Grid:
        batch, length, heads, head_dim = x.shape
        group = min(heads, max(1, LANES // head_dim))
        return cls(batch, length, heads, head_dim, min(tile, pl.cdiv(length, 16) * 16), group)

    def tokens(self, x: Float[Array, "batch tokens heads head_dim"]) -> Block:
        """A tile of tokens of a group of heads, side by side."""
        return x.reshape(self._flat_shape()), self._token_spec()

    def new_tokens(self, dtype: jnp.dtype) -> Block:
        """An output like `tokens`; its array is `[batch, tokens, heads * head_dim]`."""
        return jax.ShapeDtypeStruct(self._flat_shape(), dtype), self._token_spec()

    def matrices(self, x: Float[Array, "heads rows columns"]) -> Block:
        """The whole matrix of each head of a group, the same for the whole batch."""
        spec = pl.BlockSpec((self.group, *x.shape[1:]), lambda b, g, t, *_: (g, 0, 0))
        return x, spec

    def sums(self, x: Float[Array, "batch heads rows columns"]) -> Block:
        """The whole matrix of each head of a group."""
        return x, self._sum_spec(*x.shape[2:])

    def new_sums(self, rows: int, columns: int) -> Block:
        """A float32 output like `sums`: stays in VMEM while the grid runs over the tokens."""
        shape = (self.batch, self.heads, rows, columns)
        return jax.ShapeDtypeStruct(shape, jnp.float32), self._sum_spec(rows, columns)

    def full_lengths(self) -> Int32[Array, "batch"]:
        return jnp.full(self.batch, self.length, jnp.int32)

    def run(
        self,
        kernel: Callable[..., None],
        lengths: Int[Array, "batch"],
        inputs: Sequence[Block],
        outputs: Sequence[Block],
    ) -> list[jax.Array]:
        """The outputs of `kernel(lengths, *inputs, *outputs)` over the grid."""
        return pl.pallas_call(
            kernel,
            name=kernel.__name__,
            out_shape=[array for array, _ in outputs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(
                    self.batch,
                    pl.cdiv(self.heads, self.group),
                    pl.cdiv(self.length, self.tile),
                ),
                in_specs=[spec for _, spec in inputs],
                out_specs=[spec for _, spec in outputs],
            ),
            # Sums add up along the last axis, in order.
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
        )(lengths, *(array for array, _ in inputs))

    def _flat_shape(self) -> tuple[int, int, int]:
        return self.batch, self.length, self.heads * self.head_dim

    def _token_spec(self) -> pl.BlockSpec:
        block = (1, self.tile, self.group * self.head_dim)
        return pl.BlockSpec(block, lambda b, g, t, *_: (b, t, g))

    def _sum_spec(self, rows: int, columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, self.group, rows, columns), lambda b, g, t, *_: (b, g, 0, 0))
