"""Equal shares: the key tiles of all heads stand in a row, and each program of a decode kernel takes as many of them as any other.

An item is a key/value head of a batch entry; its tiles are those that the mask leaves (`visits.ranges`), at least one. A share may
begin and end within an item, so that a long sequence is read by the whole chip and sequences of different lengths cost what their
sum says. The piece that program p has of item i is written to slot i + p: from one piece to the next one either i or p counts up.

    tiles    0 1 2 3 4 5 6 7 8
    items    a a a a b c c c c      lengths 4, 1, 4
    program  0 0 0 1 1 1 2 2 2      slots: a in 0 and 1, b in 2, c in 3 and 4

Both tables are int32; they are NumPy constants where the mask is static.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Shares:
    """batch, heads: of the items, heads fastest. whole: an item is never cut, so that its result does not depend on the others."""

    batch: int
    heads: int
    programs: int
    whole: bool = False

    @property
    def items(self) -> int:
        return self.batch * self.heads

    @property
    def slots(self) -> int:
        return self.items + self.programs

    def tables(self, steps: Any) -> tuple[Any, Any]:
        """(programs, 4): first item, its first tile, number of pieces (0: nothing to do), the last piece's end tile;
        (items, 2): first slot, number of slots. steps: tiles of each batch entry's items, an int or int32 (1|B,).

        >>> of_programs, of_items = Shares(3, 1, 3).tables(np.array([4, 1, 4]))
        >>> of_programs.tolist(), of_items.tolist()
        ([[0, 0, 1, 3], [0, 3, 3, 1], [2, 1, 1, 4]], [[0, 2], [2, 1], [3, 2]])
        """
        xp: Any = np if isinstance(steps, (int, np.ndarray)) else jnp
        steps = xp.broadcast_to(xp.asarray(steps, np.int32), (self.batch,))
        number = np.arange(self.batch, dtype=np.int32)
        # a sum of B x B and no cumsum: one small kernel
        before = self.heads * xp.where(number[None] < number[:, None], steps[None], 0).sum(1, dtype=np.int32)
        total = before[-1] + self.heads * steps[-1]
        program, item = np.arange(self.programs, dtype=np.int32), np.arange(self.items, dtype=np.int32)
        b, h = item // self.heads, item % self.heads
        own = steps[b]
        if self.whole:
            share = -(-self.items // self.programs)
            first = program * share
            count = np.clip(self.items - first, 0, share)
            last = np.clip(first + count - 1, 0, self.items - 1)
            of_programs = xp.stack([xp.asarray(first), xp.asarray(0 * first), xp.asarray(count), own[last]], -1)
            return of_programs, np.stack([item + item // share, np.ones_like(item)], -1)
        share = -(-total // self.programs)
        start = xp.minimum(program * share, total)
        stop = xp.minimum(start + share, total)

        def place(x: Any) -> tuple[Any, Any]:
            """(the item of tile x, how many of its tiles come before)."""
            entry = (before[None] <= x[:, None]).sum(1, dtype=np.int32) - 1
            rest = x - before[entry]
            head = rest // steps[entry]
            return entry * self.heads + head, rest - head * steps[entry]

        (first, at), (last, end) = place(start), place(xp.maximum(stop - 1, 0))
        count = xp.where(stop > start, last - first + 1, 0)
        of_programs = xp.stack([first, at, count, end + 1], -1).astype(np.int32)
        begins = before[b] + h * own
        low, high = begins // share, (begins + own - 1) // share
        return of_programs, xp.stack([item + low, high - low + 1], -1).astype(np.int32)
