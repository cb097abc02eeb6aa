"""The running state of a row: its maximum m, the sum l of its exponentials, and what both become in the end.

Milakov and Gimelshein, arXiv:1805.02867, with powers of 2 (one multiplication less an element): for scores s and a factor f,
m = max s and l = sum 2**(f * (s - m)), a row's probabilities are 2**(f * (s - m)) / l and its natural lse is f * ln 2 * m + ln l.
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

    s (rows, columns) float32, -inf where masked; factor > 0; m, l, shrink (rows,). `factor * s - factor * m` is one fused
    multiply-add an element, but overflows where |s| is near the largest float32, as a bias of finfo.min is; `huge` subtracts first.
    """
    m_new = jnp.maximum(m, s.max(axis=1))
    top = jnp.where(m_new == -jnp.inf, 0.0, m_new)  # -inf - -inf would be NaN: a row that has seen no key yet
    shrink = jnp.exp2((m - top) * factor)
    if huge:
        p = jnp.exp2((s - over_columns(top, s)) * factor)
    else:
        p = jnp.exp2(s * factor - over_columns(top * factor, s))
    return m_new, l * shrink + p.sum(axis=1), shrink, p


def finish(m: Any, l: Any, factor: float) -> tuple[Any, Any]:
    """(what to multiply the accumulator by, lse): 1 / l and factor * ln 2 * m + ln l; 0 and -inf where l = 0; NaN stays NaN."""
    empty = l == 0
    safe = jnp.where(empty, 1.0, l)
    return jnp.where(empty, 0.0, 1 / safe), jnp.where(empty, -jnp.inf, m * (factor * LN2) + jnp.log(safe))
