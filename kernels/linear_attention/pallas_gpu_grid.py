"""How a GPU kernel runs over tokens: programs of one head and one span of tokens, tile by tile."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from kernels.linear_attention.gpu_tiles import Tiles, padded_features
from kernels.linear_attention.pallas_gpu_arithmetic import interpreting
from kernels.linear_attention.types import State

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Int32


# Numbers that a program of `add_up` makes, and how many parts of each it has in flight.
ADDED, LOADED = 512, 8


class Sum(NamedTuple):
    """A sum over tokens, `[count, *shape]` a head.

    columns: a program adds it up as so many equal columns; 0 as it is.
    """

    count: int
    shape: tuple[int, ...]
    columns: int = 0

    @property
    def accumulator(self) -> tuple[int, ...]:
        return (*self.shape, self.columns) if self.columns else self.shape


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
        body: Callable[..., Callable[..., Sequence[Array]]],
        tokens: Sequence[Array],
        weight: Float[Array, "heads head_dim features"],
        state: State | None = None,
        made: Sequence[jax.ShapeDtypeStruct] = (),
        sums: Sequence[Sum] = (),
        lengths: Int32[Array, " batch"] | None = None,
    ) -> list[Array]:
        """What `body` makes of each tile of tokens, and its sums over the tokens of each program.

        tokens: `[batch, tokens, heads, head_dim]` or, numbers, `[batch, heads, tokens]`.
        state: or its gradient, as the body wants.
        made: outputs, `new_tokens` or `new_numbers`.
        sums: they come as `[batch, spans, heads, count, *shape]`, float32, a part from each
        program: no atomics, so that adding them up gives the same bits each time.
        lengths: how many tokens count in each batch entry; None for all.
        """
        parts = [
            jax.ShapeDtypeStruct(
                (self.batch, self.spans, self.heads, x.count, *x.shape), jnp.float32
            )
            for x in sums
        ]
        constants = self._constants(weight, state)
        operands = [*tokens, *constants, *([] if lengths is None else [lengths])]
        kernel = self._kernel(
            body, len(tokens), state is not None, lengths is not None, len(made), sums
        )
        return pl.pallas_call(
            kernel,
            name=body.__name__,
            out_shape=[*made, *parts],
            grid=(self.heads, self.spans, self.batch),
            compiler_params=plgpu.CompilerParams(
                num_warps=self.tiles.num_warps, num_stages=self.tiles.num_stages
            ),
            interpret=interpreting.get(),
        )(*operands)

    def _kernel(self, body, num_tokens, has_state, has_lengths, num_made, sums):
        tile = self.tiles.tokens

        def kernel(*refs):
            head, span, batch = (pl.program_id(i) for i in range(3))
            refs = iter(refs)
            token_refs = list(itertools.islice(refs, num_tokens))
            weight_ref = next(refs)
            halves = list(itertools.islice(refs, 2 * has_state))
            end = plgpu.load(next(refs).at[batch]) if has_lengths else self.length
            outputs = list(refs)
            kv = mass = None
            if halves:
                kv = plgpu.load(halves[0].at[batch, head])
                mass = [plgpu.load(halves[1].at[batch, head, jnp.int32(i)]) for i in range(2)]
            weight = plgpu.load(weight_ref.at[head]).astype(token_refs[0].dtype)
            of_tile = body(weight, kv, mass, self.used)

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

                return of_tile(row < end, store, [load(ref) for ref in token_refs], totals)

            accumulators = [x for x in sums for _ in range(x.count)]
            zeros = tuple(jnp.zeros(x.accumulator, jnp.float32) for x in accumulators)
            totals = iter(jax.lax.fori_loop(0, self.steps, step, zeros))
            for ref, x in zip(outputs[num_made:], sums, strict=True):
                for i in range(x.count):
                    total = next(totals)
                    total = jnp.max(total, axis=1) if x.columns else total
                    plgpu.store(ref.at[batch, span, head, jnp.int32(i)], total)

        kernel.__name__ = body.__name__
        return kernel

    def _constants(self, weight, state):
        """As a kernel reads them: each sign's features filled up with zeros."""
        missing = self.features - self.used

        def filled(x, axis):
            return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])

        halves = [x.reshape(*x.shape[:2], 2, self.used, *x.shape[3:]) for x in state or ()]
        halves = [filled(x, 3) for x in halves]
        if halves:
            kv = halves[0]
            halves[0] = kv.reshape(*kv.shape[:2], 2 * self.features, kv.shape[4])
        return [filled(weight, 2), *halves]


def add_up(parts: Sequence[Array]) -> list[Array]:
    """Sums of several arrays `[batch, spans, ...]` over spans, float32, in order, by one kernel."""
    flat = [x.reshape(*x.shape[:2], -1) for x in parts]

    def kernel(*refs):
        block, batch = pl.program_id(0), pl.program_id(1)
        columns = pl.ds(block * ADDED, ADDED)
        column = block * ADDED + jax.lax.broadcasted_iota(jnp.int32, (ADDED,), 0)
        for source, total in zip(refs[: len(flat)], refs[len(flat) :], strict=True):
            inside = (column < source.shape[2]) & (batch < source.shape[0])
            sums = _total(source, batch, columns, inside)
            plgpu.store(total.at[batch, columns], sums, mask=inside)

    totals = pl.pallas_call(
        kernel,
        name="add_up",
        out_shape=[jax.ShapeDtypeStruct((x.shape[0], x.shape[2]), jnp.float32) for x in flat],
        grid=(max(pl.cdiv(x.shape[2], ADDED) for x in flat), max(x.shape[0] for x in flat)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpreting.get(),
    )(*flat)
    return [x.reshape(y.shape[0], *y.shape[2:]) for x, y in zip(totals, parts, strict=True)]


def _total(source, batch, columns, inside):
    """Of these columns over spans, some of which are loaded together."""

    def add(i, total):
        spans = [i * LOADED + n for n in range(LOADED)]
        where = [source.at[batch, span, columns] for span in spans]
        masks = [inside & (span < source.shape[1]) for span in spans]
        loaded = [plgpu.load(x, mask=y, other=0) for x, y in zip(where, masks, strict=True)]
        return sum(loaded, total)

    zeros = jnp.zeros(ADDED, jnp.float32)
    return jax.lax.fori_loop(0, pl.cdiv(source.shape[1], LOADED), add, zeros)
