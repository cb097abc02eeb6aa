"""The running state of a row: its maximum m, the sum l of its exponentials, and what both become in the end.

Milakov and Gimelshein, arXiv:1805.02867, with powers of 2: for scores s and a factor f, an element is p = 2**(f * s - r) with the
row's r = f * m, m = max s. That is one fused multiply-add an element; r is rounded, and by as much all of a row's p and its l are
off, so that it cancels, as long as everything (`shrink`, lse) is counted from the very same r: natural lse = r * ln 2 + ln l.
Beyond |r| = 2**26 the rounding is a factor of 2**4 and more, which half precision p cannot hold any longer: scores that may be so
large (a bias of -1e9, of finfo.min) are `huge`, and p = 2**(f * (s - m)), one operation more.
A row without keys has m = -inf and l = 0; it is decided here and nowhere else that such a row gives 0 and lse -inf.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jax import lax

LOG2E = math.log2(math.e)
LN2 = math.log(2)


def over_columns(row: Any, tile: Any) -> Any:
    """(rows,) against (rows, columns)."""
    return lax.broadcast_in_dim(row, tile.shape, [0])


def update(s: Any, factor: float, m: Any, l: Any, *, huge: bool = False) -> tuple[Any, Any, Any, Any]:
    """(m, l, shrink, p) after a tile of scores: what came before counts `shrink` times as much, p = 2**(factor * (s - m)).

    s (rows, columns) float32, -inf where masked; factor > 0; m, l, shrink (rows,).
    """
    m_new = jnp.maximum(m, s.max(axis=1))
    top = jnp.where(m_new == -jnp.inf, 0.0, m_new)  # -inf - -inf would be NaN: a row that has seen no key yet
    if huge:
        shrink = jnp.exp2((m - top) * factor)
        p = jnp.exp2((s - over_columns(top, s)) * factor)
    else:
        r = top * factor
        shrink = jnp.exp2(m * factor - r)
        p = jnp.exp2(s * factor - over_columns(r, s))
    return m_new, l * shrink + p.sum(axis=1), shrink, p


def finish(m: Any, l: Any, factor: float, *, huge: bool = False) -> tuple[Any, Any]:
    """(what to multiply the accumulator by, lse): 1 / l and ln 2 * r + ln l; 0 and -inf where l = 0; NaN stays NaN."""
    empty = l == 0
    safe = jnp.where(empty, 1.0, l)
    top = m * (factor * LN2) if huge else m * factor * LN2
    return jnp.where(empty, 0.0, 1 / safe), jnp.where(empty, -jnp.inf, top + jnp.log(safe))
