"""What a mask hides from everybody: keys that no query sees, queries that see no key. They may hold NaN, and 0 * NaN is NaN.

So they become 0 in shared memory, before a product reads them: in a tile that streams past by the warpgroup that loads, on its way
(`bring`); in a program's own rows by the warpgroup whose they are, before its first product. Most tiles have none: that is asked
first, and costs them a look at a few bits. Which rows these are is known in two ways:

    Span    [lo, hi) by the mask's own arithmetic, inside the kernel: keys under masks by numbers
    Bits    (B|1, heads|1, words) int32 from XLA, a bit for each row: keys under ids, or where a dense mask has taken in the
            structured one; queries, which are those without an lse
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dense, visits
from pallas_kernels.contracts import has_ids
from pallas_kernels.hopper_products import Wgmma
from pallas_kernels.hopper_recipe import Recipe, Refs, mask_of, shared

ROWS = 2 * dense.WORD  # that are cleared at a time


def hidden_by_numbers(mask: Any, L: int, S: int) -> bool:
    """Whether a mask, or None, may hide keys from all queries, and says so by numbers."""
    if mask is None or has_ids(mask):
        return False
    lo, hi = mask.kv_range(0, L, L, S)
    return not (isinstance(lo, int) and isinstance(hi, int) and (lo, hi) == (0, S))


def seen_keys(mask: Any, in_kernel: Any, L: int, S: int) -> jax.Array | None:
    """(B|1, 1, S) bool: the keys that some query sees, where a kernel needs to be told; None where it has the numbers, or all are.

    in_kernel: the mask as the kernel gets it: None where a dense one has taken it in.
    """
    if mask is None or not (in_kernel is None or has_ids(mask)):
        return None
    valid = mask.key_valid(L, S)
    return None if valid is None else valid.reshape(-1, 1, S)


def words(seen: jax.Array, block: int) -> jax.Array:
    """`Bits` of seen (B|1, heads|1, rows) bool, to whole blocks; rows that do not exist are 0 in memory and count as seen."""
    rows = seen.shape[2]
    filled = jnp.pad(seen, ((0, 0), (0, 0), (0, visits.cdiv(rows, block) * block - rows)), constant_values=True)
    return lax.bitcast_convert_type(dense.bits(filled), jnp.int32)


@dataclasses.dataclass(frozen=True)
class Part:
    """Of some rows: cut, whether any is hidden; seen(first), which are not of the `ROWS` from `first` on: two words, a bit each."""

    products: Wgmma
    cut: Any
    seen: Callable[[int], tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Span:
    """Rows outside of [lo, hi) are hidden, of `length` that there are."""

    products: Wgmma
    lo: Any
    hi: Any
    length: int

    def asked(self, start: Any, rows: int) -> tuple[Any, ...]:
        return ()

    def part(self, start: Any, rows: int, asked: tuple[Any, ...] | None = None) -> Part:
        def seen(first: int) -> tuple[Any, ...]:
            word = lambda at: _below(self.hi - at) & ~_below(self.lo - at)  # noqa: E731
            return word(start + first), word(start + first + dense.WORD)

        return Part(self.products, (start < self.lo) | (visits.least(start + rows, self.length) > self.hi), seen)


def _below(n: Any) -> Any:
    """A word whose bits below bit n are 1."""
    bits = visits.greatest(n, 0)
    return jnp.where(bits < dense.WORD, lax.shift_left(np.int32(1), bits) - 1, -1)


@dataclasses.dataclass(frozen=True)
class Bits:
    """`ref[(*at, n)]` has a bit for each row from 32 n on, 0 of a hidden one."""

    products: Wgmma
    ref: Any
    at: tuple[Any, ...]

    def asked(self, start: Any, rows: int) -> tuple[Any, ...]:
        """The words of some rows: memory takes as long as half a step, so a loader asks for them a step ahead."""
        word = visits.divided(start, dense.WORD)
        return tuple(self.ref[(*self.at, word + n)] for n in range(rows // dense.WORD))

    def part(self, start: Any, rows: int, asked: tuple[Any, ...] | None = None) -> Part:
        def seen(first: int) -> tuple[Any, ...]:
            return self.asked(start + first, ROWS)  # again: registers are few where it is asked

        words = self.asked(start, rows) if asked is None else asked
        return Part(self.products, functools.reduce(lambda a, b: a & b, words) != np.int32(-1), seen)


def seen_by_any(recipe: Recipe, refs: Refs, b: Any, h: Any = 0) -> Span | Bits | None:
    """Of the tiles that stream past: which rows are seen; None where all are."""
    return _seen(recipe, refs, b, h, refs.seen, recipe.hides, own=False)


def own_seen_by_any(recipe: Recipe, refs: Refs, b: Any, h: Any = 0) -> Span | Bits | None:
    """Of a program's own rows."""
    return _seen(recipe, refs, b, h, refs.own_seen, recipe.own_hides, own=True)


def _seen(recipe: Recipe, refs: Refs, b: Any, h: Any, told: Any, hides: bool, *, own: bool) -> Span | Bits | None:
    if told is not None:
        return Bits(recipe.products, told, shared(told, b, h))
    if not hides:
        return None
    mask, sizes = mask_of(recipe, refs, b), (recipe.shape.query_len, recipe.shape.key_len)
    if own:
        mask, sizes = mask.transposed(), sizes[::-1]
    lo, hi = mask.kv_range(0, sizes[0], *sizes)
    return Span(recipe.products, lo, hi, sizes[1])


def clear(memory: Any, part: Part) -> None:
    """Zeros for the hidden rows of a tile (rows, dim) that has arrived; `commit_smem` is left to do."""
    for first in range(0, memory.shape[0], ROWS):
        part.products.clear(memory.at[pl.ds(first, ROWS)], part.seen(first))


def clear_own(part: Part | None, *tiles: Any) -> None:
    """Zeros for the hidden ones of a warpgroup's own rows, in tiles that have arrived."""
    if part is None:
        return

    @pl.when(part.cut)
    def _() -> None:
        for memory in tiles:
            clear(memory, part)
        plgpu.commit_smem()


def bring(copy: Callable[[Any, Any], None], memory: Any, ready: Any, part: Part | None, came: Any, copies: int = 1) -> None:
    """The loader's copy(memory, barrier) of a tile, whose hidden rows are 0 when `ready` hears of it.

    came: a barrier of the loader's own; copies: in how many the tile arrives, each of which either barrier counts.
    """
    if part is None:
        copy(memory, ready)
        return
    pl.when(~part.cut)(lambda: copy(memory, ready))

    @pl.when(part.cut)
    def _() -> None:
        copy(memory, came)
        plgpu.barrier_wait(came)
        clear(memory, part)
        plgpu.commit_smem()
        for _ in range(copies):
            plgpu.barrier_arrive(ready)
