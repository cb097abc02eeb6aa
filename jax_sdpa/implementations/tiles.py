"""One tile of the blockwise backend: its scores, its dropout, which tiles there are, and padding where lengths ask for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_sdpa import compat
from jax_sdpa.implementations import scores
from jax_sdpa.implementations.chunks import Chunks, Products, is_one, loop, scaled
from jax_sdpa.masks import KeyLengths
from jax_sdpa.request import SdpaRequest

ALIGN = 64  # pieces of a row block's key range begin and end at multiples of it: a whole number of vectors


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What is done to a tile of a chunk; `shared` is the chunk's `Chunks.shared`."""

    chunks: Chunks

    @property
    def products(self) -> Products:
        return Products(self.chunks.request.spec.precision, self.chunks.dtype)

    def _lengths(self, tile: jax.Array, by_key: bool) -> tuple[Any, Any]:
        """(bq, bk) of a tile (n, R * bq, bk), or (n, bk, R * bq) by key."""
        R = self.chunks.request.group
        return (tile.shape[2] // R, tile.shape[1]) if by_key else (tile.shape[1] // R, tile.shape[2])

    def masked(
        self, shared: SdpaRequest, s: jax.Array, q0: Any, k0: Any, masked: bool, by_key: bool = False, after: Any = None
    ) -> jax.Array:
        """Scores with bias and dense masks added and, unless the tile is FULL, structured masks applied; `after`: no key before."""
        bq, bk = self._lengths(s, by_key)
        if (addend := scores.addend(shared, q0, bq, k0, bk, s.dtype)) is not None:
            s = self.chunks.apply(jnp.add, s, addend, by_key)
        kept = scores.kept(shared, q0, bq, k0, bk) if masked else None
        if masked and after is not None:
            new = (k0 + lax.broadcasted_iota(jnp.int32, (1, bk), 1) >= after)[None, None]
            kept = new if kept is None else kept & new
        if kept is not None:
            s = self.chunks.apply(lambda tile, kept: jnp.where(kept, tile, -jnp.inf), s, kept, by_key)
        return s

    def logits(self, rows: jax.Array, keys: jax.Array, by_key: bool = False) -> jax.Array:
        """scale * q @ k.T of rows and keys that bear their parts of the scale: (n, R * bq, bk), or (n, bk, R * bq) by key."""
        product = self.products.by_transpose(keys, rows) if by_key else self.products.rows_by_keys(rows, keys)
        return scaled(product, self.chunks.factors.scores)

    def scores(
        self, shared: SdpaRequest, rows: jax.Array, keys: jax.Array, q0: Any, k0: Any, masked: bool, after: Any = None
    ) -> jax.Array:
        """The finished scores of rows (n, R * bq, E), scaled already, against keys (n, bk, E): (n, R * bq, bk)."""
        s, _ = scores.cap(shared, self.logits(rows, keys))
        return self.masked(shared, s, q0, k0, masked, after=after)

    def drop(self, shared: SdpaRequest, p: jax.Array, q0: Any, k0: Any, by_key: bool = False) -> jax.Array:
        """Probabilities (or their cotangents) after dropout."""
        bq, bk = self._lengths(p, by_key)
        survivors = scores.survivors(shared, q0, bq, k0, bk, p.dtype)
        return p if survivors is None else self.chunks.apply(jnp.multiply, p, survivors, by_key)

    def first_state(self, shared: SdpaRequest, bq: Any) -> tuple[jax.Array, jax.Array]:
        """(m, l), (n, R * bq) each, before any key: the sink alone, or the lowest number and 0.

        The lowest number, not -inf: exp(-inf - m) is then 0 in a row without keys, where -inf - -inf would be NaN.
        """
        shape, dtype = (self.chunks.n, self.chunks.request.group * bq), self.chunks.dtype
        if shared.sinks is None:
            return jnp.full(shape, jnp.finfo(dtype).min, dtype), jnp.zeros(shape, dtype)
        sinks = jnp.broadcast_to(self.chunks.per_head(shared.sinks.astype(dtype)), (*shape[:1], self.chunks.request.group, bq))
        m = jnp.maximum(sinks.reshape(shape), jnp.finfo(dtype).min)
        return m, jnp.exp(sinks.reshape(shape) - m)


def pieces(request: SdpaRequest, q0: int, bq: int) -> list[tuple[int, int, bool]]:
    """The static key range of a row block as [(start, end, masked), …]; empty if no row of it sees a key. All keys, masked, where
    the range is not known while tracing."""
    L, S = request.query_len, request.key_len
    lo, hi = request.mask.kv_range(q0, q0 + bq, L, S)
    if not (isinstance(lo, int) and isinstance(hi, int)):
        return [(0, S, True)]
    full_lo, full_hi = request.mask.full_range(q0, q0 + bq, L, S)
    if full_lo > lo:
        full_lo = -(-full_lo // ALIGN) * ALIGN
    if full_hi < hi:
        full_hi = full_hi // ALIGN * ALIGN
    if hi <= lo:
        return []
    if full_hi <= full_lo:
        return [(lo, hi, True)]
    cuts = [(lo, full_lo, True), (full_lo, full_hi, False), (full_hi, hi, True)]
    return [(a, b, masked) for a, b, masked in cuts if a < b]


Visit = tuple[Any, Any, Any, Any]  # key blocks: first, first FULL, behind the last FULL, behind the last


def blocks_to_visit(shared: SdpaRequest, q0: Any, bq: Any, bk: Any) -> Visit:
    """Which key blocks the rows [q0, q0 + bq) of a chunk visit, and which of those need no structured mask."""
    S = shared.key_len
    whole, blocks = S // bk, -(-S // bk)
    if not shared.masks:
        return 0, 0, whole, blocks
    block = (q0, q0 + bq, shared.query_len, shared.key_len)
    lo, hi = (_over(bound, jnp_reduce) for bound, jnp_reduce in zip(shared.mask.kv_range(*block), (jnp.min, jnp.max), strict=True))
    full_lo, full_hi = (
        _over(bound, jnp_reduce) for bound, jnp_reduce in zip(shared.mask.full_range(*block), (jnp.max, jnp.min), strict=True)
    )
    first, last = lo // bk, jnp.where(hi > lo, (hi + bk - 1) // bk, lo // bk)
    full_first = jnp.clip((full_lo + bk - 1) // bk, first, last)
    return first, full_first, jnp.clip(full_hi // bk, full_first, last), last


def block_at(request: SdpaRequest, j: Any, bk: Any) -> tuple[Any, Any]:
    """(where the keys of block j begin, the first of them that is not the block's before): the last block ends with the keys, so
    that nothing is padded. The second is None where S is a whole number of blocks."""
    S = request.key_len
    return (j * bk, None) if not isinstance(S, int) or S % bk == 0 else (jnp.minimum(j * bk, S - bk), j * bk)


def _over(bound: Any, reduce: Callable[[Any], Any]) -> Any:
    """One bound for all batch entries of a chunk."""
    return bound if isinstance(bound, int) or bound.ndim == 0 else reduce(bound)


def loop_over_keys(visit: Visit, step: Callable[[Any, Any, bool], Any], state: Any) -> Any:
    """state after `step(j, state, masked)` for every key block to visit, in order."""
    first, full_first, full_last, last = visit
    for start, end, masked in ((first, full_first, True), (full_first, full_last, False), (full_last, last, True)):
        if isinstance(start, int) and isinstance(end, int) and start >= end:
            continue
        state = loop(start, end, lambda j, state, masked=masked: step(j, state, masked), state)
    return state


def _pad_axis(x: Any, axis: int, amount: Any, fill: Any = 0) -> Any:
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (0, amount, 0)
    return lax.pad(x, jnp.asarray(fill, x.dtype), widths)


def pad(request: SdpaRequest, bq: Any, bk: Any) -> SdpaRequest:
    """The request with lengths that are multiples of the blocks; the keys that this adds are masked. Itself if nothing is to do."""
    L, S = request.query_len, request.key_len
    more_q, more_k = (-(-length // block) * block - length for length, block in ((L, bq), (S, bk)))
    if all(isinstance(more, int) and more == 0 for more in (more_q, more_k)):
        return request

    def dense(x: Any) -> Any:
        if x is None:
            return None
        for axis, more in ((2, more_q), (3, more_k)):
            x = x if is_one(x.shape[axis]) else _pad_axis(x, axis, more)
        return x

    def scales(x: Any) -> Any:
        return x if x is None or is_one(x.shape[2]) else _pad_axis(x, 2, more_k)

    axis = request.length_axis
    masks = tuple(mask.padded(more_q, more_k) for mask in request.masks)
    if not (isinstance(more_k, int) and more_k == 0):
        masks = (*masks, KeyLengths(jnp.asarray(S, jnp.int32)[None] if compat.is_symbolic(S) else S))
    return dataclasses.replace(
        request,
        query=_pad_axis(request.query, axis, more_q),
        key=_pad_axis(request.key, axis, more_k),
        value=_pad_axis(request.value, axis, more_k),
        bias=dense(request.bias),
        keep_mask=dense(request.keep_mask),
        masks=masks,
        key_scale=scales(request.key_scale),
        value_scale=scales(request.value_scale),
    )
