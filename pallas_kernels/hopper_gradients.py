"""What a warpgroup of a backward kernel does to a tile: probabilities from scores and lse, the scores' gradient from both.

    p = exp(s - lse)        ds = p * (keep * dp - delta) * slope        slope: softcap's derivative

Tiles come in both orientations: queries by keys for dq, keys by queries for dk and dv. The second is the first for the transposed
call: lengths exchanged, mask transposed (`Mask.transposed`), a dense mask and dropout's words with their sides exchanged. Of what
`hopper_scores` says of rows and key tiles, nothing is said twice.

With dropout p bears the decision in its sign: dropped where negative. So one register an element holds both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import visits
from pallas_kernels.hopper_hidden import Part, seen_by_any
from pallas_kernels.hopper_memory import TILE
from pallas_kernels.hopper_recipe import Recipe, Refs, below_cap, capped, scale_at, walk_of
from pallas_kernels.hopper_scores import Rows
from pallas_kernels.online_softmax import LN2, LOG2E

SMALLEST = 1.1754943508222875e-38  # of float32's normal numbers


@dataclasses.dataclass(frozen=True)
class GradientRows(Rows):
    """The rows of a warpgroup, in a backward kernel."""

    def _index(self, axis: int) -> Any:
        """Made for one side of the tile and spread over it: of a whole tile's indices LLVM does not see which are the same, keeps a
        register for each and spills (fused causal D128: 56 bytes). The forward has the registers; its windows are slower so."""
        return lax.broadcast_in_dim(self.recipe.products.indices(self._tile, axis), self._tile, [axis])

    def _from(self, here: Any, t: Any) -> Any:
        """As one number a thread: held as rows and a column, they spill."""
        return self.recipe.products.apart(self._tile, self.base - t * self._tile[1])

    def survivors(self, t: Any, query_words: Any = None) -> Any:
        """The decisions of dropout. query_words: of the columns, as tiles, where those are queries; else of the rows, `words`."""
        generator, seed, p = self.recipe.generator, self.refs.seeds[self.b, self.h, 1], self.recipe.shape.dropout_p
        if query_words is not None:
            key_words = generator.key_words(seed, self.dropout_position(self.row_indices(), 1))
            return generator.keep_words(*query_words, lax.broadcast_in_dim(key_words, self._tile, [0]), p)
        a, b = (lax.broadcast_in_dim(word, self._tile, [0]) for word in self.words)
        return generator.keep_words(a, b, self.key_words(t), p)

    def probabilities(
        self,
        s: Any,
        top: Callable[[], tuple[Any, ...]],
        *,
        i: Any,
        number: Any,
        packed: list[Any],
        query_words: Callable[[], Any] = lambda: None,
        existing: int | None = None,
        is_first: bool = False,
    ) -> tuple[Any, ...]:
        """(p, and softcap's slope if there is one that is held) of the products s = q @ k.T of step i.

        number: of the step in the ring of a bias. top, query_words: make the tiles of what `row_numbers` has of lse, and of
        dropout's words, only where they are wanted: registers are short.
        existing: rows from there on are no rows; None where what they give is not looked at. is_first: of a walk.
        """
        recipe, refs, t = self.recipe, self.refs, self.walk.tile(i)
        shape, slope = recipe.shape, None
        if shape.softcap is not None:
            r = below_cap(recipe, refs, self.b, s)
            s, slope = capped(shape.softcap, r), r * (4 - 4 * r) if recipe.holds_slope else None
        elif not recipe.waits:
            s = s * scale_at(shape, refs, self.b)
        if recipe.bias_kind is not None:
            s = s + self._addend(number)
        if (recipe.mask is not None or packed or recipe.ragged) and (is_first or not recipe.cut_once):
            # a branch spills beside the words of dropout, and beside the sums of dk and dv (NOTES.md); but not under lengths
            always = not recipe.cuts_few if recipe.drops else recipe.config.masks_all
            s = self._cut(s, i, t, packed, always=always)
        if existing is not None:
            row = self._index(0)
            s = jnp.where(plgpu.layout_cast(row < existing - self.base, TILE), s, -jnp.inf)
        lse, *logarithm = top()
        p = jnp.exp2((s - lse) * LOG2E - logarithm[0]) if logarithm else jnp.exp2(s * recipe.factor - lse)
        if recipe.drops:
            p = jnp.where(self.survivors(t, query_words()), p, -p)
        return (p,) if slope is None else (p, slope)

    def weights(self, state: tuple[Any, ...]) -> Any:
        """What multiplies the values: p where it survives dropout."""
        return jnp.maximum(state[0].astype(jnp.float32), 0.0) if self.recipe.drops else state[0]

    def scores_gradient(self, state: tuple[Any, ...], dp: Any, delta: Any) -> Any:
        """The gradient of the scores, bias and all; dp = dout @ v.T, delta as a tile."""
        p = state[0]
        if self.recipe.drops:
            dp, p = jnp.where(p > 0, dp, 0.0), jnp.abs(p)
        return p * (dp - delta)

    def before_softcap(self, state: tuple[Any, ...], ds: Any, top: Callable[[], Any] = lambda: None) -> Any:
        """The gradient of the scores before softcap from that of the scores. top: makes the tile of lse, for a slope from p.

        p = 2**(s - lse) of the capped score s, so s / softcap, which is tanh, is known again: slope = 1 - tanh**2. Where p has
        become 0 the slope does not matter, but it must be a number.
        """
        softcap = self.recipe.shape.softcap
        if softcap is None or not self.recipe.slope_from_p:
            return ds * state[1] if self.recipe.holds_slope else ds
        p = jnp.maximum(jnp.abs(state[0]) if self.recipe.drops else state[0], SMALLEST)
        tanh = (jnp.log2(p) + top()) * (LN2 / softcap)
        return ds * jnp.maximum(1 - tanh * tanh, 0.0)


@dataclasses.dataclass(frozen=True)
class KeyItem:
    """A key tile of `rows` keys, and what a program of dk and dv walks for it: query tiles of each query head of a group's share.

    own_head: of B, H * split (`WalkConfig.split`). Steps are counted by (r, i): the i-th query tile of the share's r-th head.
    table_walk: where a table has it, the walk of every head: looked up once, not in every step, which would wait for memory.
    """

    recipe: Recipe
    refs: Refs
    group: int
    split: int
    rows: int
    b: Any
    own_head: Any
    key_tile: Any
    table_walk: visits.RangeWalk | None = None

    @classmethod
    def of(cls, recipe: Recipe, refs: Refs, group: int, split: int, rows: int, b: Any, own_head: Any, key_tile: Any) -> KeyItem:
        item = cls(recipe, refs, group, split, rows, b, own_head, key_tile)
        by_table = recipe.has_ids and recipe.keep_kind is None
        return dataclasses.replace(item, table_walk=item.walk(0 * key_tile)) if by_table else item

    @property
    def kv_head(self) -> Any:
        return self.own_head if self.split == 1 else lax.div(self.own_head, np.int32(self.split))

    def _begin(self, share: Any) -> Any:
        return lax.div(share * np.int32(self.group), np.int32(self.split))

    @property
    def _share(self) -> Any:
        return lax.rem(self.own_head, np.int32(self.split))

    @property
    def heads(self) -> Any:
        """How many query heads; some shares have one less."""
        return self.group if self.split == 1 else self._begin(self._share + 1) - self._begin(self._share)

    def head(self, r: Any) -> Any:
        first = self.kv_head * self.group
        return first + r if self.split == 1 else first + self._begin(self._share) + r

    def walk(self, r: Any) -> Any:
        if self.table_walk is not None:
            return self.table_walk
        return walk_of(self.recipe, self.refs, self.b, self.head(r), self.key_tile, self.key_tile * self.rows, self.rows)

    def advanced(self, r: Any, i: Any) -> tuple[Any, Any]:
        """The step after step (r, i)."""
        if self.group == 1:
            return r, i + 1
        more = i + 1 < self.walk(r).steps
        return lax.select(more, r, r + 1), lax.select(more, i + 1, 0 * i)

    def asked(self, r: Any, i: Any) -> tuple[Any, ...]:
        """What says which queries of step (r, i) are hidden from all keys."""
        seen, n = seen_by_any(self.recipe, self.refs, self.b, self.head(r)), self.recipe.config.block_k
        return () if seen is None else seen.asked(self.walk(r).tile(i) * n, n)

    def hidden(self, r: Any, i: Any, asked: tuple[Any, ...], goes_on: Any) -> tuple[Part | None, tuple[Any, ...]]:
        """Of step (r, i), from what was asked a step before; and (r, i, asked) of the next step, this one's in the last."""
        seen, n = seen_by_any(self.recipe, self.refs, self.b, self.head(r)), self.recipe.config.block_k
        after = self.advanced(r, i)
        next_r, next_i = (lax.select(goes_on, new, old) for new, old in zip(after, (r, i), strict=True))
        if seen is None:
            return None, (next_r, next_i, ())
        return seen.part(self.walk(r).tile(i) * n, n, asked), (next_r, next_i, self.asked(next_r, next_i))

    @property
    def steps(self) -> Any:
        zero = 0 * self.key_tile
        if not self.recipe.listed:
            steps = self.walk(zero).steps * self.heads
            if self.recipe.config.row_tiles > 1 and isinstance(steps, int):  # what is known of slots then spills (NOTES.md)
                zero = lax.optimization_barrier(zero)
            return steps + zero
        heads = self.heads  # a dense mask may leave each head other tiles
        counts = (self.walk(zero + r).steps for r in range(visits.cdiv(self.group, self.split)))
        return sum((n if self.split == 1 else jnp.where(r < heads, n, zero) for r, n in enumerate(counts)), zero)

    def rows_at(self, r: Any, wg: Any) -> GradientRows:
        return GradientRows.placed(self.recipe, self.refs, self.b, self.head(r), self.key_tile, wg, self.table_walk)
