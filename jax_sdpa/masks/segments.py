"""Masks that compare ids: packed sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp

from jax_sdpa.masks.base import Index, Mask, int32


def at(ids: Any, index: Index) -> Any:
    """Entries of an array (batch..., length), with a heads dim behind the batch dims."""
    taken = ids[..., index]  # (batch..., *index.shape)
    return taken if ids.ndim == 1 else jnp.expand_dims(taken, ids.ndim - 1)


def longer(x: Any, more: Index, fill: Any) -> Any:
    """x (batch..., length) with `more` entries behind; fill: a number, or an array (batch..., 1)."""
    x = jnp.asarray(x)
    wider = jax.lax.pad(x, jnp.asarray(0, x.dtype), [(0, 0, 0)] * (x.ndim - 1) + [(0, more, 0)])
    here = jax.lax.broadcasted_iota(jnp.int32, wider.shape, x.ndim - 1) < x.shape[-1]
    return jnp.where(here, wider, fill)


@dataclasses.dataclass(frozen=True)
class SegmentIds(Mask):
    """Packed sequences: query q sees the keys with its own id; a negative id is padding and takes part in nothing.

    Args:
        query: integer array (batch..., L).
        key: integer array (batch..., S); default: the query's ids (self-attention). A mask that is made where it is used, inside of
            a jitted function, is known to have ids in common; of one that is an argument of it they are sorted to be compared.

    >>> SegmentIds(jnp.array([0, 0, 1, -1])).materialise(4, 4).astype(int)
    Array([[1, 1, 0, 0],
           [1, 1, 0, 0],
           [0, 0, 1, 0],
           [0, 0, 0, 0]], dtype=int32)
    """

    query: Any
    key: Any = None
    arrays = ("query:1", "key:1")

    def __post_init__(self) -> None:
        own = self.key is None or self.key is self.query
        object.__setattr__(self, "query", int32(self.query, "SegmentIds.query"))
        object.__setattr__(self, "key", self.query if own else int32(self.key, "SegmentIds.key"))
        for name in ("query", "key"):
            if getattr(self, name).ndim == 0:
                raise ValueError(f"SegmentIds.{name} must have one id per position, (batch..., length), got a scalar.")

    def parts(self, L: Index, S: Index) -> tuple[Mask, ...]:
        if (self.query.shape[-1], self.key.shape[-1]) != (L, S):
            raise ValueError(
                f"SegmentIds must have one id per query and per key, {L} and {S} here, got {self.query.shape[-1]} and "
                f"{self.key.shape[-1]}."
            )
        return (_OwnSegments(self.query) if self.key is self.query else self,)

    def padded(self, more_q: Index, more_k: Index) -> Mask:
        return dataclasses.replace(self, query=longer(self.query, more_q, -1), key=longer(self.key, more_k, -1))

    def local(self, number: Callable[[Any], Any], by_query: Callable[[Any], Any], by_key: Callable[[Any], Any]) -> Self:
        return jax.tree.unflatten(jax.tree.structure(self), [by_query(self.query), by_key(self.key)])

    def seen_from(self, q0: Index, k0: Index) -> SegmentIds:
        return self

    def transposed(self) -> SegmentIds:
        return type(self)(self.key, self.query)

    def keep(self, q_idx: Index, k_idx: Index) -> Any:
        q, k = at(self.query, q_idx), at(self.key, k_idx)
        return (q == k) & (q >= 0)

    def kv_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        """The stretch of keys between the first and the last whose id lies between the block's smallest and largest id."""
        return self._stretch(self._ids_of(q_lo, q_hi, L)[2])

    def full_range(self, q_lo: Index, q_hi: Index, L: Index, S: Index) -> tuple[Index, Index]:
        """That stretch, where the block's queries have one id, and no other id stands between its keys; else nothing."""
        smallest, largest, hit = self._ids_of(q_lo, q_hi, L)
        position = jnp.arange(L)
        padding = ((position >= q_lo) & (position < q_hi) & (self.query < 0)).any(-1)
        lo, hi = self._stretch(hit)
        whole = (smallest == largest)[..., 0] & ~padding & (hit.sum(-1, dtype=jnp.int32) == hi - lo)
        return lo, jnp.where(whole, hi, lo)

    def _ids_of(self, q_lo: Index, q_hi: Index, L: Index) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(smallest, largest) id of the block's queries, (batch..., 1), and which keys have one between them, (batch..., S)."""
        position, big = jnp.arange(L), jnp.iinfo(self.query.dtype).max
        inside = (position >= q_lo) & (position < q_hi) & (self.query >= 0)
        smallest = jnp.where(inside, self.query, big).min(-1, keepdims=True)
        largest = jnp.where(inside, self.query, -1).max(-1, keepdims=True)
        return smallest, largest, (self.key >= smallest) & (self.key <= largest)

    @staticmethod
    def _stretch(hit: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[first, last + 1) of those hit, (batch...,): two reductions, which XLA makes with `hit` in one."""
        k = jax.lax.broadcasted_iota(jnp.int32, hit.shape, hit.ndim - 1)
        hi = jnp.where(hit, k + 1, 0).max(-1)
        return jnp.minimum(jnp.where(hit, k, hit.shape[-1]).min(-1), hi), hi

    def key_valid(self, L: Index, S: Index) -> Any:
        """A key is seen if some query bears its id: in the sorted run of each id, queries come first; no L x S comparison."""
        query, key = jnp.asarray(self.query), jnp.asarray(self.key)
        batch = jnp.broadcast_shapes(query.shape[:-1], key.shape[:-1])
        query, key = (jnp.broadcast_to(ids, (*batch, ids.shape[-1])) for ids in (query, key))
        ids, axis = jnp.concatenate([query, key], -1), query.ndim - 1
        position = jax.lax.broadcasted_iota(jnp.int32, ids.shape, axis)
        ids, origin = jax.lax.sort((ids, position), num_keys=1, is_stable=True)
        first = jnp.concatenate([jnp.ones_like(ids[..., :1], bool), ids[..., 1:] != ids[..., :-1]], -1)
        run = jax.lax.cummax(jnp.where(first, position, 0), axis)  # where each id's run begins
        seen = (jnp.take_along_axis(origin, run, -1) < L).astype(jnp.int32)
        return (jax.lax.sort((origin, seen), num_keys=1)[1][..., L:] == 1) & (key >= 0)


@dataclasses.dataclass(frozen=True)
class _OwnSegments(SegmentIds):
    """What a call makes of ids that queries and keys have in common: a key that is no padding is seen, by its own query.

    Of a part of a call that goes for all of its keys, those that only queries of other parts see among them.
    """

    title = "SegmentIds"

    def key_valid(self, L: Index, S: Index) -> Any:
        return jnp.asarray(self.key) >= 0
