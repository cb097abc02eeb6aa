"""Which key tiles a tile of query rows visits, in which order, and which of them need the mask.

A walk goes from the last key tile to the first (`upward`: the other way; a list: as it says) and has three answers: `steps`,
`tile(i)` and `partial(i)`. What it is read from depends on the mask:

    range   the mask's own arithmetic, inside the kernel: causal, windows, lengths
    table   (B|1, row tiles, 4) int32 from XLA: the same four numbers, where the mask has an id for each position
    list    (B|1, Hq|1, row tiles|1, 2 + key tiles) int32 from XLA: the count, 2 * tile + partial, `cut_once`: dense masks

Every walk has at least one step, so that a row which attends to nothing is finished like any other.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def divided(x: Any, by: Any) -> Any:
    """x // by for what is not negative; an int stays one (an array that a kernel closes over is none of its operands)."""
    return x // by if isinstance(x, int) or x.ndim else lax.div(x, np.int32(by) if isinstance(by, int) else by)


def least(a: Any, b: Any) -> Any:
    return min(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.minimum(a, b)


def greatest(a: Any, b: Any) -> Any:
    return max(a, b) if isinstance(a, int) and isinstance(b, int) else jnp.maximum(a, b)


@dataclasses.dataclass(frozen=True)
class RangeWalk:
    """first, full_first, full_last, last: key tiles; [first, last) is visited, [full_first, full_last) needs no mask. upward: from
    the first one on."""

    first: Any
    full_first: Any
    full_last: Any
    last: Any
    upward: bool = False

    @property
    def steps(self) -> Any:
        return self.last - self.first

    def part(self, start: Any, stop: Any) -> RangeWalk:
        """Its steps [start, stop) alone."""
        first, last = (self.first + start, self.first + stop) if self.upward else (self.last - stop, self.last - start)
        return dataclasses.replace(self, first=first, last=last)

    def tile(self, i: Any) -> Any:
        return self.first + i if self.upward else self.last - 1 - i

    def lead(self, own: RangeWalk) -> Any:
        """How many of its first tiles rows see nothing of, whose own walk is `own`; one step is left to each."""
        unseen = own.first - self.first if self.upward else self.last - own.last
        return greatest(least(unseen, self.steps - 1), 0)

    def partial(self, i: Any) -> Any:
        return (self.tile(i) < self.full_first) | (self.tile(i) >= self.full_last)


@dataclasses.dataclass(frozen=True)
class ListWalk:
    """`ref[at]` is a row of a list (`dense.listed`)."""

    ref: Any
    at: tuple[Any, ...]

    @property
    def steps(self) -> Any:
        return self.ref[(*self.at, 0)]

    @property
    def cut_once(self) -> Any:
        """Whether no walk of the list, of any head, has more than one tile that is cut, its first one; the same in every row."""
        return self.ref[(*self.at, self.ref.shape[-1] - 1)] == 1

    def tile(self, i: Any) -> Any:
        return lax.shift_right_logical(self.ref[(*self.at, i + 1)], np.int32(1))

    def partial(self, i: Any) -> Any:
        return (self.ref[(*self.at, i + 1)] & 1) == 1


def ranges(mask: Any, q_lo: Any, rows: int, L: int, S: int, block_k: int, upward: bool = False) -> RangeWalk:
    """The walk of the rows [q_lo, q_lo + rows), by the mask's own arithmetic. Each an int, an int32 scalar or (B|1,)."""
    lo, hi, full_lo, full_hi = 0, S, 0, S
    if mask is not None:
        lo, hi = mask.kv_range(q_lo, q_lo + rows, L, S)
        full_lo, full_hi = mask.full_range(q_lo, q_lo + rows, L, S)
    tiles = cdiv(S, block_k)
    first = least(divided(lo, block_k), tiles - 1)
    last = greatest(divided(hi + (block_k - 1), block_k), first + 1)
    if tiles == 1:  # known now, whatever the mask
        first, last = 0, 1
    full_first = least(greatest(divided(full_lo + (block_k - 1), block_k), first), last)
    full_last = least(greatest(divided(full_hi, block_k), full_first), last)
    return RangeWalk(first, full_first, full_last, last, upward)


def cut_once(mask: Any, rows: int, block_q: int, L: int, S: int, block_k: int, leads: bool, upward: bool = False) -> bool:
    """Whether only the first tile of a walk needs the mask, whichever `block_q` of the `rows` look at it, and that is known now.

    leads: these pass by the tiles of which they see nothing (`hopper_scores.Rows.lead`). A causal mask of L = S is such a one.
    """
    if jax.tree.leaves(mask):
        return False
    for q_lo in range(0, L, rows):
        walk = ranges(mask, q_lo, rows, L, S, block_k, upward)
        for base in range(q_lo, min(q_lo + rows, L), block_q):
            own = ranges(mask, base, block_q, L, S, block_k)
            begun = walk.tile(walk.lead(own) if leads else 0)
            first, last = (begun + 1, walk.last) if upward else (walk.first, begun)
            if first < last and (own.full_first > first or own.full_last < last):
                return False
    return True


def table(mask: Any, rows: int, L: int, S: int, block_k: int) -> jax.Array:
    """(B|1, row tiles, 4): `ranges` of every row tile, made by XLA; for masks whose ids a program cannot look through."""

    def of_tile(q_lo: Any) -> jax.Array:
        found = ranges(mask, q_lo, rows, L, S, block_k)
        numbers = (jnp.atleast_1d(jnp.asarray(x, jnp.int32)) for x in (found.first, found.full_first, found.full_last, found.last))
        return jnp.stack(jnp.broadcast_arrays(*numbers), axis=-1)

    return jax.vmap(of_tile, out_axes=1)(jnp.arange(cdiv(L, rows), dtype=jnp.int32) * rows)


@dataclasses.dataclass(frozen=True)
class Items:
    """Which (batch entry, head, row tile) is the n-th item of program p, of `per_program` items.

    Heads stand in a row, `together` of them side by side: their heaviest row tiles, then their next ones, and so on. So the
    lightest come last, where SMs run dry, and what is read at one time is still these heads' (`tuning.side_by_side`). With several
    items, program p takes the p-th, then the p-th from behind of the next `programs` ones, and so on: what runs at one time are
    neighbours, which share K and V in the cache, and under a causal mask a light item follows a heavy one. across: heads stand in
    the row by their number first, then by batch entry, so that those side by side read the same rows of a bias that the batch
    shares.
    """

    batch: int
    heads: int
    row_tiles: int
    per_program: int
    together: int = 1
    across: bool = False

    @property
    def total(self) -> int:
        return self.batch * self.heads * self.row_tiles

    @property
    def programs(self) -> int:
        return cdiv(self.total, self.per_program)

    @property
    def most(self) -> int:
        """Items of the programs that have most; the others have one less."""
        return cdiv(self.total, self.programs)

    def _number(self, p: Any, n: Any) -> Any:
        if self.per_program == 1:
            return p
        if isinstance(n, int):
            return n * self.programs + (p if n % 2 == 0 else self.programs - 1 - p)
        return n * self.programs + lax.select(lax.rem(n, np.int32(2)) == 0, p, self.programs - 1 - p)

    def count(self, p: Any) -> Any:
        last = self.most - 1
        if self.total == self.most * self.programs:
            return np.int32(self.most)
        return jnp.where(self._number(p, last) < self.total, np.int32(last + 1), np.int32(last))

    def at(self, p: Any, n: Any) -> tuple[Any, Any, Any]:
        x, heads = self._number(p, n), self.batch * self.heads
        blocks = max(1, heads // self.together)  # of heads side by side; the last one has those that are left over as well
        side: Any = heads if blocks == 1 else self.together
        first: Any = 0
        if blocks > 1:
            block = least(divided(x, side * self.row_tiles), blocks - 1)
            first, x = block * side, x - block * (side * self.row_tiles)
            if more := heads % side:
                side = jnp.where(block == blocks - 1, np.int32(side + more), np.int32(side))
        r, head = _divmod(x, side)
        if self.across:
            h, b = _divmod(first + head, self.batch)
        else:
            b, h = _divmod(first + head, self.heads)
        return b, h, self.row_tiles - 1 - r


def _divmod(x: Any, by: Any) -> tuple[Any, Any]:
    quotient = divided(x, by)
    return quotient, x - quotient * by
