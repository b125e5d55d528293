"""How a GPU kernel runs over tokens: programs of one head and one span of tokens, tile by tile."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.linear_attention.gpu_tiles import Tiles, padded_features

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32

_interpreting = contextvars.ContextVar("interpreting", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """GPU kernels traced inside are interpreted, on any platform."""
    token = _interpreting.set(True)
    try:
        yield
    finally:
        _interpreting.reset(token)


class Grid(NamedTuple):
    """(heads, spans of tokens, batch), heads fastest: programs that run together read whole rows.

    The last tile may be in part past the last token, the last span's tiles wholly: masks leave
    them out.
    """

    batch: int
    length: int
    heads: int
    head_dim: int
    features: int
    used: int
    tiles: Tiles
    steps: int  # tiles of a span
    spans: int

    @classmethod
    def of(
        cls, x: Float[Array, "batch tokens heads head_dim"], features: int, tiles: Tiles
    ) -> Grid:
        batch, length, heads, head_dim = x.shape
        count = pl.cdiv(length, tiles.tokens)
        steps = pl.cdiv(count, max(1, tiles.programs // (batch * heads)))
        spans = pl.cdiv(count, steps)
        padded = padded_features(features)
        return cls(batch, length, heads, head_dim, padded, features, tiles, steps, spans)

    def new_tokens(self, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        """An output like the arrays of tokens."""
        return jax.ShapeDtypeStruct((self.batch, self.length, self.heads, self.head_dim), dtype)

    def new_numbers(self) -> jax.ShapeDtypeStruct:
        """An output of one float32 a token and head, `[batch, heads, tokens]`."""
        return jax.ShapeDtypeStruct((self.batch, self.heads, self.length), jnp.float32)

    def run(
        self,
        body: Callable[..., Sequence[Array]],
        tokens: Sequence[Array],
        constants: Sequence[Array],
        made: Sequence[jax.ShapeDtypeStruct] = (),
        sums: Sequence[tuple[int, ...]] = (),
        lengths: Int32[Array, " batch"] | None = None,
    ) -> list[Array]:
        """What `body` makes of each tile of tokens, and its sums over all tokens.

        tokens: `[batch, tokens, heads, head_dim]` or, numbers, `[batch, heads, tokens]`.
        constants: a matrix or vector a head, `[batch or 1, heads, ...]`.
        made: outputs, `new_tokens` or `new_numbers`.
        sums: shapes of a head's; they come as `[batch, spans, heads, ...]`, float32, a part from
        each program: no atomics, so that adding them up gives the same bits each time.
        lengths: how many tokens count in each batch entry; None for all.
        """
        parts = [
            jax.ShapeDtypeStruct((self.batch, self.spans, self.heads, *shape), jnp.float32)
            for shape in sums
        ]
        operands = [*tokens, *constants, *([] if lengths is None else [lengths])]
        kernel = self._kernel(body, len(tokens), constants, lengths is not None, len(made), sums)
        return pl.pallas_call(
            kernel,
            name=body.__name__,
            out_shape=[*made, *parts],
            grid=(self.heads, self.spans, self.batch),
            compiler_params=plgpu.CompilerParams(
                num_warps=self.tiles.num_warps, num_stages=self.tiles.num_stages
            ),
            interpret=_interpreting.get(),
        )(*operands)

    def _kernel(self, body, num_tokens, constants, has_lengths, num_made, sums):
        tile = self.tiles.tokens
        shared = [x.shape[0] == 1 for x in constants]

        def kernel(*refs):
            head, span, batch = (pl.program_id(i) for i in range(3))
            inputs = num_tokens + len(constants)
            token_refs, constant_refs = refs[:num_tokens], refs[num_tokens:inputs]
            outputs = refs[inputs + has_lengths :]
            end = plgpu.load(refs[inputs].at[batch]) if has_lengths else self.length
            fixed = [
                plgpu.load(ref.at[jnp.int32(0) if one else batch, head])
                for ref, one in zip(constant_refs, shared, strict=True)
            ]

            def step(i, totals):
                start = (span * self.steps + i) * tile
                row = start + jax.lax.broadcasted_iota(jnp.int32, (tile,), 0)

                def part(ref, limit):
                    """The tile in an array of tokens, and which of it is before `limit`."""
                    rows = pl.ds(start, tile)
                    if len(ref.shape) == 3:
                        return ref.at[batch, head, rows], row < limit
                    return ref.at[batch, rows, head, slice(None)], (row < limit)[:, None]

                def load(ref):
                    where, mask = part(ref, end)
                    return plgpu.load(where, mask=mask, other=0)

                def store(which, x):
                    where, mask = part(outputs[which], self.length)
                    plgpu.store(where, x.astype(where.dtype), mask=mask)

                seen = [load(ref) for ref in token_refs]
                return body((row < end)[:, None], store, seen, fixed, totals, self.used)

            zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in sums)
            totals = jax.lax.fori_loop(0, self.steps, step, zeros)
            for ref, total in zip(outputs[num_made:], totals, strict=True):
                plgpu.store(ref.at[batch, span, head], total)

        kernel.__name__ = body.__name__
        return kernel
