"""The running state of a row: its maximum m, the sum l of its exponentials, and what both become in the end.

Milakov and Gimelshein, arXiv:1805.02867, in base 2 (one multiplication less an element): with s the scores times log2(e),
m = max s and l = sum 2**(s - m), a row's probabilities are 2**(s - m) / l and its natural lse is (m + log2 l) * ln 2.
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


def update(s: Any, factor: float, m: Any, l: Any) -> tuple[Any, Any, Any, Any]:
    """(m, l, shrink, p) after a tile of scores: what came before counts `shrink` times as much, p = 2**(factor * s - m).

    s (rows, columns) float32, -inf where masked; factor > 0: what is left to multiply, so that it costs one fused
    multiply-add an element; m, l, shrink (rows,).
    """
    m_new = jnp.maximum(m, s.max(axis=1) * factor)
    top = jnp.where(m_new == -jnp.inf, 0.0, m_new)  # -inf - -inf would be NaN: a row that has seen no key yet
    shrink = jnp.exp2(m - top)
    p = jnp.exp2(s * factor - over_columns(top, s))
    return m_new, l * shrink + p.sum(axis=1), shrink, p


def finish(m: Any, l: Any) -> tuple[Any, Any]:
    """(what to multiply the accumulator by, lse): 1 / l and ln 2 * (m + log2 l); 0 and -inf where l = 0; NaN stays NaN."""
    empty = l == 0
    safe = jnp.where(empty, 1.0, l)
    return jnp.where(empty, 0.0, 1 / safe), jnp.where(empty, -jnp.inf, m * LN2 + jnp.log(safe))
