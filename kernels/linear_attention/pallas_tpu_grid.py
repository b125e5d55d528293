"""How a TPU kernel runs over tokens: a grid of tiles, each in chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

LANES = 128  # numbers in a row of a register


@dataclass(frozen=True)
class TileConfig:
    """Tokens, multiples of 16, of bfloat16 rows of 128 numbers; longer rows take fewer.

    A tile is what is copied into VMEM at once, a chunk what is computed at once: large tiles make
    few steps, small chunks few instructions and temporaries.
    """

    tile: int = 4096
    chunk: int = 512

    def __post_init__(self):
        if self.chunk <= 0 or self.chunk % 16:
            raise ValueError(f"chunk of {self.chunk} tokens: needs a multiple of 16")
        if self.tile <= 0 or self.tile % self.chunk:
            raise ValueError(
                f"tile of {self.tile} tokens: needs a multiple of the chunk, {self.chunk}"
            )


class Block(NamedTuple):
    """An array, or shape of an output, and what a kernel sees of it at a point of the grid."""

    array: jax.Array | jax.ShapeDtypeStruct
    spec: pl.BlockSpec
    has_tokens: bool


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
    group: int
    tile: int
    chunk: int

    @classmethod
    def of(cls, x: Float[Array, "batch tokens heads head_dim"], config: TileConfig) -> Grid:
        batch, length, heads, head_dim = x.shape
        group = min(heads, max(1, LANES // head_dim))
        row = max(1, group * head_dim * x.dtype.itemsize // (2 * LANES))
        chunk = min(_up(config.chunk // row, 16), _up(length, 16))
        tile = min(_up(config.tile // row, chunk), _up(length, chunk))
        return cls(batch, length, heads, head_dim, group, tile, chunk)

    def tokens(self, x: Float[Array, "batch tokens heads head_dim"]) -> Block:
        """Tokens of a group of heads, side by side: a kernel sees `[chunk, group * head_dim]`."""
        return self._tokens(x.reshape(self._flat_shape()))

    def new_tokens(self, dtype: jnp.dtype) -> Block:
        """An output like `tokens`; its array is `[batch, tokens, heads * head_dim]`."""
        return self._tokens(jax.ShapeDtypeStruct(self._flat_shape(), dtype))

    def matrices(self, x: Float[Array, "heads rows columns"]) -> Block:
        """A matrix a head, the same for the whole batch: `[group, rows, columns]`."""
        spec = pl.BlockSpec((self.group, *x.shape[1:]), lambda b, g, t, *_: (g, 0, 0))
        return Block(x, spec, has_tokens=False)

    def sums(self, x: Float[Array, "batch heads rows columns"]) -> Block:
        """A matrix a head: `[group, rows, columns]`."""
        shape = (None, self.group, *x.shape[2:])
        return Block(x, pl.BlockSpec(shape, lambda b, g, t, *_: (b, g, 0, 0)), has_tokens=False)

    def new_sums(self, rows: int, columns: int) -> Block:
        """A float32 output like `sums`: starts as zero, is in VMEM until all tokens were seen."""
        shape = (self.batch, self.heads, rows, columns)
        return self.sums(jax.ShapeDtypeStruct(shape, jnp.float32))

    def full_lengths(self) -> Int32[Array, " batch"]:
        return jnp.full(self.batch, self.length, jnp.int32)

    def run(
        self,
        body: Callable[..., None],
        lengths: Int32[Array, " batch"],
        inputs: Sequence[Block],
        outputs: Sequence[Block],
    ) -> list[jax.Array]:
        """The outputs of `body(valid, *inputs, *outputs)`, called on each chunk.

        `valid`: which of its tokens are among the first `lengths[b]`, `[chunk, 1]`.
        """
        return pl.pallas_call(
            self._kernel(body, inputs, outputs),
            name=body.__name__,
            out_shape=[block.array for block in outputs],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(
                    self.batch,
                    pl.cdiv(self.heads, self.group),
                    pl.cdiv(self.length, self.tile),
                ),
                in_specs=[block.spec for block in inputs],
                out_specs=[block.spec for block in outputs],
            ),
            # Sums add up along the last axis, in order.
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary")
            ),
        )(lengths, *(block.array for block in inputs))

    def _kernel(
        self, body: Callable[..., None], inputs: Sequence[Block], outputs: Sequence[Block]
    ) -> Callable[..., None]:
        def kernel(lengths, *refs):
            tile = pl.program_id(2)
            end = lengths[pl.program_id(0)] - tile * self.tile

            @pl.when(tile == 0)
            def _():
                for ref, block in zip(refs[len(inputs) :], outputs, strict=True):
                    if not block.has_tokens:
                        ref[...] = jnp.zeros(ref.shape, ref.dtype)

            @pl.loop(0, self.tile // self.chunk)
            def _(i):
                start = pl.multiple_of(i * self.chunk, self.chunk)
                row = jax.lax.broadcasted_iota(jnp.int32, (self.chunk, 1), 0)
                rows = pl.ds(start, self.chunk)
                seen = zip(refs, (*inputs, *outputs), strict=True)
                body(start + row < end, *(r.at[rows] if b.has_tokens else r for r, b in seen))

        return kernel

    def _flat_shape(self) -> tuple[int, int, int]:
        return self.batch, self.length, self.heads * self.head_dim

    def _tokens(self, array: jax.Array | jax.ShapeDtypeStruct) -> Block:
        shape = (None, self.tile, self.group * self.head_dim)
        return Block(array, pl.BlockSpec(shape, lambda b, g, t, *_: (b, t, g)), has_tokens=True)


def _up(x: int, multiple: int) -> int:
    return max(1, pl.cdiv(x, multiple)) * multiple
