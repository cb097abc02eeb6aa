"""The running state of a row: its reference m, the sum l of its exponentials, and what both become in the end.

Milakov and Gimelshein, arXiv:1805.02867, with powers of 2: for scores s and a factor f, an element is p = 2**(f * s - m) with the
row's m = f * max s. That is one fused multiply-add an element; m is rounded, and by as much all of a row's p and its l are off, so
that it cancels, as long as everything is counted from the very same m: what came before counts 2**(m_before - m) times, natural lse
= m * ln 2 + ln l. (From f * max s, fused, it would count by the rounding too much at each tile anew: 3 % from the first to the last
of 16384 keys, for scores of 8000.)
Beyond |m| = 2**28 the rounding is a factor of 2**16 and more, which half precision p cannot hold any longer. Scores that may be so
large (a bias of -1e9, of finfo.min) are `huge`: m = max s, and it is each row's `reference` that says how its p are counted.
A row without keys has m = -inf and l = 0; it is decided here and nowhere else that such a row gives 0 and lse -inf.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

LOG2E = math.log2(math.e)
LN2 = math.log(2)
LEAST = -3.4028234663852886e38  # of float32


def over_columns(row: Any, tile: Any) -> Any:
    """(rows,) against (rows, columns)."""
    return lax.broadcast_in_dim(row, tile.shape, [0])


def over_rows(column: Any, tile: Any) -> Any:
    """(columns,) against (rows, columns)."""
    return lax.broadcast_in_dim(column, tile.shape, [1])


FAR = 2.0**27
"""Beyond it float32 numbers are at least 16 apart."""


def reference(m: Any, factor: float) -> tuple[Any, Any]:
    """(a, r), per row: of huge scores whose largest is m, finite, p = 2**(a * s - r), one fused multiply-add, and only fused right:
    r is that of the product rounded once.

    a = factor and r = a * m, rounded, up to |m| = FAR. Beyond, a = 2 and r = 2 * m, which is exact: what is not the largest is at
    least 16 less, and e**-16 or 2**-32 of it is nothing beside the 8 by which such scores are off. finfo.min would not survive
    being doubled: beyond 2**126, a = 1.
    """
    size = jnp.abs(m)
    a = jnp.where(size > FAR, jnp.where(size > 2.0**126, 1.0, 2.0), factor)
    return a, lax.optimization_barrier(a * m)  # rounded here, or fused into one of its uses and not into another


def powers(s: Any, factor: float, m: Any, *, huge: bool = False, axis: int = 1) -> tuple[Any, Any, Any]:
    """(m, shrink, p) after a tile of scores, whose keys are `axis`: what came before counts `shrink` times as much, p as above.

    s float32, -inf where masked; factor > 0; m, shrink: s without its keys.
    """
    over_keys = over_columns if axis == 1 else over_rows
    most = s.max(axis=axis)
    m_new = jnp.maximum(m, most if huge else most * factor)
    top = jnp.maximum(m_new, LEAST)  # -inf - -inf would be NaN: a row that has seen no key yet
    if huge:
        a, r = reference(top, factor)
        near = jnp.maximum(jnp.abs(m), jnp.abs(top)) <= FAR  # else what came before counted otherwise, if it counts at all
        before = lax.optimization_barrier(m * factor)
        shrink = jnp.exp2(jnp.where(near, before - r, (m - top) * factor))
        return m_new, shrink, jnp.exp2(s * over_keys(a, s) - over_keys(r, s))
    p = jnp.exp2(s * factor - over_keys(top, s))  # first: at D128 ptxas's order is the better one then, 704 to 625 (NOTES.md)
    return m_new, jnp.exp2(m - top), p


EIGHT = 8
"""How many sums of a row are kept apart, of every eighth key each: a thread has two of them, as in WGMMA's layout."""


def update(s: Any, factor: float, m: Any, l: Any, *, chains: int = 0, huge: bool = False) -> tuple[Any, Any, Any, Any]:
    """(m, l, shrink, p) after a tile of scores (rows, keys): `powers`, and the sum l (rows,) of the exponentials.

    chains: l is (rows, EIGHT), sums that are yet to be added up: that takes exchanges between the four threads that have a row,
    once a row and not once a tile (FlashAttention-2 and -3 do the same). A tile's exponentials come in so many chains: of how
    many hangs when they are made, and with that who waits for whom (NOTES.md, "Sums in chains").
    """
    m, shrink, p = powers(s, factor, m, huge=huge)
    if not chains:
        return m, l * shrink + p.sum(axis=1), shrink, p
    return m, l * over_columns(shrink, l) + in_eights(p, chains), shrink, p


def in_eights(p: Any, chains: int) -> Any:
    """(rows, keys) -> (rows, EIGHT): every eighth key's sum, in `chains` sums that are added up in pairs."""
    eights = [p[:, n : n + EIGHT] for n in range(0, p.shape[1], EIGHT)]
    add = lambda a, b: a + b  # noqa: E731
    sums = [functools.reduce(add, eights[n::chains]) for n in range(min(chains, len(eights)))]
    while len(sums) > 1:
        half = len(sums) // 2
        sums = list(map(add, sums[:half], sums[half:]))
    return sums[0]


def finish(m: Any, l: Any, *, huge: bool = False) -> tuple[Any, Any]:
    """(what to multiply the accumulator by, lse): 1 / l and ln 2 * m + ln l; 0 and -inf where l = 0; NaN stays NaN."""
    empty = l == 0
    safe = jnp.where(empty, 1.0, l)
    # as p was counted; f is log2 e beside a bias
    top = jnp.where(jnp.abs(m) > FAR, m, (m * LOG2E) * LN2) if huge else m * LN2
    return jnp.where(empty, 0.0, 1 / safe), jnp.where(empty, -jnp.inf, top + jnp.log(safe))
