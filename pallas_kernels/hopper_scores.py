"""What a computing warpgroup of the Hopper forward does to a tile of scores: scale, softcap, bias, masks, softmax, dropout.

`Rows` are the 64 query rows that a warpgroup is at. Tiles are (block_q, block_k) in WGMMA's layout: a thread has columns 8j + 2t
and 8j + 2t + 1 of two rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dense, online_softmax
from pallas_kernels.contracts import Ids
from pallas_kernels.hopper_memory import COLUMN, ROW, TILE, WORDS
from pallas_kernels.hopper_recipe import Recipe, Refs, adjusted, filled, mask_of, shared, walk_of
from pallas_kernels.online_softmax import LOG2E, over_columns


@dataclasses.dataclass(frozen=True)
class Rows:
    """block_q query rows of one head from `base` on, and their walk, whose first `lead` tiles they see nothing of (one step is left
    to each); words: of dropout, (block_q,) each."""

    recipe: Recipe
    refs: Refs
    b: Any
    h: Any
    base: Any
    wg: Any
    walk: Any
    lead: Any
    words: Any

    @classmethod
    def placed(cls, recipe: Recipe, refs: Refs, b: Any, h: Any, tile: Any, wg: Any, walk: Any = None) -> Self:
        """The rows without dropout's words. walk: of the row tile, where it is known."""
        config, lead = recipe.config, 0
        base = tile * config.rows + wg * config.block_q
        walk = walk_of(recipe, refs, b, h, tile, tile * config.rows, config.rows) if walk is None else walk
        if not recipe.listed:  # of the tiles that all warpgroups visit, fewer are partial for one's own rows
            own = walk_of(recipe, refs, b, h, tile, base, config.block_q)
            if recipe.leads:
                lead = walk.lead(own)
            walk = dataclasses.replace(walk, full_first=own.full_first, full_last=own.full_last)
        if recipe.leaves_out and not (isinstance(walk.steps, int) and walk.steps == 1):
            lead = jnp.where(base < recipe.shape.query_len, np.int32(lead) if isinstance(lead, int) else lead, walk.steps - 1)
        return cls(recipe, refs, b, h, base, wg, walk, lead, None)

    @classmethod
    def of(cls, recipe: Recipe, refs: Refs, b: Any, h: Any, tile: Any, wg: Any) -> Self:
        rows = cls.placed(recipe, refs, b, h, tile, wg)
        if not recipe.drops:
            return rows
        words = recipe.generator.query_words(refs.seeds[b, h, 0], refs.seeds[b, h, 1], rows.dropout_position(rows.row_indices(), 0))
        return dataclasses.replace(rows, words=words)

    def dropout_position(self, index: Any, of_keys: int) -> Any:
        """Where dropout counts an index of a query, or of a key, from: its own seeds say so where this is a part of a call."""
        seeds = self.refs.seeds
        return index if seeds.shape[-1] == 2 else index.astype(jnp.uint32) + seeds[self.b, self.h, 2 + of_keys]

    def key_words(self, t: Any) -> Any:
        """Dropout's words of the keys of tile t, which share mixes here too, unless nobody knows where they count from."""
        generator, products, n = self.recipe.generator, self.recipe.products, self._tile[1]
        seed, own = self.refs.seeds[self.b, self.h, 1], generator.KEY_BITS
        if self.refs.seeds.shape[-1] == 2:
            words = generator.key_words(seed, products.columns(n, ~own) + t * n, products.columns(n, own))
        else:
            words = generator.key_words(seed, self.dropout_position(products.columns(n) + t * n, 1))
        return lax.broadcast_in_dim(words, self._tile, [1])

    def row_indices(self) -> Any:
        return plgpu.broadcasted_iota(jnp.int32, (self.recipe.config.block_q,), 0, layout=ROW) + self.base

    @property
    def _tile(self) -> tuple[int, int]:
        return self.recipe.config.block_q, self.recipe.config.block_k

    def _index(self, axis: int) -> Any:
        return plgpu.broadcasted_iota(jnp.int32, self._tile, axis, layout=TILE)

    def _loaded(self, ref: Any, start: Any, length: int, layout: Any, axis: int) -> Any:
        """A stretch of a 1-d operand along one axis of the tile."""
        where = ref.at[pl.ds(start, length)]
        vector = plgpu.load(where, layout=layout, optimized=False)  # pyright: ignore[reportCallIssue] (0.10 had an index)
        return lax.broadcast_in_dim(vector, self._tile, [axis])

    def _by_row(self, ref: Any) -> Any:
        return self._loaded(ref, self.base, self._tile[0], ROW, 0)

    def _by_column(self, ref: Any, t: Any) -> Any:
        return self._loaded(ref, t * self._tile[1], self._tile[1], COLUMN, 1)

    def _columns(self, t: Any) -> tuple[Any, Any]:
        """(here, k): the keys of tile t are here + k, and k is a constant for each register: the bits of a column but 1 and 2,
        which are the thread's. Positions that count from `here` cost no register; whole indices cost one each, in all of the loop,
        and spill."""
        column = self._index(1)
        return (column & 6) + t * self._tile[1], column & ~6

    def _positions(self) -> Any:
        """Which query each row is."""
        if not self.recipe.folded:
            return self._index(0) + self.base
        L = self.recipe.shape.query_len
        return 0 * self.base if L == 1 else lax.rem(self._index(0) + self.base, np.int32(L))

    def _from(self, here: Any, t: Any) -> Any:
        """Which query each row is, counted from `here` of key tile t."""
        shape = self.recipe.shape
        if self.recipe.drops and not self.recipe.folded and max(shape.head_dim, shape.value_head_dim) > 64:
            # registers are short beside dropout: a window of 1000, D256 283 to 265 us, D128 343 to 332; causal D64 772 to 813
            return self.recipe.products.apart(self._tile, self.base - t * self._tile[1])
        return self._positions() - here

    def first(self) -> tuple[Any, Any]:
        """(m, l) before the first key."""
        bq, sinks = self._tile[0], self.refs.sinks
        sums = self.recipe.config.sums
        shape, layout, of = (bq, *sums), TILE if sums else ROW, math.prod(sums)
        if sinks is None:
            return filled((bq,), -jnp.inf, ROW), filled(shape, 0.0, layout)
        sink = sinks[(*shared(sinks, self.b), self.h)]
        m = jnp.where(sink == -jnp.inf, sink, jnp.clip(sink, -1e30, 1e30))
        m = m if self.recipe.huge else m * LOG2E
        return filled((bq,), m, ROW), filled(shape, jnp.where(sink == -jnp.inf, 0.0, 1.0 / of), layout)

    def keep_words(self, i: Any) -> list[Any]:
        """The packed dense mask of step i; to be loaded before the products, for the softmax."""
        kind, ref = self.recipe.keep_kind, self.refs.keep
        if kind is None:
            return []
        lead, (bq, bk) = shared(ref, self.b, self.h), self._tile
        if kind == "scalar":
            return [ref[(*lead, 0, 0, 0)]]
        own = pl.ds(self.base, bq)
        load: Any = functools.partial(plgpu.load, optimized=False)
        if kind == "row":
            return [load(ref.at[(*lead, 0, own, 0)], layout=ROW)]
        whole = bk % dense.PIECE == 0

        def words(n: Any) -> Any:
            """Those of the n-th piece, or half a piece: in the low bits."""
            piece = ref.at[(*lead, n if whole else lax.shift_right_logical(n, np.int32(1)))]
            if kind == "tile":
                found = load(piece.at[own], layout=WORDS)
            else:
                found = lax.broadcast_in_dim(load(piece.at[0], layout=WORDS.reduce(0)), (bq, 4), [1])
            return found if whole else lax.shift_right_logical(found, jnp.full_like(found, (n & 1) * 16))

        of = bk // (dense.PIECE if whole else dense.HALF)
        return [words(self.walk.tile(i) * of + n) for n in range(of)]

    def _kept(self, s: Any, packed: list[Any]) -> Any:
        """The scores that the dense mask keeps, the others -inf; packed: `keep_words`."""
        if self.recipe.keep_kind in ("row", "scalar"):
            (word,) = packed
            word = over_columns(word, s) if word.ndim else jnp.full(s.shape, word, jnp.int32)  # Mosaic takes no scalar condition
            return jnp.where(word != 0, s, -jnp.inf)
        return self.recipe.products.kept(s, packed, same_rows=self.recipe.keep_kind == "column")

    def _addend(self, number: Any) -> Any:
        """The bias of a key tile, float32, which is the ring's of that number."""
        refs, kind = self.refs, self.recipe.bias_kind
        lead = shared(refs.bias, self.b, self.h)
        if kind == "scalar":
            return refs.bias[(*lead, 0)]
        if kind == "row":
            return self._by_row(refs.bias.at[lead])
        now, bq = lax.rem(number, np.int32(self.recipe.config.bias_stages)), self._tile[0]
        plgpu.barrier_wait(refs.bias_ready.at[now])
        if kind == "column":
            found = self._by_column(refs.bias_s.at[now], 0)
        else:
            own, tiles = pl.ds(self.wg * bq, bq), refs.bias_s
            tile = tiles.at[now, :, own].transpose((1, 0)) if self.recipe.bias_crossed else tiles.at[now, own]
            found = plgpu.load(tile, layout=TILE)  # pyright: ignore[reportCallIssue]
        # A plain load may still be on its way when its thread arrives, and TMA does not wait for it: without this fence rows of
        # the next tile were read, once in 10**4 tiles at D256 (NOTES.md, "A load that TMA overtook").
        self.recipe.products.loaded()
        plgpu.barrier_arrive(refs.bias_free.at[now])
        return self.recipe.products.widened(found)

    def _masked(self, s: Any, t: Any, packed: list[Any]) -> Any:
        recipe = self.recipe
        if packed:
            s = self._kept(s, packed)
        if recipe.mask is None and not recipe.ragged:
            return s
        here, k = self._columns(t)
        kept: Any = True
        if recipe.mask is not None:
            own = lambda ref: ref.at[shared(ref, self.b)]  # noqa: E731
            mask = mask_of(
                recipe, self.refs, self.b, lambda ref: Ids(self._by_row(own(ref))), lambda ref: Ids(self._by_column(own(ref), t))
            )  # fmt: skip
            kept = mask.moved(here).keep(self._from(here, t), k)
        if recipe.ragged:
            kept = kept & (k < recipe.shape.key_len - here)
        return jnp.where(plgpu.layout_cast(kept, TILE), s, -jnp.inf)

    def _cut(self, s: Any, i: Any, t: Any, packed: list[Any], *, always: bool) -> Any:
        """The scores of step i, key tile t, masked where that is cut; always: without asking."""
        masked = functools.partial(self._masked, t=t, packed=packed)
        cut = True if always else self.walk.partial(i)
        if isinstance(cut, bool):
            return masked(s) if cut else s
        return lax.cond(cut, masked, lambda s: s, s)

    def softmax(self, s: Any, m: Any, l: Any, *, i: Any, packed: list[Any], number: Any, is_first: bool = False) -> tuple[Any, ...]:
        """(m, l, shrink, p), float32, after the scores (block_q, block_k) of step i, the ring's of that number."""
        recipe, refs, t = self.recipe, self.refs, self.walk.tile(i)
        shape, generator = recipe.shape, recipe.generator
        s = adjusted(recipe, refs, self.b, s)
        if recipe.bias_kind is not None:
            s = s + self._addend(number)
        if (recipe.mask is not None or packed or recipe.ragged) and (is_first or not recipe.cuts_first_only):
            always = recipe.drops or recipe.config.masks_all  # beside the words of dropout a branch spills
            s = self._cut(s, i, t, packed, always=always)
        m, l, shrink, p = online_softmax.update(s, recipe.factor, m, l, chains=recipe.config.chains, huge=recipe.huge)
        if recipe.drops:
            a, c = self.words
            kept = generator.keep_words(over_columns(a, p), over_columns(c, p), self.key_words(t), shape.dropout_p)
            # the barrier keeps the select on float32: on halves ptxas serialises wgmma (C7513, NOTES.md)
            p = lax.optimization_barrier(jnp.where(kept, p, 0.0))
        return m, l, shrink, p
