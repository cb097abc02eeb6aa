"""The running state of a row: its maximum m, the sum l of its exponentials, and what both become in the end.

Milakov and Gimelshein, arXiv:1805.02867, with powers of 2: for scores s and a factor f, an element is p = 2**(f * s - r) with the
row's r = f * m, m = max s. That is one fused multiply-add an element; r is rounded, and by as much all of a row's p and its l are
off, so that it cancels, as long as everything (`shrink`, lse) is counted from the very same r: natural lse = r * ln 2 + ln l.
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


HUGE = 2.0**30


def _factor(m: Any, factor: float, huge: bool) -> Any:
    """The factor of a row: 1 where |m| is huge. Its rounding would be more than an exponent holds there, or the product overflow (a
    bias of finfo.min); and numbers that large are at least 64 apart, if they differ, which is nothing beside 1 in any base."""
    return jnp.where(jnp.abs(m) > HUGE, 1.0, factor) if huge else factor


def _exponent(m: Any, factor: float, huge: bool) -> Any:
    return m * _factor(m, factor, huge)


def update(s: Any, factor: float, m: Any, l: Any, *, huge: bool = False) -> tuple[Any, Any, Any, Any]:
    """(m, l, shrink, p) after a tile of scores: what came before counts `shrink` times as much, p = 2**(factor * (s - m)).

    s (rows, columns) float32, -inf where masked; factor > 0; m, l, shrink (rows,). huge: scores may be as large as float32 holds.
    """
    m_new = jnp.maximum(m, s.max(axis=1))
    top = jnp.where(m_new == -jnp.inf, 0.0, m_new)  # -inf - -inf would be NaN: a row that has seen no key yet
    r = _exponent(top, factor, huge)
    shrink = jnp.exp2(_exponent(m, factor, huge) - r)
    row_factor = over_columns(_factor(top, factor, huge), s) if huge else factor
    p = jnp.exp2(s * row_factor - over_columns(r, s))
    return m_new, l * shrink + p.sum(axis=1), shrink, p


def finish(m: Any, l: Any, factor: float, *, huge: bool = False) -> tuple[Any, Any]:
    """(what to multiply the accumulator by, lse): 1 / l and ln 2 * r + ln l; 0 and -inf where l = 0; NaN stays NaN."""
    empty = l == 0
    safe = jnp.where(empty, 1.0, l)
    unit = jnp.where(jnp.abs(m) > HUGE, 1.0, LN2) if huge else LN2
    return jnp.where(empty, 0.0, 1 / safe), jnp.where(empty, -jnp.inf, _exponent(m, factor, huge) * unit + jnp.log(safe))
