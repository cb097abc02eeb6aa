"""Equal shares: the key tiles of all heads stand in a row, and each program of a decode kernel takes as many of them as any other.

An item is a key/value head of a batch entry; its tiles are those that the mask leaves (`visits.ranges`), at least one. A share may
begin and end within an item, so that a long sequence is read by the whole chip and sequences of different lengths cost what their
sum says. The piece that program p has of item i is written to slot i + p: from one piece to the next one either i or p counts up.

    tiles    0 1 2 3 4 5 6 7 8
    items    a a a a b c c c c      lengths 4, 1, 4
    program  0 0 0 1 1 1 2 2 2      slots: a in 0 and 1, b in 2, c in 3 and 4

A program works out its own share, by arithmetic alone where the number of tiles is static. Where it is traced, one small array says
how many tiles lie `before` each batch entry, and a program searches it for the entries of its first and its last tile.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.visits import cdiv, divided, greatest, least

PARTS = 8
"""Of the batch, that a round of the search looks at: 64 sequences take two rounds, with one half at a time six."""


@dataclasses.dataclass(frozen=True)
class Shares:
    """batch, heads: of the items, heads fastest. steps: tiles of every item, None if these are only known to run time.
    whole: an item is never cut, so that its result does not depend on the others."""

    batch: int
    heads: int
    programs: int
    steps: int | None = None
    whole: bool = False

    @property
    def items(self) -> int:
        return self.batch * self.heads

    @property
    def slots(self) -> int:
        return self.items + self.programs

    @property
    def searches(self) -> bool:
        """Whether programs and items need `before`."""
        return self.steps is None and not self.whole

    @property
    def pieces(self) -> int:
        """Of an item, at most; where `searches`, of one as long as the others."""
        if self.whole:
            return 1
        return cdiv(self.programs, self.items) + 1 if self.steps is None else cdiv(self.steps - 1, self._share(None)) + 1

    def before(self, steps: Any) -> jax.Array:
        """int32 (batch + 1,): how many tiles lie before each batch entry, and in all; steps (1|batch,): those of each head.

        >>> Shares(3, 2, 5).before(jnp.array([4, 1, 4])).tolist()
        [0, 8, 10, 18]
        """
        n, entry = (lax.broadcasted_iota(jnp.int32, (self.batch + 1, self.batch), axis) for axis in (0, 1))
        # a masked sum and no cumsum, nothing behind it: one small kernel, the steps' own arithmetic included
        return jnp.where(entry < n, self.heads * steps.astype(jnp.int32)[None], 0).sum(1, dtype=jnp.int32)

    def of_program(self, program: Any, before: Any = None) -> tuple[Any, Any, Any, Any]:
        """(first item, the first of its tiles, number of pieces, the end of the last piece's tiles); whole: its items, whole.

        >>> [tuple(map(int, Shares(3, 1, 3).of_program(p, jnp.array([0, 4, 5, 9])))) for p in range(3)]
        [(0, 0, 1, 3), (0, 3, 3, 1), (2, 1, 1, 4)]
        """
        if self.whole:
            share = cdiv(self.items, self.programs)
            first = program * share
            return first, None, greatest(least(self.items - first, share), 0), None
        total, share = self._total(before), self._share(before)
        start = least(program * share, total)
        stop = least(start + share, total)
        (first, at), (last, end) = self._places(before, least(start, total - 1), stop - 1)
        return first, at, jnp.where(start < stop, last - first + 1, 0 * first), end + 1

    def of_item(self, item: Any, before: Any = None) -> tuple[Any, Any]:
        """(first slot, number of pieces).

        >>> [tuple(map(int, Shares(3, 1, 3).of_item(i, jnp.array([0, 4, 5, 9])))) for i in range(3)]
        [(0, 2), (2, 1), (3, 2)]
        """
        if self.whole:
            return item + divided(item, cdiv(self.items, self.programs)), 1 + 0 * item
        share = self._share(before)
        if self.steps is not None:
            own, begin = self.steps, item * self.steps
        else:
            entry = divided(item, self.heads)
            begin, end = before[entry], before[entry + 1]
            own = divided(end - begin, self.heads)
            begin = begin + (item - entry * self.heads) * own
        low, high = divided(begin, share), divided(begin + own - 1, share)
        return item + low, high - low + 1

    def _total(self, before: Any) -> Any:
        return before[self.batch] if self.steps is None else self.items * self.steps

    def _share(self, before: Any) -> Any:
        """Tiles of a program."""
        return divided(self._total(before) + (self.programs - 1), self.programs)

    def _places(self, before: Any, *tiles: Any) -> list[tuple[Any, Any]]:
        """(item, how many of its tiles come before) of each of these tiles."""
        if self.steps is not None:
            items = [divided(x, self.steps) for x in tiles]
            return [(item, x - item * self.steps) for item, x in zip(items, tiles, strict=True)]
        places = []
        for entry, x in zip(self._entries(before, *tiles), tiles, strict=True):
            begin, end = before[entry], before[entry + 1]
            own = divided(end - begin, self.heads)
            head = divided(x - begin, own)
            places.append((entry * self.heads + head, x - begin - head * own))
        return places

    def _entries(self, before: Any, *tiles: Any) -> list[Any]:
        """The batch entry of each of these tiles: of PARTS parts of the batch the one in which it lies, of its parts, and so on. A
        round costs what memory takes to answer, half a microsecond, whatever it asks, so all tiles ask at once. Places beyond the
        last entry stand for the end of all tiles, which no tile has reached."""
        found = [0 * x for x in tiles]
        stride = 1
        while stride * PARTS < self.batch:
            stride *= PARTS
        while stride:
            begins = [[before[least(at + n * stride, self.batch)] for n in range(1, PARTS)] for at in found]
            passed = [
                functools.reduce(operator.add, [jnp.where(begin <= x, stride, 0 * x) for begin in own])
                for own, x in zip(begins, tiles, strict=True)
            ]
            found = [at + more for at, more in zip(found, passed, strict=True)]
            stride //= PARTS
        return found
