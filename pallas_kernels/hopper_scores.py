"""What a computing warpgroup of the Hopper forward does to a tile of scores: scale, softcap, bias, masks, softmax, dropout.

`Recipe` holds what is static of a call, `Refs` the operands in memory, `Rows` the 64 query rows that a warpgroup is at. Tiles are
(block_q, block_k) in WGMMA's layout: a thread has columns 8j + 2t and 8j + 2t + 1 of two rows.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dense, online_softmax, visits
from pallas_kernels.contracts import ForwardConfig, ForwardShape, Ids
from pallas_kernels.hopper_memory import COLUMN, ROW, TILE, WORDS
from pallas_kernels.hopper_products import Wgmma
from pallas_kernels.online_softmax import LOG2E, over_columns

MOST = 3e38  # nearly the largest float32


def filled(shape: tuple[int, ...], value: Any, layout: Any) -> Any:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def shared(ref: Any, *index: Any) -> tuple[Any, ...]:
    """The leading indices of an operand that may be shared by the batch, or by all heads."""
    return tuple(0 if size == 1 else i for size, i in zip(ref.shape, index, strict=False))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A call's static facts. mask: its tree, None without one; the kinds are `dense.kind`'s, None without bias or keep.

    is_prefix: every query keeps the same first keys, if not all (`contracts.Mask.is_prefix`). hides, own_hides: whether numbers
    hide some columns from every row, some rows from every column (`hopper_hidden`). folded: rows are (heads of a group, L), all in
    one tile. cut_once: no tile but the first of a walk is cut: `visits.cut_once`, or the list says so (`visits.ListWalk.cut_once`).
    bias_crossed: tiles of a bias lie transposed in shared memory.
    upward: walks begin with the first tile that a slope cuts, not with the last one. slope_from_p: softcap's slope is made of p
    when it is wanted, and not held beside it (`hopper_gradients`). cuts_few: the mask is `is_prefix`, or that transposed.
    """

    shape: ForwardShape
    config: ForwardConfig
    mask: Any
    has_ids: bool
    is_prefix: bool
    hides: bool
    bias_kind: str | None
    keep_kind: str | None
    generator: Any
    products: Wgmma
    folded: bool = False
    own_hides: bool = False
    cut_once: bool = False
    bias_crossed: bool = False
    upward: bool = False
    slope_from_p: bool = False
    cuts_few: bool = False

    def slope_wanted_late(self) -> Recipe:
        """With softcap's slope made of p, where that says enough: not in half precision, nor beside a bias, which would be wanted
        again, nor of a small cap: lse + ln p is off by 1e-6, however small the scores.

        Where p waits from step to step, a slope beside it spills (D128 168 bytes, causal 120; D64 dq, a window, 264).
        """
        enough = self.bias_kind is None and not getattr(self.config, "half", False)
        return dataclasses.replace(self, slope_from_p=enough and self.shape.softcap is not None and self.shape.softcap >= 0.1)

    @property
    def holds_slope(self) -> bool:
        return self.shape.softcap is not None and not self.slope_from_p

    @property
    def drops(self) -> bool:
        return self.shape.dropout_p > 0

    @property
    def listed(self) -> bool:
        """Whether XLA says which tiles to visit."""
        return self.keep_kind is not None or self.has_ids

    @property
    def ragged(self) -> bool:
        return self.shape.key_len % self.config.block_k != 0

    @property
    def cuts_first_only(self) -> bool:
        """Whether no tile but the first of a walk needs the mask."""
        return self.cut_once or (self.is_prefix and self.keep_kind is None)

    @property
    def leads(self) -> bool:
        """Whether the first tiles of a walk may hold nothing for one of its warpgroups: a slope's last keys are the last row's."""
        config = self.config
        return self.mask is not None and not (self.is_prefix or self.listed) and config.rows - config.block_q >= config.block_k

    @property
    def leaves_out(self) -> bool:
        """Whether some warpgroups have no rows: the last ones of a head's last row tile."""
        return visits.cdiv(self.shape.query_len, self.config.block_q) % self.config.warpgroups != 0

    @property
    def huge(self) -> bool:
        return self.bias_kind is not None

    @property
    def waits(self) -> bool:
        """A positive factor may wait for the exponent; any other is applied to the scores, where softcap and bias want it too."""
        scale = self.shape.scale
        return scale is not None and 1e-30 < scale < 1e30 and self.shape.softcap is None and self.bias_kind is None

    @property
    def factor(self) -> float:
        """What is left to multiply the scores by, in base 2."""
        return self.shape.scale * LOG2E if self.waits else LOG2E  # type: ignore[operator]


@dataclasses.dataclass(frozen=True)
class Refs:
    """The operands beside q, k and v, in global memory; the ring of bias tiles in shared memory. None: there is none.

    seen, own_seen: bits of the columns, and of the rows, that are not hidden from everybody (`hopper_hidden`)."""

    mask: list[Any]
    table: Any
    keep: Any
    bias: Any
    sinks: Any
    seeds: Any
    scale: Any
    bias_s: Any
    bias_ready: Any
    bias_free: Any
    seen: Any = None
    own_seen: Any = None


def scale_at(shape: ForwardShape, refs: Refs, b: Any) -> Any:
    """The scale of batch entry b: a number, or the operand's."""
    return shape.scale if refs.scale is None else refs.scale[shared(refs.scale, b)]


def adjusted(recipe: Recipe, refs: Refs, b: Any, s: Any) -> Any:
    """A tile of scores of batch entry b after scale, where it cannot wait for the exponent, and softcap."""
    if recipe.shape.softcap is not None:
        return capped(recipe.shape.softcap, below_cap(recipe, refs, b, s))
    return s if recipe.waits else s * scale_at(recipe.shape, refs, b)


def below_cap(recipe: Recipe, refs: Refs, b: Any, s: Any) -> Any:
    """r = 1 / (1 + e**2x) with x = scale * s / softcap, of which tanh(x) = 1 - 2r is made: the hardware's tanh has 11 bits."""
    twice = scale_at(recipe.shape, refs, b) * (2 * LOG2E / recipe.shape.softcap)  # type: ignore[operator]
    # infinite it would make NaN of the zeros of a row that does not exist; so large, every other score is at the cap anyway
    twice = min(max(twice, -MOST), MOST) if isinstance(twice, float) else jnp.clip(twice, -MOST, MOST)
    return recipe.products.reciprocal(1 + jnp.exp2(s * twice))


def capped(softcap: float, r: Any) -> Any:
    """softcap * tanh(x), of `below_cap`."""
    return softcap - (2 * softcap) * r


def survivor_scale(shape: ForwardShape, generator: Any) -> float:
    """1 / (1 - p), by which dropout multiplies what survives."""
    return 1.0 if shape.dropout_p == 0 else 1 / (1 - generator.rounded(shape.dropout_p))


def mask_of(recipe: Recipe, refs: Refs, b: Any, by_query: Any = None, by_key: Any = None) -> Any:
    """The mask with the numbers of this batch entry, and the ids of a tile."""
    if recipe.mask is None:
        return None
    return jax.tree.unflatten(recipe.mask, refs.mask).local(lambda ref: ref[shared(ref, b)], by_query, by_key)


def walk_of(recipe: Recipe, refs: Refs, b: Any, h: Any, tile: Any, q_lo: Any, rows: int) -> Any:
    """Which key tiles the rows [q_lo, q_lo + rows) of row tile `tile` visit."""
    if recipe.keep_kind is not None:
        return visits.ListWalk(refs.table, shared(refs.table, b, h, tile))
    if recipe.has_ids:
        return visits.RangeWalk(*(refs.table[(*shared(refs.table, b), tile, n)] for n in range(4)))
    shape = recipe.shape
    mask, upward = mask_of(recipe, refs, b), recipe.upward
    return visits.ranges(mask, q_lo, rows, shape.query_len, shape.key_len, recipe.config.block_k, upward)


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

    def _addend(self, t: Any, number: Any) -> Any:
        """The bias of key tile t, float32; the tile is the ring's of that number."""
        refs, kind = self.refs, self.recipe.bias_kind
        lead = shared(refs.bias, self.b, self.h)
        if kind == "scalar":
            return refs.bias[(*lead, 0)]
        if kind == "row":
            return self._by_row(refs.bias.at[lead])
        if kind == "column":
            return self._by_column(refs.bias.at[lead], t)
        now, bq = lax.rem(number, np.int32(self.recipe.config.bias_stages)), self._tile[0]
        plgpu.barrier_wait(refs.bias_ready.at[now])
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
            s = s + self._addend(t, number)
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
